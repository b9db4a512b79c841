"""Two Qwen3-MoE layers, forward and backward with all gradients: transformers' and folded, as they are and compiled.

    python benchmarks/compiled.py
    torchrun --nproc-per-node 2 benchmarks/compiled.py --tp 2 --ep 2
    python benchmarks/compiled.py --device cpu --tiny                   # a rehearsal

The folded model is compiled with ``fullgraph=True``. transformers' model is whole on every rank and has the same
tokens; its experts are ``grouped_mm``. How far outputs are apart is printed. Appends a row per entry to ``--csv``.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_layer import timed
from one_gpu import append, circumstances
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeModel

import foldpar


def model_of(tiny: bool, like: dict[str, Any]) -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=512, num_hidden_layers=2, hidden_size=64 if tiny else 2048, intermediate_size=128 if tiny else 6144,
        moe_intermediate_size=32 if tiny else 768, num_attention_heads=4 if tiny else 32, num_key_value_heads=4,
        head_dim=16 if tiny else 128, num_experts=8 if tiny else 128, num_experts_per_tok=2 if tiny else 8,
        norm_topk_prob=True, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm" if like["dtype"] == torch.bfloat16 else "eager"
    torch.manual_seed(0)
    return Qwen3MoeModel(config).to(**like)


def entries(model: nn.Module, groups: foldpar.FoldedGroups) -> Iterator[tuple[str, nn.Module, Callable[..., Any]]]:
    """By name: the module, and what is called."""
    yield "transformers", model, model
    yield "transformers, compiled", model, torch.compile(model)
    folded = copy.deepcopy(model)
    foldpar.fold_model(folded, groups)
    yield "foldpar", folded, folded
    yield "foldpar, compiled", folded, torch.compile(folded, fullgraph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results.csv")
    parser.add_argument("--commit", help="where the code lies without its history")
    options = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29578"}.items():
        os.environ.setdefault(name, value)
    gpu = options.device == "cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    layout = foldpar.solve_layout(dist.get_world_size(), tp=options.tp, ep=options.ep)
    like = {"device": options.device, "dtype": torch.bfloat16 if gpu else torch.float32}
    with foldpar.create_groups(layout) as groups:
        ids = torch.arange(options.tokens, device=options.device).remainder(512)[None]
        grad = torch.randn(1, options.tokens, 64 if options.tiny else 2048, **like)
        outputs: dict[str, Tensor] = {}
        for turn in range(options.turns):
            for entry, module, call in entries(model_of(options.tiny, like), groups):

                def step(module: nn.Module = module, call: Callable[..., Any] = call) -> Tensor:
                    y: Tensor = call(input_ids=ids).last_hidden_state
                    torch.autograd.grad(y, [each for each in module.parameters() if each.requires_grad], grad)
                    return y

                outputs[entry] = step().detach().float()
                times = timed(step, options.device)
                if dist.get_rank():
                    continue
                first = outputs["transformers"]
                error = ((outputs[entry] - first).norm() / first.norm()).item()
                ms = statistics.median(times)
                print(f"{entry:<24} {ms:8.3f} ms ({min(times):.3f}..{max(times):.3f})  off by {error:.1e}", flush=True)
                fold = f", tp{layout.tp} ep{layout.ep}" if layout.world > 1 else ""
                if turn == options.turns - 1:
                    append(options.csv, circumstances(options.device, options.commit) | {
                        "shape": "two-layers", "dim": grad.shape[-1], "hidden": 32 if options.tiny else 768,
                        "experts": 8 if options.tiny else 128, "top_k": 2 if options.tiny else 8,
                        "tokens": options.tokens, "entry": entry + fold, "ms": round(ms, 3),
                        "fastest": round(min(times), 3), "slowest": round(max(times), 3), "peak_gib": "", "tflops": "",
                    })  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
