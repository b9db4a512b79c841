"""Train sharded with accumulation, clipping and an optimizer, and in one process; compare all that training touches.

The model, the fold and the data are those of ``parity.py``. What FSDP2 should hold is cut here by plain arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import parity
import torch
from parity import Case, batch_of, fold, fresh_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

import foldpar
from foldpar.sharding.shard import accumulate, shard_model
from foldpar.testing.shares import Shares


@dataclass(frozen=True)
class Run:
    """One way to train."""

    case: Case
    optimizer: str = "sgd"
    steps: int = 10
    micro_batches: int = 2
    max_norm: float = 0.5
    momentum: float = 0.5

    def batch(self, data_rank: int, step: int, micro: int) -> Tensor:
        return batch_of(replace(self.case, seed=self.case.seed + micro), data_rank, step)

    def optimizer_of(self, parameters: Any) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.3, momentum=self.momentum)
        return torch.optim.AdamW(parameters, lr=0.01, foreach=self.optimizer == "adamw-foreach")


@dataclass
class History:
    """What one process saw: by step, the losses, the gradients before clipping and their norm; in the end, weights."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train_alone(run: Run) -> History:
    model, history = fresh_model(run.case), History()
    optimizer = run.optimizer_of(model.parameters())
    for step in range(run.steps):
        total = 0.0
        for micro in range(run.micro_batches):
            batches = [run.batch(rank, step, micro) for rank in range(run.case.data_ranks)]
            losses = [_loss(model, tokens) for tokens in batches]
            loss = torch.stack(losses).mean() / run.micro_batches
            loss.backward()
            total += float(loss.detach())
        history.losses.append(total)
        history.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        history.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), run.max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    history.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return history


def train_sharded(run: Run, stages: list[int], alone: History, **options: Any) -> list[dict[str, Any]]:
    """On one rank: for each stage, squared differences and squared norms per tensor, losses and norms."""
    with foldpar.create_groups(run.case.layout) as groups:
        return [_train_stage(run, stage, alone, options, groups) for stage in stages]


def _train_stage(
    run: Run, stage: int, alone: History, options: dict[str, Any], groups: foldpar.FoldedGroups
) -> dict[str, Any]:
    case, errors, losses, norms = run.case, {}, [], []
    model = fold(fresh_model(case), groups, case)
    shares = Shares(model, groups)
    if stage:
        shard_model(model, groups, stage=stage, **options)
    optimizer = run.optimizer_of(foldpar.parameter_groups(model))

    def note(what: str, name: str, got: Tensor, full: Tensor, resolution: Any = 0.0) -> None:
        want = shard_of(shares.share_of(name, full), dict(model.named_parameters())[name])
        parity._note(errors, f"{what} of {name}", parity._local(got).detach(), want.to(got.device), resolution)

    for step in range(run.steps):
        loss = 0.0
        with accumulate(model):
            for micro in range(run.micro_batches - 1):
                loss += backward(model, run.batch(groups.dp_cp.index, step, micro), run.micro_batches)
        last = run.batch(groups.dp_cp.index, step, run.micro_batches - 1)
        loss += backward(model, last, run.micro_batches)
        foldpar.reduce_gradients(model, groups)
        for name, parameter in model.named_parameters():
            note(f"gradient at step {step}", name, parameter.grad, alone.gradients[step][name])
        norms.append(float(foldpar.clip_grad_norm_(model, run.max_norm, groups)))
        optimizer.step()
        optimizer.zero_grad()
        mean = torch.tensor(loss / case.data_ranks, dtype=torch.float64, device=case.device)
        losses.append(float(foldpar.comm.collectives.all_reduce_(mean, groups.dp_cp)))
    for name, parameter in model.named_parameters():
        note("weights", name, parameter, alone.weights[name])
    foldpar.check_replicas(model, groups)
    return {"errors": errors, "losses": losses, "norms": norms}


def backward(model: nn.Module, tokens: Tensor, micro_batches: int) -> float:
    with loss_parallel():
        loss = _loss(model, tokens) / micro_batches
        loss.backward()
    loss = loss.detach()
    return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return parity._mean_loss(model(tokens[:, :-1]), tokens[:, 1:])


def shard_of(share: Tensor, parameter: Tensor) -> Tensor:
    """What this rank keeps of what it held before sharding: chunks of equal size by coordinate, the last ones short."""
    axis = data_axis(parameter)
    if axis is None:
        return share
    mesh = parameter.device_mesh if parameter.device_mesh.ndim == 1 else parameter.device_mesh[axis]
    ranks = torch.distributed.get_process_group_ranks(mesh.get_group())
    dim = parameter.placements[parameter.device_mesh.mesh_dim_names.index(axis)].dim
    if parameter.dim() == share.dim() + 1:  # gate and up lie apart
        return _chunk(share.unflatten(1, (2, -1)), dim, ranks).flatten(1, 2)
    return _chunk(share, dim, ranks)


def _chunk(share: Tensor, dim: int, ranks: list[int]) -> Tensor:
    length = -(-share.shape[dim] // len(ranks))
    start = min(ranks.index(torch.distributed.get_rank()) * length, share.shape[dim])
    return share.narrow(dim, start, min(length, share.shape[dim] - start))


def data_axis(parameter: Tensor) -> str | None:
    names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
    return next((name for name in names if name in ("dp_cp", "edp")), None)


def assert_equal(results: list[list[dict[str, Any]]], alone: History, tolerance: float) -> None:
    """Results are by rank, then by stage."""
    for of_stage in zip(*results, strict=True):
        error, name = parity.worst(list(of_stage))
        assert error < tolerance, f"{name} is off by {error:.3g} (relative L2)"
        for result in of_stage:
            for got, want in zip(result["losses"] + result["norms"], alone.losses + alone.norms, strict=True):
                assert abs(got / want - 1) < tolerance, (result["losses"], alone.losses, result["norms"], alone.norms)
