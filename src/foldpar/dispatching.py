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
from torch.autograd.function import once_differentiable

from foldpar.collectives import (
    all_gather,
    all_gather_rows,
    all_to_all_rows,
    exchange_rows,
    gather_rows,
    reduce_scatter_rows,
)
from foldpar.errors import ShapeError
from foldpar.groups import FoldedGroups

Partition = Literal["tokens", "assignments"]


@dataclass(frozen=True, slots=True, eq=False)
class DispatchPlan:
    """Where the rows of one forward go: one frozen value that travels from dispatch to combine.

    ``-1`` in a table means "nowhere". ``rows`` are the rows present at the experts: those received over EP, then
    gathered over ETP, in the order (etp coordinate, ep coordinate of the sender, token).

    Attributes:
        groups: the groups over which the rows travel.
        num_tokens, top_k: shape of the routing that was planned.
        send_rows, receive_rows: rows sent to and received from each EP coordinate.
        rows_per_etp: rows that each ETP coordinate received, ``sum`` = ``rows``.
        token_of_sent: ``[sum(send_rows)]``, the token behind each sent row, grouped by destination.
        sent_of_token: ``[num_tokens, ep]``, its inverse: the sent row of each token for each destination.
        row_of_assignment: ``[assignments]``, the row behind each expert-major row, grouped by local expert.
        assignment_of_row: ``[rows, top_k]``, its inverse.
        rows_per_expert: ``[local experts]``, int32, on the device: the sizes of the expert-major groups.
    """

    groups: FoldedGroups
    num_tokens: int
    top_k: int
    send_rows: tuple[int, ...]
    receive_rows: tuple[int, ...]
    rows_per_etp: tuple[int, ...]
    token_of_sent: Tensor
    sent_of_token: Tensor
    row_of_assignment: Tensor
    assignment_of_row: Tensor
    rows_per_expert: Tensor

    @property
    def rows(self) -> int:
        """How many rows are present at this rank's experts, each counted once."""
        return sum(self.rows_per_etp)

    @property
    def assignments(self) -> int:
        """How many (row, expert) pairs this rank's experts compute."""
        return self.row_of_assignment.shape[0]


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

    Costs one small collective over EP x ETP with one host synchronisation, and one all-to-all of the ids.

    Backward:
        None: integers have no gradient.

    Raises:
        ShapeError: ``ep`` does not divide ``num_experts``; a wrong shape, dtype or device. An id outside
            ``[0, num_experts)`` raises on every rank of the EP x ETP group, not only where it stands.

    Source: stable per-expert ordinal: GShard (Lepikhin et al. 2020), algorithm 1, position in the expert.
    """
    _check_routing(expert_ids, groups, num_experts, mask)
    if partition not in ("tokens", "assignments"):
        raise ValueError(f"partition is {partition!r}; choose 'tokens' or 'assignments'.")
    ep, etp = groups.ep, groups.etp
    local_experts = num_experts // ep.size
    ids = expert_ids.long()
    num_tokens, top_k = ids.shape
    legal = (ids >= 0) & (ids < num_experts)
    active = legal if mask is None else legal & mask
    if partition == "assignments":
        active = active & (_ordinal_in_expert(ids, active, num_experts) % groups.tp.size == groups.tp.index)

    # Which destinations a token needs, and how much each destination gets; then everybody's numbers, in one exchange.
    destination = torch.where(active, ids // local_experts, ep.size)
    needed = ids.new_zeros((num_tokens, ep.size + 1), dtype=torch.bool)
    needed = needed.scatter_(1, destination, True)[:, : ep.size]
    assignments_to = ids.new_zeros(ep.size + 1).scatter_add_(0, destination.flatten(), torch.ones_like(ids).flatten())
    illegal = (~legal if mask is None else ~legal & mask).sum()
    own_numbers = torch.stack([needed.sum(0), assignments_to[: ep.size], illegal.expand(ep.size)], dim=1)
    numbers = all_gather(own_numbers, groups.ep_etp).view(ep.size, etp.size, ep.size, 3)
    arriving_here = numbers[:, :, ep.index]  # [sender's ep, etp, number]: here and at the other slices of these experts
    leaving_here = numbers[ep.index, etp.index, :, None].expand_as(arriving_here)
    arriving, leaving = torch.stack([arriving_here, leaving_here]).tolist()
    if any(slice_[2] for sender in arriving for slice_ in sender):
        where = [(e, t) for e in range(ep.size) for t in range(etp.size) if arriving[e][t][2]]
        raise ShapeError(
            f"Expert ids outside [0, {num_experts}) on the rank(s) at (ep, etp) = {where}. Mask assignments that "
            f"should not travel instead of giving them an id out of range."
        )
    send_rows = tuple(leaving[e][0][0] for e in range(ep.size))
    receive_rows = tuple(arriving[e][etp.index][0] for e in range(ep.size))
    rows_per_etp = tuple(sum(arriving[e][t][0] for e in range(ep.size)) for t in range(etp.size))
    assignments = sum(slice_[1] for sender in arriving for slice_ in sender)

    # Sent rows: by destination, then by token.
    place = needed.T.flatten().cumsum(0) - 1
    sent_of_token = torch.where(needed, place.view(ep.size, num_tokens).T, -1)
    token = torch.arange(num_tokens, device=ids.device)[:, None].expand(num_tokens, ep.size)
    token_of_sent = _invert(sent_of_token, token, sum(send_rows))

    # Their ids, as seen at the destination: local expert, or nowhere.
    column = torch.arange(ep.size, device=ids.device).expand(num_tokens, ep.size)
    destination_of_sent = _invert(sent_of_token, column, sum(send_rows))
    here = destination.index_select(0, token_of_sent) == destination_of_sent[:, None]
    local_ids = torch.where(here, ids.index_select(0, token_of_sent) % local_experts, -1).to(torch.int32)
    received = gather_rows(exchange_rows(local_ids, send_rows, receive_rows, ep), rows_per_etp, etp)

    # Expert-major: by local expert, then by row. "Nowhere" sorts last and is cut off.
    key = torch.where(received >= 0, received, local_experts).flatten().long()
    order = key.argsort(stable=True)[:assignments]
    assignment_of_row = torch.full_like(key, -1)
    assignment_of_row[order] = torch.arange(assignments, device=key.device)
    rows_per_expert = key.new_zeros(local_experts + 1).scatter_add_(0, key, torch.ones_like(key))[:local_experts]
    return DispatchPlan(
        groups=groups,
        num_tokens=num_tokens,
        top_k=top_k,
        send_rows=send_rows,
        receive_rows=receive_rows,
        rows_per_etp=rows_per_etp,
        token_of_sent=token_of_sent,
        sent_of_token=sent_of_token,
        row_of_assignment=order // top_k,
        assignment_of_row=assignment_of_row.view(-1, top_k),
        rows_per_expert=rows_per_expert.to(torch.int32),
    )


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Bring rows to their experts: ``[tokens, dim] -> [plan.assignments, dim]``, grouped by local expert.

    Backward:
        The gradients of a row's copies are summed on the expert's rank (in float32 or wider), reduce-scattered over
        ETP, sent back once, and summed over the destinations. Without atomics: repeatable bit by bit.

    Raises:
        ShapeError: ``x`` is not ``[plan.num_tokens, dim]``.
    """
    if x.dim() != 2 or x.shape[0] != plan.num_tokens:
        raise ShapeError(
            f"dispatch takes [tokens, dim] with the {plan.num_tokens} token(s) that were planned, and got "
            f"{list(x.shape)}."
        )
    return _spread(_to_experts(_spread(x, plan.token_of_sent, plan.sent_of_token), plan), *_at_experts(plan))


def combine(rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Bring expert outputs back, weighted and summed: ``[plan.assignments, dim] -> [tokens, dim]``.

    ``weights`` is ``[tokens, top_k]``, as routed; they travel with their rows. Sums are taken in float32 or wider and
    in a fixed order: over a row's experts on their rank, then over ETP, then over the destinations.

    Backward:
        Of ``rows``: the arriving gradient of its token, times the weight. Of ``weights``: its product with the expert's
        output; exact zero for masked assignments.

    Raises:
        ShapeError: ``rows`` or ``weights`` do not have the shape that was planned.
    """
    if rows.dim() != 2 or rows.shape[0] != plan.assignments:
        raise ShapeError(
            f"combine takes [assignments, dim] with the {plan.assignments} row(s) that dispatch returned, and got "
            f"{list(rows.shape)}."
        )
    if weights.shape != (plan.num_tokens, plan.top_k):
        raise ShapeError(
            f"combine takes weights [tokens, top_k] = [{plan.num_tokens}, {plan.top_k}], and got {list(weights.shape)}."
        )
    weights_at_experts = _to_experts(_spread(weights, plan.token_of_sent, plan.sent_of_token), plan)
    partial = _apply(_WeightedSum, rows, weights_at_experts, *_at_experts(plan))
    own = reduce_scatter_rows(partial, plan.groups.etp, row_counts=plan.rows_per_etp)
    returned = all_to_all_rows(own, plan.receive_rows, plan.send_rows, plan.groups.ep)
    return _apply(_Sum, returned, plan.token_of_sent, plan.sent_of_token)


def _to_experts(sent: Tensor, plan: DispatchPlan) -> Tensor:
    """Sent rows -> the rows present at the experts: over EP once, then shared inside the ETP group."""
    received = all_to_all_rows(sent, plan.send_rows, plan.receive_rows, plan.groups.ep)
    return all_gather_rows(received, plan.groups.etp, row_counts=plan.rows_per_etp, backward="reduce_scatter")


def _at_experts(plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    return plan.row_of_assignment, plan.assignment_of_row


def _check_routing(expert_ids: Tensor, groups: FoldedGroups, num_experts: int, mask: Tensor | None) -> None:
    if num_experts % groups.ep.size:
        valid = [ep for ep in range(1, num_experts + 1) if num_experts % ep == 0]
        raise ShapeError(
            f"ep = {groups.ep.size} does not divide num_experts = {num_experts}, so ranks would hold different numbers "
            f"of experts. With {num_experts} experts, ep can be {', '.join(map(str, valid))}."
        )
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


def _ordinal_in_expert(ids: Tensor, active: Tensor, num_experts: int) -> Tensor:
    """How many active assignments of the same expert come before each one: e0 e1 e0 e0 -> 0 0 1 2."""
    key = torch.where(active, ids, num_experts).flatten()
    order = key.argsort(stable=True)
    per_expert = key.new_zeros(num_experts + 1).scatter_add_(0, key, torch.ones_like(key))
    first = per_expert.cumsum(0) - per_expert
    ordinal = torch.empty_like(key)
    ordinal[order] = torch.arange(key.shape[0], device=key.device) - first[key[order]]
    return ordinal.view_as(ids)


def _invert(place: Tensor, value: Tensor, size: int) -> Tensor:
    """``out[place] = value`` for the entries that have a place, without asking how many there are."""
    out = value.new_empty(size + 1)
    out.scatter_(0, torch.where(place >= 0, place, size).flatten(), value.flatten())
    return out[:size]


# ---------------------------------------------------------------------------------------------------------------------
# Two permutations, each other's adjoint. `source[i]` is the row that copy i came from; `copies[r, j]` are row r's
# copies, -1 where it has fewer. Both directions gather, so the order of every sum is fixed.


def _spread(x: Tensor, source: Tensor, copies: Tensor) -> Tensor:
    """Copy row ``source[i]`` to place ``i``; the backward sums the copies."""
    return _apply(_Spread, x, source, copies)


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (copies,) = ctx.saved_tensors
        return _sum_copies(grad, copies), None, None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_copies(rows, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return grad.index_select(0, source), None, None


class _WeightedSum(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, source: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, source, copies)
        return _sum_copies(rows, copies, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, source, copies = ctx.saved_tensors
        arriving = grad.index_select(0, source)
        wide = _wide(rows.dtype)
        weight_of_copy = _invert(copies, weights.to(wide), rows.shape[0])
        product = (arriving.to(wide) * rows).sum(-1)
        grad_rows = (arriving * weight_of_copy[:, None]).to(rows.dtype)
        if rows.shape[0] == 0:
            return grad_rows, torch.zeros_like(weights), None, None
        grad_weights = product.index_select(0, copies.clamp(min=0).flatten()).view_as(weights)
        return grad_rows, torch.where(copies >= 0, grad_weights, 0).to(weights.dtype), None, None


def _sum_copies(rows: Tensor, copies: Tensor, weights: Tensor | None = None) -> Tensor:
    """``out[r] = sum over j of weights[r, j] * rows[copies[r, j]]``, summed in float32 or wider, j ascending."""
    wide = _wide(rows.dtype)
    total = rows.new_zeros((copies.shape[0], *rows.shape[1:]), dtype=wide)
    if rows.shape[0] == 0:
        return total.to(rows.dtype)
    trailing = (1,) * (rows.dim() - 1)
    for j in range(copies.shape[1]):
        place = copies[:, j]
        term = rows.index_select(0, place.clamp(min=0)).to(wide)
        if weights is not None:
            term = term * weights[:, j].to(wide).view(-1, *trailing)
        total += torch.where((place >= 0).view(-1, *trailing), term, 0)
    return total.to(rows.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _apply(function: type[Function], *arguments: object) -> Tensor:
    return cast(Tensor, cast(Any, function).apply(*arguments))
