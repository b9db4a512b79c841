"""Dispatch and combine: rows travel to their experts and back.

The plan is made of integers and is computed once per forward; :func:`dispatch` and :func:`combine` execute it. A row is
sent **once per destination rank**, however many of that rank's experts want it, and comes back as one row that is
already summed over them. For four assignments of two tokens, on two EP ranks with two experts each:

    token            t0: e0 e1          t1: e1 e2
    sent rows        to rank 0: t0 t1             to rank 1: t1
    expert-major     e0: t0   e1: t0 t1           e2: t1

With expert tensor parallelism the rows that a rank received are then gathered over ``etp``, so that every slice of an
expert sees the rows of all of them, and partial sums are reduce-scattered on the way back: a row crosses the EP axis
once, not once per slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd import Function

from foldpar.arguments import expect, expect_sizes
from foldpar.comm import (
    AxisGroup,
    FoldedGroups,
    all_gather,
    all_gather_rows,
    all_to_all_rows,
    exchange_rows,
    gather_rows,
    once_differentiable,
    scatter_sum_rows,
)
from foldpar.errors import ShapeError
from foldpar.moe.kernels.permutation import (
    copy_rows,
    count_rows,
    ordinal_in_expert,
    pack,
    pack_sums,
    packs,
    pick,
    place_experts,
    place_rows,
    spread,
    sum_copies,
    sum_packed,
    unpack,
    wide,
)
from foldpar.wording import not_dividing

Partition = Literal["tokens", "assignments"]

MOST_LISTED = 8
"""With no more experts than this on a rank, their sizes come to the host with the other numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class DispatchPlan:
    """Where the rows of one forward go: one frozen value that travels from dispatch to combine.

    ``-1`` in a table means "nowhere". ``rows`` are the rows present at the experts: those received over EP, then
    gathered over ETP, in the order (etp coordinate, sender, token). A *slot* is a place in ``[rows, top_k]``.

    Attributes:
        ep, etp: the groups over which the rows travel.
        num_tokens, top_k: shape of the routing that was planned.
        send_rows, receive_rows: rows sent to and received from each rank of ``ep``.
        rows_per_etp: rows that each ETP coordinate received, ``sum`` = ``rows``.
        token_of_sent: ``[sum(send_rows)]``, the token behind each sent row, grouped by destination; ``None`` where
            nothing is sent: all experts are on this rank, and every token is a row.
        sent_of_token: ``[num_tokens, ep]``, its inverse: the sent row of each token for each destination.
        slot_of_assignment, row_of_assignment: ``[assignments]``, the slot and the row behind each expert-major row.
        assignment_of_slot: ``[rows, top_k]``, the inverse.
        rows_per_expert, ends: ``[local experts]``, int32, on the device: sizes and ends of the expert-major groups.
        sizes: the same on the host where experts are few (at most ``MOST_LISTED`` on a rank), else ``None``.
    """

    ep: AxisGroup
    etp: AxisGroup
    num_tokens: int
    top_k: int
    send_rows: tuple[int, ...]
    receive_rows: tuple[int, ...]
    rows_per_etp: tuple[int, ...]
    token_of_sent: Tensor | None
    sent_of_token: Tensor | None
    slot_of_assignment: Tensor
    row_of_assignment: Tensor
    assignment_of_slot: Tensor
    rows_per_expert: Tensor
    ends: Tensor
    sizes: tuple[int, ...] | None
    placed: Arriving | None = None
    """On its way to the host: how many assignments found an expert. ``None`` where it knows that all did."""

    @property
    def rows(self) -> int:
        """How many rows are present at this rank's experts, each counted once."""
        return sum(self.rows_per_etp)

    @property
    def stays(self) -> bool:
        """Whether every token is a row of this rank's own experts, in the order of tokens."""
        return self.ep.size == self.etp.size == 1 and self.rows == self.num_tokens

    @property
    def assignments(self) -> int:
        """How many (row, expert) pairs this rank's experts compute."""
        return self.row_of_assignment.shape[0]

    def check_placed(self) -> None:
        """Raise if expert ids were out of range, where that was not known when the plan was made.

        Waits until the device has made the plan's tables, and for nothing behind them.
        """
        if self.placed is not None:
            check_all_placed(self.placed, self.assignments, self.rows_per_expert.shape[0])


class Arriving:
    """A number on its way from the device to the host, which goes on meanwhile."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)
        self._there = torch.Event(number.device) if number.is_cuda else None
        if self._there is not None:
            self._there.record()

    def value(self) -> int:
        """The number; waits for it."""
        if self._there is not None:
            self._there.synchronize()
        return int(self._number)


def check_all_placed(placed: Arriving, assignments: int, num_experts: int) -> None:
    """Raise if not all assignments found an expert on this rank, which has all of them."""
    if placed.value() != assignments:
        raise ShapeError(_illegal(num_experts, [(0, 0)]))


@torch.no_grad()
def plan_dispatch(
    expert_ids: Tensor,
    groups: FoldedGroups,
    *,
    num_experts: int,
    partition: Partition = "tokens",
    mask: Tensor | None = None,
) -> DispatchPlan:
    """Plan the journey of every assignment of this rank's tokens. Call it on every rank of the stage.

    ``expert_ids`` is ``[tokens, top_k]``, int32 or int64, with global expert ids; expert ``e`` lives on EP coordinate
    ``e // (num_experts / ep)``. ``mask`` is ``[tokens, top_k]``, bool: assignments where it is ``False`` never travel.
    Token counts may differ between ranks and may be zero.

    With ``partition="tokens"`` the given tokens are this rank's own. With ``"assignments"`` all lanes of a TP group
    pass the same routing of the same tokens, and a lane takes those assignments whose ordinal within their expert is
    its own coordinate modulo ``tp``: even per expert. The combined rows are then partial sums over the lanes.

    Costs one small collective over EP x ETP with one host synchronisation, and one all-to-all of the ids. Where all
    experts are on this rank there is no collective; without a mask, and with more than ``MOST_LISTED`` experts, there
    is no synchronisation either.

    Backward:
        None: integers have no gradient.

    Raises:
        ShapeError: ``ep`` does not divide ``num_experts``; a wrong shape, dtype or device. An id outside
            ``[0, num_experts)`` raises on every rank of the EP x ETP group, not only where it stands; where nothing was
            waited for, :func:`dispatch` or the layer raises it.

    Source: stable per-expert ordinal: GShard (Lepikhin et al. 2020), algorithm 1, position in the expert.
    """
    expect_sizes("plan_dispatch", num_experts=num_experts)
    expect(
        "plan_dispatch",
        expert_ids=(expert_ids, Tensor),
        groups=(groups, FoldedGroups),
        mask=(mask, (Tensor, type(None))),
    )
    _check_routing(expert_ids, groups, num_experts, mask)
    if partition not in ("tokens", "assignments"):
        raise ValueError(f"partition is {partition!r}; choose 'tokens' or 'assignments'.")
    ids = expert_ids.long().contiguous()  # ranks exchange them, so all have one dtype
    mask = own_assignments(ids, mask, groups, num_experts, partition)
    mask = None if mask is None else mask.contiguous()

    # How much each destination gets; then everybody's numbers in one exchange, while the tables are made.
    ep, etp = groups.ep, groups.etp
    listed = num_experts // ep.size if num_experts // ep.size <= MOST_LISTED else 0
    if ep.size == etp.size == 1 and mask is None and not listed:
        return _plan_at_home(ids, groups, num_experts)
    counts = count_rows(ids, mask, num_experts, ep.size, listed)
    numbers = all_gather(counts, groups.ep_etp).view(ep.size, etp.size, ep.size, 3 + listed)
    token_of_sent, sent_of_token, local_ids = place_rows(ids, mask, counts, num_experts)
    arriving_here = numbers[:, :, ep.index]  # [sender's ep, etp, number]: here and at the other slices of these experts
    leaving_here = numbers[ep.index, etp.index, :, None].expand_as(arriving_here)
    arriving, leaving = torch.stack([arriving_here, leaving_here]).tolist()  # the one host synchronisation
    illegal = [(e, t) for e in range(ep.size) for t in range(etp.size) if arriving[e][t][2]]
    if illegal:
        raise ShapeError(_illegal(num_experts, illegal))
    send_rows = tuple(leaving[e][0][0] for e in range(ep.size))
    receive_rows = tuple(arriving[e][etp.index][0] for e in range(ep.size))
    rows_per_etp = tuple(sum(arriving[e][t][0] for e in range(ep.size)) for t in range(etp.size))
    assignments = sum(slice_[1] for sender in arriving for slice_ in sender)
    sizes = tuple(sum(slice_[3 + e] for sender in arriving for slice_ in sender) for e in range(listed))

    received = exchange_rows(local_ids[: sum(send_rows)], send_rows, receive_rows, ep)
    slot_of_assignment, row_of_assignment, assignment_of_slot, ends, rows_per_expert = place_experts(
        gather_rows(received, rows_per_etp, etp), num_experts // ep.size, assignments
    )
    return DispatchPlan(
        ep=ep,
        etp=etp,
        num_tokens=ids.shape[0],
        top_k=ids.shape[1],
        send_rows=send_rows,
        receive_rows=receive_rows,
        rows_per_etp=rows_per_etp,
        token_of_sent=token_of_sent[: sum(send_rows)],
        sent_of_token=sent_of_token,
        slot_of_assignment=slot_of_assignment,
        row_of_assignment=row_of_assignment,
        assignment_of_slot=assignment_of_slot,
        rows_per_expert=rows_per_expert,
        ends=ends,
        sizes=sizes or None,
    )


def _plan_at_home(ids: Tensor, groups: FoldedGroups, num_experts: int) -> DispatchPlan:
    """Of all tokens, each with all its assignments, where this rank has all experts whole.

    Their number is known, so on a GPU the host waits for nothing: what it must still hear is on its way.
    """
    tokens, top_k = ids.shape
    slots, rows, inverse, ends, rows_per_expert = place_experts(ids, num_experts, ids.numel())
    placed = Arriving(ends[-1:])
    if not ids.is_cuda:
        check_all_placed(placed, ids.numel(), num_experts)
    return DispatchPlan(
        ep=groups.ep,
        etp=groups.etp,
        num_tokens=tokens,
        top_k=top_k,
        send_rows=(tokens,),
        receive_rows=(tokens,),
        rows_per_etp=(tokens,),
        token_of_sent=None,
        sent_of_token=None,
        slot_of_assignment=slots,
        row_of_assignment=rows,
        assignment_of_slot=inverse,
        rows_per_expert=rows_per_expert,
        ends=ends,
        sizes=None,
        placed=placed if ids.is_cuda else None,
    )


def _illegal(num_experts: int, ranks: list[tuple[int, int]]) -> str:
    return (
        f"Expert ids outside [0, {num_experts}) on the rank(s) at (ep, etp) = {ranks}. Mask assignments that "
        f"should not travel instead of giving them an id out of range."
    )


def own_assignments(
    ids: Tensor, mask: Tensor | None, groups: FoldedGroups, num_experts: int, partition: Partition
) -> Tensor | None:
    """Which assignments this lane takes, of those that the mask leaves; ``None`` for all. Illegal ids stay."""
    if partition == "tokens":
        return mask
    legal = (ids >= 0) & (ids < num_experts)
    ordinal = ordinal_in_expert(ids.long(), legal if mask is None else legal & mask, num_experts)
    own = (ordinal % groups.tp.size == groups.tp.index) | ~legal  # an illegal id stays, to be reported
    return own if mask is None else own & mask


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Bring rows to their experts: ``[tokens, dim] -> [plan.assignments, dim]``, grouped by local expert.

    Backward:
        The gradients of a row's copies are summed on the expert's rank (in float32 or wider), reduce-scattered over
        ETP, sent back once, and summed over the destinations. Without atomics: repeatable bit by bit.

    Raises:
        ShapeError: ``x`` is not ``[plan.num_tokens, dim]``.
    """
    expect("dispatch", x=(x, Tensor), plan=(plan, DispatchPlan))
    _check_tokens(x, plan)
    plan.check_placed()
    return spread(_to_experts(x, plan), plan.row_of_assignment, plan.assignment_of_slot)


def dispatch_weights(weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Bring routing weights to their experts: ``[tokens, top_k] -> [plan.assignments]``, one per expert-major row.

    For experts that apply the weight themselves; their outputs are then combined with ``weights=None``.

    Backward:
        Gradients return to their tokens; exact zero for masked assignments.

    Raises:
        ShapeError: ``weights`` does not have the shape that was planned.
    """
    check_weights(weights, plan)
    return pick(_to_experts(weights, plan), plan.slot_of_assignment, plan.assignment_of_slot)


def dispatch_weighted(x: Tensor, weights: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    """:func:`dispatch` and :func:`dispatch_weights` in one journey where that is possible: a row carries its weights.

    Backward:
        As theirs. With ``etp > 1`` gradients are summed on the way, so rows and weights travel apart.
    """
    if plan.stays or plan.etp.size > 1 or not packs(x, weights):
        return dispatch(x, plan), dispatch_weights(weights, plan)
    _check_tokens(x, plan)
    check_weights(weights, plan)
    return cast("tuple[Tensor, Tensor]", cast(Any, _CarryRows).apply(x, weights, plan))


class _CarryRows(Function):
    """Rows with their weights to the experts, and their gradients back: packed, as bytes, so that no check for NaN
    and no sum on the way takes a weight's bits for numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        assert plan.token_of_sent is not None
        ctx.plan, ctx.dim = plan, x.shape[1]
        payload = pack(x.contiguous(), weights.contiguous(), plan.token_of_sent)
        received = exchange_rows(payload.view(torch.uint8), plan.send_rows, plan.receive_rows, plan.ep)
        return unpack(received.view(x.dtype), plan.slot_of_assignment, x.shape[1], plan.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        payload = pack_sums(grad_rows.contiguous(), grad_weights.contiguous(), plan.assignment_of_slot)
        returned = exchange_rows(payload.view(torch.uint8), plan.receive_rows, plan.send_rows, plan.ep)
        return *sum_packed(returned.view(grad_rows.dtype), plan.sent_of_token, ctx.dim, plan.top_k), None


def combine(rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Tensor:
    """Bring expert outputs back, weighted and summed: ``[plan.assignments, dim] -> [tokens, dim]``.

    ``weights`` is ``[tokens, top_k]``, as routed, or ``None`` where the experts have applied them. Sums are taken in
    float32 or wider and in a fixed order: over a row's experts on their rank, then over ETP, then over the
    destinations.

    Backward:
        Of ``rows``: the arriving gradient of its token, times the weight. Of ``weights``: its product with the expert's
        output; exact zero for masked assignments.

    Raises:
        ShapeError: ``rows`` or ``weights`` do not have the shape that was planned.
    """
    expect("combine", rows=(rows, Tensor), weights=(weights, (Tensor, type(None))), plan=(plan, DispatchPlan))
    if rows.dim() != 2 or rows.shape[0] != plan.assignments:
        raise ShapeError(
            f"combine takes [assignments, dim] with the {plan.assignments} row(s) that dispatch returned, and got "
            f"{list(rows.shape)}."
        )
    dtype = rows.dtype
    if weights is not None:
        rows = rows.to(wide(dtype)) * dispatch_weights(weights, plan)[:, None]
    return cast(Tensor, cast(Any, _BringBack).apply(rows, plan, dtype))


class _BringBack(Function):
    """Outputs to the rows behind them, to their owners, and to their tokens: summed three times."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: DispatchPlan, dtype: torch.dtype) -> Tensor:
        ctx.plan, ctx.dtype = plan, rows.dtype
        partial = sum_copies(rows, plan.assignment_of_slot).to(dtype)
        if plan.stays:
            return partial
        assert plan.sent_of_token is not None
        own = scatter_sum_rows(partial, plan.rows_per_etp, plan.etp)
        returned = exchange_rows(own, plan.receive_rows, plan.send_rows, plan.ep)
        return sum_copies(returned, plan.sent_of_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        if not plan.stays:
            sent = copy_rows(grad, plan.token_of_sent)
            received = exchange_rows(sent, plan.send_rows, plan.receive_rows, plan.ep)
            grad = gather_rows(received, plan.rows_per_etp, plan.etp)
        return copy_rows(grad, plan.row_of_assignment).to(ctx.dtype), None, None


def _to_experts(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Tokens -> the rows present at their experts: over EP once per destination, then shared inside the ETP group."""
    if plan.stays:
        return x
    assert plan.token_of_sent is not None and plan.sent_of_token is not None
    sent = spread(x, plan.token_of_sent, plan.sent_of_token)
    received = all_to_all_rows(sent, plan.send_rows, plan.receive_rows, plan.ep)
    return all_gather_rows(received, plan.etp, row_counts=plan.rows_per_etp, backward="reduce_scatter")


def _check_tokens(x: Tensor, plan: DispatchPlan) -> None:
    if x.dim() != 2 or x.shape[0] != plan.num_tokens:
        raise ShapeError(
            f"dispatch takes [tokens, dim] with the {plan.num_tokens} token(s) that were planned, and got "
            f"{list(x.shape)}."
        )


def check_weights(weights: Tensor, plan: DispatchPlan) -> None:
    """Raise unless routing weights have the shape that was planned."""
    if weights.shape != (plan.num_tokens, plan.top_k):
        raise ShapeError(
            f"Routing weights must be [tokens, top_k] = [{plan.num_tokens}, {plan.top_k}], and are "
            f"{list(weights.shape)}."
        )


def _check_routing(expert_ids: Tensor, groups: FoldedGroups, num_experts: int, mask: Tensor | None) -> None:
    why = "so ranks would hold different numbers of experts"
    uneven = not_dividing("ep", groups.ep.size, "num_experts", num_experts, why)
    if uneven is not None:
        raise ShapeError(uneven)
    if expert_ids.dim() != 2 or expert_ids.shape[1] == 0:
        raise ShapeError(
            f"expert_ids must be [tokens, top_k] with top_k of 1 or more, and is {list(expert_ids.shape)}."
        )
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"expert_ids must be int32 or int64 (a narrower type overflows), and is {expert_ids.dtype}.")
    if mask is not None and (mask.shape != expert_ids.shape or mask.dtype != torch.bool):
        raise ShapeError(
            f"mask must be bool and shaped like expert_ids, {list(expert_ids.shape)}; it is {mask.dtype} and "
            f"{list(mask.shape)}."
        )
    if mask is not None and mask.device != expert_ids.device:
        raise ShapeError(f"mask is on {mask.device} and expert_ids on {expert_ids.device}; put them on one device.")
