"""What is saved in one layout, loaded in another and saved there again is the same, bit by bit, whatever it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from byte_lm import ByteLM
from checkpoint_cases import CONFIG, Run, optimizer_of, scheduler_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim import swa_utils

import foldpar
from foldpar.checkpoint import load_checkpoint, save_checkpoint
from foldpar.testing import layouts, run_ranks

solve = foldpar.solve_layout
ODD = ("usual", "none yet", "some without", "amsgrad", "no momentum", "numbers")


@dataclass(frozen=True)
class Drawn:
    """Two layouts and stages, and what goes along."""

    first: foldpar.FoldedLayout
    second: foldpar.FoldedLayout
    stages: tuple[int, int] = (0, 0)
    states: str = "usual"
    schedule: str = ""
    average: bool = False

    def run(self, place: int) -> Run:
        kind = "SGD" if self.states == "no momentum" else "AdamW"
        return Run((self.first, self.second)[place], kind, self.stages[place], schedule=self.schedule)


Made = tuple[nn.Module, torch.optim.Optimizer, Any, nn.Module | None]


def made(case: Drawn, place: int, groups: foldpar.FoldedGroups) -> Made:
    """A model with other values in the second place, its optimizer, schedulers and its average."""
    run = case.run(place)
    torch.manual_seed(place)
    model = parity.fold(ByteLM(CONFIG).to(run.dtype), groups, run.case)
    average = swa_utils.AveragedModel(model, avg_fn=swa_utils.get_ema_avg_fn(0.5)) if case.average else None
    if run.stage:
        foldpar.shard_model(model, groups, stage=run.stage)
        if average is not None:
            foldpar.shard_model(average.module, groups, stage=run.stage)
    optimizer = optimizer_of(model, run.kind, **({"amsgrad": True} if case.states == "amsgrad" else {}))
    return model, optimizer, scheduler_of(optimizer, run.schedule), average


def steps(case: Drawn, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, average: Any) -> None:
    """Two steps whose gradients are functions of the values, and so of no layout."""
    for step in range(0 if case.states == "none yet" else 2):
        for name, parameter in model.named_parameters():
            left_out = case.states in ("some without", "no momentum") and len(name) % 2
            parameter.grad = None if left_out else parameter.detach().sin() * (step + 1)
        foldpar.declare_reduced(model)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if average is not None:
            average.update_parameters(model)
    for name, parameter in model.named_parameters():
        if case.states == "no momentum" and len(name) % 2:
            optimizer.state[parameter]["momentum_buffer"] = None
        if case.states == "numbers":
            optimizer.state[parameter].update(
                seen=torch.tensor(len(name)), ratio=torch.tensor([0.1], dtype=torch.float64), rate=0.3, on=True, no=None
            )


def save(case: Drawn, path: Path) -> None:
    with foldpar.create_groups(case.first) as groups:
        model, optimizer, scheduler, average = made(case, 0, groups)
        steps(case, model, optimizer, scheduler, average)
        save_all(path, (model, optimizer, scheduler, average), groups)


def save_all(path: Path, parts: Made, groups: foldpar.FoldedGroups) -> None:
    model, optimizer, scheduler, average = parts
    save_checkpoint(path / "model", model, optimizer, groups, step=2, schedulers=scheduler or (), piece_bytes=1000)
    if average is not None:
        save_checkpoint(path / "average", average, None, groups, step=2, piece_bytes=1000)


def load_and_save(case: Drawn, path: Path, again: Path) -> None:
    with foldpar.create_groups(case.second) as groups:
        parts = made(case, 1, groups)
        model, optimizer, scheduler, average = parts
        load_checkpoint(path / "model", model, optimizer, groups, schedulers=scheduler or ())
        if average is not None:
            load_checkpoint(path / "average", average, None, groups, random_state=False)
        if scheduler is not None:
            assert scheduler.last_epoch == (0 if case.states == "none yet" else 2)
        save_all(again, parts, groups)


def contents(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but what belongs to its ranks."""
    dcp_to_torch_save(path, path.parent / "whole.pt")
    whole = torch.load(path.parent / "whole.pt", weights_only=False)
    page = json.loads((path / "foldpar.json").read_text())
    tensors = {**whole["model"], **whole.get("optimizer", {}).get("state", {})}
    optimizer = page["optimizer"] or {"options": [], "options_of": {}, "state": {}}
    options = {name: optimizer["options"][place] for name, place in optimizer["options_of"].items()}
    found = {"options": options, "state": optimizer["state"], "buffers": page["buffers"]}
    return {**tensors, **found, "shapes": {name: each["shape"] for name, each in page["parameters"].items()}}


def check(case: Drawn, folder: Path) -> None:
    run_ranks(save, case.first.world, case, folder / "one")
    run_ranks(load_and_save, case.second.world, case, folder / "one", folder / "two")
    for part in ("model", "average") if case.average else ("model",):
        before, after = (contents(folder / name / part) for name in ("one", "two"))
        assert set(before) == set(after)
        for name, value in before.items():
            if isinstance(value, Tensor):
                assert value.dtype == after[name].dtype and torch.equal(value, after[name]), (part, name)
            else:
                assert value == after[name], (part, name)
    states = contents(folder / "two" / "model")["state"]
    assert (not states) == (case.states == "none yet")


FITTING = layouts(8, pp=1, tp=(1, 8), ep=(1, 8), etp=(1, 8)).filter(
    lambda of: 8 % of.tp == 8 % of.ep == 8 % of.etp == 0
)


@pytest.mark.parametrize(
    "case",
    [
        Drawn(solve(4, tp=2, ep=4), solve(2, ep=2), states="some without", schedule="sequence", average=True),
        Drawn(solve(2, tp=2), solve(4, ep=2, etp=2), (3, 2), "numbers", "lambda", True),
        Drawn(solve(2, ep=2), solve(4, tp=4, ep=2), (0, 1), "no momentum", "steps"),
        Drawn(solve(1), solve(2, tp=2, ep=2), states="none yet", average=True),
        pytest.param(Drawn(solve(2, etp=2), solve(1), (2, 0), "amsgrad"), marks=pytest.mark.long),
    ],
    ids=lambda case: case.states,
)
def test_odd_states_schedulers_and_averages_come_and_go(tmp_path, case):
    check(case, tmp_path)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Drawn,
        FITTING,
        FITTING,
        st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.sampled_from(ODD),
        st.sampled_from(["", "lambda", "steps", "sequence"]),
        st.booleans(),
    )
)
def test_whatever_is_drawn_comes_and_goes(tmp_path_factory, case):
    check(case, tmp_path_factory.mktemp("any"))
