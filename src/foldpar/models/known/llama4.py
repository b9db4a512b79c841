"""Llama 4: transposed experts, whose *input* is scaled by the routing weight; the block's forward cannot stay."""

from __future__ import annotations

from typing import Any, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from foldpar.models.known.adapter import MoEAdapter
from foldpar.moe import ExpertStorage, FoldedExperts


class FoldedLlama4Moe(nn.Module):
    """The block with the same children, router scores and outputs, ``([tokens, dim], logits [tokens, experts])``.

    Every assignment is a row of its own, scaled before it travels; its output then counts once.
    """

    def __init__(self, block: nn.Module, experts: FoldedExperts) -> None:
        super().__init__()
        module = cast(Any, block)
        self.top_k, self.hidden_dim, self.num_experts = module.top_k, module.hidden_dim, module.num_experts
        self.experts, self.router, self.shared_expert = experts, module.router, module.shared_expert

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[batch, length, dim]`` to ``[tokens, dim]`` and the router's logits."""
        tokens = rearrange(hidden_states, "... dim -> (...) dim")
        scores, logits = self.router(tokens)
        ids = logits.detach().topk(self.top_k, dim=1).indices
        scaled = rearrange(
            tokens[:, None] * scores.gather(1, ids)[:, :, None], "tokens choices dim -> (tokens choices) dim"
        )
        routed = self.experts(
            scaled, rearrange(ids, "tokens choices -> (tokens choices) 1"), torch.ones_like(scaled[:, :1])
        )
        summed = reduce(routed, "(tokens choices) dim -> tokens dim", "sum", choices=self.top_k)
        return self.shared_expert(tokens) + summed, logits


ADAPTERS = (
    MoEAdapter("Llama4TextMoe", routers=("router",), storage=ExpertStorage(transposed=True), around=FoldedLlama4Moe),
)
