"""Hosts tell each other a number without a device, a collective or a lock; and what memory they then share."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import foldpar
from foldpar import GroupsError
from foldpar.comm.host_meeting import HostMeeting
from foldpar.comm.peers import DeviceMemories, check_room, memories_of
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
    first: Any = memories.holding((3 * 2**20, 5 * 2**20 - 1))
    assert first.halves == (3 * 2**20, 5 * 2**20) and first.own.shape == (8 * 2**20,)
    assert memories.holding((1, 1)) is memories.holding((3 * 2**20, 5 * 2**20)) is first
    second: Any = memories.holding((3 * 2**20 + 1, 5))
    assert second.halves == (6 * 2**20, 5 * 2**20)
    assert memories.holding((6 * 2**20, 1)) is second and memories.holding((7, 7)) is first
    third: Any = memories.holding((50 * 2**20, 6 * 2**20))
    assert third.halves == (50 * 2**20, 10 * 2**20)
    assert [memory.halves for memory in memories.made] == [first.halves, second.halves, third.halves]


def test_memory_that_a_rank_has_not_is_refused_and_not_asked_for_again(
    memories: DeviceMemories, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def out_of_memory(size: int, **_: object) -> None:
        asked.append(size)
        raise torch.OutOfMemoryError("out of memory\nat length")

    monkeypatch.setattr("foldpar.comm.peers.torch", SimpleNamespace(empty=out_of_memory, uint8=torch.uint8))
    assert memories.holding((2**20, 2**20)) == "rank 0 has no 2 MiB to share: out of memory"
    assert memories.holding((2**21, 2**20)) == "rank 0 has no 2 MiB to share: out of memory"
    assert asked == [2**21] and memories.made == []


def test_memory_that_is_made_after_a_check_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.comm.peers.why_no_peers", lambda device: None)
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    found = memories_of(groups, torch.device("cpu"), ask=True)
    assert found is not None
    check_room(groups)
    memory: Any = found.holding((1, 1))
    memory.flags.copy_(torch.tensor([16, 10, 0]))
    with pytest.raises(foldpar.ShapeError, match="were sent 16 rows and have room for 10"):
        check_room(groups)
    check_room(groups)
