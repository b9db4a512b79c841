"""What is said of a sharded attention holds where it was sharded, and only there."""

from __future__ import annotations

from typing import Any

import pytest
from exact_folds import check_exact
from hf_models import tiny_model

import foldpar
import foldpar.models.dense_plan
from foldpar.errors import ModelError
from foldpar.models.known import MoEAdapter
from foldpar.models.plan import plan_fold

LAYOUT = foldpar.solve_layout(2, tp=2, ep=2)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_b_proj", "kv_b_proj", "o_proj")
BLOCKS = {
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
    "qwen3_next": "Qwen3NextSparseMoeBlock",
    "qwen3_5_moe": "Qwen3_5MoeSparseMoeBlock",
    "dots1": "Dots1MoE",
    "exaone_moe": "ExaoneMoeSparseMoEBlock",
    "glm4_moe": "Glm4MoeMoE",
    "gpt_oss": "GptOssMLP",
    "deepseek_v3": "DeepseekV3MoE",
}


def whole_attention(family: str, *, projections: tuple[str, ...] = PROJECTIONS) -> Any:
    """With 'replicate' for the projections in the model's plan, as the error about heads advises."""
    model = tiny_model(family)
    for name in projections:
        model._tp_plan[f"model.layers.*.self_attn.{name}"] = "replicate"
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "dots1"])
def test_a_whole_attention_is_exact(family: str) -> None:
    check_exact(whole_attention(family), LAYOUT)


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe", "exaone_moe", "glm4_moe"])
def test_a_whole_attention_is_exact_in_more_families(family: str) -> None:
    check_exact(whole_attention(family), LAYOUT)


def test_three_heads_for_two_lanes_are_exact_after_the_advice() -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 1}
    with pytest.raises(foldpar.ShapeError, match="the style 'replicate' in an adapter's tp_plan"):
        plan_fold(tiny_model("qwen3_moe", **sizes), LAYOUT)
    advice = MoEAdapter(BLOCKS["qwen3_moe"], tp_plan={f"self_attn.{name}": "replicate" for name in PROJECTIONS})
    check_exact(tiny_model("qwen3_moe", **sizes), LAYOUT, adapters=(advice,))


def test_sinks_stay_whole_with_their_heads() -> None:
    whole = {f"self_attn.{name}": "replicate" for name in PROJECTIONS}
    adapter = next(each for each in foldpar.models.known.DEFAULT_ADAPTERS if "GptOssMLP" in each.blocks)
    from dataclasses import replace

    adapter = replace(adapter, tp_plan={**whole, "self_attn.sinks": "colwise"})
    rows = {row.name: row for row in plan_fold(tiny_model("gpt_oss"), LAYOUT, adapters=(adapter,)).rows}
    row = rows["model.layers.0.self_attn.sinks"]
    assert (row.action, row.family.name, row.reason) == ("whole", "replicated", "the heads beside it are left whole")
    check_exact(tiny_model("gpt_oss"), LAYOUT, adapters=(adapter,))


def test_one_sharded_layer_of_two_is_told_apart() -> None:
    """The first attention is whole, the second sharded: their gains belong to two families."""
    model = tiny_model("qwen3_moe")
    adapter = MoEAdapter(
        BLOCKS["qwen3_moe"], tp_plan={f"layers.0.self_attn.{name}": "replicate" for name in PROJECTIONS}
    )
    rows = {row.name: row.family.name for row in plan_fold(model, LAYOUT, adapters=(adapter,)).rows}
    assert rows["model.layers.0.self_attn.q_norm.weight"] == "replicated"
    assert rows["model.layers.1.self_attn.q_norm.weight"] == "replicated_partial"
    check_exact(model, LAYOUT, adapters=(adapter,))


def test_latents_in_front_of_whole_heads_are_exact() -> None:
    adapter = MoEAdapter(
        BLOCKS["deepseek_v3"],
        tp_plan={
            **{f"self_attn.{name}": "replicate" for name in LATENT},
            "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        },
    )
    check_exact(tiny_model("deepseek_v3"), LAYOUT, adapters=(adapter,))


def test_rows_without_columns_are_refused() -> None:
    adapter = MoEAdapter(
        BLOCKS["qwen3_moe"], tp_plan={f"self_attn.{name}": "replicate" for name in ("q_proj", "k_proj", "v_proj")}
    )
    with pytest.raises(ModelError, match=r"self_attn.o_proj is sharded by rows, so it takes the lane's own columns, "):
        plan_fold(tiny_model("qwen3_moe"), LAYOUT, adapters=(adapter,))


def test_the_exactness_sees_a_guess_about_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldpar.models.dense_plan, "_is_inside", lambda name, regions: True)
    with pytest.raises(AssertionError, match=r"_norm.weight is off by"):
        check_exact(whole_attention("qwen3_moe"), LAYOUT)
