"""What a layer moved and computed: counted without waiting for the device, read when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foldpar.moe.lanes import LaneState
from foldpar.moe.recomputation import in_backward
from foldpar.moe.routing.router import Routing
from foldpar.moe.transport.messages import DispatchPlan


@dataclass(frozen=True, slots=True)
class CounterValues:
    """What one rank has counted. Every number but ``forwards`` adds up over the ranks to that of the whole layer.

    Attributes:
        forwards: forwards, without recomputations.
        assignments: all decisions of the router, dropped and padded ones included. Where the router sees all tokens on
            every lane, a lane counts an even share of them, and of those that are dropped or padded.
        local: assignments to experts of this rank's own EP coordinate, whose rows do not cross the EP axis.
        dropped: assignments that a mask keeps from travelling, those of padding tokens apart.
        padded: assignments of padding tokens, and the free slots of experts that are padded to their capacity.
        rows_sent, rows_received: rows to and from other EP ranks on the way to the experts; each comes back as one.
        bytes: bytes of rows that leave this rank in a forward, over EP (out and back) and over ETP (gathered, and
            reduced on the way back). As many arrive; a backward moves as many again. A row counts in the dtype in
            which it travels, under autocast in autocast's; ids and weights are not counted.
    """

    forwards: int = 0
    assignments: int = 0
    local: int = 0
    dropped: int = 0
    padded: int = 0
    rows_sent: int = 0
    rows_received: int = 0
    bytes: int = 0


class LayerCounters:
    """Counters of one layer, or of several that share it: ``FoldedMoE(..., counters=LayerCounters())``.

    What the plan knows as integers is added on the host; the rest stays on the device until :meth:`read`. A forward
    that is recomputed in a backward is not counted again.

    Example::

        moe = FoldedMoE(router, experts, groups, counters=LayerCounters())
        moe(x)
        moe.counters.read().rows_sent
    """

    def __init__(self) -> None:
        self._known = CounterValues()
        self._on_device: Tensor | None = None  # local, dropped, padded

    @torch.no_grad()
    def count(
        self, routing: Routing, plan: DispatchPlan, lane_state: LaneState, row_bytes: int, sum_bytes: int
    ) -> None:
        """Add one forward, without a host synchronisation: ``row_bytes`` is the size of one row that travels to
        experts, ``sum_bytes`` that of one on the way back.
        """
        if in_backward():
            return
        known, here = self._known, plan.ep.index
        sent, received = (sum(rows) - rows[here] for rows in (plan.send_rows, plan.receive_rows))
        own = sum(plan.receive_rows)
        out, back = sent + own * (plan.etp.size - 1), received + plan.rows - own
        self._known = replace(
            known,
            forwards=known.forwards + 1,
            assignments=known.assignments + lane_state.count_share(routing.ids.numel()),
            rows_sent=known.rows_sent + sent,
            rows_received=known.rows_received + received,
            bytes=known.bytes + out * row_bytes + back * sum_bytes,
        )
        numbers = torch.stack([_local(plan), *_not_travelling(routing, lane_state)])
        self._on_device = numbers if self._on_device is None else self._on_device + numbers

    def read(self) -> CounterValues:
        """The counts so far; waits for the device."""
        if self._on_device is None:
            return self._known
        local, dropped, padded = self._on_device.tolist()
        return replace(self._known, local=local, dropped=dropped, padded=padded)

    def reset(self) -> None:
        """Start again from zero."""
        self._known, self._on_device = CounterValues(), None


def _local(plan: DispatchPlan) -> Tensor:
    """Rows lie in the order (etp coordinate, sender): among them those of this very rank."""
    first = sum(plan.rows_per_etp[: plan.etp.index]) + sum(plan.receive_rows[: plan.ep.index])
    own = plan.assignment_of_slot[first : first + plan.receive_rows[plan.ep.index]]
    return (own >= 0).sum()


def _not_travelling(routing: Routing, lane_state: LaneState) -> tuple[Tensor, Tensor]:
    """How many assignments are dropped, and how many padded: this lane's share."""
    nothing = torch.zeros((), dtype=torch.int64, device=routing.ids.device)
    if routing.mask is None:
        return nothing, nothing
    padding = nothing if routing.padding is None else routing.padding.sum() * routing.ids.shape[1]
    dropped = lane_state.count_share((~routing.mask).sum() - padding)
    padded = lane_state.count_share(padding)
    return dropped, padded if routing.padded_slots is None else padded + routing.padded_slots
