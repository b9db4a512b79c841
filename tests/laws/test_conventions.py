"""Two conventions for gradients over the lanes: the conjugate ends are exact everywhere, the post-hoc ones somewhere.

The post-hoc ends sum a gradient that all lanes hold, and parameter gradients lose the factor ``tp`` later.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import (
    Model,
    fold,
    folded_loss,
    gradient_errors,
    loss_of,
    own,
    plain_gradients,
    plain_model,
    tokens_of,
    worst,
)

import foldpar
from foldpar import families
from foldpar.errors import FamilyError
from foldpar.testing import run_ranks

DEGREES = [
    {"world": 2, "tp": 2, "ep": 2},
    {"world": 4, "tp": 2, "ep": 4},
    {"world": 4, "tp": 4, "ep": 2},
    {"world": 4, "tp": 2, "ep": 2, "etp": 2},
    {"world": 4, "tp": 2, "ep": 1, "etp": 4},
    {"world": 6, "tp": 3, "ep": 2},
    {"world": 8, "tp": 2, "ep": 2, "cp": 2},
]
LAYOUTS = [foldpar.solve_layout(**degrees, order=order) for degrees in DEGREES for order in foldpar.layout.ORDERS]


def errors_of(plain: Model, want: dict[str, Tensor], layout: foldpar.FoldedLayout, options: dict[str, Any]) -> Any:
    with foldpar.create_groups(layout) as groups:
        model = fold(plain, groups, shard_dense=False, **options)
        loss_of(model, tokens_of(groups.dp_cp.index)).backward()
        foldpar.reduce_gradients(model, groups)
        return gradient_errors(model, want, groups)


# -- Where the post-hoc convention is valid ---------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["tokens", "assignments"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_post_hoc_is_exact_with_nothing_sharded_over_tp(layout: foldpar.FoldedLayout, partition: str) -> None:
    """Two blocks with residual connections, shared experts and biases: every family meets replicated gradients."""
    plain = plain_model(bias=True, shared=True)
    want = plain_gradients(plain, layout.dp * layout.cp)
    options = {"lane_grads": "post-hoc", "partition": partition}
    for errors in run_ranks(errors_of, layout.world, plain, want, layout, options, backend="threads"):
        error, name = worst(errors)
        assert error < 1e-12, name


def test_post_hoc_families() -> None:
    plain = plain_model(blocks=1, bias=True, shared=True)

    def families_of() -> dict[str, families.ParameterFamily]:
        with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2, etp=2)) as groups:
            moe = fold(plain, groups, shard_dense=False, lane_grads="post-hoc").blocks[0].moe
            return foldpar.parameter_families(moe, groups)

    (found, *_) = run_ranks(families_of, 4, backend="threads")
    assert found["router.weight"] is families.ROUTER_POST_HOC
    assert found["experts.gate_up_proj"] is found["experts.gate_up_bias"] is families.ROUTED_EXPERT_POST_HOC
    assert found["experts.down_bias"] == replace(
        families.EXPERT_BIAS, name="expert_bias_post_hoc", factor=Fraction(1, 2)
    )
    assert found["shared.up.weight"] is families.REPLICATED


def test_the_surplus_factor_is_tp() -> None:
    """Reduced as conjugate gradients would be, post-hoc gradients inside the layer are tp times too large."""
    layout = foldpar.solve_layout(4, tp=4, ep=2)
    plain = plain_model(blocks=1, bias=True)
    want = plain_gradients(plain, 1)

    def ratios() -> dict[str, float]:
        with foldpar.create_groups(layout) as groups:
            model = fold(plain, groups, shard_dense=False, lane_grads="post-hoc")
            moe = model.blocks[0].moe
            foldpar.mark_parameters(moe.router, families.ROUTER_OWN_TOKENS)
            foldpar.mark_parameters(moe.experts, families.ROUTED_EXPERT)
            foldpar.mark_parameters(moe.experts, families.EXPERT_BIAS, names=("down_bias",))
            loss_of(model, tokens_of(0)).backward()
            foldpar.reduce_gradients(model, groups)
            experts = {name: want[f"blocks.0.moe.experts.{name}"] for name, _ in moe.experts.named_parameters()}
            return {
                "router": float(moe.router.weight.grad.norm() / want["blocks.0.moe.router.weight"].norm()),
                "head": float(model.head.weight.grad.norm() / want["head.weight"].norm()),
            } | {
                name: float(own(parameter.grad).norm() / experts[name].chunk(2)[groups.ep.index].norm())
                for name, parameter in moe.experts.named_parameters()
            }

    for found in run_ranks(ratios, 4, backend="threads"):
        assert found.pop("head") == pytest.approx(1, abs=1e-12)
        assert found == dict.fromkeys(found, pytest.approx(4, abs=1e-12))


# -- Where it is not --------------------------------------------------------------------------------------------------


def around_a_sharded_layer(
    plain: Model, want: dict[str, Tensor], layout: foldpar.FoldedLayout, lane_grads: str
) -> dict[str, float]:
    """Every module is reduced in a call of its own, which gets around the refusal."""
    with foldpar.create_groups(layout) as groups:
        model = fold(plain, groups, lane_grads=lane_grads)
        loss_of(model, tokens_of(groups.dp_cp.index)).backward()
        for block in model.blocks:
            for part in (block.dense_norm, block.moe_norm):
                foldpar.reduce_gradients(foldpar.mark_parameters(part, families.REPLICATED), groups)
            for part in (block.dense, block.moe):
                foldpar.reduce_gradients(part, groups)
        for part in (model.embedding, model.norm, model.head):
            foldpar.reduce_gradients(foldpar.mark_parameters(part, families.REPLICATED), groups)
        return gradient_errors(model, want, groups)


def test_post_hoc_is_wrong_around_a_sharded_layer_and_the_conjugate_ends_are_not() -> None:
    layout = foldpar.solve_layout(4, tp=2, ep=4)
    plain = plain_model(blocks=2)
    want = plain_gradients(plain, 2)
    for lane_grads in ("replicated", "post-hoc"):
        results = run_ranks(around_a_sharded_layer, 4, plain, want, layout, lane_grads, backend="threads")
        errors = {name: max(result[name] for result in results) for name in want}
        below = {name for name in want if "blocks.0" in name or name == "embedding.weight" or "1.dense" in name}
        assert max(errors[name] for name in want.keys() - below) < 1e-12  # the topmost layer, and all above it
        for name in below:
            assert errors[name] < 1e-12 if lane_grads == "replicated" else errors[name] > 0.05, (name, errors[name])
        if lane_grads == "post-hoc":
            assert errors["blocks.1.dense.up.weight"] > 0.3


def refused(plain: Model) -> None:
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
        model = fold(plain, groups, lane_grads="post-hoc")
        loss_of(model, tokens_of(0)).backward()
        refusal = r"blocks.0.moe has lane_grads='post-hoc', and blocks.0.dense.up.weight is sharded over tp.* wrong by"
        for reduce in (foldpar.reduce_gradients, foldpar.GradientReducer):
            with pytest.raises(FamilyError, match=refusal):
                reduce(model, groups)


def test_reduction_refuses_post_hoc_with_sharded_layers() -> None:
    run_ranks(refused, 2, plain_model(), backend="threads")


def sharded_head(plain: Model, want: dict[str, Tensor]) -> tuple[float, str]:
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
        model = fold(plain, groups, shard_dense=False, lane_grads="post-hoc")
        head, model.head = model.head, nn.Identity()
        for name, parameter in head.named_parameters():
            setattr(head, name, nn.Parameter(parameter.detach().chunk(2)[groups.tp.index].clone()))
        foldpar.mark_parameters(head, families.DENSE_SHARDED)
        tokens = tokens_of(0)
        own = head(foldpar.copy_to_group(model(tokens[:, :-1]), groups.tp))
        columns = foldpar.all_gather_rows(own.movedim(-1, 0), groups.tp, backward="slice")
        F.cross_entropy(columns.movedim(0, -1).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        foldpar.reduce_gradients(model, groups)
        foldpar.reduce_gradients(head, groups)
        model.head = head
        return worst(gradient_errors(model, want, groups))


def test_a_sharded_head_above_post_hoc_layers_is_reduced_in_a_call_of_its_own() -> None:
    plain = plain_model()
    for error, name in run_ranks(sharded_head, 2, plain, plain_gradients(plain, 1), backend="threads"):
        assert error < 1e-12, name


def test_sharded_lanes_have_no_post_hoc_convention() -> None:
    with pytest.raises(ValueError, match=r"lanes='sharded' means .* lane_grads='post-hoc' cannot both apply"):
        fold(plain_model(), foldpar.create_groups(foldpar.solve_layout(1)), lanes="sharded", lane_grads="post-hoc")


# -- The classical reproducer -----------------------------------------------------------------------------------------

GLOBAL_BATCH, STEPS = 4, 3


def gradient_norms(plain: Model, layout: foldpar.FoldedLayout, options: dict[str, Any]) -> list[dict[str, float]]:
    """Per step of clipped SGD: the norms of the reduced gradients of a router, a LayerNorm, the experts, and of all."""
    with foldpar.create_groups(layout) as groups:
        model = fold(plain, groups, shard_dense=options.get("lane_grads") != "post-hoc", **options)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=2.0)
        moe, norms = model.blocks[0].moe, []
        for step in range(STEPS):
            everything = torch.cat(
                [tokens_of(0, GLOBAL_BATCH * step + number, batch=1) for number in range(GLOBAL_BATCH)]
            )
            own = everything.chunk(layout.dp)[groups.dp.index]
            optimizer.zero_grad()
            folded_loss(model, own, groups, options.get("lanes", "replicated")).backward()
            foldpar.reduce_gradients(model, groups)
            norms.append(
                {
                    "router": float(moe.router.weight.grad.norm()),
                    "LayerNorm": float(model.norm.weight.grad.norm()),
                    "experts": float(foldpar.get_total_norm(moe.experts, groups)),
                    "all": float(foldpar.clip_grad_norm_(model, 0.5, groups)),
                    "clipped": float(foldpar.get_total_norm(model, groups)),
                }
            )
            optimizer.step()
        foldpar.check_replicas(model, groups)
        return norms


@pytest.mark.parametrize(
    "options",
    [{}, {"partition": "assignments"}, {"lanes": "sharded"}, {"lane_grads": "post-hoc"}],
    ids=["replicated", "assignments", "sharded", "post-hoc"],
)
@pytest.mark.parametrize("tp", [2, 4])
def test_gradient_norms_over_those_of_the_unfolded_model_are_one(tp: int, options: dict[str, Any]) -> None:
    plain = plain_model()
    (unfolded, *_) = run_ranks(gradient_norms, 4, plain, foldpar.solve_layout(4), {}, backend="threads")
    for folded in run_ranks(gradient_norms, 4, plain, foldpar.solve_layout(4, tp=tp, ep=4), options, backend="threads"):
        for mine, theirs in zip(folded, unfolded, strict=True):
            assert theirs["all"] > 0.5 and theirs["clipped"] == pytest.approx(0.5, rel=1e-5)
            assert {name: f"{mine[name] / theirs[name]:.10f}" for name in mine} == dict.fromkeys(mine, "1.0000000000")
