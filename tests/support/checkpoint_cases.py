"""What tests of checkpoints run on ranks: train a small model in one layout, save, resume in another."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from boxes import Held, held_by
from byte_lm import ByteLM, Config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import foldpar
from foldpar.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from foldpar.checkpoint import dcp as checkpoint_dcp
from foldpar.errors import CheckpointError, FoldingError
from foldpar.sharding.shard import shard_model

CONFIG = Config(vocab=24, dim=16, heads=8, layers=2, experts=8, top_k=2, hidden=8, shared_hidden=8)
SEQUENCES, LENGTH = 24, 4  # 24 can be shared out among 1, 2, 3, 4, 6 and 8 data ranks


@dataclass(frozen=True)
class Run:
    """A layout and an optimizer; ``stage`` 0 is not sharded."""

    layout: foldpar.FoldedLayout
    kind: str = "AdamW"
    stage: int = 0
    dtype: torch.dtype = torch.float64
    config: Config = CONFIG
    consumer: str = "replicated"
    device: str = "cpu"
    schedule: str = ""
    replicas: int = 1

    @property
    def case(self) -> parity.Case:
        of = self.layout
        return parity.Case(
            of.world,
            tp=of.tp,
            ep=of.ep,
            etp=of.etp,
            cp=of.cp,
            order=of.order,
            dtype=self.dtype,
            config=self.config,
            consumer=self.consumer,
            device=self.device,
        )


def optimizer_of(model: nn.Module, kind: str, **options: Any) -> torch.optim.Optimizer:
    groups = foldpar.parameter_groups(model)
    if kind == "SGD":
        return torch.optim.SGD(groups, **{"lr": 0.1, "momentum": 0.9, **options})
    return torch.optim.AdamW(groups, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def scheduler_of(optimizer: torch.optim.Optimizer, schedule: str) -> Any:
    """Rates that change with every step; ``None`` without a name."""
    if not schedule:
        return None
    if schedule == "lambda":
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if schedule == "steps":
        return lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    warm = lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 8)], [2])


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(CONFIG.vocab, (SEQUENCES, LENGTH + 1), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: foldpar.FoldedGroups,
    run: Run,
    steps: Sequence[int],
    scheduler: Any = None,
) -> list[float]:
    """The loss of each step, over the whole batch."""
    losses = []
    data = groups.dp_cp
    for step in steps:
        loss = parity.backward(model, batch(step).to(run.device).chunk(data.size)[data.index], groups, run.case)
        foldpar.reduce_gradients(model, groups)
        foldpar.clip_grad_norm_(model, 1.0, groups)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        mean = torch.tensor([loss / data.size], dtype=torch.float64, device=run.device)
        foldpar.comm.collectives.all_reduce_(mean, data)
        losses.append(float(mean))
    return losses


def fresh(run: Run, groups: foldpar.FoldedGroups, seed: int = 7) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = parity.fold(ByteLM(run.config).to(run.device, run.dtype), groups, run.case)
    if run.stage:
        shard_model(model, groups, stage=run.stage, replicas=run.replicas)
    return model, optimizer_of(model, run.kind)


def in_one_process(
    kind: str, steps: int, config: Config = CONFIG, schedule: str = ""
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of the plain model, trained without foldpar."""
    torch.manual_seed(7)
    model = ByteLM(config).double()
    if kind == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = scheduler_of(optimizer, schedule)
    losses = []
    for step in range(steps):
        tokens = batch(step)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@contextmanager
def ready(run: Run, seed: int = 7) -> Iterator[tuple[foldpar.FoldedGroups, nn.Module, torch.optim.Optimizer]]:
    with foldpar.create_groups(run.layout) as groups:
        yield groups, *fresh(run, groups, seed)


def train_and_save(run: Run, path: Path, steps: int, **options: Any) -> tuple[list[float], Held]:
    with ready(run) as (groups, model, optimizer):
        scheduler = scheduler_of(optimizer, run.schedule)
        losses = train(model, optimizer, groups, run, range(steps), scheduler)
        if scheduler is not None:
            options["schedulers"] = scheduler
        save_checkpoint(path, model, optimizer, groups, step=steps, extra={"note": [1, "two"]}, **options)
        return losses, held_by(model, groups)


def load_and_train(run: Run, path: Path, steps: int, **options: Any) -> tuple[CheckpointInfo, list[float], Held, Held]:
    """Info, the losses of further steps, and the weights before and after these."""
    with ready(run, seed=1) as (groups, model, optimizer):
        scheduler = scheduler_of(optimizer, run.schedule)
        if scheduler is not None:
            options["schedulers"] = scheduler
        info = load_checkpoint(path, model, optimizer, groups, **options)
        loaded = held_by(model, groups)
        assert info.step is not None
        losses = train(model, optimizer, groups, run, range(info.step, info.step + steps), scheduler)
        return info, losses, loaded, held_by(model, groups)


def train_and_save_in_pieces(run: Run, path: Path, piece_bytes: int) -> None:
    train_and_save(run, path, 1, piece_bytes=piece_bytes)


@contextmanager
def broken_writes(broken: bool, after: int = 10_000) -> Iterator[None]:
    """On a rank whose disk is full after so many bytes of a file."""
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            made = checkpoint_dcp._HashingStream.__init__
            patch.setattr(checkpoint_dcp._HashingStream, "__init__", lambda self, raw: made(self, FullDisk(raw, after)))
        yield


class FullDisk:
    """A file on a disk that has so many bytes left."""

    def __init__(self, raw: Any, left: int) -> None:
        self.raw, self.left = raw, left

    def write(self, data: Any) -> int:
        self.left -= memoryview(data).nbytes
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.raw.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


# -- Checkpoints that are refused -------------------------------------------------------------------------------------


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Any]:
    """All values of a model and an optimizer, and all options."""
    values: list[Any] = [parameter.detach().clone() for parameter in model.state_dict().values()]
    if optimizer is not None:
        values += [value for state in optimizer.state.values() for value in state.values()]
        values += [option for group in optimizer.param_groups for name, option in group.items() if name != "params"]
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(one, two) if isinstance(one, Tensor) else one == two for one, two in zip(before, after, strict=True)
    )


def refused(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, groups: foldpar.FoldedGroups, **options: Any
) -> str:
    """The error's text; nothing may have changed."""
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model, optimizer, groups, **options)
    assert isinstance(caught.value, FoldingError) and isinstance(caught.value, RuntimeError)
    assert same(before, everything(model, optimizer)), "something was loaded"
    return str(caught.value)


def sealed(page: Path, **values: Any) -> None:
    """As another version of foldpar would write it: with a sum of its own."""
    resealed(page, {**json.loads(page.read_text()), **values})


def resealed(page: Path, document: dict[str, Any]) -> None:
    """Write a page of any contents with its sum."""
    document = {name: value for name, value in document.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    page.write_text(json.dumps({**document, "sha256": digest}))
