"""foldpar's grouped products inside transformers: the same values and gradients as its own experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import FAMILIES, VOCAB, tiny_model
from torch import nn

from foldpar.errors import ModelError
from foldpar.hf import register_with_transformers

STORES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
# Llama 4 and JetMoE call their experts in other ways.
OTHERS = [family for family in FAMILIES if family not in (*STORES, "llama4", "jetmoe")]
TOKENS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    out.loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {**found, "logits": out.logits.detach()}


def check(family: str) -> None:
    model = tiny_model(family).train(family != "phimoe")
    wanted = gradients_of(model)
    model.set_experts_implementation(register_with_transformers())
    assert model.config._experts_implementation == "foldpar"
    found = gradients_of(model)
    assert any(hasattr(each, "_foldpar_activation") for each in model.modules())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Norms and rotary embeddings of transformers are float32 inside, whatever they are given.
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("family", STORES)
def test_values_and_gradients_are_those_of_the_model(family: str) -> None:
    check(family)


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_values_and_gradients_of_every_family(family: str) -> None:
    check(family)


def test_experts_that_are_elsewhere_count_for_nothing() -> None:
    """transformers' own expert parallelism sends ids beyond the local experts, whose rows another rank computes."""
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    experts: Any = model.model.layers[0].mlp.experts
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, generator=draw, dtype=torch.float64)
    ids = torch.tensor([[0, 9], [4, 4], [2, 0], [7, 3], [3, 1]])  # of 4 here
    weights = torch.rand(5, 2, generator=draw, dtype=torch.float64)

    def run(implementation: str, ids: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
        model.set_experts_implementation(implementation)
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        y = experts(x, ids, w)
        gradients = torch.autograd.grad(y.square().sum(), [x, w, experts.gate_up_proj, experts.down_proj])
        return [y.detach(), *gradients]

    here = ids < 4
    wanted = run("eager", ids.clamp(max=3), weights * here)
    found = run(register_with_transformers(), ids, weights)
    wanted[2] = wanted[2] * here
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_another_activation_is_refused() -> None:
    model = tiny_model("qwen3_moe", hidden_act="tanh")
    model.set_experts_implementation(register_with_transformers())
    with pytest.raises(ModelError, match=r"activation that is none of swiglu, geglu.*set_experts_implementation"):
        gradients_of(model)
