"""A folded Hugging Face model saves what the untouched one loads, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import foldpar
import foldpar.comm.dtensors
from foldpar.checkpoint import load_checkpoint, save_checkpoint
from foldpar.testing import run_ranks

pytest.importorskip("transformers")
hf_models = pytest.importorskip("hf_models")

from foldpar.models.fold import fold_model  # noqa: E402

FOLDABLE = [family for family in hf_models.FAMILIES if family != "jetmoe"]  # the one family that cannot be folded
pytestmark = pytest.mark.long


def model_of(family: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return hf_models.FAMILIES[family].make().double()


def folded_there_and_back(family: str, layout: foldpar.FoldedLayout, folder: Path) -> None:
    with foldpar.create_groups(layout) as groups:
        model, other = model_of(family, 0), model_of(family, 1)
        fold_model(model, groups)
        fold_model(other, groups)
        save_checkpoint(folder / "folded", model, None, groups)
        load_checkpoint(folder / "folded", other, None, groups)
        for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            one, two = (foldpar.comm.dtensors.local_tensor(tensor) for tensor in (one, two))
            assert torch.equal(one, two), name


@pytest.mark.parametrize("degrees", [{"tp": 2, "ep": 4}, {"tp": 2, "ep": 2, "etp": 2}], ids=str)
@pytest.mark.parametrize("family", FOLDABLE)
def test_the_untouched_model_loads_what_its_folded_one_saved(tmp_path, family, degrees):
    run_ranks(folded_there_and_back, 4, family, foldpar.solve_layout(4, **degrees), tmp_path, timeout=200.0)
    want, model = model_of(family, 0), model_of(family, 1)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        load_checkpoint(tmp_path / "folded", model, None, groups)
    for (name, one), two in zip(model.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
