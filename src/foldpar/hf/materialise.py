"""Memory for tensors of a model that are on the meta device, and values for those that are in no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from foldpar.comm import adopt
from foldpar.errors import ModelError
from foldpar.parameters import buffer_places, refuse_gradient_hooks

__all__ = ["Slots", "compute_buffers"]


class Slots:
    """Where a model keeps its tensors, to give those on the meta device memory at all their places."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        on_meta = ((name, each) for name, each in model.named_parameters() if each.is_meta)
        refuse_gradient_hooks(on_meta, "Loading into a model on the meta device")
        self._device = device
        self._made: dict[int, Tensor] = {}
        self._places: dict[int, list[tuple[Mapping[str, Any], str]]] = {}
        for module in model.modules():
            for kept in (module._parameters, module._buffers):
                for attribute, tensor in kept.items():
                    if tensor is not None:
                        self._places.setdefault(id(tensor), []).append((kept, attribute))

    @torch.no_grad()
    def with_memory(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, or in place of one without memory, or of another dtype than this, a new one.

        The values of a new tensor are undefined.
        """
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        if not tensor.is_meta and dtype in (None, tensor.dtype):
            return tensor
        new: Tensor = torch.empty_like(tensor, device=self._device if tensor.is_meta else None, dtype=dtype)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        new.__dict__.update(tensor.__dict__)  # marks
        adopt(new)
        for kept, attribute in self._places[id(tensor)]:
            cast("dict[str, Tensor]", kept)[attribute] = new
        self._made[id(tensor)] = new
        return new


@torch.no_grad()
def compute_buffers(model: nn.Module, slots: Slots) -> None:
    """Compute what is in no file and was on the meta device, such as rotary frequencies, as the model does.

    Raises:
        ModelError: the model's class does not say how.
    """
    new: list[tuple[str, nn.Module, str]] = []
    for name, module, attribute in buffer_places(model):
        if getattr(module, attribute).is_meta:
            buffer = slots.with_memory(getattr(module, attribute))
            if not buffer.is_floating_point():
                raise ModelError(_unknown_buffer(name, module))
            buffer.fill_(torch.nan)
            new.append((name, module, attribute))
    initialise = getattr(model, "_init_weights", None)
    for module in dict.fromkeys(module for _, module, _ in new):
        own = list(module.parameters(recurse=False))
        if initialise is not None and not own:  # it would draw parameters anew
            initialise(module)
    for name, module, attribute in new:
        if getattr(module, attribute).isnan().any():
            raise ModelError(_unknown_buffer(name, module))


def _unknown_buffer(name: str, module: nn.Module) -> str:
    return (
        f"The buffer {name} of {type(module).__name__} is on the meta device and in no file, since it is not "
        f"persistent, and the model does not say how to compute it (_init_weights). Compute it before loading: "
        f"model.get_submodule({name.rpartition('.')[0]!r}).{name.rpartition('.')[2]} = ..."
    )
