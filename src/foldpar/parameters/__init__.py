"""What a parameter is: its family, its place, and what has been done to its gradient.

    marks         families are put on modules and parameters, and resolved for a whole model
    newcomers     what enters a model after folding is looked at first
    fsdp          what FSDP2 made of a parameter
    placements    which part of the whole tensor this rank holds, as boxes of indices
    boxes         those boxes
    tensors       all that a model holds, parameters and buffers, with this rank's share of each
    steps         whether a gradient was reduced, and whether an optimizer may step on it
    replicas      whether the copies of parameters are equal, now or before the first reduction
    kept_dtypes   parameters whose dtype is not to be narrowed
    whole_states  a state of the whole model, cut for this rank on load

Laws: every trainable parameter has exactly one family or is refused by name; a gradient is reduced once a step; the
parts of all ranks cover a tensor, each replica equal. No layer is known here.
"""

from __future__ import annotations

from foldpar.parameters.boxes import Box, Share, pieces, replaced_at
from foldpar.parameters.fsdp import (
    Stage,
    begin_trainable,
    bring_back_shards,
    computes_in_own_dtype,
    data_replicas,
    drop_zeroed_gradients,
    fsdp_modules,
    is_fsdp_module,
    is_sharded_over,
    leave_signs,
    record_shards,
    refuse_replaced,
    refuse_unreduced,
    sharded_module,
    shards_over_data,
)
from foldpar.parameters.kept_dtypes import keep_dtypes, kept_dtype
from foldpar.parameters.marks import (
    ResolvedParameter,
    explicitly_marked,
    families_seen_from,
    groups_of,
    mark_children,
    mark_of,
    mark_parameters,
    mark_what_is_here,
    nearest_marks,
    parameter_families,
    parameter_groups,
    resolve_parameters,
    tie_marks_to_names,
)
from foldpar.parameters.newcomers import base_of, greet_newcomers, when_greeted
from foldpar.parameters.placements import Placement, mark_placement, parameter_placements, plain_name
from foldpar.parameters.replicas import (
    check_before_reduction,
    check_replicas,
    compare_in_stage,
    parameter_settings,
)
from foldpar.parameters.steps import (
    declare_reduced,
    mark_replaced,
    refuse_gradient_hooks,
    refuse_reduced,
    refuse_unreduced_gradients,
    stamp,
    watch_optimizers,
)
from foldpar.parameters.tensors import Held, buffer_places, held_tensors
from foldpar.parameters.whole_states import take_shares_on_load

__all__ = [
    "Box",
    "Held",
    "Placement",
    "ResolvedParameter",
    "Share",
    "Stage",
    "base_of",
    "begin_trainable",
    "bring_back_shards",
    "buffer_places",
    "check_before_reduction",
    "check_replicas",
    "compare_in_stage",
    "computes_in_own_dtype",
    "data_replicas",
    "declare_reduced",
    "drop_zeroed_gradients",
    "explicitly_marked",
    "families_seen_from",
    "fsdp_modules",
    "greet_newcomers",
    "groups_of",
    "held_tensors",
    "is_fsdp_module",
    "is_sharded_over",
    "keep_dtypes",
    "kept_dtype",
    "leave_signs",
    "mark_children",
    "mark_of",
    "mark_parameters",
    "mark_placement",
    "mark_replaced",
    "mark_what_is_here",
    "nearest_marks",
    "parameter_families",
    "parameter_groups",
    "parameter_placements",
    "parameter_settings",
    "pieces",
    "plain_name",
    "record_shards",
    "refuse_gradient_hooks",
    "refuse_reduced",
    "refuse_replaced",
    "refuse_unreduced",
    "refuse_unreduced_gradients",
    "replaced_at",
    "resolve_parameters",
    "sharded_module",
    "shards_over_data",
    "stamp",
    "take_shares_on_load",
    "tie_marks_to_names",
    "watch_optimizers",
    "when_greeted",
]
