"""Several optimizers in one checkpoint, Muon beside AdamW, and states that no layout could take."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from draws import seeded
from hf_models import FAMILIES
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import foldpar
import foldpar.parameters
from foldpar.comm import is_dtensor
from foldpar.testing import run_ranks

VOCAB, RATE, GAMMAS = 32, 0.05, (0.5, 0.25)


@cache
def base() -> nn.Module:
    with seeded(3):
        return FAMILIES["qwen3_moe"].make().double()


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices of attention, AdamW for all else, experts and their router included."""
    matrices = [each for name, each in model.named_parameters() if "_proj" in name and "self_attn" in name]
    others = [each for each in model.parameters() if all(each is not matrix for matrix in matrices)]
    apart = ([each for each in others if is_dtensor(each) == kind] for kind in (False, True))
    return [
        torch.optim.Muon(matrices, lr=RATE, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": group} for group in apart if group], lr=RATE),
    ]


def step(model: nn.Module, several: list[torch.optim.Optimizer], number: int, data_ranks: range, groups: Any) -> None:
    model.zero_grad()
    for data_rank in data_ranks:
        draw = torch.Generator().manual_seed(10 * number + data_rank)
        tokens = torch.randint(VOCAB, (2, 6), generator=draw)
        (model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(data_ranks)).backward()
    if groups is not None:
        foldpar.reduce_gradients(model, groups)
    for optimizer in several:
        optimizer.step()


@pytest.fixture
def exact_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon works in bfloat16, whose rounding follows the order of sums: here in the parameter's dtype."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())


def trained(layout: foldpar.FoldedLayout, stage: int, steps: range, folder: str, want: dict[str, Tensor]) -> float:
    """Two steps, saved; or the third, from what was saved, compared."""
    with foldpar.create_groups(layout) as groups:
        model = copy.deepcopy(base())
        foldpar.fold_model(model, groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        several = optimizers(model)
        schedulers = [
            torch.optim.lr_scheduler.StepLR(each, 1, gamma) for each, gamma in zip(several, GAMMAS, strict=True)
        ]
        if steps.start:
            foldpar.load_checkpoint(
                folder, model, {"rest": several[1], "matrices": several[0]}, groups, schedulers=schedulers
            )
            assert [each.get_last_lr()[0] for each in schedulers] == [RATE / 4, RATE / 16]
        for number in steps:
            step(model, several, number, range(groups.dp.index, groups.dp.index + 1), groups)
            for scheduler in schedulers:
                scheduler.step()
        if not steps.start:
            foldpar.check_optimizer(model, several, groups)
            foldpar.save_checkpoint(folder, model, several, groups, schedulers=schedulers)
            return 0.0
        worst = 0.0
        for placement in foldpar.parameters.parameter_placements(model, groups):
            whole, own = want[placement.name], placement.local(placement.parameter.detach())
            for box in placement.share.boxes:
                there = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
                here = tuple(slice(at, at + size) for at, size in zip(box.starts, box.sizes, strict=True))
                worst = max(worst, float((own[here] - whole[there]).abs().max()))
        return worst


@pytest.mark.parametrize(
    ("stage", "other_stage"), [(0, 0), pytest.param(2, 3, marks=pytest.mark.long)], ids=["whole", "sharded"]
)
def test_two_optimizers_go_on_in_another_layout(stage: int, other_stage: int, tmp_path: Path, exact_muon: None) -> None:
    one = copy.deepcopy(base())
    several = optimizers(one)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, gamma) for each, gamma in zip(several, GAMMAS, strict=True)]
    for number in range(3):
        step(one, several, number, range(2), None)
        for scheduler in schedulers:
            scheduler.step()
    want = {name: each.detach() for name, each in one.named_parameters()}
    before, after = foldpar.solve_layout(4, tp=2, ep=2, etp=2), foldpar.solve_layout(2, ep=2)
    folder = str(tmp_path / "step-2")
    run_ranks(trained, 4, before, stage, range(2), folder, want, backend="threads")
    assert max(run_ranks(trained, 2, after, other_stage, range(2, 3), folder, want, backend="threads")) < 1e-8


def test_muon_refuses_stacks_of_experts() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        experts = foldpar.GroupedExperts(2, 4, 4, groups)
        with pytest.raises(ValueError, match="only supports 2D parameters"):
            torch.optim.Muon(experts.parameters())


def muon_on_a_part(layout: foldpar.FoldedLayout) -> str:
    with foldpar.create_groups(layout) as groups:
        model = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.float64))
        foldpar.mark_parameters(model[0], foldpar.families.DENSE_SHARDED)
        model.experts = foldpar.GroupedExperts(2, 4, 4, groups, dtype=torch.float64)
        foldpar.parameters.watch_optimizers(groups, model)
        model[0](torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        foldpar.declare_reduced(model)
        with pytest.raises(foldpar.GradientError) as error:
            torch.optim.Muon(model[0].parameters()).step()
        return str(error.value)


def test_muon_refuses_a_lanes_part_that_is_a_plain_tensor() -> None:
    texts = run_ranks(muon_on_a_part, 2, foldpar.solve_layout(2, tp=2), backend="threads")
    assert all("0.weight is this lane's part of one, as a plain tensor" in text for text in texts)


# -- What does not go together ----------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, foldpar.FoldedGroups]:
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)), foldpar.create_groups(
        foldpar.solve_layout(1)
    )


def stepped(model: nn.Module, *several: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 3)).sum().backward()
    for each in several:
        each.step()


def test_a_parameter_belongs_to_one_optimizer(tmp_path: Path) -> None:
    model, groups = small()
    twice = [torch.optim.SGD(model.parameters(), 0.1), torch.optim.AdamW(model[0].parameters())]
    with pytest.raises(foldpar.CheckpointError, match=r"Two of the 2 optimizers hold the same 1 parameter"):
        foldpar.save_checkpoint(tmp_path / "step-1", model, twice, groups)
    with pytest.raises(foldpar.CheckpointError, match=r"optimizer is a str: give a torch.optim.Optimizer"):
        foldpar.save_checkpoint(tmp_path / "step-1", model, ["adam"], groups)


def test_each_optimizer_gets_the_parameters_that_it_had(tmp_path: Path) -> None:
    model, groups = small()
    first, second = torch.optim.Adam(model[0].parameters()), torch.optim.AdamW(model[1].parameters())
    stepped(model, first, second)
    foldpar.save_checkpoint(tmp_path / "step-1", model, [first, second], groups)
    swapped = [torch.optim.AdamW(model[0].parameters()), torch.optim.Adam(model[1].parameters())]
    with pytest.raises(foldpar.CheckpointError, match=r"0.weight was trained by Adam, and is given to AdamW here"):
        foldpar.load_checkpoint(tmp_path / "step-1", model, swapped, groups)
    with pytest.raises(foldpar.CheckpointError, match=r"saved with the optimizer Adam \+ AdamW, and this is Adam,"):
        foldpar.load_checkpoint(tmp_path / "step-1", model, first, groups)
    alone = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 1)
    with pytest.raises(foldpar.CheckpointError, match="is of none of the 2 optimizers given"):
        foldpar.load_checkpoint(tmp_path / "step-1", model, [first, second], groups, schedulers=alone)
    assert foldpar.load_checkpoint(tmp_path / "step-1", model, None, groups).optimizer == "Adam + AdamW"


def factored(layout: foldpar.FoldedLayout) -> str:
    with foldpar.create_groups(layout) as groups:
        model = copy.deepcopy(base())
        foldpar.fold_model(model, groups)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
        step(model, [optimizer], 0, range(1), groups)
        foldpar.check_optimizer(model, optimizer, groups)
        for parameter in model.parameters():  # as Adafactor keeps moments of rows
            optimizer.state[parameter]["exp_avg_sq_row"] = torch.zeros(parameter.shape[:-1], dtype=parameter.dtype)
        with pytest.raises(foldpar.CheckpointError) as error:
            foldpar.check_optimizer(model, optimizer, groups)
        return str(error.value)


def test_states_without_a_place_are_refused_after_the_first_step() -> None:
    texts = run_ranks(factored, 2, foldpar.solve_layout(2, tp=2, ep=2), backend="threads")
    assert all("exp_avg_sq_row" in text and "use an optimizer whose states have the shapes" in text for text in texts)


def adafactor(layout: foldpar.FoldedLayout) -> str:
    with foldpar.create_groups(layout) as groups:
        model = copy.deepcopy(base())
        foldpar.fold_model(model, groups)
        optimizer = torch.optim.Adafactor(foldpar.parameter_groups(model), lr=0.1)
        try:
            step(model, [optimizer], 0, range(1), groups)
            foldpar.check_optimizer(model, optimizer, groups)
        except (foldpar.CheckpointError, RuntimeError) as error:
            return str(error)
        return "trains"


def test_adafactor_of_torch_is_refused_in_its_first_step_or_after_it() -> None:
    """By torch, whose DTensors cannot square a row's partial norm in place; or by its states' shapes."""
    for text in run_ranks(adafactor, 2, foldpar.solve_layout(2, tp=2, ep=2), backend="threads"):
        assert "placement" in text or "where such a state belongs in another layout cannot be told" in text


class Codes(Tensor):
    """As torchao's eight-bit states: the parameter's shape, kept as codes and scales."""


def test_states_that_are_no_plain_tensors_are_refused(tmp_path: Path) -> None:
    model, groups = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameter = model[1].weight
    optimizer.state[parameter]["exp_avg"] = torch.zeros(3, 3).as_subclass(Codes)
    text = r"'exp_avg' of 1.weight is a Codes, .* use an optimizer whose states are plain tensors"
    with pytest.raises(foldpar.CheckpointError, match=text):
        foldpar.check_optimizer(model, optimizer, groups)
    with pytest.raises(foldpar.CheckpointError, match=text):
        foldpar.save_checkpoint(tmp_path / "step-1", model, optimizer, groups)
    assert not (tmp_path / "step-1").exists()


# -- Averages of weights ----------------------------------------------------------------------------------------------


def averaged(layout: foldpar.FoldedLayout, folder: str, want: dict[str, Tensor] | None) -> float:
    """An average of four steps, saved; or loaded elsewhere and compared."""
    with foldpar.create_groups(layout) as groups:
        model = copy.deepcopy(base())
        foldpar.fold_model(model, groups)
        average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
        if want is None:
            optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=RATE)
            for number in range(3):
                step(model, [optimizer], number, range(groups.dp.index, groups.dp.index + 1), groups)
                average.update_parameters(model)
            foldpar.save_checkpoint(folder, average.module, None, groups)
            return 0.0
        foldpar.load_checkpoint(folder, average.module, None, groups, random_state=False)
        found = foldpar.whole_state_dict(average.module, groups, on="every rank")
        return max(float((found[name] - value).abs().max()) for name, value in want.items())


@pytest.mark.long
def test_an_average_of_weights_is_that_of_one_process(tmp_path: Path) -> None:
    one = copy.deepcopy(base())
    average = AveragedModel(one, avg_fn=get_ema_avg_fn(0.5))
    optimizer = torch.optim.SGD(one.parameters(), lr=RATE)
    for number in range(3):
        step(one, [optimizer], number, range(2), None)
        average.update_parameters(one)
    folder, want = str(tmp_path / "average"), {name: each.detach() for name, each in average.module.named_parameters()}
    run_ranks(averaged, 4, foldpar.solve_layout(4, tp=2, ep=4), folder, None, backend="threads")
    assert max(run_ranks(averaged, 2, foldpar.solve_layout(2, ep=2), folder, want, backend="threads")) < 1e-10
