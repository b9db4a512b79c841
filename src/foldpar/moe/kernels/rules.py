"""How logits decide, in plain torch: the twin of the kernels in ``triton_decisions``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    # The clamp keeps the gradient of the root finite where softplus underflows.
    "sqrt_softplus": lambda logits: F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt(),
}


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


def decide_in_steps(logits: Tensor, bias: Tensor | None, rule: Rule) -> Decision:
    """What ``decisions.decide`` computes."""
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
