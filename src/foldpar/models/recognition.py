"""Which activation somebody else's experts have: told by what the code *is*, never by what it gives for some numbers.

    the module's own gate -> is it the usual one? -> its act_fn -> is it one of those known here?
                                   no: kept                              no: kept

Numbers can only refute: a function that is known by its class and gives other values is kept as it is, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldpar.errors import ModelError
from foldpar.models.meta_copy import HOOKS, on_meta
from foldpar.moe import ELEMENTWISE, Activation, ClampedSwiGLU, OwnActivation, name_of

__all__ = ["activation_of", "check_own_activation", "experts_implementation", "own_gate"]

Known = Literal["silu", "gelu", "relu"]

_FUNCTIONS: tuple[tuple[Callable[..., Tensor], Known], ...] = (
    (F.silu, "silu"),
    (F.gelu, "gelu"),
    (F.relu, "relu"),
    (torch.relu, "relu"),
)
_CLASSES: dict[str, Known] = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
}
_USUAL_GATE = "transformers.integrations.moe._default_apply_gate"
_CLAMPED_GATE = "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate"
_GATED: dict[str, Activation] = {"silu": "swiglu", "gelu": "geglu"}
_SAMPLES = (0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 6.5, 8.0, 12.0, 30.0, 100.0, 1e3)


def activation_of(experts: nn.Module, where: str, *, gated: bool = True, interleaved: bool = False) -> Activation:
    """The activation of a module that keeps it as ``act_fn``, or in an ``_apply_gate`` of its own.

    One that is known becomes foldpar's; every other is kept, as an :class:`~foldpar.OwnActivation`.

    Raises:
        ModelError: there is none, it holds tensors, or it does not work on each hidden unit by itself.
    """
    act_fn = getattr(experts, "act_fn", None)
    gate = own_gate(experts) if gated else None
    if gate is not None and not (isinstance(gate, MethodType) and _full_name(gate.__func__) == _USUAL_GATE):
        return _of_own_gate(experts, gate, where, interleaved)
    if not callable(act_fn):
        raise ModelError(
            f"{where} ({type(experts).__name__}) has no act_fn to tell its activation by. Say which it is with "
            f"MoEAdapter(..., activation=...): one of {', '.join(map(repr, ELEMENTWISE))}, a ClampedSwiGLU, or an "
            f"OwnActivation."
        )
    known = _known(act_fn)
    if known is not None and gated and known in _GATED:
        return _GATED[known]
    if known is not None and not gated:
        return known
    own = OwnActivation(act_fn, "gate" if gated else "plain")
    check_own_activation(own, where, interleaved=interleaved)
    return own


def own_gate(experts: nn.Module) -> Callable[..., Tensor] | None:
    """How a module of transformers computes gate and up of its experts, by itself or in the usual way, if it can."""
    gate: Callable[..., Tensor] | None = getattr(experts, "_apply_gate", None)
    return gate


def experts_implementation(config: Any) -> str | None:
    """Which of transformers' implementations a model's configuration has chosen for experts."""
    chosen: str | None = getattr(config, "_experts_implementation", None)
    return chosen


def _of_own_gate(experts: nn.Module, gate: Callable[..., Tensor], where: str, interleaved: bool) -> Activation:
    if isinstance(gate, MethodType) and _full_name(gate.__func__) == _CLAMPED_GATE:
        module = cast(Any, experts)
        return ClampedSwiGLU(alpha=module.alpha, limit=module.limit)
    if isinstance(gate, MethodType) and gate.__self__ is experts:
        gate = MethodType(gate.__func__, _without_tensors(experts))  # the experts' weights can go
    own = OwnActivation(gate, "gate_up")
    check_own_activation(own, where, interleaved=interleaved)
    return own


def _without_tensors(experts: nn.Module) -> nn.Module:
    shell = on_meta(experts)
    for module in shell.modules():
        module._parameters, module._buffers = {}, {}
    return shell


def _known(function: Callable[..., Tensor]) -> Known | None:
    """Which function it is by its code and parameters, and its values do not speak against it."""
    name = _by_code(function)
    return None if name is None or _refuted(function, name) else name


def _by_code(function: Callable[..., Any]) -> Known | None:
    if isinstance(function, functools.partial):
        plain = not function.args and all(
            (key, value) in (("approximate", "none"), ("inplace", False)) for key, value in function.keywords.items()
        )
        return _by_code(function.func) if plain else None
    if not isinstance(function, nn.Module):
        return next((name for known, name in _FUNCTIONS if function is known), None)
    if "forward" in vars(function) or any(vars(function).get(hooks) for hooks in HOOKS):
        return None
    if getattr(function, "approximate", "none") != "none":
        return None
    name = _CLASSES.get(_full_name(type(function)))
    inner = vars(function).get("act")  # what GELUActivation calls
    if inner is not None and inner is not F.gelu and getattr(inner, "__func__", None) is not _exact(type(function)):
        return None
    return name


def _exact(kind: type) -> object:
    """The slow way to write the exact GELU, ``hidden_act="gelu_python"``."""
    return getattr(kind, "_gelu_python", None)


def _full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@torch.no_grad()
def _refuted(function: Callable[..., Any], name: Known) -> bool:
    points = torch.tensor([*(-x for x in _SAMPLES), *_SAMPLES], dtype=torch.float64, device="cpu")
    try:
        values = function(points)
    except Exception:  # whatever it is, it is not that
        return True
    return not _same(values, ELEMENTWISE[name](points)[0])


def _same(values: object, wanted: Tensor) -> bool:
    return (
        isinstance(values, Tensor)
        and values.shape == wanted.shape
        and torch.allclose(values.to(wanted), wanted, equal_nan=True)
    )


def check_own_activation(activation: OwnActivation, where: str, *, interleaved: bool) -> None:
    """That a function may be kept: it holds no tensors, and gives every hidden unit of every row its own value.

    Raises:
        ModelError: it does not.
    """
    function, name = activation.function, f"the activation {name_of(activation.function)} of {where}"
    if isinstance(function, nn.Module):
        tensors = [each for each, _ in (*function.named_parameters(), *function.named_buffers())]
        if tensors:
            raise ModelError(
                f"{name[0].upper()}{name[1:]} holds the tensor(s) {', '.join(tensors)}, which folding would lose: an "
                f"activation is kept as a function without numbers of its own. Give the block a module in place of "
                f"its experts, with an adapter's around or replace."
            )
    draw = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(6, 16, generator=draw, dtype=torch.float64, device="cpu") * torch.tensor(
        [0.1, 1.0, 1.0, 5.0, 30.0, 1e3], dtype=torch.float64, device="cpu"
    ).view(6, 1)
    columns = _columns_of_units(activation, interleaved, slice(2, 5), x.shape[1])
    try:
        with torch.enable_grad():
            given = x.clone().requires_grad_()
            torch.autograd.grad(activation.value(given, interleaved).sum(), given)
        with torch.no_grad():
            whole = activation.value(x, interleaved)
            again = [activation.value(x, interleaved), _in_the_other_mode(activation).value(x, interleaved)]
            parts = activation.value(x[1:4], interleaved), activation.value(x[:, columns], interleaved)
    except Exception as error:
        raise ModelError(
            f"{name[0].upper()}{name[1:]} cannot be computed by itself: {type(error).__name__}: {error} Folding keeps "
            f"it as a differentiable function of the first product alone, without tensors of the module's."
        ) from error
    if not all(_same(each, whole) for each in again):
        raise ModelError(
            f"{name[0].upper()}{name[1:]} gives other values for the same input, as random ones do, or in training. "
            f"Lanes would draw different numbers; such experts cannot be folded."
        )
    if not _same(parts[0], whole[1:4]) or not _same(parts[1], whole[:, 2:5]):
        raise ModelError(
            f"{name[0].upper()}{name[1:]} does not work on each hidden unit of each row by itself. Rows go to the "
            f"ranks of their experts and hidden units are shared out over etp, so such experts cannot be folded."
        )


def _columns_of_units(activation: OwnActivation, interleaved: bool, units: slice, columns: int) -> list[int]:
    """The columns of the first product that belong to the given hidden units."""
    chosen = range(units.start, units.stop)
    if activation.form == "plain":
        return list(chosen)
    if interleaved:
        return [2 * unit + half for unit in chosen for half in (0, 1)]
    return [half * columns // 2 + unit for half in (0, 1) for unit in chosen]


def _in_the_other_mode(activation: OwnActivation) -> OwnActivation:
    """The same in training, where it is in evaluation, and the other way round."""
    function = activation.function
    if isinstance(function, nn.Module):
        return OwnActivation(on_meta(function).train(not function.training), activation.form)
    if isinstance(function, MethodType) and isinstance(function.__self__, nn.Module):
        other = on_meta(function.__self__).train(not function.__self__.training)
        return OwnActivation(MethodType(function.__func__, other), activation.form)
    return activation
