"""Capacity: which assignments are dropped, alike in every layout, and what dropping does to values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from dense import dense_experts, feed_forward, softmax_routing
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_cases import (
    ALL_FOLDS,
    DIM,
    EXPERTS,
    FOLDS,
    TOP_K,
    Fold,
    assert_near,
    batches,
    of_lane,
    reference,
    run_folded,
    task_loss,
    weights,
)
from torch import Tensor, nn

import foldpar
from foldpar import Capacity, LaneState, Routing, TopKRouter, limit_capacity
from foldpar.errors import ShapeError
from foldpar.testing import run_ranks

ONE = LaneState(foldpar.create_groups(foldpar.solve_layout(1)))


def kept_by_hand(ids: Tensor, scores: Tensor, limit: int, drop: str, padding: Tensor | None = None) -> Tensor:
    """For every expert, one by one: rank its assignments and keep the first ``limit``."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for expert in range(EXPERTS):
        where = [
            (token, choice)
            for token in range(ids.shape[0])
            for choice in range(ids.shape[1])
            if ids[token, choice] == expert and (padding is None or not padding[token])
        ]
        if drop == "probability":
            where.sort(key=lambda at: -scores[at].item())  # a stable sort: earlier tokens first
        for at in where[:limit]:
            mask[at] = True
    return mask


# -- Against a plain loop ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 12),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.3, 2.0]),
    drop=st.sampled_from(["probability", "position"]),
    levels=st.sampled_from([2, 1000]),  # few levels: many equal weights
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_expert_keeps_its_first_assignments_by_rank(
    tokens: int, factor: float, drop: str, levels: int, padded: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in range(tokens)] or [torch.empty(2)])
    ids = ids[:tokens].long() // 2 * 2  # four of the experts get all
    scores = torch.randint(levels, (tokens, TOP_K), generator=draw).double()
    padding = torch.rand(tokens, generator=draw) < 0.3 if padded else None
    given_mask = None if padding is None else ~padding[:, None].expand(ids.shape)
    routing = Routing(ids, scores, mask=given_mask, padding=padding)
    limited = limit_capacity(routing, ONE, Capacity(factor, drop, slots="padded"), num_experts=EXPERTS)

    present = tokens - (0 if padding is None else int(padding.sum()))
    limit = -(-Fraction(str(factor)) * present * TOP_K // EXPERTS)
    want = kept_by_hand(ids, scores, int(limit), drop, padding)
    assert torch.equal(limited.mask, want)
    assert int(limited.padded_slots) == limit * EXPERTS - int(want.sum())
    assert limited.weights is scores and limited.ids is ids


def test_the_two_ways_to_drop_by_an_example() -> None:
    ids = torch.tensor([[0], [0], [0], [1]])
    scores = torch.tensor([[0.2], [0.9], [0.5], [0.1]])
    kept = {
        drop: limit_capacity(Routing(ids, scores), ONE, Capacity(1.0, drop), num_experts=2).mask.flatten().tolist()
        for drop in ("probability", "position")
    }
    assert kept == {"probability": [False, True, True, True], "position": [True, True, False, True]}
    assert limit_capacity(Routing(ids, scores), ONE, Capacity(1.0), num_experts=2).padded_slots is None


# -- In every layout ---------------------------------------------------------------------------------------------------


def capacity_loss(capacity: Capacity) -> Callable[..., Tensor]:
    def loss(inputs: list[Tensor], router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        outputs, dropped = [], 0
        for x in inputs:
            ids, scores = softmax_routing(x, router, TOP_K)
            mask = kept_by_hand(ids, scores, capacity.of(len(x), TOP_K, EXPERTS), capacity.drop)
            dropped += int((~mask).sum())
            outputs.append(dense_experts(x, ids, scores, feed_forward(gate_up, down), mask))
        assert dropped > 0, "this test must drop something"
        return task_loss(outputs)

    return loss


def check_capacity(fold: Fold, capacity: Capacity) -> None:
    want = reference(fold.data_ranks, capacity_loss(capacity))
    router = TopKRouter(DIM, EXPERTS, TOP_K, dtype=torch.float64)
    run_ranks(limited_layer, fold.world, fold, router, want, capacity, backend="threads")


def limited_layer(fold: Fold, router: TopKRouter, want: dict[str, object], capacity: Capacity) -> None:
    run_folded(fold, router, None, want, capacity=capacity)


@pytest.mark.parametrize("fold", FOLDS, ids=str)
def test_what_is_dropped_does_not_depend_on_the_layout(fold: Fold) -> None:
    check_capacity(fold, Capacity(0.75, "probability" if fold.tp == 2 else "position"))


@pytest.mark.long
@pytest.mark.parametrize("drop", ["probability", "position"])
@pytest.mark.parametrize("fold", ALL_FOLDS, ids=str)
def test_capacity_in_every_layout(fold: Fold, drop: str) -> None:
    check_capacity(fold, Capacity(0.75, drop, slots="padded"))


def dropped_rows(fold: Fold, drop: str) -> list[int]:
    """Padding tokens and capacity together; the counters of this rank."""
    with foldpar.create_groups(fold.layout) as groups:
        router_weight, gate_up, down = weights()
        router = TopKRouter(DIM, EXPERTS, TOP_K, dtype=torch.float64)
        router.weight = nn.Parameter(router_weight)
        counters = foldpar.LayerCounters()
        capacity = Capacity(0.5, drop, slots="padded")
        moe = foldpar.FoldedMoE.from_dense(
            router, gate_up, down, groups, capacity=capacity, counters=counters, **fold.options
        )
        whole = batches(4)[3]
        padding = torch.arange(len(whole)) % 4 == 1
        x = of_lane(whole, fold, groups).clone().requires_grad_()
        y, routing = moe(x, padding=of_lane(padding, fold, groups), return_routing=True)
        routing.weights.retain_grad()
        y.square().sum().backward()

        ids, scores = softmax_routing(whole, router_weight, TOP_K)
        limit = capacity.of(int((~padding).sum()), TOP_K, EXPERTS)
        mask = kept_by_hand(ids, scores, limit, drop, padding)
        want = dense_experts(whole, ids, scores, feed_forward(gate_up, down), mask)
        assert_near("output", y.detach(), of_lane(want, fold, groups))
        assert torch.equal(moe.lane_state.gather(routing.mask), mask)
        assert (routing.weights.grad[~routing.mask] == 0).all()
        values = counters.read()
        own = torch.tensor([values.assignments, values.dropped, values.padded])
        assert (own >= 0).all()
        totals = foldpar.comm.collectives.all_reduce_(own, groups.tp).tolist()
        free = limit * EXPERTS - int(mask.sum())
        assert totals == [mask.numel(), int((~mask[~padding]).sum()), int(padding.sum()) * TOP_K + free]
        return totals


@pytest.mark.parametrize("fold", [fold for fold in FOLDS[:14] if fold.lane_grads == "replicated"], ids=str)
def test_dropped_and_padded_assignments_have_zero_gradient_and_are_counted_once(fold: Fold) -> None:
    for drop in ("probability", "position"):
        (totals, *_) = run_ranks(dropped_rows, fold.world, fold, drop, backend="threads")
        assert totals[1] > 0 and totals[2] > 0


# -- Wrong use ---------------------------------------------------------------------------------------------------------


def test_wrong_use_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"capacity factor = 0 must be positive and finite: 1 gives every expert room for an even"
    ):
        Capacity(0)
    with pytest.raises(ValueError, match=r"capacity factor = inf must be .* capacity=None drops none"):
        Capacity(float("inf"))
    with pytest.raises(ValueError, match=r"drop is 'random'; choose 'probability' or 'position'"):
        Capacity(1.0, drop="random")
    with pytest.raises(ValueError, match=r"slots is 'full'; choose 'as_needed' or 'padded'"):
        Capacity(1.0, slots="full")
    routing = Routing(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1))
    with pytest.raises(ShapeError, match=r"ids are \[2, 2\] and weights \[2, 1\]"):
        limit_capacity(routing, ONE, Capacity(1.0), num_experts=2)


def test_an_illegal_id_is_left_to_be_reported() -> None:
    routing = Routing(torch.tensor([[0, 9]]), torch.ones(1, 2))
    assert limit_capacity(routing, ONE, Capacity(4.0), num_experts=2).mask.tolist() == [[True, True]]
