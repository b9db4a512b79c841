"""Ranks as threads: the one file that touches torch's private thread-based process group.

Every thread gets a ``torch.distributed`` of its own (default group, names, counts), and a collective is a meeting of
threads at which one of them copies all tensors. Put back afterwards: ``distributed_c10d._world``, the isolation mode of
the group registry, the table of collectives in progress, ``sys.excepthook`` (which ``init_process_group`` replaces),
and the number of torch threads.
"""

from __future__ import annotations

import copy
import ctypes
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import multi_threaded_pg

from foldpar.testing.outcomes import Cause, RankFailure, Returned, live_groups, own_traceback

# After the first failure the other ranks have this long to end, in seconds; they are woken every PULSE.
GRACE = 2.0
PULSE = 0.005

_ONE_AT_A_TIME = threading.Lock()
_Group: Any = multi_threaded_pg.ProcessLocalGroup
_c10d: Any = distributed_c10d


def run(
    function: Callable[..., Any], world: int, args: tuple[Any, ...], *, timeout: float, init: bool
) -> list[Returned | RankFailure]:
    """Run ``function(*args)`` on ``world`` threads of this process."""
    if isinstance(threading.current_thread(), _Rank):
        raise RuntimeError("run_ranks was called on a rank of run_ranks; a thread cannot be a rank of two worlds.")
    changed = threading.Condition()
    store = _Store() if init else None
    ranks = [_Rank(rank, world, function, copy.deepcopy(args), store, timeout, changed) for rank in range(world)]
    with _ONE_AT_A_TIME, _a_world_per_thread():
        try:
            for rank in ranks:
                rank.start()
            with changed:
                changed.wait_for(lambda: _answered(ranks) or _failed(ranks), timeout)
                if not _failed(ranks):
                    # Before anybody is woken: where does each late rank stand?
                    for rank in ranks:
                        rank.answer_late("silent", f"it was still running after {timeout:g} s; its Python stack:")
        finally:
            _end(ranks, store)
    return [rank.outcome for rank in ranks if rank.outcome is not None]


def _answered(ranks: Sequence[_Rank]) -> bool:
    return all(rank.outcome is not None for rank in ranks)


def _failed(ranks: Sequence[_Rank]) -> bool:
    return any(isinstance(rank.outcome, RankFailure) for rank in ranks)


@contextmanager
def _a_world_per_thread() -> Iterator[None]:
    world, torch_threads, excepthook = _c10d._world, torch.get_num_threads(), sys.excepthook
    private: Any = torch._C._distributed_c10d
    _Group.reset()
    private._set_thread_isolation_mode(True)
    _c10d._world = multi_threaded_pg.ThreadLocalWorld()
    torch.set_num_threads(1)
    group_name = _Group.group_name
    _Group.group_name = property(_lasting_name)
    _Group.shutdown = _remember_name
    try:
        yield
    finally:
        _Group.group_name = group_name
        del _Group.shutdown
        torch.set_num_threads(torch_threads)
        sys.excepthook = excepthook
        _c10d._world = world
        private._set_thread_isolation_mode(False)
        _Group.reset()


def _remember_name(group: Any) -> None:
    """``destroy_process_group`` calls this first, then forgets the group's name, then asks for it."""
    group.last_name = group.pg_name


def _lasting_name(group: Any) -> str:
    name: str | None = group._world().pg_names.get(group)
    return group.last_name if name is None else name


class _Rank(threading.Thread):
    """One rank. ``outcome`` is set once, under ``changed``."""

    def __init__(
        self,
        rank: int,
        world: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        store: _Store | None,
        timeout: float,
        changed: threading.Condition,
    ) -> None:
        super().__init__(name=f"rank{rank}", daemon=True)
        self.rank, self.world, self.function, self.args = rank, world, function, args
        self.store, self.timeout, self.changed = store, timeout, changed
        self.outcome: Returned | RankFailure | None = None
        self.groups: Any = None
        self.abandoned = False

    def run(self) -> None:
        self.groups = _c10d._world._get_world()
        try:
            if self.store is not None:
                dist.init_process_group(
                    "threaded",
                    store=self.store,
                    rank=self.rank,
                    world_size=self.world,
                    timeout=timedelta(seconds=self.timeout),
                )
            value = self.function(*self.args)
            self._answer(Returned(value, tuple(live_groups())))
        except BaseException as error:
            self._answer(self._failure(error))
        finally:
            # An abandoned thread may get here when ``torch.distributed`` is no longer its own.
            if not self.abandoned:
                with suppress(Exception):
                    dist.destroy_process_group()

    def _failure(self, error: BaseException) -> RankFailure:
        if isinstance(error, SystemExit) and _Group._terminate.is_set():
            told = "it waited for a rank that failed"
            return RankFailure(self.rank, "peer", told, own_traceback(error), time.monotonic())
        return RankFailure.of(self.rank, error)

    def _answer(self, outcome: Returned | RankFailure) -> None:
        with self.changed:
            self.outcome = self.outcome or outcome
            self.changed.notify_all()

    def answer_late(self, late: Cause, error: str) -> None:
        """Answer for a rank that has not, with the place where it stands."""
        if self.outcome is not None:
            return
        frame = sys._current_frames().get(self.ident or 0)
        stack = [entry for entry in traceback.extract_stack(frame) if entry.filename != threading.__file__][1:]
        places = {(entry.filename, entry.name) for entry in stack}
        waits = not places.isdisjoint({(multi_threaded_pg.__file__, "join"), (__file__, "_until")})
        cause: Cause = "peer" if waits else late
        self.outcome = RankFailure(self.rank, cause, error, "".join(traceback.format_list(stack)), time.monotonic())

    @property
    def is_silent(self) -> bool:
        return isinstance(self.outcome, RankFailure) and self.outcome.cause == "silent"

    def abandon(self) -> None:
        """Let go of a thread that does not end: it meets no later world, and ends when it next runs Python."""
        self.abandoned = True
        if self.groups is not None:
            self.groups.default_pg = None
            self.groups.pg_map.clear()
            self.groups.pg_names.clear()
        if self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit))


def _end(ranks: Sequence[_Rank], store: _Store | None) -> None:
    """Wait for the threads; where a rank failed, wake its peers until they have ended too."""
    deadline = time.monotonic() + GRACE
    while waking := [rank for rank in ranks if rank.is_alive() and not rank.is_silent]:
        if not all(isinstance(rank.outcome, Returned) for rank in ranks):
            _wake(store)
        if time.monotonic() > deadline:
            break
        waking[0].join(PULSE)
    for rank in ranks:
        if rank.is_alive():
            rank.answer_late("stopped", f"it was still running {GRACE:g} s later; its Python stack:")
            rank.abandon()


def _wake(store: _Store | None) -> None:
    """Make every rank that waits for a peer, now or later, raise instead."""
    _Group._terminate.set()
    if store is not None:
        store.close()
    with _Group._coll_lock:
        collectives = list(_Group._cur_coll_on_pgs.values())
    for collective in collectives:
        for condition in (collective._start_cond, collective._done_cond):
            with condition:
                condition.notify_all()


class _Store(Store):
    """A key-value store whose waits can be ended, which those of ``HashStore`` cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def set(self, key: str, value: str | bytes) -> None:
        with self.changed:
            self.values[key] = value.encode() if isinstance(value, str) else bytes(value)
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            self._until([key])
            return self.values[key]

    def add(self, key: str, amount: int) -> int:
        with self.changed:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
            self.changed.notify_all()
            return total

    def wait(self, keys: list[str], timeout: timedelta = timedelta(seconds=300)) -> None:
        with self.changed:
            self._until(keys, timeout)

    def check(self, keys: list[str]) -> bool:
        with self.changed:
            return all(key in self.values for key in keys)

    def delete_key(self, key: str) -> bool:
        with self.changed:
            return self.values.pop(key, None) is not None

    def _until(self, keys: list[str], timeout: timedelta = timedelta(seconds=300)) -> None:
        def present() -> bool:
            return all(key in self.values for key in keys)

        self.changed.wait_for(lambda: self.closed or present(), timeout.total_seconds())
        # A rank whose wait is over goes on even if another has failed since: it may have a failure of its own to tell.
        if present():
            return
        if self.closed:
            raise SystemExit
        raise dist.DistStoreError(f"Timed out waiting for {keys}")
