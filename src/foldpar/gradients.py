"""Which family every parameter has, and the reduction of all gradients by family, once, after backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from foldpar.collectives import all_reduce_
from foldpar.errors import FamilyError, ShapeError
from foldpar.factors import gradient_factor, loss_factor
from foldpar.families import DENSE_SHARDED, REPLICATED, ParameterFamily, Reduction
from foldpar.groups import AxisGroup, FoldedGroups
from foldpar.layout import AXES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs

__all__ = ["BUCKET_BYTES", "mark_parameters", "parameter_families", "parameter_groups", "reduce_gradients"]

BUCKET_BYTES = 64 * 2**20
"""A bucket is closed before it would exceed this size; a larger gradient has a bucket of its own."""

_MARK = "_foldpar_family"
_Target = TypeVar("_Target", bound="nn.Module | nn.Parameter")


def mark_parameters(target: _Target, family: ParameterFamily) -> _Target:
    """Declare the family of a parameter, or of all parameters of a module and its children; returns the target.

    The nearest mark wins, in whatever order marks are made: the parameter's own, then that of the module that owns
    it, then of the modules around that. So a mark on the whole model is a default, which the marks inside (those that
    ``FoldedMoE`` makes, for example) override. A module keeps its mark when it is copied and when its parameters are
    replaced; a mark on a parameter belongs to that tensor.

    Example:
        >>> from foldpar import families
        >>> model = mark_parameters(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), families.REPLICATED)
        >>> head = mark_parameters(model[0], families.REPLICATED_PARTIAL)

    Raises:
        FamilyError: the target is no module and no parameter, or the family is no ``ParameterFamily``.
    """
    if not isinstance(target, (nn.Module, nn.Parameter)):
        raise FamilyError(f"mark_parameters marks a torch.nn.Module or a Parameter, not a {type(target).__name__}.")
    if not isinstance(family, ParameterFamily):
        raise FamilyError(
            f"mark_parameters takes a ParameterFamily, not {family!r}: one of foldpar.families, such as "
            f"families.REPLICATED, or your own."
        )
    setattr(target, _MARK, family)
    return target


def parameter_families(model: nn.Module, groups: FoldedGroups) -> dict[str, ParameterFamily]:
    """The one family of every parameter, frozen ones included, by name; a tied parameter appears once.

    Decided by, in this order:

    1. *DTensor*: a parameter sharded over tp is ``DENSE_SHARDED``, whatever the default around it says.
    2. *The nearest mark*, see :func:`mark_parameters`.
    3. *Without a mark*: ``REPLICATED`` where ``tp = 1``, since there are no lanes to tell apart. Otherwise an error:
       whether a lane's gradient is whole or a part of a sum cannot be seen, and is never guessed.

    Example:
        >>> from foldpar.groups import create_groups
        >>> from foldpar.layout import solve_layout
        >>> families = parameter_families(nn.Linear(4, 4, bias=False), create_groups(solve_layout(1)))
        >>> {name: family.name for name, family in families.items()}
        {'weight': 'replicated'}

    Raises:
        FamilyError: a parameter has no mark and ``tp > 1``; a tied parameter is marked in two ways; a DTensor's
            placement contradicts the mark on the parameter or on the module that owns it.
    """
    return {name: family for name, _, family in resolve_families(model, groups)}


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one per family, with DTensors apart from plain tensors.

    Fused optimizers fail on a group that mixes plain and DTensor parameters, or DTensors of two meshes. Each group
    has ``"params"`` (those that require a gradient, a tied one once) and ``"family"``, the family's name by the rules
    of :func:`parameter_families` as far as they can be told without groups; ``"unmarked"`` where there is no mark.
    Other options can be added before the optimizer is made.

    Example:
        >>> from foldpar import families
        >>> model = nn.Sequential(nn.Linear(4, 4), mark_parameters(nn.LayerNorm(4), families.REPLICATED))
        >>> [(group["family"], len(group["params"])) for group in parameter_groups(model)]
        [('unmarked', 2), ('replicated', 2)]
        >>> optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1)
    """
    members: dict[tuple[str, DeviceMesh | None], list[nn.Parameter]] = {}
    for use in _first_uses(model):
        if use.parameter.requires_grad:
            mesh = use.parameter.device_mesh if is_dtensor(use.parameter) else None
            members.setdefault((_label(use), mesh), []).append(use.parameter)
    return [{"params": parameters, "family": label} for (label, _), parameters in members.items()]


def reduce_gradients(
    model: nn.Module,
    groups: FoldedGroups,
    *,
    loss: Literal["mean", "sum"] = "mean",
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Make every ``.grad`` the gradient of the step's loss, in place. Call it once, on every rank, after backward.

    Over the lanes by family (summed, averaged or left), then summed over the data axis (``dp_cp``, or ``edp`` for
    experts), times the factor of ``loss``. Under gradient accumulation call it at the boundary only, when gradients
    are complete: a second call on the same gradients reduces them twice.

    Args:
        model: frozen parameters are skipped. A parameter without a gradient here takes part with zeros and receives
            the result where any rank it is reduced with has a gradient; with none anywhere, its ``.grad`` stays None.
        groups: those that the model was built with.
        loss: ``"mean"``: each rank's loss is the mean of its own batch. ``"sum"``: each rank has divided its loss by
            the global token count already, the right choice for ragged batches.
        reduce_dtype: the dtype of the buckets, kept from the first sum to the last; by default each gradient's own.
            ``torch.float32`` makes a sum of bf16 gradients round once.

    Example, with 2 lanes and 2 data-parallel ranks, gradients of one parameter on ranks 0 to 3::

        grads 1 1 5 5, REPLICATED          -> (1 + 1 + 5 + 5) / 2 / 2 = 3      on all ranks
        grads 1 2 3 4, REPLICATED_PARTIAL  -> (1 + 2 + 3 + 4) / 2 = 5          on all ranks
        grads 1 2 3 4, DENSE_SHARDED       -> (1 + 3) / 2 = 2 and (2 + 4) / 2 = 3, per lane

    A DTensor gradient that is partial over tp is summed over tp, whatever the mark: it declares its state.

    Raises:
        FamilyError: a family is unknown or contradicted, see :func:`parameter_families`.
        ShapeError: a gradient is sparse. ValueError: ``loss`` is neither ``"mean"`` nor ``"sum"``.

    Source: the tables of :mod:`foldpar.families` and :func:`foldpar.factors.loss_factor`.
    """
    loss_factor(groups.layout, loss)  # refuses an unknown loss for a model without parameters too
    pieces = _pieces(model, groups, loss, reduce_dtype)
    with torch.no_grad():
        _scale([(piece.gradient, piece.factor) for piece in pieces if not piece.travels])
        travellers = sorted((piece for piece in pieces if piece.travels), key=lambda piece: (piece.kind, piece.name))
        for _, same_kind in groupby(travellers, key=lambda piece: piece.kind):
            for bucket in _buckets(list(same_kind)):
                _reduce_bucket(bucket)
        for piece in pieces:
            _settle(piece.parameter)


# ---------------------------------------------------------------------------------------------------------------------
# Families of a model.


@dataclass(frozen=True, slots=True)
class _Use:
    """A parameter at one of its places in the model."""

    name: str
    parameter: nn.Parameter
    explicit: ParameterFamily | None
    """The mark on the parameter itself or on the module that owns it."""
    inherited: ParameterFamily | None
    """The nearest mark on a module further out."""


def _uses(module: nn.Module, prefix: str = "", inherited: ParameterFamily | None = None) -> Iterator[_Use]:
    own: ParameterFamily | None = getattr(module, _MARK, None)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield _Use(prefix + name, parameter, getattr(parameter, _MARK, None) or own, inherited)
    for name, child in module.named_children():
        yield from _uses(child, f"{prefix}{name}.", own or inherited)


def _first_uses(model: nn.Module) -> list[_Use]:
    first: dict[int, _Use] = {}
    for use in _uses(model):
        first.setdefault(id(use.parameter), use)
    return list(first.values())


def resolve_families(model: nn.Module, groups: FoldedGroups) -> list[tuple[str, nn.Parameter, ParameterFamily]]:
    """``(name, parameter, family)`` of every parameter, each once; see :func:`parameter_families`."""
    axes_of = _MeshAxes(groups)
    uses_of: dict[int, list[_Use]] = {}
    for use in _uses(model):
        uses_of.setdefault(id(use.parameter), []).append(use)
    resolved, unmarked = [], []
    for uses in uses_of.values():
        found = [(use, family) for use in uses if (family := _family_of(use, axes_of)) is not None]
        for use, family in found[1:]:
            if replace(family, name="") != replace(found[0][1], name=""):
                raise FamilyError(_two_families(found[0][0], found[0][1], use, family))
        if found:
            resolved.append((uses[0].name, uses[0].parameter, found[0][1]))
        else:
            unmarked.append(uses[0].name)
    if unmarked:
        raise FamilyError(_no_family(unmarked, groups.layout.tp))
    return resolved


def _family_of(use: _Use, axes_of: _MeshAxes) -> ParameterFamily | None:
    family = use.explicit or use.inherited or (REPLICATED if axes_of.groups.layout.tp == 1 else None)
    if not is_dtensor(use.parameter):
        return family
    dims = axes_of.placements(use.parameter)
    shards_over_tp = any("tp" in dim.axes and dim.placement.is_shard() for dim in dims)
    overridable = family is None or (family.view == "dense" and "tp" not in family.shard_axes)
    if shards_over_tp and overridable and use.explicit is None:
        family = DENSE_SHARDED
    if family is not None:
        _check_placements(use.name, family, dims)
    return family


def _check_placements(name: str, family: ParameterFamily, dims: list[_MeshDim]) -> None:
    shard_axes = set(family.shard_axes) | ({"ep_etp"} if {"ep", "etp"} <= set(family.shard_axes) else set())
    for dim in dims:
        if dim.placement.is_shard() and not shard_axes & dim.axes:
            raise FamilyError(
                f"{name} is a DTensor sharded over {dim}, but its family {family.name!r} has the shard axes "
                f"{family.shard_axes}. One of the two is wrong, and reducing by either would be a guess. Remove the "
                f"mark, or mark it with the family of its placement (families.DENSE_SHARDED over tp). Where a wrapper "
                f"such as FSDP2 shards a parameter over data-parallel ranks, it reduces the gradient too: do not "
                f"reduce it again."
            )
        if dim.placement.is_replicate() and "tp" in dim.axes and "tp" in family.shard_axes:
            raise FamilyError(
                f"{name} is a DTensor replicated over {dim}, but its family {family.name!r} shards over tp: its norm "
                f"would be counted once per lane. Mark the parameter itself, for example mark_parameters(parameter, "
                f"families.REPLICATED), which is right for the bias of a row-wise sharded layer."
            )


def _label(use: _Use) -> str:
    if use.explicit is None and is_dtensor(use.parameter):
        names = use.parameter.device_mesh.mesh_dim_names or ()
        if any(name == "tp" and dim.is_shard() for name, dim in zip(names, use.parameter.placements, strict=False)):
            return DENSE_SHARDED.name
    family = use.explicit or use.inherited
    return family.name if family is not None else "unmarked"


def _two_families(first: _Use, first_family: ParameterFamily, second: _Use, second_family: ParameterFamily) -> str:
    return (
        f"One parameter has two families: as {first.name} it is {first_family.name!r}, as {second.name} it is "
        f"{second_family.name!r}. Its gradient is one sum of both uses, so no single reduction fits two states. Bring "
        f"both uses to one state (copy_to_group(weight) at the use whose gradient is partial), then mark the "
        f"parameter itself, which goes for both names: mark_parameters(parameter, families.REPLICATED)."
    )


def _no_family(names: list[str], tp: int) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    subject = "1 parameter has" if len(names) == 1 else f"{len(names)} parameters have"
    return (
        f"{subject} no family: {shown}. With tp = {tp}, a lane's gradient of such a parameter can be whole, a part "
        f"of a sum, or that of other elements. Nothing in the numbers shows which, and the wrong reduction silently "
        f"trains another model, so it is not guessed. Say it in one line, for the model as a default or for a module "
        f"inside:\n"
        f"    mark_parameters(model, families.REPLICATED)            whole: used on all rows (norms, embeddings)\n"
        f"    mark_parameters(module, families.REPLICATED_PARTIAL)   a part: own rows or own heads, sharded lanes\n"
        f"    mark_parameters(module, families.DENSE_SHARDED)        other elements: a TP slice"
    )


# ---------------------------------------------------------------------------------------------------------------------
# DTensor, told by its attributes, so that models without it need not load it.


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether this is a ``DTensor``."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor


def partial_dimension(tensor: Tensor) -> str | None:
    """The mesh dimension (of more than one rank) over which a DTensor is an unfinished sum, if there is one."""
    if is_dtensor(tensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_partial() and tensor.device_mesh.size(dim) > 1:
                return _dim_name(tensor.device_mesh, dim) or str(dim)
    return None


@dataclass(frozen=True, slots=True)
class _MeshDim:
    """One dimension of a DTensor's mesh: the placement on it and the axes that it can be."""

    name: str | None
    ranks: tuple[int, ...]
    axes: frozenset[str]
    placement: Placement

    def __str__(self) -> str:
        called = f"mesh dimension {self.name!r}, " if self.name else ""
        return f"{called}ranks {self.ranks}"


class _MeshAxes:
    """Which axes of the layout the dimensions of DTensor meshes are; looked up once per mesh."""

    def __init__(self, groups: FoldedGroups) -> None:
        self.groups = groups
        self._known: dict[tuple[DeviceMesh, int], tuple[tuple[int, ...], frozenset[str]]] = {}

    def placements(self, tensor: DTensor) -> list[_MeshDim]:
        """The mesh dimensions of more than one rank."""
        mesh, dims = tensor.device_mesh, []
        for dim, placement in enumerate(tensor.placements):
            if mesh.size(dim) > 1:
                if (mesh, dim) not in self._known:
                    self._known[mesh, dim] = self._look_up(mesh, dim)
                ranks, axes = self._known[mesh, dim]
                dims.append(_MeshDim(_dim_name(mesh, dim), ranks, axes, placement))
        return dims

    def _look_up(self, mesh: DeviceMesh, dim: int) -> tuple[tuple[int, ...], frozenset[str]]:
        here = mesh.get_coordinate()
        if here is None:
            return (), frozenset()
        row: tuple[int | slice, ...] = (*here[:dim], slice(None), *here[dim + 1 :])
        ranks = tuple(mesh.mesh[row].tolist())
        name = _dim_name(mesh, dim)
        axes = frozenset(axis for axis in AXES if sorted(self.groups.axis(axis).ranks) == sorted(ranks))
        if name == "tp" and "tp" not in axes:
            raise FamilyError(
                f"A parameter is a DTensor on a mesh whose dimension 'tp' has the ranks {ranks}, but the tp group of "
                f"these groups has the ranks {self.groups.tp.ranks}. Build the mesh with groups.mesh('dense')['tp']."
            )
        return ranks, frozenset({name}) if name in axes else axes


def _dim_name(mesh: DeviceMesh, dim: int) -> str | None:
    return mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else None


# ---------------------------------------------------------------------------------------------------------------------
# Reduction.


@dataclass(frozen=True, slots=True)
class _Piece:
    """One parameter on its way through a bucket; tensors are local parts that share their memory."""

    name: str
    parameter: nn.Parameter
    values: Tensor
    gradient: Tensor | None
    factor: float
    lane: AxisGroup | None
    """The group of the lane reduction; None where there is none."""
    data: AxisGroup
    dtype: torch.dtype

    @property
    def travels(self) -> bool:
        return self.lane is not None or self.data.size > 1

    @property
    def kind(self) -> tuple[str, str, str]:
        """What the pieces of one bucket have in common; sorts equally on all ranks."""
        return (self.data.axis, str(self.dtype), str(self.values.device))


def _pieces(
    model: nn.Module, groups: FoldedGroups, loss: Literal["mean", "sum"], reduce_dtype: torch.dtype | None
) -> list[_Piece]:
    axes_of, pieces = _MeshAxes(groups), []
    for name, parameter, declared in resolve_families(model, groups):
        if not parameter.requires_grad:
            continue
        grad = parameter.grad
        if grad is not None and grad.layout is not torch.strided:
            raise ShapeError(
                f"The gradient of {name} is sparse ({grad.layout}). Buckets are dense: build the embedding with "
                f"sparse=False."
            )
        family = _as_placed(parameter, declared, axes_of)
        grad = parameter.grad
        pieces.append(
            _Piece(
                name,
                parameter,
                values=local_tensor(parameter.detach()),
                gradient=None if grad is None else local_tensor(grad),
                factor=float(gradient_factor(family, groups.layout, loss)),
                lane=_lane_of(family, groups),
                data=groups.axis(family.data_axis),
                dtype=reduce_dtype or _gradient_dtype(parameter),
            )
        )
    return pieces


def _lane_of(family: ParameterFamily, groups: FoldedGroups) -> AxisGroup | None:
    if family.lane_axis is None or family.reduction not in (Reduction.SUM, Reduction.AVERAGE):
        return None
    lane = groups.axis(family.lane_axis)
    return lane if lane.size > 1 else None


def _gradient_dtype(parameter: nn.Parameter) -> torch.dtype:
    if parameter.grad is not None:
        return parameter.grad.dtype
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", None)
    return dtype or parameter.dtype


def _as_placed(parameter: nn.Parameter, family: ParameterFamily, axes_of: _MeshAxes) -> ParameterFamily:
    """The family, with the lane reduction that a DTensor gradient asks for."""
    if not is_dtensor(parameter):
        return family
    dims = axes_of.placements(parameter)
    over_lanes = [dim for dim in dims if family.lane_axis in dim.axes and dim.placement.is_replicate()]
    if over_lanes and family.reduction is Reduction.SKIP:
        # A rank without a gradient cannot know whether it is partial elsewhere, so such copies always meet.
        family = replace(family, reduction=Reduction.AVERAGE)
    grad = parameter.grad
    if grad is None or not is_dtensor(grad):
        return family
    # A DTensor gradient is one global tensor, so placing it like its parameter is always right; a batch without tokens,
    # for example, leaves shards in other places. What is partial over the lanes stays so and is summed in a bucket.
    wanted = [
        given if given.is_partial() and dim in over_lanes else dim.placement
        for dim, given in zip(dims, grad.placements, strict=True)
    ]
    if wanted != list(grad.placements):
        parameter.grad = grad.redistribute(placements=wanted)
    for dim, given in zip(dims, grad.placements, strict=True):
        if dim in over_lanes and given != dim.placement:  # DTensor declares the state, whatever the mark
            summand = given.is_partial() and getattr(given, "reduce_op", "sum") == "sum"
            family = replace(family, reduction=Reduction.SUM if summand else Reduction.AVERAGE)
    return family


def _scale(factor_of: list[tuple[Tensor | None, float]]) -> None:
    scaled = [(tensor, factor) for tensor, factor in factor_of if tensor is not None and factor != 1]
    if scaled:
        torch._foreach_mul_([tensor for tensor, _ in scaled], [factor for _, factor in scaled])


def _buckets(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Cut into buckets, those with a lane reduction first.

    Lane-reduced pieces are equal in size on all lanes; others, such as uneven shards, need not be. With the former in
    front, lanes cut alike as far as they communicate.
    """
    bucket: list[_Piece] = []
    room = 0
    for piece in sorted(pieces, key=lambda piece: piece.lane is None):
        size = piece.values.numel() * piece.dtype.itemsize
        if bucket and size > room:
            yield bucket
            bucket = []
        room = room - size if bucket else BUCKET_BYTES - size
        bucket.append(piece)
    if bucket:
        yield bucket


def _reduce_bucket(pieces: list[_Piece]) -> None:
    """Copy in, scale, sum over the lanes, sum over the data axis, copy out.

    Behind the gradients that meet over the lanes stands a flag per piece, 1 where this rank has a gradient, so that
    flags are summed over just the ranks that their gradients are::

        | gradients, over lanes | flags, over lanes | other flags | other gradients |
        |<------ sum over the lane axis ----------->|                               |
        |<------------------------- sum over the data axis ------------------------>|

    Every factor is multiplied in before the sums, once, so that a rank without a gradient needs to know none, and so
    that fp16 sums stay in range.
    """
    lanes = [piece.lane for piece in pieces if piece.lane is not None]
    sizes = [piece.values.numel() for piece in pieces]
    end_of_lanes = sum(sizes[: len(lanes)]) + len(lanes)
    sizes.insert(len(lanes), len(pieces))
    flat = torch.zeros(sum(sizes), dtype=pieces[0].dtype, device=pieces[0].values.device)
    chunks = list(torch.split(flat, sizes))
    flags = chunks.pop(len(lanes)).fill_(1)
    slots = [chunk.view(piece.values.shape) for chunk, piece in zip(chunks, pieces, strict=True)]
    missing = [place for place, piece in enumerate(pieces) if piece.gradient is None]

    for place in missing:
        flags[place] = 0
    gradients = [piece.gradient for piece in pieces if piece.gradient is not None]
    own_slots = [slot for slot, piece in zip(slots, pieces, strict=True) if piece.gradient is not None]
    if gradients:
        torch._foreach_copy_(own_slots, gradients)
    _scale([(slot, piece.factor) for slot, piece in zip(slots, pieces, strict=True) if piece.gradient is not None])
    if lanes:
        all_reduce_(flat[:end_of_lanes], lanes[0])
    all_reduce_(flat, pieces[0].data)
    if gradients:
        torch._foreach_copy_(gradients, own_slots)
    if missing:
        somewhere = (flags[missing] != 0).tolist()
        for place in (place for place, found in zip(missing, somewhere, strict=True) if found):
            _receive(pieces[place].parameter, slots[place])


def _receive(parameter: nn.Parameter, reduced: Tensor) -> None:
    """Give a parameter that had no gradient here the one that others had."""
    parameter.grad = torch.zeros_like(parameter)
    local_tensor(parameter.grad).copy_(reduced)


def _settle(parameter: nn.Parameter) -> None:
    """Let a DTensor gradient that was a partial sum over tp say that it is whole now."""
    grad = parameter.grad
    if grad is not None and is_dtensor(grad) and is_dtensor(parameter) and partial_dimension(grad) is not None:
        parameter.grad = type(grad).from_local(
            local_tensor(grad),
            grad.device_mesh,
            parameter.placements,
            run_check=False,
            shape=grad.shape,
            stride=grad.stride(),
        )
