"""By which number a gradient is multiplied, as exact fractions of the layout."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from foldpar.families import ParameterFamily, Reduction
from foldpar.layout import FoldedLayout

__all__ = ["gradient_factor", "loss_factor"]


def loss_factor(layout: FoldedLayout, loss: Literal["mean", "sum"]) -> Fraction:
    """The factor of one rule for dense and expert gradients alike: *sum over the data axis, times this*.

    The data axis is ``dp_cp`` for dense parameters and ``edp`` for routed experts. With ``loss="mean"`` each rank's
    loss is the mean of its own batch and the loss of the step is the mean over the ``dp * cp`` data-parallel ranks. A
    token reaches each of its experts once in the stage, whichever rank holds it, so an expert's gradients, summed
    over ``edp``, come from all ``dp * cp`` ranks and are divided by ``dp * cp`` too: not by ``edp``, not by ``ep``.
    With ``loss="sum"`` each rank has divided its loss by the global token count already (the right choice for ragged
    batches), and both sums stand as they are.

    Where a wrapper has averaged expert gradients over ``edp`` already, the rule is ``edp * loss_factor`` instead.

    Example:
        >>> from foldpar import solve_layout
        >>> loss_factor(solve_layout(8, tp=2, ep=4), "mean"), loss_factor(solve_layout(8, tp=2, ep=4), "sum")
        (Fraction(1, 4), Fraction(1, 1))

    Raises:
        ValueError: ``loss`` is neither ``"mean"`` nor ``"sum"``.
    """
    if loss not in ("mean", "sum"):
        raise ValueError(
            f"loss = {loss!r} is unknown: it can be 'mean' (each rank's loss is the mean of its own batch) or 'sum' "
            f"(each rank has divided its loss by the global token count)."
        )
    return Fraction(1, layout.dp * layout.cp) if loss == "mean" else Fraction(1)


def gradient_factor(family: ParameterFamily, layout: FoldedLayout, loss: Literal["mean", "sum"]) -> Fraction:
    """All factors of a family as one: what each rank's gradient is multiplied by when lanes and data axis are summed.

    Example:
        >>> from foldpar.families import DENSE_SHARDED, REPLICATED
        >>> from foldpar import solve_layout
        >>> layout = solve_layout(8, tp=2, ep=4)
        >>> gradient_factor(DENSE_SHARDED, layout, "mean"), gradient_factor(REPLICATED, layout, "mean")
        (Fraction(1, 4), Fraction(1, 8))

    Raises:
        ValueError: ``loss`` is neither ``"mean"`` nor ``"sum"``.
    """
    factor = loss_factor(layout, loss) * family.factor
    if family.reduction is Reduction.AVERAGE and family.lane_axis is not None:
        return factor / layout.size(family.lane_axis)
    if family.reduction is Reduction.EXPERT_TP_CANCEL:
        return factor / layout.tp
    return factor
