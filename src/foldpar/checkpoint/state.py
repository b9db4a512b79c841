"""What a checkpoint holds of a model and an optimizer, by name: tensors with their places, and records of them."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foldpar.checkpoint.manifest import OptimizerRecord, StateRecord, TensorRecord
from foldpar.comm import FoldedGroups, local_tensor
from foldpar.errors import CheckpointError
from foldpar.parameters import Box, Placement, Share, held_tensors, pieces

__all__ = [
    "KEPT_OPTIONS",
    "Block",
    "Entry",
    "ModelState",
    "OptimizerState",
    "dtype_name",
    "model_state",
    "optimizer_state",
    "random_state",
    "restore_random_state",
    "view",
]

# Options that say how an optimizer computes, not what: those of the optimizer at hand stay.
KEPT_OPTIONS = frozenset(
    {"params", "param_names", "name", "family", "foreach", "fused", "capturable", "differentiable"},
)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A tensor of the checkpoint and this rank's share of it."""

    key: str
    share: Share
    tensor: Tensor
    replica: int
    replicas: int

    def blocks(self, piece_bytes: int) -> Iterator[Block]:
        """What this rank writes: every piece is written by one of its copies, and the copies take turns."""
        limit, number = max(1, piece_bytes // self.tensor.dtype.itemsize), zlib.crc32(self.key.encode())
        for box in self.share.boxes:
            for piece in pieces(box, limit):
                if number % self.replicas == self.replica:
                    yield Block(self.key, self.share.shape, piece, view(self.tensor, piece))
                number += 1


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A piece of a tensor that this rank writes."""

    key: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


def view(tensor: Tensor, box: Box) -> Tensor:
    """The part of a local tensor that a box describes, sharing its memory."""
    return tensor[tuple(slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))]


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# The model.


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """The parameters and persistent buffers of a model on this rank; keys are ``model.`` and the name."""

    placements: tuple[Placement, ...]
    entries: Mapping[str, Entry]
    """By name, of parameters and of buffers."""
    parameters: Mapping[str, TensorRecord]
    buffers: Mapping[str, TensorRecord]


def model_state(model: nn.Module, groups: FoldedGroups) -> ModelState:
    """Describe a model; nothing is copied or communicated.

    Raises:
        CheckpointError: a buffer is a sharded DTensor, or tensors have no memory yet (the meta device).
        FamilyError: see :func:`~foldpar.parameter_placements`.
    """
    entries: dict[str, Entry] = {}
    placements, parameters, buffers = [], {}, {}
    for name, held in held_tensors(model, groups).items():
        tensor, placement = held.local(held.tensor).detach(), held.placement
        dtype = dtype_name(tensor.dtype)
        if placement is None:
            entries[name] = _whole(f"model.{name}", tensor, groups)
            buffers[name] = TensorRecord(tuple(tensor.shape), dtype)
        else:
            placements.append(placement)
            entries[name] = Entry(f"model.{name}", held.share, tensor, placement.replica, placement.replicas)
            parameters[name] = TensorRecord(held.share.shape, dtype, placement.family.name, placement.aliases)
    unborn = [name for name, entry in entries.items() if entry.tensor.is_meta]
    if unborn:
        raise CheckpointError(
            f"{unborn[0]} is on the meta device and has no memory. Give the model memory first: "
            f"model.to_empty(device=...)."
        )
    return ModelState(tuple(placements), entries, parameters, buffers)


def _whole(key: str, tensor: Tensor, groups: FoldedGroups) -> Entry:
    """A tensor that every rank of the stage has; its first rank writes, so that the pieces are of one copy."""
    first = groups.rank % groups.layout.stage_size == 0
    return Entry(key, Share.whole(tuple(tensor.shape)), tensor, 0 if first else -1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer.


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerState:
    """The states of an optimizer on this rank; keys are ``optimizer.state.``, the parameter's name and the state's."""

    entries: tuple[Entry, ...]
    record: OptimizerRecord


def optimizer_state(optimizers: Sequence[Optimizer], state: ModelState, groups: FoldedGroups) -> OptimizerState:
    """Describe optimizers by parameter names; nothing is copied or communicated.

    Raises:
        CheckpointError: one holds a parameter that the model has not, or a state or an option that cannot be placed.
    """
    names = {id(placement.parameter): placement for placement in state.placements}
    entries: list[Entry] = []
    options: dict[str, dict[str, Any]] = {}
    states: dict[str, dict[str, StateRecord]] = {}
    kinds: dict[str, str] = {}
    for optimizer, group in ((each, group) for each in optimizers for group in each.param_groups):
        plain = {name: _plain_option(name, value) for name, value in group.items() if name not in KEPT_OPTIONS}
        for parameter in group["params"]:
            placement = names.get(id(parameter))
            if placement is None:
                raise CheckpointError(
                    f"The optimizer holds a parameter of shape {list(parameter.shape)} that the model does not have, "
                    f"so it has no name to be saved by. Make the optimizer after the model was folded and sharded, "
                    f"from parameter_groups(model) or model.parameters()."
                )
            options[placement.name] = plain
            kinds[placement.name] = type(optimizer).__qualname__
            found = {
                key: _state(placement, key, value, entries, groups)
                for key, value in optimizer.state.get(parameter, {}).items()
            }
            if found:
                states[placement.name] = found
    kind = " + ".join(dict.fromkeys(type(each).__qualname__ for each in optimizers))
    return OptimizerState(tuple(entries), OptimizerRecord(kind, options, states, kinds if len(optimizers) > 1 else {}))


def _state(placement: Placement, key: str, value: Any, entries: list[Entry], groups: FoldedGroups) -> StateRecord:
    """Add the entry of one state, if it is a tensor, and describe it."""
    name = f"optimizer.state.{placement.name}.{key}"
    if not isinstance(value, Tensor):
        return StateRecord("value", value=_plain_option(name, value))
    tensor = local_tensor(value).detach()
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise CheckpointError(
            f"The optimizer's state {key!r} of {placement.name} is a {type(tensor).__qualname__}, a tensor with "
            f"parts of its own, such as codes and the scales of blocks of them. Which of them belong to which element "
            f"cannot be told, so it could not be cut for another layout. Save with optimizer=None, or use an optimizer "
            f"whose states are plain tensors."
        )
    if value.shape == placement.parameter.shape and tensor.shape == local_tensor(placement.parameter).shape:
        tensor = placement.local(value).detach()
        entries.append(Entry(name, placement.share, tensor, placement.replica, placement.replicas))
        return StateRecord("parameter", placement.share.shape, dtype_name(tensor.dtype))
    if tensor.numel() != 1 and not placement.share.is_whole:
        raise CheckpointError(
            f"The optimizer's state {key!r} of {placement.name} has the shape {list(value.shape)}, which is neither "
            f"that of the parameter on this rank, {list(placement.parameter.shape)}, nor a single number, and the "
            f"parameter is sharded: where such a state belongs in another layout cannot be told. Save with "
            f"optimizer=None, or use an optimizer whose states have the shapes of their parameters."
        )
    entries.append(_whole(name, tensor, groups))
    return StateRecord("whole", tuple(tensor.shape), dtype_name(tensor.dtype))


def _plain_option(name: str, value: Any) -> Any:
    """An option as JSON knows it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain_option(name, element) for element in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"The optimizer's {name!r} is a {type(value).__name__}, which foldpar.json cannot hold: numbers, strings, "
        f"booleans, None and lists of them can be saved."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers.


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's default generators, and the current CUDA device's if CUDA is in use.

    NumPy's is there if somebody has loaded it.
    """
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, numbers, *rest = numpy.random.get_state()
        if kind == "MT19937":  # the one that it starts with; others are set by hand, and can be saved in extra
            found["numpy"] = [torch.from_numpy(numbers.view("int32").copy()), *rest]
    return found


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` took.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(state["torch"])
        numpy = sys.modules.get("numpy")
        if numpy is not None and state.get("numpy") is not None:
            numbers, *rest = state["numpy"]
            numpy.random.set_state(("MT19937", numbers.numpy().view("uint32"), *rest))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"The random state of this rank in it is damaged ({error}); all else was loaded."
        ) from error
