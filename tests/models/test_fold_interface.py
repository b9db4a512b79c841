"""Blocks that nobody named fold by transformers' experts interface, over ep and etp; over tp nobody has proven them."""

from __future__ import annotations

import pytest
import torch
from fold_parity import Case, worst
from hf_models import FAMILIES, tiny_model

import foldpar
from foldpar.errors import ModelError
from foldpar.models import known, plan

LAYOUTS = [{"tp": 1, "ep": 4}, {"tp": 1, "ep": 2, "etp": 2}]


@pytest.fixture
def nobody_named_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "DEFAULT_ADAPTERS", ())


@pytest.mark.usefixtures("nobody_named_them")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_interface_is_enough(family: str) -> None:
    """Gated and plain, concatenated and interleaved, with biases and without."""
    error, name = worst(Case(family, tp=1, ep=2, etp=2, steps=1))
    assert error < 1e-10, name


@pytest.mark.usefixtures("nobody_named_them")
@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llama4", "jetmoe")])
def test_the_interface_is_enough_for_every_family(family: str, layout: dict[str, int]) -> None:
    error, name = worst(Case(family, **layout, steps=2))
    assert error < 1e-10, name


@pytest.mark.usefixtures("nobody_named_them")
def test_over_lanes_nobody_has_proven_the_rest() -> None:
    model = tiny_model("qwen3_moe")
    foldpar.plan_fold(model, foldpar.solve_layout(4, ep=4))
    text = r"known by its experts alone.* tp = 2: .* With tp = 1 it can be .*MoEAdapter\('Qwen3MoeSparseMoeBlock'"
    with pytest.raises(ModelError, match=text):
        foldpar.plan_fold(model, foldpar.solve_layout(4, tp=2, ep=4))
    named = known.MoEAdapter("Qwen3MoeSparseMoeBlock")
    foldpar.plan_fold(model, foldpar.solve_layout(4, tp=2, ep=4), adapters=(named,))


def test_a_norm_behind_each_expert_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    block = model.model.layers[0].mlp
    block.experts.has_post_expert_norm = True
    block.__class__ = type("Unnamed", (torch.nn.Module,), {"forward": type(block).forward})
    with pytest.raises(ModelError, match=r"Unnamed\) cannot be folded: each expert has a norm behind it"):
        foldpar.plan_fold(model, foldpar.solve_layout(1))
