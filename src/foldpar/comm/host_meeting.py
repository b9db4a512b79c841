"""Where the hosts of ranks on one machine tell each other a number: a file that all have mapped, and no device.

rank 0   [ forward 4: 512 ] [ forward 3: 512 ]      every rank writes its own two words, in turn,
rank 1   [ forward 4: 640 ] [ forward 5: 512 ]      and reads those of the others
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from typing import Any

import torch.distributed as dist

from foldpar.comm.groups import AxisGroup
from foldpar.errors import GroupsError

__all__ = ["HostMeeting", "gathered"]

_BITS = 40
"""Of a word, for the number; the rest says in which meeting it was told."""
_TURNS = 1 << 20
_WORD = 8
_APART = 64
"""Bytes between the words of two ranks: a cache line."""


class HostMeeting:
    """A place where the hosts of a group meet; make it on every rank of the group.

    A word is written and read whole, and holds both the number and the meeting that it belongs to, so neither a lock
    nor an order of writes is needed. A rank can be one meeting ahead of another, which may still be reading the last
    one: hence two words a rank, in turn. Nobody can be two ahead.

    Args:
        group: whose ranks meet. All must be on one machine, and see one file system for temporary files.
        seconds: how long to wait for the slowest of them.

    Raises:
        GroupsError: a rank could not map the file, on every rank of the group.
    """

    def __init__(self, group: AxisGroup, seconds: float = 600.0) -> None:
        self.group, self._seconds, self._turn = group, seconds, 0
        self._words: Any = None
        if group.size > 1:
            self._words = _mapped(group)

    def largest(self, number: int) -> int:
        """The largest number that a rank of the group brings to this meeting; the same on all of them.

        Raises:
            GroupsError: a rank did not come.
        """
        if self.group.size == 1:
            return number
        self._turn = self._turn % (_TURNS - 2) + 1  # of an even number of turns, so that words still alternate
        word, half = self._turn << _BITS, self._turn % 2
        self._words[self._place(self.group.index, half)] = word | number
        return max(self._told(rank, half) for rank in range(self.group.size))

    def _told(self, rank: int, half: int) -> int:
        at, words, turn, looks, since = self._place(rank, half), self._words, self._turn, 0, 0.0
        while (word := words[at]) >> _BITS != turn:
            looks += 1
            if looks < 64:
                continue
            since = since or time.monotonic()
            waited = time.monotonic() - since
            if waited > self._seconds:
                raise GroupsError(
                    f"Rank {self.group.ranks[rank]} did not come to a forward within {self._seconds:.0f} s for which "
                    f"the ranks {self.group.ranks} meet. Look at its first error; every rank of a stage must call a "
                    f"layer equally often."
                )
            time.sleep(0 if waited < 1e-3 else 5e-5)  # lets other threads run, and soon other processes
        return int(word & ((1 << _BITS) - 1))

    def _place(self, rank: int, half: int) -> int:
        return (2 * rank + half) * (_APART // _WORD)


def _mapped(group: AxisGroup) -> Any:
    """One file, mapped by all ranks of a group and then forgotten by the file system; as words."""
    size, path, problem, words = 2 * group.size * _APART, "", "", None
    if group.index == 0:
        try:
            path = _new_file(size)
        except OSError as error:
            problem = str(error)
    path, problem = gathered((path, problem), group)[0]
    if path:
        try:
            with open(path, "r+b") as file:
                words = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        except (OSError, ValueError) as error:
            problem = str(error)
    problems = [entry for entry in gathered(problem, group) if entry]
    if path and group.index == 0:
        os.unlink(path)
    if problems:
        raise GroupsError(f"The ranks {group.ranks} cannot map one file: {problems[0]}.")
    return words


def _new_file(size: int) -> str:
    in_memory = "/dev/shm"
    handle, path = tempfile.mkstemp(prefix="foldpar-", dir=in_memory if os.access(in_memory, os.W_OK) else None)
    with os.fdopen(handle, "wb") as file:
        file.write(bytes(size))
    return path


def gathered(value: Any, group: AxisGroup) -> list[Any]:
    """What every rank of a group brings, in coordinate order."""
    if group.size == 1:
        return [value]
    entries: list[Any] = [None] * group.size
    dist.all_gather_object(entries, value, group=group.process_group)
    return entries
