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
        # Norms, rotary embeddings and Mamba of transformers are float32 inside, whatever they are given.
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name


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


def test_another_activation_is_kept() -> None:
    model = tiny_model("qwen3_moe", hidden_act="tanh")
    wanted = gradients_of(model)
    model.set_experts_implementation(register_with_transformers())
    found = gradients_of(model)
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("scale", [1, 1e3])
def test_a_clamp_beyond_any_sample_is_kept(scale: float) -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=1, hidden_act="gelu_10")
    experts: Any = model.model.layers[0].mlp.experts
    clamp_gates_of(experts, 40.0)
    x = scale * torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[0, 1], [2, 3], [3, 1], [1, 2], [0, 3]])
    wanted = experts(x, ids, torch.ones(5, 2, dtype=torch.float64))
    model.set_experts_implementation(register_with_transformers())
    assert torch.allclose(experts(x, ids, torch.ones(5, 2, dtype=torch.float64)), wanted, rtol=1e-10)


def clamp_gates_of(experts: Any, limit: float) -> None:
    """A gate of the module's own, which reads an attribute of it."""

    def apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up.clamp(-self.limit, self.limit)

    def forward(self: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.config._experts_implementation != "eager":
            return kind.forward(self, x, ids, weights)
        rows = [
            sum(
                w * self.down_proj[e] @ self._apply_gate((self.gate_up_proj[e] @ row)[None])[0]
                for e, w in zip(chosen.tolist(), given, strict=True)
            )
            for row, chosen, given in zip(x, ids, weights, strict=True)
        ]
        return torch.stack(rows)

    kind = type(experts)
    experts.limit = limit
    experts.__class__ = type("Clamped", (kind,), {"_apply_gate": apply_gate, "forward": forward})


def test_an_activation_with_tensors_is_refused() -> None:
    model = tiny_model("qwen3_moe", hidden_act="prelu")
    model.set_experts_implementation(register_with_transformers())
    with pytest.raises(ModelError, match=r"holds the tensor\(s\) weight, which .*set_experts_implementation"):
        gradients_of(model)
