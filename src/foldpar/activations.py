"""The element-wise heart of an expert, with the routing weight applied to it, forward and backward.

For a gated expert ``gate_up`` is ``[rows, 2 * hidden]``, gate first, and the value ``f(gate) * up``; for a plain one it
is ``[rows, hidden]`` and the value ``f(x)``. Either way it is multiplied by the row's routing weight, once, in float32
or wider. On GPUs SwiGLU is one Triton kernel each way; the torch code here is its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from foldpar.permutation import runs_on_triton, wide

Activation = Literal["swiglu", "geglu", "silu", "gelu", "relu"]
GATED = ("swiglu", "geglu")


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    slope = x.sigmoid()
    return x * slope, slope * (1 + x * (1 - slope))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    cumulative = (1 + torch.erf(x * 2**-0.5)) / 2
    return x * cumulative, cumulative + x * torch.exp(-x * x / 2) * (2 * torch.pi) ** -0.5


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    positive = (x > 0).to(x.dtype)
    return x * positive, positive


# Name -> the function's value and slope.
ELEMENTWISE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "swiglu": _silu,
    "geglu": _gelu,
    "silu": _silu,
    "gelu": _gelu,
    "relu": _relu,
}


def forward(gate_up: Tensor, weights: Tensor | None, activation: Activation) -> Tensor:
    """The weighted value, ``[rows, hidden]``, in the dtype of ``gate_up``."""
    if activation == "swiglu" and runs_on_triton(gate_up):
        from foldpar import kernels

        return kernels.swiglu_forward(gate_up, weights)
    x = gate_up.to(wide(gate_up.dtype))
    if activation in GATED:
        gate, up = x.chunk(2, dim=-1)
        value = ELEMENTWISE[activation](gate)[0] * up
    else:
        value = ELEMENTWISE[activation](x)[0]
    return (value if weights is None else value * weights[:, None]).to(gate_up.dtype)


def backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weighted value once more, the gradient of ``gate_up``, and that of the weights.

    Computing the value again costs one pass over ``gate_up``, which is read anyway; keeping it would cost memory.
    """
    if activation == "swiglu" and runs_on_triton(gate_up):
        from foldpar import kernels

        return kernels.swiglu_backward(grad, gate_up, weights)
    x, arriving = gate_up.to(wide(gate_up.dtype)), grad.to(wide(grad.dtype))
    scale: Tensor | float = 1.0 if weights is None else weights.to(x.dtype)[:, None]
    if activation in GATED:
        gate, up = x.chunk(2, dim=-1)
        value, slope = ELEMENTWISE[activation](gate)
        grad_x = torch.cat([arriving * scale * up * slope, arriving * scale * value], dim=-1)
        value = value * up
    else:
        value, slope = ELEMENTWISE[activation](x)
        grad_x = arriving * scale * slope
    grad_weights = None if weights is None else (arriving * value).sum(-1).to(weights.dtype)
    return (value * scale).to(gate_up.dtype), grad_x.to(gate_up.dtype), grad_weights
