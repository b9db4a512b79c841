"""Whether values which must be equal on several ranks are: a digest first, details only on a mismatch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from foldpar.arguments import expect
from foldpar.comm.collectives import all_gather, all_reduce_
from foldpar.comm.dtensors import local_tensor
from foldpar.comm.groups import AxisGroup
from foldpar.errors import ReplicaError
from foldpar.wording import below

__all__ = [
    "assert_same_on_group",
    "checksum",
    "compare_settings",
    "differences",
    "digest",
    "digest_of_bits",
]

_CHUNK = 2**20
_WORDS = 2**18  # of 8 bytes: what is made of them on the way stays in a cache


def assert_same_on_group(tensors: Mapping[str, Tensor] | Tensor, group: AxisGroup, *, what: str = "tensor") -> None:
    """Raise if tensors differ, in any bit, between the ranks of a group. Call it on every rank of the group.

    One digest per rank is gathered (one small collective, one host synchronisation). Shapes, dtypes and entries
    travel only after a mismatch, so a wrong shape hangs nothing. NaN equals NaN of the same bits; 0.0 differs from
    -0.0.

    Args:
        tensors: one tensor, or several by field name, such as ``{"ids": ids, "weights": weights}``.
        group: the ranks that must agree, such as ``groups.tp``.
        what: how the error calls the whole, such as ``"routing of layer 3"``.

    Example of an error::

        routing differs over tp:
            field 'ids' at [0, 1]: 3 on rank 1 (tp 1), 2 on rank 0 (tp 0)

    Raises:
        ReplicaError: on every rank of the group; names the rank, its index on the axis, the field, and the shapes and
            dtypes or the first differing entries with both values.
    """
    expect("assert_same_on_group", tensors=(tensors, (Tensor, Mapping)), group=(group, AxisGroup))
    named = dict(tensors) if isinstance(tensors, Mapping) else {"": tensors}
    for name, tensor in named.items():
        expect("assert_same_on_group", **{name or "tensors": (tensor, Tensor)})
    if found := differences(named, group):
        raise ReplicaError(f"{what} differs over {group.axis}:{below(found)}")


def differences(
    tensors: Mapping[str, Tensor], group: AxisGroup, *, rounding: bool = False, only_shapes: bool = False
) -> list[str]:
    """What differs between the ranks of a group, one line each; the same lines on every rank of it.

    Args:
        rounding: floating-point rows may differ by ``sqrt(eps)`` of their length, or of the usual one if that is more.
        only_shapes: values are not looked at.
    """
    if group.size == 1:
        return []
    fields = {name: local_tensor(tensors[name]).detach() for name in sorted(tensors)}
    device = next(iter(fields.values())).device if fields else torch.device("cpu")
    digests = {name: torch.zeros((), dtype=torch.int64, device=device) for name in fields}
    if not only_shapes:
        digests = {name: digest(tensor).to(device) for name, tensor in fields.items()}
    total = torch.tensor(checksum(f"{name}\t{_signature(tensor)}" for name, tensor in fields.items()), device=device)
    for each in digests.values():
        total = _mixed(total) + each
    if len(set(all_gather(total, group).tolist())) == 1:
        return []
    return _differences(fields, digests, group, device, rounding)


def compare_settings(what: str, settings: Mapping[str, str], met: Sequence[AxisGroup], device: torch.device) -> None:
    """Raise if ranks that are about to communicate would not fit together: other dtypes, sizes or frozen parameters.

    A collective of buffers that differ between ranks hangs, or ends the process. A digest of fixed size is safe.

    Args:
        what: how the error calls the whole, such as ``"the parameters of the model"``.
        settings: by name.
        met: groups over which a word reaches every rank that communicates, in this order.

    Raises:
        ReplicaError: on every rank that is met; names the settings and the ranks, or says that others are told.
    """
    found = [line for group in dict.fromkeys(met) for line in _different_settings(settings, group, device)]
    word = torch.tensor(int(bool(found)), dtype=torch.int32, device=device)
    for group in met:
        all_reduce_(word, group, "max")
    if found:
        raise ReplicaError(
            f"Ranks that communicate with each other differ in {what}:{below(list(dict.fromkeys(found)))}\nThe next "
            f"collective would hang or end the process. Build and freeze the same model, in the same dtype, on every "
            f"rank, and call it in the same way."
        )
    if met and int(word):
        raise ReplicaError(f"Other ranks that this step meets differ in {what}; see their errors.")


def _different_settings(settings: Mapping[str, str], group: AxisGroup, device: torch.device) -> list[str]:
    if group.size == 1:
        return []
    total = torch.tensor(checksum(f"{name}\t{settings[name]}" for name in sorted(settings)), device=device)
    if len(set(all_gather(total, group).tolist())) == 1:
        return []
    of_ranks = _gathered_texts(settings, group, device)
    names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
    return [
        f"{name}: {of_ranks[index].get(name, 'missing')} on {_who(group, index)}, "
        f"{of_ranks[0].get(name, 'missing')} on {_who(group, 0)}"
        for name in names
        for index in range(group.size)
        if of_ranks[index].get(name) != of_ranks[0].get(name)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Digests: int64 arithmetic that wraps around, the same on every device.


def digest(tensor: Tensor) -> Tensor:
    """Of the bits of a tensor, its shape and its dtype: an int64 scalar on its device."""
    tensor = local_tensor(tensor).detach()
    signature = torch.tensor(checksum([_signature(tensor)]), device=tensor.device)
    return _mixed(signature) + digest_of_bits(tensor)


def digest_of_bits(tensor: Tensor) -> Tensor:
    """A position-weighted sum over the bits of a tensor: an int64 scalar on its device, 0 of nothing."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words, rest = data[:whole].view(torch.int64), data[whole:].to(torch.int64)
    # Odd weights are invertible modulo 2**64, and mixing is too: a change of one word is always seen.
    weights = torch.arange(1, 2 * min(_WORDS, max(1, words.numel())), 2, device=data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for chunk in words.split(_WORDS):
        total = _mixed(total) + (_mixed(chunk) * weights[: chunk.numel()]).sum()
    places = torch.arange(1, rest.numel() + 1, device=data.device)
    return _mixed(total) + (rest * places).sum()


def _mixed(values: Tensor) -> Tensor:
    """A bijection of int64 that carries high bits down, so that two flipped signs do not cancel in a sum."""
    values = values * 0x1E3779B97F4A7C15
    return values ^ ((values >> 32) & 0xFFFFFFFF)


def _signature(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def checksum(words: Iterable[str]) -> int:
    """Of words in their order, the same on every rank that has the same ones."""
    return zlib.crc32("\n".join(words).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Where tensors differ, found out together: every rank of the group walks the same path.


def _differences(
    fields: Mapping[str, Tensor], digests: Mapping[str, Tensor], group: AxisGroup, device: torch.device, rounding: bool
) -> list[str]:
    signatures = _gathered_texts({name: _signature(tensor) for name, tensor in fields.items()}, group, device)
    found = []
    for name in sorted(set().union(*signatures)):
        of_rank = [signature.get(name) for signature in signatures]
        if len(set(of_rank)) > 1:
            different = [index for index in range(group.size) if of_rank[index] != of_rank[0]]
            found += [
                f"{_field(name)}{of_rank[index] or 'missing'} on {_who(group, index)}, "
                f"{of_rank[0] or 'missing'} on {_who(group, 0)}"
                for index in different
            ]
        else:
            of_all = all_gather(digests[name], group).tolist()
            different = [index for index in range(group.size) if of_all[index] != of_all[0]]
            if different and rounding and fields[name].is_floating_point():
                different = _beyond_rounding(fields[name], group)
            found += _different_entries(name, fields[name], different, group)
    return found


def _gathered_texts(fields: Mapping[str, str], group: AxisGroup, device: torch.device) -> list[dict[str, str]]:
    """Field -> text, of every rank."""
    text = "\n".join(f"{name}\t{field}" for name, field in fields.items()).encode()
    lengths = all_gather(torch.tensor(len(text), device=device), group).tolist()
    padded = torch.tensor(list(text.ljust(max(lengths), b" ")), dtype=torch.uint8, device=device)
    texts = [
        bytes(row[:length]).decode() for row, length in zip(all_gather(padded, group).tolist(), lengths, strict=True)
    ]
    return [dict(line.split("\t") for line in text.split("\n") if line) for text in texts]


def _beyond_rounding(tensor: Tensor, group: AxisGroup) -> list[int]:
    """Indices of the ranks that have a row which differs from that of index 0 by more than rounding explains."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    tolerance, found = torch.finfo(tensor.dtype).eps ** 0.5, torch.zeros(group.size, dtype=torch.bool)
    for chunk in rows.split(max(1, _CHUNK // max(1, rows.shape[1]))):
        of_ranks = all_gather(chunk, group).double()
        lengths = of_ranks[0].nan_to_num(0, 0, 0).norm(dim=-1)
        allowed = tolerance * torch.maximum(lengths, lengths.square().mean().sqrt())
        same = (of_ranks == of_ranks[0]) | (of_ranks.isnan() & of_ranks[0].isnan())
        apart = torch.where(same, 0, of_ranks - of_ranks[0]).norm(dim=-1)  # NaN where only one of two is
        found |= ~(apart <= allowed).all(-1).cpu()
    return found.nonzero().flatten().tolist()


def _different_entries(name: str, tensor: Tensor, different: Sequence[int], group: AxisGroup) -> list[str]:
    """The first entries in which the ranks of these indices differ from that of index 0, one line per rank."""
    flat, missing, found = tensor.contiguous().view(-1), set(different), []
    for start in range(0, flat.numel(), _CHUNK):
        if not missing:
            break
        entries = all_gather(flat[start : start + _CHUNK].view(torch.uint8), group)
        differs = (entries != entries[0]).view(group.size, -1, flat.dtype.itemsize).any(-1)
        for index in sorted(missing):
            places = differs[index].nonzero().flatten()[:3].tolist()
            if places:
                missing.remove(index)
                here, there = entries[index].view(flat.dtype), entries[0].view(flat.dtype)
                shown = "; ".join(
                    f"{_position(start + place, tensor.shape)}: {here[place].item()!r} on {_who(group, index)}, "
                    f"{there[place].item()!r} on {_who(group, 0)}"
                    for place in places
                )
                found.append(f"{_field(name)}at {shown}")
    return found


def _position(place: int, shape: Sequence[int]) -> list[int]:
    position: list[int] = []
    for size in reversed(shape):
        place, index = divmod(place, size)
        position.insert(0, index)
    return position


def _field(name: str) -> str:
    return f"field {name!r} " if name else ""


def _who(group: AxisGroup, index: int) -> str:
    return f"rank {group.ranks[index]} ({group.axis} {index})"
