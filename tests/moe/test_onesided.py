"""The one-sided journey of rows: what arrives, what comes back, and what happens where there is no room.

Runs on a GPU, or with ``TRITON_INTERPRET=1`` in Triton's interpreter. The ranks are threads here that take turns
between barriers and share one memory; ``tests/gpu/gpu_onesided.py`` runs whole layers between processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels_device import DEVICE
from torch import Tensor

from foldpar import FoldedMoE, GroupedExperts, OneSided, Routing, ShapeError, TopKRouter, create_groups, solve_layout
from foldpar.comm.peers import check_room, memories_of
from foldpar.moe.kernels.permutation import collect, pick, spread
from foldpar.moe.transport import journey as journeys
from foldpar.moe.transport.one_sided import (
    OneSidedPlan,
    OneSidedWay,
    RowExchange,
    combine_one_sided,
    dispatch_one_sided,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


class TurnMemory:
    """What ``PeerMemory`` is, for threads: one runs at a time, until it comes to a barrier."""

    def __init__(
        self, rank: int, own: list[Tensor], halves: tuple[int, int], turn: threading.Lock, gate: threading.Barrier
    ) -> None:
        self.group = SimpleNamespace(index=rank, size=len(own), ranks=tuple(range(len(own))))
        self.own, self.halves, self._last = own[rank], halves, "sums"
        self.addresses = torch.tensor([buffer.data_ptr() for buffer in own], device=DEVICE)
        self.flags = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        self._turn, self._gate, self.barriers = turn, gate, 0

    def begin(self, half: str) -> None:
        if self._last == half:
            self.barrier()
        self._last = half

    def barrier(self) -> None:
        self.barriers += 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self._turn.release()
        self._gate.wait(timeout=60)
        self._turn.acquire()


def on_ranks(ranks: int, exchange: RowExchange, work: Callable[[int, TurnMemory], Any]) -> list[Any]:
    halves = (exchange.halves()[0] + 512, exchange.halves()[1])  # a half may be larger than what is in it
    own = [torch.full((sum(halves),), 255, dtype=torch.uint8, device=DEVICE) for _ in range(ranks)]
    turn, gate = threading.Lock(), threading.Barrier(ranks)
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        with turn:
            try:
                results[rank] = work(rank, TurnMemory(rank, own, halves, turn, gate))
            except BaseException as error:
                results[rank] = error
                gate.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


def draw(rank: int, tokens: int, dim: int, top_k: int, experts: int, dtype: torch.dtype, kind: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(100 * tokens + rank)
    x, grad = (torch.randn(tokens, dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weights = torch.rand(tokens, top_k, generator=generator).to(DEVICE)
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "one rank":
        scores[:, :top_k] += 1
    ids = scores.topk(top_k).indices if tokens else torch.zeros(0, top_k, dtype=torch.int64)
    mask = (torch.rand(tokens, top_k, generator=generator) < 0.5).to(DEVICE) if kind == "masked" else None
    return x, weights, ids.to(DEVICE), mask, grad


def one_expert(rows: Tensor, expert: Tensor) -> Tensor:
    """A stand-in for a network: another factor and another shift for each expert."""
    return rows * (1 + expert[:, None] / 8).to(rows.dtype) + expert[:, None].to(rows.dtype) / 4


@pytest.mark.parametrize(
    ("kind", "dtype", "waits"),
    [
        ("random", torch.float32, False),
        ("random", torch.bfloat16, True),
        ("masked", torch.float32, True),
        ("one rank", torch.float32, False),
    ],
)
@pytest.mark.parametrize(
    ("counts", "dim", "top_k", "experts", "etp", "reads_places"),
    [
        ((5,), 8, 2, 4, 1, False),
        ((3, 7), 16, 2, 8, 1, True),
        ((4, 0, 6, 1), 24, 3, 8, 1, False),
        ((4, 0, 6, 1), 24, 3, 8, 2, True),
        ((2, 2, 2, 2), 8, 4, 4, 4, False),
    ],
)
def test_rows_come_back_as_one_rank_computes_them(
    counts: tuple[int, ...],
    dim: int,
    top_k: int,
    experts: int,
    etp: int,
    reads_places: bool,
    waits: bool,
    dtype: torch.dtype,
    kind: str,
) -> None:
    ranks = len(counts)
    if DEVICE == "cuda" and ranks > 1:
        pytest.skip("one thread runs the backward of all ranks of a GPU; tests/gpu/run.py has processes")
    local = experts * etp // ranks
    exchange = RowExchange(ranks, max(counts) + 1, dim, top_k, dtype)
    most = exchange.most(local)
    apart: set[bool] = set()

    def work(rank: int, memory: TurnMemory) -> tuple[Tensor, ...]:
        x, weights, ids, mask, grad = draw(rank, counts[rank], dim, top_k, experts, dtype, kind)
        x.requires_grad_()
        weights.requires_grad_()
        for _ in range(2):  # the second journey reuses the memory
            x.grad = weights.grad = None
            way = OneSidedWay(memory, exchange, None if waits else most)
            rows, row_weights, plan = dispatch_one_sided(
                x, weights, ids, mask, way, num_experts=experts, etp=etp, reads_places=reads_places
            )
            sizes = torch.diff(plan.ends, prepend=plan.ends.new_zeros(1)).long()
            filled = int(plan.ends[-1])
            assert plan.room == (filled if waits else most)
            assert plan.sizes == (tuple(sizes.tolist()) if waits else None)
            expert = torch.repeat_interleave(torch.arange(local, device=DEVICE) + rank // etp * local, sizes)
            apart.add(plan.apart is not None)
            if plan.apart is not None:
                rows = spread(rows, plan.apart.source, plan.places)
                row_weights = pick(row_weights, plan.apart.slots, plan.places)
            # Each slice computes its part: together they are one expert.
            computed = one_expert(rows[:filled], expert) * (row_weights[:filled, None] / etp).to(dtype)
            computed = torch.cat([computed, computed.new_full((plan.room - filled, dim), torch.nan)])
            if plan.apart is not None:
                computed = collect(computed, plan.apart.source, plan.places)
            combine_one_sided(computed, plan).backward(grad)
            y = combine_one_sided(computed.detach(), plan)
        assert memory.flags.tolist() == [0, most, 0]
        return y, x.grad, weights.grad

    for rank, got in enumerate(on_ranks(ranks, exchange, work)):
        x, weights, ids, mask, grad = draw(rank, counts[rank], dim, top_k, experts, dtype, kind)
        x, weights = x.float().requires_grad_(), weights.requires_grad_()
        active = torch.ones_like(ids) if mask is None else mask
        outputs = torch.stack([one_expert(x, ids[:, k]) for k in range(top_k)], 1)
        y = (outputs * (weights * active)[..., None]).sum(1)
        y.backward(grad.float())
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 6e-2}
        for one, other in zip(got, (y, x.grad, weights.grad), strict=True):
            torch.testing.assert_close(one.float(), other, **(close if one.dim() else {}))
    assert True in apart if reads_places and not waits else True not in apart or reads_places


def test_what_finds_no_room_is_left_out_and_told() -> None:
    exchange = RowExchange(2, 4, 8, 2, torch.float32)

    def work(rank: int, memory: TurnMemory) -> tuple[list[int], list[int], bool]:
        x, weights = torch.ones(4, 8, device=DEVICE), torch.ones(4, 2, device=DEVICE)
        ids = torch.tensor([[0, 1]] * 4, device=DEVICE)  # all to rank 0: 16 rows
        rows, _, plan = dispatch_one_sided(x, weights, ids, None, OneSidedWay(memory, exchange, 10), num_experts=4)
        y = combine_one_sided(rows, plan)
        return memory.flags.tolist(), plan.ends.tolist(), bool(y.isfinite().all())

    first, second = on_ranks(2, exchange, work)
    assert first == ([16, 10, 0], [8, 10], True)
    assert second == ([0, 10, 0], [0, 0], True)


def test_where_the_host_waits_for_sizes_there_is_room_for_what_comes() -> None:
    exchange = RowExchange(2, 4, 8, 2, torch.float32)

    def work(rank: int, memory: TurnMemory) -> tuple[int, tuple[int, ...] | None]:
        x, weights = torch.ones(4, 8, device=DEVICE), torch.ones(4, 2, device=DEVICE)
        ids = torch.tensor([[0, 1]] * 4, device=DEVICE)  # all to rank 0: 16 rows
        rows, _, plan = dispatch_one_sided(x, weights, ids, None, OneSidedWay(memory, exchange, None), num_experts=4)
        return rows.shape[0], plan.sizes

    assert on_ranks(2, exchange, work) == [(16, (8, 8)), (0, (0, 0))]


def test_where_the_host_waits_for_sizes_an_illegal_id_raises_on_every_rank() -> None:
    exchange = RowExchange(2, 3, 8, 2, torch.float32)

    def work(rank: int, memory: TurnMemory) -> str:
        ids = torch.tensor([[0, 9 if rank else 1]], device=DEVICE)
        x, weights, way = torch.ones(1, 8, device=DEVICE), torch.ones(1, 2, device=DEVICE), None
        way = OneSidedWay(memory, exchange, None)
        with pytest.raises(ShapeError, match=r"outside \[0, 4\) on a rank of \(0, 1\)") as told:
            dispatch_one_sided(x, weights, ids, None, way, num_experts=4)
        return str(told.value) + str(memory.flags.tolist())

    first, second = on_ranks(2, exchange, work)
    assert first == second and first.endswith("[0, 0, 0]")


def test_an_illegal_id_travels_nowhere_and_is_told() -> None:
    exchange = RowExchange(1, 3, 8, 2, torch.float32)

    def work(rank: int, memory: TurnMemory) -> tuple[list[int], Tensor]:
        ids = torch.tensor([[0, 9], [-1, 3], [2**40, 1]], device=DEVICE)
        x, weights = torch.ones(3, 8, device=DEVICE), torch.ones(3, 2, device=DEVICE)
        rows, _, plan = dispatch_one_sided(x, weights, ids, None, OneSidedWay(memory, exchange, 6), num_experts=4)
        return memory.flags.tolist(), combine_one_sided(rows, plan)[:, 0].cpu()

    ((flags, y),) = on_ranks(1, exchange, work)
    assert flags == [0, 6, 1]
    assert y.tolist() == [1.0, 1.0, 1.0]


def test_the_check_names_the_numbers_and_starts_over() -> None:
    groups = create_groups(solve_layout(1))
    check_room(groups)
    memories = memories_of(groups, torch.device(DEVICE), ask=True)
    if memories.reason is not None:
        pytest.skip(memories.reason)
    memory = memories.holding((100, 100), 2**20)
    memory.flags.copy_(torch.tensor([16, 10, 0]))
    with pytest.raises(ShapeError, match=r"were sent 16 rows and have room for 10: .* Skip the step"):
        check_room(groups)
    check_room(groups)
    memory.flags[2] = 1
    with pytest.raises(ShapeError, match=r"An expert id was outside \[0, num_experts\)"):
        check_room(groups)
    groups.destroy()


def test_a_half_that_is_written_twice_waits_in_between() -> None:
    exchange = RowExchange(1, 2, 8, 1, torch.float32)

    def work(rank: int, memory: TurnMemory) -> int:
        x, weights, ids = torch.ones(2, 8, device=DEVICE), torch.ones(2, 1, device=DEVICE), torch.zeros(2, 1).long()
        for _ in range(2):  # as a recomputation that stops before the rows go back
            dispatch_one_sided(x, weights, ids.to(DEVICE), None, OneSidedWay(memory, exchange, 2), num_experts=1)
        return memory.barriers

    assert on_ranks(1, exchange, work) == [3]


def test_an_illegal_id_of_rows_that_stay_is_told_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    monkeypatch.setattr("foldpar.moe.transport.one_sided.why_no_peers", lambda device: None)
    with create_groups(solve_layout(1)) as groups:
        moe = FoldedMoE(
            TopKRouter(16, 4, 2), GroupedExperts(4, 16, 8, groups), groups, one_sided=OneSided(), check=False
        )
        moe.to(DEVICE)
        x = torch.randn(5, 16, device=DEVICE)
        ids = torch.tensor([[0, 1]] * 5, device=DEVICE)
        for last, legal in ((3, True), (4, False), (2, True)):
            ids[-1, -1] = last
            moe(x, ids=ids)
            if legal:
                check_room(groups)
            else:
                with pytest.raises(ShapeError, match=r"An expert id was outside \[0, num_experts\)"):
                    check_room(groups)


@pytest.mark.parametrize("one_sided", [False, OneSided()], ids=["messages", "one_sided"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda routing: replace(routing, weights=routing.weights[:, :1]), r"= \[5, 2\], and are \[5, 1\]"),
        (lambda routing: replace(routing, weights=routing.weights[:-1]), r"= \[5, 2\], and are \[4, 2\]"),
        (lambda routing: replace(routing, mask=routing.ids[:-1] >= 0), r"ids, \[5, 2\]; it is torch.bool and \[4, 2\]"),
        (lambda routing: replace(routing, mask=routing.ids >= 0), None),
    ],
)
def test_a_routing_of_other_shapes_is_refused_in_both_ways(
    monkeypatch: pytest.MonkeyPatch, one_sided: Any, wrong: Callable[[Routing], Routing], says: str | None
) -> None:
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    monkeypatch.setattr("foldpar.moe.transport.one_sided.why_no_peers", lambda device: None)

    class Wrong(TopKRouter):
        def forward(self, x: Tensor) -> Routing:
            return wrong(super().forward(x))

    with create_groups(solve_layout(1)) as groups:
        experts = GroupedExperts(4, 16, 8, groups)
        moe = FoldedMoE(Wrong(16, 4, 2), experts, groups, one_sided=one_sided, check=False).to(DEVICE)
        x = torch.randn(5, 16, device=DEVICE)
        if says is None:
            moe(x)
        else:
            with pytest.raises(ShapeError, match=says):
                moe(x)


class OwnExperts(torch.nn.Module):
    """Experts that know nothing of weights, and answer in float32."""

    num_experts, dim = 4, 16

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        assert len(rows) == int(rows_per_expert.sum())
        return rows.float() * 1.5


class DroppingRouter(TopKRouter):
    """Whose first token loses an assignment."""

    def forward(self, x: Tensor) -> Routing:
        routing = super().forward(x)
        mask = torch.ones_like(routing.ids, dtype=torch.bool)
        mask[0, 0] = False
        return replace(routing, mask=mask)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("kind", "apart"), [("plain", True), ("biases", True), ("foreign", False)])
def test_a_layer_computes_the_same_in_both_ways(
    monkeypatch: pytest.MonkeyPatch, kind: str, apart: bool, drops: bool
) -> None:
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    monkeypatch.setattr("foldpar.moe.transport.one_sided.why_no_peers", lambda device: None)
    seen: list[bool] = []

    def combined(rows: Tensor, plan: OneSidedPlan) -> Tensor:
        seen.append(plan.apart is not None)
        return combine_one_sided(rows, plan)

    monkeypatch.setattr(journeys, "combine_one_sided", combined)
    groups, results = create_groups(solve_layout(1)), []
    for way in (False, OneSided()):
        torch.manual_seed(0)
        experts: Any = OwnExperts()
        if kind != "foreign":
            experts = GroupedExperts(4, 16, 8, groups, bias=kind == "biases", seed=0)
        router = (DroppingRouter if drops else TopKRouter)(16, 4, 2)
        moe = FoldedMoE(router, experts, groups, one_sided=way, check=False).to(DEVICE)
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        y = moe(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])])
    assert seen == ([apart] if drops or kind == "foreign" else []), "one rank alone reads all rows where they lie"
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    groups.destroy()
