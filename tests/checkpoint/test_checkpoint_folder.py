"""A folder of checkpoints: which is the newest, which are kept, and what dead saves left there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import sealed
from torch import nn

import foldpar
from foldpar.checkpoint import files as checkpoint_files
from foldpar.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from foldpar.checkpoint.files import begin
from foldpar.errors import CheckpointError


def save(path: Path, groups: foldpar.FoldedGroups, **options: Any) -> Path:
    save_checkpoint(path, nn.Linear(2, 2), None, groups, **options)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- The newest -------------------------------------------------------------------------------------------------------


def test_steps_come_before_clocks(tmp_path, groups):
    for step, when in ((10, 300.0), (9, 500.0), (100, 200.0), (None, 900.0)):
        page = save(tmp_path / f"step-{step}", groups, step=step) / "foldpar.json"
        sealed(page, time=when)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100"
    sealed(shutil.copytree(tmp_path / "step-100", tmp_path / "again") / "foldpar.json", time=201.0)
    assert latest_checkpoint(tmp_path) == tmp_path / "again"


def unreadable(path: Path, patch: pytest.MonkeyPatch) -> None:
    """As a directory without rights is for anyone but root."""
    stat = os.stat

    def denied(name: Any, *args: Any, **options: Any) -> os.stat_result:
        if Path(os.fspath(name)).parent == path:
            raise PermissionError(13, "Permission denied", str(name))
        return stat(name, *args, **options)

    patch.setattr(os, "stat", denied)


def a_fifo(path: Path, _: pytest.MonkeyPatch) -> None:
    (path / "foldpar.json").unlink()
    os.mkfifo(path / "foldpar.json")


def page_of(text: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda path, _: (path / "foldpar.json").write_text(text) and None


def sealed_with(**values: Any) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda path, _: sealed(path / "foldpar.json", **values)


@pytest.mark.parametrize(
    "spoil",
    [
        unreadable,
        a_fifo,
        page_of(""),
        page_of("[]"),
        page_of("null"),
        page_of("[" * 100_000),
        page_of('{"format": 1, "sha256": 1e999}'),
        sealed_with(time="now"),
        sealed_with(time=None),
        sealed_with(step="9"),
        sealed_with(step=[9]),
        sealed_with(files={"__0_0.distcp": 7}),
        sealed_with(files=[]),
        sealed_with(layout=[1]),
        sealed_with(parameters={"weight": {"shape": 3}}),
    ],
    ids=lambda spoil: getattr(spoil, "__qualname__", ""),
)
def test_what_cannot_be_read_is_passed_over(tmp_path, groups, monkeypatch, spoil):
    older = save(tmp_path / "step-8", groups, step=8)
    spoil(save(tmp_path / "step-9", groups, step=9), monkeypatch)
    (tmp_path / "notes").write_text("a file")
    (tmp_path / "link").symlink_to("nowhere")
    assert latest_checkpoint(tmp_path) == older


def test_a_folder_that_cannot_be_read_is_an_error_and_one_that_is_not_there_is_not(tmp_path, monkeypatch):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "file").write_text("")
    assert latest_checkpoint(tmp_path / "file") is None

    def denied(_: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match=r"cannot be read .* so it is not known whether it holds a checkpoint"):
        latest_checkpoint(tmp_path)


def test_the_documented_line_starts_fresh_where_there_is_nothing(tmp_path, groups):
    torch.manual_seed(3)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before, numbers = model.weight.detach().clone(), torch.get_rng_state()
    info = load_checkpoint(latest_checkpoint(tmp_path), model, optimizer, groups)
    assert (info.path, info.step, info.extra, info.layout) == (None, 0, None, groups.layout)
    assert info.random_state == "nothing loaded" and info.optimizer is None
    assert torch.equal(before, model.weight) and not optimizer.state and torch.equal(numbers, torch.get_rng_state())
    save_checkpoint(tmp_path / "step-1", model, optimizer, groups, step=info.step + 1)
    assert load_checkpoint(latest_checkpoint(tmp_path), model, optimizer, groups).step == 1


# -- Those that are kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_are_kept_and_nothing_else_is_touched(tmp_path, groups, asynchronous):
    save(tmp_path / "best-1", groups, step=1)
    (tmp_path / "step-000").mkdir()
    (save(tmp_path / "step-1", groups, step=1) / "tokenizer.json").write_text("mine")
    save(tmp_path / "elsewhere-2", groups, step=2)
    (tmp_path / "step-2").symlink_to(tmp_path / "elsewhere-2")
    others = names(tmp_path)
    for step in (8, 9, 10, 11):
        pending = save_checkpoint(
            tmp_path / f"step-{step}", nn.Linear(2, 2), None, groups, step=step, keep=3, asynchronous=asynchronous
        )
        if pending is not None:
            pending.wait()
    assert names(tmp_path) == {*others, "step-9", "step-10", "step-11"}
    # Gone back to step 8: what was saved last stays, whatever its step.
    save(tmp_path / "step-8", groups, step=8, keep=1)
    assert names(tmp_path) == {*others, "step-8"}


def test_a_removal_that_is_killed_leaves_a_leftover_which_the_next_save_removes(tmp_path, groups, monkeypatch):
    save(tmp_path / "step-1", groups, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "_remove", lambda folder: os.unlink(folder / "foldpar.json"))
        save(tmp_path / "step-2", groups, step=2, keep=1)
    assert len(names(tmp_path)) == 2 and latest_checkpoint(tmp_path) == tmp_path / "step-2"
    save(tmp_path / "step-3", groups, step=3, keep=1)
    assert names(tmp_path) == {"step-3"}


def test_a_removal_that_fails_is_a_warning(tmp_path, groups, monkeypatch):
    save(tmp_path / "step-1", groups, step=1)

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_files, "_remove", denied)
    with pytest.warns(UserWarning, match="step-2 is saved, but older files beside it were not removed: .*denied"):
        save(tmp_path / "step-2", groups, step=2, keep=1)


@pytest.mark.parametrize("keep", [0, -1, True, 1.5])
def test_numbers_that_cannot_be_kept(tmp_path, groups, keep):
    with pytest.raises(ValueError, match=r"keep = .* must be 1 or more, the checkpoints to keep"):
        save(tmp_path / "step-1", groups, keep=keep)
    with pytest.raises(CheckpointError, match=r"last has none: give it one, such as last-7\."):
        save(tmp_path / "last", groups, step=7, keep=1)
    assert not names(tmp_path)


# -- What dead saves left ---------------------------------------------------------------------------------------------


def killed_saves(folder: Path, steps: range) -> None:
    """Saves whose process was killed when some of their data was there."""
    child = os.fork()
    if child == 0:
        for step in steps:
            claim = begin(folder / f"step-{step}")
            (claim.folder / "__0_0.distcp").write_text("much")
            (claim.folder / ".nfs0001").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(folder.glob("step-*.incomplete"))) == 2 * len(steps)


def test_leftovers_of_dead_saves_go_and_those_that_live_stay(tmp_path, groups):
    tmp_path.joinpath("notes.incomplete").mkdir()
    killed_saves(tmp_path, range(14))
    alive = begin(tmp_path / "step-99")
    shutil.copytree(alive.folder, tmp_path / "step-98.0123456789ab.incomplete")
    (tmp_path / "step-98.0123456789ab.incomplete" / "mine.txt").write_text("no save wrote this")
    save(tmp_path / "step-100", groups, step=100)
    data = [path for path in tmp_path.rglob("__0_0.distcp") if "step-100" not in str(path)]
    assert not data
    left = {name for name in names(tmp_path) if not any((tmp_path / name).glob(".nfs*"))}
    assert left == {
        "notes.incomplete",
        "step-98.0123456789ab.incomplete",
        "step-99.lock.incomplete",
        alive.folder.name,
        "step-100",
    }


def test_a_save_of_another_node_is_dead_when_nothing_has_changed_for_long(tmp_path, groups):
    killed_saves(tmp_path, range(1))
    lock, [folder] = tmp_path / "step-0.lock.incomplete", list(tmp_path.glob("step-0.????????????.incomplete"))
    (folder / ".nfs0001").unlink()
    lock.write_text("another-node process 1")
    save(tmp_path / "step-1", groups)
    assert folder.exists()
    lock.write_text("another-node process 1")
    os.utime(folder, (time.time() - 4000,) * 2)
    save(tmp_path / "step-2", groups)
    assert names(tmp_path) == {"step-1", "step-2"}


def test_what_nfs_keeps_is_not_in_the_way_of_a_save(tmp_path, groups):
    killed_saves(tmp_path, range(1))
    save(tmp_path / "step-0", groups, step=0)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-0"
    assert json.loads((tmp_path / "step-0" / "foldpar.json").read_text())["step"] == 0
