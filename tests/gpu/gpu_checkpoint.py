"""The suite ``checkpoint``: every layout of a job saves, every other one loads, bit by bit, and trains on."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import checkpoint_cases as cases
import torch
import torch.distributed as dist
from boxes import Held, assembled, held_by
from checkpoint_cases import Run
from run import Runner

import foldpar
from foldpar.checkpoint import load_checkpoint, save_checkpoint


def runs(world: int, device: str) -> list[Run]:
    layouts = [(foldpar.solve_layout(world, ep=world), 0), (foldpar.solve_layout(world, tp=2, ep=world), 3)]
    if world > 2:
        layouts.append((foldpar.solve_layout(world, tp=2, ep=2, etp=2), 0))
        layouts.append((foldpar.solve_layout(world, tp=2, ep=1, order="consecutive"), 2))
    return [Run(layout, "AdamW", stage, dtype=torch.float32, device=device) for layout, stage in layouts]


def check(first: Run, second: Run, folder: Path) -> None:
    """Train and save in the background in one layout; load in the other, compare everything, and train on."""
    with cases.ready(first) as (groups, model, optimizer):
        cases.train(model, optimizer, groups, first, range(2))
        saved = gathered(held_by(model, groups))
        pending = save_checkpoint(folder / "c", model, optimizer, groups, step=2, asynchronous=True)
        cases.train(model, optimizer, groups, first, range(2, 3))
        assert pending is not None
        pending.wait()
    with cases.ready(second, seed=1) as (groups, model, optimizer):
        load_checkpoint(folder / "c", model, optimizer, groups, verify=True)
        loaded = gathered(held_by(model, groups))
        for name, tensor in saved.items():
            assert torch.equal(tensor, loaded[name]), name
        cases.train(model, optimizer, groups, second, range(2, 3))
        save_checkpoint(folder / "d", model, optimizer, groups, step=3)


def gathered(shares: Held) -> dict[str, torch.Tensor]:
    of_ranks: list[Held] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {name: (share, local.cpu()) for name, (share, local) in shares.items()})
    return assembled(of_ranks)


def main(runner: Runner) -> None:
    if not runner.has_ranks("checkpoint", 2, 4):
        return
    folders: list[str] = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    every = runs(runner.world, runner.device)
    for number, (first, second) in enumerate(product(every, every)):
        name = f"{first.layout!r} stage {first.stage} -> {second.layout!r} stage {second.stage}"
        runner.check(name, partial(check, first, second, Path(folders[0], str(number))))
    if dist.get_rank() == 0:
        shutil.rmtree(folders[0])
