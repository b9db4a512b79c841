"""A small model with every kind of parameter, in plain torch and folded, and the ways in which it can be folded.

``Model`` imports nothing of foldpar's arithmetic. Per layer: a norm, a dense feed-forward layer (sharded over tp where
gradients are replicated), and experts, each in a residual connection; on top a consumer of one of three kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from dense import dense_experts, feed_forward
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import foldpar
from foldpar import FoldedGroups, FoldedLayout, families, mark_parameters
from foldpar.moe.routing.losses import load_balancing_loss, router_z_loss
from foldpar.testing import ParityReport, check_against_one_process

DIM = 4

# lanes, state of the lanes' gradients, partition -> the consumers that may stand above
WAYS: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("replicated", "replicated", "tokens"): ("equal", "columns", "own rows"),
    ("replicated", "replicated", "assignments"): ("equal", "columns", "own rows"),
    ("sharded", "replicated", "tokens"): ("own rows",),
    ("replicated", "partial", "tokens"): ("columns", "own rows"),
    ("replicated", "partial", "assignments"): ("columns", "own rows"),
    ("replicated", "post-hoc", "tokens"): ("equal", "own rows"),
    ("replicated", "post-hoc", "assignments"): ("equal", "own rows"),
}


@dataclass(frozen=True)
class Case:
    """One model and one way to fold it."""

    layout: FoldedLayout
    tokens: tuple[tuple[int, ...], ...]
    """``[data ranks][micro-batches]``."""
    lanes: str = "replicated"
    lane_grads: str = "replicated"
    partition: str = "tokens"
    consumer: str = "equal"
    experts: int = 8
    hidden: int = 2
    top_k: int = 2
    score: str = "softmax"
    renormalize: bool = True
    scaling: float = 1.0
    activation: str = "swiglu"
    bias: bool = False
    masked: bool = False
    shared: str = "none"
    layers: int = 1
    losses: str = "mean"
    auxiliary: str = "none"
    """The scope of the auxiliary losses: "batch" or "global"."""
    uneven_lanes: bool = False

    @property
    def tp_sharded(self) -> bool:
        """Whether the gradients below the experts may pass a TP-sharded layer."""
        return self.lane_grads == "replicated"


# ---------------------------------------------------------------------------------------------------------------------
# In one process.


class FeedForward(nn.Module):
    """``heads`` pairs of hidden units; a gain that all pairs share, as the norm of attention heads has."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2 * heads, DIM) / 2)
        self.gain = nn.Parameter(torch.rand(2) + 0.5)
        self.down = nn.Parameter(torch.randn(DIM, 2 * heads) / 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = rearrange(F.linear(x, self.up), "tokens (heads pair) -> tokens heads pair", pair=2) * self.gain
        return F.linear(rearrange(hidden, "tokens heads pair -> tokens (heads pair)").tanh(), self.down)


class Experts(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        parts = 2 if case.activation in ("swiglu", "geglu") else 1
        self.activation = {"swiglu": F.silu, "geglu": F.gelu, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}[
            case.activation
        ]
        self.gate_up_proj = nn.Parameter(torch.randn(case.experts, parts * case.hidden, DIM) / 2)
        self.down_proj = nn.Parameter(torch.randn(case.experts, DIM, case.hidden) / 2)
        self.gate_up_bias = nn.Parameter(torch.randn(case.experts, parts * case.hidden) / 2) if case.bias else None
        self.down_bias = nn.Parameter(torch.randn(case.experts, DIM) / 2) if case.bias else None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
        experts = feed_forward(
            self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias, activation=self.activation
        )
        return dense_experts(x, ids, weights, experts, mask)


class Router(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(case.experts, DIM))

    def forward(self, x: Tensor, case: Case) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        scores = torch.softmax(logits, -1) if case.score == "softmax" else torch.sigmoid(logits)
        weights, ids = scores.topk(case.top_k, dim=-1)
        if case.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * case.scaling, ids


def kept(x: Tensor, ids: Tensor) -> Tensor:
    """Which assignments a mask keeps, about two thirds: told by the token's content and the expert alone."""
    return torch.frac((3.1 * x.sum(-1, keepdim=True)).abs() + 0.618 * ids) > 0.35


class MoE(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.router, self.experts = Router(case), Experts(case)
        self.shared = None if case.shared == "none" else FeedForward(case.layout.tp)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x, self.case)
        self.seen = F.linear(x, self.router.weight), ids
        y = self.experts(x, ids, weights, kept(x.detach(), ids) if self.case.masked else None)
        return y if self.shared is None else y + self.shared(x)


class Layer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.norm, self.dense, self.moe = nn.LayerNorm(DIM), FeedForward(case.layout.tp), MoE(case)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(self.norm(x))
        return x + self.moe(x)


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(case) for _ in range(case.layers)))
        self.head = nn.Linear(DIM, 2 * case.layout.tp, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tokens_in_all(x: Tensor, case: Case) -> int:
    """What a sum over tokens is divided by: a rank's own number, or that of all ranks together."""
    return max(1, len(x) if case.losses == "mean" else sum(map(sum, case.tokens)))


def loss_of_one_process(model: Model, y: Tensor, x: Tensor, *, case: Case) -> Tensor:
    loss = loss_of_columns(model.head(y), 0).sum() / tokens_in_all(x, case)
    return loss if case.auxiliary == "none" else loss + share_of_auxiliary_losses(model, x, case)


def share_of_auxiliary_losses(model: Model, x: Tensor, case: Case) -> Tensor:
    """Load balancing and z-loss as their formulas stand, over the tokens of the scope; of the sum, the part of ``x``.

    The data ranks of a scope are told by their batches, and what their routers saw is computed anew.
    """
    own = [layer.moe.seen for layer in model.layers]
    ranks = range(case.layout.dp * case.layout.cp)
    batches = [batch_of(rank, case=case) for rank in ranks]
    rank, step = next((rank, step) for rank in ranks for step, one in enumerate(batches[rank]) if torch.equal(one, x))
    replica = [other for other in ranks if other // case.layout.cp == rank // case.layout.cp]
    pool = replica if case.auxiliary == "batch" else ranks
    with torch.no_grad():
        seen = [[layer.moe.seen for layer in model.layers] for other in pool if model(batches[other][step]) is not None]
    total = x.new_zeros(())
    for place, (logits, _) in enumerate(own):
        ids = torch.cat([layers[place][1] for layers in seen])
        tokens = max(1, len(ids))
        fraction = torch.bincount(ids.flatten(), minlength=case.experts).to(x.dtype) / (tokens * case.top_k)
        scores = torch.softmax(logits, -1) if case.score == "softmax" else torch.sigmoid(logits)
        probability = (scores / scores.sum(-1, keepdim=True)).sum(0) / tokens
        total = total + case.experts * (fraction * probability).sum()
        total = total + 0.1 * logits.logsumexp(-1).square().sum() / tokens
    # The loss of the step has the mean over replicas, or the one loss of all; ranks' losses are averaged or added up.
    scopes = case.layout.dp if case.auxiliary == "batch" else 1
    return total * (len(ranks) if case.losses == "mean" else 1) / scopes


def loss_of_columns(logits: Tensor, first: int) -> Tensor:
    """``[rows, columns] -> [rows]``: every column counts differently, so that columns cannot be exchanged."""
    slopes = torch.arange(first, first + logits.shape[1], dtype=logits.dtype) + 1
    return (F.softplus(logits * slopes) / slopes).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Folded.


class ShardedFeedForward(FeedForward):
    """The same with its pairs of units spread over the lanes, by Megatron's f and g or, on sharded lanes, their kin."""

    def __init__(self, whole: FeedForward, groups: FoldedGroups, lanes: str) -> None:
        nn.Module.__init__(self)
        self.tp, self.lanes = groups.tp, lanes
        self.up = nn.Parameter(whole.up.detach().chunk(groups.tp.size, dim=0)[groups.tp.index].clone())
        self.gain = nn.Parameter(whole.gain.detach().clone())
        self.down = nn.Parameter(whole.down.detach().chunk(groups.tp.size, dim=1)[groups.tp.index].clone())
        mark_parameters(self, families.DENSE_SHARDED)
        mark_parameters(self.gain, families.REPLICATED_PARTIAL)

    def forward(self, x: Tensor) -> Tensor:
        if self.lanes == "replicated":
            return foldpar.all_reduce(super().forward(foldpar.copy_to_group(x, self.tp)), self.tp, backward="identity")
        rows = torch.tensor([len(x)])
        counts = foldpar.comm.collectives.all_gather(rows, self.tp).flatten().tolist()
        every = foldpar.all_gather_rows(x, self.tp, row_counts=counts, backward="reduce_scatter")
        return foldpar.reduce_scatter_rows(super().forward(every), self.tp, row_counts=counts)


class MaskingRouter(foldpar.TopKRouter):
    """A router that drops assignments."""

    def forward(self, x: Tensor, **options: Any) -> foldpar.Routing:
        routing = super().forward(x, **options)
        return replace(routing, mask=kept(x.detach(), routing.ids))


class BalancedMoE(foldpar.FoldedMoE):
    """Keeps what this rank adds to its loss until the loss is computed."""

    case: Case

    def forward(self, x: Tensor) -> Tensor:
        y, routing = super().forward(x, return_routing=True)
        options = {"scope": self.case.auxiliary, "loss": self.case.losses}
        self.auxiliary = load_balancing_loss(routing, self.lane_state, **options)
        self.auxiliary = self.auxiliary + 0.1 * router_z_loss(routing, self.lane_state, **options)
        return y


def fold(model: Model, groups: FoldedGroups, *, case: Case) -> Model:
    """Fold every layer in place, and mark what foldpar cannot know."""
    for layer in model.layers:
        if case.tp_sharded:
            layer.dense = ShardedFeedForward(layer.dense, groups, case.lanes)
        layer.moe = fold_experts(layer.moe, groups, case)
    mark_parameters(model.head, families.REPLICATED if case.consumer == "equal" else families.REPLICATED_PARTIAL)
    if case.consumer == "columns":
        model.head.weight = nn.Parameter(model.head.weight.detach().chunk(groups.tp.size)[groups.tp.index].clone())
        mark_parameters(model.head, families.DENSE_SHARDED)
    summed = case.lanes == "sharded" or case.lane_grads == "partial"
    return mark_parameters(model, families.REPLICATED_PARTIAL if summed else families.REPLICATED)


def fold_experts(moe: MoE, groups: FoldedGroups, case: Case) -> foldpar.FoldedMoE:
    router = (MaskingRouter if case.masked else foldpar.TopKRouter)(
        DIM, case.experts, case.top_k, score=case.score, renormalize=case.renormalize, scaling_factor=case.scaling
    )
    router.weight = nn.Parameter(moe.router.weight.detach().clone())
    shared = moe.shared
    if case.shared == "sharded" and case.tp_sharded:
        shared = ShardedFeedForward(moe.shared, groups, case.lanes)
    biases = {"gate_up_bias": moe.experts.gate_up_bias, "down_bias": moe.experts.down_bias}
    folded = (foldpar.FoldedMoE if case.auxiliary == "none" else BalancedMoE).from_dense(
        router,
        moe.experts.gate_up_proj,
        moe.experts.down_proj,
        groups,
        **(biases if case.bias else {}),
        activation=case.activation,
        shared=shared,
        lanes=case.lanes,
        lane_grads=case.lane_grads,
        partition=case.partition,
    )
    folded.case = case
    return folded


def loss_on_a_lane(model: Model, y: Tensor, x: Tensor, groups: FoldedGroups, *, case: Case) -> Tensor:
    """The consumer, and what the routers add."""
    loss = consumer_on_a_lane(model, y, x, groups, case)
    return loss if case.auxiliary == "none" else loss + sum(layer.moe.auxiliary for layer in model.layers)


def consumer_on_a_lane(model: Model, y: Tensor, x: Tensor, groups: FoldedGroups, case: Case) -> Tensor:
    """Lanes that do different work convert where they part, unless the model takes partial gradients."""
    tp, number = groups.tp, tokens_in_all(x, case)
    converts = case.lane_grads != "partial"
    if case.consumer == "equal":
        return loss_of_columns(model.head(y), 0).sum() / number
    if case.consumer == "columns":
        y = foldpar.copy_to_group(y, tp) if converts else y
        own = loss_of_columns(model.head(y), tp.index * model.head.weight.shape[0]).sum() / number
        return foldpar.all_reduce(own, tp, backward="identity")
    if case.lanes == "replicated":
        y = foldpar.split_rows(y, tp, backward="all_gather" if converts else "zero_pad")
    return loss_of_columns(model.head(y), 0).sum() / number  # the lane's share


# ---------------------------------------------------------------------------------------------------------------------


def batch_of(data_rank: int, *, case: Case) -> list[Tensor]:
    draw = torch.Generator().manual_seed(data_rank)
    return [torch.randn(rows, DIM, generator=draw, dtype=torch.float64) for rows in case.tokens[data_rank]]


def rows_of_lanes(rows: int, *, case: Case) -> tuple[int, ...]:
    """All rows but one on the last lane, if lanes are uneven."""
    if not case.uneven_lanes:
        return foldpar.comm.collectives.even_row_counts(rows, case.layout.tp)
    first = min(1, rows) if case.layout.tp > 1 else 0
    return (*(0,) * (case.layout.tp - 2), *((first,) if case.layout.tp > 1 else ()), rows - first)


def check(case: Case, **options: Any) -> ParityReport:
    """Compare the folded model with one process."""
    return check_against_one_process(
        partial(Model, case),
        partial(fold, case=case),
        case.layout,
        batch=partial(batch_of, case=case),
        loss=partial(loss_of_one_process, case=case),
        folded_loss=partial(loss_on_a_lane, case=case),
        losses=case.losses,
        lanes=case.lanes,
        lane_rows=partial(rows_of_lanes, case=case) if case.lanes == "sharded" else None,
        lane_grads=case.lane_grads,
        **options,
    )
