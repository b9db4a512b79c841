"""Train one model folded and in one process, and compare everything that training touches.

The reference (``examples/byte_lm.py``) is plain PyTorch that imports nothing from foldpar. Both start from the same
weights, see the same tokens and take SGD steps with a large learning rate; every parameter's gradient at every step
and its total update are compared per tensor.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from draws import seeded
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional as F

import foldpar
from foldpar import families
from foldpar.testing.shares import Shares

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from byte_lm import ByteLM, Config, MoE

CONFIG = Config(vocab=32, dim=16, heads=8, layers=2, experts=8, top_k=2, hidden=8, shared_hidden=8)
LENGTH, BATCH = 6, 2
PLAIN = {"tp": 1, "ep": 1, "etp": 1, "cp": 1, "order": "tp-lane-major", "consumer": "replicated", "partition": "tokens"}
"""What a case is changed to for the model in one process."""

# What stands above the last MoE layer. The first two give every lane the same gradient by themselves; the others work
# on other columns or tokens per lane, and are converted where they start or declared partial down to the embedding.
CONSUMERS = (
    "replicated",
    "vocabulary",
    "columns",
    "own-tokens",
    "columns-partial",
    "own-tokens-partial",
)


@dataclass(frozen=True)
class Case:
    """One way to fold and train the model."""

    world: int
    tp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    order: str = "tp-lane-major"
    consumer: str = "replicated"
    partition: str = "tokens"
    shared: str = "tp"
    dtype: torch.dtype = torch.float64
    steps: int = 5
    rate: float = 0.5
    empty: tuple[int, ...] = ()  # data ranks that have no tokens
    length: int = LENGTH
    device: str = "cpu"
    config: Config = CONFIG
    seed: int = 7

    @property
    def layout(self) -> foldpar.FoldedLayout:
        return foldpar.solve_layout(self.world, tp=self.tp, ep=self.ep, etp=self.etp, cp=self.cp, order=self.order)

    @property
    def data_ranks(self) -> int:
        return self.layout.dp * self.layout.cp

    @property
    def partial(self) -> bool:
        return self.consumer.endswith("partial")

    @property
    def tolerance(self) -> float:
        return 1e-12 if self.dtype == torch.float64 else 2e-6

    def __str__(self) -> str:
        degrees = f"world{self.world}-tp{self.tp}-ep{self.ep}-etp{self.etp}-cp{self.cp}"
        return f"{degrees}-{self.order}-{self.consumer}-{self.partition}-{self.shared}-{str(self.dtype)[6:]}"


@dataclass
class Trace:
    """What one training run left: by parameter name, the gradient of each step and the total update."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    updates: dict[str, Tensor] = field(default_factory=dict)


def batch_of(case: Case, data_rank: int, step: int) -> Tensor:
    """``[batch, length + 1]`` tokens that can be learnt: the next token is mostly a function of the last one."""
    generator = torch.Generator().manual_seed(10_000 * (case.seed - 7) + 1000 * data_rank + step % 2)
    tokens = torch.randint(case.config.vocab, (BATCH, case.length + 1), generator=generator)
    for place in range(1, case.length + 1):
        follows = torch.rand(BATCH, generator=generator) < 0.8
        tokens[:, place] = torch.where(follows, (tokens[:, place - 1] * 5 + 3) % case.config.vocab, tokens[:, place])
    return (tokens[:0] if data_rank in case.empty else tokens).to(case.device)


def fresh_model(case: Case) -> ByteLM:
    with seeded(case.seed):
        return ByteLM(case.config).to(case.device, case.dtype)


def train_reference(case: Case) -> Trace:
    """One process, the whole batch: the loss is the mean over data ranks of each one's mean."""
    model = fresh_model(case)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trace = Trace()
    for step in range(case.steps):
        model.zero_grad()
        losses = []
        for data_rank in range(case.data_ranks):
            tokens = batch_of(case, data_rank, step)
            losses.append(_mean_loss(model(tokens[:, :-1]), tokens[:, 1:]))
        loss = torch.stack(losses).mean()
        loss.backward()
        trace.losses.append(float(loss.detach()))
        trace.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        _sgd(model, case.rate)
    trace.updates = {name: parameter.detach() - start[name] for name, parameter in model.named_parameters()}
    return trace


def train_folded(case: Case, reference: Trace) -> dict[str, Any]:
    """On one rank: train folded, and return squared differences and squared norms per tensor, to be added up."""
    with foldpar.create_groups(case.layout) as groups:
        model = fold(fresh_model(case), groups, case)
        start = {name: _local(parameter).detach().clone() for name, parameter in model.named_parameters()}
        shares = Shares(model, groups)
        errors: dict[str, Any] = {}
        losses = []
        for step in range(case.steps):
            model.zero_grad()
            tokens = batch_of(case, groups.dp_cp.index, step)
            losses.append(backward(model, tokens, groups, case))
            foldpar.reduce_gradients(model, groups)
            for name, parameter in model.named_parameters():
                want = shares.share_of(name, reference.gradients[step][name])
                _note(errors, f"gradient of {name} at step {step}", _local(parameter.grad), want)
            _sgd(model, case.rate)
        for name, parameter in model.named_parameters():
            want = shares.share_of(name, reference.updates[name])
            resolution = case.steps * torch.finfo(case.dtype).eps / 2 * start[name]
            _note(errors, f"update of {name}", _local(parameter).detach() - start[name], want, resolution)
        mean = torch.tensor(losses[-1] / case.data_ranks, device=case.device)
        foldpar.comm.collectives.all_reduce_(mean, groups.dp_cp)
        return {"errors": errors, "loss": float(mean)}


def fold(model: ByteLM, groups: foldpar.FoldedGroups, case: Case) -> ByteLM:
    """Fold every MoE block, and shard attention, shared experts and head over tp as the consumer allows."""
    mesh = groups.mesh("dense")["tp"]
    lanes = {"lane_grads": "partial" if case.partial else "replicated", "partition": case.partition}
    for block in model.blocks:
        dense: MoE = block.moe
        router = foldpar.TopKRouter(case.config.dim, case.config.experts, case.config.top_k)
        router.weight = dense.router.weight
        block.moe = foldpar.FoldedMoE.from_dense(
            router, dense.experts.gate_up_proj, dense.experts.down_proj, groups, shared=dense.shared, **lanes
        )
        if case.tp > 1 and not case.partial:
            sharded = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
            parallelize_module(block.attention, mesh, sharded)
            if case.shared == "tp":
                sharded = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(dense.shared, mesh, sharded)
    if case.consumer == "vocabulary" and case.tp > 1:
        parallelize_module(model.head, mesh, ColwiseParallel(use_local_output=False))
    if case.consumer.startswith("columns"):
        model.head.weight = nn.Parameter(model.head.weight.detach().chunk(groups.tp.size)[groups.tp.index].clone())
        foldpar.mark_parameters(model.head, families.DENSE_SHARDED)
    if case.consumer == "own-tokens":
        foldpar.mark_parameters(model.head, families.REPLICATED_PARTIAL)
    return foldpar.mark_parameters(model, families.REPLICATED_PARTIAL if case.partial else families.REPLICATED)


def backward(model: ByteLM, tokens: Tensor, groups: foldpar.FoldedGroups, case: Case) -> float:
    """This data rank's loss, as its consumer computes it, and its backward."""
    targets = tokens[:, 1:].flatten()
    if case.consumer in ("replicated", "vocabulary"):
        with loss_parallel():
            logits = model(tokens[:, :-1])
            loss = _mean_loss(logits, tokens[:, 1:])
            loss.backward()
        return float(loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach())
    x = model.features(tokens[:, :-1]).flatten(0, 1)
    if case.consumer.startswith("columns"):
        x = x if case.partial else foldpar.copy_to_group(x, groups.tp)
        loss = column_parallel_loss(F.linear(x, model.head.weight), targets, groups.tp)
        loss.backward()
        return float(loss.detach())
    own = foldpar.split_rows(x, groups.tp, backward="zero_pad" if case.partial else "all_gather")
    own_targets = foldpar.split_rows(targets, groups.tp, backward="zero_pad")
    loss = F.cross_entropy(model.head(own), own_targets, reduction="sum") / len(targets)
    loss.backward()
    return float(foldpar.comm.collectives.all_reduce_(loss.detach().clone(), groups.tp))


def column_parallel_loss(logits: Tensor, targets: Tensor, tp: foldpar.AxisGroup) -> Tensor:
    """Mean cross-entropy of logits whose columns are sharded over the lanes, by hand."""
    largest = foldpar.comm.collectives.all_reduce_(logits.detach().amax(-1), tp, "max")
    total = foldpar.all_reduce((logits - largest[:, None]).exp().sum(-1), tp, backward="identity")
    column = targets - tp.index * logits.shape[1]
    here = (column >= 0) & (column < logits.shape[1])
    picked = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0] - largest
    picked = foldpar.all_reduce(torch.where(here, picked, 0), tp, backward="identity")
    return (total.log() - picked).mean()


def worst(results: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest relative L2 difference of any tensor, over all ranks' shares, and its name."""
    relative = {}
    for name in results[0]["errors"]:
        difference, norm, resolution = (
            math.sqrt(sum(result["errors"][name][part] for result in results)) for part in range(3)
        )
        relative[name] = max(0.0, difference - resolution) / norm if norm else difference
    name = max(relative, key=lambda key: (math.isnan(relative[key]), relative[key]))
    return relative[name], name


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.numel() == 0:
        return logits.sum() * 0.0
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _sgd(model: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            _local(parameter).sub_(_local(parameter.grad), alpha=rate)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _note(errors: dict[str, Any], name: str, got: Tensor, want: Tensor, resolution: Tensor | float = 0.0) -> None:
    """Squares to be added up over the ranks: of the difference, of the value, and of what rounding alone may do.

    A weight of 1 that moves by 0.01 in float32 cannot tell its update better than to 6e-6, in one process or in many.
    """
    if got.dim() == want.dim() + 1:  # gate and up of experts that are sliced over etp lie apart
        got = rearrange(got, "experts gate_up units ... -> experts (gate_up units) ...")
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} is not {tuple(want.shape)}"
    parts = (got - want, want, torch.as_tensor(resolution))
    errors[name] = tuple(float(part.double().square().sum()) for part in parts)
