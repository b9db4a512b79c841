"""A small model in plain PyTorch, a way to fold it, and what each rank should then hold: for tests of one idea each.

The plain model imports nothing from foldpar and computes its experts one after the other. All of it is float64.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from dense import dense_experts, feed_forward, softmax_routing
from draws import seeded
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import foldpar
from foldpar import families
from foldpar.comm.dtensors import is_dtensor, local_tensor
from foldpar.moe.kernels import activations
from foldpar.testing.shares import Shares

VOCABULARY, DIM, HIDDEN, EXPERTS, TOP_K, LENGTH = 12, 8, 4, 8, 2, 6
GATE_UP = "experts gate_up units ... -> experts (gate_up units) ..."
"""Where experts are sliced over etp, gate and up lie apart."""


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))


class Experts(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, DIM) * 0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) * 0.5)
        self.gate_up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, DIM)) if bias else None


class MoE(nn.Module):
    def __init__(self, bias: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts(bias)
        self.shared = FeedForward() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "... dim -> (...) dim")
        of = self.experts
        experts = feed_forward(of.gate_up_proj, of.down_proj, of.gate_up_bias, of.down_bias)
        y = dense_experts(tokens, *softmax_routing(tokens, self.router.weight, TOP_K), experts).view_as(x)
        return y if self.shared is None else y + self.shared(x)


class FeedForward(nn.Module):
    """A dense layer that can be sharded over the lanes by hand: up by columns, down by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 2 * DIM, bias=False), nn.Linear(2 * DIM, DIM, bias=False)
        self.tp: foldpar.AxisGroup | None = None
        self.lanes = "replicated"

    def forward(self, x: Tensor) -> Tensor:
        if self.tp is None:
            return self.down(self.up(x).relu())
        if self.lanes == "sharded":
            y = self.down(self.up(foldpar.all_gather_rows(x, self.tp, backward="reduce_scatter")).relu())
            return foldpar.reduce_scatter_rows(y, self.tp, row_counts=row_counts(x, self.tp))
        y = self.down(self.up(foldpar.copy_to_group(x, self.tp)).relu())
        return foldpar.all_reduce(y, self.tp, backward="identity")

    def shard(self, tp: foldpar.AxisGroup, lanes: str = "replicated") -> None:
        self.tp, self.lanes = tp, lanes
        self.up.weight = nn.Parameter(self.up.weight.detach().tensor_split(tp.size, 0)[tp.index].clone())
        self.down.weight = nn.Parameter(self.down.weight.detach().tensor_split(tp.size, 1)[tp.index].clone())
        foldpar.mark_parameters(self, families.DENSE_SHARDED)


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.dense_norm, self.moe_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.dense, self.moe = FeedForward(), MoE(**options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(self.dense_norm(x))
        return x + self.moe(self.moe_norm(x))


class Model(nn.Module):
    """``[batch, length]`` tokens to ``[batch, length, vocabulary]`` logits."""

    def __init__(self, blocks: int = 2, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY)

    def features(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.features(tokens))


def own(tensor: Tensor | None, like: Tensor | None = None) -> Tensor:
    """This rank's part of a parameter or a gradient, in the shape of its share of the plain model's."""
    assert tensor is not None
    part = local_tensor(tensor)
    if like is not None and part.dim() == like.dim() + 1:  # gate and up lie apart
        return rearrange(part, GATE_UP)
    return part


def name_of(value: object) -> str:
    """For a parametrized test: the same in every process, functions and objects without their addresses."""
    return re.sub(r"<(?:function )?([\w.<>]+?)(?: object)? at 0x[0-9a-f]+>", r"\1", str(value))


def gathered(tensor: Tensor) -> Tensor:
    """Whole, gate and up as one dimension."""
    whole = tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()
    return rearrange(whole, GATE_UP) if whole.dim() == 4 else whole


def plain_model(seed: int = 0, **options: Any) -> Model:
    with seeded(seed):
        return Model(**options).double()


def fold(
    model: Model,
    groups: foldpar.FoldedGroups | Sequence[foldpar.FoldedGroups],
    *,
    shard_dense: bool = True,
    **options: Any,
) -> Model:
    """Fold a copy: experts by each layer's groups, dense layers over the lanes.

    With ``lanes="sharded"`` the model takes this lane's slice of the tokens, flattened.
    """
    lanes = options.get("lanes", "replicated")
    model = copy.deepcopy(model)
    of_block = list(groups) if isinstance(groups, Sequence) else [groups] * len(model.blocks)
    for block, own in zip(model.blocks, of_block, strict=True):
        block.moe = fold_moe(block.moe, own, **options)
        if shard_dense and own.tp.size > 1:
            block.dense.shard(own.tp, lanes)
    return foldpar.mark_parameters(model, families.REPLICATED if lanes == "replicated" else families.REPLICATED_PARTIAL)


def fold_moe(dense: MoE, groups: foldpar.FoldedGroups, **options: Any) -> foldpar.FoldedMoE:
    router = foldpar.TopKRouter(DIM, EXPERTS, TOP_K)
    router.weight = dense.router.weight
    weights = dict(dense.experts.named_parameters())
    return foldpar.FoldedMoE.from_dense(router, groups=groups, shared=dense.shared, **weights, **options)


def tokens_of(data_rank: int, micro_batch: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * data_rank + micro_batch)
    return torch.randint(VOCABULARY, (batch, LENGTH + 1), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def plain_gradients(model: nn.Module, data_ranks: int, micro_batches: int = 1) -> dict[str, Tensor]:
    """By parameter: the gradient of the mean over data ranks and micro-batches, in one process."""
    losses = [loss_of(model, tokens_of(rank, micro)) for rank in range(data_ranks) for micro in range(micro_batches)]
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(torch.stack(losses).mean(), parameters), strict=True))


def folded_loss(model: Model, tokens: Tensor, groups: foldpar.FoldedGroups, lanes: str = "replicated") -> Tensor:
    """This lane's loss: its share of it, its own sum over the number of all tokens, where lanes are sharded."""
    if lanes == "replicated":
        return loss_of(model, tokens)
    own, targets = (
        foldpar.split_rows(part.flatten(), groups.tp, backward="zero_pad") for part in (tokens[:, :-1], tokens[:, 1:])
    )
    return F.cross_entropy(model(own), targets, reduction="sum") / tokens[:, 1:].numel()


def row_counts(x: Tensor, group: foldpar.AxisGroup) -> tuple[int, ...]:
    return tuple(foldpar.comm.collectives.all_gather(torch.tensor([x.shape[0]]), group).flatten().tolist())


def relative(got: Tensor, want: Tensor) -> float:
    """The relative L2 difference; the difference itself where zero is wanted."""
    with torch.no_grad():
        got, want = own(got, want), own(want)
        return float((got - want).norm()) / (float(want.norm()) or 1.0)


def gradient_errors(model: nn.Module, want: dict[str, Tensor], groups: foldpar.FoldedGroups) -> dict[str, float]:
    """Of every parameter, the relative difference between its gradient and this rank's share of the plain one."""
    errors, shares = {}, Shares(model, groups)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        wanted = shares.share_of(name, want[name])
        assert own(parameter.grad, wanted).shape == wanted.shape, name
        errors[name] = relative(parameter.grad, wanted)
    return errors


def worst(errors: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


def plant_wrong_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of foldpar's activations gives 1.01 times the gradient of its input."""
    backward = activations.backward

    def wrong(*arguments: Any, **options: Any) -> Any:
        value, grad_x, grad_weights = backward(*arguments, **options)
        return value, 1.01 * grad_x, grad_weights

    monkeypatch.setattr(activations, "backward", wrong)


def assert_gradient_is_autograds(x: Tensor, activation: activations.Activation, interleaved: bool) -> None:
    """Of an activation, times a weight for each row: the backward by hand against autograd's."""
    draw = torch.Generator().manual_seed(0)
    x = x.requires_grad_()
    weights = torch.rand(len(x), generator=draw, dtype=torch.float64).requires_grad_()
    value = activations.forward(x, weights, activation, interleaved=interleaved)
    arriving = torch.randn(value.shape, generator=draw, dtype=torch.float64)
    value.backward(arriving)
    again, grad_x, grad_weights = activations.backward(
        arriving, x.detach(), weights.detach(), activation, interleaved=interleaved
    )
    torch.testing.assert_close(again, value.detach())
    torch.testing.assert_close(grad_x, x.grad)
    torch.testing.assert_close(grad_weights, weights.grad)


class Stage(nn.Module):
    """A model's first or second half, whose parameters keep their names."""

    def __init__(self, model: Model, number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): model.blocks[number]})
        if number == 0:
            self.embedding = model.embedding
        else:
            self.norm, self.head = model.norm, model.head
        foldpar.mark_parameters(self, families.REPLICATED)

    def forward(self, x: Tensor) -> Tensor:
        if "0" in self.blocks:
            return self.blocks["0"](self.embedding(x))
        return self.head(self.norm(self.blocks["1"](x)))
