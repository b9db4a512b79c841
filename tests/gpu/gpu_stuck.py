"""A rank that never comes to a collective, over NCCL: torch's watchdog must end the process that waits.

torchrun --nproc-per-node 2 tests/gpu/gpu_stuck.py
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch

import foldpar


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    groups = foldpar.create_groups(foldpar.solve_layout(2, ep=2), backend="nccl", timeout=timedelta(seconds=5))
    foldpar.all_reduce(torch.ones(1, device="cuda"), groups.ep, backward="sum")
    torch.cuda.synchronize()
    print("both ranks came to the first one", flush=True)
    if groups.rank == 1:
        time.sleep(600)
    foldpar.all_reduce(torch.ones(1, device="cuda"), groups.ep, backward="sum")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
