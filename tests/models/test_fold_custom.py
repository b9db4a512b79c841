"""Folding blocks of one's own: an adapter of a few lines, checked against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_made import (
    DIM,
    EXPERTS,
    HAND_MADE,
    HEADS_PLAN,
    HIDDEN,
    TOP_K,
    Convention,
    ConventionExperts,
    Model,
    StackedExperts,
    Stored,
)
from torch import Tensor, nn
from torch.nn import functional as F

import foldpar
from foldpar.errors import ModelError
from foldpar.families import REPLICATED_PARTIAL, ROUTER_ALL_TOKENS
from foldpar.models.fold import fold_model
from foldpar.models.known import ExpertWeights, MoEAdapter
from foldpar.models.plan import plan_fold
from foldpar.moe.kernels.activations import ClampedSwiGLU
from foldpar.moe.storage import ExpertStorage
from foldpar.testing import check_against_one_process

LAYOUTS = (foldpar.solve_layout(4, tp=2, ep=4), foldpar.solve_layout(4, tp=2, ep=2, etp=2))


def degrees(layout: foldpar.FoldedLayout) -> str:
    return f"ep{layout.ep}-etp{layout.etp}"


# -- A hand-written model: attention that counts its heads, a block with names of its own -------------


def stacked(name: str, tensors: Any) -> Tensor:
    if name == "moe.specialists.gate_up_proj":
        return torch.cat([tensors["moe.specialists.w1"], tensors["moe.specialists.w3"]], 1)
    return tensors["moe.specialists.w2" if name == "moe.specialists.down_proj" else name]


def check(make: Callable[[], nn.Module], adapter: MoEAdapter, layout: foldpar.FoldedLayout, **options: Any) -> None:
    def fold(model: nn.Module, groups: foldpar.FoldedGroups) -> nn.Module:
        planned = plan_fold(model, groups.layout, adapters=(adapter,))
        assert fold_model(model, groups, adapters=(adapter,)) == planned
        return model

    report = check_against_one_process(make, fold, layout, batch=lambda rank: torch.randn(5 + rank, DIM), **options)
    report.raise_if(1e-11)


@pytest.mark.parametrize("layout", LAYOUTS, ids=degrees)
def test_a_hand_written_model_folds_with_an_adapter(layout: foldpar.FoldedLayout) -> None:
    check(Model, HAND_MADE, layout, whole=stacked)


def test_the_plan_names_the_parameters_after_folding() -> None:
    rows = {row.name: row for row in plan_fold(Model(), LAYOUTS[0], adapters=(HAND_MADE,)).rows}
    assert rows["moe.specialists.gate_up_proj"].local_shape == (1, 2 * HIDDEN, DIM)
    assert rows["moe.chooser.weight"].family == ROUTER_ALL_TOKENS
    assert rows["attention.wq.weight"].local_shape == (DIM // 2, DIM)
    assert rows["attention.wo.bias"].action == "whole, added once"
    assert rows["attention.gain"].family == REPLICATED_PARTIAL
    assert "moe.specialists.w1" not in rows


def test_a_gain_beside_heads_is_not_guessed() -> None:
    from dataclasses import replace

    with pytest.raises(ModelError, match=r"gain of attention \(Attention\) lie beside projections that are sharded"):
        plan_fold(Model(), LAYOUTS[0], adapters=(replace(HAND_MADE, partial=()),))


# -- A block in the manner of TorchTitan: experts that take sorted rows. A FoldedMoE takes the place of the block --


class TokenChoice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, chosen = self.gate(x).softmax(-1).topk(TOP_K)
        return scores / scores.sum(-1, keepdim=True), chosen, torch.bincount(chosen.flatten(), minlength=EXPERTS)


class SortedExperts(StackedExperts):
    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:  # type: ignore[override]
        parts = rows.split(rows_per_expert.tolist())
        every = [
            (F.silu(p @ w1.T) * (p @ w3.T)) @ w2.T
            for p, w1, w2, w3 in zip(parts, self.w1, self.w2, self.w3, strict=True)
        ]
        return torch.cat(every)


class TitanMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = TokenChoice(), SortedExperts()
        self.shared_experts = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen, counts = self.router(x)
        order = chosen.flatten().argsort(stable=True)
        tokens = order // TOP_K
        rows = self.experts(x[tokens], counts) * scores.flatten()[order, None]
        return self.shared_experts(x).index_add(0, tokens, rows)


def folded_titan(block: Any, groups: foldpar.FoldedGroups) -> nn.Module:
    router = foldpar.TopKRouter(DIM, EXPERTS, TOP_K)
    router.weight = block.router.gate.weight
    gate_up = torch.cat([block.experts.w1, block.experts.w3], 1)
    return foldpar.FoldedMoE.from_dense(router, gate_up, block.experts.w2, groups, shared=block.shared_experts)


def titan_names(name: str, tensors: Any) -> Tensor:
    if name == "moe.experts.gate_up_proj":
        return torch.cat([tensors["moe.experts.w1"], tensors["moe.experts.w3"]], 1)
    renamed = {"moe.experts.down_proj": "moe.experts.w2", "moe.router.weight": "moe.router.gate.weight"}
    name = renamed.get(name, name).replace("moe.shared.", "moe.shared_experts.")
    return tensors[name]


@pytest.mark.parametrize("layout", LAYOUTS, ids=degrees)
def test_a_titan_block_is_replaced_by_a_folded_moe(layout: foldpar.FoldedLayout) -> None:
    adapter = MoEAdapter("TitanMoE", replace=folded_titan, tp_plan=HEADS_PLAN, partial=("gain",))
    check(lambda: Model(TitanMoE), adapter, layout, whole=titan_names)
    rows = {row.name: row for row in plan_fold(Model(TitanMoE), layout, adapters=(adapter,)).rows}
    assert rows["moe.experts.w1"].local_shape is None
    assert rows["moe.experts.w1"].action == "replaced by its adapter"


# -- The common convention with weights stored in other ways -----------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=degrees)
@pytest.mark.parametrize(
    "stored",
    [
        Stored(ExpertStorage()),
        Stored(ExpertStorage(transposed=True)),
        Stored(ExpertStorage(interleaved=True), bias=True),
        Stored(ExpertStorage(True, True, "first_bias", "second_bias"), ClampedSwiGLU(1.3, 0.6), bias=True),
    ],
    ids=lambda stored: f"{stored.storage.transposed}-{stored.storage.interleaved}-{stored.bias}",
)
def test_experts_keep_their_storage(stored: Stored, layout: foldpar.FoldedLayout) -> None:
    adapter = MoEAdapter("Convention", storage=stored.storage, activation=stored.activation)

    def make() -> nn.Module:
        return nn.ModuleDict({"norm": nn.LayerNorm(DIM), "moe": Convention(stored)})

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = make()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers["moe"](self.layers["norm"](x))

    check(Sequence, adapter, layout)


# -- A forward that cannot stay ----------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Routes and computes in one forward, so that its experts are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, EXPERTS), ConventionExperts(Stored(ExpertStorage()))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(1)
        return torch.stack([self.experts.one(row, int(expert)) for row, expert in zip(x * weights, ids, strict=True)])


class FoldedFused(nn.Module):
    def __init__(self, block: Any, experts: foldpar.FoldedExperts) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(1)
        return self.experts(x * weights, ids, torch.ones_like(weights))


def test_a_block_whose_forward_cannot_stay_is_written_anew_around_its_experts() -> None:
    adapter = MoEAdapter("Fused", activation="swiglu", around=FoldedFused)
    check(lambda: nn.Sequential(nn.LayerNorm(DIM), Fused()), adapter, LAYOUTS[0])


def test_around_must_keep_the_names() -> None:
    class Renamed(FoldedFused):
        def __init__(self, block: Any, experts: foldpar.FoldedExperts) -> None:
            super().__init__(block, experts)
            self.router = self.gate
            del self.gate

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(1)
            return self.experts(x * weights, ids, torch.ones_like(weights))

    adapter = MoEAdapter("Fused", activation="swiglu", around=Renamed)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups, pytest.raises(ModelError) as raised:
        fold_model(nn.Sequential(Fused()), groups, adapters=(adapter,))
    assert str(raised.value).startswith(
        "Folding did not give what was planned for 0.gate.bias, 0.gate.weight, 0.router"
    )
    assert "must keep all children of the block under their names" in str(raised.value)


# -- What an adapter can get wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        (
            MoEAdapter("HandMade"),
            "moe (HandMade) has no child 'experts' to hold its experts; its children are chooser, ",
        ),
        (
            MoEAdapter("HandMade", experts="specialists", activation="swiglu"),
            "moe.specialists (StackedExperts) has no parameter gate_up_proj and no down_proj; its own parameters are ",
        ),
        (
            MoEAdapter(
                "HandMade", experts="specialists", weights=lambda experts: ExpertWeights(experts.w1, experts.w2)
            ),
            "moe.specialists (StackedExperts) has no act_fn to tell its activation by. Say which it is with ",
        ),
        (
            MoEAdapter(
                "HandMade",
                experts="specialists",
                weights=lambda experts: ExpertWeights(experts.w1, experts.w2),
                activation="swiglu",
            ),
            "The second product of moe.specialists, [4, 8, 6], means 4 experts of width 8 and hidden width 6; then the "
            "first must be [4, 12, 8] for 'swiglu', and is [4, 6, 8].",
        ),
        (
            MoEAdapter(
                "HandMade",
                experts="specialists",
                weights=lambda experts: ExpertWeights(experts.w1[0], experts.w2[0]),
                activation="swiglu",
            ),
            "The weights of moe.specialists are [6, 8] and [8, 6]; both must have three dimensions, experts first.",
        ),
    ],
    ids=["no such child", "names", "activation", "shapes", "not stacked"],
)
def test_a_wrong_adapter_is_told_what_is_there(adapter: MoEAdapter, text: str) -> None:
    with pytest.raises(ModelError) as raised:
        plan_fold(Model(), foldpar.solve_layout(2, ep=2), adapters=(adapter,))
    assert str(raised.value).startswith(text)


def test_parameters_that_folding_would_lose_are_named() -> None:
    stored = Stored(ExpertStorage(gate_up_bias="b1", down_bias="b2"), bias=True)
    adapter = MoEAdapter("Convention", activation="swiglu")
    with pytest.raises(
        ModelError, match="has the parameter\\(s\\) b1, b2 beside gate_up_proj and down_proj, and folding"
    ):
        plan_fold(nn.Sequential(Convention(stored)), foldpar.solve_layout(2, ep=2), adapters=(adapter,))


def test_adapters_must_be_adapters() -> None:
    with pytest.raises(TypeError, match="adapters holds 'HandMade', which is no MoEAdapter"):
        plan_fold(Model(), foldpar.solve_layout(2, ep=2), adapters=("HandMade",))  # type: ignore[arg-type]


def test_a_model_that_is_a_block_itself_cannot_be_replaced() -> None:
    adapter = MoEAdapter("Fused", activation="swiglu", around=FoldedFused)
    with (
        foldpar.create_groups(foldpar.solve_layout(1)) as groups,
        pytest.raises(ModelError, match="itself is an MoE block"),
    ):
        fold_model(Fused(), groups, adapters=(adapter,))
