"""Loss scaling for float16: torch's ``GradScaler``, over all ranks of a folded model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from foldpar.comm import FoldedGroups, all_reduce_, local_tensor

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for a model whose ranks hold different parameters.

    An overflow in one expert is known to the ranks that hold it and to nobody else. Here all ranks of ``groups`` learn
    of it, so that all skip the step and keep one scale; and gradients may be DTensors, on any meshes, beside plain
    tensors, which torch's own refuses. Everything else is torch's, its ``state_dict`` included::

        scaler = foldpar.GradScaler("cuda", groups=groups)
        scaler.scale(loss).backward()
        foldpar.reduce_gradients(model, groups)
        scaler.unscale_(optimizer)
        foldpar.clip_grad_norm_(model, 1.0, groups)
        scaler.step(optimizer)
        scaler.update()

    Call ``unscale_`` (or ``step``, which does it where you have not) on every rank, behind ``reduce_gradients``: it is
    one all-reduce of a number over each of ``tp``, ``dp_cp`` and ``pp``.

    Args:
        device: where the scale lives, ``"cuda"`` or ``"cpu"``.
        groups: those that the model was built with.
        options: those of ``torch.amp.GradScaler``: ``init_scale``, ``growth_interval``, ``enabled``, ...

    Source: mixed precision training (Micikevicius et al. 2018), section 3.2.
    """

    def __init__(self, device: str = "cuda", *, groups: FoldedGroups, **options: Any) -> None:
        super().__init__(device, **options)
        self._groups = groups

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        own = [
            {"params": [_stand_in(each) for each in of["params"] if each.grad is not None]}
            for of in optimizer.param_groups
        ]
        given: Any = SimpleNamespace(param_groups=own)
        found = super()._unscale_grads_(given, inv_scale, found_inf, allow_fp16)
        anywhere = torch.stack([each.to(found_inf.device) for each in (found_inf, *found.values())]).amax(0)
        for group in (self._groups.tp, self._groups.dp_cp, self._groups.pp):
            all_reduce_(anywhere, group, op="max")
        devices = list(found) or [found_inf.device]
        return {device: anywhere.to(device) for device in devices}


def _stand_in(parameter: Tensor) -> Tensor:
    """A tensor whose gradient is that of the parameter, of a DTensor this rank's part; shares the memory."""
    assert parameter.grad is not None
    gradient = local_tensor(parameter.grad).detach()
    stand_in = gradient.detach()
    stand_in.grad = gradient
    return stand_in
