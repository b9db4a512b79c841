"""From ``backward`` to ``optimizer.step``: every gradient becomes the one of a single process.

    reduce      reduce_gradients: after the backward, in buckets
    overlapped  GradientReducer: the same while the backward runs
    buckets     which gradients travel together, and the factor of each
    norms       norms and clipping over all ranks
    scaling     loss scaling that all ranks agree on

Laws: the factor of a gradient depends on its family, the layout and the kind of loss; both ways of reducing give the
same numbers. No layer is reached from here.
"""

from __future__ import annotations

from foldpar.gradients.norms import clip_grad_norm_, get_total_norm
from foldpar.gradients.overlapped import GradientReducer
from foldpar.gradients.reduce import reduce_gradients
from foldpar.gradients.scaling import GradScaler

__all__ = [
    "GradScaler",
    "GradientReducer",
    "clip_grad_norm_",
    "get_total_norm",
    "reduce_gradients",
]
