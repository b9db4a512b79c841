"""What is one thing at several places of a model stays one when it is folded, or is refused with that reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from exact_folds import LAYOUT, check_exact
from hf_models import tiny_model
from torch import nn
from toys import name_of

import foldpar
from foldpar.errors import ModelError
from foldpar.models.fold import fold_model
from foldpar.models.known import ExpertWeights, MoEAdapter
from foldpar.models.plan import plan_fold
from foldpar.testing import run_ranks

SLICED = foldpar.solve_layout(4, tp=2, ep=2, etp=2)


def layers(model: Any) -> Any:
    return model.model.layers


def tie_down(model: Any) -> None:
    layers(model)[1].mlp.experts.down_proj = layers(model)[0].mlp.experts.down_proj


def tie_biases(model: Any) -> None:
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        setattr(layers(model)[1].mlp.experts, name, getattr(layers(model)[0].mlp.experts, name))


def share_experts(model: Any) -> None:
    layers(model)[1].mlp.experts = layers(model)[0].mlp.experts


def share_router(model: Any) -> None:
    name = "gate" if hasattr(layers(model)[0].mlp, "gate") else "router"
    setattr(layers(model)[1].mlp, name, getattr(layers(model)[0].mlp, name))


def tie_router(model: Any) -> None:
    layers(model)[1].mlp.gate.weight = layers(model)[0].mlp.gate.weight


def share_block(model: Any) -> None:
    layers(model)[1].mlp = layers(model)[0].mlp


def share_layer(model: Any) -> None:
    layers(model)[1] = layers(model)[0]


def share_attention(model: Any) -> None:
    layers(model)[1].self_attn = layers(model)[0].self_attn


def tie_projections(model: Any) -> None:
    first, second = (layer.self_attn for layer in layers(model))
    for name in ("q_proj", "o_proj"):
        getattr(second, name).weight = getattr(first, name).weight


def tie_norms(model: Any) -> None:
    first, second = layers(model)
    second.input_layernorm.weight = first.input_layernorm.weight
    second.self_attn.q_norm.weight = first.self_attn.q_norm.weight


TIES: list[tuple[str, Callable[[Any], None]]] = [
    ("qwen3_moe", tie_down),
    ("qwen3_moe", share_layer),
    ("qwen3_moe", tie_projections),
    ("gpt_oss", tie_biases),
]
MORE_TIES: list[tuple[str, Callable[[Any], None]]] = [
    *[("qwen3_moe", tie) for tie in (share_experts, share_router, tie_router, share_block, share_attention, tie_norms)],
    ("gpt_oss", share_layer),
    ("mixtral", share_experts),
    ("granitemoe", tie_projections),
]


@pytest.mark.parametrize(("family", "tie"), TIES, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_shared_between_depths_stays_one_and_is_exact(family: str, tie: Callable[[Any], None]) -> None:
    model = tiny_model(family)
    tie(model)
    check_exact(model)


@pytest.mark.long
@pytest.mark.parametrize("layout", [LAYOUT, SLICED], ids=name_of)
@pytest.mark.parametrize(("family", "tie"), [*TIES, *MORE_TIES], ids=lambda value: getattr(value, "__name__", value))
def test_everything_that_is_shared_stays_one(
    family: str, tie: Callable[[Any], None], layout: foldpar.FoldedLayout
) -> None:
    model = tiny_model(family)
    tie(model)
    check_exact(model, layout)


def test_a_block_of_another_forward_that_is_shared_stays_one() -> None:
    model = tiny_model("llama4", moe_layers=[0, 1])
    layers(model)[1].feed_forward = layers(model)[0].feed_forward
    check_exact(model, foldpar.solve_layout(2, ep=2))
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        fold_model(model, groups)
    assert layers(model)[0].feed_forward is layers(model)[1].feed_forward


def test_the_exactness_sees_an_untied_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    tie_down(model)
    kept = foldpar.models.fold._folded

    def untied(*given: Any, **options: Any) -> Any:
        given[2].weights.clear()
        return kept(*given, **options)

    monkeypatch.setattr(foldpar.models.fold, "_folded", untied)
    with pytest.raises(Exception, match=r"Folding did not give what was planned|assert"):
        check_exact(model)


# -- What cannot stay one ---------------------------------------------------------------------------------------------


def tie_norm_to_queries(model: Any) -> None:
    layers(model)[0].input_layernorm = nn.RMSNorm(8)
    layers(model)[0].input_layernorm.weight = layers(model)[0].self_attn.q_norm.weight


def tie_router_to_dense(model: Any) -> None:
    model.extra = nn.Linear(16, 4, bias=False)
    model.extra.weight = layers(model)[0].mlp.gate.weight


def tie_experts_to_dense(model: Any) -> None:
    model.extra = nn.Module()
    model.extra.weight = layers(model)[0].mlp.experts.down_proj


def tie_columns_to_rows(model: Any) -> None:
    attention = layers(model)[0].self_attn
    attention.o_proj.weight = nn.Parameter(attention.q_proj.weight.T.contiguous())
    model.extra = nn.Linear(16, 32, bias=False)
    model.extra.weight = attention.q_proj.weight


@pytest.mark.parametrize(
    ("tie", "text"),
    [
        (tie_norm_to_queries, r"q_norm.weight and model.layers.0.input_layernorm.weight are one tensor, and folding"),
        (tie_router_to_dense, r"layers.0.mlp.gate.weight and extra.weight are one tensor, and folding would treat it"),
        (tie_experts_to_dense, r"experts.down_proj and extra.weight are one tensor, and folding would treat it in two"),
        (
            tie_columns_to_rows,
            r"q_proj.weight and extra.weight are one tensor, which would be sharded as 'columns' and",
        ),
    ],
)
def test_what_cannot_stay_one_is_refused_with_that_reason(tie: Callable[[Any], None], text: str) -> None:
    model = tiny_model("qwen3_moe")
    tie(model)
    before = dict(model.named_parameters())

    def rank() -> None:
        with foldpar.create_groups(LAYOUT) as groups, pytest.raises(ModelError, match=text):
            fold_model(copy.deepcopy(model), groups)
        with foldpar.create_groups(LAYOUT) as groups, pytest.raises(ModelError):
            fold_model(model, groups)

    run_ranks(rank, 2, backend="threads")
    assert all(before[name] is each for name, each in model.named_parameters())


def test_ties_of_weights_that_an_adapter_makes_anew_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    tie_down(model)
    adapter = MoEAdapter(
        "Qwen3MoeSparseMoeBlock", weights=lambda experts: ExpertWeights(experts.gate_up_proj, experts.down_proj)
    )
    with pytest.raises(ModelError, match=r"experts.down_proj and .* are one tensor. The adapter's weights makes new"):
        plan_fold(model, LAYOUT, adapters=(adapter,))
