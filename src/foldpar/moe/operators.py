"""A function of tensors that a compiler takes as one operator, whatever sizes and collectives are inside.

    traced                        when it runs
    inputs, handle -> out, token  handle finds the function; it runs as in eager, and the token keeps its graph
    grad, token -> gradients      the token finds that graph, and autograd goes through it

From outside shapes are static: ``[rows, ...]`` is told by the caller. What the function saves for its backward lies
behind the token and nowhere in the traced graph, since its sizes follow the data. It lives as long as the token does,
which a compiler keeps as it keeps any tensor for a backward, or drops and makes again where it recomputes.

An operator can hold no object, so two tensors stand for them: their values are keys of what is alive, and their memory
keeps it alive, also once the layer is gone. A handle is an input of the traced graph, not a constant in it, so layers
that are alike share what was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from typing_extensions import Self

from foldpar.errors import GradientError

__all__ = ["UNCAPTURED", "Operator", "behind", "refuse_twice", "stand_in"]


class Operator:
    """A function as one operator: ``(tensors or None, rows) -> [rows, ...]`` of the first tensor's dtype and width.

    ``function`` must not hold a layer, nor return a view of what it is given; its backward is what autograd makes of
    it. Collectives inside run on every rank, as the function would by itself. A copy of a layer has the same operator.

    Example:
        >>> double = Operator(lambda tensors, rows: tensors[0] * 2)
        >>> x = torch.ones(3, 2, requires_grad=True)
        >>> double((x,), rows=3).sum().backward()
        >>> x.grad.tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    def __init__(self, function: Callable[[Sequence[Tensor | None], int], Tensor]) -> None:
        self.handle = stand_in(function)

    def __call__(self, tensors: Sequence[Tensor | None], *, rows: int) -> Tensor:
        """Run it, in a traced graph or at once.

        Backward:
            That of the function, of all tensors that require a gradient; once differentiable. With ``retain_graph``
            it may be repeated.
        """
        given = [tensor for tensor in tensors if tensor is not None]
        present = [tensor is not None for tensor in tensors]
        needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in given]
        out: Tensor = torch.ops.foldpar.run(given, self.handle, present, needed, rows)[0]
        return out

    def __deepcopy__(self, memo: object) -> Self:
        return self


class _Kept(bytearray):
    """The memory of a tensor that stands for an object: its key, and the object."""

    object: Any


_KEYS = count(1)
_KEPT: WeakValueDictionary[int, _Kept] = WeakValueDictionary()


def stand_in(kept: object) -> Tensor:
    """A tensor that stands for an object, which lives as long as the tensor's memory."""
    key = next(_KEYS)
    memory = _Kept(key.to_bytes(8, "little"))
    memory.object = kept
    _KEPT[key] = memory
    return torch.frombuffer(memory, dtype=torch.int64)  # its storage holds ``memory``


def behind(tensor: Tensor) -> Any:
    """The object that the tensor stands for.

    Raises:
        GradientError: it is gone.
    """
    kept = _KEPT.get(int(tensor))
    if kept is None:
        raise GradientError(
            "What the forward of a compiled layer kept for this backward is gone: a tensor that stands for it was "
            "copied, as hooks on saved tensors do (save_on_cpu). Recompute the layer instead (torch.utils.checkpoint), "
            "or leave it uncompiled."
        )
    return kept.object


UNCAPTURED = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
"""Tags of operators in which the host waits, which CUDA graphs cannot hold."""


# Defined by themselves: ``custom_op`` compares the storages of all that goes in and comes out, in every call.
torch.library.define(
    "foldpar::run",
    "(Tensor[] given, Tensor handle, bool[] present, bool[] needed, SymInt rows) -> (Tensor, Tensor)",
    tags=UNCAPTURED,
)
torch.library.define(
    "foldpar::run_backward", "(Tensor grad, Tensor token, SymInt[] shapes, str kinds) -> Tensor[]", tags=UNCAPTURED
)


@torch.library.impl("foldpar::run", "CompositeExplicitAutograd")
def _run(
    given: Sequence[Tensor], handle: Tensor, present: Sequence[bool], needed: Sequence[bool], rows: int
) -> tuple[Tensor, Tensor]:
    function = behind(handle)
    if not any(needed):
        with torch.no_grad():
            return function(_placed(given, present), rows), torch.zeros(1, dtype=torch.int64)
    # The dispatcher has switched autograd off below an operator; this switches it on again.
    with torch.inference_mode(False), torch.enable_grad():
        start = torch.zeros((), requires_grad=True)
        inputs = cast(Any, _Start).apply(start, needed, *given)
        out = function(_placed(inputs, present), rows)
        ends = [get_gradient_edge(each) for each, need in zip(inputs, needed, strict=True) if need]
        return out.detach(), stand_in((get_gradient_edge(out), ends))


def _like_run(
    given: Sequence[Tensor], handle: Tensor, present: Sequence[bool], needed: Sequence[bool], rows: int
) -> tuple[Tensor, Tensor]:
    return given[0].new_empty((rows, *given[0].shape[1:])), torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.impl("foldpar::run_backward", "CompositeExplicitAutograd")
def _run_backward(grad: Tensor, token: Tensor, shapes: Sequence[int], kinds: str) -> list[Tensor]:
    output, inputs = behind(token)
    with torch.inference_mode(False):
        grads = torch.autograd.grad([output], inputs, [grad], retain_graph=True, allow_unused=True)
    return [
        torch.zeros(shape, dtype=dtype, device=grad.device) if each is None else each.contiguous()
        for each, (shape, dtype) in zip(grads, _forms(shapes, kinds), strict=True)
    ]


def _like_run_backward(grad: Tensor, token: Tensor, shapes: Sequence[int], kinds: str) -> list[Tensor]:
    return [grad.new_empty(shape, dtype=dtype) for shape, dtype in _forms(shapes, kinds)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given, _, _, ctx.needed, _ = inputs
    of = [tensor for tensor, need in zip(given, ctx.needed, strict=True) if need]
    ctx.save_for_backward(output[1])
    ctx.shapes = [size for tensor in of for size in tensor.shape]
    ctx.kinds = " ".join(f"{str(tensor.dtype).removeprefix('torch.')}:{tensor.dim()}" for tensor in of)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    (token,) = ctx.saved_tensors
    grads = iter(torch.ops.foldpar.run_backward(grad, token, ctx.shapes, ctx.kinds))
    return [next(grads) if need else None for need in ctx.needed], None, None, None, None


def refuse_twice(ctx: Any, *_: Any) -> tuple[Any, ...]:
    """The backward of an operator that is a backward."""
    raise GradientError(
        "The gradient of a compiled layer was differentiated, as with create_graph=True. A layer of routed experts can "
        "be differentiated once."
    )


torch.library.register_fake("foldpar::run", _like_run)
torch.library.register_fake("foldpar::run_backward", _like_run_backward)
torch.library.register_autograd("foldpar::run", _backward, setup_context=_save)
torch.library.register_autograd("foldpar::run_backward", refuse_twice)


class _Start(Function):
    """Where a graph begins, without keeping what it began with."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, needed: Sequence[bool], *given: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(tensor.detach() for tensor in given)
        ctx.mark_non_differentiable(*(each for each, need in zip(inputs, needed, strict=True) if not need))
        return inputs

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise AssertionError("gradients are taken where a graph begins")


def _placed(given: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    rest = iter(given)
    return [next(rest) if there else None for there in present]


def _forms(shapes: Sequence[int], kinds: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shape and the dtype of each of several tensors."""
    forms, at = [], 0
    for kind in kinds.split():
        name, _, dims = kind.partition(":")
        forms.append((tuple(shapes[at : at + int(dims)]), getattr(torch, name)))
        at += int(dims)
    return forms
