"""Files from strangers: nothing runs, nothing outside of the folder is read, nothing is without an end."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import refused, resealed, sealed
from checkpoint_killer import trained
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.optim import lr_scheduler

import foldpar
from foldpar.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from foldpar.checkpoint.manifest import Manifest
from foldpar.checkpoint.metadata import read_metadata
from foldpar.errors import CheckpointError
from foldpar.hf.files import read_folder

OLD = Path(__file__).parent / "data" / "checkpoint-before-dtensors"


def paced(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Schedulers of several kinds, one inside of another."""
    warm = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    pieces = lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.MultiStepLR(optimizer, [2, 4])], [2])
    return [pieces, lr_scheduler.ReduceLROnPlateau(optimizer)]


@pytest.fixture
def saved(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "step-9"))


def reseal(path: Path) -> None:
    """Sizes and sums as they are now, as an attacker would write them."""
    page = json.loads((path / "foldpar.json").read_text())
    for name, record in page["files"].items():
        data = (path / name).read_bytes()
        record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    sealed(path / "foldpar.json", files=page["files"])


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
    reseal(path)


# -- Pickles ----------------------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, *calls: Any) -> None:
        self.calls = calls

    def __reduce__(self) -> Any:
        return self.calls


def wrapped(value: Any) -> Callable[[Any], Any]:
    def change(metadata: Any) -> None:
        metadata.planner_data = value

    return change


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    "attack",
    [
        lambda target: Runs(os.system, (f"touch {target}",)),
        lambda target: Runs(eval, (f"open({str(target)!r}, 'w')",)),
        lambda target: Runs(getattr, (Path, "touch")),
        lambda target: Runs(torch.load, (str(target),)),
        lambda target: Runs(torch.hub.load, (str(target), "x")),
        lambda target: Runs(Path, (str(target),), {"_drv": "x"}),
    ],
    ids=["system", "eval", "getattr", "load", "hub", "state"],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(saved, groups, tmp_path, attack, inside, verify):
    target = tmp_path / "ran"
    rewrite(saved, wrapped(attack(target)) if inside else lambda _: attack(target))
    text = refused(saved, *trained(groups, 0), groups, verify=verify)
    assert "is damaged: .metadata is not what a save writes (UnpicklingError: it " in text
    assert not target.exists()


def nested_key() -> bytes:
    """Its hash takes 2**60 steps."""
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    return pickle.dumps(nested)[:-1].replace(b"\x80\x04", b"", 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"\x80\x04N.",
        b"\x80\x04]r\xff\xff\xff\xff.",  # a memo of 64 GiB, to the unpickler in C
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 8 EiB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04}" + nested_key() + b"K\x01s.",
        b"\x80\x04\x8f(" + nested_key() + b"\x90.",
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nStorageMeta\nN}\x8c\x01xK\x01s\x86b.",  # changes the class
        b"\x80\x04ctorch.serialization\n_get_layout\n}\x8c\x01xK\x01sb.",  # changes the function
        b"\x80\x04P1\n.",
        b"\x80\x04\x82\x01.",
        b"(" * 100_000 + b".",
        b"\x80\x04" + b"(" * 1000 + b"t" * 1000 + b".",
        b"I" + b"9" * 100_000 + b"\n.",
    ],
    ids=lambda data: hashlib.sha256(data).hexdigest()[:6],
)
def test_bytes_that_are_a_bomb_end_soon_in_one_clear_error(data):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"\.metadata is not what a save writes"):
        read_metadata(data, {})
    assert time.monotonic() - start < 5
    assert not hasattr(torch.distributed.checkpoint.metadata.StorageMeta, "x")
    assert not hasattr(torch.serialization._get_layout, "x")


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_metadata_with_any_bytes_changed_is_read_or_refused(seed, count):
    manifest = Manifest.from_bytes((OLD / "foldpar.json").read_bytes(), "here")
    data, drawn = bytearray((OLD / ".metadata").read_bytes()), random.Random(seed)
    for _ in range(count):
        data[drawn.randrange(len(data))] = drawn.randrange(256)
    with suppress(ValueError):  # and nothing else
        read_metadata(bytes(data), manifest.files)


def first_place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def first_tensor(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.dense.weight"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda of: setattr(first_place(of), "relative_path", "../../secret"),
            "is in '../../secret', none of its files",
        ),
        (lambda of: setattr(first_place(of), "relative_path", "/etc/passwd"), "is in '/etc/passwd', none of its files"),
        (lambda of: setattr(first_place(of), "relative_path", ["x"]), "unhashable"),
        (lambda of: setattr(first_place(of), "offset", -1), "has a place that is no number"),
        (lambda of: setattr(first_place(of), "length", 2**60), "ends behind its file"),
        (lambda of: setattr(first_place(of), "length", "1"), "has a place that is no number"),
        (lambda of: setattr(first_place(of), "transform_descriptors", ["zstd"]), "is transformed"),
        (lambda of: setattr(first_tensor(of), "size", "large"), "model.dense.weight is no tensor"),
        (lambda of: setattr(first_tensor(of), "size", torch.Size([2**40, 2**40])), "do not make it up"),
        (lambda of: setattr(first_tensor(of), "chunks", None), "model.dense.weight is no tensor"),
        (lambda of: first_tensor(of).chunks.append(7), "has a piece of another kind"),
        (lambda of: setattr(of, "storage_data", None), "it lacks a dictionary"),
        (lambda of: of.storage_data.clear(), "it says nowhere where "),
        (lambda of: setattr(of.storage_meta, "save_id", "0" * 12), "it is of another save than the other files"),
        (lambda of: of.state_dict_metadata.pop("model.dense.weight") and None, "it does not hold model.dense.weight"),
    ],
)
def test_metadata_that_says_what_cannot_be_is_refused_before_anything_is_loaded(saved, groups, change, text):
    rewrite(saved, change)
    found = refused(saved, *trained(groups, 0), groups)
    assert f"{saved} is damaged: " in found or "Reading" in found
    assert text in found


# -- Pages ------------------------------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def test_a_sealed_page_with_a_field_of_any_wrong_kind_is_refused_or_loads(saved, groups, original):
    """One field at a time, each in the place of every other kind: nothing but a CheckpointError comes out."""
    page = json.loads((original / "foldpar.json").read_text())
    page.pop("sha256")
    drawn = random.Random(0)
    model, optimizer = trained(groups, 0)
    found = set()
    for path in [path for path in leaves(page) if path and path[0] not in ("extra", "format")]:
        wrong = drawn.choice([None, True, -1, 2**70, 1.5, "x", [], {}, [1], {"x": 1}, ["a"], float("nan")])
        changed = copy.deepcopy(page)
        target = changed
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = wrong
        sealed(saved / "foldpar.json", **changed)
        try:
            load_checkpoint(saved, model, optimizer, groups)
        except CheckpointError as error:
            found.add(str(error).partition(": ")[0])
    assert found


@pytest.fixture(scope="module")
def full_page(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A page with something in every field."""
    path = tmp_path_factory.mktemp("full") / "step-9"
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        model, optimizer = trained(groups, 1)
        extra = {"place": (1, {2, 3}), "of": [b"x", 1 + 2j, {4: None}], "deep": OrderedDict(a=Counter("aab"))}
        save_checkpoint(path, model, optimizer, groups, step=9, extra=extra, schedulers=paced(optimizer))
    return path, json.loads((path / "foldpar.json").read_text())


KINDS = [None, True, -1, 0, 2**70, 1.5, "x", "", [], {}, [1], {"x": 1}, ["a"], [[]], [None], {"foldpar": 1}, "float64"]


@given(seed=st.integers(0, 2**32), count=st.integers(1, 3))
@settings(max_examples=80, deadline=None, database=None, derandomize=True)
def test_a_sealed_page_with_any_changes_is_refused_in_our_words_or_loads(full_page, seed, count):
    """Fields of another kind, taken away, doubled or under another name, in schedulers and extra too."""
    path, page = full_page
    drawn, changed = random.Random(seed), copy.deepcopy(page)
    # Half of the changes go to the few small parts, which would seldom be drawn.
    parts = ["schedulers", "extra", "step", "layout", "optimizer", "files", "parameters", "time", "foldpar"]
    for _ in range(count):
        part = drawn.choice(parts)
        places = [place for place in leaves(changed) if place and (drawn.random() < 0.02 or place[0] == part)]
        *way, last = drawn.choice(places or [("step",)])
        target = changed
        for key in way:
            target = target[key]
        what = drawn.randrange(5)
        if what == 0:
            del target[last]
        elif what == 1 and isinstance(target, dict):
            target[drawn.choice(["x", "../x", ""])] = target.pop(last)
        elif what == 2 and isinstance(target, list):
            target.append(copy.deepcopy(target[last]))
        else:
            target[last] = copy.deepcopy(drawn.choice(KINDS))
    try:
        resealed(path / "foldpar.json", changed)
        latest_checkpoint(path.parent)
        with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
            model, optimizer = trained(groups, 0)
            schedulers = paced(optimizer)
            with suppress(CheckpointError):
                load_checkpoint(path, model, optimizer, groups, schedulers=schedulers)
    finally:
        resealed(path / "foldpar.json", page)


def test_schedulers_of_a_wrong_kind_are_refused_before_anything_is_loaded(full_page, tmp_path, groups):
    path, page = full_page
    saved = Path(shutil.copytree(path, tmp_path / "step-9"))
    for change, text in [
        ({"last_epoch": "x"}, r"schedulers\[0\]\['last_epoch'\] is 'x' in the checkpoint, which is of another kind"),
        ({"_milestones": {"x": 1}}, r"schedulers\[0\]\['_milestones'\] is .* which is of another kind"),
        ({"_schedulers": []}, r"schedulers\[0\]\['_schedulers'\] has 0 elements in the checkpoint and 2 here"),
        ({"_schedulers": None}, r"schedulers\[0\]\['_schedulers'\] is None in the checkpoint"),
    ]:
        changed = copy.deepcopy(page)
        changed["schedulers"][0]["states"][0].update(change)
        resealed(saved / "foldpar.json", changed)
        model, optimizer = trained(groups, 0)
        assert re.search(text, refused(saved, model, optimizer, groups, schedulers=paced(optimizer)))


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "a/b", "..", "", "a\\b", "a\0b"])
def test_a_page_names_files_of_its_own_folder_only(saved, groups, name):
    page = json.loads((saved / "foldpar.json").read_text())
    record = next(iter(page["files"].values()))
    sealed(saved / "foldpar.json", files={**page["files"], name: record})
    text = refused(saved, *trained(groups, 0), groups)
    assert "is no plain name of a file in this folder" in text


# -- What is no file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["foldpar.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link", "folder"])
def test_what_is_no_file_of_the_folder_is_refused_at_once(saved, groups, tmp_path, name, kind):
    (saved / name).rename(tmp_path / "moved")
    if kind == "fifo":
        os.mkfifo(saved / name)
    elif kind == "device":
        (saved / name).symlink_to("/dev/zero")
    elif kind == "link":
        (saved / name).symlink_to(tmp_path / "moved")
    else:
        (saved / name).mkdir()
    text = refused(saved, *trained(groups, 0), groups)
    assert f"{name} is {'a link that leads out of' if kind in ('device', 'link') else 'no regular file'}" in text


def test_a_page_too_large_to_be_read_is_refused(saved, groups):
    with open(saved / "foldpar.json", "ab") as file:
        file.truncate(2**40)
    assert "foldpar.json has 1099511627776 bytes, more than" in refused(saved, *trained(groups, 0), groups)


def test_a_tensor_that_is_packed_is_not_unpacked(saved, groups):
    place = first_place(pickle.loads((saved / ".metadata").read_bytes()))
    file = saved / place.relative_path
    data = file.read_bytes()
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data[place.offset : place.offset + place.length])) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for each in old.infolist():
            new.writestr(each.filename, old.read(each))
    at = len(data)
    file.write_bytes(data + packed.getvalue())

    def moved(metadata: Any) -> None:
        place = first_place(metadata)
        place.offset, place.length = at, len(packed.getvalue())

    rewrite(saved, moved)
    assert "is packed, as no save writes it" in refused(saved, *trained(groups, 0), groups, staged=True)


def test_a_random_state_that_is_none_is_an_error_of_ours(saved, groups, monkeypatch):
    monkeypatch.setattr(random, "setstate", lambda _: (_ for _ in ()).throw(TypeError("an integer is required")))
    with pytest.raises(CheckpointError, match=r"random state of this rank in it is damaged \(an integer is required\)"):
        load_checkpoint(saved, *trained(groups, 0), groups)


# -- Hugging Face's files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.safetensors", "a/../../secret.safetensors", "{outside}", "..\\secret", ""])
def test_an_index_leads_to_nothing_outside_of_its_folder(tmp_path, monkeypatch, name):
    save_file({"x": torch.zeros(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    name = name.format(outside=tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="which is not in its folder: an index leads to files beside it"):
        read_folder(folder)


def test_an_index_may_lead_through_links_as_in_the_hubs_cache(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "blob")
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "model-1.safetensors").symlink_to(tmp_path / "blob")
    os.mkfifo(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "part/model-1.safetensors"}}))
    assert read_folder(folder).tensors["x"].shape == (2,)
    for damaged in ("[]", "[" * 100_000, '{"weight_map": 3}'):
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            read_folder(folder)
