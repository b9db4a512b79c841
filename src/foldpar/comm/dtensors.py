"""DTensor parameters: how one is made of a rank's part, its parts in a forward, its placements and axes.

DTensors are told by their attributes, so that models without any need not load them. What torch keeps to itself of them
(the specification of how one lies) is used here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from foldpar.comm.groups import FoldedGroups
from foldpar.comm.once import once_differentiable
from foldpar.errors import FamilyError, GradientError, ShardingError
from foldpar.layout import AXES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs

__all__ = [
    "MeshAxes",
    "MeshDim",
    "adopt",
    "communication_device",
    "converted",
    "data_was_assigned",
    "distributed_parameter",
    "is_dtensor",
    "is_sharding",
    "local_parts",
    "local_tensor",
    "opened",
    "own_part",
    "partial_dimension",
    "placed_as",
    "placed_like",
    "refuse_foreign_scalers",
    "version_of",
    "versions_of",
]


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether this is a ``DTensor``."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor


def version_of(tensor: Tensor) -> int:
    """Grows with every change in place."""
    return sum(versions_of(tensor))


def versions_of(tensor: Tensor) -> tuple[int, int]:
    """What a DTensor counts itself, of operations on it, and what its part does; of another tensor, 0 and all."""
    part: Tensor | None = getattr(tensor, "_local_tensor", None)
    return (0, tensor._version) if part is None else (tensor._version, part._version)


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


def distributed_parameter(
    local: Tensor, mesh: DeviceMesh, cuts: Sequence[int | None], *, requires_grad: bool = True
) -> nn.Parameter:
    """This rank's part as a DTensor parameter; shares the memory, communicates nothing.

    ``cuts`` says for every dimension of the mesh which dimension of the tensor is cut evenly over it, ``None`` if none
    is. ``DTensor.from_local`` does that too, but moves what is still on the host to the mesh's kind of device.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    shape = list(local.shape)
    for number, cut in enumerate(cuts):
        if cut is not None:
            shape[cut] *= mesh.size(number)
    placements = tuple(Replicate() if cut is None else Shard(cut) for cut in cuts)
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), local.dtype)
    parameter = DTensor(local.detach(), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=requires_grad)
    parameter._is_param = True  # as nn.Parameter does, which would detach once more, by way of DTensor's dispatcher
    return cast(nn.Parameter, parameter)


def placed_like(local: Tensor, like: DTensor) -> DTensor:
    """A DTensor that lies like another one, of this rank's part; shares the memory, communicates nothing."""
    return cast("DTensor", placed_as(local.detach(), like._spec))


_STORAGE = "_foldpar_storage"
_RANDOM = ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")


def adopt(parameter: Tensor) -> None:
    """What every DTensor parameter of a folded model gets; repeating it does nothing.

    ``torch.nn.init`` fills it on CPU ranks with the random numbers of one process. There DTensor draws from the
    generator of each rank, so that equal seeds give equal shards: the same experts everywhere. Here every rank draws
    the whole tensor and keeps its part; equal seeds are needed as for any replica. On GPUs DTensor takes care of it.

    And its storage is noted, for :func:`data_was_assigned`.
    """
    if is_dtensor(parameter):
        setattr(parameter, _STORAGE, _Noted(parameter.untyped_storage()))
        if parameter.device_mesh.device_type == "cpu":
            for name in _RANDOM:
                setattr(parameter, name, partial(_fill, parameter, name))


class _Noted:
    """The storage of a parameter, which lives as long as this note; a copy of the parameter has none."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def data_was_assigned(parameter: Tensor) -> bool:
    """Whether somebody assigned ``.data`` of a DTensor: torch takes that without a word and keeps the old values."""
    noted: _Noted | None = getattr(parameter, _STORAGE, None)
    return noted is not None and parameter.untyped_storage()._cdata != noted.storage._cdata


@torch.no_grad()
def _fill(parameter: DTensor, name: str, *args: Any, **options: Any) -> DTensor:
    whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    getattr(whole, name)(*args, **options)
    parameter.to_local().copy_(own_part(whole, parameter))
    return parameter


def own_part(whole: Tensor, like: Tensor, *, cut_already: Container[str] = ()) -> Tensor:
    """A view of this rank's part of a tensor that lies as ``like``; all of it where that is a plain tensor.

    ``cut_already`` names the mesh dimensions over which the tensor is this rank's part as it is.
    """
    if not is_dtensor(like):
        return whole
    mesh, names = like.device_mesh, like.device_mesh.mesh_dim_names or ()
    # What FSDP2 cuts is what other dimensions, behind its own, have left.
    for number, placement in reversed(list(enumerate(like.placements))):
        if is_sharding(placement) and not (names and names[number] in cut_already):
            dim: int = placement.dim  # type: ignore[attr-defined]
            size = -(-whole.shape[dim] // mesh.size(number))
            start = min(size * mesh.get_local_rank(number), whole.shape[dim])
            whole = whole.narrow(dim, start, min(size, whole.shape[dim] - start))
    return whole


class _RefuseForeignScaler:
    """In the place of DTensor's own rule for the look of a gradient scaler at gradients."""

    def __init__(self, usual: Callable[..., Any]) -> None:
        self.usual = usual

    def __call__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for gradient in args[0]:
            if is_dtensor(gradient) and {"ep", "etp", "edp", "dp_cp"} & set(gradient.device_mesh.mesh_dim_names or ()):
                raise GradientError(
                    "torch's gradient scalers cannot be used on a folded model: they look for an overflow over the "
                    "ranks of one gradient, and experts and dense parameters lie on different ones, so that some ranks "
                    "would skip a step that others take. Use foldpar.GradScaler(device, groups=groups), which is "
                    "torch's but for that."
                )
        return self.usual(op, args, kwargs)


def refuse_foreign_scalers() -> None:
    """Let torch's gradient scalers refuse gradients over foldpar's meshes, and no others; repeating it does nothing."""
    from torch.distributed.tensor import DTensor

    op = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
    rules: dict[Any, Callable[..., Any]] = DTensor._op_dispatcher._custom_op_handlers
    if not isinstance(rules[op], _RefuseForeignScaler):
        rules[op] = _RefuseForeignScaler(rules[op])


def local_parts(*tensors: Tensor | None, partial_over: str | None = None) -> tuple[Tensor | None, ...]:
    """This rank's parts of DTensors in a forward, other tensors as they are: what a layer computes with.

    One autograd function for all of them: ``to_local`` of each costs a layer of few rows its time on the host.

    Backward:
        Gradients come back distributed like their tensors. Over the mesh dimension ``partial_over``, on which a tensor
        is replicated and every rank has a summand of its gradient, the gradient says that it is partial.

    Raises:
        ShardingError: one is a shard over data ranks, of which no layer can compute.
    """
    places = [place for place, tensor in enumerate(tensors) if tensor is not None and is_dtensor(tensor)]
    if not places:
        return tensors
    for place in places:
        _refuse_shard(cast("DTensor", tensors[place]))
    if torch.compiler.is_compiling():  # which looks into to_local
        return tuple(
            tensor if tensor is None or not is_dtensor(tensor) else _traced_part(tensor, partial_over)
            for tensor in tensors
        )
    parts: list[Tensor | None] = list(tensors)
    own = cast(Any, _LocalParts).apply(partial_over, *(tensors[place] for place in places))
    for place, part in zip(places, own, strict=True):
        parts[place] = part
    return tuple(parts)


def _refuse_shard(tensor: DTensor) -> None:
    """Raise for what FSDP2 gathers in the forward of its unit, and has not: its rows would be taken for the lane's."""
    names = tensor.device_mesh.mesh_dim_names or ()
    axis = next((axis for axis in ("dp_cp", "edp") if axis in names), None)
    if axis is not None:
        raise ShardingError(
            f"A layer was called by itself while a parameter of it, {list(tensor.shape)}, lies in shards over {axis}: "
            f"shard_model's FSDP2 puts them together in the forward of the unit that the layer belongs to, the model "
            f"or one of its blocks. Call that (with inputs_embeds=, output_hidden_states=True or a hook on the layer, "
            f"where you want what is inside), or make the layer a unit: shard_model(blocks=[*model.model.layers, it])."
        )


def opened(tensor: Tensor) -> tuple[Tensor, Any]:
    """This rank's part of a DTensor, and how it lies; any other tensor as it is, and ``None``.

    For autograd functions, in which nothing is recorded: what :func:`local_parts` is by itself, as their first step.
    """
    return (tensor._local_tensor, tensor._spec) if is_dtensor(tensor) else (tensor, None)


def placed_as(part: Tensor | None, lies: Any) -> Tensor | None:
    """The way back, of a gradient: distributed like the tensor that was opened."""
    if part is None or lies is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor(part, lies, requires_grad=False)


def converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies in another dtype, DTensors of DTensors that lie alike: one autograd function for all of them.

    Backward:
        Gradients in the dtypes of the tensors, as each comes: a sum over ranks that is still partial stays so.
    """
    return cast("tuple[Tensor, ...]", cast(Any, _Converted).apply(dtype, *tensors))


class _Converted(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        copies = tuple(_in_dtype(tensor, dtype) for tensor in tensors)
        frozen = (copy for copy, of in zip(copies, tensors, strict=True) if not of.requires_grad)
        ctx.mark_non_differentiable(*frozen)
        return copies

    @staticmethod
    @once_differentiable  # what is distributed by hand here knows nothing of where the gradient came from
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(
            None if grad is None else _in_dtype(grad, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy; not by DTensor's own rules, which cost more than the copy."""
    if not is_dtensor(tensor):
        return tensor.to(dtype, copy=True)
    return type(tensor).from_local(
        local_tensor(tensor).to(dtype, copy=True),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _traced_part(tensor: DTensor, partial_over: str | None) -> Tensor:
    placements = _placements_of_gradient(tensor.device_mesh, tensor.placements, partial_over)
    return tensor.to_local(grad_placements=placements)


class _LocalParts(Function):
    @staticmethod
    def forward(ctx: Any, partial_over: str | None, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.partial_over = partial_over
        ctx.specs = [tensor._spec for tensor in tensors]
        ctx.set_materialize_grads(False)
        parts = tuple(tensor._local_tensor.detach() for tensor in tensors)
        ctx.mark_non_differentiable(*(part for part, of in zip(parts, tensors, strict=True) if not of.requires_grad))
        return parts

    @staticmethod
    @once_differentiable  # what is distributed by hand here knows nothing of where the gradient came from
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from torch.distributed.tensor import DTensor

        return None, *(
            None if grad is None else DTensor(grad.detach(), _of_gradient(spec, ctx.partial_over), requires_grad=False)
            for grad, spec in zip(grads, ctx.specs, strict=True)
        )


def _of_gradient(spec: Any, partial_over: str | None) -> Any:
    """How a gradient lies: like its tensor, but for a dimension of several ranks over which it is a sum."""
    placements = _placements_of_gradient(spec.mesh, spec.placements, partial_over)
    return spec if placements == spec.placements else type(spec)(spec.mesh, placements, tensor_meta=spec.tensor_meta)


def _placements_of_gradient(
    mesh: DeviceMesh, placements: tuple[Placement, ...], partial_over: str | None
) -> tuple[Placement, ...]:
    from torch.distributed.tensor import Partial

    names = mesh.mesh_dim_names or ()
    if partial_over is None or partial_over not in names:
        return placements
    dim = names.index(partial_over)
    if not placements[dim].is_replicate() or mesh.size(dim) == 1:
        return placements
    return (*placements[:dim], Partial(), *placements[dim + 1 :])


def is_sharding(placement: Placement) -> bool:
    """Whether a placement cuts the tensor, in one piece or, as FSDP2 does, in strides."""
    return not placement.is_replicate() and not placement.is_partial()


@dataclass(frozen=True, slots=True)
class MeshDim:
    """One dimension of a DTensor's mesh: the placement on it and the axes that it can be."""

    number: int
    name: str | None
    ranks: tuple[int, ...]
    axes: frozenset[str]
    placement: Placement

    @property
    def is_cut(self) -> bool:
        """Whether its ranks hold different elements."""
        return is_sharding(self.placement)

    def __str__(self) -> str:
        called = f"mesh dimension {self.name!r}, " if self.name else ""
        return f"{called}ranks {self.ranks}"


class MeshAxes:
    """Which axes of a layout the dimensions of DTensor meshes are; looked up once per mesh."""

    def __init__(self) -> None:
        self._known: dict[tuple[FoldedGroups, DeviceMesh, int], tuple[tuple[int, ...], frozenset[str]]] = {}
        self._shared: dict[DeviceMesh, tuple[int, ...]] = {}

    def dims(self, tensor: DTensor, groups: FoldedGroups) -> list[MeshDim]:
        """The mesh dimensions of more than one rank."""
        mesh, placements, dims = tensor.device_mesh, tensor.placements, []
        if mesh not in self._shared:
            self._shared[mesh] = tuple(dim for dim in range(mesh.ndim) if mesh.size(dim) > 1)
        for dim in self._shared[mesh]:
            if (groups, mesh, dim) not in self._known:
                self._known[groups, mesh, dim] = self._look_up(groups, mesh, dim)
            ranks, axes = self._known[groups, mesh, dim]
            dims.append(MeshDim(dim, _dim_name(mesh, dim), ranks, axes, placements[dim]))
        return dims

    def _look_up(self, groups: FoldedGroups, mesh: DeviceMesh, dim: int) -> tuple[tuple[int, ...], frozenset[str]]:
        here = mesh.get_coordinate()
        if here is None:
            return (), frozenset()
        row: tuple[int | slice, ...] = (*here[:dim], slice(None), *here[dim + 1 :])
        ranks = tuple(mesh.mesh[row].tolist())
        name = _dim_name(mesh, dim)
        if name in ("dp_cp", "edp") and set(ranks) <= set(groups.axis(name).ranks):
            return ranks, frozenset({name})  # all of the axis, or the shards of one replica
        axes = frozenset(axis for axis in AXES if sorted(groups.axis(axis).ranks) == sorted(ranks))
        if name == "tp" and "tp" not in axes:
            raise FamilyError(
                f"A parameter is a DTensor on a mesh whose dimension 'tp' has the ranks {ranks}, but the tp group of "
                f"these groups has the ranks {groups.tp.ranks}. Build the mesh with groups.mesh('dense')['tp']."
            )
        return ranks, frozenset({name}) if name in axes else axes


def _dim_name(mesh: DeviceMesh, dim: int) -> str | None:
    return mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else None
