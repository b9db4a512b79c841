"""Activations are told by what their code is; what is not known is kept as it is, and numbers can only refute."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from fold_parity import Case, worst
from hf_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from toys import assert_gradient_is_autograds, name_of, plant_wrong_slope

import foldpar
from foldpar.errors import ModelError
from foldpar.models.fold import fold_model
from foldpar.models.known import MoEAdapter
from foldpar.models.recognition import activation_of
from foldpar.moe.kernels import activations
from foldpar.moe.kernels.activations import ClampedSwiGLU, OwnActivation

KNOWN = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu"}
HOLD_TENSORS = ("prelu", "xielu")


def experts_with(act_fn: Any, **attributes: Any) -> nn.Module:
    experts = nn.Module()
    experts.act_fn = act_fn
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


def named(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def all_names() -> list[str]:
    from transformers.activations import ACT2CLS

    return list(ACT2CLS)


@pytest.mark.filterwarnings("ignore:CUDA-fused xIELU")
@pytest.mark.parametrize("name", all_names())
def test_every_activation_of_transformers_is_known_kept_or_refused(name: str) -> None:
    experts = experts_with(named(name))
    if name in HOLD_TENSORS:
        with pytest.raises(ModelError, match=r"of experts holds the tensor\(s\) .*, which folding would lose"):
            activation_of(experts, "experts")
        return
    found = activation_of(experts, "experts")
    assert found == KNOWN.get(name, OwnActivation(experts.act_fn, "gate"))
    gate_up = torch.cat([scale * torch.randn(4, 10, dtype=torch.float64) for scale in (0.1, 1, 30, 1e3)])
    gate, up = gate_up.chunk(2, dim=-1)
    values = activations.forward(gate_up, None, found)
    torch.testing.assert_close(values, experts.act_fn(gate) * up)


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (nn.SiLU(), "swiglu"),
        (nn.GELU(), "geglu"),
        (F.silu, "swiglu"),
        (F.gelu, "geglu"),
        (functools.partial(F.gelu, approximate="none"), "geglu"),
        (functools.partial(F.gelu, approximate="tanh"), None),
        (nn.GELU(approximate="tanh"), None),
        (lambda x: F.silu(x), None),
        (nn.Hardtanh(-40, 40), None),
    ],
    ids=name_of,
)
def test_code_and_parameters_tell(function: Any, known: str | None) -> None:
    assert activation_of(experts_with(function), "experts") == (known or OwnActivation(function, "gate"))


def test_a_known_class_that_computes_something_else_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.SiLU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert activation_of(experts_with(Scaled()), "experts").form == "gate"
    hooked, patched = nn.SiLU(), nn.SiLU()
    hooked.register_forward_hook(lambda *given: None)
    patched.forward = lambda x: x.clamp(-300, 300)  # type: ignore[method-assign]
    assert activation_of(experts_with(hooked), "experts") == OwnActivation(hooked, "gate")
    assert activation_of(experts_with(patched), "experts") == OwnActivation(patched, "gate")
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: F.silu(x).clamp(max=500))  # only large numbers tell
    assert activation_of(experts_with(nn.SiLU()), "experts").form == "gate"


def test_a_plain_activation_is_kept_too() -> None:
    assert activation_of(experts_with(nn.ReLU()), "experts", gated=False) == "relu"
    own = activation_of(experts_with(nn.ReLU6()), "experts", gated=False)
    assert repr(own) == "OwnActivation(ReLU6, 'plain')" and not activations.is_gated(own)


def test_the_gate_of_gpt_oss_is_known_and_one_like_it_is_kept() -> None:
    model = tiny_model("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    experts.limit = 3.5
    assert activation_of(experts, "experts", interleaved=True) == ClampedSwiGLU(experts.alpha, 3.5)

    def apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        return kind._apply_gate(self, gate_up) / 2

    kind = type(experts)
    experts.__class__ = type("Halved", (kind,), {"_apply_gate": apply_gate})
    own = activation_of(experts, "experts", interleaved=True)
    x = 20 * torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(own.value(x, True), experts._apply_gate(x))
    assert not list(own.function.__self__.parameters())  # it does not hold on to the weights


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ["gate", "gate_up", "plain"])
def test_the_gradient_of_a_kept_activation_is_autograds(form: Any, interleaved: bool) -> None:
    def halves(x: Tensor) -> Tensor:
        gate, up = (x[:, ::2], x[:, 1::2]) if interleaved else x.chunk(2, -1)
        return torch.tanh(gate) * up.clamp(-1, 1)

    own = OwnActivation(halves if form == "gate_up" else F.mish, form)
    x = 3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_gradient_is_autograds(x, own, interleaved)


# -- What cannot be kept ----------------------------------------------------------------------------------------------


class WithScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.scale


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (nn.Softmax(dim=-1), "does not work on each hidden unit of each row by itself"),
        (lambda x: x - x.mean(0), "does not work on each hidden unit of each row by itself"),
        (nn.RReLU(), "gives other values for the same input, as random ones do, or in training"),
        (nn.RReLU().eval(), "gives other values for the same input, as random ones do, or in training"),
        (WithScale(), r"holds the tensor\(s\) scale, which folding would lose"),
        (lambda x, y: x, "cannot be computed by itself: TypeError"),
        (nn.LeakyReLU(inplace=True), "cannot be computed by itself: RuntimeError"),
        (None, r"experts \(Module\) has no act_fn to tell its activation by"),
    ],
    ids=["softmax", "over rows", "random", "random in training", "a buffer", "arguments", "inplace", "none"],
)
def test_what_cannot_be_kept_is_refused(function: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        activation_of(experts_with(function), "experts")


def test_a_gate_that_reads_tensors_of_its_module_is_refused() -> None:
    def apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * up * self.scale

    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.register_buffer("scale", torch.rand(()))
    experts.__class__ = type("Scaled", (type(experts),), {"_apply_gate": apply_gate})
    with pytest.raises(ModelError, match=r"cannot be computed by itself: AttributeError: .*no attribute 'scale'"):
        activation_of(experts, "experts")


@pytest.mark.parametrize("given", ["swish", lambda experts: None, lambda experts: experts.nothing])
def test_an_adapters_activation_must_be_one(given: Any) -> None:
    with pytest.raises(ModelError, match=r"gives .* the activation|raised AttributeError"):
        foldpar.plan_fold(
            tiny_model("mixtral"),
            foldpar.solve_layout(1),
            adapters=(MoEAdapter("MixtralSparseMoeBlock", activation=given),),
        )


# -- Whole models -----------------------------------------------------------------------------------------------------

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "olmoe", "llama4", "granitemoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clamped_activation_is_the_models_at_every_size_of_input(family: str) -> None:
    model = tiny_model(family, hidden_act="gelu_10").eval()
    name, block = next(
        (name, each) for name, each in model.named_modules() if hasattr(each, "experts") and hasattr(each, "forward")
    )
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    with torch.no_grad(), foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        wanted = [first(block(scale * x)) for scale in (1, 20, 1e3)]
        fold_model(model, groups)
        for scale, want in zip((1, 20, 1e3), wanted, strict=True):
            found = first(model.get_submodule(name)(scale * x))
            assert (found - want).norm() < 1e-6 * want.norm(), scale


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    "case",
    [
        Case("qwen3_moe", ep=2, etp=2, steps=1, overrides={"hidden_act": "gelu_10"}),
        Case("mixtral", steps=1, overrides={"hidden_act": "gelu_pytorch_tanh"}),
        Case("mixtral", steps=1, overrides={"hidden_act": "gelu_python"}),
    ],
    ids=lambda case: case.overrides["hidden_act"],
)
def test_kept_activations_train_exactly(case: Case) -> None:
    error, name = worst(case)
    assert error < case.tolerance, name


def test_the_comparison_sees_a_wrong_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_wrong_slope(monkeypatch)
    monkeypatch.setattr("foldpar.models.fold.prove_block", lambda *of: "not compared")  # it sees that too
    error, _ = worst(Case("qwen3_moe", steps=1, overrides={"hidden_act": "gelu_10"}))
    assert error > 1e-3
