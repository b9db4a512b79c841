"""Permutations of rows, and the tables that describe them.

Two movements, each other's adjoint. ``source[i]`` is the row that copy ``i`` came from; ``copies[r, j]`` are the copies
of row ``r``, ``-1`` where it has fewer. Both directions gather, so the order of every sum is fixed: no atomics, equal
bits in every run. On GPUs they are Triton kernels, elsewhere the torch code here, with which the kernels are tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from foldpar.comm import once_differentiable

_HAS_TRITON = find_spec("triton") is not None


def runs_on_triton(x: Tensor) -> bool:
    """Whether the kernels take this tensor; float64 keeps its own precision in the torch code."""
    return _HAS_TRITON and x.is_cuda and x.dtype != torch.float64


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Rows that lie anywhere: where the rows of all groups come from, and where their outputs are summed.

    A *slot* is a place in ``[rows, top_k]``. ``source`` is the row behind each row of the groups, ``slots`` its slot,
    and ``copies`` (``[rows, top_k]``) the inverse, ``-1`` where nothing is computed. ``ends`` (int32) are the groups'.
    """

    source: Tensor
    slots: Tensor
    copies: Tensor
    ends: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Movements.


def spread(x: Tensor, source: Tensor, copies: Tensor) -> Tensor:
    """Copy row ``source[i]`` to place ``i``; the backward sums the copies."""
    return cast(Tensor, cast(Any, _Spread).apply(x, source, copies))


def collect(rows: Tensor, source: Tensor, copies: Tensor) -> Tensor:
    """Sum the copies of every row; the backward copies its gradient to each."""
    return cast(Tensor, cast(Any, _Collect).apply(rows, source, copies))


def pick(weights: Tensor, slot_of_assignment: Tensor, assignment_of_slot: Tensor) -> Tensor:
    """The weight of each assignment, ``[rows, top_k] -> [assignments]``; the backward puts its gradient back."""
    return cast(Tensor, cast(Any, _Pick).apply(weights, slot_of_assignment, assignment_of_slot))


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return copy_rows(x, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (copies,) = ctx.saved_tensors
        return sum_copies(grad, copies), None, None


class _Collect(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return sum_copies(rows, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return copy_rows(grad, source), None, None


class _Pick(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, slot_of_assignment: Tensor, assignment_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(assignment_of_slot)
        return weights.flatten().index_select(0, slot_of_assignment)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (assignment_of_slot,) = ctx.saved_tensors
        return put_back(grad, assignment_of_slot), None, None


def put_back(values: Tensor, assignment_of_slot: Tensor) -> Tensor:
    """``[assignments] -> [rows, top_k]``: the value of each slot, zero where nothing is computed."""
    if values.shape[0] == 0:
        return torch.zeros_like(assignment_of_slot, dtype=values.dtype)
    at_slot = values.index_select(0, assignment_of_slot.clamp(min=0).flatten()).view_as(assignment_of_slot)
    return torch.where(assignment_of_slot >= 0, at_slot, 0)


def copy_rows(x: Tensor, source: Tensor) -> Tensor:
    """``x[source]``."""
    if runs_on_triton(x):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.copy_rows(x, source)
    return x.index_select(0, source)


def sum_copies(rows: Tensor, copies: Tensor) -> Tensor:
    """``out[r] = sum over j of rows[copies[r, j]]``, in float32 or wider, j ascending."""
    if runs_on_triton(rows):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.sum_copies(rows, copies)
    total = rows.new_zeros((copies.shape[0], rows.shape[1]), dtype=wide(rows.dtype))
    for place in copies.unbind(1) if rows.shape[0] else ():
        copy = rows.index_select(0, place.clamp(min=0))
        total += torch.where((place >= 0)[:, None], copy, 0)
    return total.to(rows.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and their routing weights in one payload, [row | weights]: the weights' bits behind the row, as elements of the
# row's dtype. They are bits and no numbers: a payload travels as bytes, and nothing may be computed with it.


def packs(x: Tensor, weights: Tensor) -> bool:
    """Whether a row's weights fill whole elements of the row's dtype, in the precision that rows are summed in."""
    bits = weights.shape[1] * weights.element_size()
    return weights.dtype == wide(x.dtype) and bits % x.element_size() == 0 and (x.shape[1] * x.element_size()) % 4 == 0


def pack(x: Tensor, weights: Tensor, source: Tensor) -> Tensor:
    """``[x[source] | weights[source]]``."""
    if runs_on_triton(x):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.pack(x, weights, source)
    return torch.cat([x.index_select(0, source), weights.index_select(0, source).view(x.dtype)], dim=1)


def sum_packed(payload: Tensor, copies: Tensor, dim: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The adjoint of :func:`pack`: the sums of the copies of every row, and of its weights."""
    if runs_on_triton(payload):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.sum_packed(payload, copies, dim, top_k)
    behind = payload[:, dim:].contiguous().view(wide(payload.dtype))
    return sum_copies(payload[:, :dim], copies), sum_copies(behind, copies)


def unpack(payload: Tensor, slots: Tensor, dim: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The row and the weight of every slot; slot ``row * top_k + choice``."""
    if runs_on_triton(payload):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.unpack(payload, slots, dim, top_k)
    weights = payload[:, dim:].contiguous().view(wide(payload.dtype))
    return payload[:, :dim].index_select(0, slots // top_k), weights.flatten().index_select(0, slots)


def pack_sums(rows: Tensor, weights: Tensor, copies: Tensor) -> Tensor:
    """The adjoint of :func:`unpack`: the sum of every row's copies, and the weight of each of them."""
    if runs_on_triton(rows):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.pack_sums(rows, weights, copies)
    summed = sum_copies(rows, copies)
    if rows.shape[0] == 0:
        back = weights.new_zeros(copies.shape)
    else:
        back = torch.where(copies >= 0, weights.index_select(0, copies.clamp(min=0).flatten()).view_as(copies), 0)
    return torch.cat([summed, back.view(summed.dtype)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def count_rows(ids: Tensor, mask: Tensor | None, num_experts: int, destinations: int, listed: int = 0) -> Tensor:
    """``[destinations, 3 + listed]``, int64: rows and assignments for each destination, how many active ids are illegal
    anywhere, and the assignments of the destination's first ``listed`` experts.
    """
    if _HAS_TRITON and ids.is_cuda:
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.count_rows(ids, mask, num_experts, destinations, listed)
    destination, illegal = _destination(ids, mask, num_experts, destinations)
    needed = _needed(destination, destinations)
    assignments = needed.new_zeros(destinations + 1, dtype=torch.int64)
    assignments.scatter_add_(0, destination.flatten(), torch.ones_like(destination).flatten())
    numbers = torch.stack([needed.sum(0), assignments[:destinations], illegal.expand(destinations)], dim=1)
    if not listed:
        return numbers
    expert = torch.where(destination < destinations, ids.long(), num_experts).flatten()
    per_expert = expert.new_zeros(num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))[:num_experts]
    return torch.cat([numbers, per_expert.view(destinations, -1)[:, :listed]], dim=1)


def place_rows(ids: Tensor, mask: Tensor | None, counts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which row goes where: by destination, then by token.

    Returns ``token_of_sent``, its inverse ``sent_of_token`` (``[tokens, destinations]``), and for every sent row the
    local ids of the experts that want it there, ``-1`` elsewhere. The first and the last may be longer than there are
    rows to send: nobody has asked the device yet.
    """
    if _HAS_TRITON and ids.is_cuda:
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.place_rows(ids, mask, counts, num_experts)
    destinations, tokens = counts.shape[0], ids.shape[0]
    destination, _ = _destination(ids, mask, num_experts, destinations)
    needed = _needed(destination, destinations)
    place = needed.T.flatten().cumsum(0) - 1
    sent_of_token = torch.where(needed, place.view(destinations, tokens).T, -1)
    most = tokens * min(destinations, ids.shape[1])
    token = torch.arange(tokens, device=ids.device)[:, None].expand(tokens, destinations)
    token_of_sent = _invert(sent_of_token, token, most)
    goes_to = _invert(sent_of_token, torch.arange(destinations, device=ids.device).expand(tokens, -1), most)
    here = destination.index_select(0, token_of_sent) == goes_to[:, None]
    local = ids.index_select(0, token_of_sent) % (num_experts // destinations)
    return token_of_sent, sent_of_token, torch.where(here, local, -1).to(torch.int32)


def place_experts(
    local_ids: Tensor, local_experts: int, assignments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The expert-major order of ``[rows, top_k]`` slots: by local expert, then by row; what is no local expert's goes
    nowhere.

    Returns ``slot_of_assignment`` and ``row_of_assignment``, the inverse ``assignment_of_slot`` (``[rows, top_k]``),
    and of every expert's group the end and the size (int32). Where there are fewer than ``assignments``, those behind
    the last end are of any slot.
    """
    if _HAS_TRITON and local_ids.is_cuda:
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.place_experts(local_ids, local_experts, assignments)
    there = (local_ids >= 0) & (local_ids < local_experts)
    key = torch.where(there, local_ids, local_experts).flatten().long()
    slot_of_assignment = key.argsort(stable=True)[:assignments]  # "nowhere" sorts last
    assignment_of_slot = torch.full_like(key, -1)
    assignment_of_slot[slot_of_assignment] = torch.arange(assignments, device=key.device)
    assignment_of_slot = torch.where(there, assignment_of_slot.view_as(local_ids), -1)
    rows_per_expert = key.new_zeros(local_experts + 1).scatter_add_(0, key, torch.ones_like(key))[:local_experts]
    return (
        slot_of_assignment,
        slot_of_assignment // local_ids.shape[1],
        assignment_of_slot,
        rows_per_expert.cumsum(0, dtype=torch.int32),
        rows_per_expert.int(),
    )


def ordinal_in_expert(ids: Tensor, active: Tensor, num_experts: int) -> Tensor:
    """How many active assignments of the same expert come before each one: e0 e1 e0 e0 -> 0 0 1 2."""
    key = torch.where(active, ids, num_experts).flatten()
    order = key.argsort(stable=True)
    per_expert = key.new_zeros(num_experts + 1).scatter_add_(0, key, torch.ones_like(key))
    first = per_expert.cumsum(0) - per_expert
    ordinal = torch.empty_like(key)
    ordinal[order] = torch.arange(key.shape[0], device=key.device) - first[key[order]]
    return ordinal.view_as(ids)


def _destination(ids: Tensor, mask: Tensor | None, num_experts: int, destinations: int) -> tuple[Tensor, Tensor]:
    """Where each assignment goes, ``destinations`` for nowhere; and how many active ids are illegal."""
    legal = (ids >= 0) & (ids < num_experts)
    active = legal if mask is None else legal & mask
    illegal = ~legal if mask is None else ~legal & mask
    return torch.where(active, ids // (num_experts // destinations), destinations), illegal.sum()


def _needed(destination: Tensor, destinations: int) -> Tensor:
    """``[tokens, destinations]``: whether any expert there wants the token."""
    needed = destination.new_zeros((destination.shape[0], destinations + 1), dtype=torch.bool)
    return needed.scatter_(1, destination, True)[:, :destinations]


def _invert(place: Tensor, value: Tensor, size: int) -> Tensor:
    """``out[place] = value`` for the entries that have a place, zero elsewhere."""
    out = value.new_zeros(size + 1)
    out.scatter_(0, torch.where(place >= 0, place, size).flatten(), value.flatten())
    return out[:size]
