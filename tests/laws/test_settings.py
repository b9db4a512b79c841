"""Ranks whose models do not fit together are told before the collective that would hang or end them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import tiny_model
from torch import nn

import foldpar
from foldpar.errors import ReplicaError
from foldpar.testing import run_ranks

DIM = 8
ODD = 3
"""The rank that is not like the others."""


def layer(groups: foldpar.FoldedGroups, top_k: int = 2, dtype: torch.dtype = torch.float32) -> foldpar.FoldedMoE:
    torch.manual_seed(0)
    experts = foldpar.GroupedExperts(8, DIM, 8, groups, dtype=dtype)
    return foldpar.FoldedMoE(foldpar.TopKRouter(DIM, 8, top_k, dtype=dtype), experts, groups)


def step(model: nn.Module, groups: foldpar.FoldedGroups, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(groups.dp.index)
    model(torch.randn(6, DIM, generator=generator).to(dtype)).square().sum().backward()


def other_dtype(groups: foldpar.FoldedGroups, odd: bool) -> None:
    dtype = torch.float64 if odd else torch.float32
    step(layer(groups, dtype=dtype), groups, dtype)


def other_top_k(groups: foldpar.FoldedGroups, odd: bool) -> None:
    step(layer(groups, top_k=3 if odd else 2), groups)


def frozen_experts(groups: foldpar.FoldedGroups, odd: bool) -> None:
    moe = layer(groups)
    moe.experts.requires_grad_(not odd)
    step(moe, groups)


def frozen_router(groups: foldpar.FoldedGroups, odd: bool) -> None:
    moe = layer(groups)
    moe.router.requires_grad_(not odd)
    step(moe, groups)


def frozen_below(groups: foldpar.FoldedGroups, odd: bool) -> None:
    model = foldpar.mark_parameters(nn.Sequential(nn.Linear(DIM, DIM), layer(groups)), foldpar.families.REPLICATED)
    model[0].requires_grad_(not odd)
    step(model, groups)


def autocast_on_one(groups: foldpar.FoldedGroups, odd: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=odd):
        step(layer(groups), groups)


def frozen_dense(groups: foldpar.FoldedGroups, odd: bool) -> None:
    model = foldpar.mark_parameters(nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, 1)), foldpar.families.REPLICATED)
    model[0].weight.requires_grad_(not odd)
    step(model, groups)
    foldpar.reduce_gradients(model, groups)


def other_reduce_dtype(groups: foldpar.FoldedGroups, odd: bool) -> None:
    moe = layer(groups)
    step(moe, groups)
    foldpar.reduce_gradients(moe, groups, reduce_dtype=torch.float64 if odd else None)


def frozen_before_the_reducer(groups: foldpar.FoldedGroups, odd: bool) -> None:
    moe = layer(groups)
    moe.router.requires_grad_(not odd)
    with foldpar.GradientReducer(moe, groups):
        step(moe, groups)


def sharded(groups: foldpar.FoldedGroups, odd: bool) -> None:
    moe = layer(groups)
    moe.router.requires_grad_(not odd)
    foldpar.shard_model(moe, groups, stage=3)


def other_stage(groups: foldpar.FoldedGroups, odd: bool) -> None:
    foldpar.shard_model(layer(groups), groups, stage=2 if odd else 3)


def folded(groups: foldpar.FoldedGroups, odd: bool) -> None:
    model = tiny_model("qwen3_moe").to(torch.bfloat16 if odd else torch.float32)
    foldpar.fold_model(model, groups)
    model(torch.arange(6)[None])


CASES = [
    (other_dtype, "router.weight: float64 on rank 3"),
    (other_top_k, "top_k: 3 on rank 3"),
    (frozen_experts, "experts.gate_up_proj: float32 [8, 16, 8], frozen on rank 3"),
    (frozen_router, "router.weight: float32, frozen on rank 3"),
    (frozen_below, "input: float32, without a gradient on rank 3"),
    (autocast_on_one, "autocast: torch.bfloat16 on rank 3"),
    (frozen_dense, "0.weight: float32, frozen on rank 3"),
    (other_reduce_dtype, "reduce_dtype: torch.float64 on rank 3"),
    (frozen_before_the_reducer, "router.weight: float32, frozen on rank 3"),
    (sharded, "router.weight: float32, frozen on rank 3"),
    (other_stage, "stage: 2 on rank 3"),
    (folded, "model.embed_tokens.weight: bfloat16 [32, 16] on rank 3"),
]


def told(case: Callable[[foldpar.FoldedGroups, bool], None], layout: foldpar.FoldedLayout, odd: int | None) -> str:
    with foldpar.create_groups(layout) as groups:
        text = ""
        try:
            case(groups, groups.rank == odd)
        except ReplicaError as error:
            text = str(error)
        total = torch.ones(1)
        torch.distributed.all_reduce(total)  # nobody hangs, and all are in step
        assert total == layout.world
    return text


@pytest.mark.parametrize(("case", "text"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_a_rank_that_does_not_fit_is_named_on_every_rank(case: Any, text: str) -> None:
    layout = foldpar.solve_layout(4, tp=2, ep=4)
    found = run_ranks(told, 4, case, layout, ODD)
    named = text.partition(" on rank")[0]
    assert all(named in each and f"on rank {ODD}" in each for each in found if "see their errors" not in each), found
    assert text in found[ODD], found[ODD]
    assert all("differ in" in each for each in found)


@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=lambda case: case.__name__)
@pytest.mark.long
def test_ranks_that_fit_are_told_nothing(case: Any) -> None:
    for degrees in ({"tp": 2, "ep": 4}, {"tp": 2, "ep": 2}, {"ep": 4}, {"tp": 2, "ep": 2, "etp": 2}):
        assert run_ranks(told, 4, case, foldpar.solve_layout(4, **degrees), None) == [""] * 4
