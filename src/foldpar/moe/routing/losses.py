"""Auxiliary losses of a router: load balancing and z-loss, alike in every layout.

What a rank adds to its loss
----------------------------
A loss here is defined on the tokens of a *scope*; ranks hold parts of it. The value that a rank gets is what it *adds
to its own loss*, so that after ``backward`` and ``foldpar.reduce_gradients`` all gradients are those of

    step loss = mean over data-parallel replicas of (task loss + coefficient * auxiliary loss)

with ``"batch"`` and ``"sequence"``, and of one auxiliary loss over all tokens with ``"global"``. To print the loss,
put the values together the way in which the gradients are:

======================  ==============================================  =================================
over                    the router sees own tokens                      the router sees all tokens
======================  ==============================================  =================================
the lanes (tp)          sum: every lane adds its share                  each lane has it; partial: sum
context and data ranks  mean with ``loss="mean"``, sum with ``"sum"``   the same
======================  ==============================================  =================================

(With ``lane_grads="post-hoc"`` the values of the lanes average to it, as all gradients do there.) Counts have no
gradient; they are summed over the ranks of the scope, with the number of tokens, in one or two small collectives.
Decisions count, also those that a capacity drops afterwards; padding tokens do not.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from foldpar.arguments import expect
from foldpar.errors import ShapeError
from foldpar.factors import loss_factor
from foldpar.moe.lanes import LaneState
from foldpar.moe.routing.router import Routing

Scope = Literal["batch", "sequence", "global"]


def load_balancing_loss(
    routing: Routing,
    lane_state: LaneState,
    *,
    scope: Scope = "batch",
    sequences: tuple[Tensor, int] | None = None,
    loss: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """How uneven a routing is: ``num_experts * sum over experts of fraction * mean probability``; 1 when even.

    ``fraction`` is an expert's part of all assignments, without gradient. A token's probabilities are its scores
    divided by their sum (which a softmax leaves as it is). Transformers' models report ``top_k`` times this.

    Args:
        routing: from ``moe(x, return_routing=True)``, with ``logits`` or ``scores``.
        lane_state: ``moe.lane_state``.
        scope: whose tokens the fractions and means are taken over. ``"batch"``: those of one data-parallel replica,
            its lanes and context ranks together. ``"sequence"``: those of each sequence, of which the mean is taken.
            ``"global"``: those of all data-parallel ranks.
        sequences: for ``"sequence"``, the number of the sequence of each of the layer's tokens, ``[tokens]`` int64
            from 0, the same on all lanes and context ranks that hold parts of it; and how many there are in the
            replica. Of ``[batch, length, dim]``: ``(torch.arange(batch).repeat_interleave(length), batch)``.
        loss: as in :func:`reduce_gradients`.

    Returns:
        A scalar to add to this rank's loss, times a coefficient. How the ranks' values add up: see the module.

    Raises:
        ShapeError: the routing has neither logits nor scores, or the sequences do not fit the tokens. ValueError: an
            unknown scope, or sequences without ``scope="sequence"``.

    Source: Switch (Fedus et al. 2021), section 2.2, for ``top_k`` as in DeepSeek-V3 (2024), equation 17.
    """
    expect("load_balancing_loss", routing=(routing, Routing), lane_state=(lane_state, LaneState))
    scores = routing.scores if routing.scores is not None else _logits(routing, "load_balancing_loss").softmax(-1)
    _check_scope(scope, ("batch", "sequence", "global"))
    if (scope == "sequence") != (sequences is not None):
        raise ValueError(
            f"scope={scope!r} {'needs' if sequences is None else 'takes no'} sequences: the number of every token's "
            f"sequence and how many there are, which scope='sequence' balances one by one."
        )
    rows, num_experts = scores.shape
    place, count = _places(sequences, rows, lane_state, scores.device)
    with torch.no_grad():
        present = _tokens(routing, rows, scores.device)
        decided = present[:, None].expand(routing.ids.shape)
        slot = place[:, None] * num_experts + routing.ids.clamp(0, num_experts - 1).long()
        per_expert = present.new_zeros(count * num_experts).scatter_add_(0, slot.flatten(), decided.flatten())
        tokens = present.new_zeros(count).scatter_add_(0, place, present)
        pooled = lane_state.sum_counts(torch.cat([tokens, per_expert]), _pool(scope))
        tokens, per_expert = pooled[:count].to(scores.dtype), pooled[count:].view(count, num_experts)
        fraction = per_expert / (tokens * routing.ids.shape[1]).clamp(min=1)[:, None]
        of_mean = 1 / (tokens.clamp(min=1) * (tokens > 0).sum().clamp(min=1))  # of its sequence, and over sequences
        gradient = (num_experts * fraction * of_mean[:, None])[place] * present[:, None]
    probabilities = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return (probabilities * gradient).sum() * _rank_factor(lane_state, scope, loss)


def router_z_loss(
    routing: Routing,
    lane_state: LaneState,
    *,
    scope: Literal["batch", "global"] = "batch",
    loss: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The mean over tokens of ``logsumexp(logits) ** 2``, which keeps logits small.

    Arguments, scopes, and how the ranks' values add up are those of :func:`load_balancing_loss`.

    Raises:
        ShapeError: the routing has no logits. ValueError: an unknown scope.

    Source: ST-MoE (Zoph et al. 2022), equation 5.
    """
    expect("router_z_loss", routing=(routing, Routing), lane_state=(lane_state, LaneState))
    logits = _logits(routing, "router_z_loss")
    _check_scope(scope, ("batch", "global"))
    present = _tokens(routing, logits.shape[0], logits.device)
    tokens = lane_state.sum_counts(present.sum(), _pool(scope)).clamp(min=1)
    share = (logits.logsumexp(-1).square() * present).sum() / tokens
    return share * _rank_factor(lane_state, scope, loss)


def _rank_factor(lane_state: LaneState, scope: str, loss: Literal["mean", "sum"]) -> float:
    """From the share of the scope's loss that is this rank's to what it adds to its own loss."""
    layout = lane_state.groups.layout
    pooled = layout.dp * layout.cp if scope == "global" else layout.cp
    factor = Fraction(pooled, layout.dp * layout.cp) / loss_factor(layout, loss)
    if lane_state.lane_grads == "post-hoc" and lane_state.own_tokens:
        factor *= layout.tp  # gradients of the lanes are averaged, and each holds a share
    if lane_state.lane_grads == "partial" and not lane_state.own_tokens:
        factor /= layout.tp  # gradients of the lanes are summed, and each holds the whole
    return float(factor)


def _pool(scope: str) -> Literal["batch", "global"]:
    return "global" if scope == "global" else "batch"


def _tokens(routing: Routing, rows: int, device: torch.device) -> Tensor:
    """``[rows]``, int64: 1 for tokens, 0 for padding."""
    if routing.padding is None:
        return torch.ones(rows, dtype=torch.int64, device=device)
    return (~routing.padding).long()


def _places(
    sequences: tuple[Tensor, int] | None, rows: int, lane_state: LaneState, device: torch.device
) -> tuple[Tensor, int]:
    """For each routed row the number of its sequence, and how many there are."""
    if sequences is None:
        return torch.zeros(rows, dtype=torch.int64, device=device), 1
    place, count = lane_state.own(sequences[0].to(device).flatten()), sequences[1]
    if place.shape[0] != rows or place.dtype != torch.int64:
        raise ShapeError(
            f"sequences must hold an int64 number for each of the layer's tokens: of its {sequences[0].numel()} "
            f"{sequences[0].dtype} numbers {place.shape[0]} fall on this lane, whose router saw {rows} row(s)."
        )
    return place, count


def _logits(routing: Routing, function: str) -> Tensor:
    if routing.logits is None:
        raise ShapeError(
            f"{function} needs the logits of the router, [tokens, num_experts], and this routing has none. Let the "
            f"router return them: Routing(..., logits=logits)."
        )
    return routing.logits


def _check_scope(scope: str, choices: tuple[str, ...]) -> None:
    if scope not in choices:
        raise ValueError(f"scope is {scope!r}; choose one of {', '.join(map(repr, choices))}.")
