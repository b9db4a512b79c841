"""Whole tensors and what ranks hold of them, by the boxes that the library says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import foldpar
from foldpar.parameters.boxes import Share
from foldpar.parameters.placements import parameter_placements

Held = dict[str, tuple[Share, Tensor]]
Place = tuple[slice, ...]


def held_by(model: nn.Module, groups: foldpar.FoldedGroups) -> Held:
    """By name, what this rank holds and its values."""
    return {
        placement.name: (placement.share, placement.local(placement.parameter).detach().clone())
        for placement in parameter_placements(model, groups)
    }


def assembled(of_ranks: Sequence[Held]) -> dict[str, Tensor]:
    """Whole tensors; every element must come from somewhere."""
    found: dict[str, Tensor] = {}
    for held in of_ranks:
        for name, (share, local) in held.items():
            whole = found.setdefault(name, torch.full(share.shape, torch.nan, dtype=local.dtype))
            assert whole.shape == share.shape
            for there, here in places(share):
                whole[there] = local[here]
    assert not [name for name, tensor in found.items() if tensor.isnan().any()]
    return found


def cut(whole: Tensor, share: Share) -> Tensor:
    """What a rank holds of it."""
    assert whole.shape == share.shape
    local = torch.zeros(share.local, dtype=whole.dtype)
    for there, here in places(share):
        local[here] = whole[there]
    return local


def places(share: Share) -> Iterator[tuple[Place, Place]]:
    """Of every box: where it lies in the whole tensor, and where in the local one."""
    for box in share.boxes:
        there, here = (
            tuple(slice(start, start + size) for start, size in zip(starts, box.sizes, strict=True))
            for starts in (box.offsets, box.starts)
        )
        yield there, here
