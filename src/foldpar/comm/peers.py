"""Memory that every rank of a group can read: the thin adapter over torch's symmetric memory."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch

from foldpar.comm.c10d import seconds_of
from foldpar.comm.collectives import all_reduce_
from foldpar.comm.groups import AxisGroup, FoldedGroups, Kept
from foldpar.comm.host_meeting import HostMeeting, gathered
from foldpar.errors import GroupsError, ShapeError
from foldpar.requirements import why_no_objects

__all__ = [
    "DeviceMemories",
    "PeerMemories",
    "PeerMemory",
    "await_peers",
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
            and whether an active expert id was illegal. Kernels and :meth:`tell_illegal` set them; :func:`check_room`
            reads.
    """

    def __init__(self, group: AxisGroup, halves: tuple[int, int], own: torch.Tensor) -> None:
        self.group, self.halves, self.own, self._last = group, halves, own, "sums"
        self._handle: Any = None
        self._patience = 0
        self._stream: torch.cuda.Stream | None = None
        addresses = [own.data_ptr()]
        if group.size > 1:
            import torch.distributed._symmetric_memory as symmetric

            assert group.process_group is not None
            self._patience = int(1000 * seconds_of(group.process_group, own.device))
            self._handle = symmetric.rendezvous(own, group.process_group.group_name)
            addresses = list(self._handle.buffer_ptrs)
            if addresses[group.index] != own.data_ptr():  # torch may put it into a pool, and share that
                raise RuntimeError("torch shares it from elsewhere than where it begins")
        own.zero_()
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=own.device)
        self.flags = torch.zeros(3, dtype=torch.int32, device=own.device)

    def begin(self, half: Literal["rows", "sums"]) -> None:
        """Before writing a half of the own buffer."""
        self._follow()
        if self._last == half:
            self.barrier()
        self._last = half

    def barrier(self) -> None:
        """All ranks' writes so far can be read after this; the device waits, not the host."""
        if self._handle is not None:
            self._handle.barrier(channel=0, timeout_ms=self._patience)

    def tell_illegal(self, found: torch.Tensor) -> None:
        """Set the flag if ``found``, a bool on the device, says that an expert id was illegal."""
        self._follow()  # it reads the flag and writes it again
        self.flags[2].logical_or_(found)

    def _follow(self) -> None:
        """Work on the current stream comes after that on another one, of which it would know nothing."""
        if not self.own.is_cuda:
            return
        stream = torch.cuda.current_stream(self.own.device)
        last, self._stream = self._stream, stream
        if last is None or last == stream:
            return
        with torch.cuda.stream(last):
            captured = torch.cuda.is_current_stream_capturing()
        if captured == torch.cuda.is_current_stream_capturing():  # a capture begins when all streams are done
            stream.wait_stream(last)

    def is_shared(self) -> bool:
        """Whether this rank reads what every rank has written; ask once, on every rank, before it is used."""
        if self._handle is None:
            return True
        told = [(rank + 1) % 256 for rank in range(self.group.size)]
        self.own[0] = told[self.group.index]
        self.barrier()
        read = [self._handle.get_buffer(rank, (1,), torch.uint8) for rank in range(self.group.size)]
        return bool(torch.cat(read).tolist() == told)

    def holds(self, halves: tuple[int, int]) -> bool:
        """Whether so many bytes fit into its halves."""
        return halves[0] <= self.halves[0] and halves[1] <= self.halves[1]


class DeviceMemories:
    """The memories that the ranks of a group share on one kind of device; or why they share none.

    Layers take turns with them. What is asked for and fits into one is given the smallest such; else another is made,
    twice as large as all before where the bound allows it. None is let go of before the groups are: a captured graph
    may read it. Made by a meeting of the group, and changed by meetings only, so all ranks have the same ones.

    Attributes:
        reason: why the ranks cannot read each other's memory; ``None`` where they can.
        refused: bytes of two halves that a rank did not have, and what it said.
        hosts: where the hosts of these ranks meet; ``None`` where they cannot.
    """

    def __init__(self, group: AxisGroup, device: torch.device) -> None:
        self.group, self.device, self.made = group, device, list[PeerMemory]()
        self.refused: tuple[tuple[int, int], str] | None = None
        self.reason, self.hosts = _why_unreachable(group, device), None
        if self.reason is None:
            try:
                self.hosts = HostMeeting(group, seconds_of(group.process_group, device))
            except GroupsError as error:
                self.reason = str(error)

    @property
    def shared(self) -> int:
        """The bytes of a rank that are shared so far."""
        return sum(sum(memory.halves) for memory in self.made)

    def fitting(self, halves: tuple[int, int]) -> PeerMemory | None:
        """The smallest memory so far with room for so many bytes in its halves."""
        return min((each for each in self.made if each.holds(halves)), key=lambda each: sum(each.halves), default=None)

    def holding(self, halves: tuple[int, int], most: int) -> PeerMemory | str:
        """A memory with room for so many bytes in its halves; or why there can be none.

        Call it on every rank of the group with the same numbers. Where one has to be made it is a collective. ``most``
        is the bound of all memories together, up to whole MiB.

        Raises:
            GroupsError: one has to be made, and the stream is being captured.
        """
        if (found := self.fitting(halves)) is not None:
            return found
        if self.refused is not None and all(map(int.__ge__, halves, self.refused[0])):
            return self.refused[1]
        sizes, bound = self._sizes(halves), _rounded(most) + 2 * _STEP
        if self.shared + sum(sizes) > bound:
            sizes = _rounded(halves[0]), _rounded(halves[1])
        if self.shared + sum(sizes) > bound:
            return (
                f"it takes {sum(sizes) >> 20} MiB more than the {self.shared >> 20} MiB that the ranks share already, "
                f"and most_bytes allows {most >> 20} MiB"
            )
        _refuse_capture(self.device, "with more tokens than any before")
        return self._make(halves, sizes)

    def _sizes(self, halves: tuple[int, int]) -> tuple[int, int]:
        """Of a memory that has more room than is asked for, since more may be asked for soon."""
        before = [max((memory.halves[place] for memory in self.made), default=0) for place in (0, 1)]
        first, second = (
            max(_rounded(half), 2 * largest if half > largest else largest)
            for half, largest in zip(halves, before, strict=True)
        )
        return first, second

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, wanted: tuple[int, int], sizes: tuple[int, int]) -> PeerMemory | str:
        own, problem = _allocated(sum(sizes), self.group, self.device)
        if (problem := _first_of(problem, self.group)) or own is None:
            self.refused = (wanted, problem)
            return problem
        memory: PeerMemory | None = None
        try:
            memory = PeerMemory(self.group, sizes, own)
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
        problem = _first_of(problem, self.group)
        if not problem and memory is not None and not memory.is_shared():  # a barrier, for which all must be there
            problem = f"rank {self.group.ranks[self.group.index]} reads something else than the others have written"
        if (problem := _first_of(problem, self.group)) or memory is None:
            self.reason, self.hosts = f"memory could not be shared: {problem}", None
            return self.reason
        self.made.append(memory)
        return memory


def _first_of(problem: str, group: AxisGroup) -> str:
    """The first problem that a rank of the group has; nothing if none has one."""
    return next(filter(None, gathered(problem, group)), "")


def _refuse_capture(device: torch.device, what: str) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise GroupsError(
            f"A graph is being captured of a forward {what}, for which memory would have to be shared. Run one step "
            f"with as many before, or give OneSided(max_tokens=...)."
        )


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
        self.awaited = False
        """Whether a layer may share memory, once it has run."""
        self.watched: bool | None = None
        """Whether any rank of the stage may share memory; ``None`` while not all have asked."""


def await_peers(groups: FoldedGroups) -> None:
    """A layer of these groups may share memory; call it on every rank, when the layer is built. Asks nobody."""
    groups.keep(PeerMemories).awaited = True


def memories_of(groups: FoldedGroups, device: torch.device, *, ask: bool) -> DeviceMemories | None:
    """What the ranks of EP x ETP share; ``None`` where nobody has asked. To ``ask`` the first time is a meeting.

    Raises:
        GroupsError: it would be the first time, and the stream is being captured.
    """
    found = groups.keep(PeerMemories).found
    if ask and device not in found:
        _refuse_capture(device, "that is the first one")
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
    if not kept.found and not (kept.awaited and _has_gpus(groups)):
        return
    device = next(iter(kept.found), groups.device)
    shared = [memory for each in kept.found.values() for memory in each.made]
    if kept.watched is None:  # other ranks of the stage may be on other machines, and share nothing
        share = any(each.hosts is not None for each in kept.found.values())
        told = torch.tensor([share, not kept.found], dtype=torch.int32, device=device)
        may, not_asked = _of_stage(told, groups)
        if not_asked and not may:
            return
        kept.watched = bool(may)
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


def _has_gpus(groups: FoldedGroups) -> bool:
    return groups.device.type == "cuda"


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
    missing = why_no_objects()
    if all_reduce_(torch.tensor([missing is not None], dtype=torch.int32, device=device), group, "max").item():
        return missing or "another rank cannot send Python objects: numpy is not installed there"
    machine = socket.gethostname() + _boot_id()
    place = (machine, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), device.index)
    everybody: list[Place] = gathered((reason or _why_other_memory(device), place), group)
    if (reason := why_apart(group.ranks, everybody)) is not None:
        return reason
    devices = [index for _, (*_, index) in everybody]
    apart = [peer for peer in devices if peer != device.index and not _reads(device.index, peer)]
    return _first_of(f"GPU {device.index} cannot read GPU {apart[0]}" if apart else "", group) or None


def why_apart(ranks: tuple[int, ...], everybody: list[Place]) -> str | None:
    """What keeps ranks from reading each other's memory, wherever their GPUs are in the machine."""
    for why, _ in everybody:
        if why is not None:
            return why
    machines, processes, visible, devices = (set(entries) for entries in zip(*(at for _, at in everybody), strict=True))
    if len(machines) > 1:
        return f"the ranks {ranks} are on several machines"
    if len(processes) < len(ranks):
        return f"of the ranks {ranks} some are threads of one process"
    if len(visible) > 1:  # numbers of devices mean nothing to each other
        return f"the ranks {ranks} see different GPUs: CUDA_VISIBLE_DEVICES is not the same on all"
    if len(devices) < len(ranks) and os.environ.get(_OVERLAPPING) != "1":
        return f"of the ranks {ranks} some share a GPU"
    return None


Place: TypeAlias = tuple[str | None, tuple[str, int, str | None, int]]
"""Of a rank: why it shares nothing; and its machine, its process, the GPUs that it sees, and the number of its own."""

_OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""With which torch shares memory between ranks on one GPU, for tests."""


def _why_other_memory(device: torch.device) -> str | None:
    """Why torch's symmetric memory is another one than what is used here."""
    from torch.distributed._symmetric_memory import get_backend

    backend = get_backend(device)
    return None if backend == "CUDA" else f"torch's symmetric memory is that of {backend} and not of CUDA"


def _reads(one: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(one, other)


def why_no_peers(device: torch.device) -> str | None:
    """Why a device can share no memory, whatever the other ranks have; ``None`` where it may. Asks nobody."""
    if device.type != "cuda":
        return f"it needs GPUs, and this is {device.type}"
    if torch.version.hip is not None:
        return "it was never run with ROCm"
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
