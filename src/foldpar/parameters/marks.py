"""Which family every parameter has: marks, and the rules that resolve them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from foldpar.arguments import expect
from foldpar.comm import (
    AxisGroup,
    FoldedGroups,
    MeshAxes,
    MeshDim,
    communication_device,
    data_was_assigned,
    is_dtensor,
    is_sharding,
)
from foldpar.errors import ArgumentError, FamilyError, GroupsError, ModelError, ShardingError
from foldpar.families import DENSE_SHARDED, REPLICATED, ParameterFamily
from foldpar.layout import Axis
from foldpar.parameters.fsdp import bring_back_shards, is_sharded_over, replicas_of_shards, sharded_module
from foldpar.parameters.newcomers import greet_newcomers
from foldpar.wording import some

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "ResolvedParameter",
    "groups_of",
    "mark_parameters",
    "parameter_families",
    "parameter_groups",
    "resolve_parameters",
]

_MARK = "_foldpar_family"
_MARKS_BY_NAME = "_foldpar_family_of_name"
_MARKS_OF_CHILDREN = "_foldpar_family_of_child"
_Target = TypeVar("_Target", bound="nn.Module | nn.Parameter")


def mark_parameters(target: _Target, family: ParameterFamily, *, names: Iterable[str] | None = None) -> _Target:
    """Declare the family of a parameter, or of all parameters of a module and its children; returns the target.

    The nearest mark wins, in whatever order marks are made: the parameter's own, then that of the module that owns
    it (by ``names`` before the module's), then of the modules around that. So a mark on the whole model is a default,
    which the marks inside (those that ``FoldedMoE`` makes, for example) override. A module keeps its marks when it is
    copied and when its parameters are replaced; a mark on a parameter belongs to that tensor.

    Args:
        names: mark only these of the module's own parameters, such as ``("sinks",)``.

    Example:
        >>> from foldpar import families
        >>> model = mark_parameters(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), families.REPLICATED)
        >>> head = mark_parameters(model[0], families.REPLICATED_PARTIAL, names=("bias",))

    Raises:
        FamilyError: the target is no module and no parameter, the family is no ``ParameterFamily``, or the module has
            no parameter of such a name.
    """
    if not isinstance(target, (nn.Module, nn.Parameter)):
        raise FamilyError(f"mark_parameters marks a torch.nn.Module or a Parameter, not a {type(target).__name__}.")
    if not isinstance(family, ParameterFamily):
        raise FamilyError(
            f"mark_parameters takes a ParameterFamily, not {family!r}: one of foldpar.families, such as "
            f"families.REPLICATED, or your own."
        )
    if names is None:
        setattr(target, _MARK, family)
        return target
    names = (names,) if isinstance(names, str) else tuple(names)
    own = dict(target.named_parameters(recurse=False, remove_duplicate=False)) if isinstance(target, nn.Module) else {}
    for name in names:
        if name not in own:
            raise FamilyError(
                f"names has {name!r}, but the own parameters of this {type(target).__name__} are "
                f"{', '.join(own) or 'none'}. For a parameter of a child, mark the child."
            )
    setattr(target, _MARKS_BY_NAME, {**getattr(target, _MARKS_BY_NAME, {}), **dict.fromkeys(names, family)})
    return target


def mark_children(module: nn.Module, families: Mapping[str, ParameterFamily]) -> None:
    """Say what the children's parameters are *in this place*: weaker than a child's own mark, nearer than any other.

    For a layer that knows what its arguments make of its children. A child that is used in two layers, or copied into
    another one, takes no mark with it.
    """
    setattr(module, _MARKS_OF_CHILDREN, dict(families))


def mark_what_is_here(model: nn.Module, family: ParameterFamily) -> None:
    """Mark every parameter that has no mark yet and is not cut over tp, each by its name in the module that owns it.

    Unlike a mark on the model it says nothing of what enters the model later: adapters, heads, parametrizations.
    """
    for module, name, use in _places(model):
        if use.explicit is None and use.inherited is None and not is_cut_over_tp(use.parameter):
            mark_parameters(module, family, names=(name,))


def is_cut_over_tp(parameter: nn.Parameter) -> bool:
    """Whether it is a DTensor of which each lane has a part."""
    if not is_dtensor(parameter):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(name == "tp" and is_sharding(dim) for name, dim in zip(names, parameter.placements, strict=False))


def tie_marks_to_names(model: nn.Module) -> None:
    """Turn marks on parameters into marks of the modules that own them, which outlive the tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            family: ParameterFamily | None = getattr(parameter, _MARK, None)
            if family is not None:
                mark_parameters(module, family, names=(name,))


def nearest_marks(model: nn.Module) -> list[tuple[str, nn.Parameter, ParameterFamily | None, FoldedGroups | None]]:
    """Every parameter once: its name, the mark that it has or inherits, and the groups of its layer."""
    return [(use.name, use.parameter, use.explicit or use.inherited, use.groups) for use in _first_uses(model)]


def mark_of(module: nn.Module, name: str) -> ParameterFamily | None:
    """The mark of one of a module's own parameters: its own, or the module's."""
    own: ParameterFamily | None = getattr(module, _MARK, None)
    by_name: dict[str, ParameterFamily] = getattr(module, _MARKS_BY_NAME, {})
    return getattr(getattr(module, name), _MARK, None) or by_name.get(name) or own


def explicitly_marked(model: nn.Module) -> set[nn.Parameter]:
    """The parameters with a mark of their own, or on the module that owns them."""
    return {use.parameter for use in _uses(model) if use.explicit is not None}


def parameter_families(model: nn.Module, groups: FoldedGroups) -> dict[str, ParameterFamily]:
    """The one family of every parameter, frozen ones included, by name; a tied parameter appears once.

    Decided by, in this order:

    1. *DTensor*: a parameter sharded over tp is ``DENSE_SHARDED``, whatever the default around it says.
    2. *The nearest mark*, see :func:`mark_parameters`.
    3. *Without a mark*: ``REPLICATED`` where ``tp = 1``, since there are no lanes to tell apart. Otherwise an error:
       whether a lane's gradient is whole or a part of a sum cannot be seen, and is never guessed.

    Example:
        >>> from foldpar import create_groups, solve_layout
        >>> families = parameter_families(nn.Linear(4, 4, bias=False), create_groups(solve_layout(1)))
        >>> {name: family.name for name, family in families.items()}
        {'weight': 'replicated'}

    Raises:
        FamilyError: a parameter has no mark and ``tp > 1``; a tied parameter is marked in two ways; a DTensor's
            placement contradicts the mark on the parameter or on the module that owns it.
    """
    expect("parameter_families", model=(model, nn.Module), groups=(groups, FoldedGroups))
    return {resolved.name: resolved.family for resolved in resolve_parameters(model, groups)}


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one per family, with DTensors apart from plain tensors.

    Call it after :func:`foldpar.shard_model`, which replaces parameters. Fused optimizers fail on a group that mixes
    plain and DTensor parameters, or DTensors of two meshes. Each group has ``"params"`` (those that require a gradient,
    a tied one once), ``"family"``, the family's name by the rules of :func:`parameter_families` as far as they can
    be told without groups; ``"unmarked"`` where there is no mark; and ``"name"``, which no other group has. Other
    options can be added before the optimizer is made. A checkpoint loads into whatever groups there are: it keeps
    options by parameter, and names, families and lists of parameters are those of the optimizer at hand.

    Args:
        weight_decay: each group's ``"weight_decay"`` is this, or 0 in the groups of parameters that do not decay.
            ``None``: no such key, and no such groups.
        no_decay: ``(name, parameter) -> bool``: which parameters do not decay; of a tied one, its first name. Answer
            from what is the same in every layout, as names are. By default those with one dimension
            or none, an expert's own: gains of norms and biases, ``[num_experts, dim]`` of the experts too.
        named: each group has ``"param_names"``, torch's key for the names of its parameters, which the optimizer's own
            state dict keeps. torch wants it in all groups of an optimizer or in none.

    Example:
        >>> from foldpar import families
        >>> model = nn.Sequential(nn.Linear(4, 4), mark_parameters(nn.LayerNorm(4), families.REPLICATED))
        >>> [(group["family"], len(group["params"])) for group in parameter_groups(model)]
        [('unmarked', 2), ('replicated', 2)]
        >>> import torch
        >>> optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1)
        >>> [(group["name"], group["weight_decay"]) for group in parameter_groups(model, weight_decay=0.1)]
        [('unmarked', 0.1), ('unmarked, no decay', 0.0), ('replicated, no decay', 0.0)]

    Raises:
        ArgumentError: an argument of a wrong kind, or ``no_decay`` without ``weight_decay``. ValueError: a negative
            ``weight_decay``.
    """
    _check_decay(model, weight_decay, no_decay)
    bring_back_shards(model)
    greet_newcomers(model)
    members: dict[tuple[str, DeviceMesh | None, bool], list[_Use]] = {}
    for use in _first_uses(model):
        if use.parameter.requires_grad:
            mesh = use.parameter.device_mesh if is_dtensor(use.parameter) else None
            decays = weight_decay is None or not (
                _has_one_dimension(use) if no_decay is None else no_decay(use.name, use.parameter)
            )
            members.setdefault((_label(use), mesh, decays), []).append(use)
    groups: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    for (label, _, decays), uses in members.items():
        name = label if decays else f"{label}, no decay"
        taken[name] += 1
        group: dict[str, Any] = {"params": [use.parameter for use in uses], "family": label}
        group["name"] = name if taken[name] == 1 else f"{name}, {taken[name]}"
        group |= {} if weight_decay is None else {"weight_decay": float(weight_decay) if decays else 0.0}
        group |= {"param_names": [use.name for use in uses]} if named else {}
        groups.append(group)
    return groups


def _check_decay(model: object, weight_decay: object, no_decay: object) -> None:
    expect("parameter_groups", model=(model, nn.Module), weight_decay=(weight_decay, (float, int, type(None))))
    if isinstance(weight_decay, bool):
        raise ArgumentError(f"parameter_groups: weight_decay must be a number, and is {weight_decay}.")
    if isinstance(weight_decay, (float, int)) and not weight_decay >= 0:
        raise ValueError(f"weight_decay = {weight_decay} must be 0 or more: 0.1, for example.")
    if no_decay is None:
        return
    if not callable(no_decay):
        raise ArgumentError(
            f"parameter_groups: no_decay must be called with (name, parameter) and answer True where there is no "
            f"decay; a {type(no_decay).__name__} cannot be called: lambda name, parameter: 'embed' in name."
        )
    if weight_decay is None:
        raise ArgumentError("parameter_groups: no_decay says which parameters do not decay, so say weight_decay too.")


def _has_one_dimension(use: _Use) -> bool:
    """Whether it is a vector or a number; of experts' parameters, which are stacked, whether that of one expert is."""
    return use.parameter.dim() - use.stacked < 2


@dataclass(frozen=True, slots=True)
class _Use:
    """A parameter at one of its places in the model."""

    name: str
    parameter: nn.Parameter
    explicit: ParameterFamily | None
    """The mark on the parameter itself or on the module that owns it."""
    inherited: ParameterFamily | None
    """The nearest mark on a module further out."""
    groups: FoldedGroups | None
    """Those of the nearest module around it that has any, such as ``FoldedMoE``."""
    sharded: bool
    """Whether ``shard_model`` has sharded it over its data axis."""
    inside: str | None = None
    """The name of the experts' module around it, where it is none of the experts' own parameters."""
    stacked: int = 0
    """Of experts' own parameters: how many dimensions come on top of one expert's, for experts and pairs."""


def _uses(model: nn.Module) -> Iterator[_Use]:
    return (use for _, _, use in _places(model))


def _places(
    module: nn.Module,
    prefix: str = "",
    inherited: ParameterFamily | None = None,
    groups: FoldedGroups | None = None,
    inside: str | None = None,
) -> Iterator[tuple[nn.Module, str, _Use]]:
    """Every parameter at every place: the module that owns it, its name there, and what is known."""
    groups = groups_of(module) or groups
    holds = getattr(module, "expert_parameters", None)
    inside = (prefix.rstrip(".") or "the model") if holds is not None else inside
    own: ParameterFamily | None = getattr(module, _MARK, None)
    by_name: dict[str, ParameterFamily] = getattr(module, _MARKS_BY_NAME, {})
    record = sharded_module(module)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        explicit = getattr(parameter, _MARK, None) or by_name.get(name) or own
        is_shard = record is not None and name in record.names
        stranger = inside if holds is None or name not in holds else None
        if holds is not None and stranger is not None:
            explicit = getattr(parameter, _MARK, None) or by_name.get(name)  # the module's mark is of its experts
        stacked = 0 if holds is None or stranger is not None else 1 + (name in getattr(module, "pairs", ()))
        yield module, name, _Use(prefix + name, parameter, explicit, inherited, groups, is_shard, stranger, stacked)
    of_children: dict[str, ParameterFamily] = getattr(module, _MARKS_OF_CHILDREN, {})
    for name, child in module.named_children():
        yield from _places(child, f"{prefix}{name}.", of_children.get(name) or own or inherited, groups, inside)


def groups_of(module: nn.Module) -> FoldedGroups | None:
    """The groups that a module was built with, if it has any."""
    groups = getattr(module, "groups", None)
    return groups if isinstance(groups, FoldedGroups) else None


def _first_uses(model: nn.Module) -> list[_Use]:
    first: dict[int, _Use] = {}
    for use in _uses(model):
        first.setdefault(id(use.parameter), use)
    return list(first.values())


@dataclass(frozen=True, slots=True)
class ResolvedParameter:
    """A parameter, its one family, and the groups whose axes the family names."""

    name: str
    parameter: nn.Parameter
    family: ParameterFamily
    groups: FoldedGroups
    sharded: bool = False
    """Whether FSDP2 shards it over its data axis, and so has summed its gradient there already."""

    @property
    def shard_axes(self) -> tuple[Axis, ...]:
        """Those of the family, and the data axis where the parameter is sharded over it."""
        return (*self.family.shard_axes, self.family.data_axis) if self.sharded else self.family.shard_axes

    @property
    def communication_device(self) -> torch.device:
        """The parameter's device; of an offloaded shard the one on which it is gathered."""
        return communication_device(self.parameter) if self.sharded else self.parameter.device

    @property
    def replica_axes(self) -> tuple[Axis, ...]:
        """Those of the family, without the data axis where the parameter is sharded over it."""
        return tuple(axis for axis in self.family.replica_axes if axis not in self.shard_axes)

    @property
    def data_replicas(self) -> int:
        """How many replicas of shards the data axis holds: 1 where it is cut as a whole, or not at all."""
        return replicas_of_shards(self.parameter, self.family.data_axis) if self.sharded else 1

    @property
    def replica_groups(self) -> list[AxisGroup]:
        """The groups that hold equal parts of it, the replicas of shards included."""
        found = [self.groups.axis(axis) for axis in self.replica_axes]
        replicas = self.data_replicas
        return found if replicas == 1 else [*found, self.groups.data_axes(self.family.data_axis, replicas)[0]]


def resolve_parameters(model: nn.Module, groups: FoldedGroups) -> list[ResolvedParameter]:
    """Every parameter of the model once, in the order of the model; see :func:`parameter_families`.

    Layers of one model may fold their experts differently: an expert family is one of the groups of the nearest module
    around the parameter that has groups, a dense family is one of ``groups``.
    """
    expect("parameters", model=(model, nn.Module), groups=(groups, FoldedGroups))
    _check_one_dense_view(model, groups)
    bring_back_shards(model)
    greet_newcomers(model)
    axes_of = MeshAxes()
    uses_of: dict[int, list[_Use]] = {}
    for use in _uses(model):
        uses_of.setdefault(id(use.parameter), []).append(use)
        if data_was_assigned(use.parameter):
            raise ModelError(_data_was_assigned(use.name))
    resolved, unmarked = [], []
    for uses in uses_of.values():
        found = _one_family(uses, axes_of, groups)
        if found is None:
            unmarked.append(uses[0].name)
            continue
        first, family = found
        own = first.groups if family.view == "expert" and first.groups is not None else groups
        _check_is_shard(first, family)
        resolved.append(ResolvedParameter(uses[0].name, uses[0].parameter, family, own, first.sharded))
    if unmarked:
        raise FamilyError(_no_family(unmarked, groups.layout.tp))
    return resolved


def families_seen_from(layer: nn.Module, groups: FoldedGroups) -> dict[str, ParameterFamily | str]:
    """The family of every parameter of a layer, by the rules of :func:`parameter_families`, or why it has none.

    For telling people: it takes a part of a sharded model in any state, and moves nothing.
    """
    axes_of = MeshAxes()
    uses_of: dict[int, list[_Use]] = {}
    for use in _uses(layer):
        uses_of.setdefault(id(use.parameter), []).append(use)
    seen: dict[str, ParameterFamily | str] = {}
    for uses in uses_of.values():
        try:
            found = _one_family(uses, axes_of, groups)
        except FamilyError as error:
            seen[uses[0].name] = str(error).splitlines()[0]
        else:
            seen[uses[0].name] = "no mark in this layer; one on a module around it decides" if not found else found[1]
    return seen


def _one_family(uses: list[_Use], axes_of: MeshAxes, groups: FoldedGroups) -> tuple[_Use, ParameterFamily] | None:
    """The family that all places of a parameter agree on, and the first that has it; ``None`` if no place has one."""
    found = [(use, family) for use in uses if (family := _family_of(use, axes_of, groups)) is not None]
    if not found:
        return None
    first, family = found[0]
    for use, other in found[1:]:
        if replace(other, name="") != replace(family, name=""):
            raise FamilyError(_two_families(first, family, use, other))
        if family.view == "expert" and use.groups is not first.groups:
            raise FamilyError(_two_folds(first, use))
    return first, family


def _check_one_dense_view(model: nn.Module, groups: FoldedGroups) -> None:
    """Refuse layers whose lanes and data ranks are others than those of ``groups``."""
    given = groups.layout
    for name, module in model.named_modules():
        own = groups_of(module)
        if own is not None and own is not groups:
            layout = own.layout
            if (layout.world, layout.tp, layout.pp) != (given.world, given.tp, given.pp):
                raise GroupsError(
                    f"{name or 'The model'} was built with groups of world = {layout.world}, tp = {layout.tp}, pp = "
                    f"{layout.pp}, and these groups have world = {given.world}, tp = {given.tp}, pp = {given.pp}. "
                    f"Layers of one model may fold their experts differently (ep, etp, order), but the lanes and the "
                    f"data ranks over which dense gradients meet are one set. Solve all layouts with the same tp and "
                    f"pp."
                )


def _family_of(use: _Use, axes_of: MeshAxes, groups: FoldedGroups) -> ParameterFamily | None:
    family = use.explicit or use.inherited or (REPLICATED if groups.layout.tp == 1 else None)
    if not is_dtensor(use.parameter):
        if use.inside is not None and use.explicit is None:
            raise FamilyError(_stranger_among_experts(use))
        return family
    dims = axes_of.dims(use.parameter, use.groups or groups)
    shards_over_tp = any("tp" in dim.axes and dim.is_cut for dim in dims)
    overridable = family is None or (family.view == "dense" and "tp" not in family.shard_axes)
    if shards_over_tp and overridable and use.explicit is None:
        family = DENSE_SHARDED
    if family is not None:
        _check_placements(use, family, dims)
    return family


def _check_is_shard(use: _Use, family: ParameterFamily) -> None:
    if use.sharded and not is_sharded_over(use.parameter, family.data_axis):
        raise ShardingError(
            f"{use.name} was sharded over its data axis by shard_model, but is not a shard over {family.data_axis} "
            f"now. Either a forward has left it whole, and this call got a part of the model only, which cannot bring "
            f"the shards back: call it with the model that shard_model got. Or its family was changed to "
            f"{family.name!r} afterwards: mark parameters before shard_model."
        )


def _check_placements(use: _Use, family: ParameterFamily, dims: list[MeshDim]) -> None:
    names = use.parameter.device_mesh.mesh_dim_names if is_dtensor(use.parameter) else ()
    if family.view == "dense" and "ep" in (names or ()):
        raise FamilyError(
            f"{use.name} lies on the mesh of the experts, but its family {family.name!r} is one of dense parameters, "
            f"whose gradients meet over other ranks. Remove the mark: experts know their family (ROUTED_EXPERT, and "
            f"EXPERT_BIAS for an output bias)."
        )
    name, shard_axes = use.name, set(family.shard_axes)
    shard_axes |= {"ep_etp"} if {"ep", "etp"} <= shard_axes else set()
    shard_axes |= {"dp_cp", "edp"} if use.sharded else set()
    for dim in dims:
        if dim.is_cut and not shard_axes & dim.axes:
            raise FamilyError(
                f"{name} is a DTensor sharded over {dim}, but its family {family.name!r} has the shard axes "
                f"{family.shard_axes}. One of the two is wrong, and reducing by either would be a guess. Remove the "
                f"mark, or mark it with the family of its placement (families.DENSE_SHARDED over tp). Where a wrapper "
                f"such as FSDP2 shards a parameter over data-parallel ranks, it reduces the gradient too, in a way "
                f"that is not known here: let foldpar.shard_model apply FSDP2."
            )
        twice = next((axis for axis in family.shard_axes if axis in dim.axes), None)
        if dim.placement.is_replicate() and twice is not None:
            advice = (
                "Mark the parameter itself, for example mark_parameters(parameter, families.REPLICATED), which is "
                "right for the bias of a row-wise sharded layer."
                if twice == "tp"
                else "Remove the mark: experts have the families of what they hold, EXPERT_BIAS for an output bias."
            )
            raise FamilyError(
                f"{name} is a DTensor replicated over {dim}, but its family {family.name!r} shards over {twice}: its "
                f"norm would be counted once per {'lane' if twice == 'tp' else 'rank'}. {advice}"
            )


def _data_was_assigned(name: str) -> str:
    return (
        f"{name}.data was assigned, and {name} is a DTensor, of which torch takes that without a word and goes on with "
        f"the old values. Copy values instead: model.load_state_dict(...) takes a whole model's tensors, and "
        f"parameter.copy_(other) under torch.no_grad() those of another DTensor that lies alike."
    )


def _label(use: _Use) -> str:
    if use.explicit is None and is_cut_over_tp(use.parameter):
        return DENSE_SHARDED.name
    family = use.explicit or use.inherited
    return family.name if family is not None else "unmarked"


def _two_families(first: _Use, first_family: ParameterFamily, second: _Use, second_family: ParameterFamily) -> str:
    return (
        f"One parameter has two families: as {first.name} it is {first_family.name!r}, as {second.name} it is "
        f"{second_family.name!r}. Its gradient is one sum of both uses, so no single reduction fits two states. Bring "
        f"both uses to one state (copy_to_group(weight) at the use whose gradient is partial), then mark the "
        f"parameter itself, which goes for both names: mark_parameters(parameter, families.REPLICATED)."
    )


def _stranger_among_experts(use: _Use) -> str:
    return (
        f"{use.name} is inside the experts {use.inside} and none of their own parameters, so it came later: an "
        f"adapter, a norm, a parametrization. Whether it is each rank's own or the same on all ranks cannot be seen, "
        f"and no mark around it says so. Say it on the parameter itself or on the module that owns it:\n"
        f"    mark_parameters(module, families.ROUTED_EXPERT)        of this rank's experts (mark_placement: which)\n"
        f"    mark_parameters(module, families.REPLICATED_PARTIAL)   the same for all experts, on all ranks"
    )


def _two_folds(first: _Use, second: _Use) -> str:
    return (
        f"One expert parameter lies in two layers of different groups, as {first.name} and as {second.name}: its "
        f"gradient is one sum of both uses, and has no single set of replicas to meet. Build both layers with the "
        f"groups of one create_groups call."
    )


def _no_family(names: list[str], tp: int) -> str:
    shown = some(names)
    subject = "1 parameter has" if len(names) == 1 else f"{len(names)} parameters have"
    return (
        f"{subject} no family: {shown}. With tp = {tp}, a lane's gradient of such a parameter can be whole, a part "
        f"of a sum, or that of other elements. Nothing in the numbers shows which, and the wrong reduction silently "
        f"trains another model, so it is not guessed. Say it in one line, for the model as a default or for a module "
        f"inside:\n"
        f"    mark_parameters(model, families.REPLICATED)            whole: used on all rows (norms, embeddings)\n"
        f"    mark_parameters(module, families.REPLICATED_PARTIAL)   a part: own rows or own heads, sharded lanes\n"
        f"    mark_parameters(module, families.DENSE_SHARDED)        other elements: a TP slice"
    )
