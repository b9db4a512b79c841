"""The suite ``sharding``: ``shard_model`` trains as one process does, at every stage and offloaded, in float64.

In bf16 the error against float32 is that of one bf16 process, also where gradients are summed in bf16: NCCL's
pre-multiplied sum would lose them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import parity
import torch
import torch.distributed as dist
from bf16 import BF16, bf16_ratios
from parity import PLAIN, Case
from run import Runner
from sharded_parity import Run, train_alone, train_sharded
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from foldpar.sharding.shard import shard_model

SEEDS = range(7, 10)


def runs(world: int, device: str) -> list[tuple[Run, list[int], dict[str, Any]]]:
    folds = {
        2: [(2, 2, 1), (2, 1, 1), (1, 2, 1), (1, 1, 1), (1, 1, 2)],
        4: [(2, 4, 1), (2, 2, 1), (2, 1, 1), (2, 1, 2), (4, 4, 1), (4, 1, 1), (1, 4, 1), (1, 2, 1)],
    }[world]
    every = [
        Run(Case(world, tp, ep, etp, order=order, device=device), optimizer, steps=4)
        for tp, ep, etp in folds
        for order in (("tp-lane-major", "consecutive") if tp > 1 else ("tp-lane-major",))
        for optimizer in ("sgd", "adamw-foreach")
    ]
    offload = CPUOffloadPolicy(pin_memory=device == "cuda")
    first = Run(Case(world, 2, 1, device=device), "adamw", steps=3)
    few = replace(parity.CONFIG, experts=3)  # which data ranks do not divide
    return [
        *((run, [0, 1, 2, 3], {}) for run in every),
        (first, [1, 2, 3], {"offload": offload}),
        (first, [3], {"prefetch": False}),
        (replace(first, case=replace(first.case, config=few)), [1, 2, 3], {}),
    ]


def worst_of(run: Run, stages: list[int], options: dict[str, Any]) -> tuple[float, str]:
    alone = train_alone(replace(run, case=replace(run.case, world=run.case.data_ranks, **PLAIN)))
    results: list[Any] = [None] * run.case.world
    dist.all_gather_object(results, train_sharded(run, stages, alone, **options))
    found = []
    for place, stage in enumerate(stages):
        of_stage = [result[place] for result in results]
        error, name = parity.worst(of_stage)
        wanted = torch.tensor(alone.losses + alone.norms)
        for result in of_stage:
            numbers = float((torch.tensor(result["losses"] + result["norms"]) / wanted - 1).abs().max())
            error, name = max((error, name), (numbers, "losses and norms"))
        found.append((error, f"stage {stage}, {name}"))
    return max(found)


def main(runner: Runner) -> None:
    if not runner.has_ranks("sharding", 2, 4):
        return
    for run, stages, options in runs(runner.world, runner.device):
        error, name = worst_of(run, stages, options)
        runner.say(error < 1e-11, f"{error:.1e}", run.case, run.optimizer, *options, name)
    for tp, ep in [(2, runner.world), (1, runner.world), (2, 1), (runner.world, runner.world)]:
        case = Case(runner.world, tp, ep, device=runner.device, config=BF16, length=128)
        for stage, reduce_dtype, limit in [(3, torch.float32, 1.5), (2, torch.bfloat16, 2.0)]:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
            ratios = bf16_ratios(case, SEEDS, partial(shard_model, stage=stage, mixed_precision=policy))
            name = max(ratios, key=ratios.__getitem__)
            what = f"stage {stage}, summed in {str(reduce_dtype)[6:]}"
            runner.say(ratios[name] <= limit, f"{ratios[name]:.2f}x bf16", case, what, name)
