"""When checks run: in the first step, in every one, or never."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from foldpar.comm.dtensors import local_tensor

__all__ = ["When", "can_compare"]


class When:
    """When the checks of one module run: always (``True``), never (``False``), or once for each occasion (``None``).

    Nothing runs, and no occasion is used up, where there are no values to compare (the meta device, fake tensors) or
    the host may not wait for them (while a CUDA graph is captured).
    """

    def __init__(self, check: bool | None) -> None:
        if not (check is None or isinstance(check, bool)):  # 1 equals True, and would be neither always nor once
            raise TypeError(f"check is {check!r}; choose None (the first step), True (every step) or False (never).")
        self.check = check
        self._done: set[str] = set()

    def due(self, occasion: str, tensor: Tensor) -> bool:
        """Whether to check now."""
        return self.is_open(occasion) and can_compare(tensor)

    def is_open(self, occasion: str) -> bool:
        """Whether it has not run yet, or always runs."""
        return self.check is True or (self.check is None and occasion not in self._done)

    def done(self, occasion: str) -> None:
        """It ran, and found nothing."""
        self._done.add(occasion)


def can_compare(tensor: Tensor) -> bool:
    """Whether the host may look at the values of a tensor here and now."""
    tensor = local_tensor(tensor)
    if tensor.is_meta or isinstance(tensor, FakeTensor) or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
