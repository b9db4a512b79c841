"""Load balancing without an auxiliary loss: a bias that steers which experts are chosen, moved once per step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from foldpar.arguments import expect
from foldpar.comm import is_dtensor
from foldpar.errors import ModelError
from foldpar.moe.folded_experts import FoldedExperts
from foldpar.moe.lanes import LaneState
from foldpar.moe.routing.router import TopKRouter


@torch.no_grad()
def update_correction_bias(model: nn.Module, *, rate: float = 1e-3) -> None:
    """Raise the correction bias of underloaded experts by ``rate``, lower that of overloaded ones, and start counting
    anew. Call it once per optimizer step, on every rank.

    For every :class:`TopKRouter` with ``correction_bias=True`` inside a ``FoldedMoE`` of the model, and for every block
    of transformers with an ``e_score_correction_bias`` (DeepSeek-V3, GLM-4-MoE, MiniMax-M2, Nemotron-H and others) that
    :func:`foldpar.fold_model` folded. The decisions of every forward in training are counted, as integers, each once
    however often a layer is recomputed, and over all micro-batches since the last update; forwards of ``eval()`` and
    padding tokens do not count (in blocks of transformers, which do not know them, padding tokens do). Counts are
    summed over all ranks of the stage, each token once, so the bias stays the same on all of them, bit by bit, and does
    not depend on the layout. The bias is part of the ``state_dict``; the counts are not, and are zero between steps.

    Layers of equal lane states share their collectives: two of ``layers * num_experts`` integers.

    Example, with 4 experts, ``rate=0.001`` and counts 5 1 1 1 (mean 2)::

        bias 0 0 0 0  ->  -0.001 0.001 0.001 0.001

    Raises:
        ValueError: the model has no such router, or ``rate`` is not positive. ModelError: a bias of another size than
            there are experts, one that FSDP has cut, or one of a dtype in which a step of the rate is lost.

    Source: DeepSeek-V3 (2024), section 2.1.2; Wang et al. 2024, algorithm 1 (the sign of the error).
    """
    expect("update_correction_bias", model=(model, nn.Module), rate=(rate, (float, int)))
    if not rate > 0:
        raise ValueError(f"rate = {rate} must be positive; DeepSeek-V3 takes 0.001, and 0 would freeze the bias.")
    routers = _routers(model)
    if not routers:
        raise ValueError(
            "The model has no router with a correction bias inside a FoldedMoE, and no folded block of transformers "
            "with an e_score_correction_bias. Build it with TopKRouter(..., correction_bias=True)."
        )
    by_state: dict[LaneState, list[tuple[Tensor, Tensor]]] = {}
    for bias, counts, lane_state in routers:
        by_state.setdefault(lane_state, []).append((bias, counts))
    for lane_state, buffers in by_state.items():
        pooled = lane_state.sum_counts(torch.cat([counts for _, counts in buffers]), "global")
        for (bias, counts), total in zip(buffers, pooled.split([len(counts) for _, counts in buffers]), strict=True):
            # The sign of (mean - count), in integers: no rounding decides whether an expert is above the mean.
            bias.add_((total.sum() - total * len(total)).sign().to(bias.dtype).view(bias.shape), alpha=rate)
            counts.zero_()


def correction_bias_in(block: nn.Module) -> Tensor | None:
    """The correction bias of a block of transformers, a buffer or a parameter; ``None`` where there is none."""
    named = [*block.named_buffers(), *block.named_parameters()]
    return next((each for name, each in named if name.rpartition(".")[2] == "e_score_correction_bias"), None)


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
    return [*found.values(), *_hub_routers(model)]


def _hub_routers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, LaneState]]:
    for name, experts in model.named_modules():
        if not (isinstance(experts, FoldedExperts) and experts.counts_decisions):
            continue
        bias, parts = None, name.split(".")
        while bias is None and parts:
            parts.pop()
            bias = correction_bias_in(model.get_submodule(".".join(parts)))
        if bias is None:
            raise ModelError(f"The block around {name} had an e_score_correction_bias when it was folded; it is gone.")
        _check(name, bias, experts.num_experts)
        if experts.decisions is None:
            experts.decisions = torch.zeros(experts.num_experts, dtype=torch.int64, device=bias.device)
        yield bias, experts.decisions, experts.lane_state


def _check(name: str, bias: Tensor, num_experts: int) -> None:
    if is_dtensor(bias):
        raise ModelError(
            f"The e_score_correction_bias beside {name} is a parameter that FSDP has cut: a rank holds a part, and "
            f"cannot move it. Fold without shard_model, or keep the bias out of it."
        )
    if bias.numel() != num_experts:
        raise ModelError(
            f"The e_score_correction_bias beside {name} has {bias.numel()} numbers for {num_experts} experts."
        )
    if bias.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"The e_score_correction_bias beside {name} is {bias.dtype}, in which a step of 0.001 is lost in rounding. "
            f"Keep it in float32, as from_pretrained does: module.e_score_correction_bias.data = ....float()."
        )
