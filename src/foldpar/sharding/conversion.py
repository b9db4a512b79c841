"""Experts that no other rank holds, computed with in another dtype: what FSDP2 would do for a unit of one rank.

    forward     copies in the other dtype stand in for the parameters; behind it their memory is given back
    backward    before it comes to the module: filled again; behind it: gradients in the parameters' own dtype

There is nothing to gather and nothing to sum, so no hooks, streams and flat buffers are needed, which take the host a
millisecond for each unit and pass (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foldpar.comm import converted, local_tensor
from foldpar.moe import in_backward

__all__ = ["compute_in"]


def compute_in(module: nn.Module, names: list[tuple[nn.Module, str]], dtype: torch.dtype) -> None:
    """Let the module's forward see copies in ``dtype`` of these parameters, named by their owners inside of it.

    Backward:
        Gradients in the parameters' dtypes. The copies are made again for it: none is kept in between.
    """
    conversion = _Conversion(names, dtype)
    module.register_forward_pre_hook(conversion.begin)
    module.register_forward_hook(conversion.end, always_call=True)


class _Conversion:
    """The two hooks of one module; forwards that are under way are a stack."""

    def __init__(self, names: list[tuple[nn.Module, str]], dtype: torch.dtype) -> None:
        self.names, self.dtype = names, dtype
        self.under_way: list[tuple[list[Tensor], tuple[Tensor, ...]]] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, module: nn.Module, arguments: object) -> None:
        parameters = [parameter for owner, name in self.names if (parameter := owner._parameters[name]) is not None]
        copies = converted(parameters, self.dtype)
        self.under_way.append((list(parameters), copies))
        self._stand_in(copies)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, module: nn.Module, arguments: object, output: Any) -> None:
        if not self.under_way:  # another hook failed before this one's turn
            return
        parameters, copies = self.under_way.pop()
        self._stand_in(parameters)
        outputs = [each for each in (output if isinstance(output, (tuple, list)) else (output,)) if _needs_grad(each)]
        if not outputs or in_backward():  # what checkpointing computes again is used at once
            return
        waiting = list(zip(copies, parameters, strict=True))
        for copy, _ in waiting:
            local_tensor(copy).untyped_storage().resize_(0)

        def fill(gradient: Tensor) -> None:
            while waiting:
                _fill(*waiting.pop())

        for each in outputs:
            each.register_hook(fill)

    def _stand_in(self, tensors: Any) -> None:
        for (owner, name), tensor in zip(self.names, tensors, strict=True):
            owner._parameters[name] = tensor


def _needs_grad(output: object) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


@torch.no_grad()
def _fill(copy: Tensor, parameter: Tensor) -> None:
    """Give a copy its memory and its values again, unseen by autograd, which knows it as it was."""
    part = local_tensor(copy).data
    part.untyped_storage().resize_(part.numel() * part.element_size())
    part.copy_(local_tensor(parameter))
