"""The suite ``parity``: every fold and consumer trains as one process does; bf16 is as exact as one bf16 process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import parity
import torch
import torch.distributed as dist
from byte_lm import Config
from parity import Case, batch_of, fold, fresh_model, share_of, train_folded, train_reference, worst
from run import Runner
from torch import Tensor, nn
from torch.nn import functional as F

import foldpar
from foldpar.comm.collectives import even_row_counts

PLAIN = {"tp": 1, "ep": 1, "etp": 1, "cp": 1, "order": "tp-lane-major", "consumer": "replicated", "partition": "tokens"}
BF16 = Config(vocab=128, dim=256, heads=8, layers=2, experts=8, top_k=2, hidden=256, shared_hidden=256)
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


# -- bf16: the error against float32 is that of one bf16 process ------------------------------------------------------


class ReplayInOneProcess(nn.Module):
    """Chooses the experts that a recorded run chose; the weights are its own."""

    def __init__(self, router: nn.Module, recorded: list[Tensor]) -> None:
        super().__init__()
        self.weight, self.recorded, self.calls = router.weight, recorded, 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.recorded[self.calls % len(self.recorded)]
        self.calls += 1
        weights = F.linear(x, self.weight).float().softmax(-1).gather(1, ids)
        return ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


class ReplayFolded(ReplayInOneProcess):
    """The same, for the rows that this lane routes."""

    def __init__(self, router: nn.Module, recorded: list[Tensor], tp: foldpar.AxisGroup) -> None:
        super().__init__(router, recorded)
        self.tp = tp

    def forward(self, x: Tensor) -> foldpar.Routing:
        ids = self.recorded[0]
        ids = ids.split(even_row_counts(len(ids), self.tp.size))[self.tp.index]
        weights = F.linear(x, self.weight).float().softmax(-1).gather(1, ids)
        return foldpar.Routing(ids, weights / weights.sum(-1, keepdim=True))


def gradients_in_one_process(case: Case, recorded: dict[str, list[Tensor]] | None) -> tuple[dict[str, Tensor], Any]:
    """Mean gradients over data ranks, and the routing of every layer and data rank."""
    model = fresh_model(case)
    noted: dict[str, list[Tensor]] = {}
    for index, block in enumerate(model.blocks):
        name = str(index)
        if recorded is None:
            block.moe.router.register_forward_hook(
                lambda m, a, out, name=name: noted.setdefault(name, []).append(out[0])
            )
        else:
            block.moe.router = ReplayInOneProcess(block.moe.router, recorded[name])
    losses = []
    for data_rank in range(case.data_ranks):
        tokens = batch_of(case, data_rank, 0)
        logits = model(tokens[:, :-1]).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    torch.stack(losses).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, noted


def bf16_ratios(case: Case) -> dict[str, float]:
    """Per tensor, the folded bf16 run's error over the single-process bf16 run's, both against float32, over seeds."""
    totals: dict[str, Tensor] = {}
    for seed in SEEDS:
        exact = replace(case, seed=seed, dtype=torch.float32)
        rough = replace(case, seed=seed, dtype=torch.bfloat16)
        want, routing = gradients_in_one_process(exact, None)
        alone, _ = gradients_in_one_process(rough, routing)
        with foldpar.create_groups(case.layout) as groups:
            model = fresh_model(rough)
            fold(model, groups, rough)
            for index, block in enumerate(model.blocks):
                mine = [routing[str(index)][groups.dp_cp.index]]
                block.moe.router = foldpar.mark_parameters(
                    ReplayFolded(block.moe.router, mine, groups.tp), foldpar.families.ROUTER_OWN_TOKENS
                )
            tokens = batch_of(rough, groups.dp_cp.index, 0)
            logits = model(tokens[:, :-1]).float()
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            foldpar.reduce_gradients(model, groups, reduce_dtype=torch.float32)
            for name, parameter in model.named_parameters():
                exact_share = share_of(name, want[name], parameter, groups, case).double()
                alone_share = share_of(name, alone[name], parameter, groups, case).double()
                folded = parity._local(parameter.grad).double()
                squares = [(folded - exact_share).square().sum(), (alone_share - exact_share).square().sum()]
                totals[name] = totals.get(name, 0) + torch.stack(squares)
    for value in totals.values():
        dist.all_reduce(value)
    return {name: float((value[0] / value[1]).sqrt()) for name, value in totals.items()}


def main(runner: Runner) -> None:
    for case in cases(runner.world, runner.device):
        error, name = run_case(case)
        runner.say(error < case.tolerance, f"{error:.1e}", case, name)
    for tp, ep in [(2, runner.world), (1, runner.world)]:
        for order in ("tp-lane-major", "consecutive"):
            case = Case(runner.world, tp, ep, order=order, device=runner.device, config=BF16, length=128)
            ratios = bf16_ratios(case)
            name = max(ratios, key=ratios.__getitem__)
            runner.say(ratios[name] <= 1.5, f"{ratios[name]:.2f}x bf16", case, name)
