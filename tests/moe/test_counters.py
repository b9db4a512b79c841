"""Counters: what a layer moved, counted by hand; once per forward, without waiting for the device."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from lane_cases import ALL_FOLDS, DIM, EXPERTS, FOLDS, TOP_K, Fold, batches, of_lane, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foldpar
from foldpar import CounterValues, LayerCounters
from foldpar.testing import run_ranks


def layer(groups: foldpar.FoldedGroups, counters: LayerCounters | None, **options: Any) -> foldpar.FoldedMoE:
    router = foldpar.TopKRouter(DIM, EXPERTS, TOP_K, dtype=torch.float64)
    router.weight = nn.Parameter(weights()[0])
    return foldpar.FoldedMoE.from_dense(router, *weights()[1:], groups, counters=counters, **options)


# -- By hand -----------------------------------------------------------------------------------------------------------


def counted(fold: Fold) -> tuple[CounterValues, list[list[int]]]:
    """The counters of this rank after a forward, and which (token, expert) pairs it takes care of."""
    with foldpar.create_groups(fold.layout) as groups:
        moe = layer(groups, LayerCounters(), **fold.options)
        x = of_lane(batches(fold.data_ranks)[groups.dp_cp.index], fold, groups)
        _, routing = moe(x, return_routing=True)
        pairs = [[token, expert] for token, row in enumerate(routing.ids.tolist()) for expert in row]
        if fold.partition == "assignments":  # every tp-th of each expert
            seen: dict[int, int] = {}
            mine = []
            for token, expert in pairs:
                if seen.get(expert, 0) % fold.tp == groups.tp.index:
                    mine.append([token, expert])
                seen[expert] = seen.get(expert, 0) + 1
            pairs = mine
        return moe.counters.read(), pairs


def check_counters(fold: Fold) -> None:
    layout = fold.layout
    results = run_ranks(counted, fold.world, fold, backend="threads")
    per_rank = EXPERTS // layout.ep
    rows_to = [{(token, expert // per_rank) for token, expert in pairs} for _, pairs in results]
    for rank, (values, pairs) in enumerate(results):
        at = layout.coordinate(rank)
        sent = sum(ep != at.ep for _, ep in rows_to[rank])
        senders = [other for other in layout.group("ep", rank) if other != rank]
        received = sum(ep == at.ep for other in senders for _, ep in rows_to[other])
        arrived = {
            slice_: sum(ep == at.ep for other in layout.group("ep", slice_) for _, ep in rows_to[other])
            for slice_ in layout.group("etp", rank)
        }
        shared = arrived[rank] * (layout.etp - 1) + sum(arrived.values()) - arrived[rank]
        want = {
            "forwards": 1,
            "local": sum(expert // per_rank == at.ep for _, expert in pairs),
            "dropped": 0,
            "padded": 0,
            "rows_sent": sent,
            "rows_received": received,
            "bytes": (sent + received + shared) * DIM * 8,
        }
        assert {name: value for name, value in asdict(values).items() if name != "assignments"} == want
    total = sum(len(batch) for batch in batches(fold.data_ranks)) * TOP_K
    assert sum(values.assignments for values, _ in results) == sum(len(pairs) for _, pairs in results) == total


SOME = [fold for fold in FOLDS if fold.lane_grads == "replicated"]
SOME += [Fold(8, 2, 2, etp=2, order="consecutive"), Fold(8, 4, 2, etp=2, partition="assignments")]


@pytest.mark.parametrize("fold", SOME, ids=str)
def test_counters_are_those_of_a_count_by_hand(fold: Fold) -> None:
    check_counters(fold)


@pytest.mark.long
@pytest.mark.parametrize("fold", ALL_FOLDS, ids=str)
def test_counters_in_every_layout(fold: Fold) -> None:
    check_counters(fold)


# -- Once per forward --------------------------------------------------------------------------------------------------


def recomputed(reentrant: bool) -> list[CounterValues]:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        counters = LayerCounters()
        moe = layer(groups, counters, capacity=foldpar.Capacity(0.5, slots="padded"))
        x = batches(4)[3].clone().requires_grad_()
        padding = torch.arange(len(x)) == 2
        moe(x, padding=padding).sum().backward()
        plain = counters.read()
        counters.reset()
        assert counters.read() == CounterValues()
        y = checkpoint(lambda x: moe(x, padding=padding), x, use_reentrant=reentrant)
        between = counters.read()
        y.sum().backward()
        return [plain, between, counters.read()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_counted_once(reentrant: bool) -> None:
    for plain, between, after in run_ranks(recomputed, 4, reentrant, backend="threads"):
        assert plain == between == after
        assert plain.forwards == 1 and plain.assignments == 10 and plain.rows_sent > 0


def shared() -> list[CounterValues]:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        together, alone = LayerCounters(), LayerCounters()
        for counters in (together, alone):
            layer(groups, counters)(batches(1)[0])
        layer(groups, together)(batches(1)[0])
        return [together.read(), alone.read()]


def test_layers_that_share_counters_add_up() -> None:
    for both, one in run_ranks(shared, 2, backend="threads"):
        assert asdict(both) == {name: 2 * value for name, value in asdict(one).items()}


def test_counting_does_not_wait_for_the_device() -> None:
    """Nothing is read back: the counting runs on meta tensors, which have no values."""
    one = foldpar.create_groups(foldpar.solve_layout(1))
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    plan = foldpar.plan_dispatch(ids, one, num_experts=EXPERTS)
    meta = _on_meta(plan)
    mask = torch.ones(3, 2, dtype=torch.bool, device="meta")
    padding = torch.zeros(3, dtype=torch.bool, device="meta")
    routing = foldpar.Routing(ids.to("meta"), ids.to("meta"), mask=mask, padding=padding)
    counters = LayerCounters()
    counters.count(routing, meta, foldpar.LaneState(one), row_bytes=8, sum_bytes=8)
    counters.count(routing, meta, foldpar.LaneState(one), row_bytes=8, sum_bytes=8)
    with pytest.raises(RuntimeError, match="meta"):
        counters.read()


def _on_meta(plan: foldpar.DispatchPlan) -> foldpar.DispatchPlan:
    fields = {name: getattr(plan, name) for name in plan.__slots__}
    return foldpar.DispatchPlan(
        **{name: value.to("meta") if isinstance(value, Tensor) else value for name, value in fields.items()}
    )
