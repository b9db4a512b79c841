"""One MoE block on one GPU, forward and backward with all gradients: foldpar and peers in one process.

    python benchmarks/one_gpu.py                                     # the table of shapes in SHAPES
    python benchmarks/one_gpu.py --shapes qwen3-8k --entries foldpar "foldpar, grouped_mm" transformers
    python benchmarks/one_gpu.py --device cpu --shapes tiny          # a rehearsal

Appends a row per shape and entry to ``--csv``, with the card, the versions and the commit. Peers that are not installed
are left out, and told. ``grouped_mm`` entries are foldpar without its own kernels; ``graph`` ones are one-sided rows in
a CUDA graph. ``TFLOP/s`` are those of the experts' products, 18 * tokens * top_k * dim * hidden per step.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import importlib.util
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from moe_layer import Shape, build_layer, captured, timed
from torch import Tensor, nn

import foldpar
from foldpar.comm.peers import PeerMemories
from foldpar.hf import register_with_transformers

SHAPES = {
    "qwen3-1k": (Shape(2048, 768, 128, 8), 1024),
    "qwen3-8k": (Shape(2048, 768, 128, 8), 8192),
    "qwen3-32k": (Shape(2048, 768, 128, 8), 32768),
    "fine-512": (Shape(4096, 512, 128, 8), 32768),
    "fine-256": (Shape(4096, 256, 256, 16), 32768),
    "mixtral-8k": (Shape(4096, 14336, 8, 2), 8192),
    "tiny": (Shape(64, 32, 8, 2), 64),
}
Step = Callable[[], Any]


@contextlib.contextmanager
def own_kernels(on: bool) -> Iterator[None]:
    """Whether foldpar's own products may be used."""
    with contextlib.nullcontext() if on else mock.patch("foldpar.moe.kernels.products.takes", return_value=False):
        yield


def foldpar_step(shape: Shape, x: Tensor, groups: foldpar.FoldedGroups, like: dict[str, Any], one_sided: bool) -> Step:
    way = foldpar.OneSided(x.shape[0], slack=1.0) if one_sided else None
    return step_of(build_layer(shape, groups, "sharded", "uniform", like, way), x)


def transformers_step(shape: Shape, x: Tensor, like: dict[str, Any], implementation: str) -> Step:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.dim, moe_intermediate_size=shape.hidden, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config).to(**like)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=shape.dim**-0.5)
    return step_of(block, x[None])


@contextlib.contextmanager
def tuned_on_all_cores() -> Iterator[None]:
    """What Triton's autotuner is about to try is compiled side by side, before it tries one after the other."""
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    before = Autotuner.prune_configs

    def prune_configs(tuner: Any, given: dict[str, Any]) -> Any:
        configs = before(tuner, given)
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                tuner.fn.run(**tuner.nargs, **given | {"warmup": True} | config.all_kwargs())
        return configs

    with mock.patch.object(Autotuner, "prune_configs", prune_configs):
        yield


class LigerBlock(nn.Module):
    def __init__(self, shape: Shape, like: dict[str, Any]) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Linear(shape.dim, shape.experts, bias=False, **like)
        gate_up = torch.randn(shape.experts, 2 * shape.hidden, shape.dim, **like) * shape.dim**-0.5
        down = torch.randn(shape.experts, shape.dim, shape.hidden, **like) * shape.hidden**-0.5
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        weights, ids = self.router(x).float().softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y: Tensor = LigerFusedMoEFunction.apply(x, self.gate_up, self.down, ids.int(), weights)  # type: ignore
        return y


def liger_step(shape: Shape, x: Tensor, like: dict[str, Any]) -> Step:
    step = step_of(LigerBlock(shape, like), x)
    with tuned_on_all_cores():
        step()
    return step


def step_of(block: nn.Module, x: Tensor) -> Step:
    x = x.detach().clone().requires_grad_()
    wanted, grad = [x, *block.parameters()], torch.randn_like(x)

    def step() -> None:
        y = block(x)
        torch.autograd.grad(y[0] if isinstance(y, tuple) else y, wanted, grad)

    return step


def entries(groups: foldpar.FoldedGroups, gpu: bool) -> dict[str, tuple[bool, Callable[..., Step]]]:
    """By name: whether own kernels are on, and what makes the step of a shape, an input and its ``like``."""

    def foldpar_in_steps(shape: Shape, x: Tensor, like: dict[str, Any]) -> Step:
        return foldpar_step(shape, x, groups, like, one_sided=False)

    def foldpar_in_a_graph(shape: Shape, x: Tensor, like: dict[str, Any]) -> Step:
        replay: Step = captured(foldpar_step(shape, x, groups, like, one_sided=True))
        return replay

    def foldpar_in_transformers(shape: Shape, x: Tensor, like: dict[str, Any]) -> Step:
        return transformers_step(shape, x, like, register_with_transformers())

    every: dict[str, tuple[bool, Callable[..., Step]]] = {
        "foldpar": (True, foldpar_in_steps),
        "foldpar, grouped_mm": (False, foldpar_in_steps),
    }
    if gpu:
        every["foldpar, graph"] = (True, foldpar_in_a_graph)
        every["foldpar, graph, grouped_mm"] = (False, foldpar_in_a_graph)
    if importlib.util.find_spec("transformers"):
        every["transformers"] = (True, lambda shape, x, like: transformers_step(shape, x, like, "grouped_mm"))
        every["transformers with foldpar"] = (True, foldpar_in_transformers)
    if gpu and importlib.util.find_spec("liger_kernel"):
        every["liger"] = (True, liger_step)
    return every


def measure(name: str, entry: str, make: Callable[..., Step], own: bool, device: str) -> dict[str, Any]:
    shape, tokens = SHAPES[name]
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    torch.manual_seed(0)
    x = torch.randn(tokens, shape.dim, **like)
    with own_kernels(own):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = make(shape, x, like)  # of a graph, memory is taken here
        times = timed(step, device)
    ms = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return {
        "shape": name, "dim": shape.dim, "hidden": shape.hidden, "experts": shape.experts, "top_k": shape.top_k,
        "tokens": tokens, "entry": entry, "ms": round(ms, 3), "fastest": round(min(times), 3),
        "slowest": round(max(times), 3), "peak_gib": round(peak, 2),
        "tflops": round(18 * tokens * shape.top_k * shape.dim * shape.hidden / ms / 1e9, 1),
    }  # fmt: skip


def circumstances(device: str, commit: str | None) -> dict[str, str]:
    root = Path(__file__).parents[1]
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or told.stdout.strip() or "unknown",
        "card": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": " ".join(
            f"{name} {installed}"
            for name in ("torch", "triton", "transformers", "liger-kernel")
            if (installed := _version(name))
        ),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:-1], choices=SHAPES)
    parser.add_argument("--entries", nargs="+", help="which; every one that is installed if not given")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results.csv")
    parser.add_argument("--commit", help="where the code lies without its history")
    options = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}.items():
        os.environ.setdefault(name, value)
    around = circumstances(options.device, options.commit)
    torch.distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        every = entries(groups, options.device == "cuda")
        for name in options.shapes:
            for entry in options.entries or every:
                if entry not in every:
                    print(f"{entry} is not installed, or does not run on {options.device}")
                    continue
                try:
                    row = measure(name, entry, every[entry][1], every[entry][0], options.device)
                except Exception as error:  # a peer that fails must not end the table
                    print(f"{name:<11} {entry:<28} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
                    continue
                print(
                    f"{name:<11} {entry:<28} {row['ms']:>8.3f} ms ({row['fastest']}..{row['slowest']}) "
                    f"{row['tflops']:>6.0f} TFLOP/s {row['peak_gib']:>6.2f} GiB",
                    flush=True,
                )
                append(options.csv, around | row)
                groups.keep(PeerMemories).found.clear()
                gc.collect()  # a captured step is a cycle, and its memory would count in the next peak
                if options.device == "cuda":
                    torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
