"""What :func:`foldpar.shard_model` leaves on a model: which parameters FSDP2 shards, and in which state they are.

FSDP2 registers a parameter's shard on its module between steps, and the whole parameter from forward to backward. So
whoever reads parameters or gradients brings the shards back first. Modules of FSDP2 are told by what they can do, so
that models without any need not load it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from foldpar.comm import is_dtensor, local_tensor, placed_like, version_of
from foldpar.errors import ShardingError
from foldpar.families import ParameterFamily
from foldpar.layout import FoldedLayout

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__ = [
    "ShardedModule",
    "Stage",
    "begin_trainable",
    "bring_back_shards",
    "computes_in_own_dtype",
    "data_replicas",
    "drop_zeroed_gradients",
    "fsdp_modules",
    "is_fsdp_module",
    "is_sharded_over",
    "leave_signs",
    "refuse_replaced",
    "refuse_unreduced",
    "replicas_of_shards",
    "sharded_module",
    "shards_over_data",
]

Stage = Literal[1, 2, 3]
_RECORD = "_foldpar_sharded"
_SIGNS = "_foldpar_signs"


@dataclass(frozen=True, slots=True)
class ShardedModule:
    """The record on every module of a sharded model."""

    stage: Stage
    names: frozenset[str]
    """Of the module's own parameters, those that FSDP2 shards."""
    converts: bool = False
    """Its forward computes with copies in another dtype of parameters that no other rank holds."""


def sharded_module(module: nn.Module) -> ShardedModule | None:
    """The record of a module that is part of a sharded model."""
    record: ShardedModule | None = module.__dict__.get(_RECORD)  # getattr of a module that lacks it is slow
    return record


def data_replicas(layout: FoldedLayout, axis: Literal["dp_cp", "edp"], replicas: int) -> int:
    """How many replicas of shards a data axis holds: so many as were asked for, or all its ranks if those are fewer.

    Example, of 8 ranks whose experts have two copies:
        >>> from foldpar import solve_layout
        >>> layout = solve_layout(8, ep=4)
        >>> [(data_replicas(layout, "dp_cp", asked), data_replicas(layout, "edp", asked)) for asked in (1, 2, 4)]
        [(1, 1), (2, 2), (4, 2)]

    Raises:
        ShardingError: neither divides the other.
    """
    size = layout.size(axis)
    if size % replicas and replicas % size:
        named = f"dp * cp = {size}" if axis == "dp_cp" else f"edp = {size}"
        what = "dense parameters" if axis == "dp_cp" else "experts"
        valid = ", ".join(str(each) for each in range(1, size + 1) if size % each == 0)
        raise ShardingError(
            f"replicas = {replicas} does not go into the {named} ranks that the {what} are sharded over: replicas are "
            f"of equal size. It can be {valid}, or a multiple of {size}, which leaves the {what} whole."
        )
    return min(size, replicas)


def shards_over_data(
    family: ParameterFamily,
    layout: FoldedLayout,
    *,
    dims: int,
    converts: bool = False,
    offloads: bool = False,
    replicas: int = 1,
) -> bool:
    """Whether ``shard_model`` shards a parameter of that many dimensions; all ranks answer alike.

    Not a scalar, which has no dimension 0. Not where a replica has one rank, unless the wrapper offloads, or
    ``converts`` the dtype of a dense parameter: the gathered parameter would be a second copy. Experts are converted
    without FSDP2 then.

    Example:
        >>> from foldpar.families import EXPERT_BIAS, REPLICATED
        >>> from foldpar import solve_layout
        >>> layout = solve_layout(4, tp=2, ep=4)
        >>> [shards_over_data(family, layout, dims=2) for family in (REPLICATED, EXPERT_BIAS)]
        [True, False]
    """
    shards = layout.size(family.data_axis) // data_replicas(layout, family.data_axis, replicas)
    return dims > 0 and (shards > 1 or offloads or (converts and family.data_axis == "dp_cp"))


def record_shards(model: nn.Module, stage: Stage, converting: Collection[nn.Module]) -> None:
    """Leave the records, once everything is wrapped; ``converting`` are the modules that compute in another dtype."""
    for module in model.modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        names = frozenset(
            name for name, parameter in own if any(is_sharded_over(parameter, axis) for axis in ("dp_cp", "edp"))
        )
        setattr(module, _RECORD, ShardedModule(stage, names, module in converting))


def is_sharded_over(parameter: Tensor, axis: str) -> bool:
    """Whether the parameter's mesh has a dimension of this data axis; of one rank counts, as nothing is reduced there
    either."""
    return is_dtensor(parameter) and axis in (parameter.device_mesh.mesh_dim_names or ())


def replicas_of_shards(parameter: Tensor, axis: str) -> int:
    """How many ranks hold the same shard over this data axis."""
    names = (parameter.device_mesh.mesh_dim_names or ()) if is_dtensor(parameter) else ()
    name = f"{axis}_replicas"
    return parameter.device_mesh.size(names.index(name)) if is_dtensor(parameter) and name in names else 1


def computes_in_own_dtype(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a module of experts computes with this parameter in the dtype that it has between steps, for sure."""
    record = sharded_module(module)
    return not is_sharded_over(parameter, "edp") and not (record is not None and record.converts)


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether FSDP2 has wrapped this very module."""
    return hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard")


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules that :func:`foldpar.shard_model` has wrapped."""
    for module in model.modules():
        if sharded_module(module) is not None and is_fsdp_module(module):
            yield module  # type: ignore[misc]


def bring_back_shards(model: nn.Module) -> None:
    """Register shards in place of whole parameters, which a forward may have left behind. No communication."""
    for module in fsdp_modules(model):
        module.reshard()


def begin_trainable(model: nn.Module) -> None:
    """Before a first forward in inference mode: FSDP2 keeps the tensors that it gathers into first, and those of that
    mode cannot be trained with. So all units are gathered once outside of it; on every rank.
    """
    modules = list(fsdp_modules(model))
    if any(module._get_fsdp_state()._is_root is not None for module in modules):
        return
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            module.unshard()
            module.reshard()


@torch.compiler.disable(reason="a hook of shard_model")  # type: ignore[untyped-decorator]
def refuse_replaced(model: nn.Module, arguments: object = None) -> None:
    """Raise if a sharded parameter was replaced behind FSDP2, which would go on with the one that it knows.

    A forward hook: ``torch.func.functional_call``, a parametrization and ``load_state_dict(assign=True)`` replace
    parameters. Up to the first forward FSDP2 takes new ones over. And no backward comes to a shard, so that a hook of
    its gradient would never be called. A part that was taken out would still be gathered ahead of where it was.

    Raises:
        ShardingError: names the parameter.
    """
    modules = list(fsdp_modules(model))
    states = [module._get_fsdp_state() for module in modules]
    ahead = {id(each): each for state in states for each in _gathered_ahead(state)}
    if ahead.keys() - {id(state) for state in states}:
        raise ShardingError(
            "A part of the model was taken out after shard_model, and FSDP2 would still gather its parameters ahead. "
            "Take it out before, or call shard_model(..., prefetch=False)."
        )
    for module, state in zip(modules, states, strict=True):
        begun = state._is_root is not None
        for group in _parameter_groups(module):
            for entry in group.fsdp_params:
                owner, name = entry._module_info.module, entry._module_info.param_name
                here = owner._parameters.get(name)
                known = (entry.sharded_param, getattr(entry, "_unsharded_param", None))
                if here is None or (begun and not any(here is each for each in known)):
                    raise ShardingError(
                        f"{name} of {type(owner).__name__} was replaced after shard_model, and FSDP2 would compute "
                        f"with the parameter that it knows. Change values in place (load_state_dict without assign, "
                        f"copy_), and use functional_call or parametrizations on a model that is not sharded."
                    )
                if entry.sharded_param._backward_hooks:
                    raise ShardingError(
                        f"{name} of {type(owner).__name__} has a hook on its gradient (register_hook), which FSDP2 "
                        f"never calls: backward goes to the parameter that it has gathered. Use "
                        f"register_post_accumulate_grad_hook, which sees .grad of the shard once it is summed over the "
                        f"data axis."
                    )


def _gathered_ahead(state: Any) -> Iterator[Any]:
    """The states of the units that FSDP2 gathers while it is in this one."""
    yield from getattr(state, "_states_to_forward_prefetch", ())
    yield from getattr(state, "_states_to_backward_prefetch", ())


def refuse_unreduced(model: nn.Module) -> None:
    """Raise if a gradient waits inside FSDP2, not yet summed over the data axis.

    Raises:
        ShardingError: the last backward of the step ran inside ``accumulate``.
    """
    drop_zeroed_gradients(model)
    for module in fsdp_modules(model):
        if any(_has_unreduced_gradient(entry) for group in _parameter_groups(module) for entry in group.fsdp_params):
            leave_signs(model)
            raise ShardingError(
                "Gradients of this step are whole and not yet summed over the data axis: its last backward ran inside "
                "'with accumulate(model):'. At stage 1 they meet in the first backward outside of it, so accumulate "
                "all micro-batches of a step but the last."
            )


class _Sign(NamedTuple):
    """What stands in ``.grad`` of a shard while the whole gradient waits inside FSDP2, and its version."""

    entry: Any
    grad: Tensor
    version: int
    is_made: bool


def leave_signs(model: nn.Module) -> None:
    """Let ``zero_grad``, which knows shards, reach gradients that wait whole: where a shard has none, it gets zeros."""
    drop_zeroed_gradients(model)
    for module in fsdp_modules(model):
        waiting = [each for group in _parameter_groups(module) for each in group.fsdp_params]
        waiting = [each for each in waiting if _has_unreduced_gradient(each)]
        if waiting:
            setattr(module, _SIGNS, [_sign(entry) for entry in waiting])


def drop_zeroed_gradients(model: nn.Module) -> None:
    """Drop whole gradients whose shards somebody has cleared since signs were left, and take the signs away."""
    for module in fsdp_modules(model):
        for sign in module.__dict__.pop(_SIGNS, ()):
            shard = sign.entry.sharded_param
            if shard.grad is not sign.grad or version_of(sign.grad) != sign.version:
                sign.entry.unsharded_accumulated_grad = None
                sign.entry._unsharded_param.grad = None
            elif sign.is_made:
                shard.grad = None


def _sign(entry: Any) -> _Sign:
    shard = entry.sharded_param
    is_made = shard.grad is None
    if is_made:
        shard.grad = placed_like(torch.zeros_like(local_tensor(shard.detach())), shard)
    return _Sign(entry, shard.grad, version_of(shard.grad), is_made)


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's own records, which no public function shows; torch before 2.13 has one per module."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [group for group in [state._fsdp_param_group] if group is not None]


def _has_unreduced_gradient(entry: Any) -> bool:
    whole = getattr(entry, "_unsharded_param", None)  # made by the first gather
    return entry.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)
