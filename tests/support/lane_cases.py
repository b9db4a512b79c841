"""One MoE layer folded in every way that lanes know, and the same layer as a dense loop in one process.

Used by the tests of routers, capacity, auxiliary losses and counters. Data ranks bring ragged batches, one of them
empty; sharded lanes bring ragged slices of them, one of those empty too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from toys import own

import foldpar
from foldpar.comm.collectives import all_reduce_
from foldpar.testing.shares import Shares

DIM, HIDDEN, EXPERTS, TOP_K = 4, 6, 8, 2
TOLERANCE = 1e-11
TOKENS = (7, 0, 3, 10)  # of data ranks 0, 1, ...


@dataclass(frozen=True)
class Fold:
    """A layout, and what its lanes do."""

    world: int
    tp: int
    ep: int
    etp: int = 1
    cp: int = 1
    lanes: str = "replicated"
    partition: str = "tokens"
    lane_grads: str = "replicated"
    order: str = "tp-lane-major"

    @property
    def layout(self) -> foldpar.FoldedLayout:
        return foldpar.solve_layout(self.world, tp=self.tp, ep=self.ep, etp=self.etp, cp=self.cp, order=self.order)

    @property
    def data_ranks(self) -> int:
        return self.layout.dp * self.layout.cp

    @property
    def options(self) -> dict[str, str]:
        return {"lanes": self.lanes, "partition": self.partition, "lane_grads": self.lane_grads}

    def __str__(self) -> str:
        degrees = f"world{self.world}-tp{self.tp}-ep{self.ep}-etp{self.etp}-cp{self.cp}"
        return f"{degrees}-{self.order}-{self.lanes}-{self.partition}-{self.lane_grads}"


WAYS = (
    {},
    {"lanes": "sharded"},
    {"partition": "assignments"},
    {"lane_grads": "partial"},
    {"lane_grads": "partial", "partition": "assignments"},
    {"lane_grads": "post-hoc"},
    {"lane_grads": "post-hoc", "partition": "assignments"},
)
SHAPES = (
    {"world": 4, "tp": 2, "ep": 4},
    {"world": 4, "tp": 4, "ep": 2},
    {"world": 4, "tp": 1, "ep": 2, "cp": 2},
    {"world": 4, "tp": 2, "ep": 1, "etp": 2, "cp": 2},
    {"world": 8, "tp": 2, "ep": 4, "cp": 2},
    {"world": 8, "tp": 4, "ep": 2, "etp": 2, "order": "consecutive"},
)
FOLDS = [Fold(**shape, **way) for shape in SHAPES[:2] for way in WAYS]
FOLDS += [Fold(**shape, **WAYS[place]) for place, shape in enumerate(SHAPES[2:])]
ALL_FOLDS = [Fold(**shape, **way) for shape in SHAPES for way in WAYS]


def weights() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, DIM), (EXPERTS, 2 * HIDDEN, DIM), (EXPERTS, DIM, HIDDEN)
    router, gate_up, down = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return router, gate_up, down


def batches(data_ranks: int) -> list[Tensor]:
    """The tokens of every data rank, the same whatever the fold."""
    return [_normal(TOKENS[rank % len(TOKENS)], 10 + rank) for rank in range(data_ranks)]


def cotangents(data_ranks: int) -> list[Tensor]:
    return [_normal(TOKENS[rank % len(TOKENS)], 50 + rank) for rank in range(data_ranks)]


def _normal(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_lane(whole: Tensor, fold: Fold, groups: foldpar.FoldedGroups) -> Tensor:
    """What a rank brings to the layer: the tokens of its data rank, or a ragged slice of them on sharded lanes."""
    if fold.lanes == "replicated":
        return whole
    # Lane 0 has most, lane 1 nothing, the others share what is left.
    first = (len(whole) + 1) // 2 if fold.tp > 2 else len(whole)
    rest = foldpar.comm.collectives.even_row_counts(len(whole) - first, max(fold.tp - 2, 1))
    counts = [first, 0, *rest][: fold.tp]
    return whole.split(counts)[groups.tp.index]


Reference = dict[str, Any]


def reference(data_ranks: int, loss_of: Callable[[list[Tensor], Tensor, Tensor, Tensor], Tensor]) -> Reference:
    """One process: the step's loss, and its gradients of weights and (times ``data_ranks``) of every input."""
    router, gate_up, down = (weight.requires_grad_() for weight in weights())
    inputs = [batch.requires_grad_() for batch in batches(data_ranks)]
    loss = loss_of(inputs, router, gate_up, down)
    loss.backward()
    return {
        "loss": loss.detach(),
        "router.weight": router.grad,
        "experts.gate_up_proj": gate_up.grad,
        "experts.down_proj": down.grad,
        "inputs": [x.grad * data_ranks for x in inputs],
    }


def run_folded(
    fold: Fold,
    router: foldpar.TopKRouter,
    extra_loss: Callable[..., Tensor | float] | None,
    want: Reference,
    loss: str = "mean",
    **options: Any,
) -> float:
    """On one rank: forward, task loss and ``extra_loss(routing, moe, x)``, backward, reduction; compare all gradients.

    Returns the task loss and the extra loss as this rank adds them.
    """
    with foldpar.create_groups(fold.layout) as groups:
        router_weight, gate_up, down = weights()
        router.weight = nn.Parameter(router_weight)
        moe = foldpar.FoldedMoE.from_dense(router, gate_up, down, groups, **fold.options, **options)
        mine = groups.dp_cp.index
        x = of_lane(batches(fold.data_ranks)[mine], fold, groups).clone().requires_grad_()
        y, routing = moe(x, return_routing=True)
        cotangent = of_lane(cotangents(fold.data_ranks)[mine], fold, groups)
        if fold.lane_grads == "partial":  # a lane's loss is over some of the tokens
            cotangent = cotangent * (torch.arange(len(y)) % fold.tp == groups.tp.index)[:, None]
        of_rank = (y * cotangent).sum() / (fold.data_ranks if loss == "sum" else 1)
        if extra_loss is not None:
            of_rank = of_rank + extra_loss(routing, moe, x)
        of_rank.backward()
        foldpar.reduce_gradients(moe, groups, loss=loss)

        grad = x.grad
        if fold.lane_grads != "replicated":
            grad = all_reduce_(grad.clone(), groups.tp) / (fold.tp if fold.lane_grads == "post-hoc" else 1)
        scale = fold.data_ranks if loss == "sum" else 1
        assert_near("input", grad * scale, of_lane(want["inputs"][mine], fold, groups))
        assert_near("router", moe.router.weight.grad, want["router.weight"])
        shares = Shares(moe, groups)
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            share = shares.share_of(name, want[name])
            assert_near(name, own(shares.parameters[name].grad, share), share)
        return float(of_rank.detach())


def assert_near(what: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} is not {tuple(want.shape)}"
    error = float((got - want).norm() / want.norm().clamp(min=1e-30)) if want.norm() > 0 else float(got.norm())
    assert error < TOLERANCE, f"{what} is off by {error:.3g} (relative L2)"


def task_loss(outputs: Sequence[Tensor]) -> Tensor:
    """The mean over data ranks of ``(y * cotangent).sum()``."""
    pairs = zip(outputs, cotangents(len(outputs)), strict=True)
    return torch.stack([(y * cotangent).sum() for y, cotangent in pairs]).mean()
