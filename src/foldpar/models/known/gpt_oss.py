"""GPT-OSS: interleaved and transposed experts with biases, a clamped activation, and attention sinks."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from foldpar.models.known.adapter import MoEAdapter
from foldpar.models.known.plans import ATTENTION
from foldpar.models.recognition import activation_of, own_gate
from foldpar.moe import Activation, ClampedSwiGLU, ExpertStorage


def _activation(experts: nn.Module) -> Activation:
    module = cast(Any, experts)
    if own_gate(experts) is not None:
        return activation_of(experts, "experts", interleaved=True)
    return ClampedSwiGLU(alpha=module.alpha, limit=module.limit)


ADAPTERS = (
    MoEAdapter(
        "GptOssMLP",
        storage=ExpertStorage(True, True, gate_up_bias="gate_up_proj_bias", down_bias="down_proj_bias"),
        activation=_activation,
        tp_plan={**ATTENTION, "self_attn.sinks": "colwise"},
    ),
)
