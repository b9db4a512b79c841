"""The journey of a layer's rows: from the lane that routed them to their experts and back, in one of two ways.

    in messages   plan | all-to-all -> experts -> all-to-all      between any ranks; the host learns the sizes
    one-sided     publish | read -> experts -> publish | read     through shared memory; sizes stay on the device

Both compute the same and have the same backward. Rows travel one-sided where ranks can read each other's memory, unless
the layer is told not to; :class:`OneSided` has the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foldpar.comm import await_peers, memories_of
from foldpar.moe.abilities import Abilities
from foldpar.moe.counters import LayerCounters
from foldpar.moe.kernels.grouped import in_autocast_dtype
from foldpar.moe.kernels.permutation import Places, place_experts, wide
from foldpar.moe.lane_ends import lane_ends
from foldpar.moe.lanes import LaneState
from foldpar.moe.routing.router import Routing
from foldpar.moe.transport.messages import (
    check_weights,
    combine,
    dispatch,
    dispatch_weighted,
    own_assignments,
    plan_dispatch,
)
from foldpar.moe.transport.one_sided import OneSided, OneSidedWay, Sharing, combine_one_sided, dispatch_one_sided

__all__ = ["Experts", "InMessages", "Journey", "Way"]


class Experts(Protocol):
    """Anything that computes expert-major rows, such as :class:`GroupedExperts`.

    What it can beyond that, its attribute ``abilities`` says, an :class:`~foldpar.moe.abilities.Abilities`.
    """

    num_experts: int
    dim: int

    def __call__(self, rows: Tensor, rows_per_expert: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Way:
    """Which way rows take, and why: the value that decides, and that ``explain`` prints.

    ``memory`` is what they pass through where they travel one-sided; a way that is told before a forward has none.
    """

    name: str
    why: str | None = None
    memory: OneSidedWay | None = None

    def __str__(self) -> str:
        return self.name if self.why is None else f"{self.name}: {self.why}"


class Transport(Protocol):
    """One of the two ways: rows ``[tokens, dim]`` and what was decided about them, to weighted sums ``[tokens, dim]``.

    ``weights`` are the routing's, as they enter. ``compute`` is called with rows at their experts.
    """

    def __call__(self, compute: Callable[..., Tensor], rows: Tensor, weights: Tensor, routing: Routing) -> Tensor: ...


class Journey:
    """How the rows of one layer travel; built with the layer.

    Args:
        state: what the lanes of the layer hold; ``ends`` is how they share its work.
        experts: what computes the rows. What it can is asked here, once; it is not kept.
        counters: where to count what moves.
        one_sided: whether rows may travel one-sided. ``None``: where ranks have something to exchange, and the experts
            are known to answer in the dtype that they are asked in.
    """

    def __init__(
        self,
        state: LaneState,
        experts: Experts,
        *,
        counters: LayerCounters | None = None,
        one_sided: Sharing = None,
    ) -> None:
        self.state, self.num_experts, self.dim = state, experts.num_experts, experts.dim
        self.ends = lane_ends(state)
        self.counters = counters
        said, kind = getattr(experts, "abilities", None), type(experts).__name__
        abilities = said if isinstance(said, Abilities) else None  # else it is somebody else's name for something
        self.one_sided, self.in_messages_why = _sharing(one_sided, kind, abilities, state)
        if self.one_sided is not None:
            await_peers(state.groups)
        self.in_messages = InMessages(
            state,
            self.num_experts,
            applies_weights=abilities is not None,
            reads_places=abilities is not None and abilities.reads_places,
            counters=counters,
        )
        if counters is not None and self.one_sided is not None:
            self.in_messages_why = "counters read the sizes on the host"
        unable = f"{kind} may not leave rows alone that hold nothing, as GroupedExperts do"
        self.sizes_why = unable if abilities is None else abilities.needs_sizes

    def __call__(self, compute: Callable[..., Tensor], rows: Tensor, routing: Routing, *, tokens: int) -> Tensor:
        """Rows that this lane routed, to the experts and back to all ``[tokens, dim]``, weighted and summed.

        ``compute`` is called with rows at their experts: ``(rows, rows_per_expert)``, and where the experts apply
        weights also with the weights and with the sizes on the host or ``None``. Rows that stay on this rank lie where
        they lay for experts that read places, which are handed over last.

        Backward:
            That of the two ends; see :func:`~foldpar.moe.lane_ends.lane_ends`.
        """
        entering, weights = self.ends.enter(in_autocast_dtype(rows)), self.ends.enter(routing.weights)
        way = self.way(entering.shape[0], entering.dtype, entering.device, routing.ids.shape[1])
        carry: Transport = self.in_messages
        if way.memory is not None:
            carry = ThroughMemory(self, way.memory)
        return self.ends.leave(carry(compute, entering, weights, routing), tokens)

    def way(self, tokens: int, dtype: torch.dtype, device: torch.device, top_k: int) -> Way:
        """The way of so many rows of this dtype, on this device, with so many experts each, in a forward.

        Where rows may travel one-sided it is a meeting of the group, and the answer is the same on all ranks.
        """
        if self.one_sided is None:
            return Way("in messages", self.in_messages_why)
        found = self.one_sided.way(
            tokens, dtype, self.dim, top_k, self.state.groups, self.num_experts, device,
            needs_sizes=self.sizes_why is not None, in_messages=self.in_messages_why,
        )  # fmt: skip
        return Way("in messages", found) if isinstance(found, str) else Way("one-sided", memory=found)

    def expected(self, dtype: torch.dtype | None, device: torch.device, top_k: int) -> Way:
        """The way of rows in a forward here and now, as far as it is known; asks no other rank. ``None``: of rows of a
        dtype that can be.
        """
        if self.one_sided is None:
            return Way("in messages", self.in_messages_why)
        if (reason := self.in_messages_why or self.one_sided.refusal(dtype, device)) is not None:
            return Way("in messages", reason)
        groups = self.state.groups
        memories = memories_of(groups, device, ask=False)
        if memories is not None and memories.reason is not None:
            return Way("in messages", memories.reason)
        name = "one-sided where ranks can read each other's memory" if memories is None else "one-sided"
        kind, local = dtype or torch.float32, self.num_experts // groups.ep.size
        most = self.one_sided.most_tokens(groups.ep_etp.size, self.dim, top_k, kind)
        refused = None if memories is None else memories.refused
        if refused is not None and memories is not None and not memories.made:
            return Way("in messages", refused[1])
        told = [f"up to {most} tokens of a rank, more in messages"]
        if memories is not None and memories.made:
            told.append(f"{memories.shared >> 20} MiB of a rank are shared")
        if refused is not None:
            told.append(f"for more, {refused[1]}")
        if self.sizes_why is not None:
            told.append(f"the host waits for sizes, since {self.sizes_why}")
        elif (few := self.one_sided.waits_beyond(groups, self.dim, top_k, local, kind)) is not None and few < most:
            told.append(f"beyond {few} the host waits for sizes")
        return Way(name, "; ".join(told))

    def explain(self, dtype: torch.dtype | None, device: torch.device, top_k: int) -> list[str]:
        """Which way such rows take in a forward here and now, and why; and how often a row crosses which axis."""
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
        told = self.one_sided is not None or ep.size * etp.size > 1
        return [*lines, str(self.expected(dtype, device, top_k))] if told else lines


@dataclass(frozen=True, slots=True)
class InMessages:
    """All-to-alls between any ranks, whose sizes the host learns first."""

    state: LaneState
    num_experts: int
    applies_weights: bool
    reads_places: bool
    counters: LayerCounters | None = None

    def __call__(self, compute: Callable[..., Tensor], rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        plan = plan_dispatch(
            routing.ids,
            self.state.groups,
            num_experts=self.num_experts,
            partition=self.state.partition,
            mask=routing.mask,
        )
        y: Tensor
        if self.reads_places and plan.stays:  # rows are read where they lie, and summed there
            check_weights(weights, plan)
            places = Places(plan.row_of_assignment, plan.slot_of_assignment, plan.assignment_of_slot, plan.ends)
            y = computed = compute(rows, plan.rows_per_expert, weights, plan.sizes, places)
            plan.check_placed()  # now that the device has enough to do
        elif self.applies_weights:  # on the activation, in a pass that is made anyway
            arrived, row_weights = dispatch_weighted(rows, weights, plan)
            computed = compute(arrived, plan.rows_per_expert, row_weights, plan.sizes)
            y = combine(computed, None, plan)
        else:
            computed = compute(dispatch(rows, plan), plan.rows_per_expert)
            y = combine(computed, weights, plan)
        if self.counters is not None:
            self.counters.count(
                routing, plan, self.state, *(row.shape[1] * row.element_size() for row in (rows, computed))
            )
        return y


@dataclass(frozen=True, slots=True)
class ThroughMemory:
    """Ranks read each other's memory; what one rank keeps for itself stays where it lies."""

    journey: Journey
    way: OneSidedWay

    def __call__(self, compute: Callable[..., Tensor], rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        state, messages, num_experts = self.journey.state, self.journey.in_messages, self.journey.num_experts
        mask = own_assignments(routing.ids, routing.mask, state.groups, num_experts, state.partition)
        if state.groups.ep_etp.size == 1 and messages.reads_places and mask is None:
            return self._at_home(compute, rows, weights, routing.ids)
        arrived, row_weights, plan = dispatch_one_sided(
            rows, weights, routing.ids, mask, self.way,
            num_experts=num_experts, etp=state.groups.etp.size, reads_places=messages.reads_places,
        )  # fmt: skip
        rows_per_expert = torch.diff(plan.ends, prepend=plan.ends.new_zeros(1))
        if not messages.applies_weights:
            computed = compute(arrived, rows_per_expert)
            weighted = computed.to(wide(computed.dtype)) * row_weights[:, None]
            return combine_one_sided(weighted, plan).to(computed.dtype)
        given = (arrived, rows_per_expert, row_weights, plan.sizes)
        apart = plan.apart  # rows are read where they lie, and summed there
        return combine_one_sided(compute(*given) if apart is None else compute(*given, apart), plan)

    def _at_home(self, compute: Callable[..., Tensor], rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        slots, source, copies, ends, rows_per_expert = place_experts(
            ids.long().contiguous(), self.journey.num_experts, ids.numel()
        )
        self.way.memory.tell_illegal(ends[-1] != ids.numel())
        return compute(rows, rows_per_expert, weights, None, Places(source, slots, copies, ends))


def _sharing(
    one_sided: Sharing, kind: str, abilities: Abilities | None, state: LaneState
) -> tuple[OneSided | None, str | None]:
    """How rows may travel one-sided; or that they do not, and why where there is something to exchange."""
    if isinstance(one_sided, OneSided):
        return one_sided, None
    if state.groups.ep_etp.size == 1:
        return None, None
    if one_sided is False:
        return None, "one_sided = False"
    if abilities is None:
        return None, f"{kind} may answer in a wider dtype than it is asked in, which memory is not shared for"
    return OneSided(), None
