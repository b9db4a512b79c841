"""The suite ``small``: a handful of small cases of every Triton kernel, for compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    torchrun --no-python --nproc-per-node 2 compute-sanitizer --tool memcheck --error-exitcode 9 \
        --kernel-regex kns=_kernel python tests/gpu/run.py small

Without torch's cache every tensor ends where its memory ends, so a step beyond it is seen. Looked at are kernels whose
names end in ``_kernel``: Triton's, and the barrier of torch's symmetric memory. The ranks may share a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import gpu_kernels
import gpu_onesided
import torch
import torch.distributed as dist
from run import Runner

import foldpar

PRODUCTS = gpu_kernels.Case(131, 256, 128, 4, 2)
KERNELS = [
    PRODUCTS,
    replace(PRODUCTS, gathered=False),
    gpu_kernels.Case(99, 264, 328, 4, 3, kind="masked"),
]


def rows(world: int) -> list[gpu_onesided.Case]:
    even = gpu_onesided.Case((13,) * world, 1, world)
    found = [
        even,
        replace(even, kind="masked", top_k=3, dim=96),
        replace(even, tokens=(0,) + (9,) * (world - 1), bias=True),
        replace(even, dtype=torch.bfloat16, dim=264, hidden=128, slack=float(world)),
    ]
    return [*found, replace(even, ep=1, etp=world)] if world > 1 else found


def check(case: gpu_onesided.Case) -> None:
    with foldpar.create_groups(foldpar.solve_layout(dist.get_world_size(), ep=case.ep, etp=case.etp)) as groups:
        error = gpu_onesided.run_case(case, groups)
        torch.cuda.synchronize()
        dist.barrier()
    assert error < (1e-5 if case.dtype == torch.float32 else 3e-2), f"{error:.1e}"


def main(runner: Runner) -> None:
    if runner.device == "cpu":
        return
    for case in KERNELS:
        runner.check(case, partial(gpu_kernels.run, case))
    for shape in rows(runner.world):
        runner.check(shape, partial(check, shape))
