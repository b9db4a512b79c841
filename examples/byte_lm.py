"""A byte-level Mixture-of-Experts language model in plain PyTorch, one process, no parallelism.

It knows nothing of foldpar: ``train_folded_lm.py`` folds it, and its numbers are what the folded run is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    vocab: int = 256
    dim: int = 64
    heads: int = 8
    layers: int = 2
    experts: int = 8
    top_k: int = 2
    hidden: int = 96
    shared_hidden: int = 64


class Attention(nn.Module):
    """Causal self-attention. Heads are counted from the projections' width, so it works on a slice of them too."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads_of(projection(x)) for projection in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(rearrange(y, "batch heads length head_dim -> batch length (heads head_dim)"))

    def heads_of(self, x: Tensor) -> Tensor:
        """``[batch, length, width]`` to ``[batch, heads, length, head_dim]``."""
        apart = "batch length (heads head_dim) -> batch heads length head_dim"
        return rearrange(x, apart, head_dim=self.head_dim)


class FeedForward(nn.Module):
    """SwiGLU: the shared expert."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """Softmax over all experts, the largest ``top_k``, renormalised."""

    def __init__(self, dim: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).softmax(-1)
        weights, ids = scores.topk(self.top_k, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)


class Experts(nn.Module):
    """Every expert, one after the other: the plainest loop."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, dim) * dim**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            columns = F.linear(x[token], gate_up)
            gate, up = rearrange(columns, "rows (gate_up units) -> gate_up rows units", gate_up=2)
            y = y.index_add(0, token, F.linear(F.silu(gate) * up, down) * weights[token, choice, None])
        return y


class MoE(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.router = Router(config.dim, config.experts, config.top_k)
        self.experts = Experts(config.experts, config.dim, config.hidden)
        self.shared = FeedForward(config.dim, config.shared_hidden)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "batch length dim -> (batch length) dim")
        return self.experts(tokens, *self.router(tokens)).view_as(x) + self.shared(x)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.heads)
        self.moe: nn.Module = MoE(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class ByteLM(nn.Module):
    """``[batch, length]`` tokens to ``[batch, length, vocab]`` logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)

    def features(self, tokens: Tensor) -> Tensor:
        """Everything below the head: ``[batch, length, dim]``."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))
