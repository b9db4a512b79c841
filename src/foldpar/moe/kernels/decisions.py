"""From logits to the chosen experts and their weights: one kernel each way on GPUs.

    logits -> scores -> the top_k largest (plus a bias) -> their scores, normalised and scaled

The torch code in ``rules`` is the kernels' twin, and what is computed elsewhere: on CPUs, in float64, for scores that
the kernels do not know, in traced graphs, and in a backward that is to be differentiated itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from foldpar.moe.kernels import rules
from foldpar.moe.kernels.permutation import runs_on_triton
from foldpar.moe.kernels.rules import Decision, Rule

_MOST_EXPERTS, _MOST_CHOSEN = 1024, 16


def decides_at_once(logits: Tensor, rule: Rule) -> bool:
    """Whether :func:`decide` is one kernel for these logits."""
    known = rule.score in ("softmax", "sigmoid") and rule.top_k <= _MOST_CHOSEN and logits.shape[1] <= _MOST_EXPERTS
    return known and runs_on_triton(logits) and not torch.compiler.is_compiling()


def decide(logits: Tensor, bias: Tensor | None, rule: Rule) -> Decision:
    """The ``top_k`` experts with the largest scores, plus ``bias``, and their weights, which the bias does not enter.

    Of equal ones the lower id wins; NaN is larger than any number.

    Backward:
        Of the logits; it may be differentiated again.
    """
    return Decision(*cast(Any, _Decide).apply(logits, bias, rule))


class _Decide(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, rule: Rule) -> Decision:
        from foldpar.moe.kernels import triton_decisions as kernels

        decision = kernels.decide(logits, bias, rule)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(decision.ids)
        ctx.save_for_backward(logits, decision.ids)
        return decision

    @staticmethod
    def backward(
        ctx: Any, of_logits: Tensor | None, of_scores: Tensor | None, _: None, of_weights: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        from foldpar.moe.kernels import triton_decisions as kernels

        logits, ids = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return kernels.gradient(logits, ids, of_logits, of_scores, of_weights, ctx.rule), None, None
        return rules.gradient(logits, ids, of_logits, of_scores, of_weights, ctx.rule), None, None
