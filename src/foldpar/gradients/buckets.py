"""Gradients on their way: cut into pieces, packed into flat buckets, and brought back when their sums are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from foldpar.comm import AxisGroup, FoldedGroups, MeshAxes, is_dtensor, local_tensor, partial_dimension
from foldpar.errors import ShapeError
from foldpar.factors import gradient_factor, loss_factor
from foldpar.families import ParameterFamily, Reduction
from foldpar.parameters import ResolvedParameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["PackedBucket", "Piece", "PieceCutter", "scale", "settle"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter on its way through a bucket; tensors are local parts that share their memory."""

    name: str
    parameter: nn.Parameter
    values: Tensor
    gradient: Tensor | None
    factor: float
    lane: AxisGroup | None
    """The group of the lane reduction; None where there is none."""
    data: AxisGroup
    """The group of the sum over the data axis; this rank alone where FSDP2 has summed already."""
    dtype: torch.dtype
    device: torch.device
    fold: int
    """The number of the groups that lane and data belong to, where layers fold differently."""

    @property
    def travels(self) -> bool:
        """Whether other ranks have a part in this gradient."""
        return self.lane is not None or self.data.size > 1

    @property
    def kind(self) -> tuple[str, int, int, str, str]:
        """What the pieces of one bucket have in common; sorts equally on all ranks."""
        return (self.data.axis, self.data.size, self.fold, str(self.dtype), str(self.device))


class PieceCutter:
    """Makes pieces of resolved parameters, for one way to normalise and to round."""

    def __init__(self, loss: Literal["mean", "sum"], reduce_dtype: torch.dtype | None, groups: FoldedGroups) -> None:
        loss_factor(groups.layout, loss)  # refuses an unknown loss for a model without parameters too
        self._loss, self._reduce_dtype = loss, reduce_dtype
        self._axes = MeshAxes()
        self._folds = {groups: 0}
        self._factors: dict[tuple[ParameterFamily, FoldedGroups], float] = {}

    def piece(self, resolved: ResolvedParameter) -> Piece:
        """The piece of a parameter with the gradient that it has now, placed like the parameter."""
        parameter, placements = resolved.parameter, self._placements(resolved)
        family, grad = _family_over_lanes(resolved, placements), parameter.grad
        if grad is not None and grad.layout is not torch.strided:
            raise ShapeError(
                f"The gradient of {resolved.name} is sparse ({grad.layout}). Buckets are dense: build the embedding "
                f"with sparse=False."
            )
        if grad is not None and is_dtensor(grad):
            for (placement, is_lane), given in zip(placements, grad.placements, strict=True):
                if is_lane and given != placement:  # DTensor declares the state, whatever the mark
                    summand = given.is_partial() and getattr(given, "reduce_op", "sum") == "sum"
                    family = replace(family, reduction=Reduction.SUM if summand else Reduction.AVERAGE)
            # A DTensor gradient is one global tensor, so placing it like its parameter is always right; a batch
            # without tokens, for example, leaves shards in other places.
            wanted = _wanted_placements(placements, grad)
            if wanted != list(grad.placements):
                parameter.grad = grad = grad.redistribute(placements=wanted)
        return self._piece(resolved, family, grad)

    def without_gradient(self, resolved: ResolvedParameter) -> Piece:
        """What is known before there is a gradient: groups, dtype and size."""
        return self._piece(resolved, _family_over_lanes(resolved, self._placements(resolved)), None)

    def is_placed(self, resolved: ResolvedParameter) -> bool:
        """Whether the gradient can become a piece without communication."""
        grad = resolved.parameter.grad
        if grad is None or not is_dtensor(grad):
            return True
        return _wanted_placements(self._placements(resolved), grad) == list(grad.placements)

    def _piece(self, resolved: ResolvedParameter, family: ParameterFamily, grad: Tensor | None) -> Piece:
        groups = resolved.groups
        data = groups.axis(family.data_axis)
        return Piece(
            resolved.name,
            resolved.parameter,
            values=local_tensor(resolved.parameter.detach()),
            gradient=None if grad is None else local_tensor(grad),
            factor=self._factor(family, groups),
            lane=_lane_of(family, groups),
            data=AxisGroup(data.axis, (groups.rank,), 0, None) if resolved.sharded else data,
            dtype=self._reduce_dtype or _gradient_dtype(resolved.parameter),
            device=resolved.communication_device,
            fold=self._folds.setdefault(groups, len(self._folds)),
        )

    def _factor(self, family: ParameterFamily, groups: FoldedGroups) -> float:
        if (family, groups) not in self._factors:
            self._factors[family, groups] = float(gradient_factor(family, groups.layout, self._loss))
        return self._factors[family, groups]

    def _placements(self, resolved: ResolvedParameter) -> list[tuple[Placement, bool]]:
        """Of a DTensor, per mesh dimension: the placement, and whether the dimension is the lanes that hold copies."""
        parameter = resolved.parameter
        if not is_dtensor(parameter):
            return []
        lanes = {
            dim.number
            for dim in self._axes.dims(parameter, resolved.groups)
            if resolved.family.lane_axis in dim.axes and dim.placement.is_replicate()
        }
        return [(placement, number in lanes) for number, placement in enumerate(parameter.placements)]


def _wanted_placements(placements: list[tuple[Placement, bool]], grad: DTensor) -> list[Placement]:
    """Those of the parameter; but what is partial over the lanes stays so, and is summed in a bucket."""
    pairs = zip(placements, grad.placements, strict=True)
    return [given if given.is_partial() and is_lane else placement for (placement, is_lane), given in pairs]


def _family_over_lanes(resolved: ResolvedParameter, placements: list[tuple[Placement, bool]]) -> ParameterFamily:
    over_lanes = any(is_lane for _, is_lane in placements)
    if over_lanes and (resolved.family.reduction is Reduction.SKIP or resolved.sharded):
        # A rank without a gradient cannot know whether it is partial elsewhere, so such copies always meet. And a
        # partial gradient that came to FSDP2 was placed like its parameter there, so it is whole already.
        return replace(resolved.family, reduction=Reduction.AVERAGE)
    return resolved.family


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


def scale(factor_of: list[tuple[Tensor | None, float]]) -> None:
    """Multiply tensors in place, all at once."""
    scaled = [(tensor, factor) for tensor, factor in factor_of if tensor is not None and factor != 1]
    if scaled:
        torch._foreach_mul_([tensor for tensor, _ in scaled], [factor for _, factor in scaled])


class PackedBucket:
    """Scaled gradients in one flat buffer, to be summed over the lanes and then over the data axis.

    Pieces that meet over the lanes come first. Behind them stands a flag per piece, 1 where this rank has a gradient,
    so that flags are summed over just the ranks that their gradients are::

        | gradients, over lanes | flags, over lanes | other flags | other gradients |
        |<------ over_lanes: sum over the lane axis ----->|                         |
        |<--------------------- flat: sum over the data axis ---------------------->|

    Every factor is multiplied in before the sums, once, so that a rank without a gradient needs to know none, and so
    that fp16 sums stay in range. The gradients themselves are untouched until :meth:`unpack`.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        lanes = [piece.lane for piece in pieces if piece.lane is not None]
        sizes = [piece.values.numel() for piece in pieces]
        end_of_lanes = sum(sizes[: len(lanes)]) + len(lanes)
        sizes.insert(len(lanes), len(pieces))
        self.flat = torch.zeros(sum(sizes), dtype=pieces[0].dtype, device=pieces[0].device)
        self.over_lanes = self.flat[:end_of_lanes]
        self.lane, self.data = (lanes[0] if lanes else None), pieces[0].data
        chunks = list(torch.split(self.flat, sizes))
        self._flags = chunks.pop(len(lanes)).fill_(1)
        self._slots = [chunk.view(piece.values.shape) for chunk, piece in zip(chunks, pieces, strict=True)]
        self._parameters = [piece.parameter for piece in pieces]
        self._missing = [place for place, piece in enumerate(pieces) if piece.gradient is None]
        for place in self._missing:
            self._flags[place] = 0
        self._gradients = [piece.gradient for piece in pieces if piece.gradient is not None]
        self._own_slots = [slot for slot, piece in zip(self._slots, pieces, strict=True) if piece.gradient is not None]
        if self._gradients:
            torch._foreach_copy_(self._own_slots, self._gradients)
        scale([(slot, piece.factor) for slot, piece in zip(self._slots, pieces, strict=True)])

    def unpack(self) -> None:
        """Copy the sums back; a gradient that was missing here appears if another rank had one."""
        if self._gradients:
            torch._foreach_copy_(self._gradients, self._own_slots)
        if self._missing:
            somewhere = (self._flags[self._missing] != 0).tolist()
            for place in (place for place, found in zip(self._missing, somewhere, strict=True) if found):
                _receive(self._parameters[place], self._slots[place])


def _receive(parameter: nn.Parameter, reduced: Tensor) -> None:
    """Give a parameter that had no gradient here the one that others had."""
    parameter.grad = torch.zeros_like(parameter, dtype=_gradient_dtype(parameter))
    local_tensor(parameter.grad).copy_(reduced)


def settle(parameter: nn.Parameter) -> None:
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
