"""The memory of a layer's step by the way that its rows take: torch's allocator at its peak, and what GPUs share.

    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/way_memory.py --tp 2 --ep 2 --shapes qwen3 --tokens 1024 8192

One process a GPU, or several that share one: then messages go over Gloo, and only memory means anything. Of each way
the rank with the most memory is told: replicated lanes, bf16, forward and backward with all gradients, a fourth step.
"""

from __future__ import annotations

import argparse
import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from moe_layer import SHAPES, build_layer, own_input

import foldpar
from foldpar.comm.peers import PeerMemories

MIB = 2**20


def peak(layer: Any, x: torch.Tensor, groups: foldpar.FoldedGroups) -> tuple[int, int]:
    """MiB of the allocator and MiB that are shared, of the rank where they are most."""
    grad, wanted = torch.randn_like(x), [x, *layer.parameters()]
    for step in range(4):
        if step == 3:
            torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(layer(x), wanted, grad)
    torch.cuda.synchronize()
    shared = sum(memories.shared for memories in groups.keep(PeerMemories).found.values())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (torch.cuda.max_memory_allocated() // MIB, shared // MIB))
    allocated, shared = max(found, key=sum)
    return allocated, shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["qwen3"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 8192], help="unique tokens of a rank")
    options = parser.parse_args()
    world, gpus = int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    if gpus < world:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus >= world else "gloo")
    like = {"device": "cuda", "dtype": torch.bfloat16}
    for name in options.shapes:
        for tokens in options.tokens:
            before = 0
            for way in (False, None):
                with foldpar.create_groups(foldpar.solve_layout(world, tp=options.tp, ep=options.ep)) as groups:
                    layer = build_layer(SHAPES[name], groups, "replicated", "uniform", like, way)
                    x = own_input(tokens, SHAPES[name], groups, "replicated", like).requires_grad_()
                    allocated, shared = peak(layer, x, groups)
                    before = before or allocated
                    if groups.rank == 0:
                        told = layer.explain().splitlines()[3].strip()
                        more = 100 * ((allocated + shared) / before - 1)
                        print(f"{name} {tokens}: {allocated} + {shared} MiB shared, {more:+.1f} %; {told}", flush=True)
                    del layer, x
                gc.collect()
                torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
