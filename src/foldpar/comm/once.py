"""Backwards that cannot be differentiated, and say so whichever way they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from foldpar.errors import GradientError

__all__ = ["once_differentiable"]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd function that may be differentiated once; who differentiates its gradients gets an
    error.

    torch's own cuts them off instead from all that they depend on: ``torch.autograd.grad`` of them then goes around,
    and gives what is left.

    Raises:
        GradientError: in the backward of the gradients.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        of = [each for each in (*grads, *ctx.saved_tensors) if isinstance(each, Tensor) and each.requires_grad]
        if not of:
            return found
        several = found if isinstance(found, tuple) else (found,)
        refusing = tuple(each if each is None else cast(Any, _Refused).apply(each, *of) for each in several)
        return refusing if isinstance(found, tuple) else refusing[0]

    return once


class _Refused(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise GradientError(
            "A gradient was differentiated, as with create_graph=True. A layer of routed experts, or a collective, can "
            "be differentiated once."
        )
