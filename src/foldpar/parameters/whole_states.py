"""``load_state_dict`` of a whole model's tensors into a rank's shares of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foldpar.comm import FoldedGroups, is_dtensor, local_tensor, own_part, placed_like
from foldpar.parameters.boxes import Share
from foldpar.parameters.placements import parameter_placements

__all__ = ["take_shares_on_load"]


def take_shares_on_load(model: nn.Module, groups: FoldedGroups) -> None:
    """Let ``model.load_state_dict`` take whole tensors, of which each rank keeps its share; repeating it does nothing.

    So does ``load_state_dict`` of any module inside, for its DTensors. What is no whole tensor, such as the DTensors of
    the model's own ``state_dict``, is loaded as torch loads it.
    """
    if not any(isinstance(hook, _TakeShares) for hook in _hooks(model)):
        model.register_load_state_dict_pre_hook(_TakeShares(groups))
    for module in model.modules():
        if any(map(is_dtensor, module.parameters(recurse=False))) and _take_parts not in _hooks(module):
            module.register_load_state_dict_pre_hook(_take_parts)


def _hooks(model: nn.Module) -> list[Any]:
    return [getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()]


def _take_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of a module's own DTensors, where no module around it has done so."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        whole = state_dict.get(prefix + name)
        if not is_dtensor(parameter) or not isinstance(whole, Tensor) or is_dtensor(whole):
            continue
        if whole.shape == parameter.shape:  # else torch says so
            state_dict[prefix + name] = placed_like(own_part(whole.detach(), parameter), parameter)


class _TakeShares:
    def __init__(self, groups: FoldedGroups) -> None:
        self.groups = groups

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        given = {key for key, value in state_dict.items() if isinstance(value, Tensor) and not is_dtensor(value)}
        if not any(key.startswith(prefix) for key in given):
            return
        for placement in parameter_placements(module, self.groups):
            parameter, share = placement.parameter, placement.share
            for name in (placement.name, *placement.aliases):
                if prefix + name not in given or (share.is_whole and not is_dtensor(parameter)):
                    continue
                whole: Tensor = state_dict[prefix + name]
                if tuple(whole.shape) != share.shape:
                    continue  # torch says so
                own = _own(whole, share).view(local_tensor(parameter).shape)
                state_dict[prefix + name] = placed_like(own, parameter) if is_dtensor(parameter) else own


def _own(whole: Tensor, share: Share) -> Tensor:
    own = whole.detach().new_empty(share.local)
    for box in share.boxes:
        here = tuple(slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))
        there = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
        own[here].copy_(whole[there])
    return own
