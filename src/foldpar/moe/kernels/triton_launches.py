"""Launches of kernels that Triton has compiled: without what it looks up, on the host, in every launch.

Triton's own launch asks, in Python, what the arguments are, which compiled kernel goes with that, and who wants to be
told; that is most of what a launch costs (``benchmarks/NOTES.md``). A kernel is compiled for dtypes, for integers that
are 1 or whole 16s, for pointers to whole 16 bytes, and for constants. So is the key here, and what it finds is what
Triton launched before: the first launch of each kind is Triton's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

_KNOWN_VERSIONS = ("3.6.",)
"""Of Triton, whose compiled kernels were seen to take what is given here; elsewhere all launches are its own."""

_MOST = 2**31
"""Integers below it are 32 bits wide in a kernel."""

_ONES = ((1, 1, 1), (1, 1), (1,), ())


@dataclass(slots=True)
class Described:
    """A tensor that the copy engine reads by blocks: what Triton's ``TensorDescriptor`` is, whose checks cost more than
    the launch.
    """

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    padding: str = "zero"

    def checked(self) -> Any:
        """Triton's own."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block_shape))


class Kernel:
    """What ``triton.jit`` made, launched alike: ``kernel[grid](*arguments, **constants)``.

    Constants come by name, all else by position.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self._compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}
        self._is_known = (
            isinstance(jitted, triton.JITFunction)
            and triton.__version__.startswith(_KNOWN_VERSIONS)
            and torch.version.hip is None
        )
        parameters = jitted.params if self._is_known else []
        self._varying = sum(not each.is_constexpr for each in parameters)
        self._constants = (None,) * (len(parameters) - self._varying)
        """A compiled kernel knows them, and takes anything in their places."""

    def __getitem__(self, grid: tuple[int, ...]) -> partial[None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if not self._is_known or _somebody_listens():
            self._by_triton(grid, arguments, constants)
            return
        key, given, can = [*constants, *constants.values()], [], True
        for each in arguments:
            kind = type(each)
            if kind is Tensor or (kind is not int and isinstance(each, Tensor)):
                address = each.data_ptr()
                can = can and each.is_cuda and not address % 16
                key.append(each.dtype)
                given.append(address)  # of a tensor, the launcher would ask the driver whose it is
                continue
            given.append(each)
            if kind is int:
                can = can and -_MOST <= each < _MOST
                key.append(1 if each == 1 else 0 if each % 16 else 16)
            elif kind is Described:
                key += each.base.dtype, each.block_shape
            else:
                can = can and (each is None or kind is float)
                key.append(kind)
        if not can:
            self._by_triton(grid, arguments, constants)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        which = (device, *key)
        found = self._compiled.get(which)
        if found is None:
            self._keep(which, self._by_triton(grid, arguments, constants), arguments)
            return
        launch, head = found
        launch(*grid, *_ONES[len(grid)], driver.get_current_stream(device), *head, *given, *self._constants)

    def _by_triton(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        checked = (each.checked() if type(each) is Described else each for each in arguments)
        return self.jitted[grid](*checked, **constants)

    def _keep(self, which: tuple[object, ...], compiled: Any, arguments: tuple[Any, ...]) -> None:
        """What Triton has just launched, with what comes between the stream and the arguments of the kernel."""
        if compiled is None or len(arguments) != self._varying:
            return
        run = compiled.run
        if run.global_scratch_size == run.profile_scratch_size == 0:
            head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None)
            self._compiled[which] = run.launch, (*head, compiled.packed_metadata, None, None, None)


def _somebody_listens() -> bool:
    """Whether launches are told to anybody, such as a profiler of Triton's."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)
