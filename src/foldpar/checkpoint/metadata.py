"""torch's ``.metadata`` read as data: the file is a pickle, and a pickle can call anything that it names.

Only the types that a checkpoint needs can be named here, and everything that is read is checked before it is used. The
unpickler is Python's own: the one in C lets some bytes ask for any amount of memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from foldpar.checkpoint.manifest import FileRecord

__all__ = ["read_metadata"]

_PLAIN = (
    Metadata,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    _StorageInfo,
)
_KNOWN: Mapping[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in (*_PLAIN, TensorProperties, _MEM_FORMAT_ENCODING)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    # Where it was written: nothing is read from there. Python has moved these classes once.
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}
# What pickle.dump writes of such values. No sets, no persistent objects, no names by number.
_OPCODES = b"".join(
    (
        pickle.PROTO,
        pickle.FRAME,
        pickle.STOP,
        pickle.MARK,
        pickle.MEMOIZE,
        pickle.BINPUT,
        pickle.LONG_BINPUT,
        pickle.BINGET,
        pickle.LONG_BINGET,
        pickle.NONE,
        pickle.NEWTRUE,
        pickle.NEWFALSE,
        pickle.BININT,
        pickle.BININT1,
        pickle.BININT2,
        pickle.LONG1,
        pickle.BINFLOAT,
        pickle.SHORT_BINUNICODE,
        pickle.BINUNICODE,
        pickle.EMPTY_TUPLE,
        pickle.TUPLE,
        pickle.TUPLE1,
        pickle.TUPLE2,
        pickle.TUPLE3,
        pickle.EMPTY_LIST,
        pickle.APPEND,
        pickle.APPENDS,
        pickle.EMPTY_DICT,
        pickle.SETITEM,
        pickle.SETITEMS,
        pickle.GLOBAL,
        pickle.STACK_GLOBAL,
        pickle.NEWOBJ,
        pickle.REDUCE,
        pickle.BUILD,
    )
)
_Python: Any = pickle._Unpickler


class _Unpickler(_Python):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = {code: _Python.dispatch[code] for code in _OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs and which is not called")

    def load_build(self) -> None:
        """Fields of plain values only: not of classes, functions or members of an enumeration, which all share."""
        value, state = self.stack[-2:]
        plain = type(value) in _PLAIN and type(state) is dict and all(type(name) is str for name in state)
        if not plain and type(value) is not TensorProperties:
            raise pickle.UnpicklingError(f"it would change {value!r:.60}")
        _Python.load_build(self)

    def load_setitem(self) -> None:
        self._check_keys([self.stack[-2]])
        _Python.load_setitem(self)

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        _Python.load_setitems(self)

    def _check_keys(self, keys: Sequence[Any]) -> None:
        """Keys are hashed, which of nested tuples can take for ever."""
        for key in keys:
            offset = getattr(key, "offset", None)
            flat = type(key) is MetadataIndex and type(key.fqn) is str and (offset is None or _is_shape(offset))
            if type(key) is not str and not flat:
                raise pickle.UnpicklingError("it has a key of another kind")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def read_metadata(data: bytes, files: Mapping[str, FileRecord]) -> Metadata:
    """What lies where in the files.

    Raises:
        ValueError: it names anything but what a checkpoint needs, is no pickle, or refers to what is not in the files.
    """
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
        _check(metadata, files)
    except Exception as error:  # a pickle of anybody's can raise anything
        raise ValueError(f".metadata is not what a save writes ({type(error).__name__}: {str(error)[:300]})") from error
    found: Metadata = metadata
    return found


def _check(metadata: Any, files: Mapping[str, FileRecord]) -> None:
    _expect(type(metadata) is Metadata, "it is no Metadata")
    _expect(type(metadata.state_dict_metadata) is dict and type(metadata.storage_data) is dict, "it lacks a dictionary")
    for key, entry in metadata.state_dict_metadata.items():
        _expect(type(key) is str, "a key is no text")
        if type(entry) is not BytesStorageMetadata:
            _check_tensor(key, entry)
    for index, place in metadata.storage_data.items():
        _expect(type(index) is MetadataIndex and type(index.fqn) is str, "a place is of no tensor")
        _expect(index.offset is None or _is_shape(index.offset), f"{index.fqn} has an offset of another kind")
        _check_place(index.fqn, place, files)
    saves = {record.save for record in files.values()}
    _expect(len(saves) <= 1, "its files are of different saves")
    if saves - {""}:
        _expect(
            type(metadata.storage_meta) is StorageMeta and {metadata.storage_meta.save_id} == saves,
            "it is of another save than the other files",
        )


def _check_tensor(key: str, entry: Any) -> None:
    whole = type(entry) is TensorStorageMetadata and _is_shape(entry.size) and type(entry.chunks) is list
    _expect(whole and type(entry.properties) is TensorProperties, f"{key} is no tensor")
    _expect(isinstance(entry.properties.dtype, torch.dtype), f"{key} has no dtype")
    volume = 0
    for chunk in entry.chunks:
        _expect(
            type(chunk) is ChunkStorageMetadata and _is_shape(chunk.offsets) and _is_shape(chunk.sizes),
            f"{key} has a piece of another kind",
        )
        inside = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
            start + size <= end for start, size, end in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        )
        _expect(inside, f"{key} has a piece outside of itself")
        volume += prod(chunk.sizes)
    _expect(volume == prod(entry.size), f"the pieces of {key} do not make it up")


def _check_place(name: str, place: Any, files: Mapping[str, FileRecord]) -> None:
    _expect(type(place) is _StorageInfo, f"{name} has a place of another kind")
    _expect(place.relative_path in files, f"{name} is in {str(place.relative_path)[:60]!r}, none of its files")
    _expect(not place.transform_descriptors, f"{name} is transformed")
    _expect(_is_size(place.offset) and _is_size(place.length), f"{name} has a place that is no number")
    _expect(place.offset + place.length <= files[place.relative_path].size, f"{name} ends behind its file")


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(_is_size(size) for size in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _expect(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)
