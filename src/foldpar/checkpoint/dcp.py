"""The adapter to ``torch.distributed.checkpoint``: its files and metadata, its planners' steps, our own offsets.

Its ``save`` and ``load`` take offsets from a DTensor's mesh; here they come from :mod:`foldpar.parameters.placements`.
What is written is an ordinary checkpoint of it, which its own tools read.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from foldpar.checkpoint.files import METADATA, failed_write, read_bounded
from foldpar.checkpoint.manifest import FileRecord, Manifest
from foldpar.checkpoint.metadata import read_metadata
from foldpar.checkpoint.state import Block, Entry, view
from foldpar.comm import Ranks
from foldpar.errors import CheckpointError
from foldpar.parameters import Box

__all__ = ["StoredTensors", "Writing", "write_blocks"]


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


class Writing:
    """One save of this rank: plan together, write alone, finish on rank 0."""

    def __init__(
        self, folder: Path, token: str, blocks: Sequence[Block], values: Mapping[str, Any], background: bool
    ) -> None:
        # A copy-ahead buffer runs on a CUDA stream; what is written in the background is on the CPU already.
        self._writer = FileSystemWriter(folder, per_thread_copy_ahead=0 if background else 10_000_000)
        self._files = self._writer.fs = _HashingFiles(token)
        self._writer.save_id = token
        self._folder = folder
        self._planner = _SavePlanner(blocks, values)
        self._metadata: Metadata | None = None

    def local_plan(self, first: bool) -> SavePlan:
        self._writer.set_up_storage_writer(first)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0: who writes what; checks that the pieces cover every tensor once."""
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def write(self, plan: SavePlan) -> tuple[list[Any], dict[str, FileRecord]]:
        """Write this rank's file, and say what lies where in it."""
        try:
            results = self._writer.write_data(self._planner.finish_plan(plan), self._planner)
            return list(results.wait()), self._files.records
        except Exception as error:
            # torch reports a failed write as its own error; the reason is what the file said.
            if self._files.failure is None:
                raise
            raise CheckpointError(f"writing in {self._folder}: {failed_write(self._files.failure)}") from error

    def finish(self, results: list[list[Any]]) -> dict[str, FileRecord]:
        """On rank 0: write the metadata."""
        assert self._metadata is not None
        self._writer.finish(self._metadata, results)
        return self._files.records


class _SavePlanner(DefaultSavePlanner):
    """Plans exactly the given blocks and values."""

    def __init__(self, blocks: Sequence[Block], values: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = {MetadataIndex(block.key, block.box.offsets): block for block in blocks}
        self._values = dict(values)

    def create_local_plan(self) -> SavePlan:
        tensors = [_write_item(block) for block in self._blocks.values()]
        values = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._values]
        self.plan = SavePlan([*tensors, *values])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        # How its own tools turn flat keys into the nested dictionaries that they usually come from.
        metadata.planner_data = {key: tuple(_nested(key)) for key in metadata.state_dict_metadata}
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type != WriteItemType.BYTE_IO:
            return self._blocks[write_item.index].tensor
        buffer = io.BytesIO()
        torch.save(self._values[write_item.index.fqn], buffer)
        return buffer


def _nested(key: str) -> Iterator[str]:
    """``model``, then the name; ``optimizer``, ``state``, then the name."""
    levels = {"model": 1, "optimizer": 2}.get(key.partition(".")[0], 1)
    return iter(key.split(".", levels))


def _write_item(block: Block) -> WriteItem:
    return WriteItem(
        MetadataIndex(block.key, block.box.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(block.box),
            properties=TensorProperties(dtype=block.tensor.dtype),
            size=torch.Size(block.shape),
        ),
    )


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


class _HashingFiles(FileSystem):
    """Files that are summed up while they are written, so that nothing is read again."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.records: dict[str, FileRecord] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashed = _HashingStream(stream)
            try:
                yield hashed
                hashed.close()
            except OSError as error:
                hashed.failure = hashed.failure or error
                raise
            finally:
                self.failure = self.failure or hashed.failure
        self.records[Path(path).name] = FileRecord(hashed.size, hashed.digest.hexdigest(), self.token)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _HashingStream(io.IOBase):
    """A file that can only be appended to."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.digest, self.size = raw, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self.raw.write(data)
        except OSError as error:
            self.failure = error
            raise
        length = memoryview(data).nbytes
        self.digest.update(data)
        self.size += length
        return length

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self.raw.closed:
            self.raw.flush()

    def fileno(self) -> int:
        self.flush()  # whoever asks is about to call fsync, which knows nothing of Python's buffer
        number: int = self.raw.fileno()
        return number

    def close(self) -> None:
        self.raw.close()


def write_blocks(writing: Writing, ranks: Ranks) -> tuple[list[list[Any]], dict[str, FileRecord]]:
    """Plan on all ranks and write on each; returns, on rank 0, what all of them wrote.

    Raises:
        CheckpointError, OSError: on every rank, if any failed.
    """
    local = ranks.together(lambda: writing.local_plan(ranks.rank == 0))
    plan, error = ranks.scatter(_global_plans(writing, ranks.gather(local), ranks))
    if error is not None:
        raise CheckpointError(f"{ranks.doing}: {error}")
    of_all = ranks.gather(ranks.together(lambda: writing.write(plan)))
    return [results for results, _ in of_all], {name: record for _, files in of_all for name, record in files.items()}


def _global_plans(writing: Writing, plans: list[SavePlan], ranks: Ranks) -> list[tuple[SavePlan, str | None]]:
    """On rank 0: for every rank its plan, and the text of an error if there is one."""
    if ranks.rank != 0:
        return []
    try:
        return [(plan, None) for plan in writing.global_plan(plans)]
    except ValueError as error:
        text = (
            f"the ranks' parts do not make up whole tensors. Ranks have different models, or a parameter lies "
            f"otherwise than it was said (mark_placement, parameter_shares). ({error})"
        )
        return [(plan, text) for plan in plans]


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


class StoredTensors:
    """The tensors and values of a checkpoint on the disk."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._reader = FileSystemReader(folder)
        self._metadata = read_metadata(read_bounded(folder / METADATA), manifest.files)
        self._reader.set_up_storage_reader(self._metadata, False)
        self._reader.transforms = _Checked(self._reader.storage_data)  # type: ignore[assignment]

    def read_items(self, entry: Entry) -> list[ReadItem]:
        """What to read for a rank's share of a tensor.

        Raises:
            CheckpointError: the checkpoint does not hold all of it.
        """
        stored = self._metadata.state_dict_metadata.get(entry.key)
        if not entry.share.boxes:
            return []
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"it does not hold {entry.key}")
        chunks = [_chunk(box) for box in entry.share.boxes]
        items: list[ReadItem] = create_read_items_for_chunk_list(entry.key, stored, chunks)
        if sum(item.lengths.numel() for item in items) != sum(box.volume for box in entry.share.boxes):
            raise CheckpointError(f"it holds only a part of {entry.key}")
        return items

    def read(self, entries: Sequence[Entry], items: Sequence[ReadItem], values: Sequence[str]) -> dict[str, Any]:
        """Read into the entries' tensors, and return the values by key."""
        planner = _LoadPlanner(entries)
        nothing = torch.Size([0])
        of_values = [
            ReadItem(LoadItemType.BYTE_IO, MetadataIndex(key), nothing, MetadataIndex(key), nothing, nothing)
            for key in values
        ]
        in_order = sorted([*items, *of_values], key=self._place)
        self._reader.read_data(LoadPlan(in_order), planner).wait()
        return planner.values

    def _place(self, item: ReadItem) -> tuple[str, int]:
        stored = self._reader.storage_data.get(item.storage_index)
        if stored is None:
            raise CheckpointError(f"it says nowhere where {item.storage_index.fqn} lies")
        return stored.relative_path, stored.offset


class _Checked:
    """Streams of tensors that are as large as they look: what is packed could unpack to any size."""

    def __init__(self, places: Mapping[MetadataIndex, Any]) -> None:
        self._places = places

    def transform_load_stream(self, read_item: ReadItem, descriptors: Sequence[str], raw: IO[bytes]) -> IO[bytes]:
        with zipfile.ZipFile(_Window(raw, self._places[read_item.storage_index].length)) as archive:
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise CheckpointError(f"{read_item.storage_index.fqn} is packed, as no save writes it")
        raw.seek(0)
        return raw


class _Window(io.RawIOBase):
    """The bytes of one tensor in a file, to be read in any order; torch's own view knows no seeks from the end."""

    def __init__(self, raw: IO[bytes], size: int) -> None:
        self._raw, self._size, self._at = raw, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._raw.seek(self._at)
        data = self._raw.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _LoadPlanner(LoadPlanner):
    """Says where what is read belongs."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._targets = {
            MetadataIndex(entry.key, box.offsets): (entry.tensor, box) for entry in entries for box in entry.share.boxes
        }
        self.values: dict[str, Any] = {}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        raise NotImplementedError("constructed means usable")

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the plan is made by StoredTensors")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.values[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor, box = self._targets[read_item.dest_index]
        starts = tuple(start + offset for start, offset in zip(box.starts, read_item.dest_offsets, strict=True))
        return view(tensor, Box(box.offsets, tuple(read_item.lengths), starts))

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor is a view of its target: nothing is left to do."""
