"""``lockstep``: what a data rank does in a step for which it has no data, while the others have some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from foldpar.arguments import expect
from foldpar.errors import ArgumentError
from foldpar.moe.folded_experts import FoldedExperts
from foldpar.moe.layer import FoldedMoE

_Batch = TypeVar("_Batch")


@contextmanager
def lockstep(model: nn.Module, batch: _Batch | None, *, like: _Batch) -> Iterator[tuple[_Batch, float]]:
    """A batch for every rank in every step, and its weight: the rank's own and 1, or without data a stand-in and 0.

    Run forward and backward inside, and multiply by the weight what this rank adds: its loss, auxiliary losses of the
    model's own included, and its number of tokens. The stand-in is ``like``, which the model can run, as zero rows need
    not be; all its tokens are padding to the folded layers of the model. So it adds nothing to gradients, which are
    exact zeros and not ``None``, to loads and correction biases, to ``load_balancing_loss`` and ``router_z_loss``, and
    takes no room of a :class:`Capacity`; :class:`LayerCounters` count it as padded. Its rows never travel.

    Args:
        batch: whatever the model is called with, or ``None`` where this rank has no more data.
        like: a batch of the same kind with real tokens, the first one say, on every rank, with or without data; its
            loss must be finite. The lanes of a TP group have data together or not at all, and hold the same ``like``.

    With ``reduce_gradients(loss="sum")`` nothing else changes. With ``"mean"`` a rank without data still counts as one
    of the ``dp * cp`` ranks of the mean. Statistics that a model of its own keeps outside of folded layers (batch
    norms) see the stand-in.

    Example:
        >>> import torch
        >>> model, like = nn.Linear(2, 1, bias=False), torch.ones(3, 2)
        >>> for batch in (None, torch.ones(1, 2)):
        ...     with lockstep(model, batch, like=like) as (x, weight):
        ...         (weight * model(x).sum()).backward()
        ...     len(x), weight, model.weight.grad
        (3, 0.0, tensor([[0., 0.]]))
        (1, 1.0, tensor([[1., 1.]]))

    Raises:
        ArgumentError: the model is none, or ``like`` is ``None``.
    """
    expect("lockstep", model=(model, nn.Module))
    if like is None:
        raise ArgumentError(
            "lockstep: like must be a batch that the model can run, on every rank and in every step, also where there "
            "is data: take the first one, or make one."
        )
    if batch is not None:
        yield batch, 1.0
        return
    layers = [layer for layer in model.modules() if isinstance(layer, (FoldedMoE, FoldedExperts))]
    before = [layer.without_data for layer in layers]
    for layer in layers:
        layer.without_data = True
    try:
        yield like, 0.0
    finally:
        for layer, had_none in zip(layers, before, strict=True):
            layer.without_data = had_none
