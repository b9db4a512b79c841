"""The element-wise heart of an expert, with the routing weight applied to it, forward and backward.

For a gated expert ``gate_up`` is ``[rows, 2 * hidden]``, gate first, and the value ``f(gate) * up``; for a plain one it
is ``[rows, hidden]`` and the value ``f(x)``. Either way it is multiplied by the row's routing weight, once, in float32
or wider. Where a model stores gate and up interleaved, they are every other column. On GPUs SwiGLU (gate first) is one
Triton kernel each way; the torch code here is its twin. A function of the model's own is called as it is, and its
gradient is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foldpar.arguments import expect
from foldpar.moe.kernels.permutation import runs_on_triton, wide


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """``(up + 1) * gate * sigmoid(alpha * gate)``, with gate clamped from above and up on both sides.

    Beyond the limits the gradient is zero.

    Example:
        >>> ClampedSwiGLU()
        ClampedSwiGLU(alpha=1.702, limit=7.0)

    Source: the experts of gpt-oss (OpenAI 2025, model card, section 2).
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        """Raise an ``ArgumentError`` for what is no number, and a ``ValueError`` for one that is not positive."""
        number = (int, float)
        expect("ClampedSwiGLU", alpha=(self.alpha, number), limit=(self.limit, number))
        if not (self.alpha > 0 and self.limit > 0):
            raise ValueError(
                f"ClampedSwiGLU: alpha and limit must be positive; given were alpha = {self.alpha} and "
                f"limit = {self.limit}."
            )


@dataclass(frozen=True, slots=True, repr=False)
class OwnActivation:
    """A function of the model's own, kept because it is none that is known here.

    It works on each hidden unit of each row by itself, holds no tensors and draws no random numbers. It is called in
    the forward and once more in the backward, in float32 or wider.

    Attributes:
        function: what is called.
        form: ``"gate"``: ``function(gate) * up``. ``"gate_up"``: ``function(gate_up)``, ``[rows, 2 * hidden]`` as the
            model stores it to ``[rows, hidden]``. ``"plain"``: ``function(x)``, of experts without a gate.

    Example:
        >>> OwnActivation(torch.tanh, "gate")
        OwnActivation(tanh, 'gate')
    """

    function: Callable[[Tensor], Tensor]
    form: Literal["gate", "gate_up", "plain"]

    def __post_init__(self) -> None:
        """Raise an ``ArgumentError`` for what cannot be called, and a ``ValueError`` for a form that there is not."""
        expect("OwnActivation", function=(self.function, Callable), form=(self.form, str))  # type: ignore[arg-type]
        if self.form not in ("gate", "gate_up", "plain"):
            raise ValueError(f"OwnActivation: form is {self.form!r}; choose 'gate', 'gate_up' or 'plain'.")

    def value(self, x: Tensor, interleaved: bool) -> Tensor:
        """``[rows, columns]`` of the first product to ``[rows, hidden]``."""
        if self.form == "gate":
            gate, up = _halves(x, interleaved)
            return self.function(gate) * up
        return self.function(x)

    def __repr__(self) -> str:
        return f"OwnActivation({name_of(self.function)}, {self.form!r})"


Activation = Literal["swiglu", "geglu", "silu", "gelu", "relu"] | ClampedSwiGLU | OwnActivation
_GATED = ("swiglu", "geglu")


def name_of(function: object) -> str:
    """What to call a function or a module in a text."""
    return str(getattr(function, "__name__", None) or type(function).__name__)


def is_gated(activation: Activation) -> bool:
    """Whether the first product has two columns for each hidden unit, a gate and a value."""
    if isinstance(activation, OwnActivation):
        return activation.form != "plain"
    return isinstance(activation, ClampedSwiGLU) or activation in _GATED


def is_activation(activation: object) -> bool:
    """Whether it is one."""
    by_name = isinstance(activation, str) and activation in ELEMENTWISE
    return by_name or isinstance(activation, (ClampedSwiGLU, OwnActivation))


def check_activation(activation: object) -> None:
    """Raise a ``ValueError`` for what is no activation."""
    if not is_activation(activation):
        raise ValueError(
            f"activation is {activation!r}; choose one of {', '.join(map(repr, ELEMENTWISE))}, or a ClampedSwiGLU."
        )


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


def forward(
    gate_up: Tensor,
    weights: Tensor | None,
    activation: Activation,
    *,
    interleaved: bool = False,
    end: Tensor | None = None,
) -> Tensor:
    """The weighted value, ``[rows, hidden]``, in the dtype of ``gate_up``.

    Rows from ``end`` on (``[1]``, on the device) hold nothing, and nothing need be computed for them.
    """
    if activation == "swiglu" and not interleaved and runs_on_triton(gate_up):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.swiglu_forward(gate_up, weights, end)
    x = gate_up.to(wide(gate_up.dtype))
    if isinstance(activation, OwnActivation):
        value = activation.value(x, interleaved)
    elif isinstance(activation, ClampedSwiGLU):
        gated, up = _clamped(activation, *_halves(x, interleaved))[:2]
        value = gated * up
    elif is_gated(activation):
        gate, up = _halves(x, interleaved)
        value = ELEMENTWISE[activation](gate)[0] * up
    else:
        value = ELEMENTWISE[activation](x)[0]
    return (value if weights is None else value * weights[:, None]).to(gate_up.dtype)


def backward(
    grad: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    activation: Activation,
    *,
    interleaved: bool = False,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weighted value once more, the gradient of ``gate_up``, and that of the weights.

    Computing the value again costs one pass over ``gate_up``, which is read anyway; keeping it would cost memory.
    """
    if activation == "swiglu" and not interleaved and runs_on_triton(gate_up):
        from foldpar.moe.kernels import triton_rows as kernels

        return kernels.swiglu_backward(grad, gate_up, weights, end)
    x, arriving = gate_up.to(wide(gate_up.dtype)), grad.to(wide(grad.dtype))
    scale: Tensor | float = 1.0 if weights is None else weights.to(x.dtype)[:, None]
    if isinstance(activation, OwnActivation):
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            computed = activation.value(given, interleaved)
        (grad_x,) = torch.autograd.grad(computed, given, (arriving * scale).to(computed.dtype))
        value = computed.detach()
    elif isinstance(activation, ClampedSwiGLU):
        value, up, slope, inside = _clamped(activation, *_halves(x, interleaved))
        grad_x = _joined(arriving * scale * up * slope, arriving * scale * value * inside, interleaved)
        value = value * up
    elif is_gated(activation):
        gate, up = _halves(x, interleaved)
        value, slope = ELEMENTWISE[activation](gate)
        grad_x = _joined(arriving * scale * up * slope, arriving * scale * value, interleaved)
        value = value * up
    else:
        value, slope = ELEMENTWISE[activation](x)
        grad_x = arriving * scale * slope
    grad_weights = None if weights is None else (arriving * value).sum(-1).to(weights.dtype)
    return (value * scale).to(gate_up.dtype), grad_x.to(gate_up.dtype), grad_weights


def _clamped(activation: ClampedSwiGLU, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gated factor and the other one, the slope of the first and that of the second (zero beyond the limits)."""
    limit, alpha = activation.limit, activation.alpha
    below, inside = gate <= limit, up.abs() <= limit
    gate = gate.clamp(max=limit)
    share = (alpha * gate).sigmoid()
    slope = share * (1 + alpha * gate * (1 - share)) * below
    return gate * share, up.clamp(-limit, limit) + 1, slope, inside


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    gate, up = x.chunk(2, dim=-1)
    return gate, up


def _joined(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    return torch.stack([gate, up], dim=-1).flatten(-2) if interleaved else torch.cat([gate, up], dim=-1)
