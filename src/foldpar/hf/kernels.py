"""foldpar's grouped kernels as an experts implementation of transformers, for models that are not folded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldpar.errors import ModelError
from foldpar.models import activation_of
from foldpar.moe import Activation, ExpertStorage, grouped_feed_forward, in_autocast_dtype, pick

__all__ = ["register_with_transformers"]


def register_with_transformers(name: str = "foldpar") -> str:
    """Make foldpar's grouped products an experts implementation of transformers; returns the name that it goes by.

    The light way in: the model keeps its modules and its weights, and each rank computes all experts that it holds.
    It serves one GPU, plain data parallelism and FSDP, and experts that transformers itself spread over ranks.
    Spreading them by a layout is :func:`foldpar.fold_model`'s, whose experts do not come by here::

        model.set_experts_implementation(foldpar.hf.register_with_transformers())

    Backward:
        Exact, of all parameters, inputs and routing weights; also in float64.

    Raises:
        ModelError: in forward, experts with a norm behind them, or an activation that cannot be kept as a function.

    Source: transformers' experts interface, ``integrations/moe.py``.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, _experts_forward)
    return name


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="The shapes follow the routing, so tracing it would compile anew for other routings."
)
def _experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[tokens, dim]`` to the same, for a module of transformers that holds the weights."""
    activation = _activation_of(experts)
    storage = ExpertStorage(transposed=experts.is_transposed, interleaved=not experts.is_concatenated)
    first, bias = ("gate_up_proj", "gate_up_proj_bias") if experts.has_gate else ("up_proj", "up_proj_bias")
    into, out = (storage.for_product(getattr(experts, name)) for name in (first, "down_proj"))
    rows = in_autocast_dtype(hidden_states)
    weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, rows.dtype))

    # (t0: e2 e0) (t1: e0 e9) -> slots e0:t0 e0:t1 e2:t0 | e9:t1, of which those of experts elsewhere come last.
    local = into.shape[0]
    ids = top_k_index.flatten().long().clamp(max=local)
    assignment_of_slot = ids.argsort(stable=True)
    slot_of_assignment = torch.empty_like(assignment_of_slot)
    slot_of_assignment[assignment_of_slot] = torch.arange(len(ids), device=ids.device)
    copies = torch.where(ids < local, slot_of_assignment, -1).view_as(top_k_index)
    counts = torch.zeros(local + 1, dtype=torch.int32, device=ids.device).scatter_add_(
        0, ids, torch.ones_like(ids, dtype=torch.int32)
    )
    source = assignment_of_slot // top_k_index.shape[1]

    computed = grouped_feed_forward(
        rows,
        into,
        out,
        counts[:local].cumsum(0, dtype=torch.int32),
        activation,
        weights=pick(weights, assignment_of_slot, copies),
        gate_up_bias=getattr(experts, bias) if experts.has_bias else None,
        down_bias=experts.down_proj_bias if experts.has_bias else None,
        interleaved=storage.interleaved,
        places=(source, copies),
    )
    return computed.to(hidden_states.dtype)


def _activation_of(experts: Any) -> Activation:
    """Which activation a module has; looked up anew when its function is another one."""
    gate = getattr(getattr(experts, "_apply_gate", None), "__func__", None)
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
