"""A name in an adapter that matches nothing is an error with the nearest one, and no raw error leaves ``plan_fold``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand_made import HAND_MADE, Model
from hf_models import tiny_model
from toys import name_of

import foldpar
from foldpar.errors import ModelError
from foldpar.models.known import ExpertWeights, MoEAdapter
from foldpar.models.plan import plan_fold

LAYOUTS = (foldpar.solve_layout(1), foldpar.solve_layout(2, tp=2, ep=2))
QWEN = "Qwen3MoeSparseMoeBlock"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize(
    ("given", "name", "nearest"),
    [
        ({"tp_plan": {"attn.qq": "colwise"}}, "'attn.qq' in its tp_plan", "self_attn."),
        ({"tp_plan": {"self_attn.q_prj": "colwise"}}, "'self_attn.q_prj' in its tp_plan", "'self_attn.q_proj'"),
        ({"tp_plan": {"layers.*.mlp.shared": "colwise"}}, "'layers.*.mlp.shared' in its tp_plan", "layers.*.mlp."),
        ({"partial": ("foo",)}, "'foo' in its partial", "'"),
        ({"partial": ("q_norm", "k_nrm")}, "'k_nrm' in its partial", "'k_norm'"),
        ({"whole": ("kv_a_layernorm",)}, "'kv_a_layernorm' in its whole", "layernorm"),
        ({"routers": ("rooter",)}, "'rooter' in its routers", "'"),
        ({"routers": ("gate", "rooter")}, "'rooter' in its routers", "'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_a_key_that_matches_nothing_is_an_error_with_the_nearest_name(
    given: dict[str, Any], name: str, nearest: str, layout: foldpar.FoldedLayout
) -> None:
    with pytest.raises(ModelError) as raised:
        plan_fold(tiny_model("qwen3_moe"), layout, adapters=(MoEAdapter(QWEN, **given),))
    text = str(raised.value)
    assert text.startswith(f"The adapter for {QWEN} has {name}, which matches nothing in this model, so it would do ")
    assert nearest in text.partition("The nearest is ")[2].partition(";")[0]


def test_a_block_that_is_nowhere_is_an_error_with_the_nearest_class() -> None:
    with pytest.raises(ModelError, match=r"'Qwen3MoeSparseBlock' in its block, .* The nearest is 'Qwen3MoeSparseMoeBl"):
        plan_fold(tiny_model("qwen3_moe"), LAYOUTS[0], adapters=(MoEAdapter("Qwen3MoeSparseBlock"),))
    plan_fold(tiny_model("qwen3_moe"), LAYOUTS[0], adapters=(MoEAdapter((QWEN, "Another")),))


def test_what_another_stage_may_have_is_left_alone() -> None:
    adapter = MoEAdapter(QWEN, tp_plan={"elsewhere.q_proj": "colwise"}, routers=("elsewhere",))
    plan_fold(tiny_model("qwen3_moe"), foldpar.solve_layout(2, pp=2), adapters=(adapter,))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"partial": "q_norm"}, r"partial is a tuple of names, such as \('q_norm',\), and not 'q_norm'"),
        ({"routers": "gate"}, r"routers is a tuple of names, such as \('gate',\)"),
        ({"whole": (3,)}, r"whole is a tuple of names"),
        ({"tp_plan": ["q_proj"]}, r"tp_plan is a dict of names to styles"),
        ({"tp_plan": {"q_proj": ["colwise"]}}, r"tp_plan is a dict of names to styles"),
        ({"experts": 3}, r"experts is the name of a child"),
        ({"storage": "transposed"}, r"storage is an ExpertStorage"),
        ({"weights": 3}, r"weights is a function"),
        ({"block": 3}, r"takes the name of a block's class"),
        ({"block": ()}, r"takes the name of a block's class"),
    ],
    ids=name_of,
)
def test_an_adapter_of_wrong_types_is_not_made(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        MoEAdapter(**{"block": "HandMade", **given})


@pytest.mark.parametrize("adapters", [HAND_MADE, "HandMade", 3, None, (HAND_MADE, "HandMade"), [None]], ids=name_of)
def test_adapters_of_wrong_types_are_teaching_errors(adapters: Any) -> None:
    with pytest.raises(ModelError, match=r"^adapters (is a tuple|holds)"):
        plan_fold(Model(), LAYOUTS[0], adapters=adapters)


@pytest.mark.parametrize(
    "weights",
    [
        lambda experts: (experts.w1, experts.w2),
        lambda experts: None,
        lambda experts: ExpertWeights(experts.w1, None),
        lambda experts: torch.cat([experts.w1, None]),
        lambda experts: experts.nothing,
        lambda: None,
    ],
)
def test_weights_that_go_wrong_are_teaching_errors(weights: Any) -> None:
    adapter = MoEAdapter("HandMade", experts="specialists", routers=("chooser",), weights=weights, activation="swiglu")
    with pytest.raises(ModelError, match=r"The weights of the adapter for HandMade"):
        plan_fold(Model(), LAYOUTS[0], adapters=(adapter,))


@pytest.mark.parametrize("act_fn", [lambda x, y: x, 3, "silu", torch.nn.Bilinear(1, 1, 1)], ids=name_of)
def test_an_activation_of_another_kind_is_a_teaching_error(act_fn: Any) -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    del experts.act_fn
    experts.act_fn = act_fn
    with pytest.raises(ModelError, match=r"act_fn|activation"):
        plan_fold(model, LAYOUTS[0])


def test_a_style_of_another_type_in_a_models_plan_is_a_teaching_error() -> None:
    model = tiny_model("mixtral")
    model._tp_plan["model.layers.*.self_attn.q_proj"] = ["colwise"]
    with pytest.raises(ModelError, match=r"has the tensor-parallel style \['colwise'\]"):
        plan_fold(model, LAYOUTS[1])


def test_what_cannot_be_copied_is_planned_all_the_same() -> None:
    import threading

    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.lock = threading.Lock()
    plan_fold(model, LAYOUTS[1])
