"""Swapped and wrong arguments, over the public names: each is refused by foldpar, in words, and none in silence."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import tiny_model
from torch import nn

import foldpar
from foldpar.errors import ArgumentError, FoldingError

L: Any = foldpar.solve_layout(1)
g: Any = foldpar.create_groups(L)
lin: Any = foldpar.mark_parameters(nn.Linear(4, 4), foldpar.families.REPLICATED)
hub: Any = tiny_model("qwen3_moe")
router: Any = foldpar.TopKRouter(8, 8, 2)
experts: Any = foldpar.GroupedExperts(8, 8, 8, g)
moe: Any = foldpar.FoldedMoE(router, experts, g)
x, w, ids = torch.randn(3, 8), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.long)
r, plan = router(x), foldpar.plan_dispatch(ids, g, num_experts=8)


class Gives(nn.Module):
    """A router that gives something else."""

    def __init__(self, what: object) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> object:
        return self.what


def tuple_router() -> Any:
    return Gives((ids, w))


def tensor_router() -> Any:
    return Gives(x)


def none_router() -> Any:
    return Gives(None)


def bad_routing(**parts: Any) -> Any:
    return Gives(foldpar.Routing(**{"ids": ids, "weights": w, **parts}))


BAD: list[tuple[str, Callable[[], object]]] = [
    ("solve_layout str", lambda: foldpar.solve_layout("8")),
    ("solve_layout none", lambda: foldpar.solve_layout(None)),
    ("solve_layout float", lambda: foldpar.solve_layout(8.5)),
    ("solve_layout neg", lambda: foldpar.solve_layout(-8)),
    ("solve_layout 0", lambda: foldpar.solve_layout(0)),
    ("solve_layout tp0", lambda: foldpar.solve_layout(8, tp=0)),
    ("solve_layout tp str", lambda: foldpar.solve_layout(8, tp="2")),
    ("solve_layout tp neg", lambda: foldpar.solve_layout(8, tp=-2)),
    ("solve_layout order", lambda: foldpar.solve_layout(8, order="x")),
    ("FoldedLayout str", lambda: foldpar.FoldedLayout("8")),
    ("FoldedLayout groups", lambda: foldpar.FoldedLayout(g)),
    ("layout.group axis", lambda: L.group("xx", 0)),
    ("layout.group rank", lambda: L.group("tp", 5)),
    ("layout.group rank str", lambda: L.group("tp", "0")),
    ("layout.coordinate", lambda: L.coordinate("0")),
    ("layout.coordinate neg", lambda: L.coordinate(-1)),
    ("layout.rank_at", lambda: L.rank_at("xx", 0)),
    ("layout.rank_at pos", lambda: L.rank_at("expert", 7)),
    ("layout.size", lambda: L.size("xx")),
    ("create_groups int", lambda: foldpar.create_groups(8)),
    ("create_groups groups", lambda: foldpar.create_groups(g)),
    ("create_groups none", lambda: foldpar.create_groups(None)),
    ("create_groups backend", lambda: foldpar.create_groups(L, backend="xx")),
    ("create_groups backend int", lambda: foldpar.create_groups(L, backend=3)),
    ("create_groups timeout", lambda: foldpar.create_groups(L, timeout=3)),
    ("create_groups timeout str", lambda: foldpar.create_groups(L, timeout="3")),
    ("create_groups separate bad", lambda: foldpar.create_groups(L, separate=("xx",))),
    ("create_groups separate int", lambda: foldpar.create_groups(L, separate=3)),
    ("AxisGroup", lambda: foldpar.AxisGroup("tp", 3, 0, None)),
    ("AxisGroup idx", lambda: foldpar.AxisGroup("tp", (0,), 3, None)),
    ("groups.axis", lambda: g.axis(3)),
    ("groups.mesh", lambda: g.mesh("xx")),
    ("plan_fold groups", lambda: foldpar.plan_fold(hub, g)),
    ("plan_fold swapped", lambda: foldpar.plan_fold(L, hub)),
    ("plan_fold str", lambda: foldpar.plan_fold("name", L)),
    ("plan_fold none", lambda: foldpar.plan_fold(None, L)),
    ("plan_fold adapters one", lambda: foldpar.plan_fold(hub, L, adapters=foldpar.MoEAdapter("X"))),
    ("plan_fold adapters str", lambda: foldpar.plan_fold(hub, L, adapters="X")),
    ("plan_fold adapters strs", lambda: foldpar.plan_fold(hub, L, adapters=("X",))),
    ("fold_model layout", lambda: foldpar.fold_model(hub, L)),
    ("fold_model str", lambda: foldpar.fold_model("name", g)),
    ("fold_model swapped", lambda: foldpar.fold_model(g, hub)),
    ("fold_model none", lambda: foldpar.fold_model(hub, None)),
    ("fold_model partition", lambda: foldpar.fold_model(tiny_model("qwen3_moe"), g, partition="x")),
    ("fold_model one_sided", lambda: foldpar.fold_model(tiny_model("qwen3_moe"), g, one_sided=100)),
    ("fold_model check", lambda: foldpar.fold_model(tiny_model("qwen3_moe"), g, check="x")),
    (
        "fold_model adapters one",
        lambda: foldpar.fold_model(tiny_model("qwen3_moe"), g, adapters=foldpar.MoEAdapter("X")),
    ),
    ("MoE swapped", lambda: foldpar.FoldedMoE(experts, router, g)),
    ("MoE no groups", lambda: foldpar.FoldedMoE(router, experts, L)),
    ("MoE none groups", lambda: foldpar.FoldedMoE(router, experts, None)),
    ("MoE groups first", lambda: foldpar.FoldedMoE(g, router, experts)),
    ("MoE none router", lambda: foldpar.FoldedMoE(None, experts, g)),
    ("MoE linear experts", lambda: foldpar.FoldedMoE(router, nn.Linear(8, 8), g)),
    ("MoE list experts", lambda: foldpar.FoldedMoE(router, [nn.Linear(8, 8)], g)),
    ("MoE shared", lambda: foldpar.FoldedMoE(router, experts, g, shared=3)),
    ("MoE shared tensor", lambda: foldpar.FoldedMoE(router, experts, g, shared=x)),
    ("MoE lanes", lambda: foldpar.FoldedMoE(router, experts, g, lanes="x")),
    ("MoE lanes none", lambda: foldpar.FoldedMoE(router, experts, g, lanes=None)),
    ("MoE capacity float", lambda: foldpar.FoldedMoE(router, experts, g, capacity=1.25)),
    ("MoE counters true", lambda: foldpar.FoldedMoE(router, experts, g, counters=True)),
    ("MoE one_sided true", lambda: foldpar.FoldedMoE(router, experts, g, one_sided=True)),
    ("FoldedExperts one_sided true", lambda: foldpar.FoldedExperts(8, 16, 32, g, one_sided=True)),
    ("MoE one_sided int", lambda: foldpar.FoldedMoE(router, experts, g, one_sided=100)),
    ("MoE tuple router", lambda: foldpar.FoldedMoE(tuple_router(), experts, g)(x)),
    ("MoE tensor router", lambda: foldpar.FoldedMoE(tensor_router(), experts, g)(x)),
    ("MoE none router out", lambda: foldpar.FoldedMoE(none_router(), experts, g)(x)),
    ("MoE bad routing ids float", lambda: foldpar.FoldedMoE(bad_routing(ids=w), experts, g)(x)),
    ("MoE bad routing weights int", lambda: foldpar.FoldedMoE(bad_routing(weights=ids), experts, g)(x)),
    ("MoE bad routing ids none", lambda: foldpar.FoldedMoE(bad_routing(ids=None), experts, g)(x)),
    ("MoE bad routing weights none", lambda: foldpar.FoldedMoE(bad_routing(weights=None), experts, g)(x)),
    ("MoE bad routing rows", lambda: foldpar.FoldedMoE(bad_routing(ids=ids[:2], weights=w[:2]), experts, g)(x)),
    ("MoE bad routing mask", lambda: foldpar.FoldedMoE(bad_routing(mask=w), experts, g)(x)),
    ("MoE id range", lambda: foldpar.FoldedMoE(bad_routing(ids=ids + 8), experts, g)(x)),
    ("MoE id neg", lambda: foldpar.FoldedMoE(bad_routing(ids=ids - 1), experts, g)(x)),
    ("MoE x list", lambda: moe([1, 2])),
    ("MoE x none", lambda: moe(None)),
    ("MoE x int tensor", lambda: moe(torch.zeros(3, 8, dtype=torch.long))),
    ("MoE x width", lambda: moe(torch.zeros(3, 7))),
    ("MoE ids list", lambda: moe(x, ids=[[0, 1]] * 3)),
    ("MoE ids float", lambda: moe(x, ids=w)),
    ("MoE ids range", lambda: moe(x, ids=ids + 9)),
    ("MoE padding int", lambda: moe(x, padding=torch.zeros(3))),
    ("MoE padding list", lambda: moe(x, padding=[False] * 3)),
    (
        "from_dense mixed",
        lambda: foldpar.FoldedMoE.from_dense(
            router, torch.zeros(8, 16, 8), torch.zeros(8, 8, 8, dtype=torch.float64), g
        ),
    ),
    (
        "from_dense mixed bias",
        lambda: foldpar.FoldedMoE.from_dense(
            router,
            torch.zeros(8, 16, 8),
            torch.zeros(8, 8, 8),
            g,
            down_bias=torch.zeros(8, 8, dtype=torch.float64),
            gate_up_bias=torch.zeros(8, 16),
        ),
    ),
    (
        "from_dense swapped",
        lambda: foldpar.FoldedMoE.from_dense(torch.zeros(8, 16, 8), torch.zeros(8, 8, 8), router, g),
    ),
    ("from_dense swapped w", lambda: foldpar.GroupedExperts.from_dense(torch.zeros(8, 8, 6), torch.zeros(8, 12, 8), g)),
    ("from_dense list", lambda: foldpar.GroupedExperts.from_dense([torch.zeros(8, 8)], [torch.zeros(8, 8)], g)),
    ("from_dense layout", lambda: foldpar.GroupedExperts.from_dense(torch.zeros(8, 16, 8), torch.zeros(8, 8, 8), L)),
    (
        "from_dense int",
        lambda: foldpar.GroupedExperts.from_dense(
            torch.zeros(8, 16, 8, dtype=torch.long), torch.zeros(8, 8, 8, dtype=torch.long), g
        ),
    ),
    (
        "from_dense option",
        lambda: foldpar.FoldedMoE.from_dense(router, torch.zeros(8, 16, 8), torch.zeros(8, 8, 8), g, lane="x"),
    ),
    ("GE 0", lambda: foldpar.GroupedExperts(8, 0, 4, g)),
    ("GE neg", lambda: foldpar.GroupedExperts(8, -8, 4, g)),
    ("GE h0", lambda: foldpar.GroupedExperts(8, 8, 0, g)),
    ("GE e0", lambda: foldpar.GroupedExperts(0, 8, 4, g)),
    ("GE e neg", lambda: foldpar.GroupedExperts(-8, 8, 4, g)),
    ("GE float", lambda: foldpar.GroupedExperts(8, 8.0, 4, g)),
    ("GE groups first", lambda: foldpar.GroupedExperts(g, 8, 8, 4)),
    ("GE layout", lambda: foldpar.GroupedExperts(8, 8, 4, L)),
    ("GE none", lambda: foldpar.GroupedExperts(8, 8, 4, None)),
    ("GE act", lambda: foldpar.GroupedExperts(8, 8, 4, g, activation="x")),
    ("GE act fn", lambda: foldpar.GroupedExperts(8, 8, 4, g, activation=torch.relu)),
    ("GE dtype int", lambda: foldpar.GroupedExperts(8, 8, 4, g, dtype=torch.int64)),
    ("GE dtype str", lambda: foldpar.GroupedExperts(8, 8, 4, g, dtype="float32")),
    ("GE storage", lambda: foldpar.GroupedExperts(8, 8, 4, g, storage="x")),
    ("GE call counts", lambda: experts(x, torch.tensor([1, 2]))),
    ("GE call list", lambda: experts(x, [3] + [0] * 7)),
    ("FE call swapped", lambda: foldpar.FoldedExperts(8, 8, 8, g)(x, w, ids)),
    ("FE call none", lambda: foldpar.FoldedExperts(8, 8, 8, g)(x, None, w)),
    ("FE check", lambda: foldpar.FoldedExperts(8, 8, 8, g, check=3)),
    ("FE lanes", lambda: foldpar.FoldedExperts(8, 8, 8, g, lanes="x")),
    ("FE neg", lambda: foldpar.FoldedExperts(8, -8, 8, g)),
    ("TKR 0", lambda: foldpar.TopKRouter(0, 8, 2)),
    ("TKR neg", lambda: foldpar.TopKRouter(-8, 8, 2)),
    ("TKR topk0", lambda: foldpar.TopKRouter(8, 8, 0)),
    ("TKR topk float", lambda: foldpar.TopKRouter(8, 8, 2.0)),
    ("TKR str", lambda: foldpar.TopKRouter("8", 8, 2)),
    ("TKR scaling str", lambda: foldpar.TopKRouter(8, 8, 2, scaling_factor="x")),
    ("TKR scaling nan", lambda: foldpar.TopKRouter(8, 8, 2, scaling_factor=float("nan"))),
    ("TKR jitter str", lambda: foldpar.TopKRouter(8, 8, 2, jitter="x")),
    ("TKR group limit tuple", lambda: foldpar.TopKRouter(8, 8, 2, group_limit=(2, 1))),
    ("TKR router_dtype", lambda: foldpar.TopKRouter(8, 8, 2, router_dtype=torch.int32)),
    ("TKR call width", lambda: router(torch.zeros(3, 7))),
    ("TKR call 3d", lambda: router(torch.zeros(2, 3, 8))),
    ("TKR call list", lambda: router([1])),
    ("GroupLimit 0", lambda: foldpar.GroupLimit(0, 1)),
    ("GroupLimit str", lambda: foldpar.GroupLimit("2", 1)),
    ("GroupLimit kind", lambda: foldpar.GroupLimit(2, 1, "x")),
    ("Capacity 0", lambda: foldpar.Capacity(0)),
    ("Capacity neg", lambda: foldpar.Capacity(-1.0)),
    ("Capacity str", lambda: foldpar.Capacity("1")),
    ("Capacity nan", lambda: foldpar.Capacity(float("nan"))),
    ("OneSided 0", lambda: foldpar.OneSided(0)),
    ("OneSided neg", lambda: foldpar.OneSided(-1)),
    ("OneSided str", lambda: foldpar.OneSided("1")),
    ("LaneState layout", lambda: foldpar.LaneState(L)),
    ("LaneState lanes", lambda: foldpar.LaneState(g, "x")),
    ("split_rows layout", lambda: foldpar.split_rows(x, L, backward="zero_pad")),
    ("split_rows groups", lambda: foldpar.split_rows(x, g, backward="zero_pad")),
    ("split_rows swapped", lambda: foldpar.split_rows(g.tp, x, backward="zero_pad")),
    ("split_rows backward", lambda: foldpar.split_rows(x, g.tp, backward="x")),
    ("split_rows scalar", lambda: foldpar.split_rows(torch.tensor(1.0), g.tp, backward="zero_pad")),
    ("split_rows list", lambda: foldpar.split_rows([1], g.tp, backward="zero_pad")),
    ("all_gather_rows groups", lambda: foldpar.all_gather_rows(x, g, backward="slice")),
    ("all_gather_rows counts", lambda: foldpar.all_gather_rows(x, g.tp, row_counts=[1], backward="slice")),
    ("all_gather_rows counts int", lambda: foldpar.all_gather_rows(x, g.tp, row_counts=3, backward="slice")),
    ("reduce_scatter_rows groups", lambda: foldpar.reduce_scatter_rows(x, g)),
    ("reduce_scatter_rows none", lambda: foldpar.reduce_scatter_rows(None, g.tp)),
    ("all_reduce groups", lambda: foldpar.all_reduce(x, g, backward="sum")),
    ("all_reduce backward", lambda: foldpar.all_reduce(x, g.tp, backward="x")),
    ("all_reduce float", lambda: foldpar.all_reduce(1.0, g.tp, backward="sum")),
    ("all_to_all groups", lambda: foldpar.all_to_all_rows(x, [3], [3], g)),
    ("all_to_all counts", lambda: foldpar.all_to_all_rows(x, [2], [2], g.tp)),
    ("all_to_all neg", lambda: foldpar.all_to_all_rows(x, [-3], [-3], g.tp)),
    ("copy_to_group groups", lambda: foldpar.copy_to_group(x, g)),
    ("copy_to_group float", lambda: foldpar.copy_to_group(1.0, g.tp)),
    ("scale_gradient str", lambda: foldpar.scale_gradient(x, "2")),
    ("scale_gradient nan", lambda: foldpar.scale_gradient(x, float("nan"))),
    ("scale_gradient list", lambda: foldpar.scale_gradient([1], 2)),
    ("plan_dispatch layout", lambda: foldpar.plan_dispatch(ids, L, num_experts=8)),
    ("plan_dispatch swapped", lambda: foldpar.plan_dispatch(g, ids, num_experts=8)),
    ("plan_dispatch 0", lambda: foldpar.plan_dispatch(ids, g, num_experts=0)),
    ("plan_dispatch neg", lambda: foldpar.plan_dispatch(ids, g, num_experts=-8)),
    ("plan_dispatch str", lambda: foldpar.plan_dispatch(ids, g, num_experts="8")),
    ("plan_dispatch list", lambda: foldpar.plan_dispatch([[0]], g, num_experts=8)),
    ("plan_dispatch part", lambda: foldpar.plan_dispatch(ids, g, num_experts=8, partition="x")),
    ("plan_dispatch mask list", lambda: foldpar.plan_dispatch(ids, g, num_experts=8, mask=[1])),
    ("dispatch swapped", lambda: foldpar.dispatch(plan, x)),
    ("dispatch none", lambda: foldpar.dispatch(x, None)),
    ("dispatch rows", lambda: foldpar.dispatch(x[:2], plan)),
    ("combine swapped", lambda: foldpar.combine(w, x, plan)),
    ("combine none", lambda: foldpar.combine(x, w, None)),
    ("combine rows", lambda: foldpar.combine(x, w, plan)),
    ("mark none", lambda: foldpar.mark_parameters(lin, None)),
    ("mark str", lambda: foldpar.mark_parameters(lin, "replicated")),
    ("mark swapped", lambda: foldpar.mark_parameters(foldpar.families.REPLICATED, lin)),
    ("mark names", lambda: foldpar.mark_parameters(nn.Linear(2, 2), foldpar.families.REPLICATED, names=("nope",))),
    ("families params", lambda: foldpar.parameter_families(lin.parameters(), g)),
    ("families layout", lambda: foldpar.parameter_families(lin, L)),
    ("families swapped", lambda: foldpar.parameter_families(g, lin)),
    ("parameter_groups params", lambda: foldpar.parameter_groups(list(lin.parameters()))),
    ("parameter_groups none", lambda: foldpar.parameter_groups(None)),
    ("groups decay str", lambda: foldpar.parameter_groups(lin, weight_decay="0.1")),
    ("groups decay neg", lambda: foldpar.parameter_groups(lin, weight_decay=-1)),
    ("groups no_decay alone", lambda: foldpar.parameter_groups(lin, no_decay=lambda name, parameter: True)),
    ("groups no_decay list", lambda: foldpar.parameter_groups(lin, weight_decay=0.1, no_decay=["bias"])),
    ("lockstep none", lambda: foldpar.lockstep(lin, None, like=None).__enter__()),
    ("lockstep swapped", lambda: foldpar.lockstep(x, lin, like=x).__enter__()),
    ("reduce params", lambda: foldpar.reduce_gradients(lin.parameters(), g)),
    ("reduce layout", lambda: foldpar.reduce_gradients(lin, L)),
    ("reduce swapped", lambda: foldpar.reduce_gradients(g, lin)),
    ("reduce loss", lambda: foldpar.reduce_gradients(lin, g, loss="x")),
    ("reduce dtype", lambda: foldpar.reduce_gradients(lin, g, reduce_dtype="float32")),
    ("reduce dtype int", lambda: foldpar.reduce_gradients(lin, g, reduce_dtype=torch.int32)),
    ("reduce check", lambda: foldpar.reduce_gradients(lin, g, check="x")),
    ("clip params", lambda: foldpar.clip_grad_norm_(lin.parameters(), 1.0, g)),
    ("clip swapped", lambda: foldpar.clip_grad_norm_(lin, g, 1.0)),
    ("clip layout", lambda: foldpar.clip_grad_norm_(lin, 1.0, L)),
    ("clip neg", lambda: foldpar.clip_grad_norm_(lin, -1.0, g)),
    ("clip nan", lambda: foldpar.clip_grad_norm_(lin, float("nan"), g)),
    ("clip str", lambda: foldpar.clip_grad_norm_(lin, "1", g)),
    ("clip norm_type str", lambda: foldpar.clip_grad_norm_(lin, 1.0, g, norm_type="x")),
    ("clip norm_type 0", lambda: foldpar.clip_grad_norm_(lin, 1.0, g, norm_type=0)),
    ("norm params", lambda: foldpar.get_total_norm(lin.parameters(), g)),
    ("norm layout", lambda: foldpar.get_total_norm(lin, L)),
    ("norm nan", lambda: foldpar.get_total_norm(lin, g, norm_type=float("nan"))),
    ("check_replicas params", lambda: foldpar.check_replicas(lin.parameters(), g)),
    ("check_replicas layout", lambda: foldpar.check_replicas(lin, L)),
    ("assert_same groups", lambda: foldpar.assert_same_on_group(x, g)),
    ("assert_same list", lambda: foldpar.assert_same_on_group([x], g.tp)),
    ("assert_same float", lambda: foldpar.assert_same_on_group({"a": 1.0}, g.tp)),
    ("declare_reduced params", lambda: foldpar.declare_reduced(lin.parameters())),
    ("Reducer params", lambda: foldpar.GradientReducer(lin.parameters(), g)),
    ("Reducer layout", lambda: foldpar.GradientReducer(lin, L)),
    ("Reducer bytes 0", lambda: foldpar.GradientReducer(lin, g, bucket_bytes=0)),
    ("Reducer bytes neg", lambda: foldpar.GradientReducer(lin, g, bucket_bytes=-1)),
    ("Reducer bytes str", lambda: foldpar.GradientReducer(lin, g, bucket_bytes="1")),
    ("shard layout", lambda: foldpar.shard_model(lin, L, stage=1)),
    ("shard stage", lambda: foldpar.shard_model(lin, g, stage=7)),
    ("shard stage str", lambda: foldpar.shard_model(lin, g, stage="3")),
    ("shard str", lambda: foldpar.shard_model("x", g, stage=1)),
    ("accumulate params", lambda: foldpar.accumulate(lin.parameters()).__enter__()),
    ("placements layout", lambda: foldpar.parameter_placements(lin, L)),
    ("placements params", lambda: foldpar.parameter_placements(lin.parameters(), g)),
    ("limit_capacity", lambda: foldpar.limit_capacity(r, g, foldpar.Capacity(1.0), num_experts=8)),
    ("limit_capacity float", lambda: foldpar.limit_capacity(r, moe.lane_state, 1.0, num_experts=8)),
    (
        "limit_capacity tuple",
        lambda: foldpar.limit_capacity((ids, w), moe.lane_state, foldpar.Capacity(1.0), num_experts=8),
    ),
    ("lb loss groups", lambda: foldpar.load_balancing_loss(r, g)),
    ("lb loss tuple", lambda: foldpar.load_balancing_loss((ids, w), moe.lane_state)),
    ("lb scope", lambda: foldpar.load_balancing_loss(r, moe.lane_state, scope="x")),
    ("z loss groups", lambda: foldpar.router_z_loss(r, g)),
    ("z loss tensor", lambda: foldpar.router_z_loss(x, moe.lane_state)),
    ("bias params", lambda: foldpar.update_correction_bias(lin.parameters())),
    ("bias rate str", lambda: foldpar.update_correction_bias(moe, rate="x")),
    ("random_region", lambda: foldpar.random_region("x", g.coordinate).__enter__()),
    ("random_region groups", lambda: foldpar.random_region("replicated", g).__enter__()),
    ("Config str", lambda: foldpar.FoldingConfig(tp="2")),
    ("Config 0", lambda: foldpar.FoldingConfig(tp=0)),
    ("Config json", lambda: foldpar.FoldingConfig.from_json("{")),
    ("Config layout world", lambda: foldpar.FoldingConfig(tp=2).layout("8")),
    ("mark_placement", lambda: foldpar.mark_placement(lin, None)),
    ("save_weights model first", lambda: foldpar.save_weights(lin, "w", g)),
    ("save_weights layout", lambda: foldpar.save_weights("w", lin, L)),
    ("save_weights 0", lambda: foldpar.save_weights("w", lin, g, buffer_bytes=0)),
    ("save_weights float", lambda: foldpar.save_weights("w", lin, g, max_shard_bytes=5e9 + 0.5)),
    ("load_weights parameters", lambda: foldpar.load_weights("w", lin.parameters(), g)),
    ("load_weights dict", lambda: foldpar.load_weights(lin.state_dict(), lin, g)),
    ("whole_state_dict swapped", lambda: foldpar.whole_state_dict(g, lin)),
    ("MoEAdapter int", lambda: foldpar.MoEAdapter(3)),
    ("MoEAdapter empty", lambda: foldpar.MoEAdapter("")),
    ("MoEAdapter routers str", lambda: foldpar.MoEAdapter("X", routers="gate")),
    ("MoEAdapter storage", lambda: foldpar.MoEAdapter("X", storage="transposed")),
    ("MoEAdapter weights", lambda: foldpar.MoEAdapter("X", weights=foldpar.ExpertWeights(x, x))),
    ("MoEAdapter tp_plan", lambda: foldpar.MoEAdapter("X", tp_plan=("q_proj", "colwise"))),
    ("ExpertWeights list", lambda: foldpar.ExpertWeights([x], [x])),
    ("ExpertWeights none", lambda: foldpar.ExpertWeights(x, None)),
    ("ExpertWeights module", lambda: foldpar.ExpertWeights(lin, lin)),
    ("ExpertWeights bias", lambda: foldpar.ExpertWeights(x, x, True)),
    ("ExpertStorage str", lambda: foldpar.ExpertStorage("transposed")),
    ("ExpertStorage int", lambda: foldpar.ExpertStorage(True, 2)),
    ("ExpertStorage name", lambda: foldpar.ExpertStorage(gate_up=None)),
    ("ExpertStorage bias", lambda: foldpar.ExpertStorage(down_bias=True)),
    ("ClampedSwiGLU str", lambda: foldpar.ClampedSwiGLU("1.7")),
    ("ClampedSwiGLU 0", lambda: foldpar.ClampedSwiGLU(limit=0)),
    ("ClampedSwiGLU neg", lambda: foldpar.ClampedSwiGLU(limit=-7.0)),
    ("ClampedSwiGLU nan", lambda: foldpar.ClampedSwiGLU(alpha=float("nan"))),
    ("ClampedSwiGLU none", lambda: foldpar.ClampedSwiGLU(limit=None)),
    ("OwnActivation str", lambda: foldpar.OwnActivation("silu", "gate")),
    ("OwnActivation form", lambda: foldpar.OwnActivation(torch.tanh, "up")),
    ("OwnActivation form none", lambda: foldpar.OwnActivation(torch.tanh, None)),
    ("OwnActivation tensor", lambda: foldpar.OwnActivation(x, "gate")),
    ("check_optimizer model", lambda: foldpar.check_optimizer(lin, lin, g)),
    ("check_optimizer layout", lambda: foldpar.check_optimizer(lin, torch.optim.SGD(lin.parameters()), L)),
    ("check_optimizer none", lambda: foldpar.check_optimizer(lin, None, g)),
    ("whole_state_dict int", lambda: foldpar.whole_state_dict(lin, g, on=0)),
]
RAW = (AttributeError, KeyError, IndexError, ZeroDivisionError, AssertionError, NameError)
ELSEWHERE = {
    "checkpoints": {
        "CheckpointError",
        "CheckpointInfo",
        "PendingSave",
        "save_checkpoint",
        "load_checkpoint",
        "latest_checkpoint",
    },
    "what is read, not made": {
        "CounterValues",
        "DispatchPlan",
        "FoldPlan",
        "FoldPlanRow",
        "LocalParameter",
        "Placement",
        "RankMemory",
        "Reduction",
    },
    "protocols and plain values": {
        "BalancedRouter",
        "FoldedGroups",
        "LayerCounters",
        "ParameterFamily",
        "Router",
        "Routing",
    },
    "keyword-only, checked by Python": {
        "Coordinate",
        "GradScaler",
        "planned_parameters",
        "predict_memory",
        "region_generator",
    },
}


@pytest.mark.parametrize(("name", "bad"), BAD, ids=[name for name, _ in BAD])
def test_it_is_refused_in_words(name: str, bad: Callable[[], object]) -> None:
    with pytest.raises(Exception) as refused:  # noqa: PT011 - which one is the question
        bad()
    error = refused.value
    assert isinstance(error, (FoldingError, ValueError, TypeError)) and not isinstance(error, RAW), repr(error)
    assert "/foldpar/" in traceback.extract_tb(error.__traceback__)[-1].filename, repr(error)
    assert len(str(error)) > 30


def test_every_public_name_is_in_the_table() -> None:
    errors = {name for name in foldpar.__all__ if name.endswith("Error")}
    excused = errors.union(*ELSEWHERE.values())
    said = " ".join(inspect_source(bad) for _, bad in BAD)
    missing = [
        name
        for name in foldpar.__all__
        if name not in excused and f"foldpar.{name}(" not in said and f"foldpar.{name}." not in said
    ]
    assert not missing


def inspect_source(bad: Callable[[], object]) -> str:
    names = bad.__code__.co_names
    return " ".join(f"foldpar.{name}(" for name in names)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (
            lambda: foldpar.plan_fold(hub, g),
            "layout must be a FoldedLayout, and is a FoldedGroups. Pass groups.layout.",
        ),
        (
            lambda: foldpar.fold_model(hub, L),
            "A layout is numbers; its communicators are foldpar.create_groups(layout).",
        ),
        (lambda: foldpar.fold_model("name", g), "model must be a Module, and is a str: 'name'. Load it first"),
        (lambda: foldpar.fold_model(g, hub), "model and groups are swapped."),
        (lambda: foldpar.create_groups(8), "layout must be a FoldedLayout, and is an int: 8. Solve one first"),
        (
            lambda: foldpar.create_groups(L, backend="xx"),
            "torch.distributed knows no 'xx'. It knows 'undefined', 'gloo'",
        ),
        (lambda: foldpar.clip_grad_norm_(lin.parameters(), 1.0, g), "Pass the model itself, not model.parameters()"),
        (lambda: foldpar.clip_grad_norm_(lin, g, 1.0), "max_norm and groups are swapped."),
        (lambda: foldpar.FoldedMoE(experts, router, g), "router and experts are swapped."),
        (lambda: foldpar.FoldedMoE(tuple_router(), experts, g)(x), "A router returns foldpar.Routing(ids, weights)."),
        (lambda: foldpar.FoldedMoE(tensor_router(), experts, g)(x), "A router returns foldpar.Routing(ids, weights)."),
        (
            lambda: foldpar.GroupedExperts(8, 0, 4, g),
            "dim must be a positive integer; given were num_experts = 8, dim = 0",
        ),
        (lambda: foldpar.GroupedExperts(8, -8, -4, g), "dim and hidden_dim must be a positive integer"),
        (lambda: foldpar.split_rows(x, g, backward="zero_pad"), "Say over which axis: groups.tp, groups.ep"),
        (
            lambda: foldpar.FoldedMoE.from_dense(router, torch.zeros(8, 16, 8), torch.zeros(8, 8, 8).double(), g),
            "of one dtype and on one device; these are torch.float32 on cpu, torch.float64 on cpu",
        ),
    ],
)
def test_what_was_probably_meant_is_said(bad: Callable[[], object], says: str) -> None:
    with pytest.raises((FoldingError, ArgumentError)) as refused:
        bad()
    assert says in str(refused.value)
