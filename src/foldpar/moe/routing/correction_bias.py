"""Load balancing without an auxiliary loss: a bias that steers which experts are chosen, moved once per step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldpar.arguments import expect
from foldpar.moe.lanes import LaneState
from foldpar.moe.routing.router import TopKRouter


@torch.no_grad()
def update_correction_bias(model: nn.Module, *, rate: float = 1e-3) -> None:
    """Raise the correction bias of underloaded experts by ``rate``, lower that of overloaded ones, and start counting
    anew. Call it once per optimizer step, on every rank.

    For every :class:`TopKRouter` with ``correction_bias=True`` inside a ``FoldedMoE`` of the model. Such a router
    counts the decisions of every forward in training, as integers, each once however often a layer is recomputed, and
    over all micro-batches since the last update; forwards of ``eval()`` and padding tokens do not count. Counts are
    summed over all ranks of the stage, each token once, so the bias stays the same on all of them, bit by bit, and does
    not depend on the layout. The bias is part of the ``state_dict``; the counts are not, and are zero between steps.

    Layers of equal lane states share their collectives: two of ``layers * num_experts`` integers.

    Example, with 4 experts, ``rate=0.001`` and counts 5 1 1 1 (mean 2)::

        bias 0 0 0 0  ->  -0.001 0.001 0.001 0.001

    Raises:
        ValueError: the model has no such router, or ``rate`` is not positive.

    Source: DeepSeek-V3 (2024), section 2.1.2; Wang et al. 2024, algorithm 1 (the sign of the error).
    """
    expect("update_correction_bias", model=(model, nn.Module), rate=(rate, (float, int)))
    if not rate > 0:
        raise ValueError(f"rate = {rate} must be positive; DeepSeek-V3 takes 0.001, and 0 would freeze the bias.")
    routers = _routers(model)
    if not routers:
        raise ValueError(
            "The model has no router with a correction bias inside a FoldedMoE. Build it with "
            "TopKRouter(..., correction_bias=True)."
        )
    by_state: dict[LaneState, list[tuple[Tensor, Tensor]]] = {}
    for bias, counts, lane_state in routers:
        by_state.setdefault(lane_state, []).append((bias, counts))
    for lane_state, buffers in by_state.items():
        pooled = lane_state.sum_counts(torch.cat([counts for _, counts in buffers]), "global")
        for (bias, counts), total in zip(buffers, pooled.split([len(counts) for _, counts in buffers]), strict=True):
            # The sign of (mean - count), in integers: no rounding decides whether an expert is above the mean.
            bias.add_((total.sum() - total * len(total)).sign().to(bias.dtype), alpha=rate)
            counts.zero_()


def _routers(model: nn.Module) -> list[tuple[Tensor, Tensor, LaneState]]:
    """Correction bias, counts and lane state of every router that has them, each once."""
    found: dict[int, tuple[Tensor, Tensor, LaneState]] = {}
    for layer in model.modules():
        lane_state = getattr(layer, "lane_state", None)
        if isinstance(lane_state, LaneState):
            for router in layer.modules():
                if isinstance(router, TopKRouter) and router.correction_bias is not None:
                    assert router.assignments_per_expert is not None
                    found[id(router)] = (router.correction_bias, router.assignments_per_expert, lane_state)
    return list(found.values())
