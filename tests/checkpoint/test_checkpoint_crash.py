"""Saves that are killed at any moment, and disks that are full: what was complete before stays, and is found."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_killer
import pytest
import torch
from checkpoint_killer import TIMEOUT, WORLD, trained

import foldpar
from foldpar.checkpoint import latest_checkpoint, load_checkpoint
from foldpar.errors import CheckpointError

SCRIPT = Path(checkpoint_killer.__file__)
NO_DEFAULT = 600.0
"""Seconds far above the timeout that was asked for, whatever else the machine does, and below torch's half hour."""
Attempt = dict[str, Any]


def attempts(folder: Path, points: list[dict[str, int]], first: int) -> list[Attempt]:
    """Run the script, and read what became of every attempt."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(points), str(first)],
        capture_output=True,
        text=True,
        timeout=60 + 5 * len(points) + 3 * TIMEOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(points), done.stderr
    return found


def checksum(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def assert_loads(path: Path, place: int) -> None:
    """In one process, bit by bit: what that attempt was to save."""
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        want, want_optimizer = trained(groups, place)
        model, optimizer = trained(groups, place + 1)
        assert load_checkpoint(path, model, optimizer, groups, verify=True).step == place
        for one, two in zip(model.parameters(), want.parameters(), strict=True):
            assert torch.equal(one, two)
            for key, state in want_optimizer.state[two].items():
                assert torch.equal(optimizer.state[one][key], state), key


def unfinished(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{path.name}.*incomplete"))


def assert_incomplete(path: Path) -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        for name in (path, *unfinished(path)):
            with pytest.raises(CheckpointError, match=r"not completed|no complete checkpoint"):
                load_checkpoint(name, *trained(groups, 0), groups)


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """A folder with one complete checkpoint, and the operations that each rank did to save it."""
    folder = tmp_path_factory.mktemp("runs")
    [saved] = attempts(folder, [{}], 0)
    assert saved["ended"] == [0] * WORLD
    assert_loads(folder / "attempt-0", 0)
    operations = [answer["operations"] for answer in saved["answers"]]
    manifest_last = ["open foldpar.json", "write manifest", "fsync", "fsync", "rename attempt-0.incomplete", "fsync"]
    end = [*manifest_last, "remove attempt-0.lock.incomplete"]
    assert operations[0][-len(end) :] == end  # its folder is on the disk before it gets its name
    return folder, operations


def killed_everywhere(operations: list[list[str]]) -> list[dict[str, int]]:
    """At every operation, but only at some of the many writes of data that follow one another."""
    return [
        {"rank": rank, "at": at}
        for rank in range(WORLD)
        for at, name in enumerate(operations[rank])
        if name != "write data" or operations[rank][at - 1] != "write data" or at % 11 == 0
    ]


def killed_at_each_kind_of_operation(operations: list[list[str]]) -> list[dict[str, int]]:
    """Of runs of equal operations, one in the middle; on rank 1 only the writing of data."""
    points = []
    for rank, names in enumerate(operations):
        starts = [at for at, name in enumerate(names) if at == 0 or names[at - 1] != name]
        middles = [(start + end) // 2 for start, end in zip(starts, [*starts[1:], len(names)], strict=True)]
        points += [{"rank": rank, "at": at} for at in middles if rank == 0 or names[at] == "write data"]
    return points


def check_kills(folder: Path, operations: list[list[str]], points: list[dict[str, int]], first: int) -> None:
    old, found = checksum(folder / "attempt-0"), attempts(folder, points, first)
    renamed = operations[0].index("rename attempt-0.incomplete")
    leftovers = []
    for place, (point, attempt) in enumerate(zip(points, found, strict=True), first):
        path, rank = folder / f"attempt-{place}", point["rank"]
        # It was killed, in the middle of the save, and the other rank did not wait for long.
        assert attempt["ended"] == [-9 if other == rank else 0 for other in range(WORLD)], point
        assert attempt["answers"][rank] is None and 0 <= point["at"] < len(operations[rank])
        assert "lost touch with the others" in attempt["answers"][1 - rank]["error"], point
        assert attempt["seconds"] < NO_DEFAULT
        if rank == 0 and point["at"] > renamed:  # all was on the disk, and rank 0 only did not get to say so
            assert_loads(path, place)
        else:
            assert not path.exists()
            assert_incomplete(path)
            leftovers += [place] if unfinished(path) else []
        assert checksum(folder / "attempt-0") == old
    assert leftovers  # some kills leave something to be replaced
    complete = {path.name for path in folder.iterdir() if not path.name.endswith(".incomplete")}
    latest = latest_checkpoint(folder)
    assert latest is not None and latest.name in complete
    # The next save to the same path takes the place of what is left.
    [again] = attempts(folder, [{}], leftovers[-1])
    assert again["ended"] == [0] * WORLD and not again["answers"][0]["error"]
    assert_loads(folder / f"attempt-{leftovers[-1]}", leftovers[-1])
    complete |= {f"attempt-{leftovers[-1]}"}
    assert latest_checkpoint(folder) == folder / max(complete, key=lambda name: int(name.removeprefix("attempt-")))
    # What the killed ones left went with it, all of it.
    assert not [path for path in folder.iterdir() if path.name.endswith(".incomplete")]
    assert not unfinished(folder / f"attempt-{leftovers[-1]}")


@pytest.mark.long
def test_a_save_that_is_killed_leaves_the_checkpoints_before_it(before):
    folder, operations = before
    check_kills(folder, operations, killed_at_each_kind_of_operation(operations), first=1)


@pytest.mark.long
def test_a_save_that_is_killed_at_any_operation_leaves_the_checkpoints_before_it(before):
    folder, operations = before
    points = killed_everywhere(operations)
    assert len(points) > 80
    check_kills(folder, operations, points, first=1000)


@pytest.mark.long
def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_timeout(before):
    folder, operations = before
    for rank in range(WORLD):
        at = operations[rank].index("write data")
        [attempt] = attempts(folder, [{"rank": rank, "at": at, "stop": 1}], 5000 + rank)
        assert attempt["ended"][rank] == -9
        assert "lost touch with the others" in attempt["answers"][1 - rank]["error"]
        assert TIMEOUT <= attempt["seconds"] < NO_DEFAULT
        assert_incomplete(folder / f"attempt-{5000 + rank}")


@pytest.mark.long
def test_a_full_disk_is_one_clear_error_on_every_rank(before):
    """By a limit on the size of files, which the system enforces: in data, in metadata, in the background."""
    folder, _ = before
    old = checksum(folder / "attempt-0")
    largest = {name.stem: name.stat().st_size for name in (folder / "attempt-0").glob("*.distcp")}
    points = [
        {"rank": 1, "bytes": 100},
        {"rank": 1, "bytes": largest["__1_0"] * 3 // 4},
        {"rank": 0, "bytes": largest["__0_0"] // 2, "background": 1},
    ]
    for place, (point, attempt) in enumerate(zip(points, attempts(folder, points, 2000), strict=True), 2000):
        path = folder / f"attempt-{place}"
        assert attempt["ended"] == [0] * WORLD
        for rank, answer in enumerate(attempt["answers"]):
            assert "[Errno 27] File too large" in answer["error"]
            assert "checkpoints that were complete before are untouched" in answer["error"]
            assert (f"rank {point['rank']} failed" in answer["error"]) == (rank != point["rank"])
        assert not path.exists() and not unfinished(path)
        assert checksum(folder / "attempt-0") == old
