"""The states of learning rate schedulers, which keep a value for each parameter group: by parameter, for any groups.

saved:   groups [[a, b], [c]]   base_lrs [0.1, 0.2]
loaded:  groups [[c], [a], [b]] base_lrs [0.2, 0.1, 0.1]      or refused: [[a, c]] has no one rate
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from foldpar.checkpoint.state import ModelState
from foldpar.checkpoint.values import decode, encode
from foldpar.errors import CheckpointError

__all__ = ["Scheduler", "as_schedulers", "install_schedulers", "match_schedulers", "scheduler_states"]


class Scheduler(Protocol):
    """Whatever has a state, above all ``torch.optim.lr_scheduler``'s and transformers'."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def as_schedulers(given: Scheduler | Sequence[Scheduler]) -> tuple[Scheduler, ...]:
    """One or several as several.

    Raises:
        CheckpointError: something has no state.
    """
    schedulers = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for each in schedulers:
        if not (callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))):
            raise CheckpointError(
                f"schedulers holds a {type(each).__name__}, which has no state_dict and load_state_dict: give a "
                f"scheduler or a list of them."
            )
    return schedulers


def scheduler_states(
    schedulers: Sequence[Scheduler], optimizers: Sequence[Optimizer], state: ModelState
) -> dict[str, Any]:
    """A JSON document of their states, and of the parameters in each group of the optimizer of each.

    Raises:
        CheckpointError: there is no optimizer, or it cannot be told which one is a scheduler's, or a state holds what
            cannot be kept.
    """
    if not schedulers:
        return {}
    if not optimizers:
        raise CheckpointError("schedulers are saved and loaded with their optimizer: without it they mean nothing.")
    groups = [_groups(each, optimizers, state) for each in schedulers]
    return {
        "kinds": [type(each).__qualname__ for each in schedulers],
        "groups": groups[0] if groups.count(groups[0]) == len(groups) else groups,
        "states": [
            encode(_plain(each.state_dict()), f"schedulers[{place}].state_dict()")
            for place, each in enumerate(schedulers)
        ],
    }


def match_schedulers(
    stages: Sequence[Mapping[str, Any]],
    schedulers: Sequence[Scheduler],
    optimizers: Sequence[Optimizer],
    state: ModelState,
    problems: list[str],
) -> list[dict[str, Any]]:
    """The states for the schedulers at hand, whose optimizer may have other groups; adds what does not fit.

    Args:
        stages: what :func:`scheduler_states` gave on the first rank of each pipeline stage.
    """
    if not schedulers:
        return []
    here = scheduler_states(schedulers, optimizers, state)
    if not stages:
        problems.append("the checkpoint holds no schedulers: load it without, and make them anew")
        return []
    for kinds in (stage["kinds"] for stage in stages):
        if kinds != here["kinds"]:
            problems.append(
                f"it was saved with the schedulers {', '.join(kinds)}, and these are {', '.join(here['kinds'])}"
            )
            return []
    found = len(problems)
    for place, fresh in enumerate(here["states"]):
        for stage in stages:
            problems.extend(_of_another_kind(f"schedulers[{place}]", decode(stage["states"][place]), decode(fresh)))
    if len(problems) > found:
        return []
    states = []
    for place, fresh in enumerate(here["states"]):
        saved_groups = [_groups_of(stage, place) for stage in stages]
        regroup = _Regroup.of(saved_groups, _groups_of(here, place), problems)
        own = next((stage for stage, _ in regroup.places.values()), 0)
        saved = [decode(stage["states"][place]) for stage in stages]
        states.append(regroup.value(f"schedulers[{place}]", saved, own, decode(fresh)))
    return states


def _groups_of(document: Mapping[str, Any], place: int) -> list[list[str]]:
    """Those of one scheduler's optimizer: written once where all have the same."""
    groups: list[Any] = document["groups"]
    several = any(isinstance(each, list) for group in groups for each in group)
    found: list[list[str]] = groups[place] if several else groups
    return found


def install_schedulers(schedulers: Sequence[Scheduler], states: Sequence[dict[str, Any]]) -> None:
    """Give them their states, after the optimizer has its own."""
    for place, (scheduler, state) in enumerate(zip(schedulers, states, strict=True)):
        try:
            scheduler.load_state_dict(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"schedulers[{place}], a {type(scheduler).__name__}, does not take its state from the checkpoint "
                f"({type(error).__name__}: {error}). All else was loaded: make the schedulers anew."
            ) from error


def _groups(scheduler: Scheduler, optimizers: Sequence[Optimizer], state: ModelState) -> list[list[str]]:
    own = getattr(scheduler, "optimizer", None)
    found = [each for each in optimizers if each is own] or (optimizers if len(optimizers) == 1 else [])
    if not found:
        raise CheckpointError(
            f"A {type(scheduler).__name__} is of none of the {len(optimizers)} optimizers given (its attribute "
            f"'optimizer' is {type(own).__name__}), so it cannot be told whose rates it keeps. Give the optimizers "
            f"that schedulers were made with."
        )
    optimizer = found[0]
    names = {id(placement.parameter): placement.name for placement in state.placements}
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    """Rates may be tensors of one element: as numbers, which schedulers put into the tensors again."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if type(value) is dict:
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return value


def _of_another_kind(where: str, saved: Any, fresh: Any) -> list[str]:
    """What no such scheduler could have saved; lists of values for each group may be of other lengths."""
    numbers = (int, float)
    if fresh is None or (saved is None and not isinstance(fresh, (dict, list, tuple))):
        return []
    if isinstance(fresh, numbers) and isinstance(saved, numbers):
        return []
    if type(saved) is not type(fresh):
        return [f"{where} is {saved!r:.60} in the checkpoint, which is of another kind than here, {fresh!r:.60}"]
    if isinstance(fresh, dict):
        return [
            problem
            for name in fresh
            if name in saved
            for problem in _of_another_kind(f"{where}[{name!r}]", saved[name], fresh[name])
        ]
    if isinstance(fresh, (list, tuple)):
        if where.endswith("['_schedulers']") and len(saved) != len(fresh):
            return [f"{where} has {len(saved)} elements in the checkpoint and {len(fresh)} here"]
        return [
            problem
            for place, (one, other) in enumerate(zip(saved, fresh, strict=False))
            for problem in _of_another_kind(f"{where}[{place}]", one, other)
        ]
    return []


@dataclass(frozen=True, slots=True)
class _Regroup:
    """From the groups that states were saved with to those at hand."""

    sizes: tuple[int, ...]
    """How many groups each stage had."""
    places: Mapping[str, tuple[int, int]]
    """Parameter of this rank -> its stage and group when it was saved."""
    groups: Sequence[Sequence[str]]
    problems: list[str]

    @classmethod
    def of(cls, stages: Sequence[Sequence[Sequence[str]]], groups: list[list[str]], problems: list[str]) -> _Regroup:
        saved = {
            name: (number, place)
            for number, stage in enumerate(stages)
            for place, group in enumerate(stage)
            for name in group
        }
        places = {name: saved[name] for group in groups for name in group if name in saved}
        return cls(tuple(map(len, stages)), places, groups, problems)

    def value(self, where: str, saved: Sequence[Any], own: int, fresh: Any) -> Any:
        """A value of a state: a list with one element for each group is regrouped, all else stays."""
        mine = saved[own]
        if isinstance(mine, dict) and isinstance(fresh, dict):
            return {
                key: self.value(
                    f"{where}[{key!r}]",
                    [each.get(key) if isinstance(each, dict) else None for each in saved],
                    own,
                    fresh[key],
                )
                if key in fresh
                else value
                for key, value in mine.items()
            }
        if not isinstance(mine, (list, tuple)) or not isinstance(fresh, (list, tuple)):
            return mine
        inner = isinstance(next(iter(mine), None), dict) and not where.endswith("['lr_lambdas']")
        by_group = (
            not inner
            and len(fresh) == len(self.groups)
            and all(
                isinstance(each, (list, tuple)) and len(each) == size
                for each, size in zip(saved, self.sizes, strict=True)
            )
        )
        if by_group:
            return type(mine)(self._of_group(where, saved, number, fresh[number]) for number in range(len(self.groups)))
        if len(mine) == len(fresh):  # schedulers inside of a scheduler
            return type(mine)(
                self.value(f"{where}[{place}]", [_at(each, place) for each in saved], own, fresh[place])
                for place in range(len(mine))
            )
        return mine

    def _of_group(self, where: str, saved: Sequence[Any], number: int, fresh: Any) -> Any:
        found = {name: self.places[name] for name in self.groups[number] if name in self.places}
        values = {name: saved[stage][place] for name, (stage, place) in found.items()}
        if not values:
            return fresh
        (name, first), *others = values.items()
        differing = next((other for other, value in others if value != first), None)
        if differing is not None:
            self.problems.append(
                f"group {number} of the optimizer joins {name} and {differing}, for which {where} was saved as "
                f"{first!r} and {values[differing]!r}. Make the parameter groups as they were"
            )
        return first


def _at(value: Any, place: int) -> Any:
    return value[place] if isinstance(value, (list, tuple)) and place < len(value) else None
