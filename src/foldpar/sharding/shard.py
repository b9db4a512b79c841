"""``shard_model``: torch's FSDP2 over both views, experts over ``edp`` and everything else over ``dp_cp``.

    model                 unit over dp_cp        embedding, last norm, head: whatever is in no block
      block 0             unit over dp_cp        attention, norms, router, shared experts
        experts           unit over edp          this rank's [local_experts, ...], cut evenly
      block 1 ...

A unit is gathered and reduce-scattered as one. FSDP2 only *sums* gradients over the data axis. What remains, the lanes
and every factor, is :func:`foldpar.reduce_gradients`, the same call as for a model that is not sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from foldpar.arguments import expect, expect_sizes
from foldpar.comm import FoldedGroups, adopt, is_dtensor, is_sharding, local_tensor
from foldpar.errors import FamilyError, GroupsError, ShapeError, ShardingError
from foldpar.families import Reduction, shard_dimension
from foldpar.layout import FoldedLayout
from foldpar.parameters import (
    ResolvedParameter,
    Stage,
    base_of,
    begin_trainable,
    bring_back_shards,
    compare_in_stage,
    data_replicas,
    drop_zeroed_gradients,
    explicitly_marked,
    fsdp_modules,
    is_fsdp_module,
    kept_dtype,
    leave_signs,
    mark_replaced,
    record_shards,
    refuse_gradient_hooks,
    refuse_replaced,
    resolve_parameters,
    sharded_module,
    shards_over_data,
    take_shares_on_load,
    tie_marks_to_names,
    watch_optimizers,
)
from foldpar.sharding.conversion import compute_in

__all__ = ["accumulate", "shard_model"]


def shard_model(
    model: nn.Module,
    groups: FoldedGroups,
    *,
    stage: Stage,
    replicas: int = 1,
    blocks: Iterable[nn.Module] | None = None,
    mixed_precision: MixedPrecisionPolicy | None = None,
    offload: OffloadPolicy | None = None,
    prefetch: bool = True,
) -> None:
    """Shard a folded model over its data-parallel ranks with torch's FSDP2, in place. Call it once, on every rank.

    Routed experts are sharded over ``edp``, all other parameters over ``dp_cp``, each along dimension 0 of this rank's
    local tensor (what tp, ep and etp left of it), in chunks of ``ceil(rows / ranks)`` rows; ranks at the end may hold
    fewer or none. Experts of whom a rank has no multiple of ``edp`` are cut evenly along another dimension, the last
    that ``edp`` divides, if there is one. Afterwards a parameter is a ``DTensor`` whose mesh has the dimensions
    ``("dp_cp",)``, ``("dp_cp", "tp")`` or, of experts, ``("edp", "ep", "etp")``.

    What a rank holds whole, besides its shards of parameters, gradients and optimizer states:

    ======  ============================================  =============================================
    stage   parameters                                    gradients
    ======  ============================================  =============================================
    1       from forward to the step's last backward      until the step's last backward, then shards
    2       from forward to the step's last backward      one unit's at a time, during backward
    3       one unit's at a time, and those prefetched    one unit's at a time, during backward
    ======  ============================================  =============================================

    At stage 3 the outermost unit, which backward begins with, stays whole from forward on.

    The training loop is that of every stage, 0 (not sharded) included. Fold the model, mark it, load its weights, shard
    it, and only then make the optimizer, since parameters are replaced::

        foldpar.shard_model(model, groups, stage=3)
        optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=1e-3)
        for micro_batches in steps:
            with foldpar.accumulate(model):
                for batch in micro_batches[:-1]:
                    (loss_of(model, batch) / len(micro_batches)).backward()
            (loss_of(model, micro_batches[-1]) / len(micro_batches)).backward()
            foldpar.reduce_gradients(model, groups)
            foldpar.clip_grad_norm_(model, 1.0, groups)
            optimizer.step()
            optimizer.zero_grad()

    With ``replicas``, several groups of ranks hold all shards each (HSDP): gathers stay inside of one, and the sums of
    gradients meet over all. A replica is a block of the stage's ranks, ``stage_size / replicas`` of them, in the order
    of each view; with ``order="consecutive"`` the same block in both, such as a node. Experts of fewer than
    ``replicas`` copies (``edp``) are not sharded at all, every copy being a replica, and so for the others. The mesh of
    a parameter has a dimension more, ``("dp_cp_replicas", "dp_cp", ...)`` or ``("edp_replicas", "edp", ...)``.

    Every unit's ``forward`` must be called on every rank, in the same order, and a backward must reach the same
    parameters of it on all data ranks: unlike at stage 0, a gradient that some ranks lack is not made up for.
    Communication overlaps best where the data axes have communicators of their own:
    ``create_groups(layout, separate=("dp_cp", "edp"))``.

    Args:
        model: folded, its parameters on this rank's device, on the meta device, or on the host, from where FSDP2 moves
            them to the current GPU if there is NCCL.
        groups: those that the model was built with; experts are sharded over the groups of their own layer.
        stage: see above.
        replicas: how many groups of ranks hold all shards each. It must divide ``dp * cp`` and ``edp``, or be a
            multiple of one of them.
        blocks: the modules that become units; by default the children of every ``ModuleList``, those inside other
            blocks apart. Experts are always units of their own.
        mixed_precision: as for ``fully_shard``: the dtypes of whole parameters and of the sum of gradients.
            ``output_dtype`` is that of the model's output only. Inputs of experts are never cast: dispatch sends the
            block's dtype, and routing weights stay as precise as they are.
        offload: as for ``fully_shard``: ``CPUOffloadPolicy()`` keeps shards, gradients and optimizer states on the
            host.
        prefetch: gather a block's experts, and the next block, when the block begins: routing makes the host wait,
            which is too late for the experts' gather to overlap with anything. For models that run their blocks in
            the order in which they were built; pass False for others.

    Parameters whose data axis has one rank are sharded only where ``mixed_precision`` or ``offload`` asks for it; they
    would be copied for nothing. Experts that no other rank holds need no FSDP2 for ``mixed_precision``: their forward
    computes with copies in its ``param_dtype``, which are made again for the backward. Scalars stay whole too, and so
    does what the model's class keeps in float32 (``_keep_in_fp32_modules``) while the rest is narrower.
    :func:`~foldpar.reduce_gradients` reduces those over the data axis.

    Raises:
        ValueError: an unknown stage. ShardingError: ``replicas`` does not fit, or leaves nothing to shard; the model is
            sharded already, a block is not in the model, or one
            unit would have parameters of several dtypes or share one with another unit, or experts share a module with
            other parameters. FamilyError: a family is unknown or contradicted. ReplicaError: ranks of a stage differ in
            dtypes, in what is frozen, or in these arguments. GroupsError: a DTensor on another mesh,
            or no torch.distributed. ShapeError: a parameter is not contiguous. All before anything is touched.

    Source: ZeRO (Rajbhandari et al. 2020), stages 1 to 3; FSDP2 (``torch.distributed.fsdp.fully_shard``).
    """
    expect("shard_model", model=(model, nn.Module), groups=(groups, FoldedGroups))
    blocks = None if blocks is None else list(blocks)
    _compare_arguments(
        model,
        groups,
        blocks,
        stage=stage,
        replicas=replicas,
        mixed_precision=mixed_precision,
        offload=offload,
        prefetch=prefetch,
    )
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ValueError(
            f"stage = {stage!r} is unknown. It can be 1 (shards of optimizer states), 2 (and of gradients) or 3 (and "
            f"of parameters); a model that is not sharded at all is stage 0, and needs no call."
        )
    expect_sizes("shard_model", replicas=replicas)
    expect(
        "shard_model",
        mixed_precision=(mixed_precision, (MixedPrecisionPolicy, type(None))),
        offload=(offload, (OffloadPolicy, type(None))),
    )
    _check_unsharded(model)
    precision, offload = mixed_precision or MixedPrecisionPolicy(), offload or OffloadPolicy()
    offloads = type(offload) is not OffloadPolicy
    converts = precision != MixedPrecisionPolicy()
    resolved = resolve_parameters(model, groups)
    _check_replicas(replicas, [groups.layout, *(entry.groups.layout for entry in resolved)], converts or offloads)
    dtypes = (entry.parameter.dtype for entry in resolved)
    narrow = precision.param_dtype or min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    narrowed = [entry for entry in resolved if kept_dtype(model, entry.name, narrow) == narrow]
    shards = [
        entry
        for entry in narrowed
        if shards_over_data(
            entry.family,
            entry.groups.layout,
            dims=entry.parameter.dim(),
            converts=converts,
            offloads=offloads,
            replicas=replicas,
        )
    ]
    whole = {entry.parameter for entry in resolved} - {entry.parameter for entry in shards}
    units = _units(model, groups, blocks, resolved, shards)
    converting = _converting(model, resolved, [entry for entry in narrowed if entry.parameter in whole], precision)
    _check_units(model, units, shards)
    if set((root := base_of(model)).parameters()) != set(model.parameters()):
        root = model
    # A library's model of adapters may be taken off, and what is left must go on by itself.
    units = [replace(unit, module=root) if unit.module is model else unit for unit in units]
    _check_tensors(shards, groups, explicitly_marked(model))
    if not shards and not converting:
        return
    refuse_gradient_hooks(((entry.name, entry.parameter) for entry in shards), "Sharding")

    tie_marks_to_names(model)  # FSDP2 makes new parameters
    before = list(model.parameters())
    dims = {entry.parameter: _shard_dimension(entry, replicas) for entry in shards}
    for unit in units if shards else ():
        is_root = unit.module is root
        wrapped = fully_shard(
            unit.module,
            mesh=unit.groups.data_mesh(unit.axis, data_replicas(unit.groups.layout, unit.axis, replicas)),
            # Backward begins with the outermost unit, so torch's own default keeps that one.
            reshard_after_forward=None if stage == 3 and is_root else stage == 3,
            mp_policy=_precision_of(unit, precision, is_root),
            offload_policy=offload,
            ignored_params=whole,
            shard_placement_fn=lambda parameter: Shard(dims[parameter]),
        )
        # All factors are multiplied in later, in one place. A divisor of 1 and a plain sum also avoid NCCL's
        # pre-multiplied sum, which loses bf16 gradients, and torch's dividing twice on a mesh of one rank.
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)
    for module, names in converting.items():
        if groups.data_mesh("edp").device_type != "cpu" and next(module.parameters()).device.type == "cpu":
            module.to(groups.data_mesh("edp").device_type)  # as FSDP2 does
        compute_in(module, names, cast(torch.dtype, precision.param_dtype))
    record_shards(model, stage, converting)
    mark_replaced(before, model)
    watch_optimizers(groups, model)
    take_shares_on_load(model, groups)
    for parameter in model.parameters():
        adopt(parameter)
    root.register_forward_pre_hook(refuse_replaced, prepend=True)
    root.register_forward_pre_hook(_begins_anew, prepend=True)
    root.register_forward_hook(_shards_again)
    if prefetch:
        _prefetch(root, units)


def _shard_dimension(entry: ResolvedParameter, replicas: int) -> int:
    layout, axis = entry.groups.layout, entry.family.data_axis
    placements = entry.parameter.placements if is_dtensor(entry.parameter) else ()
    return shard_dimension(
        local_tensor(entry.parameter).shape,
        layout.size(axis) // data_replicas(layout, axis, replicas),
        experts=entry.family.view == "expert",
        cut=[each.dim for each in placements if is_sharding(each)],  # type: ignore[attr-defined]
    )


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Backward passes in here are not the last of their step: gradients of several micro-batches add up.

    Run all micro-batches of a step but the last in it; the loop is the same for every stage. By stage it

    - 0, not sharded: does nothing; gradients add up in ``.grad``;
    - 1: leaves gradients whole and unsummed, and parameters whole, so that nothing is communicated;
    - 2: leaves parameters whole, so that they are gathered once a step; gradients are reduce-scattered in every
      micro-batch and add up in their shards;
    - 3: does nothing; every micro-batch gathers and reduce-scatters.

    A step is given up as anywhere, by ``zero_grad``: at stage 1 behind this context, which an exception may have left.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with accumulate(model):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad
        tensor([[2., 2.]])
    """
    expect("accumulate", model=(model, nn.Module))
    modules = list(fsdp_modules(model))
    record = sharded_module(model)
    stage = record.stage if record is not None else 0

    def last(is_last: bool) -> None:
        for module in modules:
            if stage == 1:
                module.set_requires_gradient_sync(is_last, recurse=False)
            if stage in (1, 2):
                module.set_reshard_after_backward(is_last, recurse=False)

    last(False)
    try:
        yield
    finally:
        last(True)
        if stage == 1:
            leave_signs(model)


@torch.compiler.disable(reason="a hook of shard_model")  # type: ignore[untyped-decorator]
def _begins_anew(model: nn.Module, arguments: object) -> None:
    """A step that was given up behind ``accumulate`` leaves nothing to the next, once its gradients are zeroed. What
    begins in inference mode can be trained later.
    """
    if torch.is_inference_mode_enabled():
        begin_trainable(model)
    elif torch.is_grad_enabled():
        drop_zeroed_gradients(model)


@torch.compiler.disable(reason="a hook of shard_model")  # type: ignore[untyped-decorator]
def _shards_again(model: nn.Module, inputs: object, output: object) -> None:
    """After an evaluation no backward comes to bring shards back, and whole parameters would miss the next step."""
    if not torch.is_grad_enabled():
        bring_back_shards(model)


# ---------------------------------------------------------------------------------------------------------------------
# Units.


@dataclass(frozen=True, slots=True)
class _Unit:
    """A module whose parameters, those of units inside it apart, are gathered together over one data axis."""

    name: str
    module: nn.Module
    axis: Literal["dp_cp", "edp"]
    groups: FoldedGroups

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


def _units(
    model: nn.Module,
    groups: FoldedGroups,
    blocks: Iterable[nn.Module] | None,
    resolved: list[ResolvedParameter],
    shards: list[ResolvedParameter],
) -> list[_Unit]:
    """Inner units before those around them, the model last."""
    units = {unit.module: unit for unit in _expert_units(model, resolved, shards)}
    names = {module: name for name, module in model.named_modules()}
    chosen = _default_blocks(model, set(units), shards) if blocks is None else _checked(blocks, names)
    for module in [*chosen, model]:
        units.setdefault(module, _Unit(names[module], module, "dp_cp", groups))
    return sorted(units.values(), key=lambda unit: unit.name.count(".") if unit.name else -1, reverse=True)


def _expert_units(
    model: nn.Module, resolved: list[ResolvedParameter], shards: list[ResolvedParameter]
) -> Iterator[_Unit]:
    """The outermost modules that hold nothing but experts, which have a forward to be gathered for."""
    views = {entry.parameter: entry.family.view for entry in resolved}
    groups_of = {entry.parameter: entry.groups for entry in shards if entry.family.view == "expert"}

    def visit(name: str, module: nn.Module) -> Iterator[_Unit]:
        found = [groups_of[parameter] for parameter in module.parameters() if parameter in groups_of]
        if not found:
            return
        alone = all(views[parameter] == "expert" for parameter in module.parameters())
        if alone and _has_forward(module) and all(groups is found[0] for groups in found):
            yield _Unit(name, module, "edp", found[0])
            return
        own = [key for key, parameter in module.named_parameters(recurse=False) if parameter in groups_of]
        if own:
            why = "has no forward, before which they could be gathered" if alone else "holds other parameters too"
            raise ShardingError(
                f"{name or 'The model'} ({type(module).__name__}) owns the expert parameters {', '.join(own)}, and "
                f"{why}. Experts are sharded over edp and gathered as a unit of their own: move them into a module "
                f"whose forward uses them, such as GroupedExperts."
            )
        for key, child in module.named_children():
            yield from visit(f"{name}.{key}" if name else key, child)

    yield from visit("", model)


def _converting(
    model: nn.Module, resolved: list[ResolvedParameter], whole: list[ResolvedParameter], policy: MixedPrecisionPolicy
) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Modules of experts that are whole here and compute in another dtype: their parameters, named by their owners."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    wide = {
        entry.parameter
        for entry in whole
        if entry.family.view == "expert"
        and entry.parameter.is_floating_point()
        and entry.parameter.dtype != (policy.param_dtype or entry.parameter.dtype)
    }
    for unit in _expert_units(model, resolved, [entry for entry in whole if entry.parameter in wide]):
        found[unit.module] = [
            (owner, name)
            for owner in unit.module.modules()
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
            if parameter in wide
        ]
    return found


def _default_blocks(model: nn.Module, experts: set[nn.Module], shards: list[ResolvedParameter]) -> Iterator[nn.Module]:
    """The children of the outermost ModuleLists, where they hold anything to shard."""
    sharded = {entry.parameter for entry in shards}

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child in experts:
                continue
            is_block = isinstance(module, nn.ModuleList) and _has_forward(child)
            if is_block and any(parameter in sharded for parameter in child.parameters()):
                yield child
            else:
                yield from visit(child)

    yield from visit(model)


def _checked(blocks: Iterable[nn.Module], names: dict[nn.Module, str]) -> list[nn.Module]:
    chosen = list(blocks)
    for block in chosen:
        if block not in names:
            raise ShardingError(f"blocks has a {type(block).__name__} that is no module of the model.")
        if not _has_forward(block):
            raise ShardingError(
                f"blocks has {names[block]} ({type(block).__name__}), which has no forward, before which its "
                f"parameters could be gathered. Give the modules in it, such as *model.layers."
            )
    return chosen


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _precision_of(unit: _Unit, policy: MixedPrecisionPolicy, is_root: bool) -> MixedPrecisionPolicy:
    if not is_root:
        policy = replace(policy, output_dtype=None)
    return replace(policy, cast_forward_inputs=False) if unit.axis == "edp" else policy


def _prefetch(model: nn.Module, units: list[_Unit]) -> None:
    """Say what each unit gathers ahead: going forward, its experts and the next block; going backward, the block before
    and its experts. Of several experts in a block the first, or backward the last, and each then the one behind it."""
    experts_of: dict[nn.Module, list[FSDPModule]] = {unit.module: [] for unit in units if unit.axis == "dp_cp"}
    owner = _units_by_module(model, list(experts_of))
    order = [module for module in model.modules() if module in experts_of]
    experts = {unit.module for unit in units if unit.axis == "edp"}
    for module in model.modules():
        if module in experts and module in owner:
            experts_of[next(iter(owner[module]))].append(cast(FSDPModule, module))
    for place, module in enumerate(order):
        wrapped, own = cast(FSDPModule, module), experts_of[module]
        following = [cast(FSDPModule, after) for after in order[place + 1 : place + 2]]
        wrapped.set_modules_to_forward_prefetch([*own[:1], *following])
        for one, after in pairwise(own):
            one.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([one])
        before = order[place - 1] if place > 1 else None
        if module is model:  # it ends first, and so begins backward
            before = order[-1]
        if before is model:
            wrapped.set_modules_to_backward_prefetch(own[-1:])
        elif before is not None:
            wrapped.set_modules_to_backward_prefetch([cast(FSDPModule, before), *experts_of[before][-1:]])


def _units_by_module(model: nn.Module, units: Iterable[nn.Module]) -> dict[nn.Module, dict[nn.Module, None]]:
    """Module -> the nearest units around it; several where a module has several places in the model."""
    chosen, owner = set(units), dict[nn.Module, dict[nn.Module, None]]()

    def visit(module: nn.Module, unit: nn.Module | None) -> None:
        unit = module if module in chosen else unit
        if unit is None or unit in owner.setdefault(module, {}):
            return
        owner[module][unit] = None
        for child in module.children():
            visit(child, unit)

    visit(model, None)
    return owner


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be sharded, found before anything is touched.


def _compare_arguments(
    model: nn.Module, groups: FoldedGroups, blocks: list[nn.Module] | None, **arguments: object
) -> None:
    """Ranks that were given other ones would make other groups, gather other units, or raise alone."""
    names = {module: name for name, module in model.named_modules()}
    # An address is another one on each rank, and is no difference.
    texts = {name: type(value).__repr__ is not object.__repr__ for name, value in arguments.items()}
    given = {name: str(value) if texts[name] else type(value).__name__ for name, value in arguments.items()}
    given["blocks"] = str(None if blocks is None else [names.get(block, "no module of the model") for block in blocks])
    compare_in_stage(model, groups, given)


def _check_replicas(replicas: int, layouts: list[FoldedLayout], converts: bool) -> None:
    """Raise if they do not go into an axis, or leave no shards on any."""
    axes: tuple[Literal["dp_cp"], Literal["edp"]] = ("dp_cp", "edp")
    shards = [layout.size(axis) // data_replicas(layout, axis, replicas) for layout in layouts for axis in axes]
    if replicas > 1 and max(shards) == 1 and not converts:
        sizes = f"dp * cp = {layouts[0].size('dp_cp')} and edp = {layouts[-1].size('edp')}"
        raise ShardingError(
            f"replicas = {replicas} leaves one rank in each replica, of {sizes}, so nothing would be sharded: that is "
            f"stage 0, and needs no call. Ask for fewer replicas, or none."
        )


def _check_unsharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if sharded_module(module) is not None:
            raise ShardingError(
                f"{name or 'The model'} was sharded by shard_model before. Shard the whole model once, with the stage "
                f"that you want; its blocks and experts become units of their own."
            )
        if is_fsdp_module(module):
            raise ShardingError(
                f"fully_shard was applied to {name or 'the model'} already, which reduces gradients in a way that is "
                f"not known here. Leave it to shard_model; say with blocks=[...] which modules should be units."
            )


def _check_units(model: nn.Module, units: list[_Unit], shards: list[ResolvedParameter]) -> None:
    unit_of = {unit.module: unit for unit in units}
    entry_of = {entry.parameter: entry for entry in shards}
    uses: dict[nn.Parameter, dict[nn.Module, None]] = {}
    for module, found in _units_by_module(model, unit_of).items():
        for parameter in module.parameters(recurse=False):
            if parameter in entry_of:
                uses.setdefault(parameter, {}).update(found)
    dtypes: dict[nn.Module, dict[torch.dtype, str]] = {}
    for parameter, of in uses.items():
        entry, (first, *others) = entry_of[parameter], of
        if others:
            raise ShardingError(
                f"{entry.name} is used in several units: {', '.join(str(unit_of[unit]) for unit in of)}. A tied "
                f"parameter is gathered and reduce-scattered with one unit. Give blocks=[...] without those that share "
                f"it, so that it belongs to the unit around them."
            )
        if unit_of[first].axis != entry.family.data_axis:
            raise ShardingError(
                f"{entry.name} has the family {entry.family.name!r}, which is sharded over {entry.family.data_axis}, "
                f"but lies in the unit {unit_of[first]}, which is sharded over {unit_of[first].axis}. Experts are "
                f"units by themselves: leave them out of blocks, and what is inside of them."
            )
        if parameter.requires_grad:
            dtypes.setdefault(first, {}).setdefault(parameter.dtype, entry.name)
    for module, names in dtypes.items():
        if len(names) > 1:
            listed = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in names.items())
            raise ShardingError(
                f"The unit {unit_of[module]} has trainable parameters of several dtypes: {listed}. Their gradients are "
                f"reduce-scattered as one tensor. Keep all in one dtype, float32 for example, and let "
                f"mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16) convert what is gathered; or make "
                f"the modules of another dtype blocks of their own."
            )


def _check_tensors(shards: list[ResolvedParameter], groups: FoldedGroups, explicit: set[nn.Parameter]) -> None:
    for entry in shards:
        name, parameter, family = entry.name, entry.parameter, entry.family
        if parameter.device.type == "cuda" and entry.groups.data_mesh(family.data_axis).device_type == "cpu":
            raise GroupsError(
                f"{name} is on {parameter.device}, but the groups communicate over Gloo alone, so FSDP2 would move the "
                f"model to the CPU. Call init_process_group with 'nccl' or 'cpu:gloo,cuda:nccl' before create_groups."
            )
        if not local_tensor(parameter).is_contiguous():
            raise ShapeError(
                f"{name} is not contiguous (strides {parameter.stride()} for shape {list(parameter.shape)}), and FSDP2 "
                f"cuts flat memory. Store it with .contiguous()."
            )
        if not is_dtensor(parameter):
            continue
        dims: tuple[str, ...] = ("ep", "etp") if family.view == "expert" else ("tp",)
        wanted = entry.groups.mesh(family.view)[dims]
        if parameter.device_mesh != wanted:
            at = ", ".join(map(repr, dims))
            raise GroupsError(
                f"{name} is a DTensor on the mesh {parameter.device_mesh}, and FSDP2 can put its own only beside that "
                f"of these groups. Parallelize with groups.mesh({family.view!r})[{at}]."
            )
        if (
            family.view == "dense"
            and parameter in explicit
            and family.reduction is Reduction.SUM
            and groups.tp.size > 1
        ):
            raise FamilyError(
                f"{name} is a DTensor replicated over tp and marked {family.name!r}, whose gradients are summed over "
                f"tp. A DTensor gradient that is partial says so, and FSDP2 sums it over tp when it arrives; whether "
                f"that happened cannot be seen afterwards, so summing again would be a guess. Remove the mark if the "
                f"layer works on DTensors, or keep the parameter a plain tensor."
            )
