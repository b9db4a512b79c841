"""The vocabulary of families and factors: integers only, then how a model's parameters get theirs."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from draws import seeded
from torch import nn

import foldpar
from foldpar import create_groups, mark_parameters, parameter_families, solve_layout
from foldpar.errors import FamilyError
from foldpar.factors import gradient_factor, loss_factor
from foldpar.families import (
    DENSE_SHARDED,
    EXPERT_BIAS,
    REPLICATED,
    REPLICATED_PARTIAL,
    ROUTED_EXPERT,
    ROUTER_ALL_TOKENS,
    ROUTER_OWN_TOKENS,
    ParameterFamily,
    Reduction,
)
from foldpar.parameters.marks import parameter_groups
from foldpar.testing import run_ranks

CONSTANTS = (
    DENSE_SHARDED,
    REPLICATED,
    REPLICATED_PARTIAL,
    ROUTER_OWN_TOKENS,
    ROUTER_ALL_TOKENS,
    ROUTED_EXPERT,
    EXPERT_BIAS,
)


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary.


def test_the_constants_are_the_table():
    table = {
        family.name: (family.shard_axes, family.replica_axes, family.reduction.name, family.lane_axis, family.data_axis)
        for family in CONSTANTS
    }
    dense = ((), ("tp", "dp_cp"))
    assert table == {
        "dense_sharded": (("tp",), ("dp_cp",), "SKIP", None, "dp_cp"),
        "replicated": (*dense, "AVERAGE", "tp", "dp_cp"),
        "replicated_partial": (*dense, "SUM", "tp", "dp_cp"),
        "router_own_tokens": (*dense, "SUM", "tp", "dp_cp"),
        "router_all_tokens": (*dense, "AVERAGE", "tp", "dp_cp"),
        "routed_expert": (("ep", "etp"), ("edp",), "SKIP", None, "edp"),
        "expert_bias": (("ep",), ("etp", "edp"), "SUM", "etp", "edp"),
    }


@pytest.mark.parametrize("axes", [("tp", "dp_cp"), ("ep", "etp", "edp")])
def test_every_axis_of_one_view_is_sharded_or_replicated_once(axes):
    for order in permutations(axes):
        for cut in range(len(order) + 1):
            shard_axes, replica_axes = order[:cut], order[cut:]
            if {"dp_cp", "edp"} & set(shard_axes):
                with pytest.raises(FamilyError, match="is a data axis"):
                    ParameterFamily("mine", shard_axes, replica_axes, Reduction.SKIP)
            else:
                family = ParameterFamily("mine", shard_axes, replica_axes, Reduction.SKIP)
                assert family.lane_axis in (None, "tp", "etp")
                assert {family.data_axis, *shard_axes, *replica_axes} == set(axes)


@pytest.mark.parametrize(
    ("shard_axes", "replica_axes"),
    [
        ((), ("tp",)),
        (("tp",), ("tp", "dp_cp")),
        (("tp",), ("dp",)),
        (("ep",), ("edp",)),
        (("ep", "etp"), ("dp_cp",)),
        ((), ("tp", "dp_cp", "pp")),
    ],
)
def test_axes_that_do_not_cover_one_view_are_refused(shard_axes, replica_axes):
    with pytest.raises(FamilyError, match=r"must name each axis of one view once, .* tp and dp_cp for dense"):
        ParameterFamily("mine", shard_axes, replica_axes, Reduction.SKIP)


@pytest.mark.parametrize("reduction", [Reduction.SUM, Reduction.AVERAGE])
def test_shards_are_not_mixed_over_the_lanes(reduction):
    with pytest.raises(FamilyError, match=f"'mine': {reduction.name} acts on copies over the lanes, but tp hold diff"):
        ParameterFamily("mine", ("tp",), ("dp_cp",), reduction)


def test_the_post_hoc_cancellation_is_for_sharded_experts():
    cancelled = ParameterFamily("mine", ("ep", "etp"), ("edp",), Reduction.EXPERT_TP_CANCEL)
    assert cancelled.lane_axis is None
    for axes in ((("ep",), ("etp", "edp")), (("tp",), ("dp_cp",)), ((), ("tp", "dp_cp"))):
        with pytest.raises(FamilyError, match=r"divides by tp without communication.*factor = Fraction\(1, tp\)"):
            ParameterFamily("mine", *axes, Reduction.EXPERT_TP_CANCEL)


@pytest.mark.parametrize("factor", [0.5, 0, Fraction(-1, 2), True, "1/2"])
def test_a_factor_is_a_positive_fraction(factor):
    with pytest.raises(FamilyError, match=r"factor = .* must be a positive Fraction or integer\..*Fraction\(1, 3\)"):
        ParameterFamily("mine", (), ("tp", "dp_cp"), Reduction.SUM, factor)


def test_an_integer_factor_becomes_a_fraction_and_families_hash():
    family = ParameterFamily("mine", (), ("tp", "dp_cp"), Reduction.SUM, 2)
    assert type(family.factor) is Fraction
    assert len({*CONSTANTS, *copy.deepcopy(CONSTANTS), family}) == len(CONSTANTS) + 1


def test_a_reduction_is_a_member_of_the_enumeration():
    with pytest.raises(FamilyError, match=r"reduction = 'sum' is not one of Reduction.SKIP, Reduction.SUM"):
        ParameterFamily("mine", (), ("tp", "dp_cp"), "sum")


# ---------------------------------------------------------------------------------------------------------------------
# Factors.

LAYOUTS = [
    solve_layout(world, tp=tp, ep=ep, etp=etp, cp=cp)
    for world in (1, 2, 4, 6, 8, 12)
    for tp in (1, 2, 3)
    for cp in (1, 2)
    for ep in (1, 2, 4)
    for etp in (1, 2)
    if world % (tp * cp) == 0 and world % (ep * etp) == 0
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_one_normalisation_rule(layout):
    """Equal losses on all ranks give each family the gradient of one process, whatever the layout.

    One process has the gradient 1. A dense copy then has 1 on each rank, or its lane's share 1 / tp. An expert's
    gradients, all tokens of the stage reaching it once, add up over edp to dp * cp.
    """
    owners = layout.dp * layout.cp
    assert loss_factor(layout, "mean") * owners == loss_factor(layout, "sum") == 1
    sums = {
        DENSE_SHARDED: owners,
        REPLICATED: owners * layout.tp,
        ROUTER_ALL_TOKENS: owners * layout.tp,
        REPLICATED_PARTIAL: owners,
        ROUTER_OWN_TOKENS: owners,
        ROUTED_EXPERT: owners,
        EXPERT_BIAS: owners,
        ParameterFamily("post_hoc", ("ep", "etp"), ("edp",), Reduction.EXPERT_TP_CANCEL): owners * layout.tp,
        ParameterFamily("thrice", (), ("tp", "dp_cp"), Reduction.SUM, Fraction(1, 3)): owners * 3,
    }
    for family, total in sums.items():
        assert gradient_factor(family, layout, "mean") * total == 1
        assert gradient_factor(family, layout, "sum") == gradient_factor(family, layout, "mean") * owners


@pytest.mark.parametrize("loss", ["Mean", "average", None])
def test_an_unknown_loss_is_refused(loss):
    with pytest.raises(ValueError, match=r"loss = .* is unknown: it can be 'mean' \(each rank's.* or 'sum' \("):
        loss_factor(solve_layout(4), loss)


def test_families_and_factors_load_no_torch():
    code = "import sys, foldpar.families, foldpar.factors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# The family of every parameter of a model. Nothing here communicates, so ranks are threads.


def block() -> nn.Module:
    inner = nn.ModuleDict({"attention": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    return nn.ModuleDict({"embed": nn.Embedding(3, 2), "block": inner})


def names(model: nn.Module, **degrees: int) -> dict[str, str]:
    """Parameter -> name of its family, on rank 0 of a layout; a FamilyError as its text under ``"error"``."""

    def on_a_rank() -> dict[str, str]:
        groups = create_groups(solve_layout(math.prod(degrees.values()), **degrees))
        try:
            return {name: family.name for name, family in parameter_families(model, groups).items()}
        except FamilyError as error:
            return {"error": str(error)}

    world = math.prod(degrees.values())
    return run_ranks(on_a_rank, world, backend="threads")[0] if world > 1 else on_a_rank()


def test_without_lanes_a_parameter_is_replicated():
    assert set(names(block()).values()) == {"replicated"}
    assert set(names(block(), ep=2).values()) == {"replicated"}


def test_with_lanes_a_parameter_without_a_mark_is_an_error_that_teaches():
    text = names(nn.ModuleList(nn.Linear(2, 2) for _ in range(4)), tp=2)["error"]
    assert "8 parameters have no family: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 3 more. With tp = 2," in text
    assert "silently trains another model" in text
    for remedy in ("REPLICATED)", "REPLICATED_PARTIAL)", "DENSE_SHARDED)"):
        assert f"families.{remedy}" in text
    assert names(nn.LayerNorm(2, bias=False), tp=2)["error"].startswith("1 parameter has no family: weight.")


def test_the_nearest_mark_wins_in_any_order():
    def mark_all(model: nn.Module, order: tuple[int, ...]) -> nn.Module:
        targets = (
            (model, REPLICATED),
            (model["block"], REPLICATED_PARTIAL),
            (model["block"]["attention"], DENSE_SHARDED),
            (model["block"]["attention"].bias, ROUTER_ALL_TOKENS),
        )
        for place in order:
            assert mark_parameters(*targets[place]) is targets[place][0]
        return model

    for order in permutations(range(4)):
        assert names(mark_all(block(), order), tp=2) == {
            "embed.weight": "replicated",
            "block.attention.weight": "dense_sharded",
            "block.attention.bias": "router_all_tokens",
            "block.norm.weight": "replicated_partial",
            "block.norm.bias": "replicated_partial",
        }


def test_marks_of_modules_survive_copies_and_new_parameters():
    model = mark_parameters(block(), REPLICATED)
    mark_parameters(model["block"], DENSE_SHARDED)
    twin = copy.deepcopy(model)
    twin["block"]["norm"].weight = nn.Parameter(twin["block"]["norm"].weight.detach().clone())
    assert names(twin, tp=2) == names(model, tp=2)


def test_frozen_parameters_have_a_family_too():
    model = mark_parameters(block(), REPLICATED).requires_grad_(False)
    assert len(names(model, tp=2)) == 5


def tied(**marks: ParameterFamily) -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    for name, family in marks.items():
        mark_parameters(model[name], family)
    return model


def test_a_tied_parameter_counts_once():
    assert names(tied()) == {"embed.weight": "replicated"}
    assert names(tied(head=REPLICATED_PARTIAL), tp=2) == {"embed.weight": "replicated_partial"}
    assert names(tied(embed=ROUTER_OWN_TOKENS, head=REPLICATED_PARTIAL), tp=2) == {"embed.weight": "router_own_tokens"}


def test_a_tied_parameter_in_two_states_is_an_error_with_the_remedy():
    model = tied(embed=REPLICATED, head=REPLICATED_PARTIAL)
    text = names(model, tp=2)["error"]
    assert "as embed.weight it is 'replicated', as head.weight it is 'replicated_partial'" in text
    assert "copy_to_group(weight)" in text
    mark_parameters(model["embed"].weight, REPLICATED)
    assert names(model, tp=2) == {"embed.weight": "replicated"}


def test_mark_parameters_refuses_what_it_cannot_mark():
    with pytest.raises(FamilyError, match=r"marks a torch.nn.Module or a Parameter, not a list"):
        mark_parameters([nn.Linear(1, 1)], REPLICATED)
    with pytest.raises(FamilyError, match=r"takes a ParameterFamily, not 'replicated': one of foldpar.families"):
        mark_parameters(nn.Linear(1, 1), "replicated")


def decaying_model(groups):
    """Layers with all kinds of parameters that do not decay, experts' biases among them."""
    experts = foldpar.GroupedExperts(4, 2, 4, groups, bias=True, seed=0)
    with seeded(0):
        router, embed = foldpar.TopKRouter(2, 4, 2, bias=True), nn.Embedding(4, 2)
    moe = foldpar.FoldedMoE(router, experts, groups)
    return mark_parameters(nn.ModuleDict({"embed": embed, "norm": nn.RMSNorm(2), "moe": moe}), REPLICATED)


VECTORS = ["norm.weight", "moe.router.bias", "moe.experts.gate_up_bias", "moe.experts.down_bias"]


def decaying(layout):
    with foldpar.create_groups(layout) as groups:
        model = decaying_model(groups)
        given = parameter_groups(model, weight_decay=0.1, named=True)
        embed = parameter_groups(model, weight_decay=0.1, no_decay=lambda name, _: "embed" in name, named=True)
        torch.optim.AdamW(given)
        assert all(len(group["param_names"]) == len(group["params"]) for group in given)
        assert len({group["name"] for group in given}) == len(given)
        assert all(("no decay" in group["name"]) == (group["weight_decay"] == 0.0) for group in given)
        return tuple(
            sorted(name for group in found for name in group["param_names"] if group["weight_decay"] == 0.0)
            for found in (given, embed)
        )


@pytest.mark.parametrize("degrees", [{}, {"tp": 2, "ep": 4}, {"tp": 2, "ep": 1, "etp": 2}])
def test_gains_and_biases_do_not_decay_and_the_user_may_say_what_else(degrees):
    world = 4 if degrees else 1
    for found in run_ranks(decaying, world, foldpar.solve_layout(world, **degrees), backend="threads"):
        assert found == (sorted(VECTORS), ["embed.weight"])


def test_without_weight_decay_groups_say_nothing_of_it():
    groups = parameter_groups(mark_parameters(nn.Linear(2, 2), REPLICATED))
    assert [set(group) for group in groups] == [{"params", "family", "name"}]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"weight_decay": -0.1}, ValueError, r"^weight_decay = -0\.1 must be 0 or more"),
        ({"weight_decay": float("nan")}, ValueError, r"^weight_decay = nan must be 0 or more"),
        ({"weight_decay": "0.1"}, TypeError, r"weight_decay must be a float or an int or None, and is a str: '0\.1'"),
        ({"weight_decay": True}, TypeError, r"weight_decay must be a number, and is True"),
        ({"no_decay": lambda name, _: True}, TypeError, r"no_decay says which parameters do not decay, so say weight"),
        ({"weight_decay": 0.1, "no_decay": ["bias"]}, TypeError, r"no_decay must be called with \(name, parameter\)"),
    ],
)
def test_wrong_weight_decay_is_told(options, error, text):
    with pytest.raises(error, match=text):
        parameter_groups(nn.Linear(2, 2), **options)


def decayed_steps(folder, layout, loads):
    """Two steps of a schedule, saved; or two more after loading into this layout: options by parameter, and weights."""
    with foldpar.create_groups(layout) as groups:
        model = decaying_model(groups)
        optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.5, named=not loads), lr=0.25)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if loads:
            for group in optimizer.param_groups:
                group["weight_decay"] = 7.0  # comes from the checkpoint
            foldpar.load_checkpoint(folder, model, optimizer, groups, schedulers=scheduler)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            foldpar.declare_reduced(model)
            optimizer.step()
            scheduler.step()
        if not loads:
            foldpar.save_checkpoint(folder, model, optimizer, groups, schedulers=scheduler)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        options = {
            names[id(parameter)]: (group["weight_decay"], group["lr"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert all(("no decay" in group["name"]) == (group["weight_decay"] == 0) for group in optimizer.param_groups)
        norms = {
            name: float(getattr(parameter, "full_tensor", lambda own=parameter: own)().detach().double().sum())
            for name, parameter in model.named_parameters()
        }
        return options, norms, len(optimizer.param_groups)


def on_ranks(folder, layout, loads):
    if layout.world == 1:
        return [decayed_steps(folder, layout, loads)]
    return run_ranks(decayed_steps, layout.world, folder, layout, loads)


def test_a_checkpoint_goes_on_in_another_layout_with_what_decays_apart(tmp_path):
    one, folded = foldpar.solve_layout(1), foldpar.solve_layout(2, tp=2, ep=2)
    for saved, loaded in ((one, folded), (folded, one)):
        folder = tmp_path / str(saved.world)
        (_, before, first), *_ = on_ranks(folder, saved, False)
        (options, after, second), *_ = on_ranks(folder, loaded, True)
        assert first >= 4 <= second
        for name, (weight_decay, rate) in options.items():
            assert (weight_decay, rate) == (0.0 if name in VECTORS else 0.5, 0.25 / 5)
            shrunk = 1.0 if name in VECTORS else (1 - 0.5 * 0.25 / 3) * (1 - 0.5 * 0.25 / 4)
            assert after[name] == pytest.approx(before[name] * shrunk, rel=1e-5, abs=1e-6)


def test_optimizer_groups_hold_every_trainable_parameter_once():
    model = mark_parameters(tied(), REPLICATED)
    model["norm"] = mark_parameters(nn.LayerNorm(2), REPLICATED_PARTIAL)
    model["norm"].bias.requires_grad_(False)
    groups = parameter_groups(model)
    assert [(group["family"], [id(p) for p in group["params"]]) for group in groups] == [
        ("replicated", [id(model["embed"].weight)]),
        ("replicated_partial", [id(model["norm"].weight)]),
    ]
