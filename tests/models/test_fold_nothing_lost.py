"""Whatever is in the experts' module is carried along, or refused by name."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from hand_made import EXPERTS, HAND_MADE, HIDDEN, Model
from hf_models import tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import foldpar
from foldpar import hf
from foldpar.errors import ModelError, ShardingError
from foldpar.models.fold import fold_model
from foldpar.models.known import ExpertWeights
from foldpar.models.plan import plan_fold
from foldpar.testing import run_ranks

ALONE = foldpar.solve_layout(1)
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4")


def experts_of(model: nn.Module) -> Any:
    return next(each for each in model.modules() if hasattr(each, "gate_up_proj"))


def with_a_norm(experts: Any) -> str:
    experts.norm = nn.RMSNorm(16)
    return r"experts \(\w+\) does more than its products: it has the child norm \(RMSNorm\) with norm.weight, and"


def with_scales(experts: Any) -> str:
    experts.register_buffer("scales", torch.rand(16), persistent=False)
    return r"it has the buffer scales, and folding would lose that"


def with_dropout(experts: Any) -> str:
    experts.drop = nn.Dropout(0.1)
    return r"it has the child drop \(Dropout\), and folding would lose that"


def with_a_parameter(experts: Any) -> str:
    experts.gain = nn.Parameter(torch.ones(16))
    return r"has the parameter\(s\) gain beside gate_up_proj and down_proj"


def with_a_forward(experts: Any) -> str:
    plain = experts.forward
    experts.forward = lambda *given: 2 * plain(*given)
    return r"it has a forward that was put on this very module, and folding would lose that"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [with_a_norm, with_scales, with_dropout, with_a_parameter, with_a_forward])
def test_what_folding_would_lose_is_refused_by_name(family: str, change: Any) -> None:
    model = tiny_model(family)
    text = change(experts_of(model))
    before = dict(model.named_parameters())
    with foldpar.create_groups(ALONE) as groups, pytest.raises(ModelError, match=text):
        fold_model(model, groups)
    assert all(before[name] is each for name, each in model.named_parameters())
    with pytest.raises(ModelError, match=text):
        plan_fold(model, ALONE)


def test_what_the_adapters_weights_leaves_out_is_refused_by_name() -> None:
    model = Model()
    plan_fold(model, ALONE, adapters=(HAND_MADE,))
    model.moe.specialists.bias = nn.Parameter(torch.ones(EXPERTS, HIDDEN))
    with pytest.raises(ModelError, match="has the parameter bias, which the adapter's weights does not use"):
        plan_fold(model, ALONE, adapters=(HAND_MADE,))


def test_experts_that_are_modules_of_their_own_are_read_by_the_adapter() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(4, 6, bias=False), nn.Linear(3, 4, bias=False), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(self.act(gate) * up)

    class Many(nn.ModuleList):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            every = torch.stack([expert(x) for expert in self], 1)
            return (every.gather(1, ids[..., None].expand(-1, -1, 4)) * weights[..., None]).sum(1)

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 2), Many([One(), One()])

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.gate(x).softmax(-1).topk(1)
            return self.experts(x, ids, weights)

    def stacked(experts: Any) -> ExpertWeights:
        return ExpertWeights(*(torch.stack([getattr(one, name).weight for one in experts]) for name in ("up", "down")))

    model, adapter = nn.Sequential(Listed()), foldpar.MoEAdapter("Listed", weights=stacked, activation="swiglu")
    x = torch.randn(5, 4)
    wanted = model(x)
    with foldpar.create_groups(ALONE) as groups:
        fold_model(model, groups, adapters=(adapter,))
        torch.testing.assert_close(model(x), wanted)
    model = nn.Sequential(Listed())
    model[0].experts[1].drop = nn.Dropout(0.5)
    with pytest.raises(ModelError, match=r"the child 1.drop \(Dropout\)"):
        plan_fold(model, ALONE, adapters=(adapter,))


def test_hooks_of_the_experts_are_carried_along() -> None:
    model = tiny_model("mixtral")
    seen = []
    handle = model.model.layers[0].mlp.experts.register_forward_hook(
        lambda module, given, out: seen.append(out) or 2 * out
    )
    tokens = torch.tensor([[3, 4, 5]])
    wanted = model(input_ids=tokens).logits
    with foldpar.create_groups(ALONE) as groups:
        fold_model(model, groups)
        before = len(seen)
        torch.testing.assert_close(model(input_ids=tokens).logits, wanted)
        assert len(seen) == before + 1
        handle.remove()
        model(input_ids=tokens)
        assert len(seen) == before + 1


@pytest.mark.parametrize("family", ["llama4", "qwen3_moe"])
def test_hooks_of_the_block_are_carried_along_where_it_is_written_anew(family: str) -> None:
    model, seen = tiny_model(family), []
    block: Any = next(each for each in model.modules() if hasattr(each, "experts"))
    handle = block.register_forward_hook(lambda *given: seen.append(1))
    with foldpar.create_groups(ALONE) as groups:
        fold_model(model, groups)
        model(input_ids=torch.tensor([[3, 4, 5]]))
        assert len(seen) == 1
        handle.remove()
        model(input_ids=torch.tensor([[3, 4, 5]]))
        assert len(seen) == 1


@pytest.mark.parametrize(
    "register",
    ["state_dict_pre_hook", "state_dict_post_hook", "load_state_dict_pre_hook", "load_state_dict_post_hook"],
)
def test_a_hook_on_the_state_of_what_is_replaced_is_refused(register: str) -> None:
    for family, of_block in (("qwen3_moe", False), ("llama4", False), ("llama4", True)):
        model = tiny_model(family)
        name = next(name for name, _ in model.named_modules() if name.endswith(".experts"))
        name = name.removesuffix(".experts") if of_block else name
        handle = getattr(model.get_submodule(name), f"register_{register}")(lambda *given: None)
        with pytest.raises(ModelError, match=f"{name} .* has a hook on state_dict or load_state_dict"):
            plan_fold(model, ALONE)
        handle.remove()
        plan_fold(model, ALONE)


def test_a_buffer_of_a_block_that_is_written_anew_must_stay() -> None:
    model = tiny_model("llama4")
    block: Any = next(each for each in model.modules() if hasattr(each, "experts"))
    block.register_buffer("seen", torch.zeros(4))
    with foldpar.create_groups(ALONE) as groups, pytest.raises(ModelError, match=r"lost the buffer.* \S+\.seen"):
        fold_model(model, groups)


def test_weights_that_an_adapter_makes_stay_frozen() -> None:
    model = Model()
    experts: Any = model.moe.specialists
    experts.requires_grad_(False)
    with foldpar.create_groups(ALONE) as groups:
        fold_model(model, groups, adapters=(HAND_MADE,))
    assert not any(each.requires_grad for each in model.moe.specialists.parameters())
    model = Model()
    experts = model.moe.specialists
    experts.w2.requires_grad_(False)
    with foldpar.create_groups(ALONE) as groups:
        fold_model(model, groups, adapters=(HAND_MADE,))
    assert {name: each.requires_grad for name, each in model.moe.specialists.named_parameters()} == {
        "gate_up_proj": True,
        "down_proj": False,
    }
    model = Model()
    experts = model.moe.specialists
    experts.w1.requires_grad_(False)
    with pytest.raises(ModelError, match=r"Some parameters of moe.specialists \(StackedExperts\) are frozen and some"):
        plan_fold(model, ALONE, adapters=(HAND_MADE,))


def gradient_hook(parameter: nn.Parameter) -> Any:
    return parameter.register_hook(lambda gradient: 3 * gradient)


def accumulation_hook(parameter: nn.Parameter) -> Any:
    return parameter.register_post_accumulate_grad_hook(lambda parameter: None)


@pytest.mark.parametrize("register", [gradient_hook, accumulation_hook])
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
)
def test_a_hook_on_a_gradient_whose_parameter_is_replaced_is_refused(name: str, register: Any) -> None:
    model = tiny_model("qwen3_moe")
    handle = register(model.get_parameter(name))
    layout = foldpar.solve_layout(2, tp=2, ep=2)
    with pytest.raises(ModelError, match=f"{name} has a hook on its gradient .* Folding puts another parameter"):
        plan_fold(model, layout)
    handle.remove()
    plan_fold(model, layout)


def test_a_hook_on_the_gradient_of_what_stays_stays() -> None:
    model = tiny_model("qwen3_moe")
    seen = []
    for name in ("model.norm.weight", "model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight"):
        model.get_parameter(name).register_hook(lambda gradient, name=name: seen.append(name))
    with foldpar.create_groups(ALONE) as groups:
        fold_model(model, groups)
        model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
    assert len(seen) == 3


def test_loading_and_sharding_would_lose_a_hook_too(tmp_path: Any) -> None:
    text = "norm.weight has a hook on its gradient"
    with foldpar.create_groups(ALONE) as groups:
        model = tiny_model("qwen3_moe")
        model.save_pretrained(tmp_path)
        with torch.device("meta"):
            empty = tiny_model("qwen3_moe")
        fold_model(empty, groups)
        gradient_hook(empty.model.norm.weight)
        with pytest.raises(ModelError, match=f"{text} .* Loading into a model on the meta device puts"):
            hf.import_(empty, tmp_path, groups)

    def shard() -> None:
        model = tiny_model("qwen3_moe")
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            fold_model(model, groups)
            gradient_hook(model.model.norm.weight)
            with pytest.raises(ModelError, match=f"{text} .* Sharding puts"):
                foldpar.shard_model(model, groups, stage=2)

    run_ranks(shard, 2, backend="threads")


def test_a_hook_on_the_gradient_of_a_shard_is_called_or_refused() -> None:
    def train() -> list[str]:
        model, called = tiny_model("qwen3_moe"), list[str]()
        ids = torch.zeros(1, 3, dtype=torch.long)
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            fold_model(model, groups)
            foldpar.shard_model(model, groups, stage=3)
            weight = model.model.norm.weight
            weight.register_post_accumulate_grad_hook(lambda parameter: called.append(type(parameter.grad).__name__))
            model(input_ids=ids).logits.sum().backward()
            handle = gradient_hook(weight)
            with pytest.raises(ShardingError, match=r"^weight of \w+ has a hook on its gradient .* Use register_post"):
                model(input_ids=ids)
            handle.remove()
            model(input_ids=ids).logits.sum().backward()
        return called

    assert run_ranks(train, 2, backend="threads") == [["DTensor", "DTensor"]] * 2


@pytest.mark.parametrize("name", ["embed_tokens.weight", "experts.down_proj"])
def test_a_penalty_on_a_gradient_is_refused_and_not_lost(name: str) -> None:
    """A gradient that comes back distributed would forget what it depends on."""

    def train() -> None:
        model = tiny_model("qwen3_moe")
        with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
            fold_model(model, groups)
            loss = model(input_ids=torch.arange(3)[None]).logits.square().sum()
            weights = [each for full, each in model.named_parameters() if full.endswith(name)]
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            penalty = sum(each.square().sum().full_tensor() for each in gradients)  # type: ignore[attr-defined]
            with pytest.raises(foldpar.errors.GradientError, match="can be differentiated once"):
                (loss + penalty).backward()

    run_ranks(train, 2, backend="threads")


@pytest.mark.parametrize("stage", [0, 2])
def test_a_part_of_the_model_loads_whole_tensors_too(stage: Literal[0, 2]) -> None:
    plain = tiny_model("qwen3_moe")
    wanted = {name: 2 * tensor for name, tensor in plain.model.layers.state_dict().items()}

    def load() -> bool:
        model = copy.deepcopy(plain)
        with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2)) as groups:
            fold_model(model, groups)
            if stage:
                foldpar.shard_model(model, groups, stage=stage)
            model.model.layers.load_state_dict(wanted)
            model.model.norm.load_state_dict({"weight": 3 * plain.model.norm.weight})
            whole = foldpar.whole_state_dict(model, groups, on="every rank")
        layers = all(torch.equal(whole[f"model.layers.{name}"], tensor) for name, tensor in wanted.items())
        return layers and torch.equal(whole["model.norm.weight"], 3 * plain.model.norm.weight)

    assert run_ranks(load, 4, backend="threads") == [True] * 4


def test_what_is_noted_on_a_parameter_stays_noted() -> None:
    def note() -> None:
        model = tiny_model("qwen3_moe")
        names = dict(model.named_parameters())
        for name, parameter in names.items():
            parameter.no_decay = name  # type: ignore[attr-defined]
        with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
            fold_model(model, groups)
            assert {name: parameter.no_decay for name, parameter in model.named_parameters()} == {
                name: name for name in names
            }

    run_ranks(note, 2, backend="threads")


def test_parametrized_experts_are_refused_until_their_results_are_kept() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = tiny_model("qwen3_moe")
    experts = experts_of(model)
    parametrize.register_parametrization(experts, "down_proj", Twice())
    with pytest.raises(ModelError, match=r"layers.0.mlp.experts computes down_proj by a parametrization"):
        plan_fold(model, ALONE)
    parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=True)
    plan_fold(model, ALONE)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "self_attn.q_norm"])
def test_a_hook_that_would_see_a_lanes_part_is_refused(name: str) -> None:
    model = tiny_model("qwen3_moe")
    name = f"model.layers.1.{name}"
    handle = model.get_submodule(name).register_forward_hook(lambda module, given, out: out / out.norm())
    text = rf"{name} \(\w+\) has hooks, and with tp = 2 it sees this lane's .* hook model.layers.1.self_attn,"
    with pytest.raises(ModelError, match=text):
        plan_fold(model, foldpar.solve_layout(2, tp=2, ep=2))
    plan_fold(model, foldpar.solve_layout(2, ep=2))
    handle.remove()
    for whole in ("model.layers.1.self_attn", "model.layers.1.mlp", "model.embed_tokens", "lm_head"):
        model.get_submodule(whole).register_forward_hook(lambda module, given, out: None)
    plan_fold(model, foldpar.solve_layout(2, tp=2, ep=2))


def test_a_hook_of_the_head_sees_what_the_head_gives() -> None:
    tokens = torch.tensor([[3, 4, 5]])
    whole = tiny_model("qwen3_moe")
    wanted = float(whole(input_ids=tokens).logits.detach().max())

    def largest() -> float:
        model, seen = tiny_model("qwen3_moe"), list[Tensor]()
        model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out))
        with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
            fold_model(model, groups)
            model(input_ids=tokens)
        return float(seen[0].detach().max())

    assert run_ranks(largest, 2, backend="threads") == pytest.approx([wanted] * 2)
    whole.lm_head.register_full_backward_hook(lambda module, given, arrived: None)
    plan_fold(whole, foldpar.solve_layout(2, ep=2))
    with pytest.raises(ModelError, match=r"lm_head \(Linear\) has a hook on its backward, and with tp = 2"):
        plan_fold(whole, foldpar.solve_layout(2, tp=2, ep=2))
