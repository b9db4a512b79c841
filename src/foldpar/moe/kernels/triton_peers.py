"""Triton kernels that read the memory of other ranks: the one-sided journey of rows; see ``one_sided``.

``bases`` are the addresses of all ranks' buffers as int64, in coordinate order; ``*_at`` are byte offsets into any of
them. Sums run in a fixed order and nothing is accumulated atomically. Every write is inside its tensor whatever the
routing: what has no room is not written, and a flag tells. Kernels are not compiled anew for other numbers of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldpar.moe.kernels.permutation import Places
from foldpar.moe.kernels.triton_launches import Kernel


@Kernel
@triton.jit(do_not_specialize=["tokens", "num_experts"])
def _publish_kernel(
    x, weights, ids, mask, header, own_x, own_weights, own_ids, kept_ids, tokens, dim, num_experts,
    ROUTED: tl.constexpr, M: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if ROUTED:  # noqa: SIM102
        if row == 0:
            tl.store(header, tokens)
    if row < tokens:
        if ROUTED:
            choice = tl.arange(0, KP)
            here = choice < K
            at = row * K + choice
            expert = tl.load(ids + at, mask=here, other=-1)
            active = here
            if M:
                active = active & (tl.load(mask + at, mask=here, other=0) != 0)
            legal = (expert >= 0) & (expert < num_experts)
            kept = tl.where(active & legal, expert, -1).to(tl.int32)
            tl.store(own_ids + at, tl.where(active & (legal == 0), -2, kept), mask=here)
            tl.store(kept_ids + at, kept, mask=here)
            tl.store(own_weights + at, tl.load(weights + at, mask=here).to(tl.float32), mask=here)
        for start in range(0, dim, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < dim
            tl.store(own_x + row * dim + columns, tl.load(x + row * dim + columns, mask=inside), mask=inside)


@Kernel
@triton.jit(do_not_specialize=["slots", "per_rank", "first", "local", "blocks"])
def _read_ids_kernel(
    bases, ids_at, local_ids, counts, flags, slots, per_rank, first, local, blocks,
    K: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    place = slot % per_rank
    base = tl.load(bases + slot // per_rank, mask=inside, other=0)
    tokens = tl.load(base.to(tl.pointer_type(tl.int32)), mask=inside, other=0)
    inside = inside & (place // K < tokens)
    told = tl.load((base + ids_at).to(tl.pointer_type(tl.int32)) + place, mask=inside, other=-1)
    tl.store(flags + 2 + tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], 1, tl.int32), mask=told == -2)
    expert = told - first
    chosen = tl.where(inside & (told >= 0) & (expert >= 0) & (expert < local), expert, -1)
    tl.store(local_ids + slot, chosen, mask=slot < slots)
    number = tl.arange(0, EP)
    hit = (chosen[:, None] == number[None, :]).to(tl.int32)
    tl.store(counts + number * blocks + block, tl.sum(hit, axis=0), mask=number < local)


@Kernel
@triton.jit(do_not_specialize=["slots", "local", "blocks", "room"])
def _place_kernel(
    local_ids, counts, running, places, ends, flags, slots, local, blocks, room,
    EP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    number = tl.arange(0, EP)
    chosen = tl.load(local_ids + slot, mask=slot < slots, other=-1)
    hit = (chosen[:, None] == number[None, :]).to(tl.int32)
    at = number * blocks + block
    end = tl.load(running + at, mask=number < local, other=0)
    start = end - tl.load(counts + at, mask=number < local, other=0)
    place = tl.sum(hit * (start[None, :] + tl.cumsum(hit, axis=0) - 1), axis=1)
    place = tl.where(chosen < 0, -1, tl.where(place < room, place, -2))
    tl.store(places + slot, place, mask=slot < slots)
    if block == blocks - 1:
        tl.store(ends + number, tl.minimum(end, room), mask=number < local)
        wanted = tl.max(end, axis=0)
        before = tl.load(flags)
        tl.store(flags, tl.where(wanted > room, tl.maximum(before, wanted), before))
        tl.store(flags + 1, room)


@Kernel
@triton.jit(do_not_specialize=["most"])
def _read_rows_kernel(
    bases, x_at, weights_at, places, out, out_weights, sources, slots, most, dim,
    WEIGHTED: tl.constexpr, TOGETHER: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    place = tl.load(places + row * K + choice, mask=choice < K, other=-1).to(tl.int64)
    if tl.max(place, axis=0) >= 0:
        token = row % most
        base = tl.load(bases + row // most)
        if WEIGHTED:
            published = (base + weights_at).to(tl.pointer_type(tl.float32)) + token * K
            weight = tl.load(published + choice, mask=choice < K)
            if TOGETHER:
                slot = tl.program_id(0) * K + choice
                tl.store(out_weights + slot, weight, mask=choice < K)
                tl.store(sources + place, tl.zeros_like(slot) + tl.program_id(0), mask=place >= 0)
                tl.store(slots + place, slot, mask=place >= 0)
            else:
                tl.store(out_weights + place, weight, mask=place >= 0)
        source = (base + x_at).to(tl.pointer_type(out.dtype.element_ty)) + token * dim
        for start in range(0, dim, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < dim
            value = tl.load(source + columns, mask=inside)
            if TOGETHER:
                tl.store(out + row * dim + columns, value, mask=inside)
            else:
                for j in tl.static_range(K):
                    copy = tl.load(places + row * K + j).to(tl.int64)
                    tl.store(out + copy * dim + columns, value, mask=inside & (copy >= 0))


@Kernel
@triton.jit
def _offer_sums_kernel(
    rows, weights, places, out, out_weights, dim,
    WEIGHTED: tl.constexpr, TOGETHER: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    place = tl.load(places + row * K + choice, mask=choice < K, other=-1).to(tl.int64)
    if tl.min(tl.where(place == -1, 0, -1), axis=0) < 0:  # somebody asked for this row, also where it found no room
        if WEIGHTED:
            at = place
            if TOGETHER:
                at = row * K + choice
            weight = tl.load(weights + at, mask=place >= 0, other=0.0).to(tl.float32)
            tl.store(out_weights + row * K + choice, weight, mask=choice < K)
        for start in range(0, dim, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < dim
            if TOGETHER:
                tl.store(out + row * dim + columns, tl.load(rows + row * dim + columns, mask=inside), mask=inside)
            else:
                total = tl.zeros([BLOCK], dtype=tl.float32)
                for j in tl.static_range(K):
                    copy = tl.load(places + row * K + j).to(tl.int64)
                    total += tl.load(rows + copy * dim + columns, mask=inside & (copy >= 0), other=0.0).to(tl.float32)
                tl.store(out + row * dim + columns, total, mask=inside)


@Kernel
@triton.jit(do_not_specialize=["first_row", "local"])
def _take_sums_kernel(
    bases, sums_at, weights_at, ids, out, out_weights, first_row, dim, local,
    RANKS: tl.constexpr, SLICES: tl.constexpr, WEIGHTED: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    expert = tl.load(ids + token * K + choice, mask=choice < K, other=-1)
    owner = tl.where(expert >= 0, expert // local, -1)
    row = first_row + token
    if WEIGHTED:
        weight = tl.zeros([KP], dtype=tl.float32)
        for part in tl.static_range(SLICES):
            base = tl.load(bases + owner * SLICES + part, mask=owner >= 0, other=0)
            offered = (base + weights_at).to(tl.pointer_type(tl.float32)) + row * K + choice
            weight += tl.load(offered, mask=owner >= 0, other=0.0)
        tl.store(out_weights + token * K + choice, weight, mask=choice < K)
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < dim
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for rank in tl.static_range(RANKS):
            asked = tl.max((owner == rank // SLICES).to(tl.int32), axis=0) > 0
            theirs = (tl.load(bases + rank) + sums_at).to(tl.pointer_type(out.dtype.element_ty)) + row * dim
            total += tl.load(theirs + columns, mask=inside & asked, other=0.0).to(tl.float32)
        tl.store(out + token * dim + columns, total, mask=inside)


def publish(x: Tensor, own_x: Tensor) -> None:
    """Copy ``[tokens, dim]`` to where all ranks read it."""
    if x.numel():
        _publish_kernel[(x.shape[0],)](
            x, None, None, None, None, own_x, None, None, None, x.shape[0], x.shape[1], 0,
            ROUTED=False, M=False, **_sizes(x.shape[1], 1),
        )  # fmt: skip


def publish_routed(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    own: tuple[Tensor, Tensor, Tensor, Tensor],
    num_experts: int,
) -> Tensor:
    """Copy rows, weights and ids to ``own`` (header, rows, weights, ids); returns the active ids, -1 elsewhere.

    What is published of an active id that is illegal is -2.
    """
    tokens, top_k = ids.shape
    kept = ids.new_empty((tokens, top_k), dtype=torch.int32)
    header, own_x, own_weights, own_ids = own
    _publish_kernel[(max(tokens, 1),)](
        x, weights, ids, mask, header, own_x, own_weights, own_ids, kept, tokens, x.shape[1], num_experts,
        ROUTED=True, M=mask is not None, **_sizes(x.shape[1], top_k),
    )  # fmt: skip
    return kept


def place_rows(
    bases: Tensor, ids_at: int, most: int, top_k: int, first: int, local: int, room: int, flags: Tensor
) -> tuple[Tensor, Tensor]:
    """Read all ranks' ids and sort those of the experts ``first`` to ``first + local`` by expert, rank and token.

    Returns ``places`` (``[ranks * most, top_k]``: the expert-major row of every slot, -1 where its expert is not here,
    -2 where there is no room) and the ends of the experts' groups, none beyond ``room``. ``flags`` are those of a
    ``PeerMemory``.
    """
    ranks, per_rank = bases.shape[0], most * top_k
    slots, padded = ranks * per_rank, triton.next_power_of_2(max(local, 2))
    block = max(16, min(256, 8192 // padded))
    blocks = triton.cdiv(slots, block)
    local_ids = bases.new_empty(slots, dtype=torch.int32)
    counts = bases.new_empty((local, blocks), dtype=torch.int32)
    _read_ids_kernel[(blocks,)](
        bases, ids_at, local_ids, counts, flags, slots, per_rank, first, local, blocks, K=top_k, EP=padded, BLOCK=block
    )
    places, ends = bases.new_empty((ranks * most, top_k), dtype=torch.int32), counts.new_empty(local)
    _place_kernel[(blocks,)](
        local_ids, counts, counts.view(-1).cumsum(0, dtype=torch.int32), places, ends, flags, slots, local, blocks,
        room, EP=padded, BLOCK=block,
    )  # fmt: skip
    return places, ends


def read_rows(
    bases: Tensor, x_at: int, weights_at: int | None, places: Tensor, out: Tensor, out_weights: Tensor | None,
    apart: Places | None,
) -> None:  # fmt: skip
    """Read every row that is wanted here once, and write it to all its places.

    With ``apart`` it is written as it lies in ``places``, and its weights too, with which come the tables of ``apart``.
    """
    (rows, top_k), dim = places.shape, out.shape[1]
    _read_rows_kernel[(rows,)](
        bases, x_at, weights_at or 0, places, out, out_weights, apart and apart.source, apart and apart.slots,
        rows // bases.shape[0], dim, WEIGHTED=weights_at is not None, TOGETHER=apart is not None, **_sizes(dim, top_k),
    )  # fmt: skip


def offer_sums(
    rows: Tensor, weights: Tensor | None, places: Tensor, out: Tensor, out_weights: Tensor, *, together: bool
) -> None:
    """Sum the copies of every row that was asked for, in float32, to where its owner reads the sum.

    ``together``: ``rows`` are the sums, and ``weights`` lie as ``places`` do.
    """
    dim = rows.shape[1]
    _offer_sums_kernel[(places.shape[0],)](
        rows, weights, places, out, out_weights, dim, WEIGHTED=weights is not None, TOGETHER=together,
        **_sizes(dim, places.shape[1]),
    )  # fmt: skip


def take_sums(
    bases: Tensor, sums_at: int, weights_at: int, ids: Tensor, first_row: int, local: int, slices: int, out: Tensor,
    out_weights: Tensor | None,
) -> None:  # fmt: skip
    """Add up the sums of the ranks that were asked, in float32 and in coordinate order.

    Of every expert there are ``slices``, on ranks that follow each other; all of them were asked.
    """
    if out.numel():
        _take_sums_kernel[(out.shape[0],)](
            bases, sums_at, weights_at, ids, out, out_weights, first_row, out.shape[1], local,
            RANKS=bases.shape[0], SLICES=slices, WEIGHTED=out_weights is not None, **_sizes(out.shape[1], ids.shape[1]),
        )  # fmt: skip


def _sizes(dim: int, top_k: int) -> dict[str, int]:
    padded = triton.next_power_of_2(top_k)
    return {"K": top_k, "KP": padded, "BLOCK": min(2048, triton.next_power_of_2(max(dim, 512))), "num_warps": 4}
