"""Triton kernels for the row movements and activations of a layer. Each has a plain torch twin, named at its launcher.

All of them are deterministic: sums run in a fixed order, nothing is accumulated atomically. Tables are int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldpar.moe.kernels.sizes import ceil_div, power_of_2
from foldpar.moe.kernels.triton_launches import Kernel

# ---------------------------------------------------------------------------------------------------------------------
# Rows.


@Kernel
@triton.jit
def _copy_rows_kernel(x, source, out, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    origin = tl.load(source + row).to(tl.int64)
    tl.store(out + row * dim + columns, tl.load(x + origin * dim + columns, mask=inside), mask=inside)


@Kernel
@triton.jit
def _sum_copies_kernel(rows, copies, out, dim, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(COPIES):
        place = tl.load(copies + row * COPIES + j).to(tl.int64)
        total += tl.load(rows + place * dim + columns, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    tl.store(out + row * dim + columns, total, mask=inside)


def copy_rows(x: Tensor, source: Tensor) -> Tensor:
    """``x[source]``. Twin: ``permutation.copy_rows``."""
    out = x.new_empty((source.shape[0], x.shape[1]))
    if out.numel():
        block = _block(x.shape[1])
        _copy_rows_kernel[(source.shape[0], ceil_div(x.shape[1], block))](
            x.contiguous(), source, out, x.shape[1], BLOCK=block, num_warps=4
        )
    return out


def sum_copies(rows: Tensor, copies: Tensor) -> Tensor:
    """``out[r] = sum over j of rows[copies[r, j]]`` in float32. Twin: ``permutation.sum_copies``."""
    out = rows.new_empty((copies.shape[0], rows.shape[1]))
    if out.numel():
        block = _block(rows.shape[1])
        _sum_copies_kernel[(copies.shape[0], ceil_div(rows.shape[1], block))](
            rows.contiguous(), copies, out, rows.shape[1], COPIES=copies.shape[1], BLOCK=block, num_warps=4
        )
    return out


def _block(width: int) -> int:
    return min(2048, power_of_2(width))


# ---------------------------------------------------------------------------------------------------------------------
# Rows and their routing weights in one payload: [row | weights], the weights' float32 bits behind the row.


@Kernel
@triton.jit
def _pack_kernel(
    x, weights, source, out, out32, dim, width, TOP_K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(source + row).to(tl.int64)
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < dim
        tl.store(out + row * width + columns, tl.load(x + origin * dim + columns, mask=inside), mask=inside)
    choice = tl.arange(0, KP)
    weight = tl.load(weights + origin * TOP_K + choice, mask=choice < TOP_K)
    tl.store(
        out32 + (row * width + dim) * out.dtype.element_ty.primitive_bitwidth // 32 + choice,
        weight,
        mask=choice < TOP_K,
    )


@Kernel
@triton.jit
def _sum_packed_kernel(
    payload, payload32, copies, out, weights, dim, width,
    COPIES: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    weight = tl.zeros([KP], dtype=tl.float32)
    for j in tl.static_range(COPIES):
        place = tl.load(copies + row * COPIES + j).to(tl.int64)
        behind = (place * width + dim) * payload.dtype.element_ty.primitive_bitwidth // 32
        weight += tl.load(payload32 + behind + choice, mask=(choice < TOP_K) & (place >= 0), other=0.0)
    tl.store(weights + row * TOP_K + choice, weight, mask=choice < TOP_K)
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < dim
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for j in tl.static_range(COPIES):
            place = tl.load(copies + row * COPIES + j).to(tl.int64)
            value = tl.load(payload + place * width + columns, mask=inside & (place >= 0), other=0.0)
            total += value.to(tl.float32)
        tl.store(out + row * dim + columns, total, mask=inside)


@Kernel
@triton.jit
def _unpack_kernel(payload, payload32, slots, out, weights, dim, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + place).to(tl.int64)
    row = slot // TOP_K
    behind = (row * width + dim) * payload.dtype.element_ty.primitive_bitwidth // 32
    tl.store(weights + place, tl.load(payload32 + behind + slot % TOP_K))
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < dim
        tl.store(out + place * dim + columns, tl.load(payload + row * width + columns, mask=inside), mask=inside)


@Kernel
@triton.jit
def _pack_sums_kernel(
    rows, weights, copies, out, out32, dim, width, TOP_K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    place = tl.load(copies + row * TOP_K + choice, mask=choice < TOP_K, other=-1).to(tl.int64)
    weight = tl.load(weights + place, mask=place >= 0, other=0.0).to(tl.float32)
    behind = (row * width + dim) * out.dtype.element_ty.primitive_bitwidth // 32
    tl.store(out32 + behind + choice, weight, mask=choice < TOP_K)
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < dim
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for j in tl.static_range(TOP_K):
            copy = tl.load(copies + row * TOP_K + j).to(tl.int64)
            total += tl.load(rows + copy * dim + columns, mask=inside & (copy >= 0), other=0.0).to(tl.float32)
        tl.store(out + row * width + columns, total, mask=inside)


def pack(x: Tensor, weights: Tensor, source: Tensor) -> Tensor:
    """``[x[source] | weights[source]]``. Twin: ``permutation.pack``."""
    out, sizes = _payload(x, source.shape[0], weights.shape[1])
    if out.shape[0]:
        _pack_kernel[(out.shape[0],)](
            x, weights, source, out, out.view(torch.float32), x.shape[1], out.shape[1], **sizes
        )
    return out


def sum_packed(payload: Tensor, copies: Tensor, dim: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The adjoint of :func:`pack`. Twin: ``permutation.sum_packed``."""
    out = payload.new_empty((copies.shape[0], dim))
    weights = payload.new_empty((copies.shape[0], top_k), dtype=torch.float32)
    if out.shape[0]:
        _sum_packed_kernel[(out.shape[0],)](
            payload, payload.view(torch.float32), copies, out, weights, dim, payload.shape[1],
            COPIES=copies.shape[1], **_sizes(dim, top_k),
        )  # fmt: skip
    return out, weights


def unpack(payload: Tensor, slots: Tensor, dim: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The row and the weight of every slot. Twin: ``permutation.unpack``."""
    out = payload.new_empty((slots.shape[0], dim))
    weights = payload.new_empty(slots.shape[0], dtype=torch.float32)
    if out.shape[0]:
        sizes = _sizes(dim, top_k)
        del sizes["KP"]
        _unpack_kernel[(out.shape[0],)](
            payload, payload.view(torch.float32), slots, out, weights, dim, payload.shape[1], **sizes
        )
    return out, weights


def pack_sums(rows: Tensor, weights: Tensor, copies: Tensor) -> Tensor:
    """The adjoint of :func:`unpack`. Twin: ``permutation.pack_sums``."""
    out, sizes = _payload(rows, copies.shape[0], copies.shape[1])
    if out.shape[0]:
        _pack_sums_kernel[(out.shape[0],)](
            rows, weights, copies, out, out.view(torch.float32), rows.shape[1], out.shape[1], **sizes
        )
    return out


def _payload(like: Tensor, rows: int, top_k: int) -> tuple[Tensor, dict[str, int]]:
    width = like.shape[1] + top_k * 4 // like.element_size()
    return like.new_empty((rows, width)), _sizes(like.shape[1], top_k)


def _sizes(dim: int, top_k: int) -> dict[str, int]:
    return {"TOP_K": top_k, "KP": power_of_2(top_k), "BLOCK": _block(dim), "num_warps": 4}


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU times the routing weight.


@Kernel
@triton.jit
def _swiglu_forward_kernel(
    gate_up, weights, end, out, hidden, WEIGHTED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    if BOUNDED:
        inside = inside & (row < tl.load(end))
    gate = tl.load(gate_up + row * 2 * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * hidden + hidden + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value *= tl.load(weights + row).to(tl.float32)
    tl.store(out + row * hidden + columns, value, mask=inside)


@Kernel
@triton.jit
def _swiglu_backward_kernel(
    grad, gate_up, weights, slots, end, out, grad_gate_up, grad_weights, hidden,
    WEIGHTED: tl.constexpr, PICKED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if BOUNDED:  # noqa: SIM102
        if row >= tl.load(end):
            return
    weight = 1.0
    slot = row
    if PICKED:
        slot = tl.load(slots + row).to(tl.int64)
    if WEIGHTED:
        weight = tl.load(weights + slot).to(tl.float32)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden
        gate = tl.load(gate_up + row * 2 * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * hidden + hidden + columns, mask=inside, other=0.0).to(tl.float32)
        arriving = tl.load(grad + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        slope = tl.sigmoid(gate)
        value = gate * slope
        product += arriving * value * up
        tl.store(out + row * hidden + columns, value * up * weight, mask=inside)
        arriving *= weight
        grad_gate = arriving * up * slope * (1 + gate * (1 - slope))
        tl.store(grad_gate_up + row * 2 * hidden + columns, grad_gate, mask=inside)
        tl.store(grad_gate_up + row * 2 * hidden + hidden + columns, arriving * value, mask=inside)
    if WEIGHTED:
        tl.store(grad_weights + slot, tl.sum(product, axis=0))


def swiglu_forward(gate_up: Tensor, weights: Tensor | None, end: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * weight`` per row, of the rows before ``end``. Twin: ``activations.forward``."""
    rows, hidden = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, hidden))
    if out.numel():
        block = _block(hidden)
        _swiglu_forward_kernel[(rows, ceil_div(hidden, block))](
            gate_up, weights, end, out, hidden,
            WEIGHTED=weights is not None, BOUNDED=end is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor | None, end: Tensor | None = None, slots: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation again, the gradient of ``gate_up``, and that of the weights, of the rows before ``end``.

    With ``slots`` the weight of row ``i`` lies at ``slots[i]``, and so does its gradient; elsewhere that is zero.
    Twin: ``activations.backward``.
    """
    rows, hidden = grad.shape
    out, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
    grad_weights = None
    if weights is not None:
        grad_weights = torch.empty_like(weights) if slots is None else torch.zeros_like(weights)
    if out.numel():
        _swiglu_backward_kernel[(rows,)](
            grad,
            gate_up,
            weights,
            slots,
            end,
            out,
            grad_gate_up,
            grad_weights,
            hidden,
            WEIGHTED=weights is not None,
            PICKED=slots is not None,
            BOUNDED=end is not None,
            BLOCK=min(1024, power_of_2(hidden)),
            num_warps=4,
        )
    return out, grad_gate_up, grad_weights


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


@triton.jit
def _wanted(
    ids, mask, start, tokens, num_experts, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, M: tl.constexpr
):
    """A block of ids, and which of them are inside, active and legal."""
    token = start + tl.arange(0, BT)
    choice = tl.arange(0, KP)
    inside = (token[:, None] < tokens) & (choice[None, :] < K)
    place = token[:, None] * K + choice[None, :]
    expert = tl.load(ids + place, mask=inside, other=-1)
    if M:
        inside = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    return expert, inside, (expert >= 0) & (expert < num_experts)


@Kernel
@triton.jit
def _count_rows_kernel(
    ids, mask, counts, tokens, num_experts, local, span,
    LISTED: tl.constexpr, LP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    destination = tl.program_id(0)
    rows = 0
    assignments = 0
    illegal = 0
    order = tl.arange(0, LP)
    per_expert = tl.zeros([LP], dtype=tl.int32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, tokens), BT):
        expert, active, legal = _wanted(ids, mask, start, tokens, num_experts, K, KP, BT, M)
        here = (active & legal & (expert // local == destination)).to(tl.int32)
        rows += tl.sum(tl.max(here, axis=1), axis=0)
        assignments += tl.sum(tl.sum(here, axis=1), axis=0)
        illegal += tl.sum(tl.sum((active & (legal == 0)).to(tl.int32), axis=1), axis=0)
        for e in tl.static_range(LISTED):
            hits = tl.sum(tl.sum(here * (expert == destination * local + e).to(tl.int32), axis=1), axis=0)
            per_expert += tl.where(order == e, hits, 0)
    out = counts + (destination * tl.num_programs(1) + tl.program_id(1)) * (3 + LISTED)
    tl.store(out, rows)
    tl.store(out + 1, assignments)
    tl.store(out + 2, illegal)
    tl.store(out + 3 + order, per_expert, mask=order < LISTED)


@Kernel
@triton.jit
def _place_rows_kernel(
    ids, mask, counts, token_of_sent, sent_of_token, local_ids, tokens, num_experts, local, destinations,
    numbers, span, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    destination = tl.program_id(0)
    me = destination * tl.num_programs(1) + tl.program_id(1)
    before = tl.arange(0, DP)
    place = tl.sum(tl.load(counts + before * numbers, mask=before < me, other=0), axis=0).to(tl.int32)
    choice = tl.arange(0, KP)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, tokens), BT):
        token = start + tl.arange(0, BT)
        expert, active, legal = _wanted(ids, mask, start, tokens, num_experts, K, KP, BT, M)
        here = active & legal & (expert // local == destination)
        wanted = tl.max(here.to(tl.int32), axis=1)
        sent = place + tl.cumsum(wanted, axis=0) - 1
        tl.store(
            sent_of_token + token * destinations + destination, tl.where(wanted > 0, sent, -1), mask=token < tokens
        )
        tl.store(token_of_sent + sent, token, mask=wanted > 0)
        local_id = tl.where(here, expert - destination * local, -1).to(tl.int32)
        tl.store(
            local_ids + sent[:, None] * K + choice[None, :],
            local_id,
            mask=(wanted[:, None] > 0) & (choice[None, :] < K),
        )
        place += tl.sum(wanted, axis=0)


@Kernel
@triton.jit
def _count_experts_kernel(ids, counts, slots, experts, blocks, EP: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EP)
    chosen = tl.load(ids + slot, mask=slot < slots, other=-1)
    hit = (chosen[:, None] == expert[None, :]).to(tl.int32)
    tl.store(counts + expert * blocks + block, tl.sum(hit, axis=0), mask=expert < experts)


@triton.jit
def _sums_of_few(counts, block, blocks, expert, experts, EP: tl.constexpr, AT_ONCE: tl.constexpr):
    """Of every expert: its first place in this block, its last place anywhere, and how many it has."""
    sizes = tl.zeros([EP], dtype=tl.int32)
    before = tl.zeros([EP], dtype=tl.int32)
    for first in range(0, blocks, AT_ONCE):
        other = first + tl.arange(0, AT_ONCE)
        inside = (other < blocks)[:, None] & (expert < experts)[None, :]
        count = tl.load(counts + expert[None, :] * blocks + other[:, None], mask=inside, other=0)
        sizes += tl.sum(count, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], count, 0), axis=0)
    last = tl.cumsum(sizes, axis=0)
    return last - sizes + before, last, sizes


@triton.jit
def _sums_of_many(counts, running, block, blocks, expert, experts):
    """The same, from the running sums of all counts."""
    inside = expert < experts
    at = expert * blocks + block
    start = tl.load(running + at, mask=inside, other=0) - tl.load(counts + at, mask=inside, other=0)
    last = tl.load(running + (expert + 1) * blocks - 1, mask=inside, other=0)
    before = tl.load(running + expert * blocks - 1, mask=(expert > 0) & inside, other=0)
    return start, last, last - before


@Kernel
@triton.jit
def _place_experts_kernel(
    ids, counts, running, slot_of_assignment, row_of_assignment, assignment_of_slot, group_ends, group_sizes,
    slots, experts, blocks, assignments,
    MANY: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EP)
    chosen = tl.load(ids + slot, mask=slot < slots, other=-1)
    hit = (chosen[:, None] == expert[None, :]).to(tl.int32)
    if MANY:
        start, last, sizes = _sums_of_many(counts, running, block, blocks, expert, experts)
    else:
        start, last, sizes = _sums_of_few(counts, block, blocks, expert, experts, EP, AT_ONCE)
    place = tl.sum(hit * (start[None, :] + tl.cumsum(hit, axis=0) - 1), axis=1)
    there = (chosen >= 0) & (chosen < experts)
    tl.store(assignment_of_slot + slot, tl.where(there, place, -1), mask=slot < slots)
    tl.store(slot_of_assignment + place, slot, mask=there)
    tl.store(row_of_assignment + place, slot // K, mask=there)
    behind = (slot >= tl.max(last, axis=0)) & (slot < assignments)
    tl.store(slot_of_assignment + slot, tl.zeros_like(slot), mask=behind)
    tl.store(row_of_assignment + slot, tl.zeros_like(slot), mask=behind)
    if block == 0:
        tl.store(group_ends + expert, last, mask=expert < experts)
        tl.store(group_sizes + expert, sizes, mask=expert < experts)


def count_rows(ids: Tensor, mask: Tensor | None, num_experts: int, destinations: int, listed: int = 0) -> Tensor:
    """Rows, assignments, illegal ids, and assignments of listed experts. Twin: ``permutation.count_rows``."""
    counts = _count_spans(ids, mask, num_experts, destinations, listed)
    return counts.sum(1) if counts.shape[1] > 1 else counts[:, 0]


def place_rows(ids: Tensor, mask: Tensor | None, counts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of the sent rows, of the largest size possible. Twin: ``permutation.place_rows``."""
    destinations, (tokens, top_k) = counts.shape[0], ids.shape
    most = tokens * min(destinations, top_k)
    token_of_sent = ids.new_empty(most, dtype=torch.int32)
    sent_of_token = ids.new_empty((tokens, destinations), dtype=torch.int32)
    local_ids = ids.new_empty((most, top_k), dtype=torch.int32)
    spans, span = _spans(ids, destinations)
    if spans > 1:
        counts = _count_spans(ids, mask, num_experts, destinations, 0)
    _place_rows_kernel[(destinations, spans)](
        ids, mask, counts, token_of_sent, sent_of_token, local_ids, tokens, num_experts,
        num_experts // destinations, destinations, counts.shape[-1], span,
        DP=power_of_2(destinations * spans), **_token_blocks(ids, mask),
    )  # fmt: skip
    return token_of_sent, sent_of_token, local_ids


def _count_spans(ids: Tensor, mask: Tensor | None, num_experts: int, destinations: int, listed: int) -> Tensor:
    """``[destinations, spans, 3 + listed]``: what :func:`count_rows` counts, of each span of tokens."""
    spans, span = _spans(ids, destinations)
    counts = ids.new_empty((destinations, spans, 3 + listed), dtype=torch.int64)
    _count_rows_kernel[(destinations, spans)](
        ids, mask, counts, ids.shape[0], num_experts, num_experts // destinations, span,
        LISTED=listed, LP=power_of_2(max(listed, 1)), **_token_blocks(ids, mask),
    )  # fmt: skip
    return counts


def _spans(ids: Tensor, destinations: int) -> tuple[int, int]:
    """In how many spans tokens are worked on side by side, and how long one is: where destinations are few, there
    would be few programs; a few blocks are not worth the second count.
    """
    block = _block_of_tokens(ids)
    blocks = ceil_div(ids.shape[0], block)
    spans = min(blocks, max(1, 128 // destinations)) if blocks > 4 else 1
    length = max(1, ceil_div(blocks, spans))
    return max(1, ceil_div(blocks, length)), length * block


FEW_BLOCKS = 256
"""Up to here every program adds up the counts of all blocks itself, which saves a launch; beyond, it takes longer."""


def place_experts(
    local_ids: Tensor, local_experts: int, assignments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A stable counting sort by expert. Twin: ``permutation.place_experts``."""
    slots, padded = local_ids.numel(), power_of_2(max(local_experts, 2))
    block = max(16, min(256, 8192 // padded))
    blocks = max(1, ceil_div(slots, block))
    counts, slot_of_assignment, row_of_assignment, assignment_of_slot, group_ends, group_sizes = _tables(
        local_ids, local_experts * blocks, assignments, assignments, slots, local_experts, local_experts
    )
    _count_experts_kernel[(blocks,)](local_ids, counts, slots, local_experts, blocks, EP=padded, BLOCK=block)
    many = blocks > FEW_BLOCKS
    running = counts.cumsum(0, dtype=torch.int32) if many else None
    _place_experts_kernel[(blocks,)](
        local_ids, counts, running, slot_of_assignment, row_of_assignment, assignment_of_slot, group_ends, group_sizes,
        slots, local_experts, blocks, assignments,
        MANY=many, K=local_ids.shape[1], EP=padded, BLOCK=block, AT_ONCE=max(1, min(128, 8192 // padded)),
    )  # fmt: skip
    return slot_of_assignment, row_of_assignment, assignment_of_slot.view_as(local_ids), group_ends, group_sizes


def _tables(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Of int32, from whole 16 bytes on, in one allocation."""
    whole = [4 * ceil_div(size, 4) for size in sizes]
    parts = like.new_empty(sum(whole), dtype=torch.int32).split(whole)
    return tuple(part if part.shape[0] == size else part[:size] for part, size in zip(parts, sizes, strict=True))


def _token_blocks(ids: Tensor, mask: Tensor | None) -> dict[str, object]:
    width = power_of_2(ids.shape[1])
    return {"K": ids.shape[1], "KP": width, "BT": _block_of_tokens(ids), "M": mask is not None, "num_warps": 8}


def _block_of_tokens(ids: Tensor) -> int:
    return max(16, 4096 // power_of_2(ids.shape[1]))
