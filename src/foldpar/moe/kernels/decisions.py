"""From logits to the chosen experts and their weights: one kernel each way on GPUs.

    logits -> scores -> the top_k largest (plus a bias) -> their scores, normalised and scaled

The torch code here is the kernels' twin, and what is computed elsewhere: on CPUs, in float64, for scores that the
kernels do not know, in traced graphs, and in a backward that is to be differentiated itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from foldpar.moe.kernels.permutation import runs_on_triton

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    # The clamp keeps the gradient of the root finite where softplus underflows.
    "sqrt_softplus": lambda logits: F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt(),
}
_MOST_EXPERTS, _MOST_CHOSEN = 1024, 16


@dataclass(frozen=True, slots=True)
class Rule:
    """How logits decide; the arguments are those of :class:`foldpar.TopKRouter`.

    ``over_all``: scores are those of all experts; else the softmax of the chosen logits is taken.
    """

    top_k: int
    score: str
    over_all: bool
    renormalize: bool
    scaling_factor: float

    def scores(self, logits: Tensor) -> Tensor:
        """What experts are chosen by, before any bias."""
        return SCORES[self.score](logits) if self.over_all else logits

    def weights(self, scores: Tensor, ids: Tensor) -> Tensor:
        """``[tokens, top_k]``: the weights of these experts; of an id out of range, those of some other one."""
        weights = scores.gather(1, ids.clamp(0, scores.shape[1] - 1).long())
        if not self.over_all:
            weights = weights.softmax(-1)
        elif self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + torch.finfo(weights.dtype).tiny)
        return weights * self.scaling_factor


class Decision(NamedTuple):
    """``logits`` and ``scores``, ``[tokens, num_experts]``, ``ids`` (int64) and ``weights``, ``[tokens, top_k]``.

    In float32 or wider. ``scores`` are ``None`` where they are the logits.
    """

    logits: Tensor
    scores: Tensor | None
    ids: Tensor
    weights: Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """The ids of the ``count`` largest of each row, ``topk`` with a rule for equal ones: the lower id comes first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


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
        return gradient(logits, ids, of_logits, of_scores, of_weights, ctx.rule), None, None


# ---------------------------------------------------------------------------------------------------------------------
# The kernels' twins.


def decide_in_steps(logits: Tensor, bias: Tensor | None, rule: Rule) -> Decision:
    """What :func:`decide` computes."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = rule.scores(logits)
    ids = largest(scores if bias is None else scores + bias, rule.top_k)
    return Decision(logits, scores if rule.over_all else None, ids, rule.weights(scores, ids))


def gradient(
    logits: Tensor,
    ids: Tensor,
    of_logits: Tensor | None,
    of_scores: Tensor | None,
    of_weights: Tensor | None,
    rule: Rule,
) -> Tensor:
    """Of the logits, from those of what was decided; differentiable where gradients are on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        given = logits if logits.requires_grad else logits.detach().requires_grad_()
        wide = given if given.dtype == torch.float64 else given.float()
        scores = rule.scores(wide)
        outputs = ((wide, of_logits), (scores, of_scores), (rule.weights(scores, ids), of_weights))
        there, arriving = zip(*((output, of) for output, of in outputs if of is not None), strict=True)
        (grad,) = torch.autograd.grad(there, given, arriving, create_graph=create_graph)
    return grad
