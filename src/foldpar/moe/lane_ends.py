"""The two ends of a layer that shares its work over the lanes: a conjugate pair, chosen once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from foldpar.comm import all_gather_rows, all_reduce, copy_to_group, even_row_counts, split_rows
from foldpar.moe.lanes import LaneState

__all__ = ["LaneEnds", "lane_ends"]


@dataclass(frozen=True, slots=True)
class LaneEnds:
    """How replicated lanes share a layer's work: three maps that are each other's conjugates.

    ``own``: all tokens to those that this lane routes. ``enter``: what goes to the experts, rows and weights alike.
    ``leave``: the combined rows, back to all tokens (whose number is the second argument).
    """

    own: Callable[[Tensor], Tensor]
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor, int], Tensor]
    why: str


def lane_ends(state: LaneState) -> LaneEnds:
    """The pair of ends for a state of the lanes and of the gradient that arrives at the output.

    =============  ===========  =======================================  ==========================================
    gradient       partition    leave: forward; backward                 enter: forward; backward
    =============  ===========  =======================================  ==========================================
    replicated     tokens       all-gather of rows; own rows             own rows; all-gather
    replicated     assignments  all-reduce; identity                     identity; all-reduce
    partial        tokens       all-gather of rows; reduce-scatter       own rows; own rows, zero elsewhere
    partial        assignments  all-reduce; all-reduce                   identity; identity
    =============  ===========  =======================================  ==========================================

    Post-hoc gradients take the ends of partial ones: what averages to the gradient adds up to ``tp`` times it.
    """
    tp = state.groups.tp
    alone = "one (tp = 1), which takes all tokens; no split, no gather" if tp.size == 1 else ""
    if state.lanes == "sharded":
        why = alone or "sharded: every lane brings its own tokens; no split, no gather"
        return LaneEnds(_same, _same, _same_rows, why)
    replicated = state.lane_grads == "replicated"
    if state.partition == "tokens":
        return LaneEnds(
            own=lambda x: split_rows(x, tp, backward="all_gather" if replicated else "zero_pad"),
            enter=_same,
            leave=lambda y, tokens: all_gather_rows(
                y,
                tp,
                row_counts=even_row_counts(tokens, tp.size),
                backward="slice" if replicated else "reduce_scatter",
            ),
            why=alone or f"replicated: a lane takes 1/{tp.size} of the tokens, and rows are gathered after combining",
        )
    return LaneEnds(
        own=_same,
        enter=lambda x: copy_to_group(x, tp) if replicated else x,
        leave=lambda y, tokens: all_reduce(y, tp, backward="identity" if replicated else "sum"),
        why=alone or f"replicated: a lane takes 1/{tp.size} of each expert's assignments, and partial rows are summed",
    )


def _same(x: Tensor) -> Tensor:
    return x


def _same_rows(y: Tensor, tokens: int) -> Tensor:
    return y
