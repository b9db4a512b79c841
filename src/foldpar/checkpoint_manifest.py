"""``foldpar.json``: what a checkpoint holds, in a file that a person can read; written last, so it says "complete"."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from foldpar.errors import CheckpointError, LayoutError
from foldpar.layout import FoldedLayout

__all__ = ["FORMAT", "MANIFEST", "FileRecord", "Manifest", "OptimizerRecord", "StateRecord", "TensorRecord"]

FORMAT = 1
MANIFEST = "foldpar.json"
_DEGREES = ("world", "tp", "ep", "etp", "pp", "cp", "order")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 sum of one file, and the token of the save that wrote it."""

    size: int
    sha256: str
    save: str = ""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A parameter (with its family) or a buffer: its global shape, its dtype, further names if it is tied."""

    shape: tuple[int, ...]
    dtype: str
    family: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StateRecord:
    """One state that an optimizer keeps for a parameter.

    ``kind``: ``"parameter"`` lies over the ranks as its parameter does, ``"whole"`` is the same tensor on all ranks,
    ``"value"`` is a plain value, kept here.
    """

    kind: Literal["parameter", "whole", "value"]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: Any = None


@dataclass(frozen=True, slots=True)
class OptimizerRecord:
    """An optimizer by parameter name: its class, the options of every parameter, and its states."""

    kind: str
    options: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Mapping[str, StateRecord]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``foldpar.json``."""

    foldpar: str
    torch: str
    time: float
    step: int | None
    extra: Any
    layout: FoldedLayout
    parameters: Mapping[str, TensorRecord]
    buffers: Mapping[str, TensorRecord]
    optimizer: OptimizerRecord | None
    files: Mapping[str, FileRecord]

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same with the list of files."""
        return replace(self, files=dict(sorted(files.items())))

    def to_bytes(self) -> bytes:
        """JSON text, with a sum over all of it but the sum itself."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "foldpar": self.foldpar,
            "torch": self.torch,
            "time": self.time,
            "step": self.step,
            "extra": self.extra,
            "layout": {name: getattr(self.layout, name) for name in _DEGREES},
            "parameters": {name: asdict(record) for name, record in self.parameters.items()},
            "buffers": {name: asdict(record) for name, record in self.buffers.items()},
            "optimizer": None if self.optimizer is None else _optimizer_document(self.optimizer),
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        return (_text({**document, "sha256": _sum(document)}) + "\n").encode()

    @classmethod
    def from_bytes(cls, text: bytes, where: str) -> Manifest:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            CheckpointError: a newer format, or a damaged file.
        """
        try:
            document = json.loads(text)
            expected, form = document.pop("sha256"), document.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(_damaged(where, "it is no complete JSON document")) from None
        if not isinstance(form, int) or form > FORMAT:
            raise CheckpointError(
                f"{where} has format {form}, written by foldpar {document.get('foldpar')}; this foldpar reads formats "
                f"up to {FORMAT}, and cannot know what a newer one means. Load it with that foldpar or a newer one."
            )
        if expected != _sum({"format": form, **document}):
            raise CheckpointError(_damaged(where, "its contents do not have the SHA-256 sum that it names"))
        try:
            return _manifest(document)
        except (KeyError, TypeError, AttributeError, LayoutError) as error:
            raise CheckpointError(_damaged(where, f"it lacks a field or has one of a wrong kind ({error})")) from None


def _manifest(document: Mapping[str, Any]) -> Manifest:
    optimizer = document["optimizer"]
    return Manifest(
        foldpar=document["foldpar"],
        torch=document["torch"],
        time=document["time"],
        step=document["step"],
        extra=document["extra"],
        layout=FoldedLayout(**document["layout"]),
        parameters={name: _tensor_record(record) for name, record in document["parameters"].items()},
        buffers={name: _tensor_record(record) for name, record in document["buffers"].items()},
        optimizer=None if optimizer is None else _optimizer_record(optimizer),
        files={name: FileRecord(**record) for name, record in document["files"].items()},
    )


def _tensor_record(record: Mapping[str, Any]) -> TensorRecord:
    return TensorRecord(tuple(record["shape"]), record["dtype"], record["family"], tuple(record["aliases"]))


def _optimizer_document(optimizer: OptimizerRecord) -> dict[str, Any]:
    """Options are the same for whole groups of parameters: each set is written once."""
    sets: list[Mapping[str, Any]] = []
    for options in optimizer.options.values():
        if options not in sets:
            sets.append(options)
    return {
        "kind": optimizer.kind,
        "options": sets,
        "options_of": {name: sets.index(options) for name, options in optimizer.options.items()},
        "state": {
            name: {key: asdict(record) for key, record in states.items()} for name, states in optimizer.state.items()
        },
    }


def _optimizer_record(document: Mapping[str, Any]) -> OptimizerRecord:
    return OptimizerRecord(
        document["kind"],
        {name: document["options"][place] for name, place in document["options_of"].items()},
        {
            name: {
                key: StateRecord(record["kind"], tuple(record["shape"]), record["dtype"], record["value"])
                for key, record in states.items()
            }
            for name, states in document["state"].items()
        },
    )


def _text(document: Mapping[str, Any], depth: int = 0) -> str:
    """JSON with a line for each tensor, file or option, as a person would write it."""
    spread = {"parameters", "buffers", "optimizer", "files", "options_of", "state"}
    lines = []
    for name, value in document.items():
        text = _text(value, depth + 1) if name in spread and isinstance(value, dict) else json.dumps(value)
        lines.append(f"{'  ' * (depth + 1)}{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{'  ' * depth}}}"


def _sum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _damaged(where: str, why: str) -> str:
    return f"{where} is damaged: {why}. Load an older checkpoint (latest_checkpoint finds the newest complete one)."
