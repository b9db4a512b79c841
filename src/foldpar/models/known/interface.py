"""Blocks of transformers that nobody named: their experts follow the interface of ``use_experts_implementation``.

The interface says how weights lie, and that they are called with hidden states, ids and weights; the rest is proven
when a block is folded. Dense layers around it are another matter, so this is for ``tp = 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from foldpar.models.known.adapter import MoEAdapter
from foldpar.moe import ExpertStorage

__all__ = ["ByInterface", "adapter_by_interface"]

_INTERFACE = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "config")


@dataclass(frozen=True, slots=True)
class ByInterface(MoEAdapter):
    """An adapter that nobody wrote."""


def adapter_by_interface(block: nn.Module) -> ByInterface | None:
    """The adapter of a block with a child that follows the interface; ``None`` where there is none."""
    for name, child in block.named_children():
        own: dict[str, Any] = vars(child)
        if all(attribute in own for attribute in _INTERFACE):
            flags = (own["has_gate"], own["has_bias"], own["has_post_expert_norm"])
            return _adapter(type(block).__name__, name, *flags, own["is_transposed"], not own["is_concatenated"])
    return None


@cache
def _adapter(
    block: str, experts: str, gated: bool, biased: bool, norm_behind: bool, transposed: bool, interleaved: bool
) -> ByInterface:
    """One object for equal blocks, which are then of one kind."""
    first = "gate_up_proj" if gated else "up_proj"
    biases = (f"{first}_bias", "down_proj_bias") if biased else ("gate_up_bias", "down_bias")
    return ByInterface(
        block,
        experts=experts,
        storage=ExpertStorage(transposed, interleaved, *biases, first),
        refused="each expert has a norm behind it, which foldpar's grouped products do not compute."
        if norm_behind
        else None,
    )
