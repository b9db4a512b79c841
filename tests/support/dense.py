"""The one reference of the experts: an expert after the other, in one process. It imports nothing from foldpar.

Models that a user might have written (``hand_made.py``, ``examples/byte_lm.py``) have loops of their own: they are what
is folded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

Expert = Callable[[Tensor], Tensor]
"""``[rows, dim] -> [rows, dim]``."""


def dense_experts(
    x: Tensor, ids: Tensor, weights: Tensor, experts: Sequence[Expert], mask: Tensor | None = None
) -> Tensor:
    """Of every token, ``sum(weights[token, choice] * experts[ids[token, choice]](x[token]))`` over what a mask keeps.

    ``x`` is ``[tokens, dim]``, the others are ``[tokens, top_k]``; an id that no expert has goes nowhere.
    """
    y = x * 0.0  # without assignments it still has a graph
    for number, expert in enumerate(experts):
        chosen = ids == number if mask is None else (ids == number) & mask
        token, choice = chosen.nonzero(as_tuple=True)
        rows = expert(x[token]) * weights[token, choice, None]
        y = y.index_add(0, token, rows.to(y.dtype))
    return y


def feed_forward(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> list[Expert]:
    """Experts of stacked weights ``[experts, parts * hidden, dim]`` and ``[experts, dim, hidden]``; 2 parts: gated."""

    def expert(number: int, x: Tensor) -> Tensor:
        biases = [None if bias is None else bias[number] for bias in (gate_up_bias, down_bias)]
        columns = F.linear(x, gate_up[number], biases[0])
        gate, *up = rearrange(columns, "rows (parts units) -> parts rows units", units=down.shape[2])
        hidden = activation(gate) * up[0] if up else activation(gate)
        return F.linear(hidden, down[number], biases[1])

    return [partial(expert, number) for number in range(len(down))]


def softmax_routing(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Expert ids and renormalised weights, ``[tokens, top_k]`` each, of a router's weight ``[experts, dim]``."""
    scores, ids = F.linear(x, router).softmax(-1).topk(top_k)
    return ids, scores / scores.sum(-1, keepdim=True)
