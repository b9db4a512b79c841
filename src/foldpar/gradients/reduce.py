"""The reduction of all gradients by family: once, after backward."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Literal

import torch
from torch import nn

from foldpar.arguments import expect
from foldpar.comm import FoldedGroups, all_reduce_, check_room
from foldpar.errors import FamilyError, ShapeError
from foldpar.gradients.buckets import PackedBucket, Piece, PieceCutter, scale, settle
from foldpar.parameters import (
    ResolvedParameter,
    check_before_reduction,
    groups_of,
    refuse_reduced,
    refuse_unreduced,
    resolve_parameters,
    stamp,
)

__all__ = ["BUCKET_BYTES", "check_rooms", "parameters_to_reduce", "reduce_gradients"]

BUCKET_BYTES = 64 * 2**20
"""A bucket is closed before it would exceed this size; a larger gradient has a bucket of its own."""


def reduce_gradients(
    model: nn.Module,
    groups: FoldedGroups,
    *,
    loss: Literal["mean", "sum"] = "mean",
    reduce_dtype: torch.dtype | None = None,
    check: bool | None = None,
) -> None:
    """Make every ``.grad`` the gradient of the step's loss, in place. Call it once, on every rank, after backward.

    Over the lanes by family (summed, averaged or left), then summed over the data axis (``dp_cp``, or ``edp`` for
    experts), times the factor of ``loss``. Under gradient accumulation call it at the boundary only, when gradients
    are complete; a second call on the same gradients is an error.

    A model that :func:`foldpar.shard_model` has sharded is called just so: FSDP2 has summed its gradients over the data
    axis then, unscaled, and what remains, over the lanes and the factor, is done here on the shards.

    Args:
        model: frozen parameters are skipped. A parameter without a gradient here takes part with zeros and receives
            the result where any rank it is reduced with has a gradient; with none anywhere, its ``.grad`` stays None.
        groups: those that the model was built with. Where layers fold differently, those of any of them: experts are
            reduced over the groups of the layer that holds them.
        loss: ``"mean"``: each rank's loss is the mean of its own batch. ``"sum"``: each rank has divided its loss by
            the global token count already, the right choice for ragged batches.
        reduce_dtype: the dtype of the buckets, kept from the first sum to the last; by default each gradient's own.
            ``torch.float32`` makes a sum of bf16 gradients round once.
        check: when to compare the replicas of this stage first, as :func:`foldpar.check_replicas` does: ``None``
            before the first reduction of this model, ``True`` before every one, ``False`` never.

    Example, with 2 lanes and 2 data-parallel ranks, gradients of one parameter on ranks 0 to 3::

        grads 1 1 5 5, REPLICATED          -> (1 + 1 + 5 + 5) / 2 / 2 = 3      on all ranks
        grads 1 2 3 4, REPLICATED_PARTIAL  -> (1 + 2 + 3 + 4) / 2 = 5          on all ranks
        grads 1 2 3 4, DENSE_SHARDED       -> (1 + 3) / 2 = 2 and (2 + 4) / 2 = 3, per lane

    A DTensor gradient that is partial over tp is summed over tp, whatever the mark: it declares its state.

    Raises:
        FamilyError: a family is unknown or contradicted, see :func:`foldpar.parameter_families`; or a post-hoc layer
            meets a TP-sharded parameter. GroupsError: a layer has groups of other lanes or stages.
        ShardingError: the last backward of a sharded model ran inside :func:`foldpar.accumulate`.
        GradientError: these very gradients were reduced before. ReplicaError: see ``check``.
        ShapeError: a gradient is sparse, or rows that travelled one-sided found no room. ValueError: ``loss`` is
            neither ``"mean"`` nor ``"sum"``.

    Source: the tables of :mod:`foldpar.families` and :func:`foldpar.factors.loss_factor`.
    """
    expect(
        "reduce_gradients",
        model=(model, nn.Module),
        groups=(groups, FoldedGroups),
        reduce_dtype=(reduce_dtype, (torch.dtype, type(None))),
    )
    _check_reduce_dtype(reduce_dtype)
    cutter = PieceCutter(loss, reduce_dtype, groups)
    parameters = parameters_to_reduce(model, groups)
    check_rooms(parameters)
    if groups.layout.world > 1:
        refuse_reduced((entry.name, entry.parameter) for entry in parameters)
    check_before_reduction(model, groups, check, {"loss": loss, "reduce_dtype": str(reduce_dtype)})
    pieces = [cutter.piece(resolved) for resolved in parameters]
    with torch.no_grad():
        scale([(piece.gradient, piece.factor) for piece in pieces if not piece.travels])
        travellers = sorted((piece for piece in pieces if piece.travels), key=lambda piece: (piece.kind, piece.name))
        for _, same_kind in groupby(travellers, key=lambda piece: piece.kind):
            for bucket in _buckets(list(same_kind)):
                _reduce_bucket(bucket)
        for piece in pieces:
            settle(piece.parameter)
    stamp(entry.parameter for entry in parameters)


def _check_reduce_dtype(reduce_dtype: torch.dtype | None) -> None:
    if reduce_dtype is not None and not (reduce_dtype.is_floating_point or reduce_dtype.is_complex):
        raise ShapeError(f"reduce_dtype = {reduce_dtype} must be a floating-point dtype: gradients are summed in it.")


def check_rooms(parameters: list[ResolvedParameter]) -> None:
    """Refuse gradients of a step in which rows were left out, on all ranks."""
    for groups in dict.fromkeys(entry.groups for entry in parameters):
        check_room(groups)


def parameters_to_reduce(model: nn.Module, groups: FoldedGroups) -> list[ResolvedParameter]:
    """The parameters that require a gradient, after a look at what no reduction can make right."""
    refuse_unreduced(model)
    resolved = resolve_parameters(model, groups)
    sharded = [entry.name for entry in resolved if "tp" in entry.family.shard_axes]
    if groups.layout.tp > 1 and sharded:
        for name, module in model.named_modules():
            if groups_of(module) is not None and _is_post_hoc(module):
                raise FamilyError(_post_hoc_meets_shards(name or "The model", sharded[0]))
    return [entry for entry in resolved if entry.parameter.requires_grad]


def _is_post_hoc(module: nn.Module) -> bool:
    """Known by the lane state that layers have; no layer is reached from here."""
    return getattr(getattr(module, "lane_state", None), "lane_grads", None) == "post-hoc"


def _post_hoc_meets_shards(layer: str, parameter: str) -> str:
    return (
        f"{layer} has lane_grads='post-hoc', and {parameter} is sharded over tp. A post-hoc layer hands down gradients "
        f"that are right only on average over the lanes. The slices of a TP-sharded layer each use their own lane's, "
        f"so its gradients, and all below it, are wrong by 0.2 to 1.3 of their size, and nothing in the numbers shows "
        f"it. Use lane_grads='replicated', the default, which is exact with TP-sharded layers. Where they all lie "
        f"above the post-hoc layers, such as a vocabulary-parallel head, nothing is wrong: reduce them in a call of "
        f"their own, reduce_gradients(model.head, groups)."
    )


def _buckets(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Cut into buckets, those with a lane reduction first.

    Lane-reduced pieces are equal in size on all lanes; others, such as uneven shards, need not be. With the former in
    front, lanes cut alike as far as they communicate.
    """
    bucket: list[Piece] = []
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


def _reduce_bucket(pieces: list[Piece]) -> None:
    bucket = PackedBucket(pieces)
    if bucket.lane is not None:
        all_reduce_(bucket.over_lanes, bucket.lane)
    all_reduce_(bucket.flat, bucket.data)
    bucket.unpack()
