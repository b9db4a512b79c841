"""Whether the gradients of this step are complete: told by the gradients themselves.

    backward -> .grad (a part of the sum) -> reduce_gradients -> .grad (the gradient, stamped) -> clip -> optimizer.step

A stamp stays on a gradient while it is scaled in place; the next backward, after ``zero_grad``, makes a new one. Where
a gradient stays a tensor, a hook on the parameter tells the stamp what backwards add to it: it is incomplete then, and
a sum of two steps if nobody zeroed it before. An optimizer's step uses the stamp up: whatever changes it later, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from foldpar.arguments import expect
from foldpar.comm import (
    FoldedGroups,
    Kept,
    communication_device,
    is_dtensor,
    local_tensor,
    refuse_foreign_scalers,
    version_of,
    versions_of,
)
from foldpar.errors import GradientError, ModelError
from foldpar.parameters.fsdp import bring_back_shards
from foldpar.parameters.marks import is_cut_over_tp, nearest_marks

__all__ = [
    "declare_reduced",
    "mark_replaced",
    "refuse_gradient_hooks",
    "refuse_reduced",
    "refuse_unreduced_gradients",
    "stamp",
    "watch_optimizers",
]

_STAMP = "_foldpar_reduced"
_REPLACED = "_foldpar_replaced"


@dataclass(slots=True)
class _Additions:
    """What backwards have added since to gradients in one memory, which count their changes together: up to here."""

    version: int
    count: int = 0
    onto_reduced: bool = True
    """Whether nothing else has changed them before the last of these, as zeroing does."""


@dataclass(slots=True)
class _Stamp:
    """What is known of a complete gradient: its version then, and whether an optimizer has taken it.

    ``own`` is what a DTensor counted itself up to the last addition.
    """

    version: int
    used: bool
    own: int
    additions: _Additions


def stamp(parameters: Iterable[nn.Parameter], *, used: bool = False) -> None:
    """Say of the gradients as they are now that they are complete."""
    in_memory: dict[int, _Additions] = {}
    on_host = []
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            part = local_tensor(gradient)
            # FSDP2 leaves the gradients of a unit as views of one memory.
            place = part.untyped_storage().data_ptr() if part._is_view() else id(gradient)
            own, version = versions_of(gradient)
            additions = in_memory.setdefault(place, _Additions(version))
            setattr(gradient, _STAMP, _Stamp(own + version, used, own, additions))
            if communication_device(parameter) != parameter.device:
                on_host.append(parameter)
            else:
                _watch(parameter)
    if on_host:  # FSDP2 waits for the copy of each gradient that has a hook, so one stands for all
        _watch(min(on_host, key=lambda each: each.numel()))


def _watch(parameter: nn.Parameter) -> None:
    if parameter.requires_grad and not _is_watched(parameter):
        parameter.register_post_accumulate_grad_hook(_count_addition)


def _count_addition(parameter: Tensor) -> None:
    """The hook on parameters whose gradients were complete once; a new gradient has no stamp."""
    known: _Stamp | None = getattr(parameter.grad, _STAMP, None)
    if known is not None and parameter.grad is not None:
        additions, (own, version) = known.additions, versions_of(parameter.grad)
        additions.onto_reduced &= own - known.own + version - additions.version == 1
        additions.count += 1
        known.own, additions.version = own, version


def _is_watched(parameter: Tensor) -> bool:
    hooks: dict[int, object] | None = parameter._post_accumulate_grad_hooks
    return hooks is not None and _count_addition in hooks.values()


def declare_reduced(model: nn.Module) -> None:
    """Say that the gradients of this step are complete, in a loop that reduces them without ``reduce_gradients``.

    :func:`foldpar.clip_grad_norm_` and optimizers refuse gradients of which nobody has said so. Call it on every step,
    after your own reduction. Nothing is communicated or changed.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> declare_reduced(model)   # behind an all-reduce of your own
    """
    expect("declare_reduced", model=(model, nn.Module))
    stamp(model.parameters())


def refuse_reduced(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise if a gradient was reduced already, and nothing has changed it since, or something was added to it; or if
    that cannot be told.

    Raises:
        GradientError: names it.
    """
    given = [(name, gradient) for name, parameter in parameters if (gradient := parameter.grad) is not None]
    for name, gradient in given:
        if gradient.requires_grad:
            raise GradientError(
                f"The gradient of {name} carries a graph, as backward(create_graph=True) leaves it, which puts a new "
                f"sum into .grad: whether one of its parts was reduced already cannot be told. Use plain backward() "
                f"for the step, and torch.autograd.grad(..., create_graph=True) for what is differentiated."
            )
    known = [(name, gradient) for name, gradient in given if _is_known(gradient)]
    for name, gradient in known:
        if _is_unchanged(gradient):
            raise GradientError(
                f"The gradient of {name} was reduced already, and no backward has run since: a second reduction would "
                f"sum it over its replicas again. Reduce once a step, after its last backward, and call zero_grad "
                f"before the next step."
            )
    if (grown := _added_to(known)) is not None:
        raise GradientError(
            f"The gradient of {grown} was reduced already, and something was added to it since: a second reduction "
            f"would sum the first part over its replicas again. Call zero_grad before the first backward of a step, "
            f"and reduce once, after its last. Gradients that you compute yourself go into .grad as new tensors, and "
            f"what is done to .grad.data, such as zero_(), is not seen: do it to .grad. Nor does torch say that "
            f"DTensors are zeroed by torch._foreach_zero_, as zero_grad(set_to_none=False) of an optimizer with "
            f"foreach=True or fused=True does: use zero_grad()."
        )


def refuse_unreduced_gradients(parameters: Iterable[tuple[str, nn.Parameter]], doing: str) -> None:
    """Raise if a gradient was never reduced.

    Raises:
        GradientError: names it.
    """
    for name, parameter in parameters:
        if _is_unreduced(parameter):
            raise GradientError(
                f"{doing}: the gradient of {name} is not reduced: it is this rank's part of a sum, or that of its own "
                f"batch. Call foldpar.reduce_gradients(model, groups) after the last backward of every step and before "
                f"clipping and optimizer.step(), also after shard_model; and after whatever puts new tensors into "
                f".grad. A loop that reduces gradients by itself says so: foldpar.declare_reduced(model)."
            )


def refuse_gradient_hooks(parameters: Iterable[tuple[str, nn.Parameter]], doing: str) -> None:
    """Raise if somebody waits for the gradient of a parameter in whose place another one is put.

    Raises:
        ModelError: names it.
    """
    for name, parameter in parameters:
        if parameter._backward_hooks or len(parameter._post_accumulate_grad_hooks or ()) > _is_watched(parameter):
            raise ModelError(
                f"{name} has a hook on its gradient (register_hook or register_post_accumulate_grad_hook). {doing} "
                f"puts another parameter in its place, and nothing would call the hook again. Register it afterwards, "
                f"on the parameter that the model has then (of a sharded one, register_post_accumulate_grad_hook)."
            )


def mark_replaced(before: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Remember of parameters that are no longer the model's that an optimizer which has them trains nothing."""
    now = {id(parameter) for parameter in model.parameters()}
    for parameter in before:
        if id(parameter) not in now:
            setattr(parameter, _REPLACED, True)


def watch_optimizers(groups: FoldedGroups, model: nn.Module) -> None:
    """Look at every optimizer before it steps, for as long as the groups live, and refuse torch's gradient scalers.

    Args:
        model: whose parameters, those that enter it later included, must have been reduced when an optimizer takes
            them. A model that nobody names, with hand-built layers in it, is known by the experts of those layers.

    Raises:
        GradientError: in ``step``: it holds parameters that folding or sharding replaced, or gradients that were not
            reduced; or it is Muon, and holds a lane's part of a matrix as a plain tensor.
    """
    groups.keep(_Watch).models.add(model)


class _Watch(Kept):
    """The hooks on all optimizers, and the models that they know."""

    def __init__(self, groups: FoldedGroups) -> None:
        are_several = groups.layout.world > 1
        if are_several:
            refuse_foreign_scalers()
        self.models: WeakSet[nn.Module] = WeakSet()
        self._are_several, self._lanes = are_several, groups.layout.tp
        self._watched: WeakKeyDictionary[torch.optim.Optimizer, tuple[tuple[int, int], set[nn.Parameter]]] = (
            WeakKeyDictionary()
        )
        self._hooks = [register_optimizer_step_pre_hook(self._before_step)]
        if are_several:
            self._hooks.append(register_optimizer_step_post_hook(self._after_step))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        for parameter in _parameters(optimizer):
            if hasattr(parameter, _REPLACED):
                raise GradientError(
                    f"This {type(optimizer).__name__} holds a parameter of shape {list(parameter.shape)} that "
                    f"fold_model, shard_model or loading into a model on the meta device has replaced, so that it "
                    f"trains nothing while the loss may still fall. Make the optimizer after them, from "
                    f"foldpar.parameter_groups(model)."
                )
        if not self._are_several:
            return None
        self._refuse_unreduced(optimizer)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._checked(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._checked(optimizer, args[1]), *args[2:]), kwargs
        return None

    def _refuse_unreduced(self, optimizer: torch.optim.Optimizer) -> None:
        ours = self._of_models(optimizer)
        for parameter in _parameters(optimizer):
            if _is_unreduced(parameter) and (_is_known(parameter.grad) or parameter in ours):
                refuse_unreduced_gradients([(self._name(parameter), parameter)], f"{type(optimizer).__name__}.step()")

    def _checked(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure computes the gradients that are taken, so they are looked at behind it too."""

        def compute() -> Any:
            loss = closure()
            self._refuse_unreduced(optimizer)
            return loss

        return compute

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        stamp((each for each in _parameters(optimizer) if each.grad is not None and _is_known(each.grad)), used=True)

    def _of_models(self, optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
        """Those of its parameters that are a watched model's; looked up when the optimizer or the models change."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        state = (count, len(self.models))
        if self._watched.get(optimizer, (None, set()))[0] != state:
            for model in self.models:
                bring_back_shards(model)
            ours = {parameter for model in self.models for parameter in model.parameters()}
            found = {each for each in _parameters(optimizer) if each in ours or _is_expert(each)}
            if self._lanes > 1 and type(optimizer).__name__ == "Muon":
                self._refuse_parts(found)
            self._watched[optimizer] = state, found
        return self._watched[optimizer][1]

    def _refuse_parts(self, parameters: set[nn.Parameter]) -> None:
        """Muon makes a matrix orthogonal: a DTensor as a whole, and a lane's part that is a plain tensor by itself."""
        for model in self.models:
            for name, parameter, family, _ in nearest_marks(model):
                is_part = family is not None and "tp" in family.shard_axes and not is_cut_over_tp(parameter)
                if is_part and parameter in parameters:
                    raise GradientError(
                        f"Muon works on whole matrices, and {name} is this lane's part of one, as a plain tensor, "
                        f"whose orthogonal step is not the part of the whole one's. Give it to another optimizer, such "
                        f"as AdamW; adapters put on before fold_model are whole on every lane."
                    )

    def _name(self, parameter: nn.Parameter) -> str:
        """In the largest model that has it."""
        names = (name for model in self.models for name, each in model.named_parameters() if each is parameter)
        return max(names, key=len, default="an expert")


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _is_expert(parameter: Tensor) -> bool:
    """Whether it lies on the mesh of the experts: a model's that was copied, for example."""
    if not is_dtensor(parameter):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return "ep" in names and "etp" in names


def _is_known(gradient: Tensor | None) -> bool:
    """Whether it is a folded model's: it was complete once."""
    return hasattr(gradient, _STAMP)


def _is_unchanged(gradient: Tensor) -> bool:
    """Whether it was complete, and nothing has changed it since."""
    return _is_known(gradient) and _stamp_of(gradient).version == version_of(gradient)


def _stamp_of(gradient: Tensor) -> _Stamp:
    known: _Stamp = getattr(gradient, _STAMP)
    return known


def _added_to(gradients: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of one, of those that were complete once, that was added to since; ``None`` if there is none.

    By backwards, with no zeroing before; or by hand, which is one change where zeroing and adding are two. What was
    zeroed at the end is zero. Gradients in one memory count their changes together.
    """
    in_memory: dict[int, list[tuple[str, Tensor]]] = {}
    for name, gradient in gradients:
        in_memory.setdefault(id(_stamp_of(gradient).additions), []).append((name, gradient))
    for together in in_memory.values():
        additions = _stamp_of(together[0][1]).additions
        since = [version_of(each) - _stamp_of(each).version for _, each in together]
        is_suspect = additions.onto_reduced if additions.count else all(each == len(together) for each in since)
        up_to = (_stamp_of(each).own + additions.version - version_of(each) for _, each in together)
        is_sum = additions.count > 0 and not any(up_to)  # nothing has changed it behind the last backward
        if is_suspect and (is_sum or _all_hold_something(each for _, each in together)):
            return together[0][0]
    return None


def _all_hold_something(gradients: Iterable[Tensor]) -> bool:
    """Whether each has an entry that is not zero, where it has entries here; looked up on the host."""
    parts = [part for gradient in gradients if (part := local_tensor(gradient)).numel()]
    return bool(parts) and all(torch.stack([part.any() for part in parts]).tolist())


def _is_unreduced(parameter: Tensor) -> bool:
    """Whether nobody has said that its gradient is complete, or it was zeroed and added to since, or an optimizer has
    taken it and it was changed since. A penalty on weights may be added to a reduced gradient.

    One that was frozen since is in no reduction: what ``zero_grad`` left of its gradient is complete.
    """
    gradient = parameter.grad
    known: _Stamp | None = getattr(gradient, _STAMP, None)
    if gradient is None or known is None:
        return gradient is not None
    is_new_sum = known.additions.count > 0 and not known.additions.onto_reduced
    is_changed = is_new_sum or (known.used and known.version != version_of(gradient))
    return is_changed and (parameter.requires_grad or _all_hold_something([gradient]))
