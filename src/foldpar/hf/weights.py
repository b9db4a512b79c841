"""``save_weights``, ``load_weights`` and ``whole_state_dict``: a folded model under the names of one process.

folded over any ranks  --save_weights-->      the safetensors file that one process would write
                       --whole_state_dict-->  the ``state_dict()`` that one process has
either                 --load_weights, load_state_dict-->  a model in any layout, or in one process
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from foldpar.arguments import expect, expect_sizes
from foldpar.comm import FoldedGroups, Ranks, communication_device
from foldpar.errors import ArgumentError, CheckpointError
from foldpar.hf.names import Laid, Overlap, as_they_are, overlaps
from foldpar.hf.reader import ImportReport, fill
from foldpar.hf.weight_files import (
    BUFFER_BYTES,
    SHARD_BYTES,
    ExportReport,
    Given,
    WholeTensor,
    of_the_world,
    put_together,
    write_files,
)
from foldpar.parameters import held_tensors, plain_name
from foldpar.requirements import require_safetensors

__all__ = ["load_weights", "save_weights", "whole_state_dict"]

_SUFFIX = ".safetensors"


def save_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    groups: FoldedGroups,
    *,
    max_shard_bytes: int | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> ExportReport:
    """Write the parameters and persistent buffers of a folded model whole, as one process would.

    Names, shapes, dtypes and every bit are those of the same model in one process, whatever the layout and the stage
    of :func:`~foldpar.shard_model`. So that process loads them with torch alone, and any layout with
    :func:`load_weights`::

        foldpar.save_weights("runs/final.safetensors", model, groups)             # on every rank
        model.load_state_dict(safetensors.torch.load_file("runs/final.safetensors"))       # anywhere, later

    No rank holds more than its share and a buffer. A tied parameter is stored under each of its names, so that
    nothing is missing. For a model of transformers, :func:`foldpar.hf.export` writes what ``from_pretrained`` reads.

    Args:
        path: ends in ``.safetensors``: that one file. Else a folder, with files as the hub lays them out. The same,
            shared place on all ranks.
        max_shard_bytes: of a folder, how large a file may be, 5 GB by default; a single tensor may be larger.
        buffer_bytes: how much is assembled at a time, on every rank, where it communicates.

    Raises:
        CheckpointError: weights are there already, the model's ``state_dict`` has more than parameters and buffers,
            parts of tensors have no owner, tensors are on the meta device or of a dtype that the format does not know,
            or the disk failed. FamilyError: see :func:`foldpar.parameter_families`. ArgumentError, ShapeError: wrong
            arguments. All on every rank, before anything is written, but for a disk that fails.
    """
    _expect("save_weights", path, model, groups)
    path = Path(path)
    expect_sizes("save_weights", buffer_bytes=buffer_bytes)
    if path.suffix == _SUFFIX and max_shard_bytes is not None:
        raise ArgumentError(
            f"save_weights: {path} is one file, and max_shard_bytes = {max_shard_bytes!r} asks for several. Give a "
            f"folder, a path that does not end in {_SUFFIX}, or leave max_shard_bytes out."
        )
    limit = None if path.suffix == _SUFFIX else SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    if limit is not None:
        expect_sizes("save_weights", max_shard_bytes=limit)
    ranks = Ranks.of(groups, f"saving the weights in {path}")
    given = of_the_world(ranks.together(lambda: _given(model, groups)), ranks, groups.layout.pp)
    return write_files(path, given, groups, ranks, max_shard_bytes=limit, buffer_bytes=buffer_bytes)


def load_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    groups: FoldedGroups,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> ImportReport:
    """Fill a model in any layout from what :func:`save_weights` wrote, or one process with safetensors.

    Each rank reads only the slices that make up its share, straight into place, before or after
    :func:`~foldpar.shard_model`. Tensors on the meta device get memory one by one. Call it on every rank.

    Args:
        path: a file that ends in ``.safetensors``, or a folder of them.
        strict: raise if the files hold tensors that are not in the model, or lack some that are; with ``False`` those
            that are missing keep their values. A tied parameter needs one of its names only.
        device: where meta tensors get their memory; by default where the ranks communicate.

    Raises:
        CheckpointError: no files or damaged ones; tensors that are missing, not known or of another shape, all in one
            error. ImportError: safetensors is not installed. ModelError: a buffer on the meta device cannot be
            computed. All on every rank, before anything is touched, but for a file that cannot be read after its
            header could.
    """
    _expect("load_weights", path, model, groups)
    require_safetensors(f"loading {path}")
    path = Path(path)
    folder, file = (path.parent, path.name) if path.suffix == _SUFFIX else (path, None)
    return fill(model, folder, groups, strict=strict, device=device, names=as_they_are, file=file)


@torch.no_grad()
def whole_state_dict(
    model: nn.Module, groups: FoldedGroups, *, on: Literal["rank 0", "every rank"] = "rank 0"
) -> dict[str, Tensor]:
    """The ``state_dict()`` that the model has in one process: whole tensors on the CPU, copies, by name.

    Call it on every rank; those that were not asked for get an empty dict, and never hold more than their share and a
    buffer. ``load_state_dict`` takes it in one process, and on every rank of a model in any layout that
    :func:`~foldpar.fold_model` or :func:`~foldpar.shard_model` has made. (A layer that torch's ``parallelize_module``
    alone has made takes no whole tensors; :func:`load_weights` fills it.) A tied parameter is one tensor under all its
    names, as it is there::

        whole = foldpar.whole_state_dict(model, groups)
        if groups.rank == 0:
            torch.save(whole, "final.pt")

    Raises:
        CheckpointError: as :func:`save_weights`. ArgumentError: ``on`` is something else.
    """
    expect("whole_state_dict", model=(model, nn.Module), groups=(groups, FoldedGroups))
    if on not in ("rank 0", "every rank"):
        raise ArgumentError(f"whole_state_dict: on = {on!r} is unknown. It can be 'rank 0' or 'every rank'.")
    ranks = Ranks.of(groups, "putting the state dict together")
    mine = ranks.together(lambda: _given(model, groups))
    given = of_the_world(mine, ranks, groups.layout.pp)
    wanted = on == "every rank" or groups.rank == 0
    whole = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in given.tensors.items() if wanted}
    for name, box, values in put_together(given, groups):
        if wanted:
            whole[name][tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))] = values
    for names in ranks.all_gather(_tied(model)) if groups.layout.pp > 1 else [_tied(model)]:
        for name, first in names.items():
            if wanted:
                whole[name] = whole[first]
    return whole


def _expect(what: str, path: object, model: object, groups: object) -> None:
    expect(what, path=(path, (str, os.PathLike)), model=(model, nn.Module), groups=(groups, FoldedGroups))


def _given(model: nn.Module, groups: FoldedGroups) -> Given:
    """All tensors under the model's own names, in its order."""
    held = held_tensors(model, groups)
    by_name = {name: each for each in held.values() for name in (each.name, *each.aliases)}
    keys = [plain_name(key) for key in model.state_dict()]
    _check_nothing_else(keys, set(by_name))
    tensors, gives = {}, dict[str, tuple[tuple[Tensor, Overlap], ...]]()
    for name in keys:
        each = by_name[name]
        if each.tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no values to save. Load some first.")
        tensor, shape = each.local(each.tensor).detach(), each.share.shape
        tensors[name] = WholeTensor(name, shape, tensor.dtype)
        if each.first:
            gives[name] = tuple((tensor, overlap) for overlap in overlaps(each.share, Laid.stored(name, shape)))
    device = communication_device(next(iter(held.values())).tensor) if held else torch.device("cpu")
    return Given(tensors, gives, device)


def _check_nothing_else(keys: list[str], known: set[str]) -> None:
    more, less = [key for key in keys if key not in known], sorted(known - set(keys))
    if more or less:
        what = f"{more[0]}, which is no parameter and no buffer" if more else f"no {less[0]}"
        raise CheckpointError(
            f"The model's state_dict() has {what}: extra state, or a hook that renames. What one process would have "
            f"there cannot be told from the ranks' parts. Save such a model with foldpar.save_checkpoint, and its "
            f"extra state with extra=...; nothing was written."
        )


def _tied(model: nn.Module) -> dict[str, str]:
    """Every further name of a tensor -> its first."""
    first: dict[int, str] = {}
    names = dict[str, str]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), plain_name(name)) != plain_name(name):
            names[plain_name(name)] = first[id(tensor)]
    return names
