"""Which way rows take, in words; and that a layer which may send them one-sided does without where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import seeded
from torch import Tensor, nn
from toys import name_of

import foldpar
from foldpar.moe import Sharing
from foldpar.testing import run_ranks

DIM, EXPERTS = 8, 4


def layer(groups: foldpar.FoldedGroups, bias: bool = False, **options: Any) -> foldpar.FoldedMoE:
    experts = foldpar.GroupedExperts(EXPERTS, DIM, 8, groups, bias=bias, seed=0, dtype=torch.float32)
    with seeded(0):
        router = foldpar.TopKRouter(DIM, EXPERTS, 2)
    return foldpar.FoldedMoE(router, experts, groups, **options)


class OwnExperts(nn.Module):
    num_experts, dim = EXPERTS, DIM

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"one_sided": foldpar.OneSided(8)}, "in messages: it needs GPUs, and this is cpu"),
        (
            {"one_sided": foldpar.OneSided(8), "counters": foldpar.LayerCounters()},
            "in messages: counters read the sizes on the host",
        ),
        (
            {"one_sided": foldpar.OneSided(8), "bias": True},
            "in messages: it needs GPUs, and this is cpu",
        ),
    ],
    ids=name_of,
)
def test_a_layer_explains_which_way_its_rows_take(options: dict[str, Any], text: str) -> None:
    told = layer(foldpar.create_groups(foldpar.solve_layout(1)), **options).explain()
    assert text in told
    assert "stay: ep = 1, so this rank has all experts" in told


def test_nothing_is_said_of_what_was_not_asked_for() -> None:
    told = layer(foldpar.create_groups(foldpar.solve_layout(1))).explain().splitlines()
    assert told[1:] == [
        "  lanes      one (tp = 1), which takes all tokens; no split, no gather",
        "  rows       stay: ep = 1, so this rank has all experts",
        "  router     router_own_tokens: left as it is, tp = 1",
        "  experts    routed_expert: left as it is",
    ]


def test_a_layer_that_is_told_nothing_says_why_its_rows_go_in_messages() -> None:
    for one_sided, why in ((None, "it needs GPUs, and this is cpu"), (False, "one_sided = False")):
        folded = run_ranks(explained, 4, 1, one_sided, backend="threads")[0]
        assert f"\n             in messages: {why}\n" in folded


def test_rows_go_one_sided_where_everything_that_is_known_before_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.moe.transport.one_sided.why_no_peers", lambda device: None)
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    moe = layer(groups, one_sided=foldpar.OneSided(8))
    assert "one-sided where ranks can read each other's memory: up to 8 tokens of a rank, more in messages" in told(moe)
    assert "reads all rows" not in told(moe)
    biased = layer(groups, one_sided=foldpar.OneSided(most_bytes=2**20), bias=True)
    assert "up to 11898 tokens of a rank, more in messages; the host waits for sizes, since the experts" in told(biased)
    moe.double()
    assert "in messages: the rows are torch.float64, and the kernels add up in float32" in moe.explain()
    assert "more in messages; beyond 699050 the host waits for sizes" in wide_apart(None)
    assert "waits" not in wide_apart(2.0)


def wide_apart(slack: float | None) -> str:
    def rank() -> str:
        with foldpar.create_groups(foldpar.solve_layout(4, ep=4)) as groups:
            experts = foldpar.GroupedExperts(8, DIM, 8, groups, seed=0)
            way = foldpar.OneSided(slack=slack, most_bytes=2**40)
            return told(foldpar.FoldedMoE(foldpar.TopKRouter(DIM, 8, 2), experts, groups, one_sided=way))

    return run_ranks(rank, 4, backend="threads")[0]


def told(moe: foldpar.FoldedMoE) -> str:
    return " ".join(moe.explain().split())


def test_of_experts_of_another_kind_the_host_learns_how_many_rows_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.moe.transport.one_sided.why_no_peers", lambda device: None)
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    router = foldpar.TopKRouter(DIM, EXPERTS, 2)
    moe = foldpar.FoldedMoE(router, OwnExperts(), groups, one_sided=foldpar.OneSided(8))
    why = "the host waits for sizes, since OwnExperts may not leave rows alone that hold nothing, as GroupedExperts do"
    assert why in told(moe)


def explained(etp: int, one_sided: Sharing = foldpar.OneSided(8)) -> str:  # noqa: B008 (frozen)
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4 // etp, etp=etp)) as groups:
        return layer(groups, one_sided=one_sided).explain()


def test_slices_of_an_expert_share_rows_and_say_how_often_they_cross() -> None:
    first = run_ranks(explained, 4, 2, backend="threads")[0]
    assert "a row crosses EP once and ETP 1 x; a journey for each slice would cross EP 2 x" in first
    assert "ETP" not in run_ranks(explained, 4, 1, backend="threads")[0].replace("etp", "")


def both_ways() -> bool:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        draw = torch.Generator().manual_seed(groups.dp.index)
        x = torch.randn(6, DIM, generator=draw)
        results = []
        for one_sided in (None, False, foldpar.OneSided(8)):
            moe = layer(groups, one_sided=one_sided)
            y = moe(x)
            results.append([y, *torch.autograd.grad(y.sum(), list(moe.parameters()))])
        foldpar.reduce_gradients(foldpar.mark_parameters(moe, foldpar.families.REPLICATED), groups)
        return all(torch.equal(one, each) for one, *others in zip(*results, strict=True) for each in others)


def test_where_memory_cannot_be_shared_rows_travel_in_messages() -> None:
    assert run_ranks(both_ways, 4) == [True] * 4
