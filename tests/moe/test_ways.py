"""One value says which way rows take: what ``explain`` prints is what a forward did. And what travels is counted."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import seeded
from torch import Tensor, nn
from toys import name_of

import foldpar
import foldpar.moe.transport.messages
from foldpar.comm import DeviceMemories, memories_of
from foldpar.moe.transport import journey as journeys
from foldpar.moe.transport.one_sided import OneSided
from foldpar.testing import run_ranks

DIM, EXPERTS = 8, 4
SHARED = OneSided(8)


class OwnExperts(nn.Module):
    num_experts, dim = EXPERTS, DIM

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        return rows * 1.0


class AbleExperts(OwnExperts):
    abilities = ("routing", "generation")  # a word of its author's


def layer(groups: foldpar.FoldedGroups, kind: str = "plain", **options: Any) -> foldpar.FoldedMoE:
    dtype = torch.float64 if kind == "float64" else torch.float32
    experts: Any = AbleExperts() if kind == "able" else OwnExperts()
    if kind not in ("foreign", "able"):
        experts = foldpar.GroupedExperts(EXPERTS, DIM, 8, groups, bias=kind == "biases", seed=0, dtype=dtype)
    if kind == "counters":
        options["counters"] = foldpar.LayerCounters()
    with seeded(0):
        router = foldpar.TopKRouter(DIM, EXPERTS, 2, dtype=dtype)
    return foldpar.FoldedMoE(router, experts, groups, **{"one_sided": SHARED, **options})


# -- The way that is told is the way that is taken ---------------------------------------------------------------------


class TakenError(Exception):
    """Rows set out one-sided."""


@pytest.fixture
def rows_meet_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ranks had GPUs that can read each other, up to where rows would set out."""

    def sets_out(*_: Any, **__: Any) -> None:
        raise TakenError

    monkeypatch.setattr("foldpar.moe.transport.one_sided.why_no_peers", lambda device: None)
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    memory = SimpleNamespace(tell_illegal=sets_out)  # of one rank's rows, that is all
    monkeypatch.setattr(DeviceMemories, "holding", lambda self, halves, most: memory)
    monkeypatch.setattr(journeys, "dispatch_one_sided", sets_out)


def told(moe: foldpar.FoldedMoE) -> str:
    lines = [line.strip() for line in moe.explain().splitlines()]
    return next(line for line in lines if line.startswith(("in messages", "one-sided")))


def taken(moe: foldpar.FoldedMoE, x: Tensor) -> str:
    try:
        moe(x)
    except TakenError:
        return "one-sided"
    return "in messages"


def ways(kind: str, etp: int, autocast: bool, gradients: bool) -> tuple[str, str, str]:
    with foldpar.create_groups(foldpar.solve_layout(etp, etp=etp)) as groups:
        moe = layer(groups, kind)
        x = torch.ones(6, DIM, dtype=moe.router.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(gradients):
            return told(moe), taken(moe, x), told(moe)


@pytest.mark.parametrize("kind", ["plain", "biases", "counters", "foreign", "float64"])
@pytest.mark.parametrize("etp", [1, 2])
@pytest.mark.parametrize(("autocast", "gradients"), [(False, True), (True, True), (False, False)], ids=name_of)
def test_a_layer_takes_the_way_that_it_tells(
    rows_meet_on_gpus: None, kind: str, etp: int, autocast: bool, gradients: bool
) -> None:
    for before, took, after in run_ranks(ways, etp, kind, etp, autocast, gradients, backend="threads"):
        assert took == after.partition(":")[0] == before.partition(":")[0].partition(" where")[0]
        assert (took == "one-sided") == (kind not in ("counters", "float64"))
        waits = "the host waits for sizes" in before
        assert waits == (kind in ("biases", "foreign"))
        assert before == after or "where" in before


def untold(kind: str, etp: int) -> tuple[str, str]:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2 // etp, etp=etp)) as groups:
        moe = layer(groups, kind, one_sided=None)
        return told(moe), taken(moe, torch.ones(6, DIM, dtype=moe.router.weight.dtype))


@pytest.mark.parametrize("etp", [1, 2])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("plain", None),
        ("biases", None),
        ("counters", "counters read the sizes on the host"),
        ("foreign", "OwnExperts may answer in a wider dtype than it is asked in, which memory is not shared for"),
        ("able", "AbleExperts may answer in a wider dtype than it is asked in, which memory is not shared for"),
        ("float64", "the rows are torch.float64, and the kernels add up in float32"),
    ],
)
def test_a_layer_that_is_told_nothing_goes_one_sided_where_that_is_safe(
    rows_meet_on_gpus: None, kind: str, etp: int, why: str | None
) -> None:
    for before, took in run_ranks(untold, 2, kind, etp, backend="threads"):
        assert took == ("one-sided" if why is None else "in messages")
        assert before.startswith("one-sided where" if why is None else f"in messages: {why}")


def test_where_there_is_nothing_to_exchange_a_layer_is_left_alone(rows_meet_on_gpus: None) -> None:
    def rank() -> str:
        with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
            moe = layer(groups, one_sided=None)
            took = taken(moe, torch.ones(6, DIM))
            assert "one-sided" not in moe.explain() and "messages" not in moe.explain()
            assert memories_of(groups, torch.device("cpu"), ask=False) is None
            return took

    assert run_ranks(rank, 2, backend="threads") == ["in messages"] * 2


def test_where_one_rank_counts_all_send_messages(rows_meet_on_gpus: None) -> None:
    def rank() -> str:
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            moe = layer(groups, "counters" if groups.rank else "plain", one_sided=None)
            return taken(moe, torch.ones(6, DIM))

    assert run_ranks(rank, 2, backend="threads") == ["in messages"] * 2


@pytest.mark.parametrize("kind", ["plain", "biases", "counters", "foreign", "float64"])
def test_on_cpu_every_layer_takes_messages_and_says_so(kind: str) -> None:
    before, took, after = ways(kind, 1, False, True)
    assert before == after and before.startswith("in messages: ") and took == "in messages"


def test_all_ranks_go_the_same_way_whoever_has_the_most_tokens(rows_meet_on_gpus: None) -> None:
    """More than the bound on one rank, then on the other, then on none: nobody waits for anybody in another way."""

    def rank() -> list[str]:
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            moe = layer(groups, one_sided=OneSided(8))
            counts = [(6, 6), (9, 6), (6, 9), (8, 0), (100, 100), (0, 0)]
            return [taken(moe, torch.ones(count[groups.rank], DIM)) for count in counts]

    way = ["one-sided", "in messages", "in messages", "one-sided", "in messages", "one-sided"]
    assert run_ranks(rank, 2, backend="threads") == [way, way]


@pytest.mark.parametrize(
    ("slack", "gradients", "unasked", "room"),
    [
        (None, True, 36 * 32, 48),
        (None, True, 36 * 32 - 1, None),
        (2.0, True, 0, 25),
        (2.0, False, 0, None),
        (math.inf, False, 0, 48),
    ],
)
def test_there_is_room_for_all_rows_or_for_what_is_asked(
    monkeypatch: pytest.MonkeyPatch,
    rows_meet_on_gpus: None,
    slack: float | None,
    gradients: bool,
    unasked: int,
    room: int | None,
) -> None:
    """Of 6 tokens, 2 experts each, four ranks send up to 48 rows to one, four times the balanced number: 36 x 32 bytes
    may not come.
    """
    seen: list[int | None] = []

    def sets_out(*given: Any, **_: Any) -> None:
        seen.append(given[4].room)
        raise TakenError

    monkeypatch.setattr(journeys, "dispatch_one_sided", sets_out)
    monkeypatch.setattr("foldpar.moe.transport.one_sided.UNASKED", unasked)

    def rank() -> None:
        with foldpar.create_groups(foldpar.solve_layout(4, ep=4)) as groups, torch.set_grad_enabled(gradients):
            experts = foldpar.GroupedExperts(8, DIM, 8, groups, seed=0)
            way = OneSided(slack=slack)
            taken(foldpar.FoldedMoE(foldpar.TopKRouter(DIM, 8, 2), experts, groups, one_sided=way), torch.ones(6, DIM))

    run_ranks(rank, 4, backend="threads")
    assert seen == [room] * 4


def test_what_is_set_on_a_layer_later_changes_neither_what_it_says_nor_what_it_does() -> None:
    def rank() -> bool:
        with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
            moe, x = layer(groups), torch.ones(6, DIM)
            said, y = (moe.explain(), repr(moe)), moe(x)
            moe.partition, moe.lanes, moe.lane_grads = "assignments", "sharded", "partial"
            with pytest.raises(AttributeError):
                moe.lane_state.partition = "assignments"
            return said == (moe.explain(), repr(moe)) and torch.equal(y, moe(x))

    assert run_ranks(rank, 2, backend="threads") == [True, True]


# -- What travels ------------------------------------------------------------------------------------------------------


def counted(etp: int, autocast: bool, foreign: bool) -> tuple[int, int]:
    """The bytes of rows that left this rank as the layer counts them, and as its collectives saw them."""
    seen: list[int] = []
    with foldpar.create_groups(foldpar.solve_layout(4, ep=4 // etp, etp=etp)) as groups:
        counters = foldpar.LayerCounters()
        with seeded(0):
            router = foldpar.TopKRouter(DIM, EXPERTS, 2)
        experts: Any = Widening() if foreign else foldpar.GroupedExperts(EXPERTS, DIM, 8, groups, seed=0)
        moe = foldpar.FoldedMoE(router, experts, groups, counters=counters, check=False)
        SEEN[groups.rank] = seen
        x = torch.randn(5 + groups.rank, DIM, generator=torch.Generator().manual_seed(groups.rank))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            moe(x)
        return counters.read().bytes, sum(seen)


class Widening(nn.Module):
    """Experts that answer in float32, whatever they are asked in."""

    num_experts, dim = EXPERTS, DIM

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        return rows.float()


SEEN: dict[int, list[int]] = {}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every collective of ``messages`` notes the bytes of rows that leave: those of width ``DIM``, weights apart."""
    messages = foldpar.moe.transport.messages

    def leaving(group: foldpar.AxisGroup, chunks: Any, x: Tensor) -> None:
        rows = sum(rows for place, rows in enumerate(chunks) if place != group.index)
        width = x.shape[1] if x.dtype != torch.uint8 else x.shape[1] - 2 * 4  # packed: two float32 weights behind
        if (x.shape[1] >= DIM and x.is_floating_point()) or x.dtype == torch.uint8:
            SEEN[group.ranks[group.index]].append(rows * width * x.element_size())

    exchange, all_to_all = messages.exchange_rows, messages.all_to_all_rows
    gather, scatter = messages.all_gather_rows, messages.scatter_sum_rows

    def exchange_rows(x: Tensor, send: Any, receive: Any, group: foldpar.AxisGroup) -> Tensor:
        leaving(group, send, x)
        return exchange(x, send, receive, group)

    def all_to_all_rows(x: Tensor, send: Any, receive: Any, group: foldpar.AxisGroup) -> Tensor:
        leaving(group, send, x)
        return all_to_all(x, send, receive, group)

    def all_gather_rows(x: Tensor, group: foldpar.AxisGroup, **options: Any) -> Tensor:
        leaving(group, [x.shape[0]] * group.size, x)
        return gather(x, group, **options)

    def scatter_sum_rows(x: Tensor, row_counts: Any, group: foldpar.AxisGroup) -> Tensor:
        leaving(group, row_counts, x)
        return scatter(x, row_counts, group)

    for each in (exchange_rows, all_to_all_rows, all_gather_rows, scatter_sum_rows):
        monkeypatch.setattr(messages, each.__name__, each)


@pytest.mark.parametrize("etp", [1, 2, 4])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("foreign", [False, True])
def test_bytes_are_those_of_the_rows_that_travel(watched: None, etp: int, autocast: bool, foreign: bool) -> None:
    for told_bytes, seen_bytes in run_ranks(counted, 4, etp, autocast, foreign, backend="threads"):
        assert told_bytes == seen_bytes > 0


def test_what_is_made_at_once_stays_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.moe.transport.one_sided.why_no_peers", lambda device: None)
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        way = OneSided(max_tokens=10**6, most_bytes=2**24)
        found = way.way(5, torch.float32, DIM, 2, groups, EXPERTS, torch.device("cpu"), needs_sizes=False)
        assert not isinstance(found, str)
        assert 2**23 < sum(found.memory.halves) <= 2**24 + 2 * 2**20  # halves are whole MiB
        assert found.exchange.max_tokens == 5


def test_wrong_numbers_of_one_sided_rows_are_told() -> None:
    for given, says in (
        ({"max_tokens": 0}, "max_tokens = 0 is not a number of tokens; it is 1 or more"),
        ({"most_bytes": 1.5}, "most_bytes = 1.5 is not a number of bytes; it is 1 or more"),
        ({"slack": 0.5}, "slack = 0.5 must be 1 or more: 1 is room for perfectly balanced routing"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            OneSided(**given)  # type: ignore[arg-type]
