"""A rank that never comes: to a collective over NCCL, or to the backward of rows that travel one-sided.

torchrun --nproc-per-node 2 tests/gpu/gpu_stuck.py
torchrun --nproc-per-node 2 tests/gpu/gpu_stuck.py one-sided     # the ranks may share a GPU
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

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


def one_sided() -> None:
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.init_process_group("gloo" if gpus < 2 else "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=5))
    groups = foldpar.create_groups(foldpar.solve_layout(2, ep=2))
    experts = foldpar.GroupedExperts(4, 16, 32, groups)
    moe = foldpar.FoldedMoE(foldpar.TopKRouter(16, 4, 2), experts, groups).cuda()
    y = moe(torch.ones(3, 16, device="cuda"))
    torch.cuda.synchronize()
    print("both ranks came to the forward", flush=True)
    if groups.rank == 1:
        time.sleep(600)
    y.sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    one_sided() if "one-sided" in sys.argv else main()
