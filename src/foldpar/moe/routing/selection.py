"""Choosing only among the experts of the best groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foldpar.arguments import expect_sizes
from foldpar.errors import ShapeError
from foldpar.moe.kernels.rules import largest
from foldpar.wording import divisors, listed


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """A token may choose only experts of its best groups: ``num_groups`` equal groups of consecutive experts.

    A group counts as much as its best expert (``score="max"``, DeepSeek-V2) or as its two best together
    (``"top2_sum"``, DeepSeek-V3); the ``top_groups`` best remain. Node-limited routing is this with one group per
    node that the EP group spans: then a row travels to at most ``top_groups`` nodes.
    """

    num_groups: int
    top_groups: int
    score: Literal["max", "top2_sum"] = "max"

    def __post_init__(self) -> None:
        expect_sizes("GroupLimit", num_groups=self.num_groups, top_groups=self.top_groups)
        if self.score not in ("max", "top2_sum"):
            raise ValueError(f"The score of a group is {self.score!r}; choose 'max' or 'top2_sum'.")


def allowed(scores: Tensor, limit: GroupLimit) -> Tensor:
    """``[tokens, num_experts]``: whether the expert's group is among the best of the token."""
    members = scores.unflatten(-1, (limit.num_groups, -1))
    group_scores = members.amax(-1) if limit.score == "max" else members.topk(2, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(group_scores, dtype=torch.bool)
    chosen.scatter_(1, largest(group_scores, limit.top_groups), True)
    return chosen.repeat_interleave(members.shape[-1], dim=-1)


def check_group_limit(limit: GroupLimit, num_experts: int, top_k: int) -> None:
    """Refuse groups that do not fit the experts, and too few of them for ``top_k``."""
    groups = limit.num_groups
    if groups < 1 or num_experts % groups:
        raise ShapeError(
            f"num_groups = {groups} does not divide num_experts = {num_experts}. With num_experts = {num_experts}, "
            f"num_groups can be {listed(divisors(num_experts))}."
        )
    per_group = num_experts // groups
    fewest = -(-top_k // per_group)
    if not fewest <= limit.top_groups <= groups:
        raise ShapeError(
            f"top_groups = {limit.top_groups} does not fit: top_k = {top_k} experts need {fewest} or more of the "
            f"num_groups = {groups} groups of {per_group}. top_groups can be {fewest} to {groups}."
        )
    if limit.score == "top2_sum" and per_group < 2:
        raise ShapeError(
            f"score='top2_sum' adds the two best experts of a group, but num_groups = {groups} leaves {per_group} "
            f"expert in each. Take score='max', or fewer groups."
        )
