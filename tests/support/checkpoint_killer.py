"""Saves that are killed, stopped or out of disk at a chosen file operation on a chosen rank; a script of its own.

It imports torch once and forks the ranks of every attempt, since a killed rank cannot be used again::

    python tests/support/checkpoint_killer.py folder '[{"rank": 1, "at": 7}, {"rank": 0, "bytes": 4096}, {}]'

Every attempt saves a model, trained by some steps that follow from its place in the list, at
``folder/attempt-<place>``. One line of JSON for each says how every rank ended, its error, its operations, and how long
the others took.
"""

from __future__ import annotations

import builtins
import datetime
import json
import os
import re
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import foldpar
from foldpar import families
from foldpar.checkpoint import dcp as checkpoint_dcp
from foldpar.checkpoint import files as checkpoint_files
from foldpar.checkpoint import save_checkpoint
from foldpar.errors import CheckpointError

WORLD = 2
TIMEOUT = 4.0
TOKEN = r"\.[0-9a-f]{12}(?=\.incomplete)"  # of one save, in the name of its folder


class Model(nn.Module):
    """A dense layer, and experts that two ranks share."""

    def __init__(self, groups: foldpar.FoldedGroups) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(16, 16)
        self.experts = foldpar.GroupedExperts(4, 8, 16, groups, seed=1)
        foldpar.mark_parameters(self, families.REPLICATED)


def trained(groups: foldpar.FoldedGroups, place: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Other values for other places; each step moves every parameter in a way of its own."""
    model = Model(groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(1 + place % 5):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().sin()
        foldpar.declare_reduced(model)
        optimizer.step()
    return model, optimizer


class Operations:
    """Counts what a save does to files, and kills this process at one of them; a write is killed half-way."""

    def __init__(self, folder: Path, at: int | None, end: signal.Signals) -> None:
        self.folder, self.at, self.end, self.names = str(folder), at, end, list[str]()
        sys.addaudithook(self._audited)
        self._patch()

    def count(self, name: str) -> None:
        if len(self.names) == self.at:
            os.kill(os.getpid(), self.end)
        self.names.append(name)

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax"):
            self._of_folder("open", arguments[0])
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            self._of_folder(event.removeprefix("os."), arguments[0])

    def _of_folder(self, name: str, path: object) -> None:
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(self.folder):
            self.count(f"{name} {re.sub(TOKEN, '', Path(path).name)}")

    def _patch(self) -> None:
        write, fsync = checkpoint_dcp._HashingStream.write, os.fsync

        def half(stream: Any, data: Any) -> int:
            # The half is only to be torn; where the process lives on, all of it is written as one.
            if len(self.names) == self.at:
                stream.raw.write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                stream.raw.flush()
            self.count("write data")
            return write(stream, data)

        def counted(descriptor: int) -> None:
            self.count("fsync")
            fsync(descriptor)

        def opened(path: Any, mode: str = "r") -> Any:
            file = builtins.open(path, mode)  # noqa: SIM115
            return Torn(file, self) if "w" in mode else file

        checkpoint_dcp._HashingStream.write = half  # type: ignore[method-assign]
        os.fsync = counted
        checkpoint_files.open = opened  # type: ignore[attr-defined]


class Torn:
    """The manifest's file: half of it is on the disk when the write is killed."""

    def __init__(self, file: Any, operations: Operations) -> None:
        self.file, self.operations = file, operations

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.operations.count("write manifest")
        self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *of: object) -> None:
        self.file.close()


def attempt(folder: Path, place: int, rank: int, point: dict[str, int]) -> dict[str, Any]:
    """On one rank: save, and say what happened."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{place}-{os.getppid()}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    groups = foldpar.create_groups(foldpar.solve_layout(WORLD, ep=WORLD))
    model, optimizer = trained(groups, place)
    mine = point.get("rank") == rank
    end = signal.SIGSTOP if point.get("stop") else signal.SIGKILL
    operations = Operations(folder, point.get("at") if mine else None, end)
    if mine and "bytes" in point:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (point["bytes"], resource.RLIM_INFINITY))
    error = ""
    try:
        pending = save_checkpoint(
            folder / f"attempt-{place}",
            model,
            optimizer,
            groups,
            step=place,
            asynchronous=bool(point.get("background")),
        )
        if pending is not None:
            pending.wait()
    except CheckpointError as caught:
        error = str(caught)
    names = list(operations.names)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"error": error, "operations": names}


def forked(folder: Path, place: int, point: dict[str, int]) -> dict[str, Any]:
    """All ranks of one attempt, and how they ended."""
    start, children = time.monotonic(), []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                answer = attempt(folder, place, rank, point)
                (folder / f"answer-{place}-{rank}").write_text(json.dumps(answer))
                code = 0
            except BaseException as error:
                print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    ended = [0] * WORLD
    for rank in sorted(range(WORLD), key=lambda rank: rank == point.get("rank")):  # the one that is stopped comes last
        if point.get("stop") and rank == point["rank"]:
            os.kill(children[rank], signal.SIGKILL)
        ended[rank] = os.waitstatus_to_exitcode(os.waitpid(children[rank], 0)[1])
        seconds = time.monotonic() - start
    answers = []
    for rank in range(WORLD):
        file = folder / f"answer-{place}-{rank}"
        answers.append(json.loads(file.read_text()) if file.exists() else None)
        file.unlink(missing_ok=True)
    for store in folder.glob("store-*"):
        store.unlink()
    return {"ended": ended, "answers": answers, "seconds": seconds}


if __name__ == "__main__":
    target, points = Path(sys.argv[1]), json.loads(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    for number, one in enumerate(points, first):
        print(json.dumps(forked(target, number, one)), flush=True)
