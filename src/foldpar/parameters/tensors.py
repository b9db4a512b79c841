"""What a model holds, parameters and persistent buffers alike, with this rank's share of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from foldpar.comm import FoldedGroups, is_dtensor, is_sharding, local_tensor
from foldpar.errors import CheckpointError
from foldpar.parameters.boxes import Share
from foldpar.parameters.placements import Placement, parameter_placements, plain_name

__all__ = ["Held", "buffer_places", "held_tensors"]


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or a persistent buffer, and this rank's share of it; ``first`` if no other copy comes before it."""

    name: str
    aliases: tuple[str, ...]
    tensor: Tensor
    share: Share
    first: bool
    placement: Placement | None = None
    """Of a parameter."""

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
    for name, module, attribute in buffer_places(model):
        if attribute not in module._non_persistent_buffers_set:
            of_buffer.setdefault(id(getattr(module, attribute)), []).append(name)
    first = groups.rank % groups.layout.stage_size == 0
    for _, module, attribute in buffer_places(model):
        buffer = getattr(module, attribute)
        names = of_buffer.pop(id(buffer), None)
        if names is None:
            continue
        if is_dtensor(buffer) and any(is_sharding(placement) for placement in buffer.placements):
            raise CheckpointError(f"The buffer {names[0]} is a sharded DTensor; buffers must be whole on every rank.")
        found[names[0]] = Held(names[0], tuple(names[1:]), buffer, Share.whole(tuple(buffer.shape)), first)
    return found


def buffer_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Of every buffer, at all its places: its name, its owner and its name there."""
    for prefix, module in model.named_modules():
        for attribute, _ in module.named_buffers(recurse=False):
            yield plain_name(f"{prefix}.{attribute}" if prefix else attribute), module, attribute
