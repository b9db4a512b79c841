"""A checkpoint that was written when experts were plain tensors, by world 2 with TP2/ETP2, loads in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldpar
from foldpar import families
from foldpar.parameters.placements import parameter_placements
from foldpar.testing import run_ranks

CHECKPOINT = Path(__file__).parent / "data" / "checkpoint-before-dtensors"


class Saved(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(4), experts

    def forward(self) -> None:
        """So that it can be a unit of FSDP2."""


def model_and_optimizer(groups: foldpar.FoldedGroups, seed: int, stage: int = 0) -> tuple[nn.Module, Any]:
    experts = foldpar.GroupedExperts(4, 4, 4, groups, bias=True, seed=seed)
    model = foldpar.mark_parameters(Saved(experts), families.REPLICATED)
    if stage:
        foldpar.shard_model(model, groups, stage=stage)
    return model, torch.optim.AdamW(foldpar.parameter_groups(model), lr=0.1)


def loaded(layout: foldpar.FoldedLayout, stage: int) -> list[tuple[Any, Tensor, Tensor]]:
    with foldpar.create_groups(layout) as groups:
        model, optimizer = model_and_optimizer(groups, seed=9, stage=stage)
        info = foldpar.load_checkpoint(CHECKPOINT, model, optimizer, groups)
        assert (info.step, info.extra, info.layout.etp) == (7, {"note": "old"}, 2)
        return [
            (
                placement.share,
                placement.local(placement.parameter.detach()).clone(),
                placement.local(optimizer.state[placement.parameter]["exp_avg"]).clone(),
            )
            for placement in parameter_placements(model, groups)
        ]


def written() -> list[tuple[Tensor, Tensor]]:
    """What the run did that wrote it: one step, with every parameter as its own gradient."""
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        model, optimizer = model_and_optimizer(groups, seed=3)
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        return [(each.detach(), optimizer.state[each]["exp_avg"]) for each in model.parameters()]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("degrees", [{"tp": 2, "etp": 2}, {"ep": 2}, {"tp": 2}])
def test_it_loads_in_any_layout(degrees: dict[str, int], stage: int) -> None:
    layout = foldpar.solve_layout(2, **degrees)
    for rank in run_ranks(loaded, 2, layout, stage):
        for (share, weight, average), (want, want_average) in zip(rank, written(), strict=True):
            for box in share.boxes:
                here = tuple(slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))
                there = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
                torch.testing.assert_close(weight[here], want[there], rtol=1e-6, atol=1e-7)
                torch.testing.assert_close(average[here], want_average[there], rtol=1e-6, atol=1e-7)
