"""foldpar: parallel folding for Mixture-of-Experts models in PyTorch.

One set of ranks, partitioned twice: tensor parallelism for the dense layers, expert parallelism for the experts.

    layout = foldpar.solve_layout(world=8, tp=2, ep=4)      # integers only: no torch is loaded
    groups = foldpar.create_groups(layout)                  # process groups, under torchrun

Names load on first use, so ``import foldpar`` is light and everything about layouts works without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from foldpar import families as families

if TYPE_CHECKING:
    from foldpar.activations import ClampedSwiGLU, OwnActivation
    from foldpar.auxiliary import load_balancing_loss, router_z_loss
    from foldpar.balanced_router import BalancedRouter
    from foldpar.capacity import Capacity, limit_capacity
    from foldpar.checkpoint import CheckpointInfo, PendingSave, latest_checkpoint, load_checkpoint, save_checkpoint
    from foldpar.checks import assert_same_on_group, check_replicas
    from foldpar.collectives import (
        all_gather_rows,
        all_reduce,
        all_to_all_rows,
        copy_to_group,
        reduce_scatter_rows,
        scale_gradient,
        split_rows,
    )
    from foldpar.config import FoldingConfig
    from foldpar.correction_bias import update_correction_bias
    from foldpar.counters import CounterValues, LayerCounters
    from foldpar.dispatching import DispatchPlan, combine, dispatch, plan_dispatch
    from foldpar.errors import (
        ArgumentError,
        CheckpointError,
        CollectiveError,
        FamilyError,
        FoldingError,
        GradientError,
        GroupsError,
        LayoutError,
        ModelError,
        ReplicaError,
        ShapeError,
        ShardingError,
    )
    from foldpar.experts import GroupedExperts
    from foldpar.families import ParameterFamily, Reduction
    from foldpar.folded_experts import FoldedExperts
    from foldpar.folding import fold_model
    from foldpar.gradients import reduce_gradients
    from foldpar.groups import AxisGroup, FoldedGroups, create_groups
    from foldpar.lanes import LaneState
    from foldpar.layout import Coordinate, FoldedLayout, solve_layout
    from foldpar.marks import mark_parameters, parameter_families, parameter_groups
    from foldpar.memory import LocalParameter, RankMemory, planned_parameters, predict_memory
    from foldpar.models import ExpertWeights, MoEAdapter
    from foldpar.moe import FoldedMoE
    from foldpar.norms import clip_grad_norm_, get_total_norm
    from foldpar.onesided import OneSided
    from foldpar.placements import Placement, mark_placement, parameter_placements
    from foldpar.planner import FoldPlan, FoldPlanRow, plan_fold
    from foldpar.randomness import random_region, region_generator
    from foldpar.reducer import GradientReducer
    from foldpar.routing import Router, Routing, TopKRouter
    from foldpar.scaling import GradScaler
    from foldpar.selection import GroupLimit
    from foldpar.sharding import accumulate, shard_model
    from foldpar.stand_ins import lockstep
    from foldpar.steps import declare_reduced
    from foldpar.storage import ExpertStorage
    from foldpar.weights import load_weights, save_weights, whole_state_dict

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AxisGroup",
    "BalancedRouter",
    "Capacity",
    "CheckpointError",
    "CheckpointInfo",
    "ClampedSwiGLU",
    "CollectiveError",
    "Coordinate",
    "CounterValues",
    "DispatchPlan",
    "ExpertStorage",
    "ExpertWeights",
    "FamilyError",
    "FoldPlan",
    "FoldPlanRow",
    "FoldedExperts",
    "FoldedGroups",
    "FoldedLayout",
    "FoldedMoE",
    "FoldingConfig",
    "FoldingError",
    "GradScaler",
    "GradientError",
    "GradientReducer",
    "GroupLimit",
    "GroupedExperts",
    "GroupsError",
    "LaneState",
    "LayerCounters",
    "LayoutError",
    "LocalParameter",
    "MoEAdapter",
    "ModelError",
    "OneSided",
    "OwnActivation",
    "ParameterFamily",
    "PendingSave",
    "Placement",
    "RankMemory",
    "Reduction",
    "ReplicaError",
    "Router",
    "Routing",
    "ShapeError",
    "ShardingError",
    "TopKRouter",
    "accumulate",
    "all_gather_rows",
    "all_reduce",
    "all_to_all_rows",
    "assert_same_on_group",
    "check_replicas",
    "clip_grad_norm_",
    "combine",
    "copy_to_group",
    "create_groups",
    "declare_reduced",
    "dispatch",
    "fold_model",
    "get_total_norm",
    "latest_checkpoint",
    "limit_capacity",
    "load_balancing_loss",
    "load_checkpoint",
    "load_weights",
    "lockstep",
    "mark_parameters",
    "mark_placement",
    "parameter_families",
    "parameter_groups",
    "parameter_placements",
    "plan_dispatch",
    "plan_fold",
    "planned_parameters",
    "predict_memory",
    "random_region",
    "reduce_gradients",
    "reduce_scatter_rows",
    "region_generator",
    "router_z_loss",
    "save_checkpoint",
    "save_weights",
    "scale_gradient",
    "shard_model",
    "solve_layout",
    "split_rows",
    "update_correction_bias",
    "whole_state_dict",
]

# No public name may be the name of a module: importing the module would shadow it. tests/test_public_names.py holds it.
_NAMES_OF_MODULE = {
    "activations": ("ClampedSwiGLU", "OwnActivation"),
    "auxiliary": ("load_balancing_loss", "router_z_loss"),
    "balanced_router": ("BalancedRouter",),
    "capacity": ("Capacity", "limit_capacity"),
    "checkpoint": ("CheckpointInfo", "PendingSave", "latest_checkpoint", "load_checkpoint", "save_checkpoint"),
    "checks": ("assert_same_on_group", "check_replicas"),
    "collectives": (
        "all_gather_rows",
        "all_reduce",
        "all_to_all_rows",
        "copy_to_group",
        "reduce_scatter_rows",
        "scale_gradient",
        "split_rows",
    ),
    "config": ("FoldingConfig",),
    "correction_bias": ("update_correction_bias",),
    "counters": ("CounterValues", "LayerCounters"),
    "dispatching": ("DispatchPlan", "combine", "dispatch", "plan_dispatch"),
    "errors": (
        "ArgumentError",
        "CheckpointError",
        "CollectiveError",
        "FamilyError",
        "FoldingError",
        "GradientError",
        "GroupsError",
        "LayoutError",
        "ModelError",
        "ReplicaError",
        "ShapeError",
        "ShardingError",
    ),
    "experts": ("GroupedExperts",),
    "families": ("ParameterFamily", "Reduction"),
    "folded_experts": ("FoldedExperts",),
    "folding": ("fold_model",),
    "gradients": ("reduce_gradients",),
    "groups": ("AxisGroup", "FoldedGroups", "create_groups"),
    "lanes": ("LaneState",),
    "layout": ("Coordinate", "FoldedLayout", "solve_layout"),
    "marks": ("mark_parameters", "parameter_families", "parameter_groups"),
    "memory": ("LocalParameter", "RankMemory", "planned_parameters", "predict_memory"),
    "models": ("ExpertWeights", "MoEAdapter"),
    "moe": ("FoldedMoE",),
    "norms": ("clip_grad_norm_", "get_total_norm"),
    "onesided": ("OneSided",),
    "placements": ("Placement", "mark_placement", "parameter_placements"),
    "planner": ("FoldPlan", "FoldPlanRow", "plan_fold"),
    "randomness": ("random_region", "region_generator"),
    "reducer": ("GradientReducer",),
    "scaling": ("GradScaler",),
    "steps": ("declare_reduced",),
    "routing": ("Router", "Routing", "TopKRouter"),
    "selection": ("GroupLimit",),
    "sharding": ("accumulate", "shard_model"),
    "stand_ins": ("lockstep",),
    "storage": ("ExpertStorage",),
    "weights": ("load_weights", "save_weights", "whole_state_dict"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'foldpar' has no attribute {name!r}")
    value = getattr(import_module(f"foldpar.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value  # found once; the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
