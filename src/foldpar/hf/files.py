"""Folders of safetensors files as Hugging Face lays them out: what lies where, and files written front to back.

model.safetensors                                              one file, or
model-00001-of-00003.safetensors ... model.safetensors.index.json   several, and which tensor is in which
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from foldpar.errors import CheckpointError

__all__ = ["INDEX", "Stored", "StoredTensor", "append", "begin_file", "read_folder", "sync"]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# dtype -> its name in the files.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a folder: its file, shape and dtype (as the file calls it)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Stored:
    """All tensors of a folder by name, and how many bytes they take."""

    tensors: Mapping[str, StoredTensor]
    bytes: int


def read_folder(folder: Path, only: str | None = None) -> Stored:
    """Read the headers of all files, or of ``only`` one.

    Raises:
        CheckpointError: there are none, one is damaged or not where the index says, or they are quantised.
    """
    from safetensors import SafetensorError, safe_open

    if only is None:
        _check_not_quantised(folder)
    elif not (folder / only).is_file():
        raise CheckpointError(f"{folder / only} does not exist, or is no file.")
    places = _places(folder) if only is None else {only: only}
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{folder / INDEX} names {file}, which is not there: the folder is incomplete.")
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                    if places.get(name, file) == file:
                        part = opened.get_slice(name)
                        tensors[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}.") from error
    missing = [name for name in places if name not in tensors and not name.endswith(".safetensors")]
    if missing:
        raise CheckpointError(
            f"{folder / INDEX} says that {missing[0]} is in {places[missing[0]]}, which does not hold it "
            f"({len(missing)} such tensors). Get the folder anew."
        )
    return Stored(tensors, sum((folder / file).stat().st_size for file in set(places.values())))


def _places(folder: Path) -> dict[str, str]:
    """Which file a tensor is in; the file itself instead where no index says."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())
            places = {str(name): str(file) for name, file in index["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {type(error).__name__}: {error}.") from error
        outside = [file for file in places.values() if not _is_inside(file)]
        if outside:
            raise CheckpointError(
                f"{folder / INDEX} names {outside[0]!r}, which is not in its folder: an index leads to files "
                f"beside it, by plain or relative names without '..'. Nothing outside was opened."
            )
        return places
    if (folder / _SINGLE).is_file():
        return {_SINGLE: _SINGLE}
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    there = "it does not exist" if found is None else f"it holds {', '.join(found[:10]) or 'nothing'}"
    raise CheckpointError(
        f"{folder} holds neither {_SINGLE} nor {INDEX}; {there}. Give the folder that save_pretrained wrote, or that "
        f"huggingface_hub.snapshot_download returned. Files of another format (.bin, .gguf) are not read here: load "
        f"them with from_pretrained and save them with save_pretrained."
    )


def _is_inside(file: str) -> bool:
    """Whether a name leads to a place in the folder; links that are there, as in the hub's cache, are its owner's."""
    parts = PurePosixPath(file.replace("\\", "/")).parts
    return bool(parts) and not PurePosixPath(file).is_absolute() and ".." not in parts and "\0" not in file


def _check_not_quantised(folder: Path) -> None:
    try:
        if not (folder / "config.json").is_file():
            return
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return  # weights can be read without it
    quantised = config.get("quantization_config") if isinstance(config, dict) else None
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise CheckpointError(
            f"The weights in {folder} are quantised ({method}), and are not trained in that form. Dequantise them "
            f"first, with transformers for example: load with a quantization_config that has dequantize=True, and "
            f"save_pretrained to a new folder."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def begin_file(path: Path, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
    """Write the header of a file; the tensors' bytes follow in this order, by :func:`append`.

    The format: eight bytes of length, that many of JSON, padded to eight with spaces, then the data.

    Raises:
        CheckpointError: a dtype that the format does not know.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        if dtype not in _NAMES:
            known = ", ".join(str(each).removeprefix("torch.") for each in _NAMES)
            raise CheckpointError(f"{name} is {dtype}, which cannot be exported; known are {known}.")
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)


def append(path: Path, data: Tensor) -> None:
    """Write the bytes of a contiguous tensor behind what is there."""
    data = data.cpu()
    size = data.numel() * data.element_size()
    with path.open("r+b", buffering=0) as file:  # one that was removed meanwhile does not come back
        file.seek(0, os.SEEK_END)
        left = memoryview((ctypes.c_char * size).from_address(data.data_ptr())).cast("B") if size else memoryview(b"")
        while left:
            left = left[file.write(left) :]


def sync(path: Path) -> None:
    """Have a file on the disk before anything says that it is there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
