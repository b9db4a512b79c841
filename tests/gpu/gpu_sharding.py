"""The suite ``sharding``: ``shard_model`` trains as one process does, at every stage and offloaded, in float64.

In bf16 the error against float32 is that of one bf16 process, also where gradients are summed in bf16: NCCL's
pre-multiplied sum would lose them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import parity
import torch
import torch.distributed as dist
from gpu_parity import BF16, PLAIN, ReplayFolded, gradients_in_one_process
from parity import Case, batch_of, fold, fresh_model, share_of
from run import Runner
from sharded_parity import Run, shard_of, train_alone, train_sharded
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn import functional as F

import foldpar
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
    return [
        *((run, [0, 1, 2, 3], {}) for run in every),
        (first, [1, 2, 3], {"offload": offload}),
        (first, [3], {"prefetch": False}),
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


def bf16_ratios(case: Case, stage: int, policy: MixedPrecisionPolicy) -> dict[str, float]:
    """Per tensor, the sharded bf16 run's error over the single-process bf16 run's, both against float32, over seeds."""
    totals: dict[str, Tensor] = {}
    for seed in SEEDS:
        exact = replace(case, seed=seed, dtype=torch.float32)
        rough = replace(case, seed=seed, dtype=torch.bfloat16)
        want, routing = gradients_in_one_process(exact, None)
        alone, _ = gradients_in_one_process(rough, routing)
        with foldpar.create_groups(case.layout) as groups:
            model = fresh_model(exact)
            fold(model, groups, exact)
            for index, block in enumerate(model.blocks):
                mine = [routing[str(index)][groups.dp_cp.index]]
                block.moe.router = foldpar.mark_parameters(
                    ReplayFolded(block.moe.router, mine, groups.tp), foldpar.families.ROUTER_OWN_TOKENS
                )
            before = dict(model.named_parameters())
            shard_model(model, groups, stage=stage, mixed_precision=policy)
            tokens = batch_of(exact, groups.dp_cp.index, 0)
            logits = model(tokens[:, :-1]).float()
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            foldpar.reduce_gradients(model, groups)
            for name, parameter in model.named_parameters():
                exact_share, alone_share = (
                    shard_of(share_of(name, full[name], before[name], groups, case), parameter).double()
                    for full in (want, alone)
                )
                got = parity._local(parameter.grad).double()
                squares = [(got - exact_share).square().sum(), (alone_share - exact_share).square().sum()]
                totals[name] = totals.get(name, 0) + torch.stack(squares)
    for value in totals.values():
        dist.all_reduce(value)
    return {name: float((value[0] / value[1]).sqrt()) for name, value in totals.items()}


def main(runner: Runner) -> None:
    for run, stages, options in runs(runner.world, runner.device):
        error, name = worst_of(run, stages, options)
        runner.say(error < 1e-11, f"{error:.1e}", run.case, run.optimizer, *options, name)
    for tp, ep in [(2, runner.world), (1, runner.world), (2, 1), (runner.world, runner.world)]:
        case = Case(runner.world, tp, ep, device=runner.device, config=BF16, length=128)
        for stage, reduce_dtype, limit in [(3, torch.float32, 1.5), (2, torch.bfloat16, 2.0)]:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
            ratios = bf16_ratios(case, stage, policy)
            name = max(ratios, key=ratios.__getitem__)
            what = f"stage {stage}, summed in {str(reduce_dtype)[6:]}"
            runner.say(ratios[name] <= limit, f"{ratios[name]:.2f}x bf16", case, what, name)
