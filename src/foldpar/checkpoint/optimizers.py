"""One optimizer, several, or none: what saving and loading are given, and whether its states can be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from foldpar.arguments import expect
from foldpar.checkpoint.state import model_state, optimizer_state
from foldpar.comm import FoldedGroups
from foldpar.errors import CheckpointError

__all__ = ["Optimizers", "as_optimizers", "check_optimizer"]

Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]
"""Each parameter belongs to one of them."""


def as_optimizers(given: Optimizers | None) -> tuple[Optimizer, ...]:
    """One, several or none as several.

    Raises:
        CheckpointError: something is no ``torch.optim.Optimizer``, or two hold one parameter.
    """
    if given is None:
        return ()
    several = list(given.values()) if isinstance(given, Mapping) else given
    optimizers = tuple(several) if isinstance(several, (list, tuple)) else (several,)
    seen: set[int] = set()
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise CheckpointError(
                f"optimizer is a {type(each).__name__}: give a torch.optim.Optimizer, a list or a mapping of them, or "
                f"None."
            )
        held = {id(parameter) for group in each.param_groups for parameter in group["params"]}
        if held & seen:
            raise CheckpointError(
                f"Two of the {len(optimizers)} optimizers hold the same {len(held & seen)} parameter(s). States are "
                f"saved by the parameter's name, so each parameter must belong to one optimizer."
            )
        seen |= held
    return optimizers


def check_optimizer(model: nn.Module, optimizer: Optimizers, groups: FoldedGroups) -> None:
    """Raise if what an optimizer keeps cannot be saved; call it after the first step, which makes the states.

    Some optimizers keep what belongs to no element: factored moments, or scales of quantised ones. Of a parameter that
    is sharded such a state has no place in another layout, and :func:`foldpar.save_checkpoint` refuses it, hours later.
    Nothing is communicated.

    Example:
        >>> import torch
        >>> from foldpar import create_groups, solve_layout
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> check_optimizer(model, optimizer, create_groups(solve_layout(1)))

    Raises:
        CheckpointError: names the state and the parameter; or two optimizers hold one parameter, or there is none.
    """
    expect("check_optimizer", model=(model, nn.Module), groups=(groups, FoldedGroups))
    optimizers = as_optimizers(optimizer)
    if not optimizers:
        raise CheckpointError(
            "check_optimizer got no optimizer to look at: give a torch.optim.Optimizer, or a list or a mapping of them."
        )
    optimizer_state(optimizers, model_state(model, groups), groups)
