"""Memory that every rank of a group can read: the thin adapter over torch's symmetric memory."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import Any, Literal

import torch

from foldpar.comm.collectives import all_reduce_
from foldpar.comm.groups import AxisGroup, FoldedGroups, Kept
from foldpar.comm.host_meeting import HostMeeting, gathered
from foldpar.errors import GroupsError, ShapeError
from foldpar.requirements import why_no_objects

__all__ = [
    "DeviceMemories",
    "PeerMemories",
    "PeerMemory",
    "check_room",
    "memories_of",
    "why_no_peers",
]

_STEP = 2**20
"""Halves of a memory are whole steps, in bytes."""


class PeerMemory:
    """One buffer of equal size on every rank of a group, readable by all of them.

    Work in phases: ranks write their own buffer, meet at the barrier, and read the others'. A buffer has two halves,
    ``"rows"`` and ``"sums"``, which are written in turn, so that the barrier before one half is read also says
    that all have done with the other; :meth:`begin` adds a barrier where a half is written twice in a row. Halves lie
    where they lie, whatever is put into them, so exchanges of different shapes take turns with one memory.

    Attributes:
        own: this rank's buffer, ``[size]``, uint8.
        halves: the bytes of the two halves; the second begins where the first ends.
        addresses: ``[group.size]``, int64, on the device: where the buffers of all ranks are, in coordinate order.
        flags: ``[3]``, int32: the most rows that were wanted where there was no room for them, the room that there was,
            and whether an active expert id was illegal. Kernels set them; :func:`check_room` reads.
    """

    def __init__(self, group: AxisGroup, halves: tuple[int, int], own: torch.Tensor) -> None:
        self.group, self.halves, self.own, self._last = group, halves, own, "sums"
        self._handle: Any = None
        addresses = [own.data_ptr()]
        if group.size > 1:
            import torch.distributed._symmetric_memory as symmetric

            assert group.process_group is not None
            self._handle = symmetric.rendezvous(own, group.process_group.group_name)
            addresses = list(self._handle.buffer_ptrs)
        own.zero_()
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=own.device)
        self.flags = torch.zeros(3, dtype=torch.int32, device=own.device)

    def begin(self, half: Literal["rows", "sums"]) -> None:
        """Before writing a half of the own buffer."""
        if self._last == half:
            self.barrier()
        self._last = half

    def barrier(self) -> None:
        """All ranks' writes so far can be read after this; the device waits, not the host."""
        if self._handle is not None:
            self._handle.barrier(channel=0)

    def holds(self, halves: tuple[int, int]) -> bool:
        """Whether so many bytes fit into its halves."""
        return halves[0] <= self.halves[0] and halves[1] <= self.halves[1]


class DeviceMemories:
    """The memories that the ranks of a group share on one kind of device, smallest first; or why they share none.

    Layers take turns with them. What is asked for and fits into one is given that one; else another is made, at least
    twice as large as the last, so that all of them together take less than twice the largest. None is let go of before
    the groups are: a captured graph may read it. Made by a meeting of the group, and changed by meetings only, so all
    ranks have the same ones.

    Attributes:
        reason: why the ranks cannot read each other's memory; ``None`` where they can.
        hosts: where the hosts of these ranks meet.
    """

    def __init__(self, group: AxisGroup, device: torch.device) -> None:
        self.group, self.device, self.made = group, device, list[PeerMemory]()
        self._refused: tuple[tuple[int, int], str] | None = None
        self.reason, self.hosts = _why_unreachable(group, device), None
        if self.reason is None:
            try:
                self.hosts = HostMeeting(group)
            except GroupsError as error:
                self.reason = str(error)

    def holding(self, halves: tuple[int, int]) -> PeerMemory | str:
        """The smallest memory with room for so many bytes in its halves; or why there can be none.

        Call it on every rank of the group with the same number. Where one has to be made it is a collective.

        Raises:
            GroupsError: one has to be made, and the stream is being captured.
        """
        for memory in self.made:
            if memory.holds(halves):
                return memory
        if self._refused is not None and all(map(int.__ge__, halves, self._refused[0])):
            return self._refused[1]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise GroupsError(
                "A graph is being captured of a forward with more tokens than any before, for which memory would have "
                "to be shared. Run one step with as many before, or give OneSided(max_tokens=...)."
            )
        first, second = (
            max(_rounded(half), 2 * before if half > before else before)
            for half, before in zip(halves, self.made[-1].halves if self.made else (0, 0), strict=True)
        )
        own, problem = _allocated(first + second, self.group, self.device)
        problems: list[str] = [why for why in gathered(problem, self.group) if why]
        if problems or own is None:
            self._refused = (halves, problems[0])
            return problems[0]
        self.made.append(PeerMemory(self.group, (first, second), own))
        return self.made[-1]


def _rounded(size: int) -> int:
    return -(-size // _STEP) * _STEP


def _allocated(size: int, group: AxisGroup, device: torch.device) -> tuple[torch.Tensor | None, str]:
    """Memory that can be shared, or why this rank has none; nobody else is asked."""
    try:
        if group.size == 1:
            return torch.empty(size, dtype=torch.uint8, device=device), ""
        import torch.distributed._symmetric_memory as symmetric

        return symmetric.empty(size, dtype=torch.uint8, device=device), ""
    except RuntimeError as error:  # out of memory is one
        first = str(error).partition("\n")[0]
        return None, f"rank {group.ranks[group.index]} has no {size / 2**20:.0f} MiB to share: {first}"


class PeerMemories(Kept):
    """What some groups share by device, in the same order on all ranks."""

    def __init__(self, groups: FoldedGroups) -> None:
        self.found: dict[torch.device, DeviceMemories] = {}
        self.watched: bool | None = None
        """Whether any rank of the stage may share memory; ``None`` while nobody has asked."""


def memories_of(groups: FoldedGroups, device: torch.device, *, ask: bool) -> DeviceMemories | None:
    """What the ranks of EP x ETP share; ``None`` where nobody has asked. To ``ask`` the first time is a meeting."""
    found = groups.keep(PeerMemories).found
    if ask and device not in found:
        found[device] = DeviceMemories(groups.ep_etp, device)
    return found.get(device)


def check_room(groups: FoldedGroups) -> None:
    """Raise on every rank of the stage if any routing since the last check was illegal or found no room for its rows.

    Where rows travelled one-sided: two small collectives and one host synchronisation. :func:`reduce_gradients` and
    ``GradientReducer.finish`` call it.

    Raises:
        ShapeError: gradients since then are not those of the model, and must not be used.
    """
    kept = groups.keep(PeerMemories)
    if not kept.found:
        return
    device = next(iter(kept.found))
    shared = [memory for each in kept.found.values() for memory in each.made]
    if kept.watched is None:  # other ranks of the stage may be on other machines, and share nothing
        may = any(each.hosts is not None for each in kept.found.values())
        kept.watched = _of_stage(torch.tensor([may], dtype=torch.int32, device=device), groups)[0] > 0
    if not kept.watched:
        return
    flags = torch.stack([torch.zeros(3, dtype=torch.int32, device=device), *(memory.flags for memory in shared)])
    for memory in shared:
        memory.flags.zero_()
    wanted, room, illegal = _of_stage(flags.amax(0), groups)
    if illegal:
        raise ShapeError(
            "An expert id was outside [0, num_experts) on some rank. Mask assignments that should not travel instead."
        )
    if wanted:
        raise ShapeError(
            f"A rank's experts were sent {wanted} rows and have room for {room}: rows were left out, so the gradients "
            f"of this step are not those of the model. Skip the step; then allow more with OneSided(slack=...), or "
            f"leave slack away, so that there is always room."
        )


def _of_stage(numbers: torch.Tensor, groups: FoldedGroups) -> list[int]:
    largest: list[int] = all_reduce_(all_reduce_(numbers, groups.tp, "max"), groups.dp_cp, "max").tolist()
    return largest


def _why_unreachable(group: AxisGroup, device: torch.device) -> str | None:
    """Why the ranks of a group cannot read each other's memory; ``None`` where they can. The same on all of them.

    A collective over the group, and a host synchronisation: ask once.
    """
    reason = why_no_peers(device)
    if group.size == 1 or device.type != "cuda":  # all ranks have devices of one kind
        return reason
    if missing := why_no_objects():
        return missing
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    everybody = gathered((reason, socket.gethostname() + _boot_id(), visible, device.index), group)
    reasons = [entry[0] for entry in everybody if entry[0]]
    if reasons:
        return str(reasons[0])
    if len({entry[1] for entry in everybody}) > 1:
        return f"the ranks {group.ranks} are on several machines"
    if any(entry[2] != visible for entry in everybody):  # numbers of devices mean nothing to each other
        return None
    apart = [peer for *_, peer in everybody if peer != device.index and not _reads(device.index, peer)]
    told = gathered(f"GPU {device.index} cannot read GPU {apart[0]}" if apart else None, group)
    return next(filter(None, told), None)


def _reads(one: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(one, other)


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
