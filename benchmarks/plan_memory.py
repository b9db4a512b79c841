"""Bytes and milliseconds that ``foldpar plan`` predicts, beside those of real steps on one or two GPUs.

    PYTHONPATH=src:tests/support python benchmarks/plan_memory.py
    PYTHONPATH=src:tests/support torchrun --nproc-per-node 2 benchmarks/plan_memory.py --json plan_memory.json

Bytes are ``max_memory_allocated`` of the second step, and what ranks share, on the rank that needs the most;
milliseconds the median of the steps after it. A case that does not fit is said and left out. Ranks that share one GPU
measure rows that travel one-sided, in bytes alone: their milliseconds mean nothing. With ``--quick`` sizes are small,
for a rehearsal.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from plan_memory_cases import Case

import foldpar
from foldpar.planning import Workload, read_machine, read_model
from foldpar.planning.timing import TimeModel

COMMON = {
    "vocab_size": 32768,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **COMMON, "hidden_size": 2048, "num_hidden_layers": 6, "moe_intermediate_size": 768, "num_experts": 64,
        "num_experts_per_tok": 8, "intermediate_size": 2048,
    },
    "qwen2_moe": {
        **COMMON, "hidden_size": 2048, "num_hidden_layers": 6, "moe_intermediate_size": 1408, "num_experts": 32,
        "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632, "intermediate_size": 5632,
    },
    "mixtral": {
        **COMMON, "hidden_size": 2048, "num_hidden_layers": 6, "intermediate_size": 7168, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip
ON_ONE = [
    (stage, precision, recompute)
    for stage, precision in ((0, "bfloat16"), (3, "mixed"))
    for recompute in ("none", "experts", "full")
]
ON_TWO = [
    ({"tp": 2, "ep": 2}, 0, "bfloat16", "none"),
    ({"tp": 2, "ep": 2}, 0, "bfloat16", "full"),
    ({"ep": 2}, 0, "bfloat16", "none"),
    ({"ep": 2}, 1, "mixed", "none"),
    ({"ep": 2}, 3, "mixed", "experts"),
    ({}, 2, "mixed", "none"),
    ({}, 3, "mixed", "full"),
    ({"tp": 2}, 0, "bfloat16", "none"),
    ({"etp": 2}, 0, "bfloat16", "none"),
]
ON_SHARED = ({"ep": 2}, {"etp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2})
SHORT = {"vocab_size": 1024, "num_hidden_layers": 2}
"""What leaves the peak to the layers."""


def one_sided_cases() -> list[Case]:
    """Few tokens, for all of whose rows there is room, and many, where the host learns how many come."""
    return [
        Case(
            name, {**MODELS[name], **SHORT}, 2, degrees, 0, "none", "bfloat16", micro, tokens=tokens,
            transport="one-sided",
        )
        for degrees in ON_SHARED
        for name in ("qwen3_moe", "mixtral")
        for micro, tokens in ((2, 512), (8, 2048))
    ]  # fmt: skip


def cases(world: int, quick: bool) -> list[Case]:
    """At least 18 of one GPU, 27 of two; sequences of 1,024 and, of each model's first, of 2,048."""
    if torch.cuda.device_count() < world:
        return one_sided_cases()
    found = []
    for name, config in MODELS.items():
        if world == 1:
            found += [
                Case(name, config, stage=stage, precision=precision, recompute=again, tokens=1024)
                for stage, precision, again in ON_ONE
            ]
        else:
            found += [
                Case(name, config, world, degrees, stage, again, precision, tokens=1024)
                for degrees, stage, precision, again in ON_TWO
            ]
        found.append(replace(found[-1 - (5 if world == 1 else 8)], tokens=2048))
        found.append(replace(found[-1], tokens=1024, micro=2, micro_batches=2))
    if quick:
        small = {"hidden_size": 256, "vocab_size": 512, "num_hidden_layers": 2, "head_dim": 16}
        found = [replace(case, config={**case.config, **small}, tokens=64) for case in found]
    return found


def measure(case: Case, device: str, steps: int) -> dict[str, object]:
    """One row: bytes and milliseconds, measured and predicted."""
    milliseconds: list[float] = []

    def peak_of(step: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        for _ in range(max(1, steps)):
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            milliseconds.append(1e3 * (time.perf_counter() - began))
        return peak

    with foldpar.create_groups(case.layout) as groups:
        measured = case.measured(groups, device, peak_of)
        worst = torch.tensor(
            [measured, sorted(milliseconds)[len(milliseconds) // 2]], dtype=torch.float64, device=device
        )
        if case.world > 1:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    gc.collect()
    torch.cuda.empty_cache()
    memory = case.predicted(device)
    return {
        "case": str(case), "measured": worst[0].item(), "predicted": memory.peak, "moment": memory.moment,
        "parts": asdict(memory), "measured_ms": worst[1].item(), "predicted_ms": 1e3 * predicted_seconds(case),
    }  # fmt: skip


def predicted_seconds(case: Case) -> float:
    """Of a step, by the shipped machine that this GPU is."""
    import transformers

    shape = read_model(transformers.AutoConfig.for_model(case.model, **case.config).to_dict())
    batch = case.micro * case.micro_batches * case.layout.dp
    work = Workload(tokens=case.tokens, batch=batch, precision=case.precision)  # type: ignore[arg-type]
    machine = read_machine("h200" if "H200" in torch.cuda.get_device_name() else "h100")
    seconds = TimeModel(shape, work, machine).of(
        case.layout, stage=case.stage, recompute=case.recompute, transport=case.transport, micro=case.micro,
    )  # type: ignore[arg-type]  # fmt: skip
    return seconds.total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write all parts of every case")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a case")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if torch.cuda.device_count() < world:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        dist.init_process_group("gloo")
    if world == 1:  # shards are FSDP2's, which wants process groups of one rank too
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    for case in cases(world, options.quick):
        try:
            row = measure(case, "cuda", options.steps)
        except torch.cuda.OutOfMemoryError:
            if world > 1:
                raise  # the other rank waits for this one
            print(f"{case}: does not fit", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        rows.append(row)
        if rank == 0:
            of_bytes, of_time = row["predicted"] / row["measured"], row["predicted_ms"] / row["measured_ms"]
            print(
                f"{case}: {row['measured'] / 1e9:.2f} GB, predicted {row['predicted'] / 1e9:.2f} ({of_bytes:.3f}, "
                f"{row['moment']}); {row['measured_ms']:.0f} ms, predicted {row['predicted_ms']:.0f} ({of_time:.2f})",
                flush=True,
            )
    if rank == 0:
        ratios = sorted(abs(row["predicted"] / row["measured"] - 1) for row in rows)
        within = sum(ratio < 0.05 for ratio in ratios)
        print(f"{len(rows)} cases: {within} within 5 %, worst {ratios[-1]:.1%}, median {ratios[len(ratios) // 2]:.1%}")
        if options.json:
            with open(options.json, "w") as file:
                json.dump(
                    {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=1
                )


if __name__ == "__main__":
    main()
