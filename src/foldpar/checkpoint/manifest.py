"""``foldpar.json``: what a checkpoint holds, in a file that a person can read; written last, so it says "complete"."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any, Literal

from foldpar.errors import CheckpointError, LayoutError
from foldpar.layout import FoldedLayout

__all__ = ["FORMAT", "MANIFEST", "FileRecord", "Manifest", "OptimizerRecord", "StateRecord", "TensorRecord"]

FORMAT = 1
MANIFEST = "foldpar.json"


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
    """Optimizers by parameter name: their classes, the options of every parameter, and its states."""

    kind: str
    options: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Mapping[str, StateRecord]]
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Of several optimizers, the class of each parameter's; empty where there was one."""

    def kind_of(self, name: str) -> str:
        """The class of the optimizer of a parameter."""
        return self.kinds.get(name, self.kind)


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
    schedulers: Sequence[Mapping[str, Any]] = ()
    """Of each pipeline stage, what :func:`~foldpar.checkpoint.schedulers.scheduler_states` gave; empty without any."""

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
            "layout": self.layout.to_dict(),
            "parameters": {name: asdict(record) for name, record in self.parameters.items()},
            "buffers": {name: asdict(record) for name, record in self.buffers.items()},
            "optimizer": None if self.optimizer is None else _optimizer_document(self.optimizer),
            "files": {name: asdict(record) for name, record in self.files.items()},
            **({"schedulers": list(self.schedulers)} if self.schedulers else {}),
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
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(_damaged(where, "it is no complete JSON document")) from None
        if isinstance(form, bool) or not isinstance(form, int) or form > FORMAT:
            raise CheckpointError(
                f"{where} has format {form}, written by foldpar {document.get('foldpar')}; this foldpar reads formats "
                f"up to {FORMAT}, and cannot know what a newer one means. Load it with that foldpar or a newer one."
            )
        if expected != _sum({"format": form, **document}):
            raise CheckpointError(_damaged(where, "its contents do not have the SHA-256 sum that it names"))
        try:
            return _manifest(document)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, LayoutError) as error:
            raise CheckpointError(_damaged(where, f"it lacks a field or has one of a wrong kind ({error})")) from None


# ---------------------------------------------------------------------------------------------------------------------
# What is read may be anybody's: every field is of its kind, or the whole is refused.


def _manifest(document: Mapping[str, Any]) -> Manifest:
    optimizer = document["optimizer"]
    step = document["step"]
    moment = document["time"]
    if isinstance(moment, bool) or not isinstance(moment, (int, float)) or not isfinite(moment):
        raise TypeError(f"time is {moment!r}")
    return Manifest(
        foldpar=_text_of(document["foldpar"]),
        torch=_text_of(document["torch"]),
        time=float(moment),
        step=None if step is None else _whole(step, signed=True),
        extra=document["extra"],
        layout=FoldedLayout(**_dict(document["layout"])),
        parameters={name: _tensor_record(record) for name, record in _dict(document["parameters"]).items()},
        buffers={name: _tensor_record(record) for name, record in _dict(document["buffers"]).items()},
        optimizer=None if optimizer is None else _optimizer_record(_dict(optimizer)),
        files={_plain(name): _file_record(record) for name, record in _dict(document["files"]).items()},
        schedulers=[_schedulers_of_stage(_dict(stage)) for stage in _list(document.get("schedulers", []))],
    )


def _schedulers_of_stage(document: Mapping[str, Any]) -> dict[str, Any]:
    kinds, groups, states = (_list(document[name]) for name in ("kinds", "groups", "states"))
    if len(kinds) != len(states) or not kinds:
        raise ValueError(f"there are {len(kinds)} schedulers and {len(states)} states")
    return {
        "kinds": [_text_of(kind) for kind in kinds],
        "groups": _names_in(groups),
        "states": [_dict(state) for state in states],
    }


def _plain(name: str) -> str:
    """The name of a file in the folder itself."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no plain name of a file in this folder")
    return name


def _file_record(record: Mapping[str, Any]) -> FileRecord:
    return FileRecord(_whole(record["size"]), _text_of(record["sha256"]), _text_of(record.get("save", "")))


def _tensor_record(record: Mapping[str, Any]) -> TensorRecord:
    family = record["family"]
    return TensorRecord(
        _shape(record["shape"]),
        _text_of(record["dtype"]),
        None if family is None else _text_of(family),
        tuple(_text_of(alias) for alias in _list(record["aliases"])),
    )


def _optimizer_record(document: Mapping[str, Any]) -> OptimizerRecord:
    sets = [_dict(options) for options in _list(document["options"])]
    return OptimizerRecord(
        _text_of(document["kind"]),
        {name: sets[_whole(place)] for name, place in _dict(document["options_of"]).items()},
        {
            name: {key: _state_record(record) for key, record in _dict(states).items()}
            for name, states in _dict(document["state"]).items()
        },
        {name: _text_of(kind) for name, kind in _dict(document.get("kinds", {})).items()},
    )


def _state_record(record: Mapping[str, Any]) -> StateRecord:
    kind = record["kind"]
    if kind not in ("parameter", "whole", "value"):
        raise ValueError(f"a state is of the kind {kind!r}")
    return StateRecord(kind, _shape(record["shape"]), _text_of(record["dtype"]), record["value"])


def _names_in(value: Any) -> Any:
    """Names in lists, of one optimizer's groups or of the groups of several."""
    return [_names_in(each) for each in value] if isinstance(value, list) else _text_of(value)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_whole(size) for size in _list(value))


def _whole(value: Any, *, signed: bool = False) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 0 and not signed) or abs(value) >= 2**63:
        raise TypeError(f"{str(value)[:40]} is no {'' if signed else 'positive '}integer of 64 bits")
    return value


def _text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is no text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]} is no list")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:40]} is no dictionary")
    return value


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
    } | ({"kinds": dict(optimizer.kinds)} if optimizer.kinds else {})


def _text(document: Mapping[str, Any], depth: int = 0) -> str:
    """JSON with a line for each tensor, file or option, as a person would write it."""
    spread = {"parameters", "buffers", "optimizer", "files", "options_of", "state", "kinds"}
    lines = []
    for name, value in document.items():
        text = _text(value, depth + 1) if name in spread and isinstance(value, dict) else json.dumps(value)
        lines.append(f"{'  ' * (depth + 1)}{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{'  ' * depth}}}"


def _sum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _damaged(where: str, why: str) -> str:
    return f"{where} is damaged: {why}. Load an older checkpoint (latest_checkpoint finds the newest complete one)."
