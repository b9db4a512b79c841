"""Whether a checkpoint fits a model and an optimizer: everything that differs, found before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foldpar.checkpoint.manifest import Manifest, OptimizerRecord, StateRecord, TensorRecord
from foldpar.checkpoint.state import KEPT_OPTIONS, Entry, ModelState
from foldpar.comm import local_tensor
from foldpar.errors import CheckpointError
from foldpar.parameters import Placement, Share
from foldpar.wording import some

__all__ = ["Match", "left_over", "match_model", "match_optimizers"]

_SMALL = 2**20  # bytes of a tensor that may be made before anything says that the files hold so much


@dataclass(slots=True, eq=False)
class Match:
    """What goes where: filled by :func:`match_model` and :func:`match_optimizers`, then read."""

    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Names in the checkpoint that belong to something on this rank."""
    used_by_optimizer: set[str] = field(default_factory=set)
    entries: list[Entry] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Targets and the fresh tensors that are read in their place."""
    states: dict[nn.Parameter, dict[str, Any]] = field(default_factory=dict)
    options: list[tuple[dict[str, Any], Mapping[str, Any]]] = field(default_factory=list)
    schedulers: list[dict[str, Any]] = field(default_factory=list)


def match_model(match: Match, manifest: Manifest, state: ModelState, *, cast: bool, staged: bool) -> None:
    """Find every parameter and buffer of the model in the checkpoint, and note what does not fit."""
    canonical = _canonical(manifest)
    missing: list[str] = []
    named: list[tuple[str, TensorRecord, tuple[str, ...]]] = [
        *((place.name, state.parameters[place.name], (place.name, *place.aliases)) for place in state.placements),
        *((name, record, (name,)) for name, record in state.buffers.items()),
    ]
    for name, record, names in named:
        found = [canonical[other] for other in names if other in canonical]
        match.used.update(found)
        if not found:
            missing.append(name)
            continue
        saved = manifest.parameters.get(found[0]) or manifest.buffers[found[0]]
        match.problems += _differences(name, saved, record, cast)
        entry = replace(state.entries[name], key=f"model.{found[0]}")
        if staged:
            fresh = torch.empty_like(entry.tensor)
            match.copies.append((entry.tensor, fresh))
            entry = replace(entry, tensor=fresh)
        match.entries.append(entry)
    if missing:
        match.problems.append(f"the model has what the checkpoint does not: {some(missing)}")


def left_over(manifest: Manifest, used: set[str], used_by_optimizer: set[str] | None) -> list[str]:
    """What the checkpoint has and no rank of the model took: problems."""
    problems = []
    extra = [name for name in (*manifest.parameters, *manifest.buffers) if name not in used]
    if extra:
        problems.append(f"the checkpoint has what the model does not: {some(extra)}")
    if used_by_optimizer is not None and manifest.optimizer is not None:
        unused = [name for name in manifest.optimizer.options if name not in used_by_optimizer and name in used]
        if unused:
            problems.append(f"parameters that were optimized are not given to this optimizer: {some(unused)}")
    return problems


def match_optimizers(
    match: Match, manifest: Manifest, state: ModelState, optimizers: Sequence[Optimizer], *, staged: bool
) -> None:
    """Find options and states of every parameter that the optimizers hold, and make tensors to read states into."""
    record = manifest.optimizer
    if record is None:
        match.problems.append("the checkpoint holds no optimizer: load it with optimizer=None")
        return
    kinds = list(dict.fromkeys(type(each).__qualname__ for each in optimizers))
    if {*(record.kinds.values() or [record.kind])} != {*kinds}:
        here = f"these are {', '.join(kinds)}, whose" if len(kinds) > 1 else f"this is {', '.join(kinds)}, whose"
        match.problems.append(
            f"it was saved with the optimizer {record.kind}, and {here} states mean something else: load it with "
            f"optimizer=None, and start the optimizer anew"
        )
        return
    canonical = _canonical(manifest)
    placements = {id(placement.parameter): placement for placement in state.placements}
    missing: list[str] = []
    limit = sum(file.size for file in manifest.files.values())
    groups = [(each, group) for each in optimizers for group in each.param_groups]
    for number, (optimizer, group) in enumerate(groups):
        kind = type(optimizer).__qualname__
        options: dict[str, Mapping[str, Any]] = {}
        for parameter in group["params"]:
            placement = placements.get(id(parameter))
            if placement is None:
                match.problems.append(f"the optimizer's group {number} holds a parameter that the model does not have")
                continue
            names = [canonical[name] for name in (placement.name, *placement.aliases) if name in canonical]
            names = [name for name in names if name in record.options]
            match.used_by_optimizer.update(names)
            if not names:
                missing.append(placement.name)
                continue
            if record.kind_of(names[0]) != kind:
                match.problems.append(
                    f"{placement.name} was trained by {record.kind_of(names[0])}, and is given to {kind} here: give "
                    f"each optimizer the parameters that it had"
                )
                continue
            options[placement.name] = record.options[names[0]]
            saved_dtype = manifest.parameters[names[0]].dtype
            old = {} if staged else optimizer.state.get(parameter, {})
            match.states[parameter] = _states(match, placement, names[0], saved_dtype, record, group, old, limit)
        _match_options(match, number, group, options)
    if missing:
        match.problems.append(f"this optimizer holds parameters that were not optimized: {some(missing)}")


def _canonical(manifest: Manifest) -> dict[str, str]:
    """Every name of a parameter or a buffer, those of tied ones too -> the name that it is stored by."""
    names = {alias: name for name, record in manifest.parameters.items() for alias in record.aliases}
    return {**names, **{name: name for name in (*manifest.parameters, *manifest.buffers)}}


def _differences(name: str, saved: TensorRecord, here: TensorRecord, cast: bool) -> list[str]:
    problems = []
    if saved.shape != here.shape:
        what = f"{name} is {list(saved.shape)} in the checkpoint and {list(here.shape)} in the model"
        experts = (saved.family or "").startswith(("routed_expert", "expert_bias"))
        if experts and saved.shape[:1] != here.shape[:1] and saved.shape[1:] == here.shape[1:]:
            what = f"{name} has {saved.shape[0]} experts in the checkpoint and {here.shape[0]} in the model"
        problems.append(what)
    if saved.dtype != here.dtype and not cast:
        problems.append(
            f"{name} is {saved.dtype} in the checkpoint and {here.dtype} in the model: pass cast=True to convert"
        )
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers.


def _states(
    match: Match,
    placement: Placement,
    saved_name: str,
    saved_dtype: str,
    record: OptimizerRecord,
    group: Mapping[str, Any],
    old: Mapping[str, Any],
    limit: int,
) -> dict[str, Any]:
    """The states of one parameter: plain values, and tensors that are still to be read."""
    states: dict[str, Any] = {}
    for key, saved in record.state.get(saved_name, {}).items():
        if saved.kind == "value":
            states[key] = saved.value
            continue
        share = placement.share
        if saved.kind == "whole":
            if prod(saved.shape) != 1 and not share.is_whole:
                match.problems.append(
                    f"the optimizer's state {key!r} of {placement.name} was saved whole, {list(saved.shape)}, and the "
                    f"parameter is sharded here: which part belongs to which rank cannot be told"
                )
                continue
            share = Share.whole(saved.shape)
        if prod(saved.shape) * _dtype(saved.dtype).itemsize > max(limit, _SMALL):
            match.problems.append(
                f"the optimizer's state {key!r} of {placement.name} has the shape {list(saved.shape)}, which is more "
                f"than all files hold"
            )
            continue
        state = _state_tensor(key, saved, saved_dtype, placement.parameter, group, old.get(key))
        states[key] = state
        local = placement.local(state) if saved.kind == "parameter" else local_tensor(state)
        match.entries.append(Entry(f"optimizer.state.{saved_name}.{key}", share, local, 0, 1))
    return states


def _state_tensor(
    key: str, saved: StateRecord, saved_dtype: str, parameter: nn.Parameter, group: Mapping[str, Any], old: Any
) -> Tensor:
    """The tensor that takes a state: the old one where it fits, else a new one where the optimizer wants it."""
    # A state of the parameter's dtype follows the parameter when that is converted.
    dtype = parameter.dtype if saved.dtype == saved_dtype else _dtype(saved.dtype)
    shape = parameter.shape if saved.kind == "parameter" else torch.Size(saved.shape)
    if isinstance(old, Tensor) and (old.shape, old.dtype) == (shape, dtype):
        return old
    if saved.kind == "parameter":
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    # Optimizers count steps on the host, unless they are told to stay on the device.
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.empty(shape, dtype=_dtype(saved.dtype), device="cpu" if on_host else parameter.device)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"A state in the checkpoint has the dtype {name!r:.60}, which torch does not know.")
    return dtype


def _match_options(match: Match, number: int, group: dict[str, Any], options: Mapping[str, Mapping[str, Any]]) -> None:
    """One set of options for a group, if all its parameters were saved with the same."""
    sets = list(options.items())
    for name, other in sets[1:]:
        if other != sets[0][1]:
            first = sets[0][1]
            differing = [option for option in {**first, **other} if first.get(option) != other.get(option)]
            match.problems.append(
                f"group {number} of the optimizer joins parameters that were saved with different options: "
                f"{differing[0]} is {first.get(differing[0])!r} for {sets[0][0]} and {other.get(differing[0])!r} for "
                f"{name}. Make the parameter groups as they were"
            )
            return
    for name, value in sets[0][1].items() if sets else ():
        here = group.get(name)
        number_here = isinstance(here, Tensor) and (isinstance(value, bool) or not isinstance(value, (int, float)))
        if number_here or (isinstance(here, tuple) and not isinstance(value, list)):
            match.problems.append(
                f"the option {name} of group {number} of the optimizer is {here!r} here and {value!r:.60} in the "
                f"checkpoint, which is of another kind"
            )
            return
    if sets:
        match.options.append((group, {name: value for name, value in sets[0][1].items() if name not in KEPT_OPTIONS}))
