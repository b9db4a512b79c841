"""Grouped products, and the feed-forward network of many experts as one autograd function.

Rows are grouped by expert; ``ends`` (int32, on the device) are the ends of the groups, which may be empty. Rows behind
the last end hold nothing: they are neither computed nor read. The product
is torch's ``grouped_mm`` where dtype and widths allow it, else one product per expert; also where groups are few and
large and the host knows their sizes, since a plain product is faster there (``benchmarks/NOTES.md``). On Hopper GPUs
kernels of our own (:mod:`foldpar.moe.kernels.products`) compute what they were measured to compute faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from foldpar.comm import local_parts, once_differentiable
from foldpar.moe.kernels import activations, products
from foldpar.moe.kernels.activations import Activation
from foldpar.moe.kernels.permutation import Places, collect, pick, spread


def grouped_feed_forward(
    rows: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ends: Tensor,
    activation: Activation,
    *,
    weights: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    sizes: tuple[int, ...] | None = None,
    interleaved: bool = False,
    places: Places | None = None,
) -> Tensor:
    """``weight * down(activation(gate_up(row)))`` with the parameters of each row's group: ``[rows, dim]`` to the same.

    ``sizes`` are the groups' sizes, where the host knows them. ``weights`` is ``[rows]``; it is applied to the
    activation, and to the output bias where there is one. ``interleaved``: gate and up are every other column of the
    first product. Keeps the rows and the first product for the backward, nothing else: the activation is computed
    again.

    ``places``: the rows lie anywhere, and their outputs are summed there, ``[rows, dim]`` to the same. ``weights`` lie
    there too, ``[rows, top_k]``; ``ends`` and ``sizes`` are of the copies. The same as spreading rows and picking
    weights before and collecting outputs after; on Hopper GPUs both are read where they lie, and no copies are kept.

    Parameters may be DTensors: this rank's parts are computed with, as :func:`~foldpar.comm.local_parts` gives them.

    Backward:
        Of the rows, all parameters, and the routing weights (from the side of the activation, where they were applied).
    """
    parameters: tuple[Tensor | None, ...] = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    rows, groups = in_autocast_dtype(rows).contiguous(), Groups(ends, sizes)  # grouped_mm wants whole 16 bytes
    count = rows.shape[0] if places is None else places.source.shape[0]
    plain = not interleaved and gate_up_bias is None and down_bias is None and not _few_and_large(groups, count)
    if torch.is_autocast_enabled(rows.device.type):
        parameters = tuple(None if each is None else in_autocast_dtype(each) for each in local_parts(*parameters))
    first, down = parameters[:2]
    assert first is not None and down is not None
    if products.takes(rows, first, down, count, activation, plain=plain):
        return products.feed_forward(rows, first, down, ends, weights, places)
    if places is not None:
        rows = spread(rows, places.source, places.copies)
        weights = None if weights is None else pick(weights, places.slots, places.copies)
    given = (groups, activation, interleaved, rows, weights, *local_parts(*parameters))
    computed = cast(Any, _FeedForward).apply(*given)
    return cast(Tensor, computed if places is None else collect(computed, places.source, places.copies))


def in_autocast_dtype(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of products under ``torch.autocast``; as it is where that is off, and in float64."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, groups: Groups, activation: Activation, interleaved: bool, *given: Any) -> Tensor:
        outputs, gate_up = forward(*given, groups=groups, activation=activation, interleaved=interleaved)
        ctx.save_for_backward(*given, groups.ends, gate_up)
        ctx.activation, ctx.interleaved, ctx.sizes = activation, interleaved, groups.sizes
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, ends, gate_up = ctx.saved_tensors
        how = {"groups": Groups(ends, ctx.sizes), "activation": ctx.activation, "interleaved": ctx.interleaved}
        return None, None, None, *backward(grad, *given, gate_up=gate_up, needed=ctx.needs_input_grad[3:], **how)


def forward(
    rows: Tensor,
    weights: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    groups: Groups,
    activation: Activation,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The outputs, and the first product, which the backward wants."""
    ends = groups.ends
    gate_up = grouped_linear(rows, gate_up_proj, groups)
    if gate_up_bias is not None:
        gate_up = torch.addmm(gate_up, _membership(ends, gate_up), gate_up_bias)
    hidden = activations.forward(gate_up, weights, activation, interleaved=interleaved, end=ends[-1:])
    outputs = grouped_linear(hidden, down_proj, groups)
    if down_bias is not None:
        outputs = torch.addmm(outputs, _membership(ends, outputs, weights), down_bias)
    return outputs, gate_up


def backward(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    groups: Groups,
    gate_up: Tensor,
    activation: Activation,
    interleaved: bool,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of the first six arguments of :func:`forward`; ``needed`` says of which."""
    of_rows, _, of_gate_up, of_down = needed[:4]
    grad, ends = _contiguous(grad), groups.ends
    grad_hidden = grouped_input_gradient(grad, down_proj, groups)
    hidden, grad_gate_up, grad_weights = activations.backward(
        grad_hidden, gate_up, weights, activation, interleaved=interleaved, end=ends[-1:]
    )
    del grad_hidden
    grad_gate_up_bias = grad_down_bias = None
    if gate_up_bias is not None:
        grad_gate_up_bias = _membership(ends, grad_gate_up).T @ grad_gate_up
    if down_bias is not None:
        grad_down_bias = _membership(ends, grad, weights).T @ grad
        if weights is not None and grad_weights is not None:
            grad_weights = grad_weights + (grad * (_membership(ends, grad) @ down_bias)).sum(-1).to(weights.dtype)
    return (
        grouped_input_gradient(grad_gate_up, gate_up_proj, groups) if of_rows else None,
        grad_weights,
        grouped_weight_gradient(grad_gate_up, rows, gate_up_proj, groups) if of_gate_up else None,
        grouped_weight_gradient(grad, hidden, down_proj, groups) if of_down else None,
        grad_gate_up_bias,
        grad_down_bias,
    )


def _membership(ends: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """``[rows, experts]``: 1, or the row's weight, at its expert.

    Biases are added and their gradients summed as products with it: repeatable, unlike sums by index.
    """
    row = torch.arange(rows.shape[0], device=rows.device)[:, None]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    member = ((row >= starts) & (row < ends)).to(rows.dtype)
    return member if weights is None else member * weights.to(rows.dtype)[:, None]


@dataclass(frozen=True, slots=True)
class Groups:
    """Where each expert's rows end, on the device; and how many each has, where the host knows."""

    ends: Tensor
    sizes: tuple[int, ...] | None = None

    def on_host(self) -> list[int]:
        """The sizes; asks the device where the host does not know."""
        if self.sizes is not None:
            return list(self.sizes)
        sizes: list[int] = torch.diff(self.ends, prepend=self.ends.new_zeros(1)).tolist()
        return sizes


def grouped_linear(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """``[rows, in] x [experts, out, in] -> [rows, out]``: ``row @ weight.T`` with the weight of the row's group."""
    if _grouped_mm_takes(rows, weight, groups):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=groups.ends)
    return _per_expert(rows, weight.transpose(-2, -1), groups)


def grouped_input_gradient(grad: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """``[rows, out] x [experts, out, in] -> [rows, in]``: ``grad @ weight`` with the weight of the row's group."""
    if _grouped_mm_takes(grad, weight, groups):
        return F.grouped_mm(grad, weight, offs=groups.ends)
    return _per_expert(grad, weight, groups)


def grouped_weight_gradient(grad: Tensor, rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """``[rows, out] x [rows, in] -> [experts, out, in]``: ``grad.T @ rows`` of each group; zeros for an empty one."""
    if grad.shape[0] == 0:
        return torch.zeros_like(weight)
    if _grouped_mm_takes(grad, weight, groups):
        return F.grouped_mm(grad.T, rows, offs=groups.ends)
    sizes, out = groups.on_host(), torch.empty_like(weight)
    for part, chunk, place in zip(_parts(grad, sizes), _parts(rows, sizes), out.unbind(), strict=True):
        torch.mm(part.T, chunk, out=place)
    return out


def _per_expert(rows: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    sizes, out = groups.on_host(), rows.new_empty((rows.shape[0], matrices.shape[-1]))
    for chunk, matrix, place in zip(_parts(rows, sizes), matrices.unbind(), _parts(out, sizes), strict=True):
        torch.mm(chunk, matrix, out=place)
    return out


def _parts(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Of each group; behind the last group there may be rows that hold nothing."""
    parts: tuple[Tensor, ...] = rows[: sum(sizes)].split(sizes)
    return parts


def _grouped_mm_takes(rows: Tensor, weight: Tensor, groups: Groups) -> bool:
    """It wants strides of whole 16 bytes, knows no float64, and rejects matrices of no rows in some places.

    Few large groups are left to plain products.
    """
    few_and_large = rows.is_cuda and _few_and_large(groups, rows.shape[0])
    aligned = all(width * rows.element_size() % 16 == 0 for width in weight.shape[-2:])
    known = rows.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return aligned and known and rows.shape[0] > 0 and not few_and_large


def _few_and_large(groups: Groups, rows: int) -> bool:
    return groups.sizes is not None and rows >= 1024 * groups.ends.shape[0]


def _contiguous(grad: Tensor) -> Tensor:
    """``grouped_mm`` rejects an expanded gradient, such as that of a plain ``.sum()``."""
    return grad.contiguous() if grad.numel() else grad.new_empty(grad.shape)
