"""foldpar's grouped products for experts of transformers, whose weights stay in their module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldpar.errors import ModelError
from foldpar.models import activation_of, own_gate
from foldpar.moe import Activation, ExpertStorage, Places, grouped_feed_forward, in_autocast_dtype

__all__ = ["experts_forward", "grouped_products", "why_not_grouped"]


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="The shapes follow the routing, so tracing it would compile anew for other routings."
)
def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[tokens, dim]`` to the same, for a module of transformers that holds the weights."""
    rows = in_autocast_dtype(hidden_states)
    weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, rows.dtype))

    # (t0: e2 e0) (t1: e0 e9) -> slots e0:t0 e0:t1 e2:t0 | e9:t1, of which those of experts elsewhere come last.
    local = experts.down_proj.shape[0]
    ids = top_k_index.flatten().long().clamp(max=local)
    assignment_of_slot = ids.argsort(stable=True)
    slot_of_assignment = torch.empty_like(assignment_of_slot)
    slot_of_assignment[assignment_of_slot] = torch.arange(len(ids), device=ids.device)
    copies = torch.where(ids < local, slot_of_assignment, -1).view_as(top_k_index)
    counts = torch.zeros(local + 1, dtype=torch.int32, device=ids.device).scatter_add_(
        0, ids, torch.ones_like(ids, dtype=torch.int32)
    )
    ends = counts[:local].cumsum(0, dtype=torch.int32)
    places = Places(assignment_of_slot // top_k_index.shape[1], assignment_of_slot, copies, ends)
    computed = grouped_products(experts, rows, ends, weights, places=places)
    return computed.to(hidden_states.dtype)


def grouped_products(
    experts: Any,
    rows: Tensor,
    ends: Tensor,
    weights: Tensor,
    sizes: tuple[int, ...] | None = None,
    places: Places | None = None,
) -> Tensor:
    """What experts of transformers compute of rows grouped by expert, times each row's weight: ``[rows, dim]``.

    ``ends``, ``sizes`` and ``places`` as in :func:`foldpar.moe.grouped_feed_forward`.

    Raises:
        ModelError: these products do not compute what the experts do; see :func:`why_not_grouped`.
    """
    storage = ExpertStorage(transposed=experts.is_transposed, interleaved=not experts.is_concatenated)
    first, bias = ("gate_up_proj", "gate_up_proj_bias") if experts.has_gate else ("up_proj", "up_proj_bias")
    return grouped_feed_forward(
        rows,
        storage.for_product(getattr(experts, first)),
        storage.for_product(experts.down_proj),
        ends,
        _activation_of(experts),
        weights=weights,
        gate_up_bias=getattr(experts, bias) if experts.has_bias else None,
        down_bias=experts.down_proj_bias if experts.has_bias else None,
        sizes=sizes,
        interleaved=storage.interleaved,
        places=places,
    )


def why_not_grouped(experts: Any) -> str | None:
    """Why foldpar's grouped products do not compute what a module of transformers does; ``None`` where they do."""
    if not hasattr(experts, "has_post_expert_norm"):
        return f"{type(experts).__name__} is none of transformers' experts interface"
    try:
        _activation_of(experts)
    except ModelError as error:
        return str(error)
    return None


def _activation_of(experts: Any) -> Activation:
    """Which activation a module has; looked up anew when its function is another one."""
    gate = getattr(own_gate(experts), "__func__", None)
    key = (getattr(experts, "act_fn", None), gate, getattr(experts, "alpha", None), getattr(experts, "limit", None))
    known: tuple[object, Activation] | None = experts.__dict__.get("_foldpar_activation")
    if known is None or known[0] != key:
        known = experts.__dict__["_foldpar_activation"] = key, _look_up(experts)
    return known[1]


def _look_up(experts: Any) -> Activation:
    kind = type(experts).__name__
    if getattr(experts, "has_post_expert_norm", False):
        raise ModelError(
            f"{kind} has a norm behind each expert, which foldpar's grouped products do not compute. {_ANOTHER}"
        )
    try:
        return activation_of(experts, kind, gated=experts.has_gate, interleaved=not experts.is_concatenated)
    except ModelError as error:
        raise ModelError(f"{error} {_ANOTHER}") from error


_ANOTHER = 'Use another implementation: model.set_experts_implementation("grouped_mm").'
