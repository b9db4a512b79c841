"""Ranks as processes: workers over Gloo that live on between calls.

One call, seen from both ends of a worker's pipe:

    caller   Call ->          (clock starts)                        release ->
    worker           import -> "loaded"        init group, run -> answer       drop groups

A worker keeps its groups until every rank has answered, so that a rank that is done early does not close connections
under a slower one. A rank that fails closes them at once, so that its peers fail too instead of waiting. Workers that
have all answered go on to the next call; if one had to be ended or ended itself, all are, and new ones start next time.
So do they once a worker says with its answer that it is full of threads which calls before have left.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from foldpar.comm import count_groups_anew, is_dtensor, living_groups, local_tensor
from foldpar.testing.outcomes import Cause, RankFailure, Returned, live_groups

# After a failure the other ranks have SETTLE seconds to answer. Then the failed ones are ended, since their connections
# may still be open, and the others have GRACE seconds.
SETTLE = 0.5
GRACE = 3.0
# Imports have this long and do not count as time of the call: torch takes seconds where workers cannot be forked.
STARTUP = 120.0
HOST = "127.0.0.1"
_PRELOADED = re.compile(r"torch|numpy|pytest|hypothesis|peft|(torch\.distributed|foldpar|transformers)(\.\w+)*")
"""What workers are forked with, where the caller has imported it."""


def run(
    function: Callable[..., Any], world: int, args: tuple[Any, ...], *, timeout: float, init: bool
) -> list[Returned | RankFailure]:
    """Run ``function(*args)`` on the first ``world`` workers of this process's pool."""
    if multiprocessing.current_process().daemon:
        raise RuntimeError("run_ranks was called on a rank of run_ranks; a worker cannot have workers of its own.")
    module, file = _home(function)
    payload = _pack((function, args, _warning_filters()))
    with _POOLS.lock:
        pool = _POOLS.take()
        try:
            pool.grow(world)
            with pool.rendezvous(init) as (prefix, port):
                call = Call(world, timeout, init, prefix, port, module, file, list(sys.path), os.getcwd(), payload)
                return pool.run(call)
        except BaseException:
            pool.close()
            raise


@dataclass(frozen=True, slots=True)
class Call:
    """What a worker is told: which function, in which surroundings."""

    world: int
    timeout: float
    init: bool
    prefix: str
    port: int
    module: str
    file: str | None
    search_path: list[str]
    directory: str
    payload: bytes


# The caller's side -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    stacks: Connection
    is_full: bool = False

    def expect(self, word: bytes) -> None:
        """Wait until the worker says that it has imported what it needs."""
        with suppress(EOFError, OSError):
            if self.pipe.poll(STARTUP) and self.pipe.recv_bytes() == word:
                return
        raise RuntimeError(
            f'a worker of run_ranks did not get to "{word.decode()}"; its own message is above. A script that calls '
            'run_ranks must do so under `if __name__ == "__main__":`, since workers import it.'
        )

    def stack(self) -> str:
        """The Python stack of every thread of the worker, or what a crash left."""
        with suppress(OSError, ValueError):
            if self.process.is_alive() and self.process.pid is not None and hasattr(signal, "SIGUSR1"):
                os.kill(self.process.pid, signal.SIGUSR1)
                self.stacks.poll(1.0)
                time.sleep(0.05)
            if self.stacks.poll(0):
                text = os.read(self.stacks.fileno(), 1 << 16).decode(errors="replace")
                return "\n".join(itertools.takewhile(lambda line: __file__ not in line, text.splitlines()))
        return "(no Python stack)"

    def end(self) -> None:
        self.process.kill()
        self.process.join(5.0)


class Pool:
    """Worker processes with ranks 0, 1, ... and the store through which their groups find each other."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.workers: list[Worker] = []
        # Port 0: the system picks a free one, so two test sessions cannot race for it.
        self.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self.calls = 0
        # On Linux workers are forked from a server that has imported what takes long: 8 start in 0.1 s instead of 5 s.
        if sys.platform == "linux":
            self.context: Any = multiprocessing.get_context("forkserver")
            self.context.set_forkserver_preload([name for name in sys.modules if _PRELOADED.fullmatch(name)])
        else:
            self.context = multiprocessing.get_context("spawn")

    @contextmanager
    def rendezvous(self, init: bool) -> Iterator[tuple[str, int]]:
        """Where the ranks of one call meet: a fresh prefix of the pool's store, or a fresh store for ``env://``."""
        self.calls += 1
        store = self.store if init else TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        yield f"call{self.calls}", store.port

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and all(worker.process.is_alive() for worker in self.workers)

    def grow(self, world: int) -> None:
        """Start the workers that are missing, and wait until they listen."""
        fresh = [self._start(rank) for rank in range(len(self.workers), world)]
        self.workers += fresh
        for worker in fresh:
            worker.expect(b"ready")

    def _start(self, rank: int) -> Worker:
        pipe, far_pipe = self.context.Pipe()
        stacks, far_stacks = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=serve,
            args=(rank, far_pipe, far_stacks, self.store.port, "pytest" in sys.modules),
            name=f"rank{rank}",
            daemon=True,
        )
        process.start()
        far_pipe.close()
        far_stacks.close()
        return Worker(process, pipe, stacks)

    def run(self, call: Call) -> list[Returned | RankFailure]:
        team = self.workers[: call.world]
        message = pickle.dumps(call)
        for worker in team:
            worker.pipe.send_bytes(message)
        for worker in team:
            worker.expect(b"loaded")
        outcomes = self._collect(team, call.timeout)
        if all(worker.process.is_alive() and not worker.is_full for worker in team):
            for worker in team:
                worker.pipe.send_bytes(b"release")
        else:
            self.close()
        return outcomes

    def _collect(self, team: list[Worker], timeout: float) -> list[Returned | RankFailure]:
        start = time.monotonic()
        limit = deadline = start + timeout
        outcomes: dict[int, Returned | RankFailure] = {}
        failed: list[Worker] = []
        waiting = {worker.pipe: rank for rank, worker in enumerate(team)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                outcomes[rank] = outcome = _receive(rank, team[rank])
                if isinstance(outcome, RankFailure):
                    failed.append(team[rank])
                    deadline = min(limit, time.monotonic() + SETTLE)
            if not ready:
                if not failed:
                    break
                for worker in failed:
                    worker.end()
                failed.clear()
                deadline = min(limit, time.monotonic() + GRACE)
        elapsed = time.monotonic() - start
        late: Cause = "stopped" if any(_explains(outcome) for outcome in outcomes.values()) else "silent"
        for rank in waiting.values():
            error = f"it was still running after {elapsed:.1f} s; its Python stack:"
            outcomes[rank] = RankFailure(rank, late, error, team[rank].stack(), start + elapsed)
        for rank in waiting.values():
            team[rank].end()
        return [outcomes[rank] for rank in range(len(team))]

    def close(self) -> None:
        if self.owner != os.getpid():
            return
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.end()
            worker.pipe.close()
            worker.stacks.close()
        self.workers.clear()


class _Pools:
    """This process's pool: worker processes are a resource of the process, hence the one global."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: Pool | None = None

    def take(self) -> Pool:
        if self.pool is None or not self.pool.usable:
            self.close()
            self.pool = Pool()
        return self.pool

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        self.pool = None


_POOLS = _Pools()
atexit.register(_POOLS.close)


def _explains(outcome: Returned | RankFailure) -> bool:
    return isinstance(outcome, RankFailure) and not outcome.is_secondary


def _receive(rank: int, worker: Worker) -> Returned | RankFailure:
    try:
        answer = pickle.loads(worker.pipe.recv_bytes())
    except (EOFError, OSError):
        worker.process.join(1.0)
        code = worker.process.exitcode
        ended = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return RankFailure(rank, "died", f"its process ended with {ended}", worker.stack(), time.monotonic())
    if isinstance(answer, RankFailure):
        return answer
    data, groups_left, worker.is_full = answer
    return Returned(_unpack(data), groups_left)


def _home(function: Callable[..., Any]) -> tuple[str, str | None]:
    """The module (and its file) that a worker must import to find the function."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    if "<locals>" in name or "<lambda>" in name:
        raise TypeError(
            f"{name} cannot run on spawned ranks: a worker finds a function by module and name, which a lambda or a "
            'function inside a function has not. Move it to module level, or use backend="threads".'
        )
    module = getattr(inner, "__module__", None) or type(inner).__module__
    return module, getattr(sys.modules.get(module), "__file__", None)


def _warning_filters() -> list[tuple[Any, ...]]:
    """The warning filters as arguments of ``warnings.filterwarnings``, the first one first."""
    return [
        (action, getattr(message, "pattern", message) or "", category, getattr(module, "pattern", module) or "", line)
        for action, message, category, module, line in warnings.filters
    ]


# The worker's side -----------------------------------------------------------------------------------------------


_COLLECT_EVERY = 8
"""Calls. What a call leaves in cycles holds its groups, and a thread of each of gloo's wakes 100 times a second."""

_MANY_THREADS = 64
"""Of a process, all of them, beyond which it collects after every call."""

_MOST_THREADS = 128
"""Beyond which it is replaced: torch keeps some groups for ever, such as those of a collective that it refused."""


def serve(rank: int, pipe: Connection, stacks: Connection, port: int, under_pytest: bool) -> None:
    """Answer calls until the caller goes away."""
    gc.freeze()  # what the worker was forked with is no garbage, and much to look through
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(stacks.fileno())
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, stacks.fileno())
    if under_pytest:
        _explain_asserts()
    torch.set_num_threads(1)
    store = TCPStore(HOST, port, is_master=False, wait_for_workers=False)
    with suppress(EOFError, OSError):
        pipe.send_bytes(b"ready")
        for answered in itertools.count(1):
            call: Call = pickle.loads(pipe.recv_bytes())
            is_full = _threads() > _MOST_THREADS  # of calls before
            pipe.send_bytes(_answer(rank, call, store, pipe, is_full))
            pipe.recv_bytes()
            _drop_groups()
            if answered % _COLLECT_EVERY == 0 or _threads() > _MANY_THREADS:
                gc.collect()


def _threads() -> int:
    """How many this process has, gloo's included, where the system says so."""
    return len(os.listdir(_TASKS)) if os.path.isdir(_TASKS) else 0


_TASKS = "/proc/self/task"


def _explain_asserts() -> None:
    """Let a bare ``assert`` of a test module say its values here too, as far as this pytest can be asked to."""
    with suppress(Exception):
        from _pytest.assertion import install_importhook
        from _pytest.config import get_config

        install_importhook(get_config())


def _answer(rank: int, call: Call, store: Store, pipe: Connection, is_full: bool) -> bytes:
    try:
        with warnings.catch_warnings():
            try:
                function, args, filters = _load(call)
            finally:
                pipe.send_bytes(b"loaded")
            _enter(rank, call, store)
            warnings.resetwarnings()
            for filter_ in reversed(filters):
                warnings.filterwarnings(*filter_)
            value = function(*args)
        return pickle.dumps((_pack(value), tuple(live_groups()), is_full))
    except BaseException as error:
        failure = RankFailure.of(rank, error)
    # Out of the except block, where the exception and with it the function's frames are gone: what they held can close.
    _drop_groups()
    return pickle.dumps(failure)


def _load(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]]]:
    os.chdir(call.directory)
    sys.path[:] = call.search_path
    _import(call.module, call.file)
    function, args, filters = _unpack(call.payload)
    return function, args, filters


def _import(name: str, file: str | None) -> None:
    """Import a module by name, or from its file where the name leads nowhere or elsewhere.

    Test modules need not be importable, and two directories may each have a ``test_layout.py``.
    """
    if name == "__main__":
        return
    with suppress(ModuleNotFoundError):
        found = importlib.import_module(name)
        if file is None or _same_file(getattr(found, "__file__", None), file):
            return
    spec = importlib.util.spec_from_file_location(name, file) if file is not None else None
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"a worker cannot import {name} (file {file}), where the function lives", name=name)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _same_file(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)


def _enter(rank: int, call: Call, store: Store) -> None:
    """Make this process a rank: what torchrun would set, a seed, and a default group of its own store prefix."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(call.world),
        "LOCAL_WORLD_SIZE": str(call.world),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(call.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.manual_seed(0)
    count_groups_anew()
    if call.init:
        dist.init_process_group(
            "gloo",
            store=PrefixStore(call.prefix, store),
            rank=rank,
            world_size=call.world,
            timeout=timedelta(seconds=0.8 * call.timeout),
        )


def _drop_groups() -> None:
    """Destroy every group of this process.

    Gloo takes about 10 ms per peer to close a group. Holding the groups keeps that out of ``destroy_process_group``; a
    thread lets go of them while the next call begins.
    """
    if dist.is_initialized():
        held = [dist.group.WORLD, *living_groups()]
        dist.destroy_process_group()
        threading.Thread(target=held.clear).start()


# Both sides ------------------------------------------------------------------------------------------------------


def _pack(value: Any) -> bytes:
    """Pickle a value; tensors travel as bytes, not as shared memory with file descriptors."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=_LocalTensors)
    return buffer.getvalue()


class _LocalTensors:
    """Pickles as usual, but of a DTensor this rank's part: its mesh means nothing in another process."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, Tensor) and is_dtensor(obj):
                return local_tensor(obj).detach().__reduce_ex__(2)
            return NotImplemented


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
