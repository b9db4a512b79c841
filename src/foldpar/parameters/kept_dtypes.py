"""What a model's class demands to be float32, and keeping it so whatever the rest of the model becomes.

Transformers' classes name it (``_keep_in_fp32_modules_strict``, ``_keep_in_fp32_modules``): a balancing bias or a
router's weight in bfloat16 would send tokens to other experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["keep_dtypes", "kept_dtype"]

_NARROW = {
    "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
    "_keep_in_fp32_modules": (torch.float16,),
}


def kept_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of the model: float32 where its class demands that, as ``from_pretrained`` gives it."""
    for attribute, narrow in _NARROW.items():
        patterns = getattr(model, attribute, None) or ()
        if dtype in narrow and any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns):
            return torch.float32
    return dtype


def keep_dtypes(model: nn.Module) -> None:
    """Let ``.to(dtype)``, ``.half()`` and ``.bfloat16()``, of the model or of any part of it, leave what its class
    demands in float32; repeating it does nothing."""
    if not any(getattr(model, attribute, None) for attribute in _NARROW):
        return
    for prefix, module in model.named_modules():
        demanded = {}
        for name, tensor in _own(module):
            full = f"{prefix}.{name}" if prefix else name
            dtypes = [dtype for dtype in (torch.float16, torch.bfloat16) if kept_dtype(model, full, dtype) != dtype]
            if dtypes and tensor.is_floating_point():
                demanded[name] = dtypes
        if demanded:
            module._apply = partial(_apply, module, demanded)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _apply(
    module: nn.Module, demanded: dict[str, list[torch.dtype]], fn: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """As ``nn.Module._apply``, which every conversion goes through."""
    wide: dict[int, list[torch.dtype]] = {}
    for name, tensor in _own(module):
        for each in (tensor, tensor.grad):
            if each is not None:
                wide[id(each)] = demanded.get(name, [])

    def keeping(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        if converted.dtype in wide.get(id(tensor), ()):
            return tensor.to(device=converted.device, dtype=torch.float32)
        return converted

    return cast(nn.Module, type(module)._apply(module, keeping, recurse))
