"""What the lanes of a TP group do at a router: which tokens it sees there, and how their numbers add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, TypeVar

import torch
from torch import Tensor

from foldpar.arguments import expect
from foldpar.comm import FoldedGroups, all_gather, all_reduce_, gather_rows, split_rows
from foldpar.families import (
    EXPERT_BIAS,
    REPLICATED,
    REPLICATED_PARTIAL,
    ROUTED_EXPERT,
    ROUTED_EXPERT_POST_HOC,
    ROUTER_ALL_TOKENS,
    ROUTER_OWN_TOKENS,
    ROUTER_POST_HOC,
    ParameterFamily,
)
from foldpar.moe.transport.messages import Partition

Lanes = Literal["replicated", "sharded"]
LaneGradients = Literal["replicated", "partial", "post-hoc"]
_Count = TypeVar("_Count", int, Tensor)


@dataclass(frozen=True, slots=True)
class LayerFamilies:
    """How the gradients of a layer's parts are reduced; of experts, their output ``bias`` apart.

    ``router`` is the layer's own, called with the rows that a lane routes; ``router_in_front`` one that sees what the
    layer is called with, as that of a block around :class:`foldpar.FoldedExperts`.
    """

    router: ParameterFamily
    router_in_front: ParameterFamily
    experts: ParameterFamily
    bias: ParameterFamily
    shared: ParameterFamily


@dataclass(frozen=True, slots=True)
class LaneState:
    """How the lanes of a layer hold its tokens and share its work: the arguments of :class:`FoldedMoE` as one value.

    ``FoldedMoE.lane_state`` is it, and auxiliary losses, capacity and counters take it. Layers with equal arguments
    have equal states. A router sees its lane's *own* tokens (``partition="tokens"`` and sharded lanes) or *all* tokens
    of the TP group, the same on every lane (``partition="assignments"``).

    Raises:
        ValueError: an unknown choice, or choices that contradict each other.
    """

    groups: FoldedGroups
    lanes: Lanes = "replicated"
    lane_grads: LaneGradients = "replicated"
    partition: Partition = "tokens"

    def __post_init__(self) -> None:
        expect("LaneState", groups=(self.groups, FoldedGroups))
        for name, choices in (
            ("lanes", ("replicated", "sharded")),
            ("lane_grads", ("replicated", "partial", "post-hoc")),
            ("partition", ("tokens", "assignments")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}.")
        if self.lanes == "sharded" and (self.partition == "assignments" or self.lane_grads != "replicated"):
            raise ValueError(
                f"lanes='sharded' means that every lane brings its own tokens and gets their own gradients, so "
                f"partition={self.partition!r} and lane_grads={self.lane_grads!r} cannot both apply. Leave the "
                f"defaults."
            )

    @property
    def own_tokens(self) -> bool:
        """Whether a lane's router sees only the lane's own tokens, so that counts must be summed over the lanes."""
        return self.lanes == "sharded" or self.partition == "tokens"

    @property
    def families(self) -> LayerFamilies:
        """What follows for the gradients of the layer's parameters: which rows its copies see, and which arrive."""
        if self.lane_grads == "post-hoc":
            cancelled = replace(EXPERT_BIAS, name="expert_bias_post_hoc", factor=Fraction(1, self.groups.tp.size))
            return LayerFamilies(ROUTER_POST_HOC, ROUTER_POST_HOC, ROUTED_EXPERT_POST_HOC, cancelled, REPLICATED)
        replicated = self.lanes == "replicated" and self.lane_grads == "replicated"
        in_front = ROUTER_ALL_TOKENS if replicated else ROUTER_OWN_TOKENS
        return LayerFamilies(
            router=in_front if self.partition == "assignments" else ROUTER_OWN_TOKENS,
            router_in_front=in_front,
            experts=ROUTED_EXPERT,
            bias=EXPERT_BIAS,
            shared=REPLICATED if replicated else REPLICATED_PARTIAL,
        )

    @property
    def random_region(self) -> Literal["replicated", "own_rows"]:
        """The region of random numbers that this layer's router draws in; see :func:`random_region`."""
        return "own_rows" if self.own_tokens else "replicated"

    def own(self, x: Tensor) -> Tensor:
        """The rows of a per-token tensor of the layer that the router sees here: ``[tokens, ...] -> [rows, ...]``.

        For what goes with the tokens and has no gradient: expert ids, padding, the number of a token's sequence.
        """
        if self.lanes == "replicated" and self.partition == "tokens":
            return split_rows(x.detach(), self.groups.tp, backward="zero_pad")
        return x

    def gather(self, rows: Tensor, row_counts: Sequence[int] | None = None) -> Tensor:
        """What routers of all lanes saw, in the order of the tokens: the inverse of :meth:`own`, without gradient.

        ``row_counts`` are those of :meth:`row_counts`, where they are known already.
        """
        if not self.own_tokens:
            return rows
        counts = self.row_counts(rows) if row_counts is None else row_counts
        return gather_rows(rows.detach(), counts, self.groups.tp)

    def row_counts(self, rows: Tensor) -> tuple[int, ...]:
        """How many rows the router of each lane saw: one small collective and one host synchronisation."""
        own = torch.tensor([rows.shape[0]], device=rows.device)
        return tuple(all_gather(own, self.groups.tp).flatten().tolist())

    def sum_counts(self, counts: Tensor, scope: Literal["lanes", "batch", "global"]) -> Tensor:
        """Sum integers of the routers' tokens in place, each token once, without gradient.

        Over ``"lanes"``: the tokens of one TP group. ``"batch"``: those of a data-parallel replica, whose sequences
        lie on the lanes and on the context ranks. ``"global"``: those of all data-parallel ranks.
        """
        if self.own_tokens:
            all_reduce_(counts, self.groups.tp)
        if scope != "lanes":
            all_reduce_(counts, self.groups.cp if scope == "batch" else self.groups.dp_cp)
        return counts

    def even_share(self, count: _Count) -> _Count:
        """An even share of a number that all lanes know, so that shares add up: of 5 on 2 lanes, 3 and 2."""
        tp = self.groups.tp
        return (count + (tp.size - 1 - tp.index)) // tp.size

    def count_share(self, count: _Count) -> _Count:
        """This lane's share of a number of things that its router saw: all of it, or an even share if all lanes did."""
        return count if self.own_tokens else self.even_share(count)
