"""The layer: tokens to experts and back.

    layer           FoldedMoE: router, experts and what surrounds them
    folded_experts  the routed part alone, for a router of somebody else
    experts         GroupedExperts: this rank's share of the experts (``ExpertShare``, which ``FoldedExperts`` are too);
                    ``storage`` says how their weights lie
    lanes           what the lanes of a TP group hold, and what follows for gradients; ``lane_ends`` converts
    lane_checks     what a layer takes on trust, compared in its first step
    counters        what travelled, and how evenly; ``stand_ins``: a rank without data
    routing/        which expert gets which token: routers, selection, capacity, losses, balance, randomness
    transport/      the journey of rows: in messages, or read one-sided from other GPUs; ``whole`` is it for a
                    compiler, ``at_home`` where one rank has all experts
    operators       a function of tensors as one operator, whatever sizes are inside
    kernels/        products over groups of rows, permutations, activations

A token's way: ``layer`` -> ``routing.router`` -> ``transport.journey`` -> ``kernels.grouped`` -> ``transport.journey``.

Laws: output and gradients equal those of the dense layer that computes every expert for every token; a row travels once
to each rank that has one of its experts.
"""

from __future__ import annotations

from foldpar.moe.abilities import BIASED, Abilities
from foldpar.moe.counters import CounterValues, LayerCounters
from foldpar.moe.experts import ExpertShare, GroupedExperts
from foldpar.moe.folded_experts import FoldedExperts
from foldpar.moe.kernels.activations import (
    ELEMENTWISE,
    Activation,
    ClampedSwiGLU,
    OwnActivation,
    is_activation,
    is_gated,
    name_of,
)
from foldpar.moe.kernels.grouped import grouped_feed_forward, in_autocast_dtype
from foldpar.moe.kernels.permutation import Places, collect, pick, spread
from foldpar.moe.lane_checks import ModelChecks
from foldpar.moe.lanes import LaneState
from foldpar.moe.layer import FoldedMoE
from foldpar.moe.recomputation import in_backward
from foldpar.moe.routing.balanced_router import BalancedRouter
from foldpar.moe.routing.capacity import Capacity, limit_capacity
from foldpar.moe.routing.correction_bias import correction_bias_in, update_correction_bias
from foldpar.moe.routing.losses import load_balancing_loss, router_z_loss
from foldpar.moe.routing.randomness import random_region, region_generator
from foldpar.moe.routing.router import Router, Routing, TopKRouter
from foldpar.moe.routing.selection import GroupLimit
from foldpar.moe.stand_ins import lockstep
from foldpar.moe.storage import ExpertStorage
from foldpar.moe.transport.journey import Journey
from foldpar.moe.transport.messages import DispatchPlan, Partition, combine, dispatch, plan_dispatch
from foldpar.moe.transport.one_sided import OneSided, Sharing, as_expected

__all__ = [
    "BIASED",
    "ELEMENTWISE",
    "Abilities",
    "Activation",
    "BalancedRouter",
    "Capacity",
    "ClampedSwiGLU",
    "CounterValues",
    "DispatchPlan",
    "ExpertShare",
    "ExpertStorage",
    "FoldedExperts",
    "FoldedMoE",
    "GroupLimit",
    "GroupedExperts",
    "Journey",
    "LaneState",
    "LayerCounters",
    "ModelChecks",
    "OneSided",
    "OwnActivation",
    "Partition",
    "Places",
    "Router",
    "Routing",
    "Sharing",
    "TopKRouter",
    "as_expected",
    "collect",
    "combine",
    "correction_bias_in",
    "dispatch",
    "grouped_feed_forward",
    "in_autocast_dtype",
    "in_backward",
    "is_activation",
    "is_gated",
    "limit_capacity",
    "load_balancing_loss",
    "lockstep",
    "name_of",
    "pick",
    "plan_dispatch",
    "random_region",
    "region_generator",
    "router_z_loss",
    "spread",
    "update_correction_bias",
]
