"""DeepSpeed's folded MoE layer alone, as a peer of ``moe_layer.py`` on the CPU (Gloo); it needs deepspeed 0.19.8.

DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 4 benchmarks/deepspeed_layer.py --tp 2 --ep 4
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        count, dim, hidden = options.experts, options.dim, options.hidden
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * hidden, dim) * dim**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, dim, hidden) * hidden**-0.5)


class Block(nn.Module):
    """What DeepSpeed's preset looks for and replaces: a gate, and experts in one tensor each."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.gate = nn.Linear(options.dim, options.experts, bias=False)
        self.experts, self.top_k = Experts(options), options.topk

    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="mixtral",
            num_local_experts=options.experts,
            num_experts_per_tok=options.topk,
            hidden_size=options.dim,
            intermediate_size=options.hidden,
        )
        layer = nn.Module()
        layer.mlp = Block(options)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Any:
        return self.model.layers[0].mlp(x)


def folded_layer(options: argparse.Namespace) -> nn.Module:
    os.environ.update(LOCAL_SIZE=os.environ["WORLD_SIZE"], CROSS_RANK="0", CROSS_SIZE="1")
    logging.disable(logging.WARNING)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 0},
        "expert_parallel": {"enabled": True, "autoep_size": options.ep, "preset_model": "mixtral"},
        "steps_per_print": 10**9,
    }
    if options.tp > 1:  # the block is all there is, and its weights are not for tensor parallelism
        skip = {"patterns": [r".*\.weight$"], "partition_type": "skip"}
        specs = {"use_default_specs": False, "layer_specs": [skip]}
        config["tensor_parallel"] = {"autotp_size": options.tp, "partition_config": specs}
    engine = deepspeed.initialize(model=Model(options), config=config)[0]
    layer: nn.Module = engine.module.model.layers[0].mlp
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tp": 2, "ep": 4, "tokens": 256, "dim": 64, "hidden": 32, "experts": 8, "topk": 2, "iters": 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    layer, rank = folded_layer(options), int(os.environ["RANK"])
    torch.manual_seed(100 + rank // options.tp)
    x, grad = (
        torch.randn(1, options.tokens, options.dim, requires_grad=True),
        torch.randn(1, options.tokens, options.dim),
    )
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    times = []
    for turn in range(5 + options.iters):
        torch.distributed.barrier()
        start = time.perf_counter()
        output = layer(x)
        torch.autograd.grad(output[0] if isinstance(output, tuple) else output, wanted, grad)
        if turn >= 5:
            times.append(1e3 * (time.perf_counter() - start))
    slowest = torch.tensor(times)
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    if rank == 0:
        median = round(statistics.median(slowest.tolist()), 3)
        print(json.dumps({"peer": "deepspeed", "fwdbwd_ms": median, "peak_gib": 0.0}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
