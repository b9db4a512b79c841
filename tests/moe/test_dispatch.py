"""Dispatch and combine: every assignment is computed once, and the result equals a dense loop, gradients included."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dense import dense_experts
from draws import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foldpar
from foldpar.errors import ShapeError
from foldpar.moe.transport import messages
from foldpar.testing import run_ranks
from foldpar.testing.strategies import layouts

DIM, TOP_K = 4, 2
LAYOUTS = [
    {"world": 1},
    {"world": 4, "tp": 2, "ep": 4},
    {"world": 4, "tp": 4, "ep": 4},
    {"world": 4, "tp": 2, "ep": 2, "etp": 2},
    {"world": 4, "ep": 1, "etp": 4},
    {"world": 8, "tp": 4, "ep": 4, "cp": 2},
    {"world": 6, "tp": 3, "ep": 3, "etp": 2},
]


def expert(e: int, x: Tensor) -> Tensor:
    """Some non-linear function of its own for each global expert."""
    return torch.tanh(x * (e + 1)) + e * x


def own_problem(tokens: int, num_experts: int, routing: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's rows, expert ids, weights and mask."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank() if dist.is_initialized() else seed)
    x = torch.randn(tokens, DIM, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, num_experts, generator=generator)
    if routing == "one expert":
        scores[:, num_experts - 1] = 2.0
    if routing == "few experts":
        scores[:, 2:] = -1.0
    ids = scores.topk(min(TOP_K, num_experts)).indices
    ids = ids if ids.shape[1] == TOP_K else ids.expand(tokens, TOP_K)
    mask = torch.rand(tokens, TOP_K, generator=generator) < 0.7 if routing == "masked" else torch.ones_like(ids) > 0
    return x.requires_grad_(), ids, weights.requires_grad_(), mask


def through_the_fold(
    layout: foldpar.FoldedLayout, tokens: tuple[int, ...], experts_per_rank: int, routing: str, seed: int
) -> dict[str, Any]:
    num_experts = layout.ep * experts_per_rank
    with foldpar.create_groups(layout) as groups:
        x, ids, weights, mask = own_problem(tokens[groups.rank], num_experts, routing, seed)
        plan = foldpar.plan_dispatch(ids, groups, num_experts=num_experts, mask=mask if routing == "masked" else None)
        rows = foldpar.dispatch(x, plan)
        first = groups.ep.index * experts_per_rank
        chunks = rows.split(plan.rows_per_expert.tolist())
        outputs = torch.cat([expert(first + e, chunk) for e, chunk in enumerate(chunks)]) / layout.etp
        y = foldpar.combine(outputs, weights, plan)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        gradients = torch.autograd.grad(y, [x, weights], cotangent)

        want = dense_experts(x, ids, weights, [partial(expert, e) for e in range(num_experts)], mask)
        expected = torch.autograd.grad(want, [x, weights], cotangent, allow_unused=True)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        for got, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if right is None else right, rtol=1e-12, atol=1e-12)

        # Which (token, expert) pairs this rank computed; tokens are named 1000 * rank + place.
        uid = (1000.0 * groups.rank + torch.arange(tokens[groups.rank], dtype=torch.float64))[:, None]
        named = foldpar.dispatch(uid, plan).flatten().long().split(plan.rows_per_expert.tolist())
        return {
            "computed": [(int(token), first + e) for e, names in enumerate(named) for token in names],
            "wanted": [(1000 * groups.rank + t, int(ids[t, k])) for t, k in mask.nonzero().tolist()],
            "sent": sum(plan.send_rows),
            "needed": sum(len({int(e) // experts_per_rank for e in ids[t][mask[t]]}) for t in range(len(ids))),
            "etp": groups.etp.index,
        }


def check(
    layout: foldpar.FoldedLayout, tokens: tuple[int, ...], experts_per_rank: int, routing: str, seed: int
) -> None:
    results = run_ranks(
        through_the_fold, layout.world, layout, tokens, experts_per_rank, routing, seed, backend="threads"
    )
    wanted = sorted(pair for result in results for pair in result["wanted"])
    for slice_ in range(layout.etp):
        computed = sorted(pair for result in results if result["etp"] == slice_ for pair in result["computed"])
        assert computed == wanted, "every slice computes every assignment exactly once"
    assert all(result["sent"] == result["needed"] for result in results), "a row is sent once per destination rank"


@pytest.mark.parametrize("order", ["tp-lane-major", "consecutive"])
@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_dispatch_and_combine_equal_a_dense_loop(degrees: dict[str, int], order: str) -> None:
    layout = foldpar.solve_layout(**degrees, order=order)
    for seed, (tokens, routing) in enumerate(
        [
            ((5,) * layout.world, "random"),
            ((0,) * layout.world, "random"),
            (tuple(rank % 4 for rank in range(layout.world)), "random"),
            ((1,) + (0,) * (layout.world - 1), "one expert"),
            ((3,) * layout.world, "few experts"),
            ((4,) * layout.world, "masked"),
        ]
    ):
        check(layout, tokens, 2, routing, seed)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_dispatch_and_combine_in_any_layout(data: st.DataObject) -> None:
    layout = data.draw(layouts(max_world=8))
    tokens = tuple(data.draw(st.lists(st.integers(0, 6), min_size=layout.world, max_size=layout.world)))
    routing = data.draw(st.sampled_from(["random", "one expert", "few experts", "masked"]))
    check(layout, tokens, data.draw(st.integers(1, 3)), routing, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("routing", ["random", "one expert", "few experts", "masked"])
def test_many_experts_on_one_rank(routing: str, tokens: int) -> None:
    check(foldpar.solve_layout(1), (tokens,), messages.MOST_LISTED + 1, routing, 0)


def step(partition: str) -> list[Tensor]:
    """Output and gradients of a layer whose ranks have all experts."""
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2)) as groups:
        experts = foldpar.GroupedExperts(16, DIM, 8, groups, seed=0, dtype=torch.float64)
        with seeded(0):
            router = foldpar.TopKRouter(DIM, 16, 3, dtype=torch.float64)
        moe = foldpar.FoldedMoE(router, experts, groups, partition=partition)
        x = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = moe(x)
        gradients = torch.autograd.grad(y, [x, *moe.parameters()], y.detach().cos())
        return [y.detach(), *(foldpar.comm.local_tensor(each) for each in gradients)]


@pytest.mark.parametrize("partition", ["tokens", "assignments"])
def test_what_stays_without_waiting_is_what_would_have_been_counted(
    partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home = run_ranks(step, 2, partition, backend="threads")
    monkeypatch.setattr(messages, "MOST_LISTED", 16)
    counted = run_ranks(step, 2, partition, backend="threads")
    for one, other in zip(at_home, counted, strict=True):
        assert all(torch.equal(got, wanted) for got, wanted in zip(one, other, strict=True))


def lanes_of_assignments(order: str) -> list[list[int]]:
    layout = foldpar.solve_layout(4, tp=2, ep=4, order=order)
    with foldpar.create_groups(layout) as groups:
        ids = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]])  # expert 0 has ordinals 0 1 2 3, expert 1 has 0 1
        mask = torch.tensor([[True, True], [True, True], [False, True], [True, True]])  # ... 0 1 - 2
        plan = foldpar.plan_dispatch(ids, groups, num_experts=4, partition="assignments", mask=mask)
        taken = (plan.sent_of_token >= 0).nonzero().tolist()
        at = [groups.ep.ranks.index(rank) for rank in plan.ep.ranks]
        return sorted([groups.tp.index, token, at[column]] for token, column in taken)


def test_assignments_are_dealt_by_their_ordinal_within_the_expert() -> None:
    for order in ("tp-lane-major", "consecutive"):
        for taken in run_ranks(lanes_of_assignments, 4, order, backend="threads"):
            lane = taken[0][0]
            expected = {0: [[0, 0], [0, 1], [1, 2], [3, 0], [3, 3]], 1: [[1, 0], [2, 1]]}[lane]
            assert [pair[1:] for pair in taken] == expected


# -- Errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_the_rule_and_the_numbers() -> None:
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    ids = torch.zeros(3, 2, dtype=torch.int64)

    def plan(ids: Tensor = ids, **options: Any) -> foldpar.DispatchPlan:
        return foldpar.plan_dispatch(ids, groups, num_experts=4, **options)

    with pytest.raises(ShapeError, match=r"expert_ids must be \[tokens, top_k\] .* and is \[3\]"):
        plan(ids[:, 0])
    with pytest.raises(ShapeError, match=r"must be int32 or int64 \(a narrower type overflows\), and is torch.int8"):
        plan(ids.to(torch.int8))
    with pytest.raises(ShapeError, match=r"mask must be bool and shaped like expert_ids, \[3, 2\]"):
        plan(mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"partition is 'rows'; choose 'tokens' or 'assignments'"):
        plan(partition="rows")
    with pytest.raises(ShapeError, match=r"dispatch takes \[tokens, dim\] with the 3 token\(s\) .* got \[4, 2\]"):
        foldpar.dispatch(torch.zeros(4, 2), plan())
    with pytest.raises(ShapeError, match=r"combine takes \[assignments, dim\] with the 6 row\(s\) .* got \[5, 2\]"):
        foldpar.combine(torch.zeros(5, 2), torch.zeros(3, 2), plan())
    with pytest.raises(ShapeError, match=r"Routing weights must be \[tokens, top_k\] = \[3, 2\], and are \[3, 1\]"):
        foldpar.combine(torch.zeros(6, 2), torch.zeros(3, 1), plan())


def ids_out_of_range() -> str:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        ids = torch.full((2, 2), 99 if dist.get_rank() == 1 else 0)
        with pytest.raises(ShapeError) as refused:
            foldpar.plan_dispatch(ids, groups, num_experts=8)
        with pytest.raises(ShapeError, match=r"ep = 4 does not divide num_experts = 6.* ep can be 1, 2, 3 or 6"):
            foldpar.plan_dispatch(ids, groups, num_experts=6)
        return str(refused.value)


def test_an_id_out_of_range_on_one_rank_raises_on_every_rank() -> None:
    for text in run_ranks(ids_out_of_range, 4):
        assert "Expert ids outside [0, 8) on the rank(s) at (ep, etp) = [(2, 0)]" in text


class Five:
    """What a GPU tells late: only five assignments found their expert."""

    def __init__(self, number: Tensor | None = None) -> None: ...

    def value(self) -> int:
        return 5


def test_an_id_out_of_range_that_is_told_late_is_raised_before_the_layer_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    ids, text = torch.zeros(3, 2, dtype=torch.int64), r"Expert ids outside \[0, 9\) .* = \[\(0, 0\)\]"
    with pytest.raises(ShapeError, match=text):
        foldpar.plan_dispatch(ids + 9, groups, num_experts=9)
    late = replace(foldpar.plan_dispatch(ids, groups, num_experts=9), placed=Five())
    with pytest.raises(ShapeError, match=text):
        foldpar.dispatch(torch.zeros(3, DIM), late)

    experts = foldpar.GroupedExperts(9, DIM, 8, groups, seed=0)
    moe = foldpar.FoldedMoE(foldpar.TopKRouter(DIM, 9, 2), experts, groups)
    plan_dispatch = messages.plan_dispatch
    monkeypatch.setattr(
        "foldpar.moe.transport.journey.plan_dispatch",
        lambda *given, **options: replace(plan_dispatch(*given, **options), placed=Five()),
    )
    with pytest.raises(ShapeError, match=text):
        moe(torch.zeros(3, DIM))


def nan_stays_where_it_is() -> bool:
    """A NaN in one expert's output must not reach tokens that never asked for that expert, nor their gradients."""
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        ids = torch.tensor([[0, 1], [1, 1]])
        plan = foldpar.plan_dispatch(ids, groups, num_experts=2)
        x = torch.ones(2, 3, requires_grad=True)
        rows = foldpar.dispatch(x, plan)
        y = foldpar.combine(rows * float("nan") if groups.ep.index == 0 else rows, torch.full((2, 2), 0.5), plan)
        y[1].sum().backward()
        return bool(y[0].isnan().all() and y[1].isfinite().all() and x.grad is not None and x.grad[1].isfinite().all())


def test_a_nan_reaches_only_the_tokens_that_chose_its_expert() -> None:
    assert run_ranks(nan_stays_where_it_is, 2, backend="threads") == [True, True]
