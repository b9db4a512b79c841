"""Models that somebody might have written: blocks with names of their own, and experts stored in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldpar.models.known import ExpertWeights, MoEAdapter
from foldpar.moe.kernels.activations import ClampedSwiGLU
from foldpar.moe.storage import ExpertStorage

DIM, HIDDEN, EXPERTS, TOP_K, HEADS = 8, 6, 4, 2, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=name == "o") for name in "qkvo")
        self.gain = nn.Parameter(torch.randn(DIM // HEADS))  # of every head's queries

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(x.shape[0], self.num_heads, -1).transpose(0, 1) for w in (self.wq, self.wk, self.wv))
        scores = ((q * self.gain) @ k.transpose(1, 2)).softmax(-1)
        return self.wo((scores @ v).transpose(0, 1).flatten(1))


class StackedExperts(nn.Module):
    """Weights in three stacks, called as ``(x, scores, chosen)``."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) / 2)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) / 2)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) / 2)

    def forward(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("ehd,td->teh", self.w1, x)) * torch.einsum("ehd,td->teh", self.w3, x)
        every = torch.einsum("edh,teh->ted", self.w2, hidden)
        return (every.gather(1, chosen[..., None].expand(-1, -1, DIM)) * scores[..., None]).sum(1)


class HandMade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chooser = nn.Linear(DIM, EXPERTS, bias=False)
        self.specialists = StackedExperts()

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.chooser(x).softmax(-1).topk(TOP_K)
        return self.specialists(x, scores, chosen)


class Model(nn.Module):
    def __init__(self, block: type[nn.Module] = HandMade) -> None:
        super().__init__()
        self.norm, self.attention, self.moe, self.head = nn.LayerNorm(DIM), Attention(), block(), nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return self.head(x + self.moe(x))


HEADS_PLAN = {
    "attention.wq": "colwise",
    "attention.wk": "colwise",
    "attention.wv": "colwise",
    "attention.wo": "rowwise",
}


HAND_MADE = MoEAdapter(
    "HandMade",
    experts="specialists",
    routers=("chooser",),
    weights=lambda experts: ExpertWeights(torch.cat([experts.w1, experts.w3], 1), experts.w2),
    activation="swiglu",
    call=lambda folded, x, scores, chosen: folded(x, chosen, scores),
    tp_plan=HEADS_PLAN,
    partial=("gain",),
)


@dataclass(frozen=True)
class Stored:
    """A storage, its activation, and whether there are biases."""

    storage: ExpertStorage
    activation: Any = "swiglu"
    bias: bool = False


class ConventionExperts(nn.Module):
    """Experts of the common convention, in any storage; computed one by one."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored, storage = stored, stored.storage
        self.gate_up_proj = nn.Parameter(torch.randn(storage.gate_up_shape(EXPERTS, DIM, 2 * HIDDEN)) / 2)
        self.down_proj = nn.Parameter(torch.randn(storage.down_shape(EXPERTS, DIM, HIDDEN)) / 2)
        if stored.bias:
            self.register_parameter(storage.gate_up_bias, nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN)))
            self.register_parameter(storage.down_bias, nn.Parameter(torch.randn(EXPERTS, DIM)))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x * 0.0  # without tokens it still has a graph
        for token in range(len(x)):
            for place in range(ids.shape[1]):
                out[token] = out[token] + weights[token, place] * self.one(x[token], int(ids[token, place]))
        return out

    def one(self, x: Tensor, expert: int) -> Tensor:
        storage = self.stored.storage
        first, second = self.gate_up_proj[expert], self.down_proj[expert]
        gate_up = x @ first if storage.transposed else first @ x
        if self.stored.bias:
            gate_up = gate_up + getattr(self, storage.gate_up_bias)[expert]
        gate, up = (gate_up[::2], gate_up[1::2]) if storage.interleaved else gate_up.chunk(2)
        if isinstance(self.stored.activation, ClampedSwiGLU):
            limit, alpha = self.stored.activation.limit, self.stored.activation.alpha
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            hidden = (up + 1) * gate * torch.sigmoid(alpha * gate)
        else:
            hidden = F.silu(gate) * up
        out = hidden @ second if storage.transposed else second @ hidden
        return out + getattr(self, storage.down_bias)[expert] if self.stored.bias else out


class Convention(nn.Module):
    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, EXPERTS), ConventionExperts(stored)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        return self.experts(x, ids, weights)
