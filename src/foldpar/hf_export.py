"""``export``: a folded model as Hugging Face's files, a bounded buffer at a time.

    every rank: names, boxes, which bytes go where in which file      (integers, no tensors)
    for each chunk of a file:  own blocks into a buffer of zeros -> sum over all ranks -> one rank appends it

Values are summed as integers, and all ranks but one add zeros, so every bit arrives as it is.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldpar.boxes import Box, pieces
from foldpar.checkpoint_ranks import Ranks, attempt, raise_interruption
from foldpar.collectives import all_reduce_
from foldpar.dtensors import communication_device
from foldpar.errors import CheckpointError
from foldpar.groups import FoldedGroups
from foldpar.hf_files import INDEX, append, begin_file, sync
from foldpar.hf_names import Overlap, hub_shapes, is_transformers_model, lay_out, natural, overlaps, plain_class
from foldpar.hf_tensors import held_tensors

__all__ = ["ExportReport", "export"]

_BUFFER_BYTES = 64 * 2**20
_UNFINISHED = ".incomplete"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: the names of the files, and how many tensors and bytes of tensors are in them."""

    files: tuple[str, ...]
    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.bytes:,} bytes in {len(self.files)} file(s)"


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    groups: FoldedGroups,
    *,
    max_shard_bytes: int = 5 * 10**9,
    buffer_bytes: int = _BUFFER_BYTES,
) -> ExportReport:
    """Write a folded model to a folder that transformers, and whatever reads the hub's files, can load.

    Tensors have the names, shapes and dtypes that ``save_pretrained`` would give them: a tensor per expert where the
    family's files on the hub are like that. ``config.json`` comes with them; a tokenizer does not. No rank holds more
    than its share and a buffer. Call it on every rank; the folder must be the same, shared one on all of them, and the
    files are written by all ranks in turn. Sharding by :func:`foldpar.shard_model` may be on or off::

        foldpar.hf.export(model, "runs/final", groups)
        model = AutoModelForCausalLM.from_pretrained("runs/final")

    Files get their names when all are complete, the index last. An export that fails removes what it wrote.

    Args:
        max_shard_bytes: how large a file may be; a single tensor may be larger.
        buffer_bytes: how much is assembled at a time, on every rank, where it communicates.

    Raises:
        CheckpointError: the folder holds weights already, parts of tensors have no owner, tensors are on the meta
            device or of a dtype that the format does not know, or the disk failed. ModelError, FamilyError: as
            :func:`foldpar.hf.import_`. All on every rank, before anything is written, but for a disk that fails.

    Source: safetensors' format; transformers' ``conversion_mapping``.
    """
    folder = Path(folder)
    ranks = Ranks.of(groups, f"exporting to {folder}")
    plan = ranks.together(lambda: _plan(model, groups))
    if groups.layout.pp > 1:
        plan = _of_all_stages(plan, ranks.all_gather(plan.tensors))
    _check_owners(plan, ranks)
    files = _files(plan.tensors, max_shard_bytes)
    with _removed_on_error(folder, files, ranks):
        ranks.together(_to_disk(folder, lambda: _begin(folder, files, ranks)))
        ranks.together(_write(folder, files, plan, groups, max(8, buffer_bytes)))
        ranks.together(_to_disk(folder, lambda: _publish(folder, files, model, ranks)))
    return ExportReport(tuple(file.name for file in files), len(plan.tensors), sum(file.bytes for file in files))


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the files."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    tensors: tuple[_Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """All tensors of the files, what this rank gives to each, and where it communicates."""

    tensors: Mapping[str, _Tensor]
    gives: Mapping[str, tuple[tuple[Tensor, Overlap], ...]]
    device: torch.device


def _plan(model: nn.Module, groups: FoldedGroups) -> _Plan:
    _check_no_adapters(model)
    held = held_tensors(model, groups)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    held = {name: each for name, each in held.items() if name not in ignored}
    for each in held.values():
        if each.tensor.is_meta:
            raise CheckpointError(f"{each.name} is on the meta device and has no values to export. Load some first.")
    shapes = {name: each.share.shape for name, each in held.items()}
    stored = hub_shapes(model, shapes)
    names = lay_out(model, stored, shapes)
    wrong = [name for name in shapes if name not in names.laid or names.laid[name].shape != shapes[name]]
    if wrong or names.unused or names.problems:
        raise CheckpointError(
            f"transformers' conversion of {type(model).__name__} does not lead back from the files' names to the "
            f"model's for {', '.join([*wrong, *names.unused, *names.problems][:5])}, so nothing was written."
        )
    gives: dict[str, list[tuple[Tensor, Overlap]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, each in held.items():
        tensor = each.local(each.tensor).detach()
        for piece in names.laid[name].pieces:
            dtypes[piece.source] = tensor.dtype
        if each.first:
            for overlap in overlaps(each.share, names.laid[name]):
                gives.setdefault(overlap.source, []).append((tensor, overlap))
    tensors = {name: _Tensor(name, tuple(shape), dtypes[name]) for name, shape in stored.items()}
    device = communication_device(next(iter(held.values())).tensor) if held else torch.device("cpu")
    return _Plan(tensors, {name: tuple(parts) for name, parts in gives.items()}, device)


def _check_no_adapters(model: nn.Module) -> None:
    """Names of adapters, and of what they wrap, are known to nobody who reads the files."""
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "merged_adapters")), None)
    if adapted is not None:
        raise CheckpointError(
            f"{adapted} has an adapter beside its weights, and no reader of the files knows their names. Merge "
            f"adapters first, and export what is left: export(model.merge_and_unload(), ...). The adapters alone are "
            f"saved by the adapted model's own save_pretrained. Nothing was written."
        )
    inner = next((name for name, module in model.named_modules() if is_transformers_model(module)), "")
    if inner:
        raise CheckpointError(
            f"{type(model).__name__} wraps the model {inner}, so its tensors would have names that no reader of the "
            f"files knows. Export that one: export(model.{inner}, ...). Nothing was written."
        )


def _of_all_stages(plan: _Plan, of_all: Sequence[Mapping[str, _Tensor]]) -> _Plan:
    """Of pipeline stages, whose parts have names of the whole model."""
    tensors: dict[str, _Tensor] = {}
    for of_rank in of_all:
        for name, tensor in of_rank.items():
            if tensors.setdefault(name, tensor) != tensor:
                raise CheckpointError(f"{name} is {tensor} in one pipeline stage and {tensors[name]} in another.")
    return _Plan(tensors, plan.gives, plan.device)


def _files(tensors: Mapping[str, _Tensor], limit: int) -> tuple[_File, ...]:
    """Fill files up to the limit, in the order of names; wide dtypes first in each, so that all lie aligned."""
    bins: list[list[_Tensor]] = [[]]
    size = 0
    for name in sorted(tensors, key=natural):
        tensor = tensors[name]
        if bins[-1] and size + tensor.bytes > limit:
            bins.append([])
            size = 0
        bins[-1].append(tensor)
        size += tensor.bytes
    names = [f"model-{number:05d}-of-{len(bins):05d}.safetensors" for number in range(1, len(bins) + 1)]
    if len(bins) == 1:
        names = ["model.safetensors"]
    return tuple(
        _File(name, tuple(sorted(inside, key=lambda tensor: -tensor.dtype.itemsize)))
        for name, inside in zip(names, bins, strict=True)
    )


def _begin(folder: Path, files: Sequence[_File], ranks: Ranks) -> None:
    """Rank 0 makes the folder and the headers."""
    if ranks.rank != 0:
        return
    there = sorted(path.name for path in folder.glob("*.safetensors*")) if folder.is_dir() else []
    there = [name for name in there if not name.endswith(_UNFINISHED)]
    if there:
        raise CheckpointError(
            f"{folder} holds weights already, {', '.join(there[:5])}: whoever reads the folder later could take parts "
            f"of both. Export to another folder, or remove them first. Nothing was written."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        begin_file(_unfinished(folder, file), [(each.name, each.shape, each.dtype) for each in file.tensors])


@contextmanager
def _removed_on_error(folder: Path, files: Sequence[_File], ranks: Ranks) -> Iterator[None]:
    """Rank 0 removes what an export wrote that did not come to its end; what was there before stays."""
    before = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    try:
        yield
    except BaseException:
        if ranks.rank == 0 and folder.is_dir():
            weights = [*(file.name for file in files), INDEX]
            written = {*weights, "config.json", "generation_config.json"} - (before or set())
            with suppress(OSError):
                for name in (*written, *(name + _UNFINISHED for name in weights)):
                    (folder / name).unlink(missing_ok=True)
                if before is None and not any(folder.iterdir()):
                    folder.rmdir()
        raise


def _to_disk(folder: Path, work: Callable[[], None]) -> Callable[[], None]:
    """The same, with a disk that fails as an error of ours."""

    def written() -> None:
        try:
            work()
        except OSError as error:
            raise CheckpointError(_failed(folder, error)) from error

    return written


def _failed(folder: Path, error: BaseException) -> str:
    return (
        f"writing in {folder}: {type(error).__name__}: {error}. What was written is removed as far as possible. If the "
        f"disk is full, free space and export again."
    )


def _unfinished(folder: Path, file: _File) -> Path:
    return folder / (file.name + _UNFINISHED)


def _check_owners(plan: _Plan, ranks: Ranks) -> None:
    """Every element of every tensor must come from one rank."""
    given: dict[str, int] = {}
    own = {
        name: sum(prod(cut.stop - cut.start for cut in overlap.there) for _, overlap in parts)
        for name, parts in plan.gives.items()
    }
    for of_rank in ranks.all_gather(own):
        for name, count in of_rank.items():
            given[name] = given.get(name, 0) + count
    for name, tensor in plan.tensors.items():
        if given.get(name, 0) != prod(tensor.shape):
            raise CheckpointError(
                f"Of the {prod(tensor.shape)} elements of {name}, the ranks hold {given.get(name, 0)}: a parameter "
                f"lies otherwise than it was said (mark_placement, parameter_shares). Nothing was written."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Chunks of files.


@dataclass(frozen=True, slots=True)
class _Block:
    """Whole rows of a tensor, and where their bytes start in a chunk."""

    tensor: _Tensor
    box: Box
    start: int

    @property
    def end(self) -> int:
        return self.start + self.box.volume * self.tensor.dtype.itemsize


def _chunks(file: _File, limit: int) -> Iterator[list[_Block]]:
    """The file's data from front to back, at most ``limit`` bytes at a time."""
    chunk: list[_Block] = []
    for tensor in file.tensors:
        nothing = (0,) * len(tensor.shape)
        for box in pieces(Box(nothing, tensor.shape, nothing), limit // tensor.dtype.itemsize):
            start = chunk[-1].end if chunk else 0
            if chunk and start + box.volume * tensor.dtype.itemsize > limit:
                yield chunk
                chunk, start = [], 0
            chunk.append(_Block(tensor, box, start))
    if chunk:
        yield chunk


@torch.no_grad()
def _write(
    folder: Path, files: Sequence[_File], plan: _Plan, groups: FoldedGroups, buffer_bytes: int
) -> Callable[[], None]:
    """Write all files, all ranks through all chunks; what is returned raises if this rank's disk failed."""
    buffer = torch.zeros(-(-buffer_bytes // 8), dtype=torch.int64, device=plan.device)
    as_bytes = buffer.view(torch.uint8)
    failure: BaseException | None = None
    for number, file in enumerate(files):
        for chunk in _chunks(file, as_bytes.numel()):
            words = buffer[: -(-chunk[-1].end // 8)]
            words.zero_()
            for block in chunk:
                part = as_bytes[block.start : block.end].view(block.tensor.dtype).view(block.box.sizes)
                for tensor, overlap in plan.gives.get(block.tensor.name, ()):
                    own = overlap.within(block.box)
                    if own is not None:
                        part[own.there].copy_(own.as_stored(tensor[own.here]))
            for group in (groups.tp, groups.dp_cp, groups.pp):  # each rank is in one group of each
                all_reduce_(words, group)
            if number % groups.layout.world == groups.rank and failure is None:
                _, failure = attempt(lambda: append(_unfinished(folder, file), as_bytes[: chunk[-1].end]))  # noqa: B023
        if number % groups.layout.world == groups.rank and failure is None:
            _, failure = attempt(lambda: sync(_unfinished(folder, file)))  # noqa: B023

    def raise_failure() -> None:
        raise_interruption(failure)
        if failure is not None:
            raise CheckpointError(_failed(folder, failure)) from failure

    return raise_failure


def _publish(folder: Path, files: Sequence[_File], model: nn.Module, ranks: Ranks) -> None:
    """Rank 0 gives the files their names, and says what is in them."""
    if ranks.rank != 0:
        return
    unfinished = folder / (INDEX + _UNFINISHED)
    if len(files) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(file.bytes for file in files)},
            "weight_map": {each.name: file.name for file in files for each in file.tensors},
        }
        unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    with tempfile.TemporaryDirectory(dir=folder, prefix="config.", suffix=_UNFINISHED) as pages:
        if is_transformers_model(model):
            config: Any = copy.deepcopy(model.config)
            config.architectures = [plain_class(model).__name__]
            config.dtype = next(model.parameters()).dtype
            config.save_pretrained(pages)
            generation: Any = getattr(model, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(pages)
        # All is on the disk; what there is left to do needs no room.
        for file in files:
            os.replace(_unfinished(folder, file), folder / file.name)
        for page in sorted(Path(pages).iterdir()):
            os.replace(page, folder / page.name)
    if len(files) > 1:
        os.replace(unfinished, folder / INDEX)
