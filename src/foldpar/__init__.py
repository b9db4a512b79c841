"""foldpar: parallel folding for Mixture-of-Experts models in PyTorch.

One set of ranks, partitioned twice: tensor parallelism for the dense layers, expert parallelism for the experts.

    layout = foldpar.solve_layout(world=8, tp=2, ep=4)      # integers only: no torch is loaded
    groups = foldpar.create_groups(layout)                  # process groups, under torchrun

How a step flows through the wings, each with a face that says what is in it:

    layout       integers: who sits where
    comm         process groups for each axis, and collectives that say their backward
    moe          tokens -> router -> dispatch -> experts -> combine; in backward the same way back
    parameters   what each parameter is: its family, and which part of it lies here
    gradients    reduce_gradients reads families and layout -> clip -> the optimizer's step

Around it: ``models`` folds whole models, ``sharding`` puts FSDP2 on top, ``checkpoint`` and ``hf`` are files,
``planning`` chooses a layout, ``testing`` compares with one process.

Names load on first use, so ``import foldpar`` is light and everything about layouts works without torch.
"""

from importlib import import_module

from foldpar import families as families

__version__ = "0.1.0"

# Every public name, once, by the wing that shows it. __init__.pyi tells type checkers the same.
_NAMES = {
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
    "families": (
        "ParameterFamily",
        "Reduction",
    ),
    "layout": (
        "Coordinate",
        "FoldedLayout",
        "solve_layout",
    ),
    "layout.config": ("FoldingConfig",),  # not by the face, which import foldpar loads
    "comm": (
        "AxisGroup",
        "FoldedGroups",
        "all_gather_rows",
        "all_reduce",
        "all_to_all_rows",
        "assert_same_on_group",
        "copy_to_group",
        "create_groups",
        "reduce_scatter_rows",
        "scale_gradient",
        "split_rows",
    ),
    "parameters": (
        "Placement",
        "check_replicas",
        "declare_reduced",
        "mark_parameters",
        "mark_placement",
        "parameter_families",
        "parameter_groups",
        "parameter_placements",
    ),
    "gradients": (
        "GradScaler",
        "GradientReducer",
        "clip_grad_norm_",
        "get_total_norm",
        "reduce_gradients",
    ),
    "moe": (
        "BalancedRouter",
        "Capacity",
        "ClampedSwiGLU",
        "CounterValues",
        "DispatchPlan",
        "ExpertStorage",
        "FoldedExperts",
        "FoldedMoE",
        "GroupLimit",
        "GroupedExperts",
        "LaneState",
        "LayerCounters",
        "OneSided",
        "OwnActivation",
        "Router",
        "Routing",
        "TopKRouter",
        "combine",
        "dispatch",
        "limit_capacity",
        "load_balancing_loss",
        "lockstep",
        "plan_dispatch",
        "random_region",
        "region_generator",
        "router_z_loss",
        "update_correction_bias",
    ),
    "models": (
        "ExpertWeights",
        "FoldPlan",
        "FoldPlanRow",
        "MoEAdapter",
        "fold_model",
        "plan_fold",
    ),
    "planning": ("plan",),
    "sharding": (
        "LocalParameter",
        "RankMemory",
        "accumulate",
        "planned_parameters",
        "predict_memory",
        "shard_model",
    ),
    "checkpoint": (
        "CheckpointInfo",
        "PendingSave",
        "check_optimizer",
        "latest_checkpoint",
        "load_checkpoint",
        "save_checkpoint",
    ),
    "hf": (
        "load_weights",
        "save_weights",
        "whole_state_dict",
    ),
}
_WING_OF = {name: wing for wing, names in _NAMES.items() for name in names}

_WINGS = ("hf", "testing")
"""Those that texts name with their own names, such as ``foldpar.hf.export``."""

__all__ = sorted(_WING_OF)


def __getattr__(name: str) -> object:
    if name in _WINGS:
        return import_module(f"foldpar.{name}")
    if name not in _WING_OF:
        raise AttributeError(f"module 'foldpar' has no attribute {name!r}")
    value = getattr(import_module(f"foldpar.{_WING_OF[name]}"), name)
    globals()[name] = value  # found once; the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
