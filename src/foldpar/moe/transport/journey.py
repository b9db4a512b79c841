"""The journey of a layer's rows: from the lane that routed them to their experts and back, in one of two ways.

    in messages   plan | all-to-all -> experts -> all-to-all      between any ranks; the host learns the sizes
    one-sided     publish | read -> experts -> publish | read     through shared memory; the host waits for nothing

Both compute the same and have the same backward. :class:`OneSided` says when rows may travel one-sided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from foldpar.comm import why_no_peers
from foldpar.moe.counters import LayerCounters
from foldpar.moe.experts import GroupedExperts
from foldpar.moe.kernels.grouped import in_autocast_dtype
from foldpar.moe.lane_ends import LaneEnds
from foldpar.moe.lanes import LaneState
from foldpar.moe.routing.router import Routing
from foldpar.moe.transport.messages import (
    MOST_LISTED,
    combine,
    dispatch,
    dispatch_weighted,
    dispatch_weights,
    own_assignments,
    plan_dispatch,
)
from foldpar.moe.transport.one_sided import OneSided, OneSidedPlan, OneSidedWay, combine_one_sided, dispatch_one_sided

__all__ = ["Experts", "Journey"]


class Experts(Protocol):
    """Anything that computes expert-major rows, such as :class:`GroupedExperts`."""

    num_experts: int
    dim: int

    def __call__(self, rows: Tensor, rows_per_expert: Tensor, /) -> Tensor: ...


class Journey:
    """How the rows of one layer travel; built with the layer.

    Args:
        state, ends: what the lanes of the layer hold, and how they share its work.
        counters: where to count what moves.
        one_sided: rows may travel one-sided.
    """

    def __init__(
        self, state: LaneState, ends: LaneEnds, counters: LayerCounters | None, one_sided: OneSided | None
    ) -> None:
        self.state, self.ends, self.counters, self.one_sided = state, ends, counters, one_sided

    def __call__(
        self,
        experts: Experts,
        rows: Tensor,
        routing: Routing,
        *,
        tokens: int,
        compute: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Rows that this lane routed, to the experts and back to all ``[tokens, dim]``, weighted and summed.

        ``compute`` is what to call where it is not ``experts`` itself.

        Backward:
            That of the two ends; see :func:`~foldpar.moe.lane_ends.lane_ends`.
        """
        groups = self.state.groups
        compute = compute or cast("Callable[..., Tensor]", experts)
        entering, weights = self.ends.enter(in_autocast_dtype(rows)), self.ends.enter(routing.weights)
        way = self._way(experts, entering, routing.ids.shape[1])
        if way is not None:
            mask = own_assignments(routing.ids, routing.mask, groups, experts.num_experts, self.state.partition)
            arrived, row_weights, plan = dispatch_one_sided(
                entering, weights, routing.ids, mask, way, num_experts=experts.num_experts
            )
            rows_per_expert = torch.diff(plan.ends, prepend=plan.ends.new_zeros(1))
            sizes = tuple(rows_per_expert.tolist()) if _wants_sizes(plan) else None
            combined = combine_one_sided(compute(arrived, rows_per_expert, row_weights, sizes), plan)
            return self.ends.leave(combined, tokens)
        planned = plan_dispatch(
            routing.ids, groups, num_experts=experts.num_experts, partition=self.state.partition, mask=routing.mask
        )
        if self.counters is not None:
            self.counters.count(routing, planned, self.state, rows.shape[1] * rows.element_size())
        if isinstance(experts, GroupedExperts) and planned.stays:  # they read rows where they lie, and sum there
            places = (planned.row_of_assignment, planned.assignment_of_slot)
            row_weights = dispatch_weights(weights, planned)
            combined = compute(entering, planned.rows_per_expert, row_weights, planned.sizes, places)
        elif isinstance(experts, GroupedExperts):  # they weight the activation, in a pass that is made anyway
            arrived, row_weights = dispatch_weighted(entering, weights, planned)
            combined = combine(compute(arrived, planned.rows_per_expert, row_weights, planned.sizes), None, planned)
        else:
            combined = combine(compute(dispatch(entering, planned), planned.rows_per_expert), weights, planned)
        return self.ends.leave(combined, tokens)

    def explain(self, experts: Experts) -> list[str]:
        """Which way the rows of this layer take, and why; and how often a row crosses which axis."""
        ep, etp = self.state.groups.ep, self.state.groups.etp
        lines = [f"sent once per EP rank over {ep.ranks}, and back as one sum: at most {ep.size} x, not top_k x"]
        if ep.size == 1:
            lines = [f"stay: ep = 1, so this rank has {'all' if etp.size == 1 else 'a slice of all'} experts"]
        if etp.size > 1 and ep.size > 1:
            lines.append(
                f"then shared inside the ETP group {etp.ranks}: a row crosses EP once and ETP {etp.size - 1} x; a "
                f"journey for each slice would cross EP {etp.size} x"
            )
        elif etp.size > 1:
            lines.append(f"shared inside the ETP group {etp.ranks}: a row crosses ETP {etp.size - 1} x")
        if self.one_sided is None:
            return [*lines, "in messages"] if ep.size * etp.size > 1 else lines
        refusal = self._foreseen(self.one_sided, experts)
        lines.append(f"in messages: {refusal}" if refusal else "one-sided where ranks can read each other's memory")
        return lines

    def _way(self, experts: Experts, rows: Tensor, top_k: int) -> OneSidedWay | None:
        if self.one_sided is None or self._refusal(experts):
            return None
        way = self.one_sided.way(rows, top_k, self.state.groups, experts.num_experts)
        return None if isinstance(way, str) else way

    def _refusal(self, experts: Experts) -> str | None:
        """Why the rows of this layer can only travel in messages."""
        if self.counters is not None:
            return "counters read the sizes on the host"
        if not isinstance(experts, GroupedExperts):
            return f"{type(experts).__name__} may not leave rows alone that hold nothing, as GroupedExperts do"
        if experts.biases is not None:
            return "the experts have biases, whose gradients are sums over all rows"
        return None

    def _foreseen(self, one_sided: OneSided, experts: Experts) -> str | None:
        """The same, as far as it can be told before there are rows, which come in the dtype of the experts."""
        if refusal := self._refusal(experts):
            return refusal
        weight = next(cast(GroupedExperts, experts).parameters())
        return one_sided.refusal(self.state.groups, weight.dtype) or why_no_peers(weight.device)


def _wants_sizes(plan: OneSidedPlan) -> bool:
    """Whether the products of these experts are so few and large that plain ones, for which the host has to wait, pay.

    Mixtral-8x7B on an H200, 8,192 rows an expert: 24.7 ms of plain products, 26.3 of grouped ones.
    """
    few, many = plan.ends.shape[0] <= MOST_LISTED, plan.room >= 8192 * plan.ends.shape[0]
    return few and many and not torch.cuda.is_current_stream_capturing()
