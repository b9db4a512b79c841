"""What is read off DTensor parameters: local parts, placements, and which axes of a layout their meshes are.

DTensors are told by their attributes, so that models without any need not load them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foldpar.errors import FamilyError
from foldpar.groups import FoldedGroups
from foldpar.layout import AXES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs

__all__ = ["MeshAxes", "MeshDim", "communication_device", "is_dtensor", "local_tensor", "partial_dimension"]


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether this is a ``DTensor``."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor


def communication_device(shard: Tensor) -> torch.device:
    """Where collectives over a shard of ``shard_model`` run: its own device, or its mesh's where it is offloaded to the
    host."""
    if is_dtensor(shard) and shard.device_mesh.device_type != shard.device.type:
        kind = shard.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return shard.device


def partial_dimension(tensor: Tensor) -> str | None:
    """The mesh dimension (of more than one rank) over which a DTensor is an unfinished sum, if there is one."""
    if is_dtensor(tensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_partial() and tensor.device_mesh.size(dim) > 1:
                return _dim_name(tensor.device_mesh, dim) or str(dim)
    return None


@dataclass(frozen=True, slots=True)
class MeshDim:
    """One dimension of a DTensor's mesh: the placement on it and the axes that it can be."""

    number: int
    name: str | None
    ranks: tuple[int, ...]
    axes: frozenset[str]
    placement: Placement

    def __str__(self) -> str:
        called = f"mesh dimension {self.name!r}, " if self.name else ""
        return f"{called}ranks {self.ranks}"


class MeshAxes:
    """Which axes of a layout the dimensions of DTensor meshes are; looked up once per mesh."""

    def __init__(self) -> None:
        self._known: dict[tuple[FoldedGroups, DeviceMesh, int], tuple[tuple[int, ...], frozenset[str]]] = {}

    def dims(self, tensor: DTensor, groups: FoldedGroups) -> list[MeshDim]:
        """The mesh dimensions of more than one rank."""
        mesh, dims = tensor.device_mesh, []
        for dim, placement in enumerate(tensor.placements):
            if mesh.size(dim) > 1:
                if (groups, mesh, dim) not in self._known:
                    self._known[groups, mesh, dim] = self._look_up(groups, mesh, dim)
                ranks, axes = self._known[groups, mesh, dim]
                dims.append(MeshDim(dim, _dim_name(mesh, dim), ranks, axes, placement))
        return dims

    def _look_up(self, groups: FoldedGroups, mesh: DeviceMesh, dim: int) -> tuple[tuple[int, ...], frozenset[str]]:
        here = mesh.get_coordinate()
        if here is None:
            return (), frozenset()
        row: tuple[int | slice, ...] = (*here[:dim], slice(None), *here[dim + 1 :])
        ranks = tuple(mesh.mesh[row].tolist())
        name = _dim_name(mesh, dim)
        axes = frozenset(axis for axis in AXES if sorted(groups.axis(axis).ranks) == sorted(ranks))
        if name == "tp" and "tp" not in axes:
            raise FamilyError(
                f"A parameter is a DTensor on a mesh whose dimension 'tp' has the ranks {ranks}, but the tp group of "
                f"these groups has the ranks {groups.tp.ranks}. Build the mesh with groups.mesh('dense')['tp']."
            )
        return ranks, frozenset({name}) if name in axes else axes


def _dim_name(mesh: DeviceMesh, dim: int) -> str | None:
    return mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else None
