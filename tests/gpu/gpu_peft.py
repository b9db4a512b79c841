"""LoRA on folded models on GPUs, over NCCL: two processes of torchrun.

    torchrun --nproc-per-node 2 tests/gpu_peft.py
    torchrun --nproc-per-node 2 tests/gpu_peft.py --cpu     # a rehearsal over Gloo

Gradients of adapters in float64 equal one process, on attention, shared experts, router and routed experts, whatever
comes first, at stages 0, 2 and 3; merged weights too. Prints a line per case and ends with a count; exits with 1 if a
case fails.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
from test_peft import Case, differences, one_process

CPU = "--cpu" in sys.argv
FOLDS = [(2, 2, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)]


def cases() -> list[Case]:
    return [
        Case(world=2, tp=tp, ep=ep, etp=etp, stage=stage, first=first)
        for tp, ep, etp in FOLDS
        for first in ("fold", "peft")
        for stage in (0, 2, 3)
    ]


def main() -> int:
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo" if CPU else "nccl")
    if not CPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    rank, failed = dist.get_rank(), 0
    every = cases()
    for case in every:
        values, want = one_process(case)
        found = differences(case, values, want)
        worst = max(found, key=found.__getitem__)
        results: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(results, found[worst])
        failed += max(results) > 1e-9
        if rank == 0:
            print(f"{'ok  ' if max(results) <= 1e-9 else 'FAIL'} {case}: {max(results):.1e} ({worst})", flush=True)
    if rank == 0:
        print(f"{len(every) - failed} of {len(every)} cases are exact")
    dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
