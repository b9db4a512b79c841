"""How exact a folded run in bf16 is beside one process in bf16, which is what rounding alone costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from byte_lm import Config
from parity import Case, batch_of, fold, fresh_model
from sharded_parity import shard_of
from torch import Tensor, nn
from torch.nn import functional as F
from toys import own

import foldpar
from foldpar.comm.collectives import even_row_counts
from foldpar.testing.shares import Shares

BF16 = Config(vocab=128, dim=256, heads=8, layers=2, experts=8, top_k=2, hidden=256, shared_hidden=256)


def bf16_ratios(
    case: Case, seeds: Iterable[int], shard: Callable[[nn.Module, foldpar.FoldedGroups], object] | None = None
) -> dict[str, float]:
    """Per tensor, the folded bf16 run's error over the single-process bf16 run's, both against float32, over seeds.

    The folded model is in bf16; with ``shard`` it is in float32, and that makes it compute in bf16.
    """
    totals: dict[str, Tensor] = {}
    for seed in seeds:
        exact, rough = (replace(case, seed=seed, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        want, routing = gradients_in_one_process(exact, None)
        alone, _ = gradients_in_one_process(rough, routing)
        with foldpar.create_groups(case.layout) as groups:
            given = exact if shard else rough
            model = fold(fresh_model(given), groups, given)
            for index, block in enumerate(model.blocks):
                mine = [routing[str(index)][groups.dp_cp.index]]
                block.moe.router = foldpar.mark_parameters(
                    ReplayFolded(block.moe.router, mine, groups.tp), foldpar.families.ROUTER_OWN_TOKENS
                )
            shares = Shares(model, groups)
            if shard:
                shard(model, groups)
            tokens = batch_of(given, groups.dp_cp.index, 0)
            logits = model(tokens[:, :-1]).float()
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            foldpar.reduce_gradients(model, groups, **({} if shard else {"reduce_dtype": torch.float32}))
            for name, parameter in model.named_parameters():
                exact_share, alone_share = (
                    shard_of(shares.share_of(name, full[name]), parameter).double() for full in (want, alone)
                )
                folded = own(parameter.grad, exact_share).double()
                squares = [(folded - exact_share).square().sum(), (alone_share - exact_share).square().sum()]
                totals[name] = totals.get(name, 0) + torch.stack(squares)
    for value in totals.values():
        dist.all_reduce(value)
    return {name: float((value[0] / value[1]).sqrt()) for name, value in totals.items()}


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
