"""``examples/train_sharded.py`` resumes itself: killed again and again, it ends with the weights of a run that was not.

Bit by bit, optimizer states included, and every step that was taken twice has the same loss both times.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import train_killer
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SCRIPT = Path(train_killer.__file__)
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_sharded.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
KILLS = 10
TINY = ["--batch", "8", "--length", "16"]
SHARDED = ["--tp", "2", "--ep", "4", "--stage", "3"]


def runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of every run, in order."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=60 + 40 * len(runs),
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(runs) and not any(run["timed_out"] for run in found), found
    return found


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that is in a checkpoint, whole, read by torch alone."""
    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    got, want = tensors(one), tensors(other)
    assert got.keys() == want.keys() and any("exp_avg" in name for name in got)
    assert any("experts" in name for name in got)
    for name, tensor in want.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(got[name], tensor), name


def steps_of(lines: list[str]) -> list[tuple[int, str]]:
    """The number of every step that was taken, and what was printed about it."""
    return [(int(line.split()[1]), line) for line in lines if line.startswith("step ")]


def starts_of(lines: list[str]) -> list[int]:
    """After which step each run began."""
    return [int(match[1] or 0) for line in lines if (match := re.match(r"starting|resuming after step (\d+)", line))]


def assert_resumed(lines: list[str], uninterrupted: list[str]) -> None:
    """It went on from checkpoints, took no step but those of the other run, and ended."""
    assert any(start > 0 for start in starts_of(lines)), lines
    expected = dict(steps_of(uninterrupted))
    assert sorted(expected) == list(range(1, len(expected) + 1))
    taken = steps_of(lines)
    assert {step for step, _ in taken} == set(expected)
    assert all(line == expected[step] for step, line in taken)
    assert lines[-1] == uninterrupted[-1] == f"finished {len(expected)} steps"


def kill_and_compare(tmp_path: Path, world: int, steps: int, kills: list[dict[str, Any]], options: list[str]) -> None:
    """An uninterrupted run, then runs in another folder of which all but the last are killed."""
    common = [*TINY, *options, "--steps", str(steps), "--folder"]
    alone = {"world": world, "arguments": [*common, str(tmp_path / "alone")]}
    killed = {"world": world, "arguments": [*common, str(tmp_path / "killed")]}
    whole, *rest = runs([alone, *({**killed, "kill": kill} for kill in kills), killed])
    assert whole["ended"] == rest[-1]["ended"] == [0] * world, (whole["errors"], rest[-1]["errors"])
    for kill, run in zip(kills, rest, strict=False):
        # It was killed in the middle, and ranks that were not have ended by themselves, with an error.
        expected = [-9 if kill["rank"] in (None, rank) else 1 for rank in range(world)]
        assert run["ended"] == expected, (kill, run)
        assert not any(line.startswith("finished") for line in run["lines"])
    assert_resumed([line for run in rest for line in run["lines"]], whole["lines"])
    assert_same_weights(tmp_path / "killed" / f"step-{steps}", tmp_path / "alone" / f"step-{steps}")
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert len(left) == 2 and not any("incomplete" in name for name in left), left


@pytest.mark.long
def test_killed_once_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    options = ["--tp", "2", "--ep", "2", "--stage", "3", "--save-every", "2", "--asynchronous"]
    kill_and_compare(tmp_path, 2, 12, [{"steps": 5, "seconds": 0.01, "rank": 1}], options)


@pytest.mark.long
@pytest.mark.parametrize("saving", [[], ["--asynchronous"]], ids=["foreground", "background"])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_ten_times_it_ends_with_the_same_weights(tmp_path: Path, seed: int, saving: list[str]) -> None:
    """One rank or all of them; only all of them while they start, as nothing but torchrun notices a single one then."""
    draw = random.Random(seed)
    kills = []
    for _ in range(KILLS):
        rank = draw.choice([None, 0, 1, 2, 3])
        steps = draw.randint(0 if rank is None else 1, 4)
        kills.append({"steps": steps, "seconds": draw.uniform(0, 0.15), "rank": rank})
    kill_and_compare(tmp_path, 4, 60, kills, [*SHARDED, "--save-every", "2", *saving])


@pytest.mark.long
def test_torchrun_starts_it_again_after_each_of_ten_kills(tmp_path: Path) -> None:
    """One torchrun, whose ranks are killed one at a time; nobody else starts anything."""
    options = [*TINY, *SHARDED, "--steps", "60", "--save-every", "2", "--folder"]
    [whole] = runs([{"world": 4, "arguments": [*options, str(tmp_path / "alone")]}])
    assert whole["ended"] == [0] * 4, whole["errors"]

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*launcher, "--max-restarts", str(KILLS), str(EXAMPLE), *options, str(tmp_path / "killed")]
    draw, killed, output = random.Random(2), 0, tmp_path / "output"
    with open(output, "w") as out, open(tmp_path / "errors", "w") as errors:
        torchrun = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=errors)
    ranks: list[int] = []
    try:
        end = time.monotonic() + 400
        wanted = draw.randint(1, 4)
        while torchrun.poll() is None and time.monotonic() < end:
            lines = output.read_text().splitlines()
            starts = [place for place, line in enumerate(lines) if starts_of([line])]
            since = len(steps_of(lines[starts[-1] :])) if starts else 0
            ranks = children(torchrun.pid)
            if killed < KILLS and len(starts) == killed + 1 and since >= wanted and len(ranks) == 4:
                time.sleep(draw.uniform(0, 0.15))
                os.kill(draw.choice(ranks), signal.SIGKILL)
                killed, wanted = killed + 1, draw.randint(1, 4)
            time.sleep(0.01)
        assert torchrun.poll() == 0, (tmp_path / "errors").read_text()[-4000:]
    finally:
        if torchrun.poll() is None:
            ranks = children(torchrun.pid)
            torchrun.kill()
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        torchrun.wait()
    lines = output.read_text().splitlines()
    assert killed == KILLS and len(starts_of(lines)) == KILLS + 1
    assert_resumed(lines, whole["lines"])
    assert_same_weights(tmp_path / "killed" / "step-60", tmp_path / "alone" / "step-60")


def children(process: int) -> list[int]:
    """The processes that this one has started and that still run."""
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


@pytest.mark.long
def test_it_goes_on_in_other_layouts_and_stages(tmp_path: Path) -> None:
    common = [*TINY, "--dtype", "float64", "--save-every", "3"]
    other = [
        (4, 4, [*SHARDED]),
        (8, 4, ["--tp", "2", "--ep", "2", "--etp", "2", "--order", "consecutive", "--stage", "1"]),
        (12, 2, ["--tp", "1", "--ep", "2", "--stage", "0"]),
    ]
    alone = ["--tp", "1", "--ep", "1", "--steps", "12", "--stage", "2", "--folder", str(tmp_path / "alone")]
    whole, *rest = runs(
        [
            {"world": 2, "arguments": [*common, *alone]},
            *(
                {
                    "world": world,
                    "arguments": [*common, *options, "--steps", str(steps), "--folder", str(tmp_path / "moved")],
                }
                for steps, world, options in other
            ),
        ]
    )
    assert all(set(run["ended"]) == {0} for run in [whole, *rest]), [run["errors"] for run in [whole, *rest]]
    assert starts_of([line for run in rest for line in run["lines"]]) == [0, 4, 8]
    got, want = tensors(tmp_path / "moved" / "step-12"), tensors(tmp_path / "alone" / "step-12")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-8, msg=name)
