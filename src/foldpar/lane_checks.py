"""Opt-in checks of what a folded layer takes on trust: finite routing weights, and the state of arriving gradients.

Every check ends with one agreement over the stage, so that all its ranks raise together instead of waiting for the
one that did.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foldpar.collectives import all_gather, all_reduce_
from foldpar.errors import ReplicaError, ShapeError
from foldpar.groups import FoldedGroups


def check_finite_weights(weights: Tensor, groups: FoldedGroups) -> None:
    """Raise on every rank of the stage if a routing weight is NaN or infinite on any of them.

    Raises:
        ShapeError: names this rank and how many of its weights are not finite.
    """
    bad = int((~weights.isfinite()).sum())
    if _somewhere(bad > 0, groups, weights.device):
        where = f"{bad} of {weights.numel()} on this rank ({groups.rank})" if bad else "on another rank of the stage"
        raise ShapeError(
            f"Routing weights are not finite: {where}. Look at the router's input and logits; a softmax over logits "
            f"that are all -inf gives NaN."
        )


def check_lane_gradient(grad: Tensor, groups: FoldedGroups, declared: Literal["replicated", "partial"]) -> None:
    """Raise on every rank of the stage if an arriving gradient is not in the state that the layer was told.

    A replicated gradient is equal on all lanes, within the rounding of its dtype (``sqrt(eps)`` of its largest
    entry). A partial one differs; a non-zero gradient that is equal on all lanes would be counted ``tp`` times.

    Raises:
        ReplicaError: names the lanes, the difference found and the remedy.
    """
    tp = groups.tp
    if tp.size == 1:
        return
    lanes = all_gather(grad.contiguous(), tp).double()
    largest = float(lanes.abs().max()) if lanes.numel() else 0.0
    spread = float((lanes.amax(0) - lanes.amin(0)).max()) if lanes.numel() else 0.0
    tolerance = torch.finfo(grad.dtype).eps ** 0.5 * largest
    wrong = spread > tolerance if declared == "replicated" else largest > 0 and spread <= tolerance
    if not _somewhere(wrong, groups, grad.device):
        return
    if not wrong:
        raise ReplicaError(
            f"The gradient that arrived at another TP group's FoldedMoE is not {declared}; see its ranks."
        )
    if declared == "replicated":
        raise ReplicaError(
            f"The gradient that arrived at this FoldedMoE differs between the lanes {tp.ranks} by up to {spread:.3g} "
            f"(largest entry {largest:.3g}), but lane_grads='replicated' says that it is equal on all of them. Some "
            f"consumer above works on different heads, columns or tokens per lane. Convert where it starts: "
            f"foldpar.copy_to_group(x, groups.tp) before a hand-written column-sharded layer, or "
            f"foldpar.split_rows(x, groups.tp, backward='all_gather') before a loss over the lane's own tokens. Where "
            f"nothing TP-sharded lies below, lane_grads='partial' is the other lawful way."
        )
    raise ReplicaError(
        f"The gradient that arrived at this FoldedMoE is equal on the lanes {tp.ranks} (within {spread:.3g}, largest "
        f"entry {largest:.3g}), but lane_grads='partial' says that the lanes' gradients add up to it, so it would be "
        f"counted {tp.size} times. Use lane_grads='replicated', or drop the conversion above this layer."
    )


def _somewhere(flag: bool, groups: FoldedGroups, device: torch.device) -> bool:
    """Whether the flag is up on any rank of the stage: every rank gets the same answer."""
    count = torch.tensor(float(flag), device=device)
    all_reduce_(all_reduce_(count, groups.tp, "max"), groups.dp_cp, "max")
    return bool(count)
