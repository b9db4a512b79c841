"""What the checks of the first step cost, and that they cost nothing afterwards.

    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/first_step.py

Two layers of the size of Qwen3-30B-A3B's, bf16, tp 2, ep 2, one warmed up and one new; host time of a whole step
(forward, backward, reduction), and a step in a CUDA graph whose warm-up was the checked one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

import foldpar

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--tokens", type=int, default=8192, help="unique tokens per rank")
parser.add_argument("--repeats", type=int, default=20)


def layer(groups: foldpar.FoldedGroups, check: bool | None, **options: object) -> foldpar.FoldedMoE:
    torch.manual_seed(0)
    experts = foldpar.GroupedExperts(128, 2048, 768, groups, device="cuda", dtype=torch.bfloat16)
    router = foldpar.TopKRouter(2048, 128, 8, device="cuda", dtype=torch.bfloat16)
    return foldpar.FoldedMoE(router, experts, groups, check=check, **options)  # type: ignore[arg-type]


def step(moe: foldpar.FoldedMoE, groups: foldpar.FoldedGroups, x: torch.Tensor, check: bool | None) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    moe.zero_grad()
    moe(x).square().mean().backward()
    foldpar.reduce_gradients(moe, groups, check=check)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2), backend="nccl") as groups:
        torch.manual_seed(1)
        x = torch.randn(2 * options.tokens, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        first: dict[bool | None, float] = {}
        for _ in range(3):  # the first one compiles kernels and makes communicators; the best one counts
            layers = {check: layer(groups, check) for check in (False, None, True)}
            begun = {check: step(moe, groups, x, check) for check, moe in layers.items()}
            first = {check: min(begun[check], first.get(check, begun[check])) for check in begun}
        later: dict[bool | None, list[float]] = {check: [] for check in layers}
        for _ in range(options.repeats):  # side by side: all three meet the same machine
            for check, moe in layers.items():
                later[check].append(step(moe, groups, x, check))
        said = {
            check: f"first step {first[check]:.2f} ms, later {statistics.median(later[check]):.2f} ms"
            for check in layers
        }
        graphed = layer(groups, None, one_sided=foldpar.OneSided(max_tokens=options.tokens))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                graphed(x).square().mean().backward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed(x).square().mean().backward()
        graph.replay()
        torch.cuda.synchronize()
        if groups.rank == 0:
            print(torch.cuda.get_device_name(), f"{options.tokens} tokens a rank, {options.repeats} repeats")
            for check, text in said.items():
                print(f"check={check}: {text}")
            print("captured after the first step: yes")
        del graph  # NCCL waits for it before it lets a communicator go


if __name__ == "__main__":
    main()
