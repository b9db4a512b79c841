"""Capacity: how many assignments an expert takes, and which are dropped where there are more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from foldpar.arguments import expect
from foldpar.comm import gather_rows
from foldpar.errors import ShapeError
from foldpar.moe.kernels.permutation import ordinal_in_expert
from foldpar.moe.lanes import LaneState
from foldpar.moe.routing.router import Routing


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many assignments every expert takes: ``ceil(factor * tokens * top_k / num_experts)``, and what gives way.

    Args:
        factor: how much more than an even share; 1.25 is usual. A float is read as the fraction it is written as.
        drop: where an expert has more assignments, ``"probability"`` keeps those of the largest weights (the earlier
            token first among equal ones), and ``"position"`` those of the first tokens.
        slots: ``"as_needed"``: an expert's free slots are nothing. ``"padded"``: they are padding, as in layers whose
            experts compute a fixed number of rows. Padding is counted and never travels, so both compute the same.

    Example:
        >>> [Capacity(factor).of(tokens=10, top_k=2, num_experts=8) for factor in (0.5, 1.0, 1.2, 1.25, 2)]
        [2, 3, 3, 4, 5]

    Raises:
        ValueError: ``factor`` is not positive, or an unknown choice.
    """

    factor: float | Fraction
    drop: Literal["probability", "position"] = "probability"
    slots: Literal["as_needed", "padded"] = "as_needed"

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(
                f"capacity factor = {self.factor} must be positive and finite: 1 gives every expert room for an even "
                f"share of the assignments, and 0 would drop all of them; capacity=None drops none."
            )
        for name, choices in (("drop", ("probability", "position")), ("slots", ("as_needed", "padded"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(map(repr, choices))}.")

    def of(self, tokens: int, top_k: int, num_experts: int) -> int:
        """The capacity of each expert."""
        return -int(-self._exact * tokens * top_k // num_experts)

    def of_tensor(self, tokens: Tensor, top_k: int, num_experts: int) -> Tensor:
        """:meth:`of` for a number of tokens, int64, that only the device knows."""
        above, below = self._exact.numerator * top_k, self._exact.denominator * num_experts
        return (tokens * above + below - 1) // below

    @property
    def _exact(self) -> Fraction:
        return Fraction(self.factor).limit_denominator(1_000_000)


@torch.no_grad()
def limit_capacity(
    routing: Routing,
    lane_state: LaneState,
    capacity: Capacity,
    *,
    num_experts: int,
    row_counts: Sequence[int] | None = None,
) -> Routing:
    """Drop the assignments that exceed the experts' capacity: the same routing with a narrower mask.

    Tokens are those of one TP group, that is, of one data-parallel and context rank, whatever the lanes do with them:
    padding tokens apart, they make the capacity, and every expert's assignments are ranked among all of them. So what
    is dropped does not depend on the layout. Sharded lanes hold them one after the other: the first tokens are those
    of lane 0. Call it on every rank.

    Where lanes route their own tokens it gathers ids and weights over the lanes, ``tokens * top_k`` numbers each.
    ``row_counts`` says how many rows each lane routed; left out, the lanes exchange that first, with one host
    synchronisation. Where all lanes route all tokens it communicates nothing. Padding costs one small collective more;
    all ranks have it or none.

    Weights are left as they are, also those of a token that loses some of its experts.

    Backward:
        Dropped assignments never travel, so they have neither value nor gradient; all others are untouched.

    Raises:
        ShapeError: the routing's tensors do not fit each other.

    Source: capacity factor: GShard (Lepikhin et al. 2020), section 2.2; Switch (Fedus et al. 2021), section 2.2.
    """
    expect(
        "limit_capacity", routing=(routing, Routing), lane_state=(lane_state, LaneState), capacity=(capacity, Capacity)
    )
    if routing.weights.shape != routing.ids.shape:
        raise ShapeError(
            f"A routing has a weight for every id, [tokens, top_k]; ids are {list(routing.ids.shape)} and weights "
            f"{list(routing.weights.shape)}."
        )
    legal = (routing.ids >= 0) & (routing.ids < num_experts)
    active = legal if routing.mask is None else legal & routing.mask
    tp = lane_state.groups.tp
    counts: tuple[int, ...] = (routing.ids.shape[0],)
    lane = 0
    if lane_state.own_tokens:
        counts, lane = tuple(row_counts or lane_state.row_counts(routing.ids)), tp.index

    ids = torch.where(active, routing.ids, num_experts)
    weights = routing.weights
    if lane_state.own_tokens:
        ids, weights = gather_rows(ids, counts, tp), gather_rows(weights.detach(), counts, tp)
    tokens = ids.new_full((), sum(counts), dtype=torch.int64)
    if routing.padding is not None:
        tokens = tokens - lane_state.sum_counts(routing.padding.sum(), "lanes")
    limit = capacity.of_tensor(tokens, ids.shape[1], num_experts)

    kept = _rank_in_expert(ids.long(), weights, num_experts, capacity.drop) < limit
    mask = kept.split(counts)[lane] & active | ~legal  # an illegal id stays, to be reported by plan_dispatch
    if routing.mask is not None:
        mask = mask & routing.mask
    padded = None
    if capacity.slots == "padded":
        used = ((ids < num_experts) & kept).sum()
        padded = lane_state.even_share(limit * num_experts - used)
    return replace(routing, mask=mask, padded_slots=padded)


def _rank_in_expert(ids: Tensor, weights: Tensor, num_experts: int, drop: str) -> Tensor:
    """How many assignments of the same expert go first: by token, or by weight and then by token."""
    if drop == "position":
        return ordinal_in_expert(ids, ids < num_experts, num_experts)
    order = weights.flatten().argsort(descending=True, stable=True)
    in_order = ids.flatten()[order]
    rank = torch.empty_like(in_order)
    rank[order] = ordinal_in_expert(in_order, in_order < num_experts, num_experts)
    return rank.view_as(ids)
