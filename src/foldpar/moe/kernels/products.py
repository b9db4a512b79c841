"""The experts' feed-forward network of rows that are read where they lie: what Hopper's own kernels compute.

Where they lie is told by :class:`~foldpar.moe.kernels.permutation.Places`. Nothing of size ``[places, dim]`` is kept:
only the rows, the tables and the first product. Two such arrays live for a moment, the outputs and the gradients of the
copies before they are summed; a third, the copied rows of the first weight's gradient, where a copy costs less than
gathering (:data:`LONG_GROUP`).

Which products are faster than ``grouped_mm``, and where, is measured (``benchmarks/NOTES.md``); elsewhere it is used.
The plain torch functions below are the kernels' twins, with which they are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd import Function

from foldpar.comm import once_differentiable, opened, placed_as
from foldpar.moe.kernels import activations
from foldpar.moe.kernels.activations import Activation
from foldpar.moe.kernels.permutation import Places, copy_rows, runs_on_triton, sum_copies

MOST_UNITS = 1024
"""Hidden units of an expert up to which the kernels were measured to win; gathering pays where they are few."""

LONG_GROUP = 2
"""Rows of an expert, on average, to one of its hidden units, from which on the first weight's gradient is as fast from
gathered rows as from copied ones, or faster.
"""

FEWEST_ROWS = 32
"""Rows of an expert, on average, from which on the kernels were measured to win."""


def takes(
    rows: Tensor, gate_up_proj: Tensor, down_proj: Tensor, places: int, activation: Activation, *, plain: bool
) -> bool:
    """Whether the kernels compute this, and were measured to be the faster way.

    ``places`` are the rows of all groups. ``plain``: no bias, gate above up. Weights may be DTensors.
    """
    if not (plain and activation == "swiglu" and runs_on_triton(rows) and _on_hopper(rows.device)):
        return False
    (gate_up_proj, _), (down_proj, _) = opened(gate_up_proj), opened(down_proj)
    experts, dim, hidden = down_proj.shape
    tensors = (rows, gate_up_proj, down_proj)
    known = rows.dtype in (torch.bfloat16, torch.float16) and all(each.dtype == rows.dtype for each in tensors)
    # The copy engine wants whole 16 bytes.
    aligned = dim % 8 == hidden % 8 == 0 and all(each.data_ptr() % 16 == 0 for each in tensors)
    lies = gate_up_proj.is_contiguous() and down_proj.is_contiguous()
    return known and aligned and lies and hidden <= MOST_UNITS and places >= FEWEST_ROWS * experts


@cache
def _on_hopper(device: torch.device) -> bool:
    has_engine = find_spec("triton.tools") is not None and find_spec("triton.tools.ragged_tma") is not None
    return has_engine and torch.cuda.get_device_capability(device)[0] == 9


def feed_forward(
    rows: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ends: Tensor,
    weights: Tensor | None,
    places: Places | None,
) -> Tensor:
    """What ``grouped_feed_forward`` computes with SwiGLU. Gradients of weights that are DTensors lie as these do."""
    tables: tuple[Tensor | None, ...] = (None, None, None)
    if places is not None:
        tables = (places.source.to(torch.int32), places.slots, places.copies)
    weights = None if weights is None else weights.contiguous()
    given = (rows.contiguous(), weights, gate_up_proj, down_proj, ends.contiguous(), *tables)
    return cast(Tensor, cast(Any, _FeedForward).apply(*given))


class _FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor | None,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        ends: Tensor,
        *tables: Any,
    ) -> Tensor:
        (gate_up_proj, lies), (down_proj, down_lies) = opened(gate_up_proj), opened(down_proj)
        ctx.lies = lies, down_lies
        given = (rows, weights, gate_up_proj, down_proj, ends, *tables)
        y, gate_up, table = forward(*given)
        ctx.save_for_backward(*given, gate_up, table)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, gate_up, table = ctx.saved_tensors
        grad_rows, grad_weights, *of_weights = backward(
            grad, *given, gate_up=gate_up, table=table, needed=ctx.needs_input_grad
        )
        grads = (placed_as(each, lies) for each, lies in zip(of_weights, ctx.lies, strict=True))
        return grad_rows, grad_weights, *grads, None, None, None, None


_ROWS = 128


def forward(
    rows: Tensor,
    weights: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ends: Tensor,
    source: Tensor | None,
    slots: Tensor | None,
    copies: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, the first product, and the table of tiles; the backward wants both."""
    from foldpar.moe.kernels import triton_products as kernels

    places = rows.shape[0] if source is None else source.shape[0]
    table = kernels.tiles_of(ends, places, _ROWS)
    gate_up, hidden = kernels.first_product(
        rows, source, gate_up_proj, weights, table, places, kernels.blocks(_ROWS, 128, 64, 4, flat=False), slots
    )
    # Chunks share weights: where those are small, so may chunks be, and rows stay in L2.
    blocks = kernels.blocks(_ROWS, 256, 64, 3, chunk=8 if hidden.shape[1] <= 512 else 16)
    outputs = kernels.product(hidden, None, down_proj, table, places, blocks, transposed=True)
    return (outputs if copies is None else sum_copies(outputs, copies)), gate_up, table


def backward(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ends: Tensor,
    source: Tensor | None,
    slots: Tensor | None,
    copies: Tensor | None,
    *,
    gate_up: Tensor,
    table: Tensor | None = None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of the first four arguments of :func:`forward`; ``needed`` says of which. A table that was not kept
    is made again.
    """
    from foldpar.moe.kernels import triton_products as kernels
    from foldpar.moe.kernels.triton_rows import swiglu_backward

    of_rows, _, of_gate_up, of_down = needed[:4]
    grad, places = grad.contiguous(), gate_up.shape[0]
    table = kernels.tiles_of(ends, places, _ROWS) if table is None else table
    ahead = source is None and gate_up.shape[1] > 1024  # where tiles are short, or gathered, it does not pay
    blocks = kernels.blocks(_ROWS, 256, 64, 3 if ahead else 4, flat=ahead)
    grad_hidden = kernels.product(grad, source, down_proj, table, places, blocks, transposed=False)
    hidden, grad_gate_up, grad_weights = swiglu_backward(grad_hidden, gate_up, weights, ends[-1:], slots)
    del grad_hidden, gate_up
    grad_down = _down_gradient(grad, hidden, source, ends) if of_down else None
    del hidden
    grad_first = _first_gradient(grad_gate_up, rows, source, ends) if of_gate_up else None
    grad_rows = None
    if of_rows:
        blocks = kernels.blocks(_ROWS, 256, 64, 3)
        grad_rows = kernels.product(grad_gate_up, None, gate_up_proj, table, places, blocks, transposed=False)
        grad_rows = grad_rows if copies is None else sum_copies(grad_rows, copies)
    return grad_rows, grad_weights, grad_first, grad_down


def _down_gradient(grad: Tensor, hidden: Tensor, source: Tensor | None, ends: Tensor) -> Tensor:
    from foldpar.moe.kernels import triton_products as kernels

    if source is None:
        return torch.nn.functional.grouped_mm(grad.T, hidden, offs=ends)
    return kernels.weight_gradient(grad, hidden, source, "grad", ends, kernels.blocks(128, 256, 64, 5))


def _first_gradient(grad_gate_up: Tensor, rows: Tensor, source: Tensor | None, ends: Tensor) -> Tensor:
    from foldpar.moe.kernels import triton_products as kernels

    places, double = grad_gate_up.shape
    if source is not None and 2 * places >= LONG_GROUP * double * ends.shape[0]:
        return kernels.weight_gradient(grad_gate_up, rows, source, "rows", ends, kernels.blocks(128, 256, 64, 5))
    copied = rows if source is None else copy_rows(rows, source)
    return torch.nn.functional.grouped_mm(grad_gate_up.T, copied, offs=ends)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels' twins: one expert after the other, on the host.


def tiles_of(ends: Tensor, block: int) -> list[tuple[int, int, int]]:
    """Of each tile its expert, its first row, and the end of its group."""
    return [
        (expert, first, end) for expert, (start, end) in enumerate(_groups(ends)) for first in range(start, end, block)
    ]


def first_product(
    rows: Tensor,
    source: Tensor | None,
    weight: Tensor,
    scales: Tensor | None,
    ends: Tensor,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of the rows of all groups, in order: the first product, and the weighted SwiGLU of it."""
    gate_up = product(rows, source, weight, ends, transposed=True)
    scales = scales if scales is None or slots is None else scales.flatten()[slots.long()]
    return gate_up, activations.forward(gate_up, None if scales is None else scales[: len(gate_up)], "swiglu")


def product(rows: Tensor, source: Tensor | None, weight: Tensor, ends: Tensor, *, transposed: bool) -> Tensor:
    """Of the rows of all groups, in order."""
    rows = rows if source is None else rows[source.long()]
    matrices = weight.transpose(1, 2) if transposed else weight
    return torch.cat([rows[start:end] @ matrix for (start, end), matrix in zip(_groups(ends), matrices, strict=True)])


def weight_gradient(
    grad: Tensor, rows: Tensor, source: Tensor, gathered: Literal["grad", "rows"], ends: Tensor
) -> Tensor:
    """``grad.T @ rows`` of each group."""
    if gathered == "grad":
        grad = grad[source.long()]
    else:
        rows = rows[source.long()]
    return torch.stack([grad[start:end].T @ rows[start:end] for start, end in _groups(ends)])


def _groups(ends: Tensor) -> list[tuple[int, int]]:
    every = [0, *ends.tolist()]
    return list(pairwise(every))
