"""Copies of modules with other tensors, or without their numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import TypeVar, cast

from torch import Tensor, nn

__all__ = ["HOOKS", "STATE_HOOKS", "forward_hooks", "on_meta", "with_tensors"]

_Module = TypeVar("_Module", bound=nn.Module)

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""Where a module keeps what is called around its forward and backward."""

STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""The same around ``state_dict`` and ``load_state_dict``."""


def forward_hooks(module: nn.Module) -> OrderedDict[int, Callable[..., object]]:
    """What is called behind a module's forward, in this order."""
    return cast("OrderedDict[int, Callable[..., object]]", getattr(module, HOOKS[2]))


def with_tensors(module: _Module, stand_in: Callable[[Tensor], Tensor]) -> _Module:
    """A copy with ``stand_in(tensor)`` for each parameter and buffer, called once for each; without hooks.

    Everything else, such as configurations and plain attributes, is shared with the original, so that nothing need be
    copyable. What is one tensor or one module at several places stays one. Methods that were put on the module
    itself are bound to the copy.
    """
    return cast(_Module, _copied(module, stand_in, {}, {}))


def _copied(
    module: nn.Module, stand_in: Callable[[Tensor], Tensor], modules: dict[int, nn.Module], tensors: dict[int, Tensor]
) -> nn.Module:
    if id(module) in modules:
        return modules[id(module)]
    copy = modules[id(module)] = module.__class__.__new__(module.__class__)
    own = vars(copy)
    for name, value in vars(module).items():
        is_own_method = isinstance(value, MethodType) and value.__self__ is module
        own[name] = MethodType(value.__func__, copy) if is_own_method else value
    own |= {name: OrderedDict() for name in HOOKS if name != "_is_full_backward_hook"}
    for kind in ("_parameters", "_buffers"):
        own[kind] = {
            name: None if tensor is None else tensors.setdefault(id(tensor), stand_in(tensor))
            for name, tensor in own[kind].items()
        }
    own["_modules"] = {
        name: None if child is None else _copied(child, stand_in, modules, tensors)
        for name, child in own["_modules"].items()
    }
    return copy


def on_meta(module: _Module) -> _Module:
    """A copy whose parameters and buffers are on the meta device; nothing of theirs is copied.

    Example:
        >>> on_meta(nn.Linear(4, 2)).weight
        Parameter containing:
        tensor(..., device='meta', size=(2, 4), requires_grad=True)
    """
    return with_tensors(module, _without_numbers)


def _without_numbers(tensor: Tensor) -> Tensor:
    there = tensor.detach().to("meta")
    return nn.Parameter(there, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
