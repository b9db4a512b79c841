"""Triton kernels for the experts' products, on Hopper: rows are read where they lie.

Groups of rows are cut into tiles on the device (:func:`tiles_of`), so the host knows no sizes. Programs are persistent.
Tiles of rows that share weights follow each other, so that weights come from L2. Whatever lies as it is read comes by
the copy engine; gathered rows come by pointers. Sums are in float32 and in a fixed order: nothing is atomic, runs are
bitwise equal. Each has a plain torch twin, named at its launcher.

    rows, source -> first product, activation         gather, product, SwiGLU times the routing weight
    activation -> outputs                             product
    grad, source -> gradient of the activation        gather, product
    gradient of the first product -> of the rows      product
    two sides of rows -> gradient of weights          product over the rows of a group, one side gathered
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged

from foldpar.moe.kernels.sizes import power_of_2
from foldpar.moe.kernels.triton_launches import Described, Kernel


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the work of a kernel is cut.

    Attributes:
        rows, columns, depth: of a tile. The first product has ``columns`` of gate and as many of up.
        stages: how many steps of depth are in flight.
        warps: of a program.
        chunk: how many tiles of rows follow each other with the same columns.
        flat: whether the loads of a program's next tile start before it has written this one.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int = 8
    chunk: int = 16
    flat: bool = True

    @cache  # noqa: B019
    def options(self) -> dict[str, Any]:
        """What a kernel is made with."""
        return {
            "BM": self.rows, "BN": self.columns, "BK": self.depth, "STAGES": self.stages,
            "OUTER": self.stages if self.flat else 1, "CHUNK": self.chunk, "FLAT": self.flat, "num_warps": self.warps,
        }  # fmt: skip


blocks = cache(Blocks)
"""They are few, and made for every product."""


# ---------------------------------------------------------------------------------------------------------------------
# Tiles.


@Kernel
@triton.jit
def _tiles_kernel(ends, table, experts, EP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    me = tl.program_id(0)
    expert = tl.arange(0, EP)
    inside = expert < experts
    end = tl.load(ends + expert, mask=inside, other=0)
    start = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    tiles = (end - start + BM - 1) // BM
    before = tl.sum(tl.where(expert < me, tiles, 0), axis=0)
    mine = tl.sum(tl.where(expert == me, tiles, 0), axis=0)
    first = tl.sum(tl.where(expert == me, start, 0), axis=0)
    last = tl.sum(tl.where(expert == me, end, 0), axis=0)
    if me == 0:
        tl.store(table, tl.sum(tiles, axis=0))
    for begin in range(0, mine, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        at = table + 4 * (1 + before + tile)
        tl.store(at, tl.zeros_like(tile) + me, mask=tile < mine)
        tl.store(at + 1, first + tile * BM, mask=tile < mine)
        tl.store(at + 2, tl.zeros_like(tile) + last, mask=tile < mine)


def tiles_of(ends: Tensor, rows: int, block: int) -> Tensor:
    """``[1 + most, 4]``, int32: how many tiles of ``block`` rows there are; then each one's expert, first row, and the
    end of its group. ``most`` is what ``rows`` rows can have; what lies behind the last tile is undefined.

    Twin: ``products.tiles_of``.
    """
    experts = ends.shape[0]
    table = ends.new_empty((1 + rows // block + experts, 4))
    _tiles_kernel[(experts,)](ends, table, experts, EP=power_of_2(experts), BM=block, BLOCK=16, num_warps=1)
    return table


@triton.jit
def _place(tile, tiles, columns, CHUNK: tl.constexpr):
    """Which tile of rows and which of columns: in a chunk, tiles of rows run fastest."""
    first = tile // (CHUNK * columns) * CHUNK
    deep = tl.minimum(tiles - first, CHUNK)
    within = tile % (CHUNK * columns)
    return first + within % deep, within // deep


@triton.jit
def _tile_of_rows(table, source, down, GATHER: tl.constexpr, BM: tl.constexpr):
    """Of a tile: its expert, first row, rows, the group's end, and where the rows lie."""
    expert = tl.load(table + 4 + 4 * down)
    first = tl.load(table + 5 + 4 * down)
    last = tl.load(table + 6 + 4 * down)
    row = first + tl.arange(0, BM)
    origin = row
    if GATHER:
        origin = tl.load(source + row, mask=row < last, other=0)
    return expert, first, row, last, origin.to(tl.int64)


@triton.jit
def _load_rows(rows, rows_desc, origin, first, k, width, GATHER: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr):
    """``[BM, BK]`` of the rows of a tile at a depth."""
    if GATHER:
        depth = k + tl.arange(0, BK)
        places = rows + origin[:, None] * width + depth[None, :]
        x = tl.load(places) if EVEN else tl.load(places, mask=depth[None, :] < width, other=0.0)
    else:
        x = rows_desc.load([first, k])
    return x


# ---------------------------------------------------------------------------------------------------------------------
# The first product, and SwiGLU times the routing weight.


@Kernel
@triton.jit
def _first_kernel(
    rows, rows_desc, source, weight_desc, scales, slots, table, gate_up, hidden, width, units,
    GATHER: tl.constexpr, EVEN: tl.constexpr, WEIGHTED: tl.constexpr, PICKED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, OUTER: tl.constexpr, CHUNK: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    tiles = tl.load(table)
    columns = tl.cdiv(units, BN)
    for tile in tl.range(tl.program_id(0), tiles * columns, tl.num_programs(0), flatten=FLAT, num_stages=OUTER):
        down, across = _place(tile, tiles, columns, CHUNK)
        expert, first, row, last, origin = _tile_of_rows(table, source, down, GATHER, BM)
        pair = tl.zeros((BM, 2 * BN), tl.float32)
        for k in tl.range(0, width, BK, num_stages=STAGES):
            x = _load_rows(rows, rows_desc, origin, first, k, width, GATHER, EVEN, BK)
            w = weight_desc.load([2 * expert, across * BN, k]).reshape(2 * BN, BK)
            pair = tl.dot(x, w.T, pair)
        gate, up = pair.reshape(BM, 2, BN).permute(0, 2, 1).split()
        column = across * BN + tl.arange(0, BN)
        inside = (row < last)[:, None] & (column < units)[None, :]
        at = row.to(tl.int64)[:, None] * units + column[None, :]
        beside = at + row.to(tl.int64)[:, None] * units
        dtype = gate_up.dtype.element_ty
        gate_kept = gate.to(dtype)
        up_kept = up.to(dtype)
        tl.store(gate_up + beside, gate_kept, mask=inside)
        tl.store(gate_up + beside + units, up_kept, mask=inside)
        gate = gate_kept.to(tl.float32)  # as the backward will read it
        value = gate * tl.sigmoid(gate) * up_kept.to(tl.float32)
        if WEIGHTED:
            slot = row
            if PICKED:
                slot = tl.load(slots + row, mask=row < last, other=0)
            value *= tl.load(scales + slot, mask=row < last, other=0.0).to(tl.float32)[:, None]
        tl.store(hidden + at, value.to(dtype), mask=inside)


def first_product(
    rows: Tensor,
    source: Tensor | None,
    weight: Tensor,
    scales: Tensor | None,
    table: Tensor,
    count: int,
    blocks: Blocks,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``[count, 2 * hidden]``, the first product of ``rows[source]``, and ``[count, hidden]``, its weighted SwiGLU.

    ``weight`` is ``[experts, 2 * hidden, dim]``, gate first; ``scales`` are the routing weights, ``[count]``, or lie at
    ``slots`` (``[count]``). Rows behind the last group are left undefined. Twin: ``products.first_product``.
    """
    experts, double, width = weight.shape
    gate_up, hidden = rows.new_empty((count, double)), rows.new_empty((count, double // 2))
    halves = weight.view(2 * experts, double // 2, width)
    _first_kernel[(_programs(rows.device),)](
        rows, _rows_descriptor(rows, source, blocks), source, _descriptor(halves, (2, blocks.columns, blocks.depth)),
        scales, slots, table, gate_up, hidden, width, double // 2, GATHER=source is not None,
        EVEN=width % blocks.depth == 0, WEIGHTED=scales is not None, PICKED=slots is not None, **blocks.options(),
    )  # fmt: skip
    return gate_up, hidden


# ---------------------------------------------------------------------------------------------------------------------
# A product of rows, with weights as they are stored or transposed.


@Kernel
@triton.jit
def _product_kernel(
    rows, rows_desc, source, weight_desc, table, out, width, units,
    GATHER: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, OUTER: tl.constexpr, CHUNK: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    tiles = tl.load(table)
    columns = tl.cdiv(units, BN)
    for tile in tl.range(tl.program_id(0), tiles * columns, tl.num_programs(0), flatten=FLAT, num_stages=OUTER):
        down, across = _place(tile, tiles, columns, CHUNK)
        expert, first, row, last, origin = _tile_of_rows(table, source, down, GATHER, BM)
        total = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, width, BK, num_stages=STAGES):
            x = _load_rows(rows, rows_desc, origin, first, k, width, GATHER, EVEN, BK)
            if TRANSPOSED:
                w = weight_desc.load([expert, across * BN, k]).reshape(BN, BK).T
            else:
                w = weight_desc.load([expert, k, across * BN]).reshape(BK, BN)
            total = tl.dot(x, w, total)
        _store_halves(out + row.to(tl.int64) * units, total, row < last, across * BN, units, 1, BM, BN)


@triton.jit
def _store_halves(places, values, there, start, units, stride, BM: tl.constexpr, BN: tl.constexpr):
    """``[BM, BN]`` at ``places`` of its rows and from the column ``start`` of ``units`` on, which lie ``stride`` apart.

    In two halves: what turns a tile from the order of products to that of memory needs half the room.
    """
    left, right = values.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
    dtype = places.dtype.element_ty
    column = start + tl.arange(0, BN // 2)
    at = places[:, None] + column[None, :] * stride
    tl.store(at, left.to(dtype), mask=there[:, None] & (column < units)[None, :])
    column += BN // 2
    at = places[:, None] + column[None, :] * stride
    tl.store(at, right.to(dtype), mask=there[:, None] & (column < units)[None, :])


def product(
    rows: Tensor, source: Tensor | None, weight: Tensor, table: Tensor, count: int, blocks: Blocks, *, transposed: bool
) -> Tensor:
    """Of ``rows[source]``: ``row @ weight.T`` of ``[experts, out, in]`` where ``transposed``, else ``row @ weight`` of
    ``[experts, in, out]``; ``[count, out]``.

    Rows behind the last group are left undefined. Twin: ``products.product``.
    """
    units = weight.shape[1 if transposed else 2]
    box = (1, blocks.columns, blocks.depth) if transposed else (1, blocks.depth, blocks.columns)
    out = rows.new_empty((count, units))
    _product_kernel[(_programs(rows.device),)](
        rows, _rows_descriptor(rows, source, blocks), source, _descriptor(weight, box), table, out, rows.shape[1],
        units, GATHER=source is not None, EVEN=rows.shape[1] % blocks.depth == 0, TRANSPOSED=transposed,
        **blocks.options(),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of weights.


@Kernel
@triton.jit
def _weight_gradient_kernel(
    gathered, source, others_desc, ends, out, experts, height, width, TRANSPOSED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, OUTER: tl.constexpr, CHUNK: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    deep = tl.cdiv(height, BM)
    tiles = deep * tl.cdiv(width, BN)
    for tile in tl.range(tl.program_id(0), experts * tiles, tl.num_programs(0), flatten=FLAT, num_stages=OUTER):
        expert = tile // tiles
        down, across = _place(tile % tiles, deep, tl.cdiv(width, BN), CHUNK)
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        size = tl.load(ends + expert) - start
        row = down * BM + tl.arange(0, BM)
        total = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, size, BK, num_stages=STAGES):
            step = k + tl.arange(0, BK)
            origin = tl.load(source + start + step, mask=step < size, other=0).to(tl.int64)
            inside = (step < size)[:, None] & (row < height)[None, :]
            strip = tl.load(gathered + origin[:, None] * height + row[None, :], mask=inside, other=0.0)
            total = tl.dot(strip.T, load_ragged(others_desc, start, size, [k, across * BN]), total)
        matrix = out + expert.to(tl.int64) * height * width
        if TRANSPOSED:
            _store_halves(matrix + row, total, row < height, across * BN, width, height, BM, BN)
        else:
            _store_halves(matrix + row.to(tl.int64) * width, total, row < height, across * BN, width, 1, BM, BN)


def weight_gradient(
    grad: Tensor, rows: Tensor, source: Tensor, gathered: Literal["grad", "rows"], ends: Tensor, blocks: Blocks
) -> Tensor:
    """``grad.T @ rows`` of each group, ``[experts, out, in]``; zeros for an empty one.

    One side is gathered: ``grad[source]`` or ``rows[source]``. It is always the left one of the product, of which a
    tile has fewer columns; what comes out is written transposed where that is ``rows``. Twin:
    ``products.weight_gradient``.
    """
    experts, of_rows = ends.shape[0], gathered == "rows"
    left, right = (rows, grad) if of_rows else (grad, rows)
    out = grad.new_empty((experts, grad.shape[1], rows.shape[1]))
    _weight_gradient_kernel[(_programs(grad.device),)](
        left, source, _ragged(right, (blocks.depth, blocks.columns)), ends, out, experts, left.shape[1],
        right.shape[1], TRANSPOSED=of_rows, **blocks.options(),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Descriptors and grids.


_Sizes = tuple[int, ...]


def _descriptor(tensor: Tensor, box: tuple[int, ...]) -> Described:
    return Described(tensor, tensor.shape, tensor.stride(), box)


def _rows_descriptor(rows: Tensor, source: Tensor | None, blocks: Blocks) -> Described | None:
    return None if source is not None else _descriptor(rows, (blocks.rows, blocks.depth))


def _ragged(rows: Tensor, box: tuple[int, int]) -> Described:
    """Of rows whose groups ``load_ragged`` reads."""
    return Described(rows, *_ragged_like(rows.shape[1], rows.dtype, box))


@cache
def _ragged_like(width: int, dtype: torch.dtype, box: tuple[int, int]) -> tuple[_Sizes, _Sizes, _Sizes]:
    """Shape, strides and block of the descriptor, which are those of any number of rows."""
    made = create_ragged_descriptor(torch.empty(1, width, dtype=dtype, device="meta"), list(box))
    return tuple(made.shape), tuple(made.strides), tuple(made.block_shape)


@cache
def _programs(device: torch.device) -> int:
    """One for each multiprocessor; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
