"""Each kind of block beside its folded self: run once in one process, before anything is touched or distributed.

    block -> copy in float64, experts' hidden units cut to a few where they are many -> its experts, and folded ones
          -> one batch of rows from 0.1 to 1000 -> values and gradients of both

What folding believes of a block, from its class, its adapter and its code, is refused here where it does not hold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from foldpar.comm import FoldedGroups
from foldpar.errors import ModelError
from foldpar.layout import solve_layout
from foldpar.models.known import ExpertWeights, MoEAdapter
from foldpar.models.meta_copy import with_tensors
from foldpar.moe import Activation, FoldedExperts, is_gated

__all__ = ["kind_of", "prove_block"]

MAGNITUDES = (0.1, 1.0, 30.0, 1000.0)
_ROWS = 2 * len(MAGNITUDES)
_UNITS = 4
"""Hidden units that are left of an expert in a large block."""
_SMALL, _AGAIN, _LARGEST = 2**21, 2**24, 2**26
"""Elements of a block up to which it is copied whole at once; once more where its cut copy differs; and at all."""
_VALUES, _GRADIENTS = 1e-5, 1e-3
"""Relative differences. Routers compute in float32 whatever they are given, and gradients cancel there."""


def prove_block(name: str, block: nn.Module, adapter: MoEAdapter, activation: Activation | None) -> str:
    """Compare a block with its folded self, and say in a line what was found; the block is not touched.

    It runs in float64 and in evaluation, where the block is; on the meta device on the CPU, with numbers drawn for it.

    Raises:
        ModelError: they differ, in values or gradients, or the experts behave otherwise in training.
    """
    kind = type(block).__name__
    elements = sum(parameter.numel() for parameter in block.parameters())
    cuts = adapter.replace is None and adapter.weights is None and elements > _SMALL
    reason = f"its copy would have {elements:,} elements"
    for few_units in (True, False) if cuts else (False,):
        if not few_units and elements > _LARGEST:
            continue
        for drawn in (True,) if _is_on_meta(block) else (False, True):
            found = _compare(_Case(block, adapter, activation, few_units, drawn))
            reason = found.reason
            if not found.says_nothing:
                break
        if not found.difference and not found.reason:
            what = f"{kind}, its experts alone" if found.experts_alone else kind
            numbers = " with numbers drawn for it" if drawn else ""
            return f"{what}: equal to its folded self in values and gradients{numbers}"
        if found.difference and not (few_units and elements <= _AGAIN):
            raise ModelError(
                f"{name} ({kind}) is not what folding takes it for: {found.difference} Values and gradients "
                f"of the block and of its folded self were compared in one process; nothing was touched. Something in "
                f"it (a forward or an activation of its own, another layout of the weights) is not known here or was "
                f"declared wrongly; say in a MoEAdapter what the experts compute, or write the block anew with its "
                f"around."
            )
    return f"{kind}: not compared with its folded self, {reason}"


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    block: nn.Module
    adapter: MoEAdapter
    activation: Activation | None
    few_units: bool
    drawn: bool


def _is_on_meta(block: nn.Module) -> bool:
    return any(each.is_meta for each in (*block.parameters(), *block.buffers()))


@dataclass(frozen=True, slots=True)
class _Finding:
    """What differs; or why nothing could be compared, and whether that is since numbers were zero or not finite."""

    difference: str = ""
    reason: str = ""
    says_nothing: bool = False
    experts_alone: bool = False


def _compare(case: _Case) -> _Finding:
    device = next((each.device for each in case.block.parameters() if not each.is_meta), torch.device("cpu"))
    groups = FoldedGroups(solve_layout(1), 0, None)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            return _compared(case, device, groups)
    finally:
        groups.destroy()


def _compared(case: _Case, device: torch.device, groups: FoldedGroups) -> _Finding:
    adapter = case.adapter
    block = _reduced(case, device).eval()
    leaves = [each for each in block.parameters() if each.requires_grad]
    if adapter.replace is not None:
        twin = with_tensors(block, lambda tensor: _as(tensor, tensor.detach().clone()))
        try:
            folded = adapter.replace(twin, groups).eval()
        except Exception as error:
            return _Finding(reason=f"since the adapter's replace raised {type(error).__name__}: {error}")
        shapes = _calls(block, folded, next(block.parameters()).shape[-1], device)
        return _first_that_runs(shapes, [])
    experts = block.get_submodule(adapter.experts)
    weights = adapter.weights_of(experts, adapter.experts)
    routed = _folded(case, weights, groups)
    folded = with_tensors(block, lambda tensor: tensor)
    if adapter.around is None:
        parent, _, child = adapter.experts.rpartition(".")
        setattr(folded.get_submodule(parent), child, routed)
    else:
        folded = adapter.around(folded, routed).eval()
    dim = routed.dim
    calls = [*_calls(block, folded, dim, device)]
    found = _first_that_runs(calls, leaves)
    if found.reason and not found.says_nothing and adapter.around is None and adapter.call is None:
        calls = [_call_of_experts(experts, routed, dim, device)]
        alone = _first_that_runs(calls, leaves)
        found = found if alone.reason else replace(alone, experts_alone=True)
    if found.difference or found.reason:
        return found
    return replace(found, difference=_in_training(experts, calls))


def _folded(case: _Case, weights: ExpertWeights, groups: FoldedGroups) -> FoldedExperts:
    """With the block's own tensors in place of parameters, so that gradients reach what they were made of."""
    adapter, activation = case.adapter, case.activation
    assert activation is not None
    num_experts, dim, hidden = adapter.storage.for_product(weights.down).shape
    routed = FoldedExperts(
        num_experts,
        dim,
        hidden,
        groups,
        activation=activation,
        bias=weights.gate_up_bias is not None,
        storage=adapter.storage,
        call=adapter.call,
        seed=0,
        device="meta",
    ).eval()
    tensors = {
        adapter.storage.gate_up: weights.gate_up,
        "down_proj": weights.down,
        adapter.storage.gate_up_bias: weights.gate_up_bias,
        adapter.storage.down_bias: weights.down_bias,
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            del routed._parameters[name]
            vars(routed)[name] = tensor
    return routed


# -- Copies -----------------------------------------------------------------------------------------------------------


def _reduced(case: _Case, device: torch.device) -> nn.Module:
    """The block in float64, with eager experts, and with few hidden units where that was asked for."""
    cut = _cuts(case) if case.few_units else {}
    draw = torch.Generator(device="cpu").manual_seed(0)

    def stand_in(tensor: Tensor) -> Tensor:
        own = cut[id(tensor)](tensor.detach()) if id(tensor) in cut else tensor.detach()
        if tensor.is_meta or (case.drawn and isinstance(tensor, nn.Parameter)):
            own = _drawn(own, draw).to(device)
        else:
            own = own.clone(memory_format=torch.contiguous_format)
        return _as(tensor, own.double() if own.is_floating_point() else own)

    block = with_tensors(case.block, stand_in)
    for module in block.modules():
        config: Any = vars(module).get("config")
        if hasattr(config, "_experts_implementation"):
            eager = copy.copy(config)
            eager._experts_implementation = "eager"
            vars(module)["config"] = eager
    return block


def _as(tensor: Tensor, own: Tensor) -> Tensor:
    own = own.detach()
    return nn.Parameter(own, requires_grad=own.is_floating_point()) if isinstance(tensor, nn.Parameter) else own


def _drawn(like: Tensor, draw: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    width = like.shape[-1] if like.dim() > 1 else 4
    return torch.randn(like.shape, generator=draw, dtype=torch.float64, device="cpu") / math.sqrt(width)


def _cuts(case: _Case) -> Mapping[int, Callable[[Tensor], Tensor]]:
    """How each of the experts' weights loses all but a few hidden units, as their storage says."""
    assert case.activation is not None
    storage, parts = case.adapter.storage, 2 if is_gated(case.activation) else 1
    units = slice(0, _UNITS)
    cut: dict[str, Callable[[Tensor], Tensor]] = {
        storage.gate_up: lambda stored: storage.own_gate_up(stored, parts=parts, units=units),
        storage.gate_up_bias: lambda stored: storage.own_gate_up(stored, parts=parts, units=units),
        "down_proj": lambda stored: storage.own_down(stored, units=units),
    }
    parameters = case.block.get_submodule(case.adapter.experts).named_parameters(recurse=False)
    return {id(parameter): cut[name] for name, parameter in parameters if name in cut}


# -- Runs -------------------------------------------------------------------------------------------------------------

_Run = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One way to call both, and what to call them with."""

    block: _Run
    folded: _Run
    x: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Trace:
    outputs: list[Tensor]
    gradients: list[Tensor | None] = field(default_factory=list)
    """Of the input, and of the leaves."""


def _rows(dim: int, device: torch.device) -> Tensor:
    """``[8, dim]``: row ``r`` is of magnitude ``r % 4``."""
    draw = torch.Generator(device="cpu").manual_seed(1)
    rows = torch.randn(_ROWS, dim, generator=draw, dtype=torch.float64, device="cpu")
    return (rows * _sizes(rows.device)[:, None]).to(device)


def _sizes(device: torch.device) -> Tensor:
    return torch.tensor(MAGNITUDES, dtype=torch.float64, device=device).repeat(_ROWS // len(MAGNITUDES))


def _calls(block: nn.Module, folded: nn.Module, dim: int, device: torch.device) -> Iterator[_Call]:
    rows = _rows(dim, device)
    for x in (rearrange(rows, "(batch length) dim -> batch length dim", batch=2), rows):
        yield _Call(block, folded, x)


def _call_of_experts(experts: nn.Module, routed: nn.Module, dim: int, device: torch.device) -> _Call:
    """For blocks that take more than hidden states: the experts alone."""
    number = cast(FoldedExperts, routed).num_experts
    ids = torch.stack([torch.arange(_ROWS), torch.arange(_ROWS) + 1], 1).to(device) % number
    weights = torch.linspace(0.1, 1, ids.numel(), dtype=torch.float64, device=device).view(ids.shape)
    return _Call(lambda x: experts(x, ids, weights), lambda x: routed(x, ids, weights), _rows(dim, device))


def _first_that_runs(calls: Iterable[_Call], leaves: Sequence[Tensor]) -> _Finding:
    difference, reasons = "", []
    for call in calls:
        try:
            wanted = _traced(call.block, call.x, leaves)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if not _says_something(wanted):
            return _Finding(reason="since its outputs are zero or not finite", says_nothing=True)
        try:
            found = _traced(call.folded, call.x, leaves)
        except Exception as error:
            difference = f"the folded block raised {type(error).__name__}: {error}"
            continue
        difference = _difference(wanted, found)
        if difference and _difference(wanted, _traced(call.block, call.x, leaves)):
            return _Finding(reason="since it draws random numbers in evaluation too")
        return _Finding(difference)
    if difference:
        return _Finding(difference)
    first = reasons[0] if reasons else "never called"
    return _Finding(reason=f"since it cannot be called with hidden states alone ({first})")


def _traced(run: _Run, x: Tensor, leaves: Sequence[Tensor]) -> _Trace:
    given = x.clone().requires_grad_()
    outputs = [each for each in _tensors(run(given)) if each.is_floating_point()]
    total = sum(((each.double() * _arriving(each)).sum() for each in outputs if each.requires_grad), x.new_zeros(()))
    if not total.requires_grad:
        return _Trace([each.detach() for each in outputs])
    gradients = torch.autograd.grad(total, [given, *leaves], allow_unused=True)
    return _Trace([each.detach() for each in outputs], list(gradients))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [each for part in value for each in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _arriving(output: Tensor) -> Tensor:
    """Larger for small rows, so that every size has its part in the gradients of the weights."""
    draw = torch.Generator(device="cpu").manual_seed(2)
    arriving = torch.randn(output.shape, generator=draw, dtype=torch.float64, device="cpu").to(output.device)
    if output.dim() > 1 and output.shape[:-1].numel() == _ROWS:
        arriving = arriving / _sizes(output.device).view(*output.shape[:-1], 1) ** 2
    return arriving


def _says_something(trace: _Trace) -> bool:
    return all(bool(each.isfinite().all()) for each in trace.outputs) and any(
        bool(each.any()) for each in trace.outputs
    )


def _difference(wanted: _Trace, found: _Trace) -> str:
    shapes = [[list(each.shape) for each in trace.outputs] for trace in (wanted, found)]
    if shapes[0] != shapes[1]:
        return f"the block returns tensors of shapes {shapes[0]} and its folded self {shapes[1]}."
    for want, got in zip(wanted.outputs, found.outputs, strict=True):
        for size, error in _errors(want, got):
            if not error <= _VALUES:
                return f"outputs differ by {error:.1e} of their size{size}."
    for place, (want_grad, got_grad) in enumerate(zip(wanted.gradients, found.gradients, strict=True)):
        if want_grad is None and got_grad is None:
            continue
        want_or_zero = torch.zeros_like(cast(Tensor, got_grad)) if want_grad is None else want_grad
        got_or_zero = torch.zeros_like(want_or_zero) if got_grad is None else got_grad
        for size, error in _errors(want_or_zero, got_or_zero):
            if not error <= _GRADIENTS:
                of = "the input" if place == 0 else f"a parameter of shape {list(want_or_zero.shape)}"
                return f"outputs are equal, and the gradient of {of} differs by {error:.1e} of its size{size}."
    return ""


def _errors(wanted: Tensor, found: Tensor) -> Iterator[tuple[str, float]]:
    """The relative difference; of each size of input where rows are those of the input."""
    if wanted.dim() > 1 and wanted.shape[:-1].numel() == _ROWS:
        for place, magnitude in enumerate(MAGNITUDES):
            rows = slice(place, None, len(MAGNITUDES))
            parts = (each.reshape(_ROWS, -1)[rows].double() for each in (wanted, found))
            yield f" at inputs of about {magnitude:g}", _relative(*parts)
    else:
        yield "", _relative(wanted.double(), found.double())


def _relative(wanted: Tensor, found: Tensor) -> float:
    apart, size = float((wanted - found).norm()), float(wanted.norm())
    return 0.0 if apart < 1e-30 else apart / max(size, 1e-30)


def _in_training(experts: nn.Module, calls: Sequence[_Call]) -> str:
    """What the experts do otherwise in training, told by calling them once more as the block did."""
    seen: list[tuple[Any, Any, Any]] = []
    handle = experts.register_forward_hook(
        lambda _, given, named, out: seen.append((given, named, out)), with_kwargs=True
    )
    for call in calls:
        if not seen:
            with torch.no_grad(), suppress(Exception):  # a way to call it that is not its own
                call.block(call.x)
    handle.remove()
    if not seen:
        return ""
    given, named, before = seen[0]
    with torch.no_grad():
        again = experts.train()(*given, **named)
    apart = [_relative(*pair) for pair in zip(_tensors(before), _tensors(again), strict=False)]
    return "its experts give something else in training, as dropout does." if max(apart, default=0.0) > _VALUES else ""


# -- Kinds ------------------------------------------------------------------------------------------------------------


def kind_of(block: nn.Module, adapter: MoEAdapter) -> Hashable:
    """Equal for blocks of the same code, attributes and shapes: one of them stands for all."""
    parts = []
    for name, module in block.named_modules():
        own = [
            (key, _plain(value))
            for key, value in sorted(vars(module).items())
            if not key.startswith(("layer", "_parameters", "_buffers", "_modules"))
        ]
        tensors = [(key, tuple(each.shape), each.dtype) for key, each in module._parameters.items() if each is not None]
        tensors += [(key, tuple(each.shape), each.dtype) for key, each in module._buffers.items() if each is not None]
        parts.append((name, type(module), tuple(own), tuple(tensors)))
    return id(adapter), tuple(parts)


def _plain(value: object) -> Hashable:
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype)):
        return value
    if isinstance(value, MethodType):
        return id(value.__func__)
    if isinstance(value, (FunctionType, type)) or (callable(value) and not isinstance(value, nn.Module)):
        return id(value)
    if isinstance(value, (tuple, list, set, frozenset, dict)):
        return repr(value) if len(value) < 100 else len(value)
    return cast(Hashable, type(value))
