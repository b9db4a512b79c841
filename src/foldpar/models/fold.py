"""``fold_model``: turn a model with MoE blocks into its folded self, in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from foldpar.arguments import expect
from foldpar.comm import FoldedGroups, adopt
from foldpar.errors import ModelError
from foldpar.families import REPLICATED, REPLICATED_PARTIAL
from foldpar.models.adapted import adapters_aside, welcome_adapters
from foldpar.models.block_proof import kind_of, prove_block
from foldpar.models.known import MoEAdapter
from foldpar.models.meta_copy import HOOKS
from foldpar.models.plan import Block, FoldPlan, survey
from foldpar.models.refusals import refuse_what_needs_all_ranks
from foldpar.models.tensor_parallel import shard_dense
from foldpar.moe import FoldedExperts, ModelChecks, OneSided, Partition, Sharing, as_expected, correction_bias_in
from foldpar.parameters import (
    base_of,
    keep_dtypes,
    mark_parameters,
    mark_replaced,
    mark_what_is_here,
    parameter_placements,
    take_shares_on_load,
    watch_optimizers,
)

__all__ = ["fold_model"]


def fold_model(
    model: nn.Module,
    groups: FoldedGroups,
    *,
    adapters: Iterable[MoEAdapter] = (),
    partition: Partition = "tokens",
    one_sided: Sharing = None,
    check: bool | None = None,
) -> FoldPlan:
    """Fold a model in place: its experts over ``ep`` and ``etp``, its dense part over ``tp``; returns what was done.

    Blocks keep their own forward, routers, shared experts and return values; their experts become
    :class:`foldpar.FoldedExperts` with this rank's share. Attention, dense and shared feed-forward layers, embeddings
    and head follow the model's own tensor-parallel plan (and that of the adapters) where ``tp > 1``. Parameters keep
    their names and get their families, so :func:`foldpar.reduce_gradients` works as it is. Call it on every rank with
    the same weights, or on the meta device; nothing is communicated::

        layout = foldpar.solve_layout(world=8, tp=2, ep=8)
        groups = foldpar.create_groups(layout)
        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
        print(foldpar.fold_model(model, groups))

    All ranks of a TP group run on the same batch, and the loss of each is the mean over it. Every forward is a meeting
    of the expert group: ranks must make equally many. In ``generate`` pass ``synced_gpus=True``, so that ranks whose
    prompts have ended go on until all have; the same number of prompts is not needed. A static KV cache is sized by
    the configuration, which counts the heads of all lanes: use the dynamic one, the default. What draws random numbers
    (jitter, Phi-MoE's router in training, sampling in ``generate``) must draw the same on all lanes: seed the lanes of
    a TP group alike. Dropout inside attention then draws one mask for the heads of all lanes.

    With fewer key-value heads than lanes, every lane holds all of them and uses one. Layers that no plan names, such as
    linear attention in some models, stay whole, and the plan lists them with the reason.

    Args:
        model: what is loaded here; for a pipeline, this stage's part. What is at several places in it, such as tied
            weights or layers shared between depths, stays one.
        adapters: :class:`~foldpar.MoEAdapter` for blocks that are not known here; they come first.
        partition: how lanes share the experts' work, see :class:`foldpar.FoldedExperts`.
        one_sided: how rows travel through memory that GPUs share, as in :class:`foldpar.FoldedMoE`: where that is
            possible by default, ``False`` for messages.
        check: when to compare what is taken on trust, as in :class:`foldpar.FoldedMoE`; here also that all lanes of a
            TP group call the model with the same tensors, and send the same gradients back to its outputs.

    Raises:
        ModelError, ShapeError: as :func:`foldpar.plan_fold`, on every rank, before anything is touched. ModelError: a
            block is not equal to its folded self: one of each kind is run beside it first, in this process alone, at
            inputs from 0.1 to 1000, values and gradients. A large block is cut to a few hidden units for that, and one
            on the meta device gets numbers. What could not be compared stands in the plan's ``proof``, with the reason.

    Source: tensor parallelism: Shoeybi et al. 2019; folding: Liu et al. 2025.
    """
    expect(
        "fold_model",
        model=(model, nn.Module),
        groups=(groups, FoldedGroups),
        one_sided=(as_expected(one_sided), (OneSided, type(None))),
    )
    model = base_of(model)
    with adapters_aside(model):
        plan = _fold_all(model, groups, adapters, _Choices(partition, one_sided, check))
    welcome_adapters(model, groups)
    return plan


def _fold_all(
    model: nn.Module,
    groups: FoldedGroups,
    adapters: Iterable[MoEAdapter],
    choices: _Choices,
) -> FoldPlan:
    found, before = survey(model, groups.layout, adapters), list(model.parameters())
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    proof = _proof(found.blocks)
    shared = _Shared({}, {})
    for block in found.blocks:
        _fold(model, block, groups, shared, choices)
    shard_dense(model, found.dense, groups)
    for name in found.dense.partial:
        owner, _, own_name = name.rpartition(".")
        mark_parameters(model.get_submodule(owner), REPLICATED_PARTIAL, names=(own_name,))
    mark_what_is_here(model, REPLICATED)
    for parameter in model.parameters():
        adopt(parameter)
    mark_replaced(before, model)
    watch_optimizers(groups, model)
    take_shares_on_load(model, groups)
    keep_dtypes(model)
    refuse_what_needs_all_ranks(model, groups)
    replaced = [block.name for block in found.blocks if block.adapter.replace is not None]
    _check_done(model, groups, found.plan, buffers, replaced)
    ModelChecks(groups, choices.check, experts=bool(found.blocks)).watch(model)
    return replace(found.plan, proof=proof)


def _proof(blocks: Iterable[Block]) -> tuple[str, ...]:
    """One block of each kind, beside its folded self."""
    of_each_kind = {kind_of(block.module, block.adapter): block for block in reversed(tuple(blocks))}
    return tuple(
        prove_block(block.name, block.module, block.adapter, block.activation)
        for block in reversed(of_each_kind.values())
    )


@dataclass(frozen=True, slots=True)
class _Choices:
    """What a user of :func:`fold_model` chooses for all experts."""

    partition: Partition
    one_sided: Sharing
    check: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """What is at several places of the model stays one thing: experts by their module, weights by their tensor."""

    experts: dict[int, FoldedExperts]
    weights: dict[int, nn.Parameter]


def _fold(model: nn.Module, block: Block, groups: FoldedGroups, shared: _Shared, choices: _Choices) -> None:
    adapter = block.adapter
    if adapter.replace is not None:
        _put_block(model, block.module, adapter.replace(block.module, groups))
        return
    experts = block.experts
    if not isinstance(experts, FoldedExperts) and id(experts) not in shared.experts:
        shared.experts[id(experts)] = _folded(block, groups, shared, choices)
    folded = experts if isinstance(experts, FoldedExperts) else shared.experts[id(experts)]
    folded.counts_decisions = correction_bias_in(block.module) is not None
    for router in block.routers:
        mark_parameters(model.get_submodule(router), folded.lane_state.families.router_in_front)
    if adapter.around is None:
        _put(model, experts, folded)
    else:
        _put_block(model, block.module, adapter.around(block.module, folded))


def _folded(block: Block, groups: FoldedGroups, shared: _Shared, choices: _Choices) -> FoldedExperts:
    assert block.activation is not None
    adapter, experts = block.adapter, block.experts
    weights = adapter.weights_of(experts, block.experts_name)
    folded = FoldedExperts.from_dense(
        weights.gate_up,
        weights.down,
        groups,
        gate_up_bias=weights.gate_up_bias,
        down_bias=weights.down_bias,
        activation=block.activation,
        storage=adapter.storage,
        call=adapter.call,
        partition=choices.partition,
        one_sided=choices.one_sided,
        check=choices.check,
    ).train(experts.training)
    _take_hooks(folded, experts)
    trainable = adapter.are_trainable(experts, block.experts_name)
    for name, is_trained in zip(adapter.storage.names, trainable, strict=True):
        if name in dict(folded.named_parameters(recurse=False)):
            folded.get_parameter(name).requires_grad_(is_trained)
    if adapter.weights is None:
        for name, whole in experts.named_parameters(recurse=False):
            own = shared.weights.setdefault(id(whole), folded.get_parameter(name))
            vars(own).update(vars(whole))  # what a loop or an optimizer notes on a parameter
            setattr(folded, name, own)
    return folded


def _put_block(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """A block written anew, called as the old one was."""
    if new is not old:
        _take_hooks(new, old)
    _put(model, old, new.train(old.training))


def _take_hooks(new: nn.Module, old: nn.Module) -> None:
    """The same objects, so that handles of hooks still remove them."""
    for name in HOOKS:
        hooks = getattr(old, name)
        if isinstance(hooks, dict):
            hooks.update(getattr(new, name))
        setattr(new, name, hooks)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """At every place of the old one."""
    if old is model:
        raise ModelError("The model itself is an MoE block; put it into a module, since it is replaced in its parent.")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and new is not old:
                setattr(parent, name, new)


def _check_done(model: nn.Module, groups: FoldedGroups, plan: FoldPlan, buffers: set[str], replaced: list[str]) -> None:
    """What is there now must be what was planned; only an adapter's ``around`` can make a difference."""
    here = {each.name: (each.share.local, each.family.name) for each in parameter_placements(model, groups)}
    wanted = {row.name: (row.local_shape, row.family.name) for row in plan.rows if row.family is not None}
    here = {name: each for name, each in here.items() if not any(name.startswith(f"{place}.") for place in replaced)}
    lost = buffers - {name for name, _ in model.named_buffers(remove_duplicate=False)}
    lost = {name for name in lost if not any(name.startswith(f"{place}.") for place in replaced)}
    if lost:
        raise ModelError(
            f"Folding has lost the buffer(s) {', '.join(sorted(lost)[:5])}. An adapter's 'around' must keep all "
            f"buffers of the block under their names."
        )
    if here != wanted:
        differing = sorted(name for name in {*here, *wanted} if here.get(name) != wanted.get(name))
        raise ModelError(
            f"Folding did not give what was planned for {', '.join(differing[:5])}: "
            f"{[here.get(name) for name in differing[:5]]} is not {[wanted.get(name) for name in differing[:5]]}. An "
            f"adapter's 'around' must keep all children of the block under their names."
        )
