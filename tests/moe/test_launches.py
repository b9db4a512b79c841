"""A kernel computes the same however it is launched: by Triton, or as it was compiled before.

Runs on a GPU, or with ``TRITON_INTERPRET=1`` in Triton's interpreter, which has nothing compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from kernels_device import DEVICE
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytest.importorskip("triton.tools.tensor_descriptor")

from foldpar.moe.kernels import triton_launches  # noqa: E402
from foldpar.moe.kernels.triton_launches import Kernel  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]
COMPILED = DEVICE == "cuda"
DIRECT = COMPILED and triton.__version__.startswith(triton_launches._KNOWN_VERSIONS)


@Kernel
@triton.jit
def affine(x, shift, out, count, step, factor, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore  # noqa: N803
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count) * factor + step
    if SHIFTED:
        value += tl.load(shift + place, mask=place < count)
    tl.store(out + place, value, mask=place < count)


def launched(x: Tensor, shift: Tensor | None, count: int, step: int, factor: float, block: int = 64) -> Tensor:
    out = torch.zeros_like(x)
    grid = (-(-count // block),)
    affine[grid](x, shift, out, count, step, factor, SHIFTED=shift is not None, BLOCK=block, num_warps=4)
    return out


@contextmanager
def by_triton() -> Iterator[list[int]]:
    """How often Triton launches in here, as the one element of a list."""
    times = [0]
    usual = Kernel._by_triton

    def counted(self: Kernel, *arguments: Any) -> Any:
        times[0] += 1
        return usual(self, *arguments)

    with mock.patch.object(Kernel, "_by_triton", counted):
        yield times


COUNTS = (1, 2, 16, 17, 48, 200)
STEPS = (0, 1, 3, 16, 2**31 - 1, 2**31, 2**40, -5, -16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_every_kind_of_arguments(dtype: torch.dtype) -> None:
    every = torch.arange(256, device=DEVICE, dtype=dtype)
    for _ in range(2):
        for count in COUNTS:
            for step in STEPS if count == 48 else (1, 16, 7):
                for start in (0, 1, 4):  # not all of them lie at whole 16 bytes
                    for shift in (None, every[start:][:count].clone(), every[1:][:count]):
                        x = every[start:][:count]
                        wanted = x * 0.5 + step + (0 if shift is None else shift)
                        torch.testing.assert_close(launched(x, shift, count, step, 0.5), wanted)


@pytest.mark.skipif(not DIRECT, reason="nothing is launched as it was compiled")
def test_what_was_compiled_is_launched_without_triton() -> None:
    x, shift = torch.rand(100, device=DEVICE), torch.rand(100, device=DEVICE)
    for given in ((x, shift, 100, 3, 2.0), (x, None, 96, 16, 2.0), (x.double(), None, 1, 1, 2.0)):
        launched(*given)
        with by_triton() as times:
            launched(*given)
        assert times == [0]
    with by_triton() as times:
        launched(x, shift, 99, 5, 3.0)  # other numbers of the same kind
        launched(x, shift, 100, 5, 3.0, block=32)  # another constant
    assert times == [1]


@pytest.mark.skipif(not DIRECT, reason="nothing is launched as it was compiled")
def test_triton_launches_what_lies_unevenly_and_where_somebody_listens() -> None:
    x = torch.rand(100, device=DEVICE)
    told: list[Any] = []
    for _ in range(2):
        launched(x, None, 50, 3, 2.0)
    with by_triton() as times:
        launched(x[1:], None, 50, 3, 2.0)
        assert times == [1]
        hook = triton.knobs.runtime.launch_enter_hook
        hook.add(told.append)
        try:
            launched(x, None, 50, 3, 2.0)
        finally:
            hook.remove(told.append)
        assert times == [2] and len(told) == 1
        launched(x, None, 50, 3, 2.0)
        assert times == [2]


@pytest.mark.skipif(not COMPILED, reason="the interpreter reads every tensor")
def test_a_tensor_that_the_device_cannot_read_is_an_error() -> None:
    x = torch.rand(100, device=DEVICE)
    launched(x, x, 100, 3, 2.0)
    with pytest.raises(ValueError, match="cpu tensor"):
        launched(x, x.cpu(), 100, 3, 2.0)


def test_of_another_version_all_launches_are_triton_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launches, "_KNOWN_VERSIONS", ("0.0.",))
    kernel = Kernel(affine.jitted)
    x = torch.rand(64, device=DEVICE)
    with by_triton() as times:
        for _ in range(3):
            out = torch.zeros_like(x)
            kernel[(1,)](x, None, out, 64, 2, 3.0, SHIFTED=False, BLOCK=64)
            torch.testing.assert_close(out, x * 3 + 2)
    assert times == [3]
