"""At fold time each kind of block is run once beside its folded self: the guess that fails is a refusal."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_made import DIM, EXPERTS, HAND_MADE, TOP_K, Convention, ConventionExperts, Model, Stored
from hf_models import FAMILIES, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from toys import name_of, plant_wrong_slope

import foldpar
from foldpar.errors import ModelError
from foldpar.models import block_proof
from foldpar.models.fold import fold_model
from foldpar.models.known import MoEAdapter
from foldpar.moe.storage import ExpertStorage
from foldpar.testing import run_ranks

ALONE = foldpar.solve_layout(1)
LAYOUT = foldpar.solve_layout(2, tp=2, ep=2)
BRIEF = ("mixtral", "deepseek_v3", "gpt_oss", "llama4")


def proof(model: nn.Module, **options: Any) -> tuple[str, ...]:
    with foldpar.create_groups(ALONE) as groups:
        return fold_model(model, groups, **options).proof


def block_of(model: nn.Module) -> Any:
    return next(each for each in model.modules() if hasattr(each, "experts"))


def on_meta(family: str, **overrides: Any) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[family].make(**overrides)


@pytest.mark.parametrize("family", BRIEF)
def test_a_known_block_is_proven_once_for_each_kind(family: str) -> None:
    found = proof(tiny_model(family))
    kind = type(block_of(tiny_model(family))).__name__
    assert found == (f"{kind}: equal to its folded self in values and gradients",)
    assert proof(on_meta(family)) == (f"{found[0]} with numbers drawn for it",)


@pytest.mark.long
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("jetmoe", *BRIEF)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_every_family_is_proven(family: str, dtype: torch.dtype) -> None:
    assert all("equal to its folded self" in line for line in proof(tiny_model(family, dtype=dtype)))
    assert all("equal to its folded self" in line for line in proof(on_meta(family)))


def test_the_plan_says_what_was_proven() -> None:
    with foldpar.create_groups(ALONE) as groups:
        text = str(fold_model(tiny_model("mixtral"), groups))
    assert text.splitlines()[-1] == "MixtralSparseMoeBlock: equal to its folded self in values and gradients"


# -- Faults -----------------------------------------------------------------------------------------------------------


def with_forward(make: Callable[[Any], Callable[..., Any]], child: str = "") -> Callable[[nn.Module], None]:
    """Another class for the experts, whose forward is made of the one that it had."""

    def change(model: nn.Module) -> None:
        for block in model.modules():
            if hasattr(block, "experts"):
                target: Any = block.experts
                kind = type(target)
                target.__class__ = type("Changed", (kind,), {"forward": make(kind.forward)})

    return change


def doubled(plain: Any) -> Any:
    return lambda self, *given: 2 * plain(self, *given)


def with_residual(plain: Any) -> Any:
    return lambda self, x, *given: plain(self, x, *given) + x


def clamped(plain: Any) -> Any:
    """Far beyond what small inputs reach."""
    return lambda self, *given: plain(self, *given).clamp(-1e4, 1e4)


def without_gradient(plain: Any) -> Any:
    return lambda self, x, *given: plain(self, x.detach(), *given)


def unlike_weights(plain: Any) -> Any:
    return lambda self, x, ids, weights: plain(self, x, ids, weights**2)


def noisy_in_training(plain: Any) -> Any:
    return lambda self, *given: F.dropout(plain(self, *given), 0.3, self.training)


FAULTS = [doubled, with_residual, clamped, without_gradient, unlike_weights, noisy_in_training]


@pytest.mark.parametrize("meta", [False, True], ids=["numbers", "meta"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_experts_with_a_forward_of_their_own_are_refused(fault: Any, meta: bool) -> None:
    model = on_meta("mixtral") if meta else tiny_model("mixtral")
    with_forward(fault)(model)
    before = dict(model.named_parameters())

    def rank() -> None:
        with (
            foldpar.create_groups(LAYOUT) as groups,
            pytest.raises(ModelError, match=r"layers.0.mlp \(MixtralSparseMoeBlock\) is not what folding takes it for"),
        ):
            fold_model(model, groups)

    run_ranks(rank, 2, backend="threads")
    assert all(before[name] is each for name, each in model.named_parameters())


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"])
def test_it_is_seen_in_other_families(family: str) -> None:
    model = tiny_model(family)
    with_forward(doubled)(model)
    with pytest.raises(ModelError, match=r"outputs differ by .* of their size at inputs of about 0.1"):
        proof(model)


def test_only_large_inputs_tell_a_clamp() -> None:
    model = tiny_model("mixtral")
    with_forward(clamped)(model)
    with pytest.raises(ModelError, match=r"outputs differ by .* at inputs of about 1000"):
        proof(model)


def test_a_lost_gradient_is_seen() -> None:
    model = tiny_model("mixtral")
    with_forward(without_gradient)(model)
    with pytest.raises(ModelError, match="outputs are equal, and the gradient of the input differs"):
        proof(model)


def test_one_changed_layer_of_many_is_a_kind_of_its_own() -> None:
    model = tiny_model("mixtral", num_hidden_layers=4)
    experts = model.model.layers[2].mlp.experts
    experts.__class__ = type("Changed", (type(experts),), {"forward": doubled(type(experts).forward)})
    with pytest.raises(ModelError, match=r"layers.2.mlp \(MixtralSparseMoeBlock\) is not what folding"):
        proof(model)


@pytest.mark.parametrize(
    "wrong",
    [
        MoEAdapter("Convention", activation="geglu"),
        MoEAdapter("Convention", activation="swiglu", storage=ExpertStorage(interleaved=True)),
        MoEAdapter("Convention", activation="swiglu", call=lambda folded, x, ids, weights: folded(x, ids, 2 * weights)),
    ],
    ids=["activation", "storage", "call"],
)
def test_a_wrong_word_in_an_adapter_is_refused(wrong: MoEAdapter) -> None:
    with pytest.raises(ModelError, match=r"0 \(Convention\) is not what folding takes it for"):
        proof(nn.Sequential(Convention(Stored(ExpertStorage()))), adapters=(wrong,))
    right = MoEAdapter("Convention", activation="swiglu")
    assert "equal" in proof(nn.Sequential(Convention(Stored(ExpertStorage()))), adapters=(right,))[0]


def test_weights_in_the_wrong_order_are_refused() -> None:
    from dataclasses import replace

    from foldpar.models.known import ExpertWeights

    swapped = replace(HAND_MADE, weights=lambda e: ExpertWeights(torch.cat([e.w3, e.w1], 1), e.w2))
    with pytest.raises(ModelError, match=r"moe \(HandMade\) is not what folding takes it for: outputs differ"):
        proof(Model(), adapters=(swapped,))


def test_a_wrong_slope_in_the_library_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_wrong_slope(monkeypatch)
    with pytest.raises(ModelError, match="outputs are equal, and the gradient of"):
        proof(tiny_model("mixtral"))


def test_a_block_whose_experts_are_never_called_is_refused() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(DIM, EXPERTS), ConventionExperts(Stored(ExpertStorage()))

        def forward(self, x: Tensor) -> Tensor:
            ids = self.gate(x).argmax(-1)
            return torch.stack([self.experts.one(row, int(expert)) for row, expert in zip(x, ids, strict=True)])

    with pytest.raises(ModelError, match=r"the folded block raised AttributeError"):
        proof(nn.Sequential(Fused()), adapters=(MoEAdapter("Fused", activation="swiglu"),))


# -- What cannot be compared is said ----------------------------------------------------------------------------------


class TwoInputs(Convention):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        return self.experts(x * scale, ids, weights)


def test_of_a_block_with_more_inputs_the_experts_are_compared() -> None:
    adapter = MoEAdapter("TwoInputs", activation="swiglu")
    model = nn.Sequential(TwoInputs(Stored(ExpertStorage())))
    assert "equal" in proof(copy.deepcopy(model), adapters=(adapter,))[0]
    with_forward(doubled)(model)
    with pytest.raises(ModelError, match="is not what folding takes it for"):
        proof(model, adapters=(adapter,))


def test_where_nothing_can_be_called_the_reason_is_in_the_plan() -> None:
    adapter = MoEAdapter("TwoInputs", activation="swiglu", call=lambda folded, *given: folded(*given))
    (line,) = proof(nn.Sequential(TwoInputs(Stored(ExpertStorage()))), adapters=(adapter,))
    assert line.startswith("TwoInputs: not compared with its folded self, since it cannot be called with hidden states")


def test_of_a_router_that_draws_the_experts_are_compared() -> None:
    class Random(Convention):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = (self.gate(x) + torch.randn(())).sigmoid().topk(TOP_K)
            return self.experts(x, ids, weights)

    adapter = MoEAdapter("Random", activation="swiglu")
    (line,) = proof(nn.Sequential(Random(Stored(ExpertStorage()))), adapters=(adapter,))
    assert line == "Random, its experts alone: equal to its folded self in values and gradients"
    adapter = MoEAdapter("Random", activation="swiglu", call=lambda folded, *given: folded(*given))
    (line,) = proof(nn.Sequential(Random(Stored(ExpertStorage()))), adapters=(adapter,))
    assert line == "Random: not compared with its folded self, since it draws random numbers in evaluation too"


# -- It costs little --------------------------------------------------------------------------------------------------


def test_a_block_of_real_size_is_cut_and_still_proven() -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 2048, "num_experts": 32, "num_experts_per_tok": 8}
    model = on_meta("qwen3_moe", num_hidden_layers=12, **sizes)
    start = time.monotonic()
    assert proof(model) == (
        "Qwen3MoeSparseMoeBlock: equal to its folded self in values and gradients with numbers drawn for it",
    )
    assert time.monotonic() - start < 10
    model = on_meta("qwen3_moe", num_hidden_layers=2, **sizes)
    with_forward(doubled)(model)
    with pytest.raises(ModelError, match="is not what folding takes it for"):
        proof(model)


def test_blocks_of_one_kind_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compare = block_proof._compare
    monkeypatch.setattr(block_proof, "_compare", lambda case: calls.append(case) or compare(case))
    proof(tiny_model("qwen3_moe", num_hidden_layers=5))
    assert len(calls) == 1


def test_nothing_is_left_behind() -> None:
    state = torch.get_rng_state()
    model = tiny_model("mixtral")
    after_building = torch.get_rng_state()
    seen = []
    block_of(model).register_forward_hook(lambda *given: seen.append(given))
    with foldpar.create_groups(ALONE) as groups:
        fold_model(model, groups)
    assert not seen and not torch.equal(state, after_building)
    assert all(each.grad is None for each in model.parameters())
