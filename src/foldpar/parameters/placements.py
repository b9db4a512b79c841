"""Where the parameters of a model lie over the ranks: integers, read off DTensors or told by marks.

What a wrapper such as FSDP2 shards is a chunk of what the rank held before:

    [E, 2I, D]  --experts over ep, hidden units over etp-->  [E/ep, 2I/etp, D]  --rows over edp-->  local tensor

Files know gate and up as one dimension; experts sliced over etp hold them apart, ``[E, 2, I, D]``. A placement speaks
of the former shape, in which the share of a rank is two blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from foldpar.comm import FoldedGroups, MeshAxes, MeshDim, is_dtensor, local_tensor, partial_dimension
from foldpar.errors import FamilyError
from foldpar.families import ParameterFamily
from foldpar.layout import AXES, Axis
from foldpar.parameters.boxes import Share
from foldpar.parameters.marks import ResolvedParameter, resolve_parameters

__all__ = ["HasParameterShares", "Placement", "mark_placement", "parameter_placements", "plain_name"]

_MARK = "_foldpar_placement"
_MARKS_BY_NAME = "_foldpar_placement_of_name"
_Target = TypeVar("_Target", bound="nn.Module | nn.Parameter")


@runtime_checkable
class HasParameterShares(Protocol):
    """A module that knows where its own parameters lie, by their names in it; before anything else shards them."""

    def parameter_shares(self) -> Mapping[str, Share]:
        """The share of each of the module's own parameters; those that are not named are whole."""


@runtime_checkable
class HasPairs(Protocol):
    """A module some of whose own parameters hold in two dimensions what files hold in one, such as experts over etp."""

    @property
    def pairs(self) -> Mapping[str, int]:
        """Own name -> the first of the two dimensions."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one parameter lies: this rank's share, and which of its equal copies this rank holds.

    ``replica`` counts the copies over the axes of the family that hold replicas, as far as no wrapper shards over them.
    """

    name: str
    aliases: tuple[str, ...]
    """Further names of a tied parameter."""
    parameter: nn.Parameter
    family: ParameterFamily
    share: Share
    replica: int
    replicas: int
    pair: int | None = None
    """Of a parameter with a dimension for a pair, which one it is; the share is that of the tensor without it."""

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that lies like the parameter, in the shape of the share; shares the memory."""
        own = local_tensor(tensor)
        return own if self.pair is None else own.flatten(self.pair, self.pair + 1)


@dataclass(frozen=True, slots=True)
class _Mark:
    """What :func:`mark_placement` was told."""

    dims: int | tuple[tuple[Axis, int], ...]
    parts: int
    size: int | None


def mark_placement(
    target: _Target,
    dims: int | Mapping[Axis, int],
    *,
    parts: int = 1,
    size: int | None = None,
    names: Iterable[str] | None = None,
) -> _Target:
    """Say which dimension of a parameter sliced by hand is cut over which axis; returns the target.

    Needed where a family has shard axes but the parameter is a plain tensor of a module that foldpar does not know:
    the numbers do not show which dimension was cut. DTensors, those of experts among them, need no mark.

    Args:
        target: the parameter, or the module that owns it. A mark on a module stays when a wrapper replaces parameters.
        dims: the dimension that is cut over the only shard axis of the family (tp, for ``DENSE_SHARDED``), or a
            dimension for each axis, such as ``{"ep": 0, "etp": 2}``.
        parts: the dimension of tp or etp holds this many sections (gate above up: 2), each of which is cut.
        size: the global length of that dimension, where it is cut unevenly, as ``torch.chunk`` cuts.
        names: mark only these of the module's own parameters.

    Example:
        >>> head = mark_placement(nn.Linear(4, 8, bias=False), 0)   # this lane's columns of a head

    Raises:
        FamilyError: the target is no module and no parameter, or has no parameter of such a name.
    """
    if not isinstance(target, (nn.Module, nn.Parameter)):
        raise FamilyError(f"mark_placement marks a torch.nn.Module or a Parameter, not a {type(target).__name__}.")
    unknown = [axis for axis in ([] if isinstance(dims, int) else dims) if axis not in AXES]
    if unknown:
        raise FamilyError(f"mark_placement: {unknown[0]!r} is not an axis: it can be {', '.join(AXES)}.")
    mark = _Mark(dims if isinstance(dims, int) else tuple(dims.items()), parts, size)
    if isinstance(target, nn.Parameter):
        setattr(target, _MARK, mark)
        return target
    own = dict(target.named_parameters(recurse=False))
    chosen = tuple(own) if names is None else (names,) if isinstance(names, str) else tuple(names)
    missing = [name for name in chosen if name not in own]
    if missing or not chosen:
        raise FamilyError(
            f"mark_placement: the own parameters of this {type(target).__name__} are {', '.join(own) or 'none'}"
            f"{f', and names has {missing[0]!r}' if missing else ''}. For a parameter of a child, mark the child."
        )
    setattr(target, _MARKS_BY_NAME, {**getattr(target, _MARKS_BY_NAME, {}), **dict.fromkeys(chosen, mark)})
    return target


def parameter_placements(model: nn.Module, groups: FoldedGroups) -> list[Placement]:
    """Where every parameter of the model lies, in the order of the model; a tied parameter appears once.

    Nothing is communicated. Decided by, in this order: the module's own ``parameter_shares()``
    (:class:`HasParameterShares`), :func:`mark_placement`; a plain tensor whose family has no shard axes is whole. A
    DTensor is then cut further by its placements: over tp, ep and etp first, then over data ranks.

    Example:
        >>> from foldpar import create_groups, solve_layout
        >>> [placement] = parameter_placements(nn.Linear(3, 2, bias=False), create_groups(solve_layout(1)))
        >>> placement.name, placement.share.boxes, placement.replicas
        ('weight', (Box(offsets=(0, 0), sizes=(2, 3), starts=(0, 0)),), 1)

    Raises:
        FamilyError: a parameter is sharded over an axis in a way that cannot be known; the text says how to tell it.
            A family is unknown or contradicted (:func:`~foldpar.parameter_families`).
    """
    resolved = resolve_parameters(model, groups)  # first, since it brings shards back in place of whole parameters
    axes_of, names_of, owners = MeshAxes(), _names(model), _owners(model)
    found = []
    for entry in resolved:
        name, *aliases = names_of[id(entry.parameter)]
        owner, attribute = owners[id(entry.parameter)]
        dims = axes_of.dims(entry.parameter, entry.groups) if is_dtensor(entry.parameter) else []
        pair = owner.pairs.get(attribute) if isinstance(owner, HasPairs) else None
        share = _share(name, entry, owner, attribute, dims, pair)
        replica, replicas = _replica(entry)
        found.append(Placement(name, tuple(aliases), entry.parameter, entry.family, share, replica, replicas, pair))
    return found


def plain_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and activation checkpointing put into it."""
    for inserted in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(inserted, "")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# What a rank held before a wrapper sharded it, and what it holds then.


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Parameter -> its names, the first one first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return names


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Parameter -> the first module that owns it, and its name there."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), (module, attribute))
    return owners


def _share(
    name: str, entry: ResolvedParameter, owner: nn.Module, attribute: str, dims: list[MeshDim], pair: int | None
) -> Share:
    parameter, family, groups = entry.parameter, entry.family, entry.groups
    _check_not_partial(name, parameter)
    cuts = [dim for dim in dims if not dim.placement.is_replicate()]
    of_mesh = {axis for dim in cuts for axis in _axes_of(name, dim, family, groups)}
    shape = _joined(tuple(parameter.shape), pair)
    share = _told(owner, attribute, parameter, family, groups)
    if share is None:
        unknown = [axis for axis in family.shard_axes if groups.axis(axis).size > 1 and axis not in of_mesh]
        if unknown:
            raise FamilyError(_unknown_text(name, family, unknown, shape))
        share = Share.whole(shape)
    if share.local != shape:
        raise FamilyError(
            f"{name} has the shape {list(shape)} on this rank, but by what {type(owner).__name__} says of it, it "
            f"should have {list(share.local)}, of the global {list(share.shape)}. "
            f"Correct the mark or parameter_shares()."
        )
    # Data axes are cut last, whatever the order of mesh dimensions: FSDP2 shards what the other axes left.
    for dim in sorted(cuts, key=lambda dim: (family.data_axis in _axes_of(name, dim, family, groups), dim.number)):
        place, parts = _without_pair(dim.placement.dim, pair)  # type: ignore[attr-defined]
        share = share.cut(place, *_coordinate(parameter, dim), parts=parts)
    local = _joined(tuple(local_tensor(parameter).shape), pair)
    if share.local != local and prod(share.local) + prod(local):
        raise FamilyError(
            f"{name} is a DTensor whose local part has the shape {list(local)}; by its placements "
            f"{[str(dim.placement) for dim in dims]} it should have {list(share.local)}. Its place in the global "
            f"tensor cannot be told."
        )
    return share


def _told(
    owner: nn.Module, attribute: str, parameter: nn.Parameter, family: ParameterFamily, groups: FoldedGroups
) -> Share | None:
    """What the owner or a mark says; None if neither says anything."""
    if isinstance(owner, HasParameterShares):
        return owner.parameter_shares().get(attribute)
    mark: _Mark | None = getattr(parameter, _MARK, None) or getattr(owner, _MARKS_BY_NAME, {}).get(attribute)
    return None if mark is None else _marked(mark, tuple(parameter.shape), family, groups)


def _joined(shape: tuple[int, ...], pair: int | None) -> tuple[int, ...]:
    """A shape without its dimension for a pair: of ``[E, 2, I, H]``, ``[E, 2 * I, H]``."""
    return shape if pair is None else (*shape[:pair], shape[pair] * shape[pair + 1], *shape[pair + 2 :])


def _without_pair(dim: int, pair: int | None) -> tuple[int, int]:
    """Where a dimension lies once the pair is joined, and in how many sections it is cut there."""
    if pair is None or dim <= pair:
        return dim, 1
    return dim - 1, 2 if dim == pair + 1 else 1


def _marked(mark: _Mark, local: tuple[int, ...], family: ParameterFamily, groups: FoldedGroups) -> Share:
    if isinstance(mark.dims, int):
        if not family.shard_axes and groups.layout.tp == 1:
            return Share.whole(local)  # with one lane nothing is cut, and the family may not say that it could be
        if len(family.shard_axes) != 1:
            raise FamilyError(
                f"mark_placement was given dims = {mark.dims}, but family {family.name!r} has the shard axes "
                f"{family.shard_axes}: say which dimension is cut over which, such as {{'ep': 0, 'etp': 2}}."
            )
        dims: tuple[tuple[Axis, int], ...] = ((family.shard_axes[0], mark.dims),)
    else:
        dims = mark.dims
    shape = list(local)
    for axis, dim in dims:
        whole = shape[dim] * groups.axis(axis).size
        shape[dim] = whole if mark.size is None or (axis == "ep" and len(dims) > 1) else mark.size
    share = Share.whole(tuple(shape))
    for axis, dim in dims:
        group, parts = groups.axis(axis), mark.parts if axis in ("tp", "etp") else 1
        share = share.cut(dim, group.size, group.index, parts=parts) if group.size > 1 else share
    return share


def _axes_of(name: str, dim: MeshDim, family: ParameterFamily, groups: FoldedGroups) -> tuple[Axis, ...]:
    """The axes of the family that a mesh dimension is, found by its ranks."""
    if family.data_axis in dim.axes:
        return (family.data_axis,)
    axes = (*family.shard_axes, *family.replica_axes)
    for axis in axes:
        if sorted(groups.axis(axis).ranks) == sorted(dim.ranks):
            return (axis,)
    if family.view == "expert" and sorted(groups.ep_etp.ranks) == sorted(dim.ranks):
        return ("ep", "etp")
    known = "; ".join(f"{axis} {groups.axis(axis).ranks}" for axis in axes)
    raise FamilyError(
        f"{name} is a DTensor sharded over {dim}, which is none of the axes of its family {family.name!r} ({known}), "
        f"so which part of the tensor lies where cannot be told. Shard it over a mesh made of these groups."
    )


def _coordinate(parameter: Any, dim: MeshDim) -> tuple[int, int]:
    """How many ranks a mesh dimension has, and which of them this one is, in the mesh's own order."""
    return parameter.device_mesh.size(dim.number), parameter.device_mesh.get_coordinate()[dim.number]


def _replica(entry: ResolvedParameter) -> tuple[int, int]:
    """Which copy this rank holds, and how many there are."""
    replica, replicas = 0, 1
    for group in entry.replica_groups:
        replica, replicas = replica * group.size + group.index, replicas * group.size
    return replica, replicas


def _check_not_partial(name: str, tensor: Tensor) -> None:
    dimension = partial_dimension(tensor)
    if dimension is not None:
        raise FamilyError(
            f"{name} is a DTensor that is still partial over mesh dimension {dimension!r}: it has no value before it "
            f"is summed, so none can be saved. Redistribute it to Shard or Replicate."
        )


def _unknown_text(name: str, family: ParameterFamily, unknown: list[Axis], shape: tuple[int, ...]) -> str:
    dims = "0" if len(family.shard_axes) == 1 else "{'ep': 0, 'etp': 2}"
    return (
        f"{name} is a plain tensor {list(shape)} of family {family.name!r}, which is sharded over "
        f"{' and '.join(unknown)}, but which dimension was cut cannot be seen. Say it, on the module that owns the "
        f"parameter, with the dimensions that are yours:\n"
        f"    mark_placement(module, {dims}, names=({name.rpartition('.')[2]!r},))\n"
        f"or give the module a method parameter_shares() that returns a foldpar.parameters.boxes.Share for each."
    )
