"""Whether the copies of parameters on several ranks are equal, and parameters such that they can be reduced at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from foldpar.arguments import expect
from foldpar.comm import (
    AxisGroup,
    FoldedGroups,
    Kept,
    When,
    all_gather,
    all_reduce_,
    checksum,
    compare_settings,
    digest,
    is_dtensor,
)
from foldpar.errors import ReplicaError
from foldpar.layout import Axis
from foldpar.parameters.marks import resolve_parameters
from foldpar.wording import below, some_ranks

__all__ = ["check_before_reduction", "check_replicas", "compare_in_stage", "parameter_settings"]

_REPLICA_AXES: tuple[Axis, ...] = ("tp", "dp_cp", "etp", "edp")


def check_replicas(model: nn.Module, groups: FoldedGroups) -> None:
    """Raise if a parameter differs, in any bit, between ranks that hold replicas of it. Call it on every rank.

    Replicas start equal and get equal gradients, so they stay equal. They drift apart when a gradient is reduced by
    the wrong family, a rank skips a step, or ranks start from different seeds; losses show that late or never. The
    cost is one pass over the parameters, a few small collectives and two host synchronisations, so once in some
    hundred steps is cheap. NaN equals NaN of the same bits; of a DTensor the local parts are compared.

    Example of an error::

        1 parameter differs between replicas:
            router.weight over tp: ranks 1, 3 differ from the first rank of their group

    Raises:
        ReplicaError: on every rank of the world; names the parameters, the axis and the global ranks that differ from
            the first member of their group. FamilyError: see :func:`~foldpar.parameter_families`.
    """
    expect("check_replicas", model=(model, nn.Module), groups=(groups, FoldedGroups))
    _compare_replicas(model, groups, across_stages=True)


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
    when = groups.keep(_FirstReductions).of.setdefault(model, asked) if check is None else asked
    parameter = next(model.parameters(), None)
    if parameter is not None and when.due("reduction", parameter):
        compare_in_stage(model, groups, settings)
        _compare_replicas(model, groups, across_stages=False)
        when.done("reduction")


class _FirstReductions(Kept):
    """Model -> when its replicas are compared."""

    def __init__(self, groups: FoldedGroups) -> None:
        self.of: WeakKeyDictionary[nn.Module, When] = WeakKeyDictionary()


def compare_in_stage(model: nn.Module, groups: FoldedGroups, settings: Mapping[str, str]) -> None:
    """Compare what the ranks of a stage must have alike before they gather or reduce parameters; call it on all.

    Raises:
        ReplicaError: on every rank of the stage; names what differs and the ranks.
    """
    of_parameters = parameter_settings(model.named_parameters())
    met = [group for group in (groups.tp, groups.dp_cp) if group.size > 1]
    compare_settings("what is to be reduced", {**settings, **of_parameters}, met, groups.device)


def parameter_settings(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, str]:
    """Of each parameter its dtype, whether it is frozen, and its shape if that is the same on every rank."""
    return {
        name: f"{str(each.dtype).removeprefix('torch.')}{f' {list(each.shape)}' if is_dtensor(each) else ''}"
        f"{'' if each.requires_grad else ', frozen'}"
        for name, each in parameters
    }


def _compare_replicas(model: nn.Module, groups: FoldedGroups, *, across_stages: bool) -> None:
    entries = sorted(resolve_parameters(model, groups), key=lambda entry: entry.name)
    device = entries[0].communication_device if entries else torch.device("cpu")
    # The next collectives would hang on ranks with different parameters, so it is agreed first what is compared.
    inventory = checksum(
        f"{entry.name} {entry.replica_axes} {entry.data_replicas} {entry.groups.layout}" for entry in entries
    )
    everywhere = [(groups.tp, [0]), (groups.dp_cp, [0])]
    mask = _differs(torch.tensor([inventory], device=device), everywhere)
    _raise_together(mask, groups, across_stages, _inventory_text)

    places: dict[AxisGroup, list[int]] = {groups.axis(axis): [] for axis in _REPLICA_AXES}
    for place, entry in enumerate(entries):
        for group in entry.replica_groups:
            places.setdefault(group, []).append(place)
    replicas = list(places.items())
    digests = [digest(entry.parameter).to(device) for entry in entries]
    mask = _differs(torch.stack(digests) if digests else torch.zeros(0, dtype=torch.int64), replicas)
    names = [entry.name for entry in entries]
    _raise_together(mask, groups, across_stages, lambda ranks_of: _drift_text(names, ranks_of))


# (axis, place of the parameter) -> the global ranks that differ from the first member of their group
_RanksOf = Mapping[tuple[str, int], list[int]]


def _differs(digests: Tensor, compared: Sequence[tuple[AxisGroup, list[int]]]) -> dict[str, Tensor]:
    """Axis -> where this rank differs from the first member of its group, bool ``[digests]``."""
    masks: dict[str, Tensor] = {}
    for group, places in compared:
        mask = masks.setdefault(group.axis, torch.zeros(digests.numel(), dtype=torch.bool, device=digests.device))
        if places and group.size > 1:
            mask[places] = all_gather(digests[places], group)[0] != digests[places]
    return masks


def _raise_together(
    masks: dict[str, Tensor], groups: FoldedGroups, across_stages: bool, text: Callable[[_RanksOf], str]
) -> None:
    """Raise on every rank of the stage, or of the world, if any mask of any of them is set."""
    mask = torch.stack(list(masks.values())).to(torch.uint8)
    found = torch.zeros(1, dtype=torch.int32, device=mask.device) + mask.any()
    for group in (groups.tp, groups.dp_cp):
        all_reduce_(found, group, op="max")
    here = groups.pp.index
    of_stages = all_gather(found, groups.pp).flatten().tolist() if across_stages else [int(found)]
    bad = [stage for stage, differs in enumerate(of_stages, start=0 if across_stages else here) if differs]
    if not bad:
        return
    if here not in bad:
        raise ReplicaError(
            f"Replicas differ in pipeline stage {', '.join(map(str, bad))}, whose ranks name the parameters. This rank "
            f"is of stage {here}, where all are equal."
        )
    # Ranks of a stage count up over tp first, then over dp_cp: [stage_size, axes, digests].
    of_stage = all_gather(all_gather(mask, groups.tp), groups.dp_cp).flatten(0, 1)
    ranks_of: dict[tuple[str, int], list[int]] = {}
    axes = list(masks)
    for rank, axis, place in of_stage.nonzero().tolist():
        ranks_of.setdefault((axes[axis], place), []).append(here * groups.layout.stage_size + rank)
    raise ReplicaError(text(ranks_of))


def _inventory_text(ranks_of: _RanksOf) -> str:
    found = [f"over {axis}: {_ranks_differ(ranks)}" for (axis, _), ranks in ranks_of.items()]
    return (
        f"Ranks of one stage have different parameters (by name and family), so replicas cannot be compared:"
        f"{below(found)}\nBuild the same model with the same marks on every rank of a stage."
    )


def _drift_text(names: Sequence[str], ranks_of: _RanksOf) -> str:
    by_place = sorted(ranks_of.items(), key=lambda item: (item[0][1], item[0][0]))
    found = [f"{names[place]} over {axis}: {_ranks_differ(ranks)}" for (axis, place), ranks in by_place]
    count = len({place for _, place in ranks_of})
    return (
        f"{count} parameter{' differs' if count == 1 else 's differ'} between replicas:{below(found)}\n"
        f"Replicas must start equal (one seed, or a broadcast) and step on equal gradients. If they did start equal, "
        f"compare parameter_families(model, groups) with how each parameter is used: a part of a gradient that is not "
        f"summed over tp (REPLICATED_PARTIAL) makes lanes drift apart."
    )


def _ranks_differ(ranks: Sequence[int]) -> str:
    shown = some_ranks(sorted(ranks))
    return (
        f"rank {shown} differs from the first rank of its group"
        if len(ranks) == 1
        else f"ranks {shown} differ from the first rank of their group"
    )
