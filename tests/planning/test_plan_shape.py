"""A model as numbers: the weights of a shape are those that plan_fold finds in the model itself."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

import foldpar
from foldpar.errors import ModelError
from foldpar.planning import LatentAttention, ModelShape, read_model
from foldpar.planning.model_files import MODEL_TYPES

FOLDED = [name for name in MODEL_TYPES if name in FAMILIES]
DEGREES = [{}, {"tp": 2, "ep": 4}, {"tp": 4, "ep": 2, "etp": 2}]
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FOLDED)
def test_weights_and_local_shapes_are_those_of_plan_fold(name, tied):
    with torch.device("meta"):
        model = FAMILIES[name].make(tie_word_embeddings=tied)
    shape = read_model(model.config.to_dict())
    for degrees in DEGREES:
        layout = foldpar.solve_layout(4, **degrees)
        planned = {row.name: (row.shape, row.local_shape) for row in foldpar.plan_fold(model, layout).rows}
        assert {weight.name: (weight.shape, weight.local_shape(layout)) for weight in shape.weights()} == planned
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_padding_token_keeps_the_embedding_whole():
    with torch.device("meta"):
        model = FAMILIES["mixtral"].make(pad_token_id=0)
    layout = foldpar.solve_layout(2, tp=2)
    planned = {row.name: row.local_shape for row in foldpar.plan_fold(model, layout).rows}
    assert {each.name: each.local_shape(layout) for each in read_model(model.config.to_dict()).weights()} == planned


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_what_a_file_leaves_out_is_its_class_default(name):
    sizes = {
        "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 32, "vocab_size": 96, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    known = AutoConfig.for_model(name).to_dict()
    given = {"model_type": name, **{key: size for key, size in sizes.items() if key in known}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    wanted = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in read_model(given).weights()} == wanted


def test_a_config_is_read_from_a_folder_a_file_and_a_mapping(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    shapes = [read_model(source) for source in (tmp_path, str(tmp_path / "config.json"), QWEN3_30B)]
    assert len(set(shapes)) == 1
    assert round(shapes[0].parameters / 1e9, 1) == 30.5
    assert round(shapes[0].active_parameters / 1e9, 1) == 3.4


DEEPSEEK_V2 = {
    "model_type": "deepseek_v2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "intermediate_size": 48, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "first_k_dense_replace": 3, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def test_a_model_of_fewer_layers_than_dense_ones_is_dense():
    """A cut of a model, as transformers reads it."""
    assert read_model(DEEPSEEK_V2).moe_layers == ()


NUMBERS = {"hidden": 64, "layers": 2, "heads": 4, "vocab": 100}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ModelShape(**{**NUMBERS, "heads": 0}), "heads = 0 is not a positive integer"),
        (lambda: ModelShape(**NUMBERS), "experts = 0, so intermediate, the width of a dense layer, must be positive"),
        (lambda: ModelShape(**NUMBERS, top_k=2, intermediate=8), "Say experts too, or none of them"),
        (lambda: ModelShape(**NUMBERS, experts=4, top_k=5, expert_hidden=8), "top_k = 5 is more than experts = 4"),
        (lambda: ModelShape(**NUMBERS, experts=4, top_k=2), "expert_hidden = 0 is not a positive integer"),
        (lambda: ModelShape(**NUMBERS, kv_heads=3, intermediate=8), "kv_heads = 3 does not divide heads = 4"),
        (lambda: ModelShape(**{**NUMBERS, "hidden": 63}, intermediate=8), "say head_dim too"),
        (lambda: ModelShape(**NUMBERS, intermediate=8, dense_layers=(2,)), "are not all layers 0 to 1"),
        (lambda: read_model({"model_type": "mixtrall"}), "the nearest is mixtral"),
        (lambda: read_model({"model_type": "mixtral"}), "a mixtral needs num_local_experts or num_experts"),
        (
            lambda: read_model({**QWEN3_30B, "num_hidden_layers": "48"}),
            "num_hidden_layers = '48' is not a positive integer",
        ),
        (lambda: read_model({**QWEN3_30B, "decoder_sparse_step": 0}), "decoder_sparse_step = 0 is to be a positive"),
        (lambda: read_model({**QWEN3_30B, "mlp_only_layers": ["1"]}), "a list of layers"),
        (
            lambda: ModelShape(**NUMBERS, intermediate=8, latent=LatentAttention(0, -3, 4, 4, 4)),
            "latent.kv_rank = -3 is not a positive integer",
        ),
        (lambda: ModelShape(**{**NUMBERS, "vocab": 10**400}), "vocab = 10+ is more than a plan counts with"),
        (lambda: ModelShape(**{**NUMBERS, "layers": 10**9}), "which is 10,000"),
        (lambda: ModelShape(**NUMBERS, intermediate=8, dense_layers=1), "dense_layers = 1 is not a tuple"),
        (lambda: ModelShape(**NUMBERS, intermediate=8, tied="false"), "tied = 'false' is neither True nor False"),
        (lambda: ModelShape(**NUMBERS, intermediate=8, latent=4), "latent = 4 is neither None nor a LatentAttention"),
        (lambda: read_model({**QWEN3_30B, "hidden_size": -1}), "hidden_size = -1 is not a positive integer"),
        (lambda: read_model({**QWEN3_30B, "num_hidden_layers": 10**9}), "which is 10,000"),
        (lambda: read_model({**QWEN3_30B, "tie_word_embeddings": "false"}), "= 'false' can be true or false"),
        (lambda: read_model({**DEEPSEEK_V2, "mlp_bias": True}), "with mlp_bias are not known to the planner"),
        (lambda: read_model({**DEEPSEEK_V2, "attention_bias": True}), "with attention_bias is not known"),
        (lambda: read_model("nowhere/config.json"), "does not exist"),
        (lambda: read_model(3), "and not 3"),
    ],
)
def test_numbers_that_are_none_are_refused_in_words(make, text):
    with pytest.raises(ModelError, match=text):
        make()


def test_a_file_that_is_no_json_is_refused(tmp_path):
    for text in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="is not a JSON file"):
            read_model(tmp_path)
