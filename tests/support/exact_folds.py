"""The gradients of a folded Hugging Face model beside those of the model itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hf_models import VOCAB
from torch import nn

import foldpar
from foldpar.comm.dtensors import is_dtensor
from foldpar.models.fold import fold_model
from foldpar.testing import run_ranks

LAYOUT = foldpar.solve_layout(2, tp=2, ep=2)

TOKENS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))


def gradients_of(model: nn.Module, groups: foldpar.FoldedGroups | None = None) -> dict[str, torch.Tensor]:
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    if groups is not None:
        foldpar.reduce_gradients(model, groups)
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {name: each.full_tensor() if is_dtensor(each) else each for name, each in found.items()}


def check_exact(model: nn.Module, layout: foldpar.FoldedLayout = LAYOUT, **options: Any) -> None:
    """Every rank has the gradients of one process, under the names of the model."""
    wanted = gradients_of(copy.deepcopy(model))

    def rank() -> dict[str, torch.Tensor]:
        with foldpar.create_groups(layout) as groups:
            mine = copy.deepcopy(model)
            fold_model(mine, groups, **options)
            return gradients_of(mine, groups)

    for found in run_ranks(rank, layout.world, backend="threads"):
        assert sorted(found) == sorted(wanted)
        for name, want in wanted.items():
            error = (found[name].reshape(want.shape) - want).norm() / want.norm()
            assert error < 1e-6, f"{name} is off by {error:.1e}"
