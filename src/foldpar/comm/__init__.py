"""What ranks say to each other, and nothing of what it means: the only wing with process groups and collectives.

    groups       FoldedGroups: a process group for every axis of a layout, made once, passed as an argument
    collectives  differentiable blocks with a stated backward, and plain sums and gathers
    agreement    whether values that must be equal on several ranks are; ``first_step``: when that is asked
    c10d         every private name of torch's process groups
    dtensors     torch's DTensor and meshes: how a parameter lies on ranks, their private names
    peers        memory that the GPUs of a group read from each other; ``host_meeting``: where their hosts agree
    world        all ranks of a job over Gloo, for files

Laws: a backward is the transpose of its forward, or says which factor it adds; whatever can be refused is refused on
every rank before a collective.
"""

from __future__ import annotations

from foldpar.comm.agreement import (
    assert_same_on_group,
    checksum,
    compare_settings,
    differences,
    digest,
    digest_of_bits,
)
from foldpar.comm.c10d import count_groups_anew, living_groups
from foldpar.comm.collectives import (
    all_gather,
    all_gather_rows,
    all_reduce,
    all_reduce_,
    all_to_all_rows,
    copy_to_group,
    even_row_counts,
    exchange_rows,
    gather_rows,
    reduce_scatter_rows,
    scale_gradient,
    scatter_sum_rows,
    split_rows,
    start_all_reduce,
)
from foldpar.comm.dtensors import (
    MeshAxes,
    MeshDim,
    adopt,
    communication_device,
    converted,
    data_was_assigned,
    distributed_parameter,
    is_dtensor,
    is_sharding,
    local_parts,
    local_tensor,
    opened,
    own_part,
    partial_dimension,
    placed_as,
    placed_like,
    refuse_foreign_scalers,
    version_of,
    versions_of,
)
from foldpar.comm.first_step import When, can_compare
from foldpar.comm.groups import AxisGroup, FoldedGroups, Kept, create_groups
from foldpar.comm.once import once_differentiable
from foldpar.comm.peers import DeviceMemories, PeerMemory, await_peers, check_room, memories_of, why_no_peers
from foldpar.comm.world import Ranks, attempt, raise_interruption, told

__all__ = [
    "AxisGroup",
    "DeviceMemories",
    "FoldedGroups",
    "Kept",
    "MeshAxes",
    "MeshDim",
    "PeerMemory",
    "Ranks",
    "When",
    "adopt",
    "all_gather",
    "all_gather_rows",
    "all_reduce",
    "all_reduce_",
    "all_to_all_rows",
    "assert_same_on_group",
    "attempt",
    "await_peers",
    "can_compare",
    "check_room",
    "checksum",
    "communication_device",
    "compare_settings",
    "converted",
    "copy_to_group",
    "count_groups_anew",
    "create_groups",
    "data_was_assigned",
    "differences",
    "digest",
    "digest_of_bits",
    "distributed_parameter",
    "even_row_counts",
    "exchange_rows",
    "gather_rows",
    "is_dtensor",
    "is_sharding",
    "living_groups",
    "local_parts",
    "local_tensor",
    "memories_of",
    "once_differentiable",
    "opened",
    "own_part",
    "partial_dimension",
    "placed_as",
    "placed_like",
    "raise_interruption",
    "reduce_scatter_rows",
    "refuse_foreign_scalers",
    "scale_gradient",
    "scatter_sum_rows",
    "split_rows",
    "start_all_reduce",
    "told",
    "version_of",
    "versions_of",
    "why_no_peers",
]
