"""Memory that every rank of a group can read: the thin adapter over torch's symmetric memory."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist

from foldpar.comm.collectives import all_reduce_
from foldpar.comm.groups import AxisGroup, FoldedGroups, Kept
from foldpar.errors import ShapeError
from foldpar.requirements import why_no_objects

__all__ = [
    "PeerMemories",
    "PeerMemory",
    "check_room",
    "known_memory_of",
    "memory_of",
    "why_no_peers",
    "why_unreachable",
]


class PeerMemory:
    """One buffer of equal size on every rank of a group, readable by all of them.

    Work in phases: ranks write their own buffer, meet at the barrier, and read the others'. A buffer has two halves by
    use, ``"rows"`` and ``"sums"``, which are written in turn, so that the barrier before one half is read also says
    that all have done with the other; :meth:`begin` adds a barrier where a half is written twice in a row.

    Attributes:
        own: this rank's buffer, ``[size]``, uint8.
        addresses: ``[group.size]``, int64, on the device: where the buffers of all ranks are, in coordinate order.
        flags: ``[3]``, int32: the most rows that were wanted where there was no room for them, the room that there was,
            and whether an active expert id was illegal. Kernels set them; :func:`check_room` reads.
    """

    def __init__(self, group: AxisGroup, size: int, device: torch.device) -> None:
        self.group, self._last = group, "sums"
        self._handle: Any = None
        if group.size == 1:
            self.own = torch.zeros(size, dtype=torch.uint8, device=device)
            addresses = [self.own.data_ptr()]
        else:
            import torch.distributed._symmetric_memory as symmetric

            assert group.process_group is not None
            self.own = symmetric.empty(size, dtype=torch.uint8, device=device)
            self._handle = symmetric.rendezvous(self.own, group.process_group.group_name)
            self.own.zero_()
            addresses = list(self._handle.buffer_ptrs)
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.flags = torch.zeros(3, dtype=torch.int32, device=device)

    def begin(self, half: Literal["rows", "sums"]) -> None:
        """Before writing a half of the own buffer."""
        if self._last == half:
            self.barrier()
        self._last = half

    def barrier(self) -> None:
        """All ranks' writes so far can be read after this; the device waits, not the host."""
        if self._handle is not None:
            self._handle.barrier(channel=0)


class PeerMemories(Kept):
    """The memories of some groups by size and device, in the same order on all ranks; or why there is none."""

    def __init__(self, groups: FoldedGroups) -> None:
        self.found: dict[tuple[int, torch.device], PeerMemory | str] = {}


def memory_of(groups: FoldedGroups, size: int, device: torch.device) -> PeerMemory | str:
    """The memory of this size that the ranks of ``ep`` share, made on first use; or why there is none.

    Layers of one size take turns with one memory. The first call is a meeting of the group.
    """
    found, key = groups.keep(PeerMemories).found, (size, device)
    if key not in found:
        reason = why_unreachable(groups.ep, device)
        found[key] = PeerMemory(groups.ep, size, device) if reason is None else reason
    return found[key]


def known_memory_of(groups: FoldedGroups, size: int, device: torch.device) -> PeerMemory | str | None:
    """What :func:`memory_of` found; ``None`` where nobody has asked. Asks nobody."""
    return groups.keep(PeerMemories).found.get((size, device))


def check_room(groups: FoldedGroups) -> None:
    """Raise on every rank of the stage if any routing since the last check was illegal or found no room for its rows.

    Where rows travelled one-sided: two small collectives and one host synchronisation. :func:`reduce_gradients` and
    ``GradientReducer.finish`` call it.

    Raises:
        ShapeError: gradients since then are not those of the model, and must not be used.
    """
    shared = [memory for memory in groups.keep(PeerMemories).found.values() if isinstance(memory, PeerMemory)]
    if not shared:
        return
    flags = torch.stack([memory.flags for memory in shared]).amax(0)
    for memory in shared:
        memory.flags.zero_()
    wanted, room, illegal = all_reduce_(all_reduce_(flags, groups.tp, "max"), groups.dp_cp, "max").tolist()
    if illegal:
        raise ShapeError(
            "An expert id was outside [0, num_experts) on some rank. Mask assignments that should not travel instead."
        )
    if wanted:
        raise ShapeError(
            f"A rank's experts were sent {wanted} rows and have room for {room}: rows were left out, so the gradients "
            f"of this step are not those of the model. Skip the step; then allow more with OneSided(slack=...), or "
            f"leave one_sided away, so that rows travel in messages of any size."
        )


def why_unreachable(group: AxisGroup, device: torch.device) -> str | None:
    """Why the ranks of a group cannot read each other's memory; ``None`` where they can. The same on all of them.

    A collective over the group, and a host synchronisation: ask once.
    """
    reason = why_no_peers(device)
    if group.size == 1 or device.type != "cuda":  # all ranks have devices of one kind
        return reason
    if missing := why_no_objects():
        return missing
    mine = (reason, socket.gethostname() + _boot_id(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    everybody: list[Any] = [None] * group.size
    dist.all_gather_object(everybody, mine, group=group.process_group)
    reasons = [entry[0] for entry in everybody if entry[0]]
    if reasons:
        return str(reasons[0])
    if len({entry[1] for entry in everybody}) > 1:
        return f"the ranks {group.ranks} are on several machines"
    return None


def why_no_peers(device: torch.device) -> str | None:
    """Why a device can share no memory, whatever the other ranks have; ``None`` where it may. Asks nobody."""
    if device.type != "cuda":
        return f"it needs GPUs, and this is {device.type}"
    for module in ("triton", "torch.distributed._symmetric_memory"):
        if find_spec(module) is None:
            return f"{module} is missing"
    return None


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read()
    except OSError:
        return ""
