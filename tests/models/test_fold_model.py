"""What ``plan_fold`` says, what ``fold_model`` leaves, generation, and what both refuse."""

from __future__ import annotations

import ast
import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import BRIEFLY, FAMILIES, VOCAB, tiny_model
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.errors import ModelError, ShapeError
from foldpar.models.fold import fold_model
from foldpar.models.known import MoEAdapter
from foldpar.models.plan import plan_fold
from foldpar.moe import ExpertShare
from foldpar.testing import run_ranks

LAYOUT = foldpar.solve_layout(4, tp=2, ep=4)
SLICED = foldpar.solve_layout(4, tp=2, ep=2, etp=2)
FOLDABLE = [family for family in FAMILIES if family not in ("jetmoe", *BRIEFLY)]


def on_meta(family: str, **overrides: Any) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[family].make(**overrides)


def local_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Gate and up of sliced experts as one dimension, as the plan speaks of them."""
    found = {}
    for path, module in model.named_modules():
        pairs = module.pairs if isinstance(module, ExpertShare) else {}
        for name, parameter in module.named_parameters(recurse=False):
            part = local_tensor(parameter)
            part = part.flatten(pairs[name], pairs[name] + 1) if name in pairs else part
            found[f"{path}.{name}"] = tuple(part.shape)
    return {name: found[name] for name, _ in model.named_parameters()}


# -- The plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOLDABLE)
def test_the_plan_of_a_model_without_numbers_is_what_folding_does(family: str) -> None:
    planned = plan_fold(on_meta(family), SLICED)
    model = tiny_model(family)
    names = list(model.state_dict())

    def fold() -> tuple[Any, list[str], dict[str, tuple[int, ...]], dict[str, str]]:
        with foldpar.create_groups(SLICED) as groups:
            mine = copy.deepcopy(model)
            done = fold_model(mine, groups)
            families = {name: each.name for name, each in foldpar.parameter_families(mine, groups).items()}
            return done, list(mine.state_dict()), local_shapes(mine), families

    for done, folded_names, shapes, families in run_ranks(fold, 4, backend="threads"):
        assert done == planned
        assert sorted(folded_names) == sorted(names)
        assert shapes == {row.name: row.local_shape for row in planned.rows}
        assert families == {row.name: row.family.name for row in planned.rows}
    assert list(local_shapes(model)) == [name for name, _ in model.named_parameters()]  # the plan touched nothing


def test_folding_a_model_without_numbers_leaves_it_without_and_of_this_ranks_shapes() -> None:
    def fold() -> tuple[Any, dict[str, tuple[int, ...]], set[str]]:
        with foldpar.create_groups(LAYOUT) as groups:
            model = on_meta("qwen3_moe")
            plan = fold_model(model, groups)
            return plan, local_shapes(model), {parameter.device.type for parameter in model.parameters()}

    for plan, shapes, devices in run_ranks(fold, 4, backend="threads"):
        assert shapes == {row.name: row.local_shape for row in plan.rows}
        assert devices == {"meta"}


def test_a_model_of_real_size_is_planned_in_seconds() -> None:
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 48}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    model = on_meta("qwen3_moe", **sizes, **heads, num_experts=128, num_experts_per_tok=8, vocab_size=151936)
    start = time.monotonic()
    plan = plan_fold(model, foldpar.solve_layout(16, tp=4, ep=8, etp=2))
    assert time.monotonic() - start < 5
    rows = {row.name: row for row in plan.rows}
    experts = rows["model.layers.47.mlp.experts.gate_up_proj"]
    assert (experts.shape, experts.local_shape) == ((128, 1536, 2048), (16, 768, 2048))
    assert rows["model.layers.47.mlp.experts.down_proj"].local_shape == (16, 2048, 384)
    assert rows["model.layers.0.self_attn.k_proj.weight"].local_shape == (128, 2048)
    assert sum(torch.Size(row.shape).numel() for row in plan.rows) == 30_532_122_624
    assert json.loads(plan.to_json())["rows"][0]["name"] == "model.embed_tokens.weight"


def test_the_plan_reads_as_a_table() -> None:
    lines = str(plan_fold(on_meta("mixtral"), LAYOUT)).splitlines()
    assert lines[0].startswith("MixtralForCausalLM on world=4 tp=2 cp=1 dp=2 pp=1, ep=4 etp=1 edp=1: a rank holds ")
    cells = [re.split(r"  +", line) for line in lines[1:]]
    assert cells[0] == ["parameter", "of", "done", "shape", "on a rank", "family"]
    name, rest = "model.layers.*.self_attn.q_proj.weight x2", ["[32, 16]", "[16, 16]", "dense_sharded"]
    assert [name, "Linear", "by columns", *rest] in cells
    name, rest = "model.layers.*.mlp.experts.down_proj x2", ["[4, 16, 8]", "[1, 16, 8]", "routed_expert"]
    assert [name, "MixtralExperts", "1 of 4 experts", *rest] in cells


def test_the_plan_says_what_stays_whole_and_why() -> None:
    left = plan_fold(on_meta("mixtral", vocab_size=33, pad_token_id=0), LAYOUT).left_whole
    assert left == {
        "model.embed_tokens.weight": "an embedding with padding_idx",
        "lm_head.weight": "tp = 2 does not divide 33",
    }
    tied = plan_fold(on_meta("mixtral", pad_token_id=0, tie_word_embeddings=True), LAYOUT).left_whole
    assert tied == {"model.embed_tokens.weight": "an embedding with padding_idx"}
    assert plan_fold(on_meta("mixtral", vocab_size=33), foldpar.solve_layout(4, ep=4)).left_whole == {}


def test_a_stage_around_a_model_uses_the_models_plan() -> None:
    model = on_meta("qwen3_moe")
    del model.lm_head, model.model.norm, model.model.layers[1]
    rows = {row.name: row for row in plan_fold(nn.ModuleDict({"stage": model.model}), LAYOUT).rows}
    assert rows["stage.layers.0.self_attn.q_proj.weight"].action == "by columns"
    assert rows["stage.embed_tokens.weight"].action == "by vocabulary"


def test_linear_attention_without_a_plan_stays_whole() -> None:
    model = on_meta("qwen3_next")
    model._tp_plan = {name: style for name, style in model._tp_plan.items() if "linear_attn" not in name}
    left = plan_fold(model, LAYOUT).left_whole
    assert left["model.layers.0.linear_attn.out_proj.weight"] == "no style in the plan"


def test_lanes_share_the_heads_of_keys_where_there_are_fewer() -> None:
    layout = foldpar.solve_layout(4, tp=4, ep=4)
    row = {row.name: row for row in plan_fold(on_meta("qwen3_moe"), layout).rows}[
        "model.layers.0.self_attn.k_proj.weight"
    ]
    assert (row.action, row.local_shape, row.family.name) == ("whole, one head used", (16, 16), "replicated_partial")

    def fold() -> tuple[int, int, int]:
        with foldpar.create_groups(layout) as groups:
            model = on_meta("qwen3_moe")
            fold_model(model, groups)
            attention = model.model.layers[0].self_attn
            keys = attention.k_proj(torch.zeros(1, 16, device="meta"))
            return keys.shape[-1], attention.k_proj.own.start, attention.num_key_value_groups

    assert run_ranks(fold, 4, backend="threads") == [(8, 0, 1), (8, 0, 1), (8, 8, 1), (8, 8, 1)]


def test_a_projection_to_few_heads_that_is_more_than_a_product_is_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = tiny_model("qwen3_moe")
    model.model.layers[1].self_attn.v_proj.__class__ = Doubled
    plan_fold(model, foldpar.solve_layout(2, tp=2, ep=2))
    text = r"v_proj is a Doubled with a forward of its own, and with tp = 4 .* tp can be 1 or 2 here, or"
    with pytest.raises(ModelError, match=text):
        plan_fold(model, foldpar.solve_layout(4, tp=4, ep=4))


def test_ids_that_are_not_in_the_vocabulary_are_refused_as_in_one_process() -> None:
    def look_up(token: int) -> None:
        with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
            model = tiny_model("qwen3_moe")
            fold_model(model, groups)
            embedding = model.get_input_embeddings()
            embedding(torch.tensor([[0, VOCAB - 1]]))
            with pytest.raises(IndexError, match="out of range"):
                embedding(torch.tensor([[3, token]]))

    for token in (-1, VOCAB, -100):
        run_ranks(look_up, 2, token, backend="threads")


def test_the_model_inside_refuses_what_the_model_does() -> None:
    def refuse() -> None:
        with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
            model = tiny_model("qwen3_moe")
            fold_model(model, groups)
            for each in (model, model.model):
                with pytest.raises(ModelError, match="save_pretrained cannot be used on a folded model"):
                    each.save_pretrained("nowhere")
                with pytest.raises(ModelError, match="resize_token_embeddings cannot be used on a folded model"):
                    each.resize_token_embeddings(40)

    run_ranks(refuse, 2, backend="threads")


def test_tied_embeddings_are_one_sharded_parameter() -> None:
    model = tiny_model("mixtral", tie_word_embeddings=True)

    def fold() -> bool:
        with foldpar.create_groups(LAYOUT) as groups:
            mine = copy.deepcopy(model)
            fold_model(mine, groups)
            assert mine.lm_head.weight.to_local().shape == (VOCAB // 2, 16)
            return mine.lm_head.weight is mine.model.embed_tokens.weight

    assert run_ranks(fold, 4, backend="threads") == [True] * 4


def test_hooks_and_references_of_the_embedding_stay() -> None:
    def fold() -> tuple[bool, int]:
        with foldpar.create_groups(LAYOUT) as groups:
            model, calls = tiny_model("mixtral"), []
            embedding = model.get_input_embeddings()
            embedding.register_forward_hook(lambda *arguments: calls.append(1))
            fold_model(model, groups)
            model(input_ids=torch.tensor([[3, 4]]))
            return model.get_input_embeddings() is embedding, len(calls)

    assert run_ranks(fold, 4, backend="threads") == [(True, 1)] * 4


def test_frozen_parameters_stay_frozen() -> None:
    model = tiny_model("gpt_oss")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("gate_up_proj", "router", "norm")))

    def fold() -> bool:
        with foldpar.create_groups(LAYOUT) as groups:
            mine = copy.deepcopy(model)
            fold_model(mine, groups)
            return {name: each.requires_grad for name, each in mine.named_parameters()} == {
                name: each.requires_grad for name, each in model.named_parameters()
            }

    assert run_ranks(fold, 4, backend="threads") == [True] * 4


def test_attentions_that_count_heads_count_their_own() -> None:
    def fold() -> tuple[int, int]:
        with foldpar.create_groups(LAYOUT) as groups:
            model = on_meta("deepseek_v3")
            fold_model(model, groups)
            return model.model.layers[0].self_attn.num_heads, model.config.num_attention_heads

    assert run_ranks(fold, 4, backend="threads") == [(2, 4)] * 4


# -- Generation -------------------------------------------------------------------------------------------------------

PROMPTS = (torch.tensor([[5, 9, 3]]), torch.tensor([[7, 4, 8, 6, 11]]))
"""Of the two data ranks, of different lengths."""


def generate(model: nn.Module, prompt: Tensor, end: int | None, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
            **options,
        )


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_greedy_generation_is_the_same_and_ranks_that_end_early_go_on(family: str) -> None:
    model = tiny_model(family, seed=3)
    free = [generate(model, prompt, None)[0, prompt.shape[1] :].tolist() for prompt in PROMPTS]
    end = next(token for token in free[0][1:] if token not in free[1])  # the first data rank stops there, early
    wanted = [generate(model, prompt, end)[0].tolist() for prompt in PROMPTS]
    assert len(wanted[0]) - PROMPTS[0].shape[1] < 8 == len(wanted[1]) - PROMPTS[1].shape[1]

    def rank() -> list[int]:
        with foldpar.create_groups(LAYOUT) as groups:
            mine = copy.deepcopy(model)
            fold_model(mine, groups)
            return generate(mine, PROMPTS[groups.dp.index], end, synced_gpus=True)[0].tolist()

    for rank_number, tokens in enumerate(run_ranks(rank, 4, backend="threads")):
        assert tokens == wanted[LAYOUT.coordinate(rank_number).dp]


# -- Mixed precision --------------------------------------------------------------------------------------------------


def test_under_autocast_experts_return_what_they_were_given() -> None:
    model = tiny_model("qwen3_moe", dtype=torch.float32)
    tokens = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(input_ids=tokens).logits

    def rank() -> float:
        with foldpar.create_groups(LAYOUT) as groups:
            mine = copy.deepcopy(model)
            fold_model(mine, groups)
            kinds = []
            mine.model.layers[0].mlp.experts.register_forward_hook(
                lambda module, given, out: kinds.append((given[0].dtype, out.dtype))
            )
            with torch.autocast("cpu", torch.bfloat16):
                logits = mine(input_ids=tokens).logits
            assert kinds[0][0] == kinds[0][1]
            return float((logits - wanted).detach().norm() / wanted.detach().norm())

    assert max(run_ranks(rank, 4, backend="threads")) < 0.05


# -- What is refused --------------------------------------------------------------------------------------------------


def refused(error: type[Exception], model: nn.Module, layout: foldpar.FoldedLayout = LAYOUT, **options: Any) -> str:
    with pytest.raises(error) as raised:
        plan_fold(model, layout, **options)
    return str(raised.value)


class UnknownExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 8))
        self.act_fn = nn.SiLU()


class UnknownBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = UnknownExperts()


def holding(block: nn.Module) -> nn.Module:
    return nn.ModuleDict({"block": block})


def test_an_unknown_block_is_named_with_the_line_that_would_fold_it() -> None:
    text = refused(ModelError, holding(UnknownBlock()))
    assert text.startswith("block.experts (UnknownExperts) has stacked weights, gate_up_proj, down_proj, in a block")
    assert "Known are MixtralSparseMoeBlock, Qwen3MoeSparseMoeBlock" in text
    assert "adapters=(MoEAdapter('UnknownBlock'),)" in text
    plan_fold(holding(UnknownBlock()), LAYOUT, adapters=(MoEAdapter("UnknownBlock"),))


def test_a_list_of_experts_is_named() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert "block.experts (ModuleList) is a list of 2 modules called experts" in refused(ModelError, holding(block))


def test_a_model_without_experts_is_refused() -> None:
    text = refused(ModelError, nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert text.startswith("Sequential has no MoE block to fold. Looked for MixtralSparseMoeBlock")
    assert "found modules of the classes LayerNorm, Linear, Sequential" in text


def test_jetmoe_is_refused_with_the_reason() -> None:
    text = refused(ModelError, on_meta("jetmoe"))
    assert "(JetMoeMoE) cannot be folded: JetMoe has experts in its attention too" in text


@pytest.mark.parametrize(
    ("model", "layout", "text"),
    [
        (
            lambda: on_meta("mixtral", num_local_experts=6),
            LAYOUT,
            "ep = 4 does not divide the 6 experts in model.layers.0.mlp.experts. ep can be 1, 2, 3 or 6.",
        ),
        (
            lambda: on_meta("mixtral", intermediate_size=9),
            SLICED,
            "etp = 2 does not divide the 9 hidden units of an expert in model.layers.0.mlp.experts. etp can be 1, 3",
        ),
        (
            lambda: on_meta("mixtral", num_attention_heads=12, num_key_value_heads=6),
            foldpar.solve_layout(4, tp=4, ep=4),
            "tp = 4 does not divide num_key_value_heads = 6 of model.layers.0.self_attn, so a head would be cut. tp "
            "can be 1, 2, 3 or 6 here, or model.layers.0.self_attn can stay whole: give each of its layers the style "
            "'replicate' in an adapter's tp_plan.",
        ),
        (
            lambda: on_meta("mixtral", num_attention_heads=6, num_key_value_heads=6),
            foldpar.solve_layout(4, tp=4, ep=4),
            "tp = 4 does not divide num_attention_heads = 6 of model.layers.0.self_attn",
        ),
        (
            lambda: on_meta("dots1", intermediate_size=9),
            LAYOUT,
            "tp = 2 does not divide the 9 output columns of model.layers.0.mlp.gate_proj, so lanes would hold",
        ),
    ],
    ids=["ep", "etp", "key-value heads", "heads", "width"],
)
def test_degrees_that_do_not_divide_are_refused(
    model: Callable[[], nn.Module], layout: foldpar.FoldedLayout, text: str
) -> None:
    assert refused(ShapeError, model(), layout).startswith(text)


def test_an_unknown_style_is_refused_and_an_adapter_can_say_what_to_do() -> None:
    model = on_meta("mixtral")
    model._tp_plan["model.layers.*.self_attn.q_proj"] = "diagonal"
    text = refused(ModelError, model)
    assert text.startswith(
        "model.layers.0.self_attn.q_proj has the tensor-parallel style 'diagonal' in the plan of Mixtral"
    )
    assert "Known styles are 'colwise', 'colwise_gather_output'" in text
    whole = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], "replicate")
    plan = plan_fold(model, LAYOUT, adapters=(MoEAdapter("MixtralSparseMoeBlock", tp_plan=whole),))
    assert plan.left_whole["model.layers.1.self_attn.q_proj.weight"] == "left whole by the plan"


def test_a_style_for_another_kind_of_layer_is_refused() -> None:
    model = on_meta("mixtral")
    model._tp_plan["model.norm"] = "colwise"
    assert "model.norm has the tensor-parallel style 'colwise', which is for a Linear, and is a Mixtral" in refused(
        ModelError, model
    )


def test_what_lies_beside_sharded_heads_must_be_declared() -> None:
    adapter = MoEAdapter("Qwen3MoeSparseMoeBlock", partial=())
    model = on_meta("qwen3_moe")
    del model._tp_plan["model.layers.*.self_attn.q_norm"]
    text = refused(ModelError, model, adapters=(adapter,))
    plan_fold(model, LAYOUT)  # the adapter that comes with the library knows
    assert text.startswith("q_norm.weight of model.layers.0.self_attn (Qwen3MoeAttention) lie beside projections that")
    assert "partial=('q_norm.weight',)) if it sees the lane's own heads or columns, whole=('q_norm.weight',)" in text


def test_a_model_is_folded_once() -> None:
    def fold() -> tuple[str, str]:
        with foldpar.create_groups(LAYOUT) as groups:
            model = on_meta("mixtral")
            fold_model(model, groups)
            folded = refused(ModelError, model)
            model = on_meta("mixtral")
            parallelize_module(
                model.lm_head,
                groups.mesh("dense")["tp"],
                ColwiseParallel(),
                src_data_rank=None,
            )
            return folded, refused(ModelError, model)

    for folded, sharded in run_ranks(fold, 4, backend="threads"):
        assert folded.startswith("model.layers.0.mlp.experts is a FoldedExperts: the model is folded already")
        assert sharded.startswith("lm_head.weight is a DTensor: the model is sharded already")


def test_an_error_comes_before_anything_is_touched() -> None:
    model = tiny_model("mixtral", num_local_experts=6)
    before = dict(model.named_parameters())

    def fold() -> None:
        with foldpar.create_groups(LAYOUT) as groups, pytest.raises(ShapeError, match="does not divide the 6 experts"):
            fold_model(model, groups)

    run_ranks(fold, 4, backend="threads")
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_what_folds_models_imports_no_model_code() -> None:
    source = Path(foldpar.__file__).parent
    for path in (source / "models").rglob("*.py"):
        assert "transformers" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        }
