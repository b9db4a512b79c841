"""Which part of a whole tensor a rank holds: told apart by kind of parameter, not by the code that folds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from foldpar.comm import FoldedGroups, is_dtensor, local_tensor
from foldpar.errors import ShapeError
from foldpar.moe import ExpertShare
from foldpar.parameters import resolve_parameters

__all__ = ["Share", "Shares", "Whole", "placed"]

Share: TypeAlias = Callable[[str, Tensor, FoldedGroups], "Tensor | None"]
Whole: TypeAlias = Callable[[str, Mapping[str, Tensor]], Tensor]


class Shares:
    """Which part of the reference's tensors each parameter of a folded module holds on this rank."""

    def __init__(
        self, module: nn.Module, groups: FoldedGroups, *, whole: Whole | None = None, share: Share | None = None
    ) -> None:
        self._groups, self._whole_of, self._share_of = groups, whole, share
        self.parameters = dict(module.named_parameters())
        resolved = resolve_parameters(module, groups)
        self.families = {each.name: each.family for each in resolved}
        self.groups_of = {each.name: each.groups for each in resolved}
        self._experts = {
            f"{path}.{name}" if path else name: (experts, name)
            for path, experts in module.named_modules()
            if isinstance(experts, ExpertShare)
            for name, _ in experts.named_parameters(recurse=False)
        }

    def family(self, name: str) -> str:
        """The name of a parameter's family."""
        return self.families[name].name

    def local(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that lies like a parameter, in the shape of the reference's."""
        own = local_tensor(tensor)
        experts, own_name = self._experts.get(name, (None, ""))
        pair = None if experts is None else experts.pairs.get(own_name)
        return own if pair is None else own.flatten(pair, pair + 1)

    def of(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """This rank's share of every tensor, in the order of the folded module's parameters."""
        looked_up = _LookUp(tensors)
        wholes = {name: self._whole(name, looked_up) for name in self.parameters}
        if forgotten := [name for name in tensors if name not in looked_up.seen]:
            raise ShapeError(
                f"The reference has parameters that no parameter of the folded module is a share of: "
                f"{', '.join(forgotten[:5])}. They would go unchecked. Name or stack them with whole(name, tensors)."
            )
        return [self.share_of(name, whole) for name, whole in wholes.items()]

    def _whole(self, name: str, tensors: _LookUp) -> Tensor:
        if self._whole_of is not None:
            return self._whole_of(name, tensors)
        if name not in tensors:
            raise ShapeError(
                f"The folded module has a parameter {name!r} that the reference has not; it has "
                f"{', '.join(list(tensors)[:8])}. Say what it is a share of with whole(name, tensors of the reference)."
            )
        return tensors[name]

    def share_of(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor that lies like the parameter of this name."""
        given = self._share_of(name, whole, self._groups) if self._share_of is not None else None
        parameter = self.parameters[name]
        if given is not None:
            return given
        if name in self._experts:
            return _share_of_experts(whole, *self._experts[name])
        if is_dtensor(parameter):
            return placed(whole, parameter)
        sharded = "tp" in self.families[name].shard_axes and whole.dim() == parameter.dim()
        differing = [dim for dim in range(whole.dim()) if sharded and whole.shape[dim] != parameter.shape[dim]]
        if len(differing) == 1:
            return whole.tensor_split(self._groups.tp.size, dim=differing[0])[self._groups.tp.index]
        return whole


class _LookUp(Mapping[str, Tensor]):
    """Tensors by name that remembers which were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _share_of_experts(whole: Tensor, experts: ExpertShare, name: str) -> Tensor:
    """By global expert, then by hidden unit; on its own, not with the slices that the experts were made by."""
    groups, storage = experts.groups, experts.storage
    here, hidden = experts.num_experts // groups.ep.size, experts.hidden_dim // groups.etp.size
    mine = whole[groups.ep.index * here : (groups.ep.index + 1) * here]
    units = range(groups.etp.index * hidden, (groups.etp.index + 1) * hidden)
    if name == "down_proj":
        return mine.narrow(1 if storage.transposed else 2, units.start, hidden)
    if name not in (storage.gate_up, storage.gate_up_bias):
        return mine
    dim = 2 if storage.transposed and mine.dim() == 3 else 1
    parts = range(mine.shape[dim] // experts.hidden_dim)
    if storage.interleaved:
        columns = [len(parts) * unit + part for unit in units for part in parts]
    else:
        columns = [part * experts.hidden_dim + unit for part in parts for unit in units]
    return mine.index_select(dim, torch.tensor(columns, device=mine.device))


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """The local part of a whole tensor that is placed like a DTensor."""
    from torch.distributed.tensor import distribute_tensor

    assert is_dtensor(like)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
