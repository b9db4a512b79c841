"""Whole tensors of a folded model, put together a bounded buffer at a time: into files, or into a dict.

    every rank: names, boxes, which bytes go where in which file      (integers, no tensors)
    for each chunk of a file:  own blocks into a buffer of zeros -> sum over all ranks -> whoever wants it takes it

Values are summed as integers, and all ranks but one add zeros, so every bit arrives as it is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldpar.comm import FoldedGroups, Ranks, all_reduce_, attempt, raise_interruption
from foldpar.errors import CheckpointError
from foldpar.hf.files import INDEX, append, begin_file, sync
from foldpar.hf.names import Overlap, natural
from foldpar.parameters import Box, pieces
from foldpar.wording import disk_failed

__all__ = [
    "BUFFER_BYTES",
    "SHARD_BYTES",
    "ExportReport",
    "Given",
    "WholeTensor",
    "of_the_world",
    "put_together",
    "write_files",
]

BUFFER_BYTES = 64 * 2**20
SHARD_BYTES = 5 * 10**9
_UNFINISHED = ".incomplete"
_PAGES = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: the names of the files, and how many tensors and bytes of tensors are in them."""

    files: tuple[str, ...]
    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.bytes:,} bytes in {len(self.files)} file(s)"


@dataclass(frozen=True, slots=True)
class WholeTensor:
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
    tensors: tuple[WholeTensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """All tensors by name, what this rank gives to each, and where it communicates."""

    tensors: Mapping[str, WholeTensor]
    gives: Mapping[str, tuple[tuple[Tensor, Overlap], ...]]
    device: torch.device


def of_the_world(given: Given, ranks: Ranks, pp: int) -> Given:
    """With the tensors of all pipeline stages, whose parts have names of the whole model.

    Raises:
        CheckpointError: parts of tensors have no owner, or several; on every rank.
    """
    if pp > 1:
        given = _of_all_stages(given, ranks.all_gather(given.tensors))
    _check_owners(given, ranks)
    return given


@torch.no_grad()
def put_together(
    given: Given, groups: FoldedGroups, *, buffer_bytes: int = BUFFER_BYTES
) -> Iterator[tuple[str, Box, Tensor]]:
    """Every tensor's name, a box of it and its values there, on every rank; values last until the next come.

    All ranks must go through all of it.
    """
    everything = _File("", _aligned(given.tensors.values()))
    for chunk, data in _assembled([everything], given, groups, buffer_bytes):
        for block in chunk.blocks:
            yield block.tensor.name, block.box, block.of(data)


def write_files(
    path: Path,
    given: Given,
    groups: FoldedGroups,
    ranks: Ranks,
    *,
    max_shard_bytes: int | None,
    buffer_bytes: int,
    beside: Callable[[Path], None] = lambda pages: None,
) -> ExportReport:
    """Write safetensors files into a folder, or without a limit, the one file that ``path`` is.

    ``beside`` writes what else belongs into the folder into the one that it is given, on rank 0; all get their names
    when everything is on the disk. What did not come to its end is removed.
    """
    folder = path if max_shard_bytes is not None else path.parent
    files = _files(given.tensors, max_shard_bytes) if max_shard_bytes is not None else _one_file(path, given.tensors)
    with _removed_on_error(folder, files, ranks):
        ranks.together(_to_disk(folder, lambda: _begin(path, folder, files, ranks)))
        ranks.together(_write(folder, files, given, groups, buffer_bytes))
        ranks.together(_to_disk(folder, lambda: _publish(folder, files, beside, ranks)))
    return ExportReport(tuple(file.name for file in files), len(given.tensors), sum(file.bytes for file in files))


def _of_all_stages(plan: Given, of_all: Sequence[Mapping[str, WholeTensor]]) -> Given:
    """Of pipeline stages, whose parts have names of the whole model."""
    tensors: dict[str, WholeTensor] = {}
    for of_rank in of_all:
        for name, tensor in of_rank.items():
            if tensors.setdefault(name, tensor) != tensor:
                raise CheckpointError(f"{name} is {tensor} in one pipeline stage and {tensors[name]} in another.")
    return Given(tensors, plan.gives, plan.device)


def _files(tensors: Mapping[str, WholeTensor], limit: int) -> tuple[_File, ...]:
    """Fill files up to the limit, in the order of names; wide dtypes first in each, so that all lie aligned."""
    bins: list[list[WholeTensor]] = [[]]
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
    return tuple(_File(name, _aligned(inside)) for name, inside in zip(names, bins, strict=True))


def _one_file(path: Path, tensors: Mapping[str, WholeTensor]) -> tuple[_File, ...]:
    return (_File(path.name, _aligned(tensors[name] for name in sorted(tensors, key=natural))),)


def _aligned(tensors: Iterable[WholeTensor]) -> tuple[WholeTensor, ...]:
    """Wide dtypes first."""
    return tuple(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize))


def _begin(path: Path, folder: Path, files: Sequence[_File], ranks: Ranks) -> None:
    """Rank 0 makes the folder and the headers."""
    if ranks.rank != 0:
        return
    if path == folder:
        there = sorted(found.name for found in folder.glob("*.safetensors*")) if folder.is_dir() else []
        there = [name for name in there if not name.endswith(_UNFINISHED)]
    else:
        there = [path.name] if os.path.lexists(path) else []
    if there:
        raise CheckpointError(
            f"{folder} holds weights already, {', '.join(there[:5])}: whoever reads the folder later could take parts "
            f"of both. Export to another folder, or remove them first. Nothing was written."
            if path == folder
            else f"{path} is there already, and is not written over. Give another name, or remove it first. Nothing "
            f"was written."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        begin_file(_unfinished(folder, file), [(each.name, each.shape, each.dtype) for each in file.tensors])


@contextmanager
def _removed_on_error(folder: Path, files: Sequence[_File], ranks: Ranks) -> Iterator[None]:
    """Rank 0 removes what was written and did not come to its end; what was there before stays."""
    before = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    try:
        yield
    except BaseException:
        if ranks.rank == 0 and folder.is_dir():
            weights = [*(file.name for file in files), INDEX]
            written = {*weights, *_PAGES} - (before or set())
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
    said = f"writing in {folder}: {type(error).__name__}: {error}"
    return disk_failed(said, "What was written is removed as far as possible")


def _unfinished(folder: Path, file: _File) -> Path:
    return folder / (file.name + _UNFINISHED)


def _check_owners(plan: Given, ranks: Ranks) -> None:
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

    tensor: WholeTensor
    box: Box
    start: int

    @property
    def end(self) -> int:
        return self.start + self.box.volume * self.tensor.dtype.itemsize

    def of(self, chunk: Tensor) -> Tensor:
        """Its values in the bytes of a chunk; shares the memory."""
        return chunk[self.start : self.end].view(self.tensor.dtype).view(self.box.sizes)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Blocks that follow each other in a file, by its number, and whether they are its last."""

    file: int
    blocks: tuple[_Block, ...]
    last: bool


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


def _assembled(
    files: Sequence[_File], given: Given, groups: FoldedGroups, buffer_bytes: int
) -> Iterator[tuple[_Chunk, Tensor]]:
    """The chunks of all files and their bytes, which last until the next come; on every rank."""
    buffer = torch.zeros(-(-max(16, buffer_bytes) // 8), dtype=torch.int64, device=given.device)
    as_bytes = buffer.view(torch.uint8)
    for number, file in enumerate(files):
        of_file = list(_chunks(file, as_bytes.numel()))
        for place, blocks in enumerate(of_file, 1):
            words = buffer[: -(-blocks[-1].end // 8)]
            words.zero_()
            for block in blocks:
                part = block.of(as_bytes)
                for tensor, overlap in given.gives.get(block.tensor.name, ()):
                    own = overlap.within(block.box)
                    if own is not None:
                        part[own.there].copy_(own.as_stored(tensor[own.here]))
            for group in (groups.tp, groups.dp_cp, groups.pp):  # each rank is in one group of each
                all_reduce_(words, group)
            yield _Chunk(number, tuple(blocks), place == len(of_file)), as_bytes[: blocks[-1].end]


@torch.no_grad()
def _write(
    folder: Path, files: Sequence[_File], given: Given, groups: FoldedGroups, buffer_bytes: int
) -> Callable[[], None]:
    """Write all files, all ranks through all chunks; what is returned raises if this rank's disk failed."""
    failure: BaseException | None = None
    for chunk, data in _assembled(files, given, groups, buffer_bytes):
        if chunk.file % groups.layout.world == groups.rank and failure is None:
            path = _unfinished(folder, files[chunk.file])
            _, failure = attempt(lambda: append(path, data))  # noqa: B023
            if chunk.last and failure is None:
                _, failure = attempt(lambda: sync(path))  # noqa: B023

    def raise_failure() -> None:
        raise_interruption(failure)
        if failure is not None:
            raise CheckpointError(_failed(folder, failure)) from failure

    return raise_failure


def _publish(folder: Path, files: Sequence[_File], beside: Callable[[Path], None], ranks: Ranks) -> None:
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
        beside(Path(pages))
        # All is on the disk; what there is left to do needs no room.
        for file in files:
            os.replace(_unfinished(folder, file), folder / file.name)
        for page in sorted(Path(pages).iterdir()):
            os.replace(page, folder / page.name)
    if len(files) > 1:
        os.replace(unfinished, folder / INDEX)
