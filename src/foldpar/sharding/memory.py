"""``predict_memory``: the bytes that parameters, gradients and optimizer states take on a rank, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from foldpar.arguments import expect_sizes
from foldpar.comm import local_tensor
from foldpar.errors import ShardingError
from foldpar.families import REPLICATED, ParameterFamily, numbers_in_shard
from foldpar.layout import FoldedLayout
from foldpar.parameters import data_replicas, nearest_marks, sharded_module, shards_over_data

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from foldpar.models import FoldPlan

__all__ = ["LocalParameter", "RankMemory", "planned_parameters", "predict_memory"]


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """What one rank holds of a parameter after folding: its share by tp, ep and etp, before anything shards it over
    data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    family: ParameterFamily
    trainable: bool = True


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank. The first three are there between steps; the others come and go within a step.

    Activations, communication buffers and what optimizers keep per parameter besides tensors of its shape (a step
    count) are not in it. Where ranks hold uneven shards, FSDP2 pads its own memory to the largest.
    """

    parameters: int
    """Shards where they are sharded, else all of it."""
    gradients: int
    """The same of what is trained, from the step's last backward on."""
    optimizer: int
    """``optimizer_states`` tensors like every trained parameter."""
    gathered_parameters: int
    """Whole parameters besides their shards. Stages 1 and 2: all of them, from forward to the step's last backward.
    Stage 3 holds a few units at a time, which is not counted."""
    whole_gradients: int
    """Whole gradients that wait for the step's last backward: stage 1, under :func:`foldpar.accumulate`."""

    @property
    def between_steps(self) -> int:
        """Parameters, gradients and optimizer states."""
        return self.parameters + self.gradients + self.optimizer


def predict_memory(
    model: nn.Module | Iterable[LocalParameter],
    layout: FoldedLayout,
    *,
    stage: Literal[0, 1, 2, 3],
    replicas: int = 1,
    rank: int = 0,
    optimizer_states: int = 2,
    mixed_precision: MixedPrecisionPolicy | None = None,
) -> RankMemory:
    """How many bytes a rank will hold after :func:`foldpar.shard_model`, told from shapes: nothing is allocated.

    A parameter of ``rows`` rows over ``n`` data ranks lies in chunks of ``ceil(rows / n)`` rows, the last ones smaller
    or empty, by the rank's coordinate; experts that ``n`` does not divide are cut evenly along another dimension where
    that is possible.

    Args:
        model: folded and not yet sharded, on any device, the meta device included; or its parameters on ``rank``, such
            as :func:`planned_parameters` tells them before anything is folded.
        stage: that of ``shard_model``; 0 is a model that is not sharded.
        replicas: those of ``shard_model``, each of which holds all shards.
        rank: whose share. Shapes of the model are those of this rank.
        optimizer_states: 2 for Adam, 1 for SGD with momentum, 0 for plain SGD.
        mixed_precision: that of ``shard_model``.

    Example, 10 rows of 4 float32 on 4 data ranks, in chunks of 3 rows, 12 numbers::

        >>> from foldpar import solve_layout
        >>> weight = LocalParameter("weight", (10, 4), torch.float32, REPLICATED)
        >>> [predict_memory([weight], solve_layout(4), stage=3, rank=rank).parameters for rank in range(4)]
        [48, 48, 48, 16]
        >>> predict_memory([weight], solve_layout(4), stage=1)
        RankMemory(parameters=48, gradients=48, optimizer=96, gathered_parameters=160, whole_gradients=160)

    Raises:
        ValueError: an unknown stage. ShardingError: the model is sharded already, or ``replicas`` does not fit.

    Source: ZeRO (Rajbhandari et al. 2020), section 5, per family.
    """
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"stage = {stage!r} is unknown. It can be 0 (not sharded), 1, 2 or 3.")
    expect_sizes("predict_memory", replicas=replicas)
    parameters = gradients = gathered = whole_gradients = 0
    compute = mixed_precision.param_dtype if mixed_precision is not None else None
    reduce = mixed_precision.reduce_dtype if mixed_precision is not None else None
    converts = mixed_precision is not None and mixed_precision != type(mixed_precision)()
    for entry, of_layer in _parameters_of(model, layout):
        held = whole = prod(entry.shape)
        dims = len(entry.shape)
        if stage and shards_over_data(entry.family, of_layer, dims=dims, converts=converts, replicas=replicas):
            held = _held(entry, of_layer, rank, replicas)
            in_use = compute if compute is not None and entry.dtype.is_floating_point else entry.dtype
            gathered += whole * in_use.itemsize if stage < 3 else 0
            if stage == 1 and entry.trainable:
                whole_gradients += whole * (reduce or in_use).itemsize
        parameters += held * entry.dtype.itemsize
        gradients += held * entry.dtype.itemsize if entry.trainable else 0
    return RankMemory(parameters, gradients, optimizer_states * gradients, gathered, whole_gradients)


def planned_parameters(plan: FoldPlan, *, dtype: torch.dtype) -> list[LocalParameter]:
    """What a rank will hold by a plan of :func:`foldpar.plan_fold`, in this dtype: no ranks and no weights are needed.

    Example, for a model on the meta device::

        plan = foldpar.plan_fold(model, foldpar.solve_layout(64, tp=2, ep=16))
        parameters = planned_parameters(plan, dtype=torch.float32)
        predict_memory(parameters, plan.layout, stage=3).between_steps / 2**30      # GiB on rank 0

    Raises:
        ValueError: an adapter of the plan replaces a block by one of its own, whose shapes are not known yet.
    """
    parameters = []
    for row in plan.rows:
        if row.local_shape is None or row.family is None:
            raise ValueError(
                f"The plan does not say what a rank will hold of {row.name}, which its adapter's replace takes over. "
                f"Fold the model, on the meta device if it is large, and predict from that."
            )
        parameters.append(LocalParameter(row.name, row.local_shape, dtype, row.family))
    return parameters


def _held(entry: LocalParameter, layout: FoldedLayout, rank: int, replicas: int) -> int:
    axis = entry.family.data_axis
    shards = layout.size(axis) // data_replicas(layout, axis, replicas)
    index = layout.group(axis, rank).index(rank) % shards
    return numbers_in_shard(entry.shape, shards, experts=entry.family.view == "expert", index=index)


def _parameters_of(
    model: nn.Module | Iterable[LocalParameter], layout: FoldedLayout
) -> Iterator[tuple[LocalParameter, FoldedLayout]]:
    """Local parameters, each with the layout that its layer was folded by."""
    if not isinstance(model, nn.Module):
        yield from ((entry, layout) for entry in model)
        return
    if sharded_module(model) is not None:
        raise ShardingError(
            "The model is sharded already, so its shapes are those of shards. Predict before shard_model, or add up "
            "the bytes of its local tensors."
        )
    for name, parameter, mark, groups in nearest_marks(model):
        shape = tuple(local_tensor(parameter).shape)
        # Without a mark a parameter is dense, and all dense families are held alike.
        family = mark or REPLICATED
        of_layer = groups.layout if groups is not None and family.view == "expert" else layout
        yield LocalParameter(name, shape, parameter.dtype, family, parameter.requires_grad), of_layer
