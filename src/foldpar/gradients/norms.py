"""The norm of all gradients, and clipping by it, with every logical element counted once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foldpar.arguments import expect
from foldpar.comm import AxisGroup, FoldedGroups, all_gather, local_tensor, partial_dimension
from foldpar.errors import FamilyError
from foldpar.layout import Axis
from foldpar.parameters import refuse_unreduced_gradients, resolve_parameters, stamp

__all__ = ["clip_grad_norm_", "get_total_norm"]


def get_total_norm(model: nn.Module, groups: FoldedGroups, *, norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients of the whole model, as one process would compute it; the same bits on every rank.

    Shards, those of :func:`~foldpar.shard_model` included, count on each of their ranks, replicas once, pipeline stages
    all. Call it on every rank, after
    :func:`~foldpar.reduce_gradients`. Returns a scalar, float32, or float64 where a gradient is.

    A norm of norms is a norm, so every step is the same: of the gradients here, over the axes of the shards, over the
    families, over ``pp``.

    Example:
        >>> from foldpar import create_groups, solve_layout
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> get_total_norm(model, create_groups(solve_layout(1))).item()
        5.0

    Raises:
        ValueError: ``norm_type`` is not positive. FamilyError: a family is unknown or contradicted
            (:func:`~foldpar.parameter_families`), or a DTensor gradient is still partial.
    """
    expect(
        "get_total_norm", model=(model, nn.Module), groups=(groups, FoldedGroups), norm_type=(norm_type, (float, int))
    )
    if not norm_type > 0:
        raise ValueError(f"norm_type = {norm_type!r} must be a positive number or infinity.")
    folds: dict[FoldedGroups, int] = {groups: 0}
    gradients: dict[tuple[int, tuple[Axis, ...], int], list[Tensor]] = {}
    device, dtype = torch.device("cpu"), torch.float32
    for place, resolved in enumerate(resolve_parameters(model, groups)):
        parameter = resolved.parameter
        kind = (folds.setdefault(resolved.groups, len(folds)), resolved.shard_axes, resolved.data_replicas)
        same_shards = gradients.setdefault(kind, [])
        device = resolved.communication_device if place == 0 else device
        if parameter.grad is not None and parameter.requires_grad:
            _check_whole(resolved.name, parameter.grad)
            same_shards.append(local_tensor(parameter.grad))
            dtype = torch.promote_types(dtype, parameter.grad.dtype.to_real())
    with torch.no_grad():
        per_family, groups_of_fold = [], list(folds)
        for fold, shard_axes, replicas in sorted(gradients):
            norm = _norm_of_norms(_norms(gradients[fold, shard_axes, replicas], norm_type, device), norm_type)
            for group in _shard_groups(shard_axes, groups_of_fold[fold], replicas):
                norm = _norm_of_norms(all_gather(norm, group), norm_type)
            per_family.append(norm)
        norms = torch.stack(per_family) if per_family else torch.zeros(0, dtype=torch.float64, device=device)
        norm = _norm_of_norms(norms, norm_type)
        # Replicas may lie differently in memory and so be summed in another order. Clipped by norms that differ in the
        # last bit they would drift apart, so a stage takes the norm of its first rank.
        for group in (groups.tp, groups.dp_cp):
            norm = all_gather(norm, group)[0]
        return _norm_of_norms(all_gather(norm, groups.pp), norm_type).to(dtype)


def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    groups: FoldedGroups,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; returns the norm before.

    As ``torch.nn.utils.clip_grad_norm_``, for a folded model: call it on every rank, after
    :func:`~foldpar.reduce_gradients`. Nothing waits for the host, unless ``error_if_nonfinite``.

    Example:
        >>> from foldpar import create_groups, solve_layout
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> clip_grad_norm_(model, 1.0, create_groups(solve_layout(1))).item(), model.weight.grad
        (5.0, tensor([[0.6000, 0.8000]]))

    Raises:
        RuntimeError: the norm is infinite or NaN and ``error_if_nonfinite``; on every rank, with gradients untouched.
        GradientError: a gradient was not reduced. ValueError, FamilyError: see :func:`get_total_norm`.
    """
    expect(
        "clip_grad_norm_",
        model=(model, nn.Module),
        max_norm=(max_norm, (float, int, Tensor)),
        groups=(groups, FoldedGroups),
    )
    if not max_norm >= 0:
        raise ValueError(f"max_norm = {max_norm} must be zero or more; gradients are scaled down to it.")
    if groups.layout.world > 1:
        refuse_unreduced_gradients(model.named_parameters(), "clip_grad_norm_")
    norm = get_total_norm(model, groups, norm_type=norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"The gradient norm of order {norm_type} is {norm.item()}, so gradients cannot be clipped by it and were "
            f"left as they are. Look for the first layer or batch with a non-finite loss, or skip this step."
        )
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    with torch.no_grad():
        for device, gradients in _by_device(model).items():
            torch._foreach_mul_(gradients, coefficient.to(device))
    stamp(model.parameters())
    return norm


def _by_device(model: nn.Module) -> dict[torch.device, list[Tensor]]:
    gradients: dict[torch.device, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.requires_grad:
            gradients.setdefault(parameter.grad.device, []).append(local_tensor(parameter.grad))
    return gradients


def _check_whole(name: str, gradient: Tensor) -> None:
    dimension = partial_dimension(gradient)
    if dimension is not None:
        raise FamilyError(
            f"The gradient of {name} is a DTensor that is still partial over mesh dimension {dimension!r}: it has no "
            f"norm before it is summed. Call reduce_gradients first."
        )


def _shard_groups(shard_axes: tuple[Axis, ...], groups: FoldedGroups, replicas: int) -> list[AxisGroup]:
    """The groups that hold the shards, an ep and etp pair as one; those of one rank have nothing to add."""
    both = {"ep", "etp"} <= set(shard_axes)
    found = [groups.ep_etp] if both else []
    for axis in shard_axes:
        if axis in ("dp_cp", "edp"):
            found.append(groups.data_axes(axis, replicas)[1])
        elif not (both and axis in ("ep", "etp")):
            found.append(groups.axis(axis))
    return [group for group in found if group.size > 1]


def _norms(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of every tensor, accumulated in float32 or better: ``[gradients]`` in float64 on one device."""
    by_dtype: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():  # the maximum of nothing has no value
            by_dtype.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    norms = [torch.zeros(0, dtype=torch.float64, device=device)]
    for (_, dtype), same in by_dtype.items():
        accumulated = torch.promote_types(dtype, torch.float32)
        norms.append(torch.stack(torch._foreach_norm(same, norm_type, dtype=accumulated)).to(device, torch.float64))
    return torch.cat(norms)


def _norm_of_norms(norms: Tensor, norm_type: float) -> Tensor:
    if not norms.numel() and math.isinf(norm_type):
        return norms.new_zeros(())
    norm: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return norm
