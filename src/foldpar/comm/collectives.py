"""Collectives that say what they do to gradients: the autograd building blocks.

Every block takes an :class:`~foldpar.AxisGroup`, works on tensors whose first dimension counts rows, allows row
counts that differ per rank and may be zero, and is a local operation on a group of one. Chunks are always in
*coordinate order*, in which the process groups of :func:`foldpar.create_groups` list their ranks.

Each block is adjoint to its backward: ``<f(x), y> = <x, f*(y)>`` over the group, where a pairing of a replicated value
with a replicated gradient counts once and all others sum over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from foldpar.arguments import expect
from foldpar.comm.groups import AxisGroup, shared_gpu_hint
from foldpar.comm.once import once_differentiable
from foldpar.errors import CollectiveError, ShapeError

# torch 2.13 renames these two, and its old names warn.
_all_gather_tensor = cast(Callable[..., Any], getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
_reduce_scatter_tensor = cast(
    Callable[..., Any], getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


# ---------------------------------------------------------------------------------------------------------------------
# Raw collectives, in coordinate order, without autograd.


def even_row_counts(rows: int, size: int) -> tuple[int, ...]:
    """How many of ``rows`` each of ``size`` ranks takes: contiguous, as even as possible, the longer slices first.

    >>> even_row_counts(7, 3)
    (3, 2, 2)
    """
    short, longer = divmod(rows, size)
    return tuple(short + (place < longer) for place in range(size))


def all_reduce_(tensor: Tensor, group: AxisGroup, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Reduce a contiguous tensor over the group in place, without autograd, and return it."""
    if group.size > 1:
        with _named("all_reduce", group):
            dist.all_reduce(tensor, op=_REDUCE_OPS[op], group=group.process_group)
    return tensor


def start_all_reduce(tensor: Tensor, group: AxisGroup) -> Callable[[], None]:
    """Start to sum a contiguous tensor over the group in place, without autograd; call the result to wait for it.

    On a GPU the current stream waits, not the host.
    """
    if group.size == 1:
        return lambda: None
    with _named("all_reduce", group):
        work = dist.all_reduce(tensor, group=group.process_group, async_op=True)

    def wait() -> None:
        with _named("all_reduce", group):
            work.wait()

    return wait


def all_gather(tensor: Tensor, group: AxisGroup) -> Tensor:
    """The tensors of all ranks, equal in shape, stacked as ``[size, *shape]`` in coordinate order, without autograd."""
    if group.size == 1:
        return tensor.unsqueeze(0)
    return _gathered(tensor, (group.size, *tensor.shape), group)


def _gathered(tensor: Tensor, shape: Sequence[int], group: AxisGroup) -> Tensor:
    """In this shape from the start: autograd forbids changes in place of a function's output that is a view."""
    gathered = tensor.new_empty(shape)
    with _named("all_gather", group):
        _all_gather_tensor(gathered.view(-1), tensor.contiguous().view(-1), group=group.process_group)
    return gathered


def gather_rows(x: Tensor, row_counts: Sequence[int], group: AxisGroup) -> Tensor:
    """The rows of all ranks, in coordinate order, without autograd: ``[row_counts[index], ...] -> [sum, ...]``."""
    if group.size == 1:
        return x
    longest = max(row_counts)
    if min(row_counts) == longest:
        return _gathered(x, (group.size * longest, *x.shape[1:]), group)
    padded = x.new_empty((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    padded[x.shape[0] :] = 0
    return torch.cat([chunk[:rows] for chunk, rows in zip(all_gather(padded, group), row_counts, strict=True)])


def scatter_sum_rows(x: Tensor, row_counts: Sequence[int], group: AxisGroup) -> Tensor:
    """Sum over the ranks and keep the own slice, without autograd: ``[sum, ...] -> [row_counts[index], ...]``."""
    if group.size == 1:
        return x
    longest, own_rows = max(row_counts), row_counts[group.index]
    if min(row_counts) == longest:
        sent = x.contiguous()
    else:
        sent = x.new_zeros((group.size, longest, *x.shape[1:]))
        for place, chunk in enumerate(x.split(list(row_counts))):
            sent[place, : chunk.shape[0]] = chunk
    received = x.new_empty((longest, *x.shape[1:]))
    with _named("reduce_scatter", group):
        _reduce_scatter_tensor(received.view(-1), sent.view(-1), group=group.process_group)
    return received if own_rows == longest else received[:own_rows]


def exchange_rows(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: AxisGroup) -> Tensor:
    """All-to-all of variable row chunks in coordinate order, without autograd."""
    if group.size == 1:
        return x
    received = x.new_empty((sum(receive_rows), *x.shape[1:]))
    with _named("all_to_all", group):
        dist.all_to_all_single(received, x.contiguous(), list(receive_rows), list(send_rows), group=group.process_group)
    return received


@contextmanager
def _named(collective: str, group: AxisGroup) -> Iterator[None]:
    """Let a failing collective say which one it was, over which axis."""
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(
            f"{collective} over {group.axis} failed on rank {group.ranks[group.index]} (ranks {group.ranks}). "
            f"Usually another rank of the group raised or left before it reached this collective; look at the first "
            f"error of every rank. The backend said: {error}{shared_gpu_hint(error)}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks.


def split_rows(x: Tensor, group: AxisGroup, *, backward: Literal["all_gather", "zero_pad"]) -> Tensor:
    """Keep this rank's slice of rows that all ranks of the group hold.

    ``x`` is ``[rows, ...]`` and replicated; the result is ``[own_rows, ...]``, contiguous slices as even as possible
    (:func:`even_row_counts`): rank 1 of 3 keeps rows 3 and 4 of 7.

    Backward:
        ``"all_gather"``: the gradients of all slices, for consumers below that expect a replicated gradient.
        ``"zero_pad"``: the own gradient, zero elsewhere and no communication; the gradient of ``x`` is then partial.

    Raises:
        ShapeError: ``x`` has no rows dimension. ValueError: another ``backward``.

    Source: the conjugate of :func:`all_gather_rows`.
    """
    expect("split_rows", x=(x, Tensor), group=(group, AxisGroup))
    _choice("split_rows", "backward", backward, ("all_gather", "zero_pad"))
    _rows_first("split_rows", x)
    if group.size == 1:
        return x
    return _apply(_SplitRows, x, group, even_row_counts(x.shape[0], group.size), backward)


def all_gather_rows(
    x: Tensor,
    group: AxisGroup,
    *,
    row_counts: Sequence[int] | None = None,
    backward: Literal["slice", "reduce_scatter"],
) -> Tensor:
    """Concatenate the rows of all ranks, in coordinate order.

    ``x`` is ``[own_rows, ...]``; the result ``[sum(row_counts), ...]`` is the same on every rank. ``row_counts`` gives
    each rank's rows; left out, the ranks exchange them first (one small collective and one host synchronisation).

    Backward:
        ``"slice"``: the own slice of the gradient, no communication; exact where the arriving gradient is replicated.
        ``"reduce_scatter"``: the sum over the ranks of the own slice; exact where the arriving gradients are partial.

    Raises:
        ShapeError: ``row_counts`` does not have one entry per rank, or the own entry is not the rows of ``x``.

    Source: sequence-parallel gather and scatter (Korthikanti et al. 2022, section 4.2.2), here for variable rows.
    """
    expect("all_gather_rows", x=(x, Tensor), group=(group, AxisGroup))
    _choice("all_gather_rows", "backward", backward, ("slice", "reduce_scatter"))
    counts = _own_row_counts("all_gather_rows", x, row_counts, group)
    return x if group.size == 1 else _apply(_AllGatherRows, x, group, counts, backward)


def reduce_scatter_rows(x: Tensor, group: AxisGroup, *, row_counts: Sequence[int] | None = None) -> Tensor:
    """Sum partial rows over the group and keep the own slice.

    ``x`` is ``[sum(row_counts), ...]``, a summand on every rank; the result ``[row_counts[index], ...]`` is the own
    slice of the sum. ``row_counts=None`` splits the rows evenly (:func:`even_row_counts`).

    Backward:
        All-gather: every summand gets the gradient of the whole sum.

    Raises:
        ShapeError: ``row_counts`` does not have one entry per rank or does not add up to the rows of ``x``.
    """
    expect("reduce_scatter_rows", x=(x, Tensor), group=(group, AxisGroup))
    _rows_first("reduce_scatter_rows", x)
    counts = even_row_counts(x.shape[0], group.size) if row_counts is None else tuple(row_counts)
    _counts_fit("reduce_scatter_rows", "row_counts", counts, x.shape[0], group)
    return x if group.size == 1 else _apply(_ReduceScatterRows, x, group, counts)


def all_reduce(x: Tensor, group: AxisGroup, *, backward: Literal["identity", "sum"]) -> Tensor:
    """Sum partial tensors over the group; the result is the same on every rank. ``x`` is left as it is.

    Backward:
        ``"identity"``: exact where the arriving gradient is replicated (Megatron's ``g``).
        ``"sum"``: all-reduce of the gradients; exact where they are partial.

    Source: Shoeybi et al. 2019, section 3, for the identity backward.
    """
    expect("all_reduce", x=(x, Tensor), group=(group, AxisGroup))
    _choice("all_reduce", "backward", backward, ("identity", "sum"))
    return x if group.size == 1 else _apply(_AllReduce, x, group, backward)


def copy_to_group(x: Tensor, group: AxisGroup) -> Tensor:
    """Mark where replicated rows enter a region in which the ranks do different work: identity forward.

    Put it before a hand-written column-sharded layer. torch's ``ColwiseParallel`` has it built in: adding it there
    counts the gradient twice.

    Backward:
        All-reduce: the partial gradients of the ranks become the replicated gradient (Megatron's ``f``).

    Source: Shoeybi et al. 2019, section 3.
    """
    expect("copy_to_group", x=(x, Tensor), group=(group, AxisGroup))
    return x if group.size == 1 else _apply(_CopyToGroup, x, group)


def all_to_all_rows(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: AxisGroup) -> Tensor:
    """Send a chunk of rows to every rank of the group and receive one from each, both in coordinate order.

    ``x`` is ``[sum(send_rows), ...]``, the chunk for coordinate 0 first; the result is ``[sum(receive_rows), ...]``.
    ``receive_rows[i]`` must be what rank ``i`` sends here.

    Backward:
        The all-to-all back: gradients return to the rows' owners.

    Raises:
        ShapeError: a count is missing or negative, or ``send_rows`` does not add up to the rows of ``x``.
    """
    expect("all_to_all_rows", x=(x, Tensor), group=(group, AxisGroup))
    _rows_first("all_to_all_rows", x)
    send, receive = tuple(send_rows), tuple(receive_rows)
    _counts_fit("all_to_all_rows", "send_rows", send, x.shape[0], group)
    _counts_fit("all_to_all_rows", "receive_rows", receive, x.shape[0] if group.size == 1 else None, group)
    return x if group.size == 1 else _apply(_AllToAllRows, x, group, send, receive)


def scale_gradient(x: Tensor, factor: Fraction | float) -> Tensor:
    """Leave a tensor as it is and multiply its gradient: gradient-factor cancellation at the place where it arises.

    Backward:
        ``grad * factor``; a ``Fraction`` stays exact until this one multiplication.
    """
    expect("scale_gradient", x=(x, Tensor), factor=(factor, (Fraction, float, int)))
    if not math.isfinite(factor):
        raise ValueError(f"scale_gradient: factor = {factor} must be finite.")
    return x if factor == 1 else _apply(_ScaleGradient, x, factor)


# ---------------------------------------------------------------------------------------------------------------------
# Their autograd functions. An arriving gradient may be expanded or non-contiguous and is never written to.


class _SplitRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup, counts: tuple[int, ...], backward: str) -> Tensor:
        ctx.group, ctx.counts, ctx.gathers = group, counts, backward == "all_gather"
        return _own_slice(x, counts, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gathers:
            return gather_rows(grad, ctx.counts, ctx.group), None, None, None
        padded = grad.new_zeros((sum(ctx.counts), *grad.shape[1:]))
        _own_slice(padded, ctx.counts, ctx.group).copy_(grad)
        return padded, None, None, None


class _AllGatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup, counts: tuple[int, ...], backward: str) -> Tensor:
        ctx.group, ctx.counts, ctx.sums = group, counts, backward == "reduce_scatter"
        return gather_rows(x, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = scatter_sum_rows if ctx.sums else _own_slice
        return own(grad, ctx.counts, ctx.group), None, None, None


class _ReduceScatterRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup, counts: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        own = scatter_sum_rows(x, counts, group)
        return own.clone() if own.shape[0] < max(counts) else own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_rows(grad, ctx.counts, ctx.group), None, None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup, backward: str) -> Tensor:
        ctx.group, ctx.sums = group, backward == "sum"
        return all_reduce_(_fresh(x), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce_(_fresh(grad), ctx.group) if ctx.sums else grad, None, None


class _CopyToGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce_(_fresh(grad), ctx.group), None


class _AllToAllRows(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: AxisGroup, send_rows: tuple[int, ...], receive_rows: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.send_rows, ctx.receive_rows = group, send_rows, receive_rows
        return exchange_rows(x, send_rows, receive_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchange_rows(grad, ctx.receive_rows, ctx.send_rows, ctx.group), None, None, None


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Fraction | float) -> Tensor:
        ctx.factor = float(factor)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None


def _apply(function: type[Function], *arguments: object) -> Tensor:
    return cast(Tensor, cast(Any, function).apply(*arguments))


def _fresh(x: Tensor) -> Tensor:
    """A contiguous copy that may be written to."""
    return x.clone(memory_format=torch.contiguous_format)


def _own_slice(x: Tensor, counts: Sequence[int], group: AxisGroup) -> Tensor:
    start = sum(counts[: group.index])
    return x[start : start + counts[group.index]]


def _choice(block: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{block}: {name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def _rows_first(block: str, x: Tensor) -> None:
    if x.dim() == 0:
        raise ShapeError(f"{block} takes a tensor of rows, [rows, ...], and got a scalar.")


def _own_row_counts(block: str, x: Tensor, row_counts: Sequence[int] | None, group: AxisGroup) -> tuple[int, ...]:
    _rows_first(block, x)
    if row_counts is None:
        own = torch.tensor([x.shape[0]], device=x.device)
        return tuple(all_gather(own, group).flatten().tolist())
    expect(block, row_counts=(row_counts, Iterable))
    counts = tuple(row_counts)
    _counts_fit(block, "row_counts", counts, None, group)
    if counts[group.index] != x.shape[0]:
        raise ShapeError(
            f"{block}: row_counts = {counts} says that rank {group.ranks[group.index]} ({group.axis} coordinate "
            f"{group.index}) has {counts[group.index]} row(s), but its tensor has {x.shape[0]}."
        )
    return counts


def _counts_fit(block: str, name: str, counts: tuple[int, ...], total: int | None, group: AxisGroup) -> None:
    if len(counts) != group.size or min(counts) < 0:
        raise ShapeError(
            f"{block}: {name} = {counts} must hold one count, zero or more, for each of the {group.size} rank(s) of "
            f"{group.axis}."
        )
    if total is not None and sum(counts) != total:
        raise ShapeError(f"{block}: {name} = {counts} adds up to {sum(counts)}, but the tensor has {total} row(s).")
