"""The tensors of a model that files hold, with their places, and memory for those on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foldpar.comm import FoldedGroups, adopt, is_dtensor, is_sharding, local_tensor
from foldpar.errors import CheckpointError, ModelError
from foldpar.parameters import Placement, Share, parameter_placements, plain_name

__all__ = ["Held", "Slots", "compute_buffers", "held_tensors"]


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or a persistent buffer, and this rank's share of it; ``first`` if no other copy comes before it."""

    name: str
    aliases: tuple[str, ...]
    tensor: Tensor
    share: Share
    first: bool
    placement: Placement | None = None

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that lies like this one, in the shape of the share; shares the memory."""
        return local_tensor(tensor) if self.placement is None else self.placement.local(tensor)


def held_tensors(model: nn.Module, groups: FoldedGroups) -> dict[str, Held]:
    """By name; a tied parameter once. Nothing is communicated.

    Raises:
        CheckpointError: a buffer is a sharded DTensor. FamilyError: see
        :func:`~foldpar.parameter_placements`.
    """
    found: dict[str, Held] = {}
    for placement in parameter_placements(model, groups):
        found[placement.name] = Held(
            placement.name, placement.aliases, placement.parameter, placement.share, placement.replica == 0, placement
        )
    of_buffer: dict[int, list[str]] = {}
    for name, module, attribute in _buffers(model):
        if attribute not in module._non_persistent_buffers_set:
            of_buffer.setdefault(id(getattr(module, attribute)), []).append(name)
    first = groups.rank % groups.layout.stage_size == 0
    for _, module, attribute in _buffers(model):
        buffer = getattr(module, attribute)
        names = of_buffer.pop(id(buffer), None)
        if names is None:
            continue
        if is_dtensor(buffer) and any(is_sharding(placement) for placement in buffer.placements):
            raise CheckpointError(f"The buffer {names[0]} is a sharded DTensor; buffers must be whole on every rank.")
        found[names[0]] = Held(names[0], tuple(names[1:]), buffer, Share.whole(tuple(buffer.shape)), first)
    return found


class Slots:
    """Where a model keeps its tensors, to give those on the meta device memory at all their places."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._made: dict[int, Tensor] = {}
        self._places: dict[int, list[tuple[Mapping[str, Any], str]]] = {}
        for module in model.modules():
            for kept in (module._parameters, module._buffers):
                for attribute, tensor in kept.items():
                    if tensor is not None:
                        self._places.setdefault(id(tensor), []).append((kept, attribute))

    @torch.no_grad()
    def with_memory(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, or in place of one without memory, or of another dtype than this, a new one.

        The values of a new tensor are undefined.
        """
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        if not tensor.is_meta and dtype in (None, tensor.dtype):
            return tensor
        new: Tensor = torch.empty_like(tensor, device=self._device if tensor.is_meta else None, dtype=dtype)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        new.__dict__.update(tensor.__dict__)  # marks
        adopt(new)
        for kept, attribute in self._places[id(tensor)]:
            cast("dict[str, Tensor]", kept)[attribute] = new
        self._made[id(tensor)] = new
        return new


@torch.no_grad()
def compute_buffers(model: nn.Module, slots: Slots) -> None:
    """Compute what is in no file and was on the meta device, such as rotary frequencies, as the model does.

    Raises:
        ModelError: the model's class does not say how.
    """
    new: list[tuple[str, nn.Module, str]] = []
    for name, module, attribute in _buffers(model):
        if getattr(module, attribute).is_meta:
            buffer = slots.with_memory(getattr(module, attribute))
            if not buffer.is_floating_point():
                raise ModelError(_unknown_buffer(name, module))
            buffer.fill_(torch.nan)
            new.append((name, module, attribute))
    initialise = getattr(model, "_init_weights", None)
    for module in dict.fromkeys(module for _, module, _ in new):
        own = list(module.parameters(recurse=False))
        if initialise is not None and not own:  # it would draw parameters anew
            initialise(module)
    for name, module, attribute in new:
        if getattr(module, attribute).isnan().any():
            raise ModelError(_unknown_buffer(name, module))


def _unknown_buffer(name: str, module: nn.Module) -> str:
    return (
        f"The buffer {name} of {type(module).__name__} is on the meta device and in no file, since it is not "
        f"persistent, and the model does not say how to compute it (_init_weights). Compute it before loading: "
        f"model.get_submodule({name.rpartition('.')[0]!r}).{name.rpartition('.')[2]} = ..."
    )


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, owner and name there."""
    for prefix, module in model.named_modules():
        for attribute, _ in module.named_buffers(recurse=False):
            yield plain_name(f"{prefix}.{attribute}" if prefix else attribute), module, attribute
