"""Gradient families: which axes hold shards of a parameter, which hold replicas, and what is done over the lanes.

A family is the one description of a parameter that reduction, norms, clipping and replica checks all read. Two facts
decide it, both known where the layer is written: which rows and heads this rank's copy saw, and the state of the
gradient that arrives there. Never a name, never the layout.

    the copy on a lane, by the gradient that arrives     replicated    partial    sharded lanes    post-hoc
    -------------------------------------------------    ----------    -------    -------------    ----------------
    a TP slice                                           SKIP          (none)     SKIP             (none)
    whole, used on all rows: norms, embeddings           AVERAGE       SUM        SUM              AVERAGE
    whole, inside a TP-sharded region: QK-norm gains     SUM           (none)     SUM              (none)
    whole, used on own rows: a head above split_rows     SUM           SUM        SUM              SUM
    a router of the lane's own tokens                    SUM           SUM        SUM              AVERAGE
    a router of all tokens                               AVERAGE       SUM        -                AVERAGE
    routed experts, etp slices included                  SKIP          SKIP       SKIP             EXPERT_TP_CANCEL
    an expert's output bias, over etp                    SUM           SUM        SUM              SUM, divided by tp

(none): neither a partial gradient nor one that is right only on average over the lanes (post-hoc) can pass a TP-sharded
layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import prod
from typing import Literal

from foldpar.errors import FamilyError
from foldpar.layout import Axis

__all__ = [
    "DENSE_SHARDED",
    "EXPERT_BIAS",
    "REPLICATED",
    "REPLICATED_PARTIAL",
    "ROUTED_EXPERT",
    "ROUTED_EXPERT_POST_HOC",
    "ROUTER_ALL_TOKENS",
    "ROUTER_OWN_TOKENS",
    "ROUTER_POST_HOC",
    "ParameterFamily",
    "Reduction",
    "chunk",
    "numbers_in_shard",
    "shard_dimension",
]

_DENSE_AXES: tuple[Axis, ...] = ("tp", "dp_cp")
_EXPERT_AXES: tuple[Axis, ...] = ("ep", "etp", "edp")


class Reduction(Enum):
    """What is done with the gradients of a parameter over its lane axis; the data axis is always summed."""

    SKIP = "skip"
    """Nothing: every lane's gradient is whole already, or belongs to other elements."""
    SUM = "sum"
    """Every lane has a part of the gradient: a row, a head, a summand."""
    AVERAGE = "average"
    """Every lane has the whole gradient already; the mean keeps copies from drifting apart by rounding."""
    EXPERT_TP_CANCEL = "expert_tp_cancel"
    """No communication: divide by ``tp``. For routed experts under the post-hoc convention only."""


@dataclass(frozen=True, slots=True)
class ParameterFamily:
    """How one class of parameters lies over the ranks and how its gradient is reduced.

    ``shard_axes`` hold different elements, ``replica_axes`` hold equal copies; together they name each axis of one
    view once: ``tp`` and ``dp_cp`` (dense), or ``ep``, ``etp`` and ``edp`` (expert). ``pp`` is understood: stages
    hold different parameters. ``factor`` multiplies the gradient on top of the loss rule
    (:func:`foldpar.factors.loss_factor`).

    Example:
        >>> REPLICATED.shard_axes, REPLICATED.replica_axes, REPLICATED.reduction.name
        ((), ('tp', 'dp_cp'), 'AVERAGE')
        >>> sinks = ParameterFamily("attention_sink", (), ("tp", "dp_cp"), Reduction.SUM)
        >>> sinks.lane_axis, sinks.data_axis
        ('tp', 'dp_cp')

    Raises:
        FamilyError: an axis is missing, named twice or of the other view; the data axis is sharded; the reduction
            has no lane axis to act on; the factor is not a positive ``Fraction`` or integer.

    Source: the table above; its first rows are Megatron's (Shoeybi et al. 2019, section 3) and, on sharded lanes, those
    of sequence parallelism (Korthikanti et al. 2022).
    """

    name: str
    shard_axes: tuple[Axis, ...]
    replica_axes: tuple[Axis, ...]
    reduction: Reduction
    factor: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        _check_axes(self)
        _check_reduction(self)
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, Fraction)) or self.factor <= 0:
            raise FamilyError(
                f"Family {self.name!r}: factor = {self.factor!r} ({type(self.factor).__name__}) must be a positive "
                f"Fraction or integer. Factors stay exact until the one multiplication, so write "
                f"Fraction(1, 3) and not 0.333."
            )
        object.__setattr__(self, "factor", Fraction(self.factor))

    @property
    def view(self) -> Literal["dense", "expert"]:
        """The view of the layout that its axes belong to."""
        return "expert" if "edp" in self.replica_axes else "dense"

    @property
    def lane_axis(self) -> Literal["tp", "etp"] | None:
        """The replica axis on which ``reduction`` acts: ``tp`` (dense), ``etp`` (expert), or None: it is sharded."""
        if "tp" in self.replica_axes:
            return "tp"
        return "etp" if "etp" in self.replica_axes else None

    @property
    def data_axis(self) -> Literal["dp_cp", "edp"]:
        """The replica axis over which gradients of different tokens are summed."""
        return "edp" if self.view == "expert" else "dp_cp"


def shard_dimension(shape: Sequence[int], shards: int, *, experts: bool, cut: Collection[int] = ()) -> int:
    """Along which dimension of a rank's local tensor :func:`foldpar.shard_model` cuts it over its data axis.

    Dimension 0. Where a rank has too few experts to share them out evenly, the last other dimension that can be, one
    that is not ``cut`` over other axes already if there is one.

    Example, of two experts' ``[2 * hidden, dim]`` over 2 and over 8 data ranks:
        >>> [shard_dimension((2, 96, 64), shards, experts=True) for shards in (2, 8)]
        [0, 2]
    """
    if not experts or shape[0] % shards == 0:
        return 0
    even = [dim for dim in range(1, len(shape)) if shape[dim] % shards == 0]
    return max(even, key=lambda dim: (dim not in cut, dim), default=0)


def numbers_in_shard(shape: Sequence[int], shards: int, *, experts: bool, index: int = 0) -> int:
    """How many numbers of a rank's local tensor the data rank ``index`` of ``shards`` keeps; the first has the most.

    Example, of 5 rows of 4, and of 5 experts' 4 numbers:
        >>> [numbers_in_shard((5, 4), 2, experts=experts, index=1) for experts in (False, True)]
        [8, 10]
    """
    length = shape[shard_dimension(shape, shards, experts=experts)]
    return chunk(length, shards, index)[1] * (prod(shape) // max(length, 1))


def chunk(length: int, count: int, index: int) -> tuple[int, int]:
    """Start and size of one chunk, as ``torch.chunk`` and DTensor's ``Shard`` cut.

    Example:
        >>> [chunk(5, 4, index) for index in range(4)]
        [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    size = -(-length // count)
    start = min(index * size, length)
    return start, min(size, length - start)


def _check_axes(family: ParameterFamily) -> None:
    axes = (*family.shard_axes, *family.replica_axes)
    if sorted(axes) not in (sorted(_DENSE_AXES), sorted(_EXPERT_AXES)):
        raise FamilyError(
            f"Family {family.name!r}: shard_axes = {family.shard_axes} and replica_axes = {family.replica_axes} must "
            f"name each axis of one view once, since an axis is either sharded or replicated: tp and dp_cp for dense "
            f"parameters, or ep, etp and edp for expert parameters."
        )
    data_axis = "edp" if "edp" in axes else "dp_cp"
    if data_axis in family.shard_axes:
        raise FamilyError(
            f"Family {family.name!r}: {data_axis} is a data axis, whose ranks hold replicas that saw different tokens. "
            f"Move it to replica_axes."
        )


def _check_reduction(family: ParameterFamily) -> None:
    if not isinstance(family.reduction, Reduction):
        choices = ", ".join(f"Reduction.{choice.name}" for choice in Reduction)
        raise FamilyError(f"Family {family.name!r}: reduction = {family.reduction!r} is not one of {choices}.")
    lane_axis, name = family.lane_axis, family.reduction.name
    if family.reduction in (Reduction.SUM, Reduction.AVERAGE) and lane_axis is None:
        raise FamilyError(
            f"Family {family.name!r}: {name} acts on copies over the lanes, but {' and '.join(family.shard_axes)} "
            f"hold different elements, which must not be mixed. Use Reduction.SKIP."
        )
    if family.reduction is Reduction.EXPERT_TP_CANCEL and (family.view == "dense" or lane_axis is not None):
        raise FamilyError(
            f"Family {family.name!r}: {name} divides by tp without communication, which holds for expert parameters "
            f"sharded over ep and etp only. Use Reduction.SUM with factor = Fraction(1, tp) for a replicated one."
        )


DENSE_SHARDED = ParameterFamily("dense_sharded", ("tp",), ("dp_cp",), Reduction.SKIP)
"""A slice of a TP-sharded dense weight: attention projections, MLPs, shared experts, a vocabulary-parallel head."""

REPLICATED = ParameterFamily("replicated", (), ("tp", "dp_cp"), Reduction.AVERAGE)
"""Equal on all lanes, used on all rows, with a replicated gradient: norms, embeddings."""

REPLICATED_PARTIAL = ParameterFamily("replicated_partial", (), ("tp", "dp_cp"), Reduction.SUM)
"""Equal on all lanes, but each lane's gradient is a part: own rows (a head above ``split_rows``, sharded lanes), own
heads (QK-norm gains, replicated KV heads, attention sinks), or below a consumer with partial gradients."""

ROUTER_OWN_TOKENS = ParameterFamily("router_own_tokens", (), ("tp", "dp_cp"), Reduction.SUM)
"""A router that sees the lane's own tokens: ``partition="tokens"`` and sharded lanes."""

ROUTER_ALL_TOKENS = ParameterFamily("router_all_tokens", (), ("tp", "dp_cp"), Reduction.AVERAGE)
"""A router that sees all tokens on every lane, its weights passing the same enter as the rows."""

ROUTED_EXPERT = ParameterFamily("routed_expert", ("ep", "etp"), ("edp",), Reduction.SKIP)
"""Routed experts, and their slices over etp."""

EXPERT_BIAS = ParameterFamily("expert_bias", ("ep",), ("etp", "edp"), Reduction.SUM)
"""An expert's output bias: every etp rank holds it, and it is added once, so the gradients are parts of a sum."""

ROUTER_POST_HOC = ParameterFamily("router_post_hoc", (), ("tp", "dp_cp"), Reduction.AVERAGE)
"""A router inside a post-hoc layer, whose exit has multiplied every gradient by ``tp``: of own tokens or of all."""

ROUTED_EXPERT_POST_HOC = ParameterFamily("routed_expert_post_hoc", ("ep", "etp"), ("edp",), Reduction.EXPERT_TP_CANCEL)
"""Routed experts inside a post-hoc layer; an output bias there is ``EXPERT_BIAS`` with the factor ``1 / tp``."""
