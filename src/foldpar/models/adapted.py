"""Adapters of other libraries on a folded model: what they put around its modules is made to fit, or refused.

An adapter is told by its ``base_layer``, as peft's layers have one. Its weights have the shapes they were made with: a
layer adapted before folding got whole ones, and beside a DTensor peft makes the lane's part. What a rank computes with
them is its own part:

    what is wrapped                      the adapter beside it                   its families
    ---------------                      ---------------------                   ------------
    a layer whole on every lane          as it is                                that of the layer
    columns, or one head of few          x -> A -> copy_to_group -> own rows     A REPLICATED, B partial or sharded
    rows                                 own columns of A -> all_reduce -> B     A partial or sharded, B REPLICATED
    routed experts (target_parameters)   this rank's experts and hidden units    REPLICATED_PARTIAL

Partial (``REPLICATED_PARTIAL``) is a whole weight of which a lane uses a part. A part itself is ``DENSE_SHARDED``; its
place is known, and ``state_dict`` shows it as a DTensor.

Nothing here imports peft; its layers bring what is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from foldpar.comm import FoldedGroups, is_dtensor, local_tensor, own_part
from foldpar.errors import ModelError
from foldpar.families import REPLICATED, REPLICATED_PARTIAL, ParameterFamily
from foldpar.models.tensor_parallel import LaneCut, lane_cut
from foldpar.moe import ExpertShare
from foldpar.parameters import mark_of, mark_parameters, resolve_parameters, sharded_module, when_greeted

__all__ = ["adapters_aside", "welcome_adapters"]

_FITTED = "_foldpar_fitted"


@contextmanager
def adapters_aside(model: nn.Module) -> Iterator[None]:
    """Within it the model is without the adapters around its modules; then they are around what is there instead."""
    taken: list[tuple[str, str, nn.Module]] = []

    def take(name: str, parent: nn.Module) -> None:
        for key, child in list(parent.named_children()):
            path = f"{name}.{key}" if name else key
            if _is_adapter(child):
                taken.append((name, key, child))
                parent._modules[key] = _inside(child)
            elif hasattr(child, "original_module") and hasattr(child, "modules_to_save"):
                raise ModelError(
                    f"{path} is a copy of a module that is trained beside the original (modules_to_save). Folding "
                    f"would cut one of the two. Fold first: fold_model(model, groups), then get_peft_model(model, ...)."
                )
            else:
                take(path, child)

    try:
        take("", model)
        yield
    finally:
        for name, key, adapter in taken:
            parent = model.get_submodule(name)
            _innermost(adapter)._modules["base_layer"] = parent._modules[key]
            parent._modules[key] = adapter


def welcome_adapters(model: nn.Module, groups: FoldedGroups) -> None:
    """From now on look at what has come into a folded model, before every forward and whenever families are asked for.

    In the first forward with gradients since something came, every trainable parameter must have a family, so that what
    nobody knows is refused before it takes part in anything.
    """
    when_greeted(model, partial(_fit_all, groups=groups))
    model.register_forward_pre_hook(_Doorman(groups))


class _Doorman:
    """Before every forward: whether other modules are here than the last time."""

    def __init__(self, groups: FoldedGroups) -> None:
        self.groups = groups
        self.places = list[dict[str, nn.Module | None]]()
        self.seen = list[nn.Module | None]()
        self.all_have_families = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Doorman, (self.groups,)  # of a copy of the model nothing has been seen yet

    def __call__(self, model: nn.Module, arguments: object) -> None:
        if torch.compiler.is_compiling():
            return
        if not self.places or self.places[0] is not model._modules or _children(self.places) != self.seen:
            _fit_all(model, self.groups)
            self.places = [module._modules for module in model.modules()]
            self.seen, self.all_have_families = _children(self.places), False
        if torch.is_grad_enabled() and not self.all_have_families:
            if sharded_module(model) is None:  # shard_model asks for all families
                resolve_parameters(model, self.groups)
            self.all_have_families = True


def _children(places: list[dict[str, nn.Module | None]]) -> list[nn.Module | None]:
    """All that stands in these places, without a loop in Python: every forward waits for it."""
    return list(chain.from_iterable(map(dict.values, places)))


# ---------------------------------------------------------------------------------------------------------------------
# One adapter.


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def _innermost(adapter: nn.Module) -> nn.Module:
    """Of adapters around adapters, the one around the module itself."""
    while _is_adapter(inner := cast(nn.Module, adapter.base_layer)):
        adapter = inner
    return adapter


def _inside(adapter: nn.Module) -> nn.Module:
    """The module that adapters are around."""
    return cast(nn.Module, _innermost(adapter).base_layer)


def _fit_all(model: nn.Module, groups: FoldedGroups) -> None:
    for name, module in list(model.named_modules()):
        if _is_adapter(module):
            _fit(name, cast(Any, module))


def _fit(name: str, adapter: Any) -> None:
    """Make one adapter fit what it is around; what fits already stays as it is."""
    base, pairs = _inside(adapter), _pairs(adapter)
    state, fitted = (id(base), tuple(pairs)), getattr(adapter, _FITTED, None)
    if fitted == state:
        return
    if (fitted is None or set(pairs) - set(fitted[1])) and not isinstance(base, ExpertShare):
        _refuse_sharded(name, base)
    parameter_name, cut = getattr(adapter, "parameter_name", None), lane_cut(base)
    if isinstance(base, ExpertShare):
        _fit_experts(name, adapter, base, parameter_name)
    elif parameter_name is not None:
        _fit_parameter(name, adapter, base, parameter_name)
    elif cut is not None:
        _fit_cut(name, adapter, cut, pairs)
    else:
        mark_parameters(adapter, _family_around(name, base))
    if pairs and not _variants(adapter):
        adapter.merge, adapter.unmerge = partial(_merge, adapter), partial(_unmerge, adapter)
    setattr(adapter, _FITTED, state)


def _refuse_sharded(name: str, base: nn.Module) -> None:
    record = sharded_module(base)
    if record is not None and record.names:
        raise ModelError(
            f"{name} is an adapter that came after shard_model, around a {type(base).__name__} of which this rank "
            f"holds a shard, so the library made it for the shard's size. Adapt first, then shard: "
            f"get_peft_model(model, ...), then shard_model(model, groups, stage={record.stage})."
        )


def _pairs(adapter: Any) -> dict[str, tuple[Any, Any]]:
    """LoRA's two layers, or an embedding's two tensors, by the name of the adapter."""
    found: dict[str, tuple[Any, Any]] = {}
    for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        firsts, seconds = getattr(adapter, first, {}), getattr(adapter, second, {})
        found |= {key: (firsts[key], seconds[key]) for key in firsts if key in seconds}
    return found


def _variants(adapter: Any) -> list[str]:
    """The names of adapters that are more than LoRA: DoRA and others."""
    return list(getattr(adapter, "lora_variant", {}))


def _family_around(name: str, base: nn.Module) -> ParameterFamily:
    """What is beside a whole layer sees the rows and the gradients that the layer sees."""
    found = {mark_of(base, own) or REPLICATED for own, _ in base.named_parameters(recurse=False)} or {REPLICATED}
    if len(found) > 1:
        raise ModelError(
            f"{name} is around a {type(base).__name__} whose own parameters have the families "
            f"{', '.join(sorted(family.name for family in found))}, so that of the adapter cannot be told. Adapt the "
            f"parts of it, or mark each of the adapter's parameters: mark_parameters(parameter, families.REPLICATED)."
        )
    return found.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Beside layers that are cut over the lanes.


def _fit_cut(name: str, adapter: Any, cut: LaneCut, pairs: dict[str, tuple[Any, Any]]) -> None:
    tp = cut.tp.size
    if variants := _variants(adapter):
        raise ModelError(
            f"{name} has the adapter {variants[0]!r}, a variant of LoRA (such as DoRA) that computes with the whole "
            f"weight, and every lane has a part of it (tp = {tp}). Use plain LoRA or rsLoRA there (use_dora=False), "
            f"choose layers that stay whole, or a layout with tp = 1."
        )
    known = all(isinstance(each, (nn.Linear, nn.Parameter)) for pair in pairs.values() for each in pair)
    if not pairs or not known or not (cut.is_inside or all(isinstance(pair[0], nn.Linear) for pair in pairs.values())):
        raise ModelError(
            f"{name} is a {type(adapter).__module__}.{type(adapter).__qualname__} around a layer of which every lane "
            f"has a part (tp = {tp}). What it computes is not known here, and its gradients could be wrong without a "
            f"word. Known there are LoRA and rsLoRA of peft. Use one of them, choose layers that stay whole or a "
            f"layout with tp = 1, or merge the adapter before fold_model."
        )
    mark_parameters(adapter, REPLICATED)
    for first, second in pairs.values():
        if type(first) is nn.Linear and type(second) is nn.Linear:  # not fitted yet
            cut.fit_pair(first, second)


def _fit_parameter(name: str, adapter: Any, base: nn.Module, parameter_name: str) -> None:
    """Around a module that is no layer, such as a router: the library changes the weight while the module runs."""
    if lane_cut(base) is not None or is_dtensor(getattr(base, parameter_name)):
        raise ModelError(
            f"{name} adapts {parameter_name} of a {type(base).__name__} as a parameter (target_parameters), and every "
            f"lane has a part of it. Name linear layers in target_modules instead, or choose a layout with tp = 1."
        )
    mark_parameters(adapter, mark_of(base, parameter_name) or REPLICATED)


# ---------------------------------------------------------------------------------------------------------------------
# Around routed experts.


def _fit_experts(name: str, adapter: Any, experts: ExpertShare, parameter_name: str | None) -> None:
    weights = ("gate_up_proj", "down_proj")
    if parameter_name not in weights or not all(hasattr(adapter, each) for each in ("get_delta_factors", "lora_A")):
        what = "" if parameter_name is None else f" for {parameter_name}"
        raise ModelError(
            f"{name} is a {type(adapter).__module__}.{type(adapter).__qualname__}{what} around routed experts. Their "
            f"rows come from other ranks, and each rank has some of the experts only, so what it computes would be "
            f"wrong without a word. Known there is LoRA of peft 0.21 or newer on the experts' weights: "
            f"LoraConfig(target_parameters=['experts.gate_up_proj', 'experts.down_proj'])."
        )
    mark_parameters(adapter, REPLICATED_PARTIAL)
    adapter._activate_lora = partial(_changing, adapter, experts)


@contextmanager
def _changing(adapter: Any, experts: ExpertShare, active: Sequence[str]) -> Iterator[None]:
    """In place of what peft does, which needs the whole weight as a plain tensor."""
    with ExitStack() as stack:
        for key in active:
            if key in adapter.lora_A:
                stack.enter_context(
                    experts.changing(adapter.parameter_name, partial(_with_product, adapter, experts, key))
                )
        yield


def _with_product(adapter: Any, experts: ExpertShare, key: str, share: Tensor) -> Tensor:
    left, right, scaling = adapter.get_delta_factors(key)
    left, right = experts.share_of_product(adapter.parameter_name, left, right)
    with torch.autocast(share.device.type, enabled=False):
        return torch.baddbmm(share, left.to(share.dtype), right.to(share.dtype), alpha=scaling)


# ---------------------------------------------------------------------------------------------------------------------
# Into the weights, and out of them again.


def _merge(adapter: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """As the adapter's own ``merge``, into what this rank has of the weight; call it on every rank."""
    parameter = _adapted_weight(adapter)
    if not is_dtensor(parameter):
        type(adapter).merge(adapter, safe_merge=safe_merge, adapter_names=adapter_names)
        return
    wanted = adapter.active_adapters if adapter_names is None else adapter_names
    for key in [key for key in wanted if key in _pairs(adapter) and key not in adapter.merged_adapters]:
        _add(adapter, key, 1, check=safe_merge)
        adapter.merged_adapters.append(key)


def _unmerge(adapter: Any) -> None:
    if not is_dtensor(_adapted_weight(adapter)):
        type(adapter).unmerge(adapter)
        return
    while adapter.merged_adapters:
        _add(adapter, adapter.merged_adapters.pop(), -1)


def _adapted_weight(adapter: Any) -> nn.Parameter:
    weight: nn.Parameter = getattr(_inside(adapter), getattr(adapter, "parameter_name", "weight"))
    return weight


@torch.no_grad()
def _add(adapter: Any, key: str, sign: int, *, check: bool = False) -> None:
    base: Any = _inside(adapter)
    weight, scaling, pair = _adapted_weight(adapter), sign * adapter.scaling[key], _pairs(adapter)[key]
    first, second = (_whole(each if isinstance(each, Tensor) else each.weight) for each in pair)
    if check and not all(bool(each.isfinite().all()) for each in (first, second)):
        raise ValueError(f"The adapter {key!r} holds values that are not finite, so nothing was merged.")
    own = local_tensor(weight)
    if isinstance(base, ExpertShare):
        own.add_(_expert_product(adapter, base, first, second, weight).view_as(own), alpha=scaling)
        return
    product = (second @ first).T if isinstance(base, nn.Embedding) else second @ first
    cut = () if product.shape == weight.shape else ("tp",)  # of lane parts
    own.add_(own_part(product, weight, cut_already=cut), alpha=scaling)
    bias = getattr(pair[1], "bias", None)
    if bias is not None:
        bias = _whole(bias)
        cut = () if bias.shape == base.bias.shape else ("tp",)
        local_tensor(base.bias).add_(own_part(bias, base.bias, cut_already=cut), alpha=scaling)


def _expert_product(adapter: Any, experts: ExpertShare, first: Tensor, second: Tensor, weight: nn.Parameter) -> Tensor:
    """This rank's share of the change to all experts, without the scaling."""
    rank = first.shape[0] // experts.num_experts
    inputs = first.unflatten(0, (-1, rank))  # [experts, rank, in]
    outputs = second.unflatten(1, (rank, -1)).permute(2, 0, 1)  # [experts, out, rank]
    left, right = (inputs.mT, outputs.mT) if experts.is_transposed else (outputs, inputs)
    left, right = experts.share_of_product(adapter.parameter_name, left, right)
    cut = ("ep", "etp")
    return own_part(left, weight, cut_already=cut) @ own_part(right, weight, cut_already=cut)


def _whole(tensor: Tensor) -> Tensor:
    """All of it, gathered over data ranks where ``shard_model`` has sharded it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
