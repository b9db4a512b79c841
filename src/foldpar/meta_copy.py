"""A copy of a module without its numbers."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

__all__ = ["on_meta"]

_Module = TypeVar("_Module", bound=nn.Module)


def on_meta(module: _Module) -> _Module:
    """A copy whose parameters and buffers are on the meta device; nothing of theirs is copied.

    Example:
        >>> on_meta(nn.Linear(4, 2)).weight
        Parameter containing:
        tensor(..., device='meta', size=(2, 4), requires_grad=True)
    """
    stand_ins: dict[int, object] = {}
    for parameter in module.parameters():
        stand_ins[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        stand_ins[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, stand_ins)
