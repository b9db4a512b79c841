"""All that foldpar uses of torch's process groups under private names: making them in an order, under a name.

Everything here is the work of one function that torch keeps to itself, and of the tables that it keeps.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous
from typing_extensions import Self

__all__ = [
    "GroupFactory",
    "count_groups_anew",
    "default_store",
    "forget_meshes",
    "living_groups",
    "next_generation",
    "seconds_of",
    "start_from_environment",
]


@dataclass(frozen=True, slots=True)
class GroupFactory:
    """Makes process groups under names of our own, each on its members only.

    ``new_group(use_local_synchronization=True)`` names a group by its ranks and by how many groups the process has.
    Where those counts differ between ranks, the members look for each other under different names and hang; where a
    count comes back after a destroy, they find the store's entries of the group before, and hang too. Here all ranks
    agree beforehand on a store prefix that was never used. The price is one call of a function that torch keeps to
    itself, in :meth:`create` and nowhere else.

    The *name* is the same whenever the same ranks form a group again, because whatever keeps a mesh looks its groups
    up by name.
    """

    backend: str
    timeout: timedelta
    generation: int
    nonce: int
    device_type: str

    @classmethod
    def of_default_group(cls, backend: str | None, timeout: timedelta | None, generation: int, nonce: int) -> Self:
        default = distributed_c10d._get_default_group()
        config = backend or dist.get_backend_config()
        # Gloo registers itself for GPUs too, but whoever chose it alone works on the CPU.
        device_type = "cuda" if "nccl" in config and torch.cuda.is_available() else "cpu"
        own_backend = backend or distributed_c10d._world.pg_map[default][0]
        return cls(own_backend, timeout or _default_timeout(device_type), generation, nonce, device_type)

    def create(self, ranks: tuple[int, ...], own_axis: str = "") -> ProcessGroup:
        """The process group of these ranks, in this order; an axis that wants its own says its name."""
        default = distributed_c10d._get_default_group()
        members = list(ranks)
        digest = hashlib.sha1(repr(members).encode(), usedforsecurity=False).hexdigest()[:16]
        process_group, _ = distributed_c10d._new_process_group_helper(
            len(members),
            members.index(dist.get_rank()),
            members,
            distributed_c10d.Backend(self.backend),
            distributed_c10d.PrefixStore(f"foldpar-{self.nonce:x}", default_store()),
            cast(Any, f"foldpar-{self.generation}-{own_axis}{digest}"),
            timeout=self.timeout,
            device_id=default.bound_device_id,
            group_desc=f"foldpar {own_axis or 'shared'} {members[0]}..{members[-1]}",
        )
        distributed_c10d._world.pg_group_ranks[process_group] = {rank: place for place, rank in enumerate(members)}
        return cast(ProcessGroup, process_group)


def _default_timeout(device_type: str) -> timedelta:
    """The timeout that the default process group was made with."""
    return _timeout_of(distributed_c10d._get_default_group(), torch.device(device_type))


def _timeout_of(process_group: ProcessGroup, device: torch.device) -> timedelta:
    try:
        return process_group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):  # backends without options, such as those made for tests
        return distributed_c10d.default_pg_timeout


def seconds_of(process_group: ProcessGroup | None, device: torch.device) -> float:
    """How long its ranks wait for each other in its collectives on such a device."""
    if process_group is None:
        return distributed_c10d.default_pg_timeout.total_seconds()
    return _timeout_of(process_group, device).total_seconds()


def default_store() -> distributed_c10d.Store:
    """The store of the default process group."""
    return distributed_c10d._world.pg_map[distributed_c10d._get_default_group()][1]


def living_groups() -> dict[ProcessGroup, str]:
    """The process groups that exist on this rank, with their names, the default group apart."""
    world = distributed_c10d._world
    return {group: str(name) for group, name in world.pg_names.items() if group is not world.default_pg}


def start_from_environment(backend: str | None, timeout: timedelta | None) -> None:
    """``init_process_group`` of a rank of torchrun, also of one that was started again.

    Since torch 2.13 a torchrun that starts its ranks again lends them the store of those before, in which the addresses
    of these still lie: who reads one connects to nobody, and waits. So each start has a part of the store to itself.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if start is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    waiting: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    store, rank, size = next(iter(rendezvous("env://", **waiting)))
    own = distributed_c10d.PrefixStore(f"foldpar-start-{start}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)


def count_groups_anew() -> None:
    """Ranks that meet for the first time name their groups by a counter, which a start that failed has moved on."""
    if not dist.is_initialized():
        distributed_c10d._world.group_count = 0


def next_generation() -> int:
    """One more than the largest generation among the living groups of this rank, by their names."""
    names = living_groups().values()
    return max((int(name.split("-")[1]) + 1 for name in names if name.startswith("foldpar-")), default=0)


def forget_meshes(ended: Iterable[DeviceMesh] = ()) -> None:
    """Drop what DTensor remembers of operations: results that lie on meshes which may be gone.

    A mesh that compares equal, of these ranks under these names, would be given the remembered one, whoever made it: a
    mesh of other groups, or that of another library. Other memories of torch keep one mesh of each kind for ever; an
    ``ended`` one holds its communicators, and of gloo's their threads, no longer.
    """
    for mesh in ended:
        for part in (mesh, getattr(mesh, "_root_mesh", None)):
            getattr(part, "_pg_registry", {}).clear()  # since torch 2.13; only a compiler looks there
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()
