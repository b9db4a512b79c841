"""What a router's kernels decide, and their gradients, are those of the plain torch code.

Runs on a GPU. Without one, ``TRITON_INTERPRET=1`` runs the kernels in Triton's interpreter where Triton is installed.
"""

from __future__ import annotations

import pytest
import torch
from kernels_device import DEVICE
from torch import Tensor

from foldpar.moe.kernels import decisions, rules
from foldpar.moe.kernels.rules import Decision, Rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # its own, too
]

RULES = {
    "Qwen3": Rule(3, "softmax", True, True, 1.0),
    "OLMoE": Rule(2, "softmax", True, False, 1.0),
    "DeepSeek": Rule(4, "sigmoid", True, True, 2.5),
    "Llama 4": Rule(1, "sigmoid", True, False, 1.0),
    "GPT-OSS": Rule(3, "softmax", False, True, 1.5),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def same(one: Decision, other: Decision) -> None:
    assert (one.scores is None) == (other.scores is None)
    assert torch.equal(one.ids, other.ids)
    pairs = [(one.logits, other.logits), (one.weights, other.weights)]
    pairs += [] if one.scores is None or other.scores is None else [(one.scores, other.scores)]
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "experts"), [(0, 8), (1, 6), (37, 20)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_decisions(rule: Rule, tokens: int, experts: int, biased: bool) -> None:
    logits, bias = draw(tokens, experts), draw(experts, seed=1) if biased else None
    same(decisions.decide(logits, bias, rule), rules.decide_in_steps(logits, bias, rule))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_of_equal_scores_the_lower_id_wins_and_nan_is_the_largest(rule: Rule) -> None:
    lowest = float("-inf")
    rows = [[0.0] * 6, [1.0, 2.0, 2.0, 2.0, 1.0, 2.0], [lowest, 1.0, lowest, lowest, lowest, lowest]]
    rows += [[lowest] * 6, [1.0, 2.0, float("nan"), 0.0, 5.0, 1.0]]
    logits = torch.tensor(rows, device=DEVICE)
    same(decisions.decide(logits, None, rule), rules.decide_in_steps(logits, None, rule))


@pytest.mark.parametrize("used", [("weights",), ("scores",), ("logits", "weights"), ("logits", "scores", "weights")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients(rule: Rule, dtype: torch.dtype, used: tuple[str, ...]) -> None:
    logits, bias = draw(11, 7).to(dtype).requires_grad_(), draw(7, seed=1)

    def gradient(decision: Decision) -> Tensor | None:
        terms = {name: getattr(decision, name) for name in used if getattr(decision, name) is not None}
        loss = sum((term * draw(*term.shape, seed=place)).sum() for place, term in enumerate(terms.values()))
        return torch.autograd.grad(loss, logits)[0] if terms else None

    got = gradient(decisions.decide(logits, bias, rule))
    wanted = gradient(rules.decide_in_steps(logits, bias, rule))
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-4}
    assert (got is None) == (wanted is None)
    if got is not None and wanted is not None:
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_can_be_differentiated(rule: Rule) -> None:
    logits = draw(5, 6).requires_grad_()

    def twice(decision: Decision) -> Tensor:
        scores = decision.logits if decision.scores is None else decision.scores
        loss = (decision.weights**2).sum() + (scores**3).sum() + (decision.logits**2).sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad((grad * draw(5, 6, seed=1)).sum(), logits)[0]

    got, wanted = (twice(decide(logits, None, rule)) for decide in (decisions.decide, rules.decide_in_steps))
    torch.testing.assert_close(got, wanted, **CLOSE)
