"""Runs of ``examples/train_sharded.py`` one after the other, most of them killed; a script of its own.

It imports torch once and forks the ranks of every run, each of which runs the example's ``main``::

    python tests/support/train_killer.py \\
        '[{"world": 2, "arguments": ["--steps", "9"], "kill": {"steps": 4, "rank": 1}}]'

``kill`` sends SIGKILL to a rank, or to all of them if it is null, ``seconds`` after the run has printed so many lines
of steps. One line of JSON for each run says how every rank ended, what rank 0 printed, and the others' errors.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_sharded

TIMEOUT = 120.0  # of a whole run


def rank_main(folder: Path, rank: int, run: dict[str, Any]) -> None:
    """What a rank does, its output in files."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["world"]))
    sys.argv = ["train_sharded.py", *run["arguments"]]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=run["world"],
        timeout=datetime.timedelta(seconds=TIMEOUT / 4),
    )
    train_sharded.main()


def forked(run: dict[str, Any]) -> dict[str, Any]:
    """One run: its ranks, the kill, and how all ended; nobody outlives it."""
    with tempfile.TemporaryDirectory() as name:
        folder, running, ended = Path(name), dict[int, int](), [0] * run["world"]
        for rank in range(run["world"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    rank_main(folder, rank, run)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            running[child] = rank
        kill, end = run.get("kill"), time.monotonic() + TIMEOUT
        while running:
            if kill is not None and lines(folder / "out-0", "step ") >= kill["steps"]:
                time.sleep(kill.get("seconds", 0.0))
                for child, rank in running.items():
                    if kill.get("rank") in (None, rank):
                        os.kill(child, signal.SIGKILL)
                kill = None
            if time.monotonic() > end:
                for child in running:
                    os.kill(child, signal.SIGKILL)
            for child in list(running):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ended[running.pop(child)] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        errors = [(folder / f"err-{rank}").read_text()[-2000:] for rank in range(run["world"]) if ended[rank] > 0]
        output = folder / "out-0"
        return {
            "ended": ended,
            "lines": output.read_text().splitlines() if output.exists() else [],
            "errors": errors,
            "timed_out": time.monotonic() > end,
        }


def lines(path: Path, start: str) -> int:
    """How many of a file's lines start so."""
    return sum(line.startswith(start) for line in path.read_text().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in json.loads(sys.argv[1]):
        print(json.dumps(forked(one)), flush=True)
