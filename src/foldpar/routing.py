"""Routers: from rows to the experts that compute them, with which weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldpar.errors import ShapeError


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What a router decided for ``[tokens, dim]`` rows.

    Attributes:
        ids: ``[tokens, top_k]``, int32 or int64, global expert ids.
        weights: ``[tokens, top_k]``, floating point: what each expert's output is multiplied by, once.
        logits: ``[tokens, num_experts]``, for auxiliary losses; ``None`` where a router has none.
        mask: ``[tokens, top_k]``, bool, ``False`` for dropped or padded assignments; ``None`` where all count.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor | None = None
    mask: Tensor | None = None


class Router(Protocol):
    """Anything that turns rows ``[tokens, dim]`` into a :class:`Routing`; zero tokens included."""

    def __call__(self, x: Tensor, /) -> Routing: ...


class TopKRouter(nn.Module):
    """A linear router with top-k selection.

    Scores are ``softmax`` or ``sigmoid`` of the logits, taken over all experts in float32 or wider; the ``top_k``
    largest are kept, divided by their sum if ``renormalize``, and multiplied by ``scaling_factor``. Softmax with
    ``renormalize=True`` is Mixtral's router, without it that of Switch and OLMoE.

    Args:
        dim, num_experts, top_k: width of a row, experts in all, experts per token.
        score: how logits become scores.
        renormalize: whether a token's weights sum to ``scaling_factor``.
        scaling_factor: multiplies every weight (DeepSeek's ``routed_scaling_factor``).

    Raises:
        ShapeError: ``top_k`` is not between 1 and ``num_experts``. ValueError: an unknown ``score``.

    Source: Shazeer et al. 2017, section 2.1; Mixtral (Jiang et al. 2024), section 2.1; sigmoid scores: DeepSeek-V3
    (2024), section 2.1.2.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ShapeError(f"top_k = {top_k} must be between 1 and num_experts = {num_experts}.")
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score is {score!r}; choose 'softmax' or 'sigmoid'.")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.score, self.renormalize, self.scaling_factor = score, renormalize, scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as ``nn.Linear`` does: uniform within ``1 / sqrt(dim)``."""
        nn.init.uniform_(self.weight, -(self.dim**-0.5), self.dim**-0.5)

    def forward(self, x: Tensor) -> Routing:
        """Route ``[tokens, dim]`` rows; weights and logits are float32, or float64 for float64 rows."""
        logits = F.linear(x, self.weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        weights, ids = scores.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + torch.finfo(weights.dtype).tiny)
        return Routing(ids=ids, weights=weights * self.scaling_factor, logits=logits)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}"
