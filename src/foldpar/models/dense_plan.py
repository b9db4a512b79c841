"""Which tensor-parallel style each dense layer of a model gets: names and integers, nothing is touched.

Styles come from the model's own plan (transformers: ``model._tp_plan``) and from adapters. Names are transformers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from foldpar.errors import ModelError, ShapeError
from foldpar.wording import divisors, listed

__all__ = ["HEAD_COUNTS", "DenseStep", "Kind", "ending_in", "model_plan", "plan_dense"]

Kind = Literal["columns", "columns_gathered", "rows", "rows_split", "vocabulary", "rope", "slice", "one_head"]

_KIND_OF_STYLE: dict[str, Kind | Literal["partial", "whole"]] = {
    "colwise": "columns",
    "colwise_gather_output": "columns_gathered",
    "colwise_rep": "columns_gathered",
    "rowwise": "rows",
    "rowwise_split_input": "rows_split",
    "rowwise_rep": "rows_split",
    "embedding_rowwise": "vocabulary",
    "replicated_with_grad_allreduce": "partial",
    "mla_kv_a_proj": "rope",
    "replicate": "whole",
}
_OPTIONAL: tuple[Kind, ...] = ("columns_gathered", "rows_split", "vocabulary")
"""Layers that take and give whole tensors: whether they are sharded changes memory, not the model."""

HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")
"""Attributes of attention modules that count heads, and count the lane's own after sharding."""


@dataclass(frozen=True, slots=True)
class DenseStep:
    """What is done to one module (or, with ``"slice"``, to one parameter) of the dense part.

    ``columns``: the output is the lane's columns. ``columns_gathered``: gathered to the whole output. ``rows``: the
    input is the lane's columns. ``rows_split``: a whole input is split first. ``vocabulary``: the rows of an embedding.
    ``rope``: the last ``width`` columns of the output go straight to the lane's heads. ``slice``: dimension 0.
    ``one_head``: there are fewer heads than lanes; every lane holds all and uses one, ``width`` columns.
    """

    name: str
    kind: Kind
    width: int = 0


@dataclass(frozen=True, slots=True)
class DensePlan:
    """Steps by module name, parameters whose gradient is partial, attentions by heads, and why layers stay whole."""

    steps: Mapping[str, DenseStep]
    partial: frozenset[str]
    by_heads: tuple[str, ...]
    left: Mapping[str, str]
    """By module name, for layers that some style asked to shard."""


def model_plan(model: nn.Module) -> dict[str, str]:
    """The plan that a model brings: names with ``*`` for numbers, to styles. Empty where it brings none.

    A module around models, such as a pipeline stage, brings those of the models inside.
    """
    found: dict[str, str] = {}
    outer: list[str] = []
    for name, module in model.named_modules():
        plan = getattr(module, "_tp_plan", None)
        if isinstance(plan, Mapping) and not any(name.startswith(place) for place in outer):
            prefix = f"{name}." if name else ""
            found |= {prefix + key: style for key, style in plan.items()}
            outer.append(prefix)
    return found


def plan_dense(
    model: nn.Module,
    tp: int,
    plan: Mapping[str, str],
    extra: Mapping[str, str],
    *,
    skip: Iterable[str],
    partial: Iterable[str],
    whole: Iterable[str],
) -> DensePlan:
    """Resolve styles for ``tp`` lanes.

    ``plan`` has full names, ``extra`` ends of names, which come first; modules in or under ``skip`` are left out.
    ``partial`` and ``whole`` are names inside attentions that are sharded by heads.

    Raises:
        ModelError: a style that is not known, or on a layer that it does not fit; a parameter beside sharded heads that
            nobody declared. ShapeError: ``tp`` does not divide heads or widths.
    """
    modules = dict(model.named_modules())
    parameters = {
        f"{name}.{own}" if name else own: each for name, module in modules.items() for own, each in _own(module)
    }
    if tp == 1:  # the model's own styles mean nothing then, known or not
        _styles(model, [*modules, *parameters], {}, extra, tuple(skip))
        return DensePlan({}, frozenset(), (), {})
    styles = _styles(model, [*modules, *parameters], plan, extra, tuple(skip))
    steps, on_own_heads, left = {}, set(), {}
    for name, style in styles.items():
        kind = _KIND_OF_STYLE[style]
        if kind == "partial":
            on_own_heads |= {each for each in parameters if each == name or each.startswith(name + ".")}
        elif kind == "whole":
            left[name] = "left whole by the plan"
        else:
            if name in parameters:
                step = _slice_step(name, style, parameters[name], tp)
            else:
                step = _step(name, kind, style, modules, tp)
            if reason := _reason_to_leave(step, modules, tp):
                left[name] = reason
            else:
                steps[name] = step
    _keep_tied_alike(parameters, steps, left)
    by_heads = sorted({name.rpartition(".")[0] for name, step in steps.items() if step.kind == "columns"})
    _check_regions(by_heads, modules, steps, left)
    _leave_what_feeds_no_own_heads(by_heads, steps, left)
    marked = {each for each in on_own_heads if _is_inside(each, by_heads)}
    for attention in by_heads:
        shared = _shared_heads(attention, modules[attention], steps, tp)
        steps |= {step.name: step for step in shared}
        marked |= {each for each in parameters if each.rpartition(".")[0] in {step.name for step in shared}}
        _check_heads(attention, modules[attention], steps, tp)
        marked |= _partial_beside_heads(attention, modules[attention], steps, marked, partial, whole)
    return DensePlan(steps, frozenset(marked), tuple(by_heads), left)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Its own parameters; each also where one tensor is two of them."""
    return module.named_parameters(recurse=False, remove_duplicate=False)


def _is_inside(name: str, regions: Iterable[str]) -> bool:
    return any(name.startswith(f"{region}." if region else "") for region in regions)


def _leave_what_feeds_no_own_heads(by_heads: list[str], steps: dict[str, DenseStep], left: dict[str, str]) -> None:
    """Steps that are about the lane's own heads mean nothing in an attention that every lane computes whole."""
    for name, step in list(steps.items()):
        if step.kind in ("rope", "slice") and not _is_inside(name, by_heads):
            del steps[name]
            left[name] = "the heads beside it are left whole"


def _check_regions(
    by_heads: list[str], modules: Mapping[str, nn.Module], steps: Mapping[str, DenseStep], left: Mapping[str, str]
) -> None:
    """A layer that takes the lane's columns needs one that gives them."""
    for name, step in steps.items():
        parent = name.rpartition(".")[0]
        beside = [
            each for each in left if each.rpartition(".")[0] == parent and isinstance(modules.get(each), nn.Linear)
        ]
        if step.kind == "rows" and beside and not _is_inside(name, by_heads):
            raise ModelError(
                f"{name} is sharded by rows, so it takes the lane's own columns, and {', '.join(beside)} beside it "
                f"stay(s) whole and give(s) all. Shard all layers of {parent} or none: give {name} the style "
                f"'replicate' too, in an adapter's tp_plan."
            )


def _styles(
    model: nn.Module, names: list[str], plan: Mapping[str, str], extra: Mapping[str, str], skip: tuple[str, ...]
) -> dict[str, str]:
    """Style by full name, in the order of the model."""
    ends = [(ending_in(key), style) for key, style in extra.items()]
    exact = [(re.compile(rf"{_pattern(key)}$"), style) for key, style in plan.items()]
    found: dict[str, str] = {}
    for name in names:
        if any(name == each or name.startswith(each + ".") for each in skip):
            continue
        for pattern, style in (*ends, *exact):
            if pattern.match(name):
                if not isinstance(style, str) or style not in _KIND_OF_STYLE:
                    raise ModelError(
                        f"{name} has the tensor-parallel style {style!r} in the plan of {type(model).__name__}, and "
                        f"what it means for gradients is not known here. Known styles are "
                        f"{', '.join(map(repr, _KIND_OF_STYLE))}. Give one of them for this layer in an adapter: "
                        f"MoEAdapter(..., tp_plan={{{name.split('.')[-1]!r}: 'replicate'}}) leaves it whole. Where it "
                        f"is fused with other projections, leave the layers that take its output whole too."
                    )
                found[name] = style
                break
    return found


def ending_in(key: str) -> re.Pattern[str]:
    """Names that end in the key of an adapter's plan."""
    return re.compile(rf"(?:.*\.)?{_pattern(key)}$")


def _pattern(key: str) -> str:
    return re.escape(key).replace(r"\*", r"\d+")


def _slice_step(name: str, style: str, parameter: nn.Parameter, tp: int) -> DenseStep:
    if style != "colwise":
        raise ModelError(f"{name} is a parameter, which only 'colwise' can cut, along dimension 0; not {style!r}.")
    _must_divide(tp, parameter.shape[0], f"the size {parameter.shape[0]} of {name}", "so a lane would get less", "only")
    return DenseStep(name, "slice")


def _step(name: str, kind: Any, style: str, modules: Mapping[str, nn.Module], tp: int) -> DenseStep:
    module = modules[name]
    wanted = nn.Embedding if kind == "vocabulary" else nn.Linear
    if not isinstance(module, wanted):
        raise ModelError(
            f"{name} has the tensor-parallel style {style!r}, which is for a {wanted.__name__}, and is a "
            f"{type(module).__name__}. Give it the style 'replicate' in an adapter's tp_plan, or another that fits."
        )
    width = _rope_width(name, modules) if kind == "rope" else 0
    return DenseStep(name, kind, width)


def _rope_width(name: str, modules: Mapping[str, nn.Module]) -> int:
    parent = modules[name.rpartition(".")[0]]
    width = getattr(parent, "qk_rope_head_dim", None)
    if not isinstance(width, int):
        raise ModelError(
            f"{name} has the style 'mla_kv_a_proj', so a part of its output goes straight to the heads; how wide that "
            f"part is stands in qk_rope_head_dim of the attention, and {type(parent).__name__} has none."
        )
    return width


def _reason_to_leave(step: DenseStep, modules: Mapping[str, nn.Module], tp: int) -> str:
    """Why a layer that may as well stay whole does so; empty if it is sharded."""
    module = modules.get(step.name)
    if step.kind not in _OPTIONAL or module is None:
        return ""
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            return "an embedding with padding_idx"
        if type(module) is not nn.Embedding or module.max_norm or module.scale_grad_by_freq or module.sparse:
            return "an embedding of another kind"
        size = module.num_embeddings
    else:
        assert isinstance(module, nn.Linear)
        size = module.in_features if step.kind == "rows_split" else module.out_features
    return f"tp = {tp} does not divide {size}" if size % tp else ""


def _keep_tied_alike(parameters: Mapping[str, nn.Parameter], steps: dict[str, DenseStep], left: dict[str, str]) -> None:
    """A parameter of several modules, such as tied embeddings, is sharded in one way at all its places or at none.

    Raises:
        ModelError: it cannot stay whole at one of them, because its neighbours do not.
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    for names in names_of.values():
        owners = [name if name in steps else name.rpartition(".")[0] for name in names]
        kinds = {steps[owner].kind if owner in steps else None for owner in owners}
        alike = len(kinds) == 1 or kinds <= {"columns_gathered", "vocabulary"}
        if len(names) > 1 and not alike:
            bound = [owner for owner in owners if owner in steps and steps[owner].kind not in _OPTIONAL]
            if bound:
                raise ModelError(
                    f"{' and '.join(names)} are one tensor, which would be sharded "
                    f"{' and '.join(_way(steps.get(owner)) for owner in owners)}: it cannot stay one. Give the "
                    f"layers of {', '.join(sorted({each.rpartition('.')[0] for each in bound}))} the style 'replicate' "
                    f"in an adapter's tp_plan, or untie it."
                )
            for owner in owners:
                steps.pop(owner, None)
                left.setdefault(owner, f"one tensor as {' and '.join(names)}")


def _way(step: DenseStep | None) -> str:
    return "not at all" if step is None else f"as {step.kind!r}"


def _shared_heads(name: str, attention: nn.Module, steps: Mapping[str, DenseStep], tp: int) -> list[DenseStep]:
    """The projections of keys and values where several lanes use the same head; none where heads are cut evenly."""
    config = getattr(attention, "config", None)
    heads = getattr(config, "num_key_value_heads", None)
    names = [f"{name}.{child}" for child in ("k_proj", "v_proj")]
    if (
        not isinstance(heads, int)
        or heads >= tp
        or tp % heads
        or not isinstance(getattr(attention, "num_key_value_groups", None), int)
    ):
        return []
    if any(each not in steps or steps[each].kind != "columns" for each in names):
        return []
    projections = [attention.get_submodule(child) for child in ("k_proj", "v_proj")]
    for each, module in zip(names, projections, strict=True):
        if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
            raise ModelError(
                f"{each} is a {type(module).__name__} with a forward of its own, and with tp = {tp} lanes share each "
                f"of its {heads} heads: what it computes would be replaced by a plain product with one head. tp can be "
                f"{listed(divisors(heads))} here, or {name} can stay whole: give each of its layers the style "
                f"'replicate' in an adapter's tp_plan."
            )
    return [
        DenseStep(each, "one_head", module.out_features // heads)
        for each, module in zip(names, projections, strict=True)
        if isinstance(module, nn.Linear)
    ]


def _check_heads(name: str, attention: nn.Module, steps: Mapping[str, DenseStep], tp: int) -> None:
    """Whole heads on every lane (a width that divides is not enough), and equal widths in all other layers."""
    own = {each.rpartition(".")[2]: step for each, step in steps.items() if each.rpartition(".")[0] == name}
    stay_whole = f"or {name} can stay whole: give each of its layers the style 'replicate' in an adapter's tp_plan"
    if own.keys() & {"o_proj", "out_proj", "k_proj", "kv_b_proj"}:  # an attention, not a feed-forward network
        config = getattr(attention, "config", None)
        counts = [(each, getattr(config, each, None)) for each in ("num_attention_heads", "num_key_value_heads")]
        counts += [(each, getattr(attention, each, None)) for each in HEAD_COUNTS]
        for attribute, count in counts:
            key_value = attribute in ("num_key_value_heads", "num_kv_heads")
            shared = key_value and (own.keys().isdisjoint({"k_proj", "v_proj"}) or own["k_proj"].kind == "one_head")
            if isinstance(count, int) and not shared:
                _must_divide(tp, count, f"{attribute} = {count} of {name}", "so a head would be cut", stay_whole)
    for child, step in own.items():
        module = attention.get_submodule(child) if step.kind in ("columns", "rows") else None
        if isinstance(module, nn.Linear):
            size, side = (module.out_features, "output") if step.kind == "columns" else (module.in_features, "input")
            what = f"the {size} {side} columns of {name}.{child}"
            _must_divide(tp, size, what, "so lanes would hold different shapes", stay_whole)


def _partial_beside_heads(
    name: str,
    attention: nn.Module,
    steps: Mapping[str, DenseStep],
    marked: set[str],
    partial: Iterable[str],
    whole: Iterable[str],
) -> set[str]:
    """Parameters of a region by heads that no step shards: those that work on own heads, if everybody is declared."""
    found, unknown = set(), []
    declared_partial, declared_whole = tuple(partial), tuple(whole)
    for inner, _ in attention.named_parameters():
        full = f"{name}.{inner}"
        if full in steps or full in marked or full.rpartition(".")[0] in steps:
            continue
        if _lies_in(inner, declared_partial):
            found.add(full)
        elif not _lies_in(inner, declared_whole):
            unknown.append(inner)
    if unknown:
        raise ModelError(
            f"{', '.join(unknown)} of {name} ({type(attention).__name__}) lie beside projections that are sharded over "
            f"the lanes, and nothing says whether they work on the lane's own part or on all of it. The one gives a "
            f"part of the gradient, the other the whole, and a wrong guess silently trains another model. Say it in an "
            f"adapter: MoEAdapter(..., partial=({unknown[0]!r},)) if it sees the lane's own heads or columns, "
            f"whole=({unknown[0]!r},) if it lies in front of them, or tp_plan={{{unknown[0]!r}: ...}} to shard it."
        )
    return found


def _lies_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def _must_divide(tp: int, total: int, what: str, why: str, otherwise: str) -> None:
    if total % tp:
        raise ShapeError(
            f"tp = {tp} does not divide {what}, {why}. tp can be {listed(divisors(total))} here, {otherwise}."
        )
