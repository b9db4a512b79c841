"""Whether the gradients of this step are complete: told by the gradients themselves.

    backward -> .grad (a part of the sum) -> reduce_gradients -> .grad (the gradient, stamped) -> clip -> optimizer.step

A stamp stays on a gradient while it is scaled in place; the next backward, after ``zero_grad``, makes a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from foldpar.dtensors import is_dtensor, local_tensor
from foldpar.errors import GradientError
from foldpar.groups import FoldedGroups

__all__ = [
    "declare_reduced",
    "mark_replaced",
    "refuse_reduced",
    "refuse_unreduced_gradients",
    "stamp",
    "watch_optimizers",
]

_STAMP = "_foldpar_reduced"
_REPLACED = "_foldpar_replaced"
_HOOK = "optimizer step hook"


def stamp(parameters: Iterable[nn.Parameter]) -> None:
    """Say of the gradients as they are now that they are complete."""
    for gradient in _gradients(parameters):
        setattr(gradient, _STAMP, _version(gradient))


def declare_reduced(model: nn.Module) -> None:
    """Say that the gradients of this step are complete, in a loop that reduces them without ``reduce_gradients``.

    :func:`foldpar.clip_grad_norm_` and optimizers refuse gradients of which nobody has said so. Call it on every step,
    after your own reduction. Nothing is communicated or changed.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> declare_reduced(model)   # behind an all-reduce of your own
    """
    stamp(model.parameters())


def refuse_reduced(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise if a gradient was reduced already, and nothing has changed it since.

    Raises:
        GradientError: names it.
    """
    for name, parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and getattr(gradient, _STAMP, None) == _version(gradient):
            raise GradientError(
                f"The gradient of {name} was reduced already, and no backward has run since: a second reduction would "
                f"sum it over its replicas again. Reduce once a step, after its last backward, and call zero_grad "
                f"before the next step."
            )


def refuse_unreduced_gradients(parameters: Iterable[tuple[str, nn.Parameter]], doing: str) -> None:
    """Raise if a gradient was never reduced.

    Raises:
        GradientError: names it.
    """
    for name, parameter in parameters:
        if parameter.grad is not None and not hasattr(parameter.grad, _STAMP):
            raise GradientError(
                f"{doing}: the gradient of {name} is not reduced: it is this rank's part of a sum, or that of its own "
                f"batch. Call foldpar.reduce_gradients(model, groups) after the last backward of every step and before "
                f"clipping and optimizer.step(), also after shard_model; and after whatever puts new tensors into "
                f".grad. A loop that reduces gradients by itself says so: foldpar.declare_reduced(model)."
            )


def mark_replaced(before: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Remember of parameters that are no longer the model's that an optimizer which has them trains nothing."""
    now = {id(parameter) for parameter in model.parameters()}
    for parameter in before:
        if id(parameter) not in now:
            setattr(parameter, _REPLACED, True)


def watch_optimizers(groups: FoldedGroups) -> None:
    """Look at every optimizer before it steps, for as long as the groups live; repeating it does nothing.

    Raises:
        GradientError: in ``step``: it holds parameters that folding or sharding replaced, or experts whose gradients
            were not reduced.
    """
    if _HOOK not in groups.kept:
        groups.kept[_HOOK] = register_optimizer_step_pre_hook(partial(_before_step, groups.layout.world > 1))


def _before_step(are_several: bool, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, _REPLACED):
                raise GradientError(
                    f"This {type(optimizer).__name__} holds a parameter of shape {list(parameter.shape)} that "
                    f"fold_model or shard_model has replaced, so that it trains nothing while the loss may still fall. "
                    f"Make the optimizer after them, from foldpar.parameter_groups(model)."
                )
            if are_several and _is_expert(parameter):
                refuse_unreduced_gradients([("an expert", parameter)], f"{type(optimizer).__name__}.step()")


def _is_expert(parameter: Tensor) -> bool:
    """Whether it lies on the mesh of the experts."""
    if not is_dtensor(parameter):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return "ep" in names and "etp" in names


def _gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Any]:
    return (parameter.grad for parameter in parameters if parameter.grad is not None)


def _version(gradient: Tensor) -> int:
    return local_tensor(gradient)._version
