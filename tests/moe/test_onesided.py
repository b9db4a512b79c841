"""The one-sided journey of rows: what arrives, what comes back, and what happens where there is no room.

Runs on a GPU, or with ``TRITON_INTERPRET=1`` in Triton's interpreter. The ranks are threads here that take turns
between barriers and share one memory; ``tests/gpu/gpu_onesided.py`` runs whole layers between processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldpar import ShapeError, create_groups, solve_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from foldpar.comm.peers import check_room, memory_of  # noqa: E402
from foldpar.moe.transport.one_sided import (  # noqa: E402
    OneSided,
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

    def __init__(self, ranks: int, rank: int, own: list[Tensor], turn: threading.Lock, gate: threading.Barrier) -> None:
        self.group, self.own, self._last = SimpleNamespace(index=rank, size=ranks), own[rank], "sums"
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
    own = [torch.full((exchange.offsets()["end"],), 255, dtype=torch.uint8, device=DEVICE) for _ in range(ranks)]
    turn, gate = threading.Lock(), threading.Barrier(ranks)
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        with turn:
            try:
                results[rank] = work(rank, TurnMemory(ranks, rank, own, turn, gate))
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


@pytest.mark.parametrize("kind", ["random", "masked", "one rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "dim", "top_k", "experts"),
    [((5,), 8, 2, 4), ((3, 7), 16, 2, 8), ((4, 0, 6, 1), 24, 3, 8), ((2, 2, 2, 2), 8, 4, 4)],
)
def test_rows_come_back_as_one_rank_computes_them(
    counts: tuple[int, ...], dim: int, top_k: int, experts: int, dtype: torch.dtype, kind: str
) -> None:
    ranks = len(counts)
    if DEVICE == "cuda" and ranks > 1:
        pytest.skip("one thread runs the backward of all ranks of a GPU; tests/gpu/run.py has processes")
    local = experts // ranks
    exchange = RowExchange(ranks, max(counts) + 1, dim, top_k, dtype)
    room = exchange.room(local, slack=float(ranks))

    def work(rank: int, memory: TurnMemory) -> tuple[Tensor, ...]:
        x, weights, ids, mask, grad = draw(rank, counts[rank], dim, top_k, experts, dtype, kind)
        x.requires_grad_()
        weights.requires_grad_()
        for _ in range(2):  # the second journey reuses the memory
            x.grad = weights.grad = None
            way = OneSidedWay(memory, exchange, room)
            rows, row_weights, plan = dispatch_one_sided(x, weights, ids, mask, way, num_experts=experts)
            sizes = torch.diff(plan.ends, prepend=plan.ends.new_zeros(1)).long()
            expert = torch.repeat_interleave(torch.arange(local, device=DEVICE) + rank * local, sizes)
            filled = int(plan.ends[-1])
            computed = one_expert(rows[:filled], expert) * row_weights[:filled, None].to(dtype)
            y = combine_one_sided(torch.cat([computed, computed.new_full((room - filled, dim), torch.nan)]), plan)
            y.backward(grad)
        assert memory.flags.tolist() == [0, room, 0]
        return y.detach(), x.grad, weights.grad

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
    exchange = RowExchange(1, 2, 8, 2, torch.float32)
    memory = memory_of(groups, exchange.offsets()["end"], torch.device(DEVICE))
    if isinstance(memory, str):
        pytest.skip(memory)
    assert memory_of(groups, exchange.offsets()["end"], torch.device(DEVICE)) is memory
    memory.flags.copy_(torch.tensor([16, 10, 0]))
    with pytest.raises(ShapeError, match=r"were sent 16 rows and have room for 10: .* Skip the step"):
        check_room(groups)
    check_room(groups)
    memory.flags[2] = 1
    with pytest.raises(ShapeError, match=r"An expert id was outside \[0, num_experts\)"):
        check_room(groups)
    groups.destroy()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_tokens": 0}, "max_tokens = 0 is not a number of tokens"),
        ({"max_tokens": 4, "slack": 0.5}, "slack = 0.5 must be 1 or more: 1 is room for perfectly balanced routing"),
    ],
)
def test_room_that_cannot_be_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OneSided(**arguments)


def test_there_is_never_more_room_than_rows_can_come() -> None:
    exchange = RowExchange(4, 100, 8, 2, torch.float32)
    assert exchange.room(local_experts=1, slack=1.5) == 301
    assert exchange.room(local_experts=1, slack=9.0) == 400
    assert exchange.room(local_experts=8, slack=9.0) == 800


def test_more_tokens_than_promised_are_refused() -> None:
    exchange = RowExchange(1, 2, 8, 2, torch.float32)
    with pytest.raises(ShapeError, match=r"routes 3 tokens, but one_sided=OneSided\(max_tokens=2\)"):
        dispatch_one_sided(
            torch.ones(3, 8), torch.ones(3, 2), torch.zeros(3, 2), None, OneSidedWay(None, exchange, 4), num_experts=4
        )


def test_a_half_that_is_written_twice_waits_in_between() -> None:
    exchange = RowExchange(1, 2, 8, 1, torch.float32)

    def work(rank: int, memory: TurnMemory) -> int:
        x, weights, ids = torch.ones(2, 8, device=DEVICE), torch.ones(2, 1, device=DEVICE), torch.zeros(2, 1).long()
        for _ in range(2):  # as a recomputation that stops before the rows go back
            dispatch_one_sided(x, weights, ids.to(DEVICE), None, OneSidedWay(memory, exchange, 2), num_experts=1)
        return memory.barriers

    assert on_ranks(1, exchange, work) == [3]
