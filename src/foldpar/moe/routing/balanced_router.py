"""A router for benchmarks, whose load is perfectly even."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldpar.moe.routing.router import Routing, TopKRouter


class BalancedRouter(nn.Module):
    """A router whose selection is replaced by perfect balance, for benchmarks: round robin over the experts.

    Choice ``k`` of row ``i`` is expert ``(i * top_k + k) % num_experts``; weights are those of the scores there, so all
    that a forward and a backward cost is paid. Rows are counted from 0 on every lane.
    """

    def __init__(self, router: TopKRouter) -> None:
        super().__init__()
        self.router = router
        self.num_experts = router.num_experts

    @property
    def is_random(self) -> bool:
        """Whether the next forward draws random numbers."""
        return self.router.is_random

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Routing:
        """Route ``[tokens, dim]`` rows."""
        top_k = self.router.top_k
        place = torch.arange(x.shape[0] * top_k, device=x.device)
        routing: Routing = self.router(x, ids=(place % self.num_experts).view(-1, top_k), padding=padding)
        return routing
