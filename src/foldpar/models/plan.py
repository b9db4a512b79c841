"""``plan_fold``: what folding a model will do, parameter by parameter, before anything is touched."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from foldpar.arguments import expect
from foldpar.comm import is_dtensor
from foldpar.errors import ModelError, ShapeError
from foldpar.families import (
    DENSE_SHARDED,
    EXPERT_BIAS,
    REPLICATED,
    REPLICATED_PARTIAL,
    ROUTED_EXPERT,
    ROUTER_ALL_TOKENS,
    ParameterFamily,
)
from foldpar.layout import FoldedLayout
from foldpar.models.adapted import adapters_aside
from foldpar.models.dense_plan import DensePlan, DenseStep, ending_in, model_plan, plan_dense
from foldpar.models.known import DEFAULT_ADAPTERS, ByInterface, ExpertWeights, MoEAdapter, adapter_by_interface
from foldpar.models.meta_copy import HOOKS, STATE_HOOKS, on_meta
from foldpar.moe import Activation, ExpertShare, FoldedMoE, is_gated
from foldpar.parameters import base_of, refuse_gradient_hooks
from foldpar.wording import divisors, listed

__all__ = ["Block", "FoldPlan", "FoldPlanRow", "Survey", "plan_fold", "survey"]


@dataclass(frozen=True, slots=True)
class FoldPlanRow:
    """One parameter: where it is, what is done with it, and what a rank holds of it.

    ``local_shape`` and ``family`` are ``None`` for what an adapter's ``replace`` takes over. ``reason``
    says why a parameter is left whole.
    """

    name: str
    module: str
    action: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...] | None
    family: ParameterFamily | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What folding does to every parameter of a model; ``print`` it to read it.

    Attributes:
        model: the class of the model.
        layout: the layout it is folded on.
        rows: a :class:`FoldPlanRow` for each parameter after folding, in the order of the model.
        proof: for each kind of block what came of running it beside its folded self; :func:`foldpar.fold_model` does
            that, and a plan alone does not.
    """

    model: str
    layout: FoldedLayout
    rows: tuple[FoldPlanRow, ...]
    proof: tuple[str, ...] = field(default=(), compare=False)

    @property
    def left_whole(self) -> dict[str, str]:
        """Parameters that every lane holds whole although there are several lanes, with the reason."""
        return {row.name: row.reason for row in self.rows if row.reason}

    @property
    def local_parameters(self) -> int:
        """How many parameters a rank holds."""
        return sum(math.prod(row.local_shape or ()) for row in self.rows if row.local_shape is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, integers, lists."""
        rows = [{**asdict(row), "family": _family(row)} for row in self.rows]
        return {"model": self.model, "layout": self.layout.to_dict(), "rows": rows}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        layout = self.layout
        whole, local = sum(math.prod(row.shape) for row in self.rows), self.local_parameters
        title = (
            f"{self.model} on world={layout.world} tp={layout.tp} cp={layout.cp} dp={layout.dp} pp={layout.pp}, "
            f"ep={layout.ep} etp={layout.etp} edp={layout.edp}: a rank holds {local:,} of {whole:,} parameters"
        )
        lines = [("parameter", "of", "done", "shape", "on a rank", "family", "")]
        for row, count in _merged(self.rows):
            times = f" x{count}" if count > 1 else ""
            name = re.sub(r"\.\d+(?=\.)", ".*", row.name) if count > 1 else row.name
            own = "?" if row.local_shape is None else _shape(row.local_shape)
            lines.append((name + times, row.module, row.action, _shape(row.shape), own, _family(row), row.reason))
        widths = [max(len(line[column]) for line in lines) for column in range(7)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([title, *(line.rstrip() for line in table), *self.proof])


def plan_fold(model: nn.Module, layout: FoldedLayout, *, adapters: Iterable[MoEAdapter] = ()) -> FoldPlan:
    """Say what :func:`foldpar.fold_model` would do to a model on a layout; touches nothing, needs no process group.

    The model may be on the meta device, so a plan for any size takes seconds on a laptop::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("Qwen/Qwen3-30B-A3B"))
        print(foldpar.plan_fold(model, foldpar.solve_layout(8, tp=2, ep=8)))

    Args:
        adapters: :class:`~foldpar.MoEAdapter` for blocks that are not known here; they come before those that
            are.

    Raises:
        ModelError: a block, an activation or a tensor-parallel style that is not known; a model that is folded or
            sharded already; a block that cannot be folded. ShapeError: ``ep`` does not divide the experts, ``etp``
            their hidden width, or ``tp`` heads or widths; the text names the valid choices.
    """
    expect("plan_fold", model=(model, nn.Module), layout=(layout, FoldedLayout))
    model = base_of(model)
    with adapters_aside(model):
        return survey(model, layout, adapters).plan


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """An MoE block of the model and how it is folded."""

    name: str
    module: nn.Module
    adapter: MoEAdapter
    activation: Activation | None

    @property
    def experts_name(self) -> str:
        """The full name of its experts."""
        return f"{self.name}.{self.adapter.experts}" if self.name else self.adapter.experts

    @property
    def experts(self) -> nn.Module:
        """The module that holds its experts."""
        return self.module.get_submodule(self.adapter.experts)

    @property
    def routers(self) -> list[str]:
        """The full names of its routers."""
        own = [name for name, _ in self.module.named_children() if name in self.adapter.routers]
        return [f"{self.name}.{name}" if self.name else name for name in own]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """A plan and the modules that it is about."""

    blocks: tuple[Block, ...]
    dense: DensePlan
    plan: FoldPlan


def survey(model: nn.Module, layout: FoldedLayout, adapters: Iterable[MoEAdapter]) -> Survey:
    """Look at everything and check it."""
    _check_untouched(model)
    own = _checked(adapters)
    blocks = tuple(_find_blocks(model, (*own, *DEFAULT_ADAPTERS)))
    for adapter in own:
        _check_names(model, layout, adapter, [block for block in blocks if block.adapter is adapter])
    _check_ties(model, blocks)
    if layout.tp > 1:
        _check_dense_is_known(blocks, layout.tp)
    kept = [block for block in blocks if block.adapter.replace is None]
    adapters_used = list({id(block.adapter): block.adapter for block in blocks}.values())
    extra: dict[str, str] = {}
    for adapter in adapters_used:
        extra = {**extra, **{name: style for name, style in adapter.tp_plan.items() if name not in extra}}
    dense = plan_dense(
        model,
        layout.tp,
        model_plan(model),
        extra,
        skip=[
            *(block.experts_name for block in kept),
            *(router for block in kept for router in block.routers),
            *(block.name for block in blocks if block.adapter.replace is not None),
        ],
        partial=[name for adapter in adapters_used for name in adapter.partial],
        whole=[name for adapter in adapters_used for name in adapter.whole],
    )
    refuse_gradient_hooks(_replaced(model, kept, dense), "Folding")
    _check_no_hook_sees_a_part(model, dense, layout.tp)
    rows = tuple(_rows(model, layout, blocks, dense))
    return Survey(blocks, dense, FoldPlan(type(model).__name__, layout, rows))


def _replaced(model: nn.Module, blocks: Iterable[Block], dense: DensePlan) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters in whose place folding puts others."""
    for block in blocks:
        yield from block.experts.named_parameters(block.experts_name)
    for step in dense.steps.values():
        if step.kind == "slice":
            yield step.name, model.get_parameter(step.name)
        elif step.kind not in ("rope", "one_head"):  # these read a whole weight
            yield from model.get_submodule(step.name).named_parameters(step.name)


def _check_no_hook_sees_a_part(model: nn.Module, dense: DensePlan, tp: int) -> None:
    """A hook that was put on a module of a sharded region was written for whole inputs and outputs."""
    cut = (
        step.name for step in dense.steps.values() if step.kind not in ("vocabulary", "columns_gathered", "rows_split")
    )
    for region in dict.fromkeys(name.rpartition(".")[0] for name in cut):
        for name, module in model.get_submodule(region).named_modules(prefix=region):
            if name != region and any(getattr(module, hooks) for hooks in HOOKS):
                raise ModelError(
                    f"{name} ({type(module).__name__}) has hooks, and with tp = {tp} it sees this lane's columns or "
                    f"heads only: what was written for whole inputs and outputs would be given parts. Remove them, and "
                    f"register after folding what can work on a part; or hook {region}, whose input and output stay "
                    f"whole."
                )
    for name in (step.name for step in dense.steps.values() if step.kind in ("columns_gathered", "rows_split")):
        if (module := model.get_submodule(name))._backward_hooks:
            raise ModelError(
                f"{name} ({type(module).__name__}) has a hook on its backward, and with tp = {tp} the gradient of its "
                f"input is still a part of a sum over the lanes there. Remove it, and hook the module in front of it; "
                f"or leave {name} whole: give it the style 'replicate' in an adapter's tp_plan."
            )


def _checked(adapters: Iterable[MoEAdapter]) -> tuple[MoEAdapter, ...]:
    """The adapters, if they are what they should be."""
    if isinstance(adapters, MoEAdapter):
        raise _ArgumentError(f"adapters is a tuple: adapters=(MoEAdapter({adapters.blocks[0]!r}, ...),).")
    if isinstance(adapters, str) or not isinstance(adapters, Iterable):
        raise _ArgumentError(f"adapters is a tuple of MoEAdapter, and not {adapters!r}.")
    own = tuple(adapters)
    for adapter in own:
        if not isinstance(adapter, MoEAdapter):
            raise _ArgumentError(f"adapters holds {adapter!r}, which is no MoEAdapter.")
    return own


class _ArgumentError(ModelError, TypeError):
    """An argument of another type."""


def _check_names(model: nn.Module, layout: FoldedLayout, adapter: MoEAdapter, blocks: list[Block]) -> None:
    """Every name in a user's adapter must match something; in a pipeline, other stages may have what it matches."""
    if layout.pp > 1:
        return
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    _check_match(adapter, "block", adapter.blocks, classes, classes)
    children = {child for block in blocks for child, _ in block.module.named_children()}
    if blocks and adapter.routers != _default("routers"):
        _check_match(adapter, "routers", adapter.routers, children, children, every=True)
    names = [
        *(name for name, _ in model.named_modules() if name),
        *(name for name, _ in model.named_parameters(remove_duplicate=False)),
    ]
    for key in adapter.tp_plan:
        matched = {key} if any(map(ending_in(key).match, names)) else set()
        _check_match(adapter, "tp_plan", (key,), matched, _ends(names, key))
    for attribute in ("partial", "whole"):
        if getattr(adapter, attribute) == _default(attribute):
            continue
        for inner in getattr(adapter, attribute):
            matched = {inner} if any(f".{inner}." in f".{name}." for name in names) else set()
            _check_match(adapter, attribute, (inner,), matched, _ends(names, inner))


def _default(attribute: str) -> object:
    return getattr(MoEAdapter("Any"), attribute)


def _ends(names: Iterable[str], like: str) -> set[str]:
    """The last parts of names, as many as the given one has."""
    parts = like.count(".") + 1
    return {".".join(re.sub(r"\.\d+(?=\.)", ".*", name).split(".")[-parts:]) for name in names}


def _check_match(
    adapter: MoEAdapter,
    attribute: str,
    given: Iterable[str],
    matched: set[str],
    known: Iterable[str],
    *,
    every: bool = False,
) -> None:
    """One of the given names must match, or every one."""
    unmatched = [name for name in given if name not in matched]
    if not unmatched or (not every and len(unmatched) < len(tuple(given))):
        return
    candidates = sorted(known)
    near = get_close_matches(unmatched[0], candidates, 1, 0.0)
    listed_names = ", ".join(candidates[:20]) + (", ..." if len(candidates) > 20 else "")
    raise ModelError(
        f"The adapter for {adapter.blocks[0]} has {unmatched[0]!r} in its {attribute}, which matches nothing in this "
        f"model, so it would do nothing. The nearest is {near[0] if near else 'none'!r}; there are {listed_names}."
    )


def _check_untouched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (ExpertShare, FoldedMoE)):
            raise ModelError(
                f"{name or 'The model'} is a {type(module).__name__}: the model is folded already, and folding it "
                f"again would take a share of a share. Fold a model once, as it was loaded or built."
            )
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise ModelError(
                f"{name} is a DTensor: the model is sharded already, by tensor parallelism or FSDP. Fold first: "
                f"fold_model shards the dense part over tp itself. Then shard over data-parallel ranks. A model from "
                f"from_pretrained must be loaded without tp_plan, device_mesh or distributed_config."
            )


def _find_blocks(model: nn.Module, adapters: tuple[MoEAdapter, ...]) -> Iterator[Block]:
    known: list[str] = []
    blocks = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer in known):
            continue
        classes = {cls.__name__ for cls in type(module).__mro__}
        adapter = next((adapter for adapter in adapters if classes & set(adapter.blocks)), None)
        adapter = adapter or adapter_by_interface(module)
        if adapter is not None:
            known.append(name)
            blocks.append(_block(name, module, adapter))
            continue
        if looks_like := _looks_like_experts(name, module):
            raise ModelError(
                f"{looks_like} Blocks are told by their class, and none of the classes around it is known "
                f"({', '.join(_classes_around(model, name))}). Known are {_listed(adapters)}. If the block calls its "
                f"experts with (hidden_states, top_k_index, top_k_weights) and they hold gate_up_proj and down_proj, "
                f"one line is enough: adapters=(MoEAdapter({_classes_around(model, name)[-1]!r}),). Otherwise see "
                f"MoEAdapter."
            )
    if not blocks:
        found = sorted({type(module).__name__ for module in model.modules()})
        raise ModelError(
            f"{type(model).__name__} has no MoE block to fold. Looked for {_listed(adapters)}; found modules of the "
            f"classes {', '.join(found[:30])}. For a block of your own, give its class in an adapter: "
            f"adapters=(MoEAdapter('MyMoEBlock'),)."
        )
    yield from blocks


def _check_dense_is_known(blocks: tuple[Block, ...], tp: int) -> None:
    """What surrounds a block that is known by its experts alone is the model's, and nobody has looked at it."""
    for block in blocks:
        if isinstance(block.adapter, ByInterface):
            kind = type(block.module).__name__
            raise ModelError(
                f"{block.name} ({kind}) is known by its experts alone, which follow transformers' interface, and "
                f"tp = {tp}: whether the dense layers around it may be cut by the model's tensor-parallel plan, nobody "
                f"has proven. With tp = 1 it can be folded as it is, over ep and etp. If you have compared its "
                f"gradients with one process, say so with adapters=(MoEAdapter({kind!r}, ...),)."
            )


def _block(name: str, module: nn.Module, adapter: MoEAdapter) -> Block:
    if adapter.refused is not None:
        raise ModelError(f"{name} ({type(module).__name__}) cannot be folded: {adapter.refused}")
    if adapter.around is not None or adapter.replace is not None:
        _check_no_state_hooks(name, [module])
    if adapter.replace is not None:
        return Block(name, module, adapter, None)
    try:
        experts = module.get_submodule(adapter.experts)
    except AttributeError:
        children = [child for child, _ in module.named_children()]
        raise ModelError(
            f"{name} ({type(module).__name__}) has no child {adapter.experts!r} to hold its experts; its children are "
            f"{', '.join(children)}. Say which it is: MoEAdapter({adapter.blocks[0]!r}, experts=...)."
        ) from None
    where = f"{name}.{adapter.experts}" if name else adapter.experts
    activation = adapter.activation_of(experts, where)
    _expert_sizes(adapter.weights_of(on_meta(experts), where), adapter, activation, where)
    _check_nothing_is_lost(experts, adapter, where)
    _check_no_state_hooks(where, experts.modules())
    adapter.are_trainable(experts, where)
    return Block(name, module, adapter, activation)


def _check_nothing_is_lost(experts: nn.Module, adapter: MoEAdapter, where: str) -> None:
    """Folding keeps the experts' weights, their activation and their hooks; there must be nothing else in them."""
    lost = [f"the buffer {name}" for name, _ in experts.named_buffers()]
    if adapter.weights is None:
        for name, child in experts.named_children():
            inside = [f"{name}.{inner}" for inner, _ in child.named_parameters()]
            if name != "act_fn" or inside:
                holding = f" with {', '.join(inside)}" if inside else ""
                lost.append(f"the child {name} ({type(child).__name__}){holding}")
    else:
        lost += [f"the parameter {name}, which the adapter's weights does not use" for name in adapter.unused(experts)]
        lost += [
            f"the child {name} ({type(child).__name__})"
            for name, child in experts.named_modules()
            if isinstance(child, _RandomInTraining)
        ]
    if "forward" in vars(experts):
        lost.append("a forward that was put on this very module")
    if lost:
        raise ModelError(
            f"{where} ({type(experts).__name__}) does more than its products: it has {', and '.join(lost)}, and "
            f"folding would lose that. Move it into the block around the experts, where it stays as it is; or write "
            f"the block anew with an adapter's around or replace."
        )


def _check_no_state_hooks(where: str, replaced: Iterable[nn.Module]) -> None:
    """Such hooks know the module that they were put on, and its whole tensors."""
    for module in replaced:
        if any(getattr(module, hooks) for hooks in STATE_HOOKS):
            raise ModelError(
                f"{where} ({type(module).__name__}) has a hook on state_dict or load_state_dict, and folding puts "
                f"another module with other tensors in its place. Remove the hook, and register it after folding, "
                f"where experts are DTensors."
            )


def _looks_like_experts(name: str, module: nn.Module) -> str:
    """Why a module that no adapter knows must hold experts; empty for all others."""
    kind = f"{name} ({type(module).__name__})"
    if isinstance(module, nn.ModuleList) and name.endswith("experts") and len(module) > 1:
        return f"{kind} is a list of {len(module)} modules called experts, in a block that is not known."
    if "expert" not in f"{name} {type(module).__name__}".lower():
        return ""
    stacked = [inner for inner, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    return f"{kind} has stacked weights, {', '.join(stacked)}, in a block that is not known." if stacked else ""


def _classes_around(model: nn.Module, name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [type(model.get_submodule(".".join(parts[:length]))).__name__ for length in range(1, len(parts) + 1)][-2:]


def _listed(adapters: tuple[MoEAdapter, ...]) -> str:
    return ", ".join(block for adapter in adapters for block in adapter.blocks if adapter.refused is None)


# -- Rows -------------------------------------------------------------------------------------------------------------


def _rows(model: nn.Module, layout: FoldedLayout, blocks: tuple[Block, ...], dense: DensePlan) -> Iterator[FoldPlanRow]:
    """Each parameter once, under its first name.

    Raises:
        ModelError: a parameter of several places would not be treated alike at all of them.
    """
    first: dict[int, FoldPlanRow] = {}
    for row, parameter in _rows_of_all_places(model, layout, blocks, dense):
        before = first.setdefault(id(parameter), row) if parameter is not None else row
        if before is row:
            yield row
        elif _treatment(before) != _treatment(row):
            raise ModelError(
                f"{before.name} and {row.name} are one tensor, and folding would treat it in two ways: "
                f"{before.action} ({_family(before)}) there and {row.action} ({_family(row)}) here. It "
                f"cannot stay one parameter; untie it, or have both places treated alike by an adapter."
            )


def _treatment(row: FoldPlanRow) -> tuple[object, ...]:
    """What must be equal wherever a tensor is; experts' weights must be the same ones of the two."""
    role = row.name.rpartition(".")[2] if row.family in (ROUTED_EXPERT, EXPERT_BIAS) else ""
    return row.family, row.local_shape, role


def _rows_of_all_places(
    model: nn.Module, layout: FoldedLayout, blocks: tuple[Block, ...], dense: DensePlan
) -> Iterator[tuple[FoldPlanRow, nn.Parameter | None]]:
    block_of = {block.experts_name if block.adapter.replace is None else block.name: block for block in blocks}
    routers = {router for block in blocks if block.adapter.replace is None for router in block.routers}
    for module_name, module in model.named_modules():
        block = next((block for each, block in block_of.items() if _is_in(module_name, each)), None)
        if block is not None and block.adapter.replace is None:
            if module_name == block.experts_name:
                for row in _expert_rows(block, layout):
                    own = module._parameters.get(row.name.rpartition(".")[2]) if block.adapter.weights is None else None
                    yield row, own
            continue
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{module_name}.{own_name}" if module_name else own_name
            shape, kind = tuple(parameter.shape), type(module).__name__
            if block is not None:
                yield FoldPlanRow(name, kind, "replaced by its adapter", shape, None, None), parameter
            elif any(_is_in(module_name, router) for router in routers):
                yield FoldPlanRow(name, kind, "router of all tokens", shape, shape, ROUTER_ALL_TOKENS), parameter
            else:
                yield _dense_row(name, kind, shape, layout.tp, dense), parameter


def _check_ties(model: nn.Module, blocks: tuple[Block, ...]) -> None:
    """Experts that an adapter brings into another shape are tensors of their own; shared ones have one adapter."""
    adapter_of: dict[int, Block] = {}
    for block in blocks:
        if block.adapter.replace is not None:
            continue
        first = adapter_of.setdefault(id(block.experts), block)
        if first.adapter is not block.adapter:
            raise ModelError(f"{first.experts_name} and {block.experts_name} are one module, with two adapters.")
    places: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), {})[id(module)] = f"{name}.{own_name}"
    for block in blocks:
        if block.adapter.weights is None or block.adapter.replace is not None:
            continue
        inside = {id(module) for module in block.experts.modules()}
        for name, parameter in block.experts.named_parameters():
            elsewhere = [place for module, place in places[id(parameter)].items() if module not in inside]
            if elsewhere:
                raise ModelError(
                    f"{block.experts_name}.{name} and {elsewhere[0]} are one tensor. The adapter's weights makes new "
                    f"ones of it, which would not be one parameter; untie them, or store the experts as gate_up_proj "
                    f"and down_proj."
                )


def _is_in(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.") or not place


def _expert_rows(block: Block, layout: FoldedLayout) -> Iterator[FoldPlanRow]:
    """From stand-ins on the meta device: nothing is computed or copied, whatever ``weights`` does."""
    assert block.activation is not None
    adapter, where = block.adapter, block.experts_name
    weights = adapter.weights_of(on_meta(block.experts), where)
    num_experts, dim, hidden = _expert_sizes(weights, adapter, block.activation, where)
    for degree, size, what, total in (
        ("ep", layout.ep, "experts", num_experts),
        ("etp", layout.etp, "hidden units of an expert", hidden),
    ):
        if total % size:
            raise ShapeError(
                f"{degree} = {size} does not divide the {total} {what} in {where}. {degree} can be "
                f"{listed(divisors(total))}."
            )
    parts = 2 if is_gated(block.activation) else 1
    experts, units, storage = num_experts // layout.ep, hidden // layout.etp, adapter.storage
    shapes = {
        storage.gate_up: (weights.gate_up, storage.gate_up_shape(experts, dim, parts * units)),
        "down_proj": (weights.down, storage.down_shape(experts, dim, units)),
        storage.gate_up_bias: (weights.gate_up_bias, (experts, parts * units)),
        storage.down_bias: (weights.down_bias, (experts, dim)),
    }
    action = f"{experts} of {num_experts} experts"
    for name, (whole, local) in shapes.items():
        if whole is not None:
            family = EXPERT_BIAS if name == storage.down_bias else ROUTED_EXPERT
            cut = f", {units} of {hidden} units" if layout.etp > 1 and name != storage.down_bias else ""
            kind = type(block.experts).__name__
            yield FoldPlanRow(f"{where}.{name}", kind, action + cut, tuple(whole.shape), local, family)


def _expert_sizes(
    weights: ExpertWeights, adapter: MoEAdapter, activation: Activation, where: str
) -> tuple[int, int, int]:
    if weights.gate_up.dim() != 3 or weights.down.dim() != 3:
        raise ModelError(
            f"The weights of {where} are {list(weights.gate_up.shape)} and {list(weights.down.shape)}; both must have "
            f"three dimensions, experts first. Stack the experts' matrices in the adapter's weights."
        )
    num_experts, dim, hidden = adapter.storage.for_product(weights.down).shape
    wanted = adapter.storage.gate_up_shape(num_experts, dim, (2 if is_gated(activation) else 1) * hidden)
    if tuple(weights.gate_up.shape) != wanted:
        raise ModelError(
            f"The second product of {where}, {list(weights.down.shape)}, means {num_experts} experts of width {dim} "
            f"and hidden width {hidden}; then the first must be {list(wanted)} for {activation!r}, and is "
            f"{list(weights.gate_up.shape)}. Say in the adapter how they are stored: storage=ExpertStorage(...), or "
            f"weights=..."
        )
    return num_experts, dim, hidden


_RandomInTraining = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_ACTIONS = {
    "columns": "by columns",
    "columns_gathered": "by columns, output gathered",
    "rows": "by rows",
    "rows_split": "by rows, input split",
    "vocabulary": "by vocabulary",
    "slice": "sliced",
}


def _dense_row(name: str, kind: str, shape: tuple[int, ...], tp: int, dense: DensePlan) -> FoldPlanRow:
    owner, _, own_name = name.rpartition(".")
    step = dense.steps.get(name) or dense.steps.get(owner)
    if step is not None and step.kind == "rope":
        return FoldPlanRow(name, kind, "whole, gradient of its last columns summed", shape, shape, REPLICATED)
    if step is not None and step.kind == "one_head":
        return FoldPlanRow(name, kind, "whole, one head used", shape, shape, REPLICATED_PARTIAL)
    cut = None if step is None else _cut_dimension(step, own_name)
    if step is not None and cut is not None:
        local = tuple(size // tp if place == cut else size for place, size in enumerate(shape))
        return FoldPlanRow(name, kind, _ACTIONS[step.kind], shape, local, DENSE_SHARDED)
    if step is not None:
        return FoldPlanRow(name, kind, "whole, added once", shape, shape, REPLICATED)
    if name in dense.partial:
        return FoldPlanRow(name, kind, "whole, on own heads", shape, shape, REPLICATED_PARTIAL)
    reason = (
        dense.left.get(name) or dense.left.get(owner) or ("no style in the plan" if tp > 1 and len(shape) > 1 else "")
    )
    return FoldPlanRow(name, kind, "whole", shape, shape, REPLICATED, reason)


def _cut_dimension(step: DenseStep, own_name: str) -> int | None:
    if step.kind in ("rows", "rows_split"):
        return 1 if own_name == "weight" else None
    return 0


def _merged(rows: Iterable[FoldPlanRow]) -> Iterator[tuple[FoldPlanRow, int]]:
    """Rows that differ in numbers inside their names only, as one, with how many they are."""
    counts: dict[FoldPlanRow, int] = {}
    first: dict[FoldPlanRow, FoldPlanRow] = {}
    for row in rows:
        key = replace(row, name=re.sub(r"\.\d+(?=\.)", ".*", row.name))
        counts[key] = counts.get(key, 0) + 1
        first.setdefault(key, row)
    for key, row in first.items():
        yield row, counts[key]


def _family(row: FoldPlanRow) -> str:
    return "-" if row.family is None else row.family.name


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
