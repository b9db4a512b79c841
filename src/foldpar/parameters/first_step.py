"""When checks run: in the first step, in every one, or never."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from foldpar.comm import FoldedGroups, local_tensor
from foldpar.parameters.checks import check_replicas_of_stage, compare_settings, parameter_settings

__all__ = ["When", "can_compare", "check_before_reduction", "compare_in_stage"]

_REDUCTIONS = "first reductions"


class When:
    """When the checks of one module run: always (``True``), never (``False``), or once for each occasion (``None``).

    Nothing runs, and no occasion is used up, where there are no values to compare (the meta device, fake tensors) or
    the host may not wait for them (while a CUDA graph is captured).
    """

    def __init__(self, check: bool | None) -> None:
        if check not in (None, True, False):
            raise TypeError(f"check is {check!r}; choose None (the first step), True (every step) or False (never).")
        self.check = check
        self._done: set[str] = set()

    def due(self, occasion: str, tensor: Tensor) -> bool:
        """Whether to check now."""
        return self.is_open(occasion) and can_compare(tensor)

    def is_open(self, occasion: str) -> bool:
        """Whether it has not run yet, or always runs."""
        return self.check is True or (self.check is None and occasion not in self._done)

    def done(self, occasion: str) -> None:
        """It ran, and found nothing."""
        self._done.add(occasion)


def can_compare(tensor: Tensor) -> bool:
    """Whether the host may look at the values of a tensor here and now."""
    tensor = local_tensor(tensor)
    if tensor.is_meta or isinstance(tensor, FakeTensor) or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_before_reduction(
    model: nn.Module, groups: FoldedGroups, check: bool | None, settings: Mapping[str, str]
) -> None:
    """Compare the replicas of a model's parameters before its first reduction, or before every one.

    Before them what the reduction needs to be alike: which parameters there are, their dtypes, which are frozen, and
    its settings.

    Raises:
        ReplicaError: on every rank of the stage, see :func:`foldpar.check_replicas`.
    """
    asked = When(check)
    if groups.layout.stage_size == 1:
        return
    whens: WeakKeyDictionary[nn.Module, When] = groups.kept.setdefault(_REDUCTIONS, WeakKeyDictionary())
    when = whens.setdefault(model, asked) if check is None else asked
    parameter = next(model.parameters(), None)
    if parameter is not None and when.due("reduction", parameter):
        compare_in_stage(model, groups, settings)
        check_replicas_of_stage(model, groups)
        when.done("reduction")


def compare_in_stage(model: nn.Module, groups: FoldedGroups, settings: Mapping[str, str]) -> None:
    """Compare what the ranks of a stage must have alike before they gather or reduce parameters; call it on all.

    Raises:
        ReplicaError: on every rank of the stage; names what differs and the ranks.
    """
    of_parameters = parameter_settings(model.named_parameters())
    met = [group for group in (groups.tp, groups.dp_cp) if group.size > 1]
    compare_settings("what is to be reduced", {**settings, **of_parameters}, met, groups.device)
