"""The suite ``parity``: every fold and consumer trains as one process does; bf16 is as exact as one bf16 process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import parity
import torch
import torch.distributed as dist
from bf16 import BF16, bf16_ratios
from parity import PLAIN, Case, train_folded, train_reference, worst
from run import Runner

SEEDS = range(7, 12)


def cases(world: int, device: str) -> list[Case]:
    folds = {
        2: [(2, 1, 1), (2, 2, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)],
        4: [(2, 2, 1), (2, 4, 1), (4, 4, 1), (4, 2, 1), (1, 4, 1), (2, 1, 1), (2, 2, 2), (2, 1, 4)],
    }[world]
    double = [
        Case(world, tp, ep, etp, order=order, device=device)
        for tp, ep, etp in folds
        for order in ("tp-lane-major", "consecutive")
    ]
    first = Case(world, tp=2, ep=world, device=device)
    consumers = [replace(first, consumer=consumer) for consumer in parity.CONSUMERS]
    dealt = [replace(case, partition="assignments") for case in consumers]
    ragged = [
        replace(first, length=1),
        replace(first, length=3),
        replace(first, cp=world // 2),
    ]
    if torch.__version__ >= "2.13":  # DTensor before cannot view a batch of no tokens
        ragged.append(replace(first, empty=(0,)))
    single = [replace(case, dtype=torch.float32, rate=0.3, steps=4) for case in double]
    return double + consumers + dealt + ragged + single


def run_case(case: Case) -> tuple[float, str]:
    reference = train_reference(replace(case, world=case.data_ranks, **PLAIN))
    results: list[Any] = [None] * case.world
    dist.all_gather_object(results, train_folded(case, reference))
    return worst(results)


def main(runner: Runner) -> None:
    if not runner.has_ranks("parity", 2, 4):
        return
    for case in cases(runner.world, runner.device):
        error, name = run_case(case)
        runner.say(error < case.tolerance, f"{error:.1e}", case, name)
    for tp, ep in [(2, runner.world), (1, runner.world)]:
        for order in ("tp-lane-major", "consecutive"):
            case = Case(runner.world, tp, ep, order=order, device=runner.device, config=BF16, length=128)
            ratios = bf16_ratios(case, SEEDS)
            name = max(ratios, key=ratios.__getitem__)
            runner.say(ratios[name] <= 1.5, f"{ratios[name]:.2f}x bf16", case, name)
