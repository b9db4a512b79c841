"""Each save owns its folder and its name: two saves never mix, and what is not there is not said to be saved."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foldpar
from foldpar.checkpoint import dcp as checkpoint_dcp
from foldpar.checkpoint import files as checkpoint_files
from foldpar.checkpoint import load_checkpoint, save_checkpoint
from foldpar.checkpoint.files import begin, discard, publish
from foldpar.checkpoint.manifest import FileRecord, Manifest
from foldpar.errors import CheckpointError
from foldpar.testing import run_ranks


def filled(value: float) -> nn.Module:
    layer = nn.Linear(3, 3)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def value_of(path: Path, groups: foldpar.FoldedGroups) -> tuple[int | None, list[float]]:
    model = filled(0.0)
    info = load_checkpoint(path, model, None, groups, verify=True)
    return info.step, sorted({float(value) for each in model.parameters() for value in each.detach().flatten()})


def manifest(step: int = 0, **files: FileRecord) -> Manifest:
    return Manifest(
        foldpar="0",
        torch="0",
        time=0.0,
        step=step,
        extra=None,
        layout=foldpar.solve_layout(1),
        parameters={},
        buffers={},
        optimizer=None,
        files=files,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- One owner --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_second_save_at_a_name_that_is_being_saved_is_an_error_at_once(tmp_path, groups, monkeypatch, asynchronous):
    """Weights and their average in the background, at one name: the first is what is there."""
    write = checkpoint_dcp.Writing.write
    monkeypatch.setattr(checkpoint_dcp.Writing, "write", lambda *given: (time.sleep(0.3), write(*given))[1])
    path = tmp_path / "step-1"
    pending = save_checkpoint(path, filled(5.0), None, groups, step=1, asynchronous=True)
    assert pending is not None
    with pytest.raises(
        CheckpointError, match=rf"step-1 is being saved already, by .* process {os.getpid()}\. There is"
    ):
        save_checkpoint(path, filled(7.0), None, groups, step=2, asynchronous=asynchronous)
    pending.wait()
    assert value_of(path, groups) == (1, [5.0])
    assert names(tmp_path) == {"step-1"}


def test_another_process_owns_a_name_until_it_dies(tmp_path, groups):
    path = tmp_path / "step-1"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        begin(path)
        os.write(writing, b"begun")
        signal.pause()
        os._exit(1)
    try:
        os.read(reading, 5)
        with pytest.raises(CheckpointError, match=f"step-1 is being saved already, by .* process {child}"):
            save_checkpoint(path, filled(7.0), None, groups, step=2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(names(tmp_path)) == 2  # a folder and a lock, of the dead
    save_checkpoint(path, filled(7.0), None, groups, step=2)
    assert value_of(path, groups) == (2, [7.0]) and names(tmp_path) == {"step-1"}


def no_locks(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


def test_where_files_have_no_locks_tokens_keep_saves_apart(tmp_path, monkeypatch):
    """An old job still writes when the requeued one begins: its folder is gone, and it says so."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    old = begin(tmp_path / "step-1")
    (old.folder / "__0_0.distcp").write_text("old")
    new = begin(tmp_path / "step-1")
    assert old.token != new.token and not old.folder.exists()
    (new.folder / "__0_0.distcp").write_text("new!")
    with pytest.raises(CheckpointError, match="is not the folder that this save made any more: another job or program"):
        publish(old, manifest(**{"__0_0.distcp": FileRecord(3, "", old.token)}))
    discard(old)
    publish(new, manifest(**{"__0_0.distcp": FileRecord(4, "", new.token)}))
    assert (tmp_path / "step-1" / "__0_0.distcp").read_text() == "new!"


def test_the_one_that_comes_last_to_a_name_loses(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    old = begin(tmp_path / "step-1")
    monkeypatch.setattr(checkpoint_files, "_leftovers", lambda path: [])  # as if both had begun at the same time
    new = begin(tmp_path / "step-1")
    publish(new, manifest(2))
    with pytest.raises(CheckpointError, match="step-1 was made by another save or program while this one was writing"):
        publish(old, manifest(1))
    discard(old)
    assert checkpoint_files.read_manifest(tmp_path / "step-1").step == 2


@pytest.mark.parametrize("fault", ["replaced", "strange", "records"])
def test_only_what_this_save_wrote_is_published(tmp_path, fault):
    claim = begin(tmp_path / "step-1")
    (claim.folder / "__0_0.distcp").write_text("mine")
    (claim.folder / ".nfs0001").write_text("of a file that was removed while it was open")
    token = claim.token
    if fault == "replaced":
        claim.folder.rename(tmp_path / "moved")
        claim.folder.mkdir()
        (claim.folder / "__0_0.distcp").write_text("mine")
    elif fault == "strange":
        (claim.folder / "__1_0.distcp").write_text("of another")
    else:
        token = "0" * 12
    with pytest.raises(
        CheckpointError, match=r"another job or program removed|holds __1_0.distcp, which this save did"
    ):
        publish(claim, manifest(**{"__0_0.distcp": FileRecord(4, "", token)}))
    assert not (tmp_path / "step-1").exists()
    discard(claim)
    assert not (tmp_path / "step-1.lock.incomplete").exists()


def test_an_interrupted_save_lets_go_of_its_name(tmp_path, groups, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_dcp._HashingStream, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "step-1", filled(5.0), None, groups, step=1)
    assert not names(tmp_path)
    save_checkpoint(tmp_path / "step-1", filled(5.0), None, groups, step=1)
    assert value_of(tmp_path / "step-1", groups) == (1, [5.0])


# -- Links, mount points and names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step-5.incomplete", "step-5.lock.incomplete", "step-5"])
@pytest.mark.parametrize("target", ["step-4", "nothing"])
def test_a_link_in_the_way_is_refused_and_what_it_leads_to_stays(tmp_path, groups, name, target):
    save_checkpoint(tmp_path / "step-4", filled(4.0), None, groups, step=4)
    (tmp_path / name).symlink_to(tmp_path / target)
    with pytest.raises(
        CheckpointError, match=r"is a link, which no save of foldpar made|exists and is no|is a complete"
    ):
        save_checkpoint(tmp_path / "step-5", filled(5.0), None, groups, step=5)
    assert value_of(tmp_path / "step-4", groups) == (4, [4.0])
    assert names(tmp_path) == {"step-4", name}


def test_a_mount_point_in_the_way_is_refused(tmp_path, groups, monkeypatch):
    leftover = tmp_path / "step-5.incomplete"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_text("of another")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == leftover)
    with pytest.raises(CheckpointError, match=r"step-5\.incomplete is a mount point, which no save of foldpar made"):
        save_checkpoint(tmp_path / "step-5", filled(5.0), None, groups, step=5)
    assert names(leftover) == {"__0_0.distcp"}


def test_a_name_that_would_never_be_loaded_is_refused(tmp_path, groups):
    with pytest.raises(CheckpointError, match=r"a\.incomplete ends in \.incomplete, which marks checkpoints that are"):
        save_checkpoint(tmp_path / "a.incomplete", filled(5.0), None, groups)
    assert not names(tmp_path)


# -- One shared folder ------------------------------------------------------------------------------------------------


def save_on_nodes_of_their_own(folder: Path) -> str:
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        node = folder / f"node-{groups.rank}"
        node.mkdir()
        os.chdir(node)
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_files, "_PATIENCE", 0.1)
            with pytest.raises(CheckpointError) as caught:  # one name on all ranks, and another folder on each
                save_checkpoint("/proc/self/cwd/runs/step-1", nn.Linear(3, 3), None, groups, step=1)
        return str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="the folders are told apart by Linux's /proc")
def test_folders_that_are_not_one_shared_folder_are_an_error_on_every_rank(tmp_path):
    for text in run_ranks(save_on_nodes_of_their_own, 2, tmp_path):
        assert "which rank 0 has made, is not there on " in text
        assert "/proc/self/cwd/runs is not one shared folder: every node has its own" in text
        assert text.endswith("Give a path on a file system that all nodes share.")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or "step" in path.name]


def test_files_that_the_first_rank_does_not_see_whole_are_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_PATIENCE", 0.1)
    claim = begin(tmp_path / "step-1")
    (claim.folder / "__0_0.distcp").write_text("cut")
    records = {name: FileRecord(4, "", claim.token) for name in ("__0_0.distcp", "__1_0.distcp")}
    with pytest.raises(CheckpointError) as caught:
        publish(claim, manifest(**records))
    assert "__0_0.distcp has 3 bytes instead of 4; __1_0.distcp is missing" in str(caught.value)
    assert f"{tmp_path} is not one shared folder" in str(caught.value)
    assert not (tmp_path / "step-1").exists()
