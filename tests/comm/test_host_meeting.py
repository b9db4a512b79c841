"""Hosts tell each other a number without a device, a collective or a lock; and what memory they then share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import foldpar
from foldpar import GroupsError
from foldpar.comm.host_meeting import HostMeeting
from foldpar.comm.peers import DeviceMemories, PeerMemory, Place, await_peers, check_room, memories_of, why_apart
from foldpar.testing import run_ranks


def meetings(numbers: dict[int, list[int]]) -> list[int]:
    with foldpar.create_groups(foldpar.solve_layout(3, ep=3)) as groups:
        meeting = HostMeeting(groups.ep)
        found = []
        for place, number in enumerate(numbers[groups.ep.index]):
            if (place + groups.rank) % 3 == 0:
                time.sleep(0.002)  # another rank is late each time
            found.append(meeting.largest(number))
        return found


def test_all_learn_the_largest_number_of_every_meeting() -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = {rank: torch.randint(2**31, (300,), generator=draw).tolist() for rank in range(3)}
    want = [max(told) for told in zip(*numbers.values(), strict=True)]
    assert run_ranks(meetings, 3, numbers, backend="threads") == [want] * 3
    assert run_ranks(meetings, 3, numbers) == [want] * 3  # processes


def test_turns_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.comm.host_meeting._TURNS", 8)
    numbers = {rank: [rank + place for place in range(40)] for rank in range(3)}
    assert run_ranks(meetings, 3, numbers, backend="threads") == [[2 + place for place in range(40)]] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    def rank() -> str:
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            meeting = HostMeeting(groups.ep, seconds=0.05)
            meeting.largest(1)
            if groups.rank == 1:
                return ""
            with pytest.raises(GroupsError, match="Rank 1 did not come to a forward within 0 s") as told:
                meeting.largest(1)
            return str(told.value)

    assert "every rank of a stage must call a layer equally often" in run_ranks(rank, 2, backend="threads")[0]


def test_a_file_that_not_all_can_map_is_an_error_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> str:
        raise OSError("no space")

    monkeypatch.setattr("foldpar.comm.host_meeting._new_file", refuse)

    def rank() -> None:
        with (
            foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups,
            pytest.raises(GroupsError, match=r"The ranks \(0, 1\) cannot map one file: no space"),
        ):
            HostMeeting(groups.ep)

    run_ranks(rank, 2, backend="threads")


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> DeviceMemories:
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    found = memories_of(foldpar.create_groups(foldpar.solve_layout(1)), torch.device("cpu"), ask=True)
    assert found is not None
    return found


def test_layers_share_memory_and_it_grows_by_doubling(memories: DeviceMemories) -> None:
    def holding(*halves: int) -> Any:
        return memories.holding(halves, 2**40)  # type: ignore[arg-type]

    first = holding(3 * 2**20, 5 * 2**20 - 1)
    assert first.halves == (3 * 2**20, 5 * 2**20) and first.own.shape == (8 * 2**20,)
    assert holding(1, 1) is holding(3 * 2**20, 5 * 2**20) is first
    second = holding(3 * 2**20 + 1, 5)
    assert second.halves == (6 * 2**20, 5 * 2**20)
    assert holding(6 * 2**20, 1) is second and holding(7, 7) is first
    third = holding(50 * 2**20, 6 * 2**20)
    assert third.halves == (50 * 2**20, 10 * 2**20)
    assert [memory.halves for memory in memories.made] == [first.halves, second.halves, third.halves]
    assert memories.shared == (8 + 11 + 60) * 2**20


def test_all_memories_together_stay_within_the_bound(memories: DeviceMemories) -> None:
    """It grows by doubling while the bound allows it, then by what is needed, and then not at all."""
    bound = 100 * 2**20
    for wanted, made in ((20, (20, 20)), (21, (21, 21))):  # 40 would be 100 MiB together, and 4 more for both halves
        found: Any = memories.holding((wanted * 2**20, wanted * 2**20), bound)
        assert found.halves == tuple(half * 2**20 for half in made)
    assert memories.holding((30 * 2**20, 1), bound) == (
        "it takes 31 MiB more than the 82 MiB that the ranks share already, and most_bytes allows 100 MiB"
    )
    assert memories.holding((21 * 2**20, 1), bound) is found
    assert memories.refused is None and len(memories.made) == 2


def test_memory_that_a_rank_has_not_is_refused_and_not_asked_for_again(
    memories: DeviceMemories, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def out_of_memory(size: int, **_: object) -> None:
        asked.append(size)
        raise torch.OutOfMemoryError("out of memory\nat length")

    monkeypatch.setattr("foldpar.comm.peers.torch", SimpleNamespace(empty=out_of_memory, uint8=torch.uint8))
    assert memories.holding((2**20, 2**20), 2**40) == "rank 0 has no 2 MiB to share: out of memory"
    assert memories.holding((2**21, 2**20), 2**40) == "rank 0 has no 2 MiB to share: out of memory"
    assert asked == [2**21] and memories.made == []


def test_memory_that_is_made_after_a_check_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    found = memories_of(groups, torch.device("cpu"), ask=True)
    assert found is not None
    check_room(groups)
    memory: Any = found.holding((1, 1), 2**40)
    memory.flags.copy_(torch.tensor([16, 10, 0]))
    with pytest.raises(foldpar.ShapeError, match="were sent 16 rows and have room for 10"):
        check_room(groups)
    check_room(groups)


def test_memory_that_is_not_what_was_shared_is_never_used(
    memories: DeviceMemories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeerMemory, "is_shared", lambda self: False)
    says = "memory could not be shared: rank 0 reads something else than the others have written"
    assert memories.holding((1, 1), 2**40) == memories.reason == says
    assert memories.made == [] and memories.hosts is None


def test_flags_of_memory_that_was_made_in_inference_mode_are_read_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    with torch.inference_mode():
        found = memories_of(groups, torch.device("cpu"), ask=True)
        assert found is not None
        memory: Any = found.holding((1, 1), 2**40)
    assert not memory.own.is_inference()
    check_room(groups)


def test_a_rank_that_has_not_run_yet_checks_with_those_that_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 had no batch in the first step."""
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    monkeypatch.setattr("foldpar.comm.peers._has_gpus", lambda groups: True)

    def rank() -> list[str]:
        with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
            await_peers(groups)
            check_room(groups)  # nobody has run
            memory: Any = None
            if groups.rank == 0:
                found = memories_of(groups, torch.device("cpu"), ask=True)
                assert found is not None
                memory = found.holding((1, 1), 2**40)
            said = []
            for flags in ([16, 10, 0], [0, 0, 0]):
                if memory is not None:
                    memory.flags.copy_(torch.tensor(flags))
                try:
                    check_room(groups)
                    said.append("")
                except foldpar.ShapeError as error:
                    said.append(str(error)[:42])
            return said

    want = ["A rank's experts were sent 16 rows and have", ""]
    assert run_ranks(rank, 2, backend="threads") == [[want[0][:42], ""]] * 2


PLACE = ("machine", 1, None, 0)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((None, PLACE), (None, ("machine", 2, None, 1)), None),
        ((None, PLACE), ("triton is missing", PLACE), "triton is missing"),
        ((None, PLACE), (None, ("other", 2, None, 1)), "the ranks (0, 1) are on several machines"),
        ((None, PLACE), (None, ("machine", 1, None, 1)), "of the ranks (0, 1) some are threads of one process"),
        ((None, PLACE), (None, ("machine", 2, "1", 1)), "the ranks (0, 1) see different GPUs: CUDA_VISIBLE_DEVICES"),
        ((None, PLACE), (None, ("machine", 2, None, 0)), "of the ranks (0, 1) some share a GPU"),
    ],
)
def test_what_keeps_ranks_from_reading_each_other_is_said(
    monkeypatch: pytest.MonkeyPatch, first: Place, second: Place, says: str | None
) -> None:
    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", raising=False)
    found = why_apart((0, 1), [first, second])
    assert found == says or (says is not None and found is not None and found.startswith(says))


class Stream:
    def __init__(self) -> None:
        self.after: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.after.append(other)


def test_streams_take_turns_with_a_memory(memories: DeviceMemories, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one waits for the first, and neither for itself; one that is captured waits for none outside."""
    memory: Any = memories.holding((1, 1), 2**40)
    memory.own = SimpleNamespace(is_cuda=True, device=memory.own.device)
    first, second, captured = Stream(), Stream(), Stream()
    current = [first]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] is captured)
    for stream in (first, first, second, captured, second, first):
        with on(stream):
            memory.begin("rows")
            memory.begin("sums")
    assert (first.after, second.after, captured.after) == ([second], [first], [])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("none", None),
        ("no memory", "rank 1 has no 2 MiB to share: out of memory"),
        ("no rendezvous", "memory could not be shared: cannot import"),
        ("elsewhere", "memory could not be shared: torch shares it from elsewhere than where it begins"),
        ("other bytes", "memory could not be shared: rank 1 reads something else than the others have written"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_agreed_on_by_all(
    monkeypatch: pytest.MonkeyPatch, fault: str, says: str | None
) -> None:
    """Torch's shared memory, as far as it is used, between threads."""
    gate, buffers = threading.Barrier(2), dict[int, Any]()

    def empty(size: int, **options: Any) -> Any:
        if fault == "no memory" and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("out of memory\nat length")
        return torch.empty(size, **options)

    def read(rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return buffers[rank][: sizes[0]] + (fault == "other bytes" and dist.get_rank() == 1)

    def rendezvous(own: torch.Tensor, name: str) -> Any:
        buffers[dist.get_rank()] = own
        gate.wait(timeout=60)
        if dist.get_rank() == 1 and fault == "no rendezvous":
            raise RuntimeError("cannot import\nat length")
        moved = 64 * (fault == "elsewhere")
        return SimpleNamespace(
            buffer_ptrs=[buffers[rank].data_ptr() + moved for rank in (0, 1)],
            barrier=lambda channel, timeout_ms: gate.wait(timeout=60),
            get_buffer=read,
        )

    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    monkeypatch.setattr("torch.distributed._symmetric_memory.empty", empty)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", rendezvous)

    def rank() -> Any:
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            found = memories_of(groups, torch.device("cpu"), ask=True)
            assert found is not None and found.reason is None
            memory = found.holding((1, 1), 2**40)
            assert isinstance(memory, str) == bool(says) == (found.made == [])
            assert (found.hosts is None) == (says is not None and "could not be shared" in says)
            return memory if isinstance(memory, str) else None

    assert run_ranks(rank, 2, backend="threads") == [says, says]
