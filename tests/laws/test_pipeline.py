"""Whole models in less usual shapes: pipeline stages, layers that fold differently, and degrees at their ends.

Values, gradients, the total norm and a clipped SGD step equal one process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F
from toys import (
    DIM,
    LENGTH,
    VOCABULARY,
    Model,
    Stage,
    fold,
    gradient_errors,
    loss_of,
    own,
    plain_gradients,
    plain_model,
    relative,
    tokens_of,
    worst,
)

import foldpar
from foldpar.errors import FamilyError, GroupsError
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

MAX_NORM, RATE = 0.3, 0.5
Step = dict[str, Any]


def plain_step(plain: Model, data_ranks: int, micro_batches: int = 1) -> Step:
    """Gradients, their norm, and the parameters after a clipped step of SGD."""
    gradients = plain_gradients(plain, data_ranks, micro_batches)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert norm > MAX_NORM  # so that it is clipped
    scale = RATE * MAX_NORM / (norm + 1e-6)
    after = {name: parameter.detach() - scale * gradients[name] for name, parameter in plain.named_parameters()}
    return {"gradients": gradients, "norm": float(norm), "after": after}


def assert_step_equals(model: nn.Module, want: Step, groups: foldpar.FoldedGroups) -> None:
    """Gradients are reduced: compare them, clip, step, and compare the parameters."""
    error, name = worst(gradient_errors(model, want["gradients"], groups))
    assert error < 1e-12, (name, error)
    assert float(foldpar.clip_grad_norm_(model, MAX_NORM, groups)) == pytest.approx(want["norm"], rel=1e-12)
    assert float(foldpar.get_total_norm(model, groups)) == pytest.approx(MAX_NORM, rel=1e-5)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    foldpar.check_replicas(model, groups)
    shares = Shares(model, groups)
    for name, parameter in model.named_parameters():
        assert relative(parameter, shares.share_of(name, want["after"][name])) < 1e-13, name


# -- Pipeline stages --------------------------------------------------------------------------------------------------


def pipelined(plain: Model, want: Step, layout: foldpar.FoldedLayout, schedule_class: Any, hooked: bool) -> None:
    micro_batches = 2
    with foldpar.create_groups(layout) as groups:
        last = groups.pp.index == 1
        stage = Stage(fold(plain, groups), groups.pp.index)
        reducer = foldpar.GradientReducer(stage, groups) if hooked else None
        shapes = [(2, LENGTH), (2, LENGTH, DIM), (2, LENGTH, VOCABULARY)]
        taken, given = (
            torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes[groups.pp.index :][:2]
        )
        part = PipelineStage(
            stage,
            groups.pp.index,
            groups.pp.size,
            torch.device("cpu"),
            input_args=(taken if last else torch.zeros(2, LENGTH, dtype=torch.int64),),
            output_args=(given,),
            group=groups.pp.process_group,
        )
        schedule = schedule_class(
            part, micro_batches, loss_fn=lambda y, target: F.cross_entropy(y.flatten(0, 1), target.flatten())
        )
        tokens = torch.cat([tokens_of(groups.dp_cp.index, micro) for micro in range(micro_batches)])
        inputs = (tokens[:, :-1],) if not last else ()
        if reducer is not None:
            with reducer.no_sync():  # a schedule runs one backward per micro-batch
                output = schedule.step(*inputs, target=tokens[:, 1:] if last else None)
            reducer.finish()
            reducer.close()
        else:
            output = schedule.step(*inputs, target=tokens[:, 1:] if last else None)
            foldpar.reduce_gradients(stage, groups)
        if last:
            assert relative(output, plain(tokens[:, :-1])) < 1e-14
        assert_step_equals(stage, want, groups)


@pytest.mark.parametrize(
    ("degrees", "schedule", "hooked"),
    [
        ({"tp": 2, "ep": 4}, ScheduleGPipe, False),
        ({"tp": 2, "ep": 4, "order": "consecutive"}, Schedule1F1B, True),
        ({"tp": 2, "cp": 2, "ep": 2, "etp": 2}, Schedule1F1B, False),
        ({"ep": 2}, ScheduleGPipe, True),
    ],
    ids=str,
)
def test_a_pipeline_of_two_stages_equals_one_process(degrees: dict[str, Any], schedule: Any, hooked: bool) -> None:
    layout = foldpar.solve_layout(8, pp=2, **degrees)
    plain = plain_model(bias=True)
    want = plain_step(plain, layout.dp * layout.cp, 2)
    run_ranks(pipelined, 8, plain, want, layout, schedule, hooked, groups_left="error")


# -- Degrees at their ends --------------------------------------------------------------------------------------------


def one_step(plain: Model, want: Step, layouts: list[foldpar.FoldedLayout], hooked: bool = False) -> None:
    """Block i is folded by ``layouts[i]``; reduction is told the groups of one of them."""
    groups_of = {layout: foldpar.create_groups(layout) for layout in dict.fromkeys(layouts)}
    of_block = [groups_of[layout] for layout in layouts]
    for groups in groups_of.values():
        model = fold(plain, of_block)
        tokens = tokens_of(groups.dp_cp.index)
        assert relative(model(tokens), plain(tokens)) < 1e-14
        if hooked:
            with foldpar.GradientReducer(model, groups, bucket_bytes=500) as reducer:
                loss_of(model, tokens).backward()
                reducer.finish()
        else:
            loss_of(model, tokens).backward()
            foldpar.reduce_gradients(model, groups)
        assert_step_equals(model, want, groups)
    for groups in groups_of.values():
        groups.destroy()


SHAPES: list[dict[str, int]] = [
    {"world": 1},
    {"world": 2, "cp": 2},
    {"world": 3},  # all degrees 1
    {"world": 4, "tp": 2},  # experts are local, and the lanes still share the work
    {"world": 4, "tp": 4, "ep": 1},
    {"world": 4, "ep": 4},
    {"world": 4, "cp": 4, "ep": 2, "etp": 2},
    {"world": 4, "tp": 2, "cp": 2, "ep": 4},
    {"world": 6, "tp": 2, "ep": 2},
    {"world": 6, "tp": 3, "ep": 2},
    {"world": 6, "tp": 6, "ep": 1, "etp": 2},
    {"world": 6, "cp": 3, "ep": 2},
    {"world": 12, "tp": 2, "ep": 4},
    {"world": 12, "tp": 3, "cp": 2, "ep": 2, "etp": 2},
    {"world": 12, "tp": 4, "ep": 4},
    {"world": 12, "tp": 2, "cp": 3, "ep": 1, "etp": 4},
]


LAYOUTS = [foldpar.solve_layout(**degrees) for degrees in SHAPES]
OTHER_ORDER = [replace(layout, order="consecutive") for layout in LAYOUTS if layout.tp > 1]  # at tp = 1 they are one


@pytest.mark.parametrize(
    "layout",
    [
        *LAYOUTS,
        *(pytest.param(layout, marks=[pytest.mark.long] if layout.world > 6 else []) for layout in OTHER_ORDER),
    ],
    ids=repr,
)
def test_every_shape_equals_one_process(layout: foldpar.FoldedLayout) -> None:
    plain = plain_model()
    want = plain_step(plain, layout.dp * layout.cp)
    run_ranks(one_step, layout.world, plain, want, [layout, layout], backend="threads", groups_left="error")


# -- Two layouts in one model -----------------------------------------------------------------------------------------

TWO_FOLDS = [
    [{"world": 4, "tp": 2, "ep": 4}, {"world": 4, "tp": 2, "ep": 2, "etp": 2}],
    [{"world": 4, "tp": 2, "ep": 4}, {"world": 4, "tp": 2, "ep": 4, "order": "consecutive"}],
    [{"world": 4, "tp": 2, "ep": 1}, {"world": 4, "tp": 2, "ep": 1, "etp": 4}],
    [{"world": 6, "tp": 3, "ep": 2}, {"world": 6, "tp": 3, "etp": 2}],
    [{"world": 8, "tp": 2, "ep": 8}, {"world": 8, "tp": 2, "cp": 2, "ep": 2}],  # who owns which tokens is the same
    [{"world": 8, "ep": 8}, {"world": 8, "ep": 2, "etp": 4}],
]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("degrees", TWO_FOLDS, ids=str)
def test_layers_that_fold_differently_equal_one_process(degrees: list[dict[str, Any]], hooked: bool) -> None:
    layouts = [foldpar.solve_layout(**of_block) for of_block in degrees]
    plain = plain_model(bias=True)
    want = plain_step(plain, layouts[0].dp * layouts[0].cp)
    run_ranks(one_step, layouts[0].world, plain, want, layouts, hooked, backend="threads", groups_left="error")


def told_other_lanes(plain: Model) -> None:
    one, two = (foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=2)) for tp in (2, 4))
    model = fold(plain, one)
    loss_of(model, tokens_of(0)).backward()
    refusal = (
        r"blocks.0.moe was built with groups of world = 4, tp = 2, pp = 1, and these groups have world = 4, tp = 4, "
        r"pp = 1\. Layers of one model may fold their experts differently .* with the same tp and pp"
    )
    for use in (
        foldpar.reduce_gradients,
        foldpar.get_total_norm,
        foldpar.check_replicas,
        foldpar.parameter_families,
        foldpar.GradientReducer,
    ):
        with pytest.raises(GroupsError, match=refusal):
            use(model, two)


def test_layers_must_agree_on_lanes_and_stages() -> None:
    run_ranks(told_other_lanes, 4, plain_model(), backend="threads")


def tied_over_two_folds(plain: Model) -> None:
    one, two = (foldpar.create_groups(foldpar.solve_layout(2, tp=2, **degrees)) for degrees in ({"ep": 2}, {"etp": 2}))
    model = fold(plain, [one, two])
    first, second = (block.moe.experts for block in model.blocks)
    second.down_proj = first.down_proj
    with pytest.raises(FamilyError, match=r"as blocks.0.moe.experts.down_proj and as blocks.1.moe.experts.down_proj"):
        foldpar.parameter_families(model, one)


def test_an_expert_parameter_cannot_lie_in_two_folds() -> None:
    run_ranks(tied_over_two_folds, 2, plain_model(), backend="threads")


def drift_in_the_second_fold(plain: Model) -> str:
    one, two = (foldpar.create_groups(foldpar.solve_layout(4, tp=2, **degrees)) for degrees in ({"ep": 4}, {"ep": 2}))
    model = fold(plain, [one, two])
    foldpar.check_replicas(model, one)
    if one.rank == two.edp.ranks[-1]:
        own(model.blocks[1].moe.experts.down_proj.data)[0, 0, 0] += 1
    with pytest.raises(foldpar.ReplicaError) as refused:
        foldpar.check_replicas(model, one)
    return str(refused.value)


def test_replicas_of_every_fold_are_checked() -> None:
    for text in run_ranks(drift_in_the_second_fold, 4, plain_model(), backend="threads"):
        assert "blocks.1.moe.experts.down_proj over edp: rank" in text
