"""A save in the background ends well, or somebody is told: whoever waits, the next save, the groups, or the exit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import pytest
import torch
from torch import nn

import foldpar
from foldpar.checkpoint import dcp as checkpoint_dcp
from foldpar.checkpoint import latest_checkpoint, save_checkpoint
from foldpar.errors import CheckpointError
from foldpar.testing import live_groups, run_ranks

SOLVED = foldpar.solve_layout(2)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(30, 30)


def slow(patch: pytest.MonkeyPatch, seconds: float = 0.3) -> None:
    write = checkpoint_dcp.Writing.write
    patch.setattr(checkpoint_dcp.Writing, "write", lambda *given: (time.sleep(seconds), write(*given))[1])


def forgotten(folder: Path) -> list[str]:
    """What every end of the groups says about saves that nobody waited for."""
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        slow(patch)
        with foldpar.create_groups(SOLVED) as groups:
            save_checkpoint(folder / "step-1", model(), None, groups, step=1, asynchronous=True)
        with pytest.raises(ZeroDivisionError), foldpar.create_groups(SOLVED) as groups:  # noqa: PT012
            save_checkpoint(folder / "step-2", model(), None, groups, step=2, asynchronous=True)
            raise ZeroDivisionError
        with cases.broken_writes(groups.rank == 1, after=100):
            groups = foldpar.create_groups(SOLVED)
            save_checkpoint(folder / "broken", model(), None, groups, asynchronous=True)
            with pytest.raises(CheckpointError) as caught:
                groups.destroy()
            texts.append(str(caught.value))
            groups.destroy()
            with pytest.warns(RuntimeWarning) as warned, pytest.raises(ZeroDivisionError):  # noqa: PT012, PT031, SIM117
                with foldpar.create_groups(SOLVED) as groups:
                    save_checkpoint(folder / "broken", model(), None, groups, asynchronous=True)
                    raise ZeroDivisionError
            texts.append(str(warned[0].message))
        assert not live_groups()
    return texts


def test_the_groups_wait_for_it_and_report_it(tmp_path):
    for texts in run_ranks(forgotten, 2, tmp_path, groups_left="error"):
        for text in texts:
            assert text.startswith("The save before this one, in the background, failed. ")
            assert "No space left on device" in text
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step-2"


def of_another_model(folder: Path) -> list[str]:
    with foldpar.create_groups(SOLVED) as groups:
        first, second = model(1), model(2)
        with cases.broken_writes(groups.rank == 1, after=100):
            broken = save_checkpoint(folder / "average", second, None, groups, asynchronous=True)
            assert broken is not None
            broken._thread.join()
        with pytest.raises(CheckpointError) as caught:  # noqa: PT012
            if groups.rank == 0:
                broken.wait()  # only this rank has been told: the next save tells the other, and both stay in step
            else:
                save_checkpoint(folder / "step-1", first, None, groups, step=1)
        text = str(caught.value)
        if groups.rank == 0:
            with pytest.raises(CheckpointError):
                save_checkpoint(folder / "step-1", first, None, groups, step=1)
        save_checkpoint(folder / "step-1", first, None, groups, step=1)
        return [text]


def test_the_next_save_of_any_model_tells_every_rank(tmp_path):
    for [text] in run_ranks(of_another_model, 2, tmp_path):
        assert "No space left on device" in text
    assert {path.name for path in tmp_path.iterdir()} == {"step-1"}


def two_at_once(folder: Path) -> bool:
    """Weights and their average, in the background at the same time: nothing is written before both were begun."""
    both, write = threading.Event(), checkpoint_dcp.Writing.write

    def when_both_are_begun(*given: Any) -> Any:
        assert both.wait(60), "one waits for the other"
        return write(*given)

    with foldpar.create_groups(SOLVED) as groups, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_dcp.Writing, "write", when_both_are_begun)
        saves = [
            save_checkpoint(folder / str(seed), model(seed), None, groups, step=seed, asynchronous=True)
            for seed in (1, 2)
        ]
        both.set()
        for save in saves:
            assert save is not None
            save.wait()
        return True


def test_saves_of_two_models_do_not_wait_for_each_other(tmp_path):
    assert all(run_ranks(two_at_once, 2, tmp_path))
    assert latest_checkpoint(tmp_path) == tmp_path / "2"


def ended_by_exit(folder: Path) -> None:
    raise SystemExit(3)


def test_a_thread_that_is_ended_is_an_error(tmp_path, monkeypatch):
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        monkeypatch.setattr(checkpoint_dcp.Writing, "write", lambda *_: ended_by_exit(tmp_path))
        pending = save_checkpoint(tmp_path / "step-1", model(), None, groups, asynchronous=True)
        assert pending is not None
        with pytest.raises(CheckpointError, match="The save was ended by SystemExit: 3"):
            pending.wait()
    assert not list(tmp_path.iterdir())


EXIT = """
import sys, time, torch, foldpar
from foldpar.checkpoint import dcp
folder, world = sys.argv[1], int(sys.argv[2])
write = dcp.Writing.write
def slow(writing, *given):
    time.sleep(0.3)
    if "broken" in str(writing._folder):
        raise OSError(28, "No space left on device")
    return write(writing, *given)
dcp.Writing.write = slow
def save(name):
    foldpar.save_checkpoint(f"{folder}/{name}", torch.nn.Linear(30, 30), None, groups, step=1, asynchronous=True)
groups = foldpar.create_groups(foldpar.solve_layout(world), backend="gloo")
torch.manual_seed(0)
if world == 1:
    save("step-1"), save("broken")
    raise ValueError("training failed")
with groups:
    save("step-1")
"""


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_interpreter_does_not_exit_without_it(tmp_path, world):
    script = tmp_path / "script.py"
    script.write_text(EXIT)
    folder = tmp_path / "runs"
    run = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [sys.executable, *run, str(script), str(folder), str(world)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode == 0) == (world == 2), done.stderr
    assert latest_checkpoint(folder) == folder / "step-1", done.stderr
    assert {path.name for path in folder.iterdir()} == {"step-1"}
    if world == 1:
        assert "ValueError: training failed" in done.stderr
        assert "RuntimeWarning: The save before this one, in the background, failed." in done.stderr
        assert "No space left on device" in done.stderr
