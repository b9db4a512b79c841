"""Every way to fold equals one process: values and all gradients of drawn models, layouts and batches, in float64."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
from folded_model import WAYS, Case, check
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from foldpar import solve_layout
from foldpar.testing import layouts, row_counts

TOLERANCE = 1e-11


@st.composite
def cases(draw: st.DrawFn, lanes: str, lane_grads: str, partition: str) -> Case:
    """Constructed, never filtered: sizes are multiples of what must divide them."""
    layout = draw(layouts(8, min_world=4, pp=1))
    data_ranks, micro_batches = layout.dp * layout.cp, draw(st.integers(1, 2))
    counts = draw(row_counts(data_ranks * micro_batches))
    experts = layout.ep * draw(st.integers(1, 3))
    return Case(
        layout,
        tokens=tuple(counts[rank * micro_batches :][:micro_batches] for rank in range(data_ranks)),
        lanes=lanes,
        lane_grads=lane_grads,
        partition=partition,
        consumer=draw(st.sampled_from(WAYS[lanes, lane_grads, partition])),
        experts=experts,
        hidden=layout.etp * draw(st.integers(1, 2)),
        top_k=draw(st.integers(1, min(4, experts))),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        scaling=draw(st.sampled_from([1.0, 2.5])),
        activation=draw(st.sampled_from(["swiglu", "geglu", "silu", "gelu", "relu"])),
        bias=draw(st.booleans()),
        masked=draw(st.booleans()),
        shared=draw(st.sampled_from(["none", "replicated", "sharded"])),
        layers=draw(st.integers(1, 2)),
        losses=draw(st.sampled_from(["mean", "sum"])),
        auxiliary=draw(st.sampled_from(["none", "none", "batch", "global"])),
        uneven_lanes=draw(st.booleans()),
    )


def features(case: Case) -> dict[str, bool]:
    """What a histogram counts; the first line of it is promised to be in every fifth case."""
    counts = {sum(rank) for rank in case.tokens}
    large = {f"{axis} > 1": case.layout.size(axis) > 1 for axis in ("tp", "ep", "etp", "cp", "dp", "edp")}
    return {
        **large,
        "ragged": len(counts) > 1,
        "tokens not a multiple of tp": any(rows % case.layout.tp for rank in case.tokens for rows in rank),
        "a rank without tokens": 0 in counts,
        "consecutive": case.layout.order == "consecutive",
        "assignments": case.partition == "assignments",
        "sharded lanes": case.lanes == "sharded",
        "partial": case.lane_grads == "partial",
        "post-hoc": case.lane_grads == "post-hoc",
        "masked": case.masked,
        "shared": case.shared != "none",
        "bias": case.bias,
        "auxiliary loss": case.auxiliary != "none",
        "two layers": case.layers == 2,
        "two micro-batches": len(case.tokens[0]) == 2,
        **{f"consumer: {kind}": case.consumer == kind for kind in ("equal", "columns", "own rows")},
    }


def fold_and_compare(rounds: int, examples: int, at_least: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As many examples of each way to take and give gradients; then the histogram."""
    tried: dict[Case, None] = {}
    start = time.monotonic()
    for number, way in enumerate(list(WAYS) * rounds):

        @seed(number)  # with derandomize=True every way would see the same layouts
        @settings(max_examples=examples, database=None, deadline=None)
        @given(cases(*way))
        def equals_one_process(case: Case) -> None:
            if case not in tried:  # hypothesis repeats itself
                check(case).raise_if(TOLERANCE)
                tried[case] = None

        equals_one_process()
    seen = Counter(name for case in tried for name, there in features(case).items() if there)
    names = list(features(next(iter(tried))))
    with capsys.disabled():
        print(f"\n{len(tried)} distinct cases in {time.monotonic() - start:.0f} s:")
        print("  " + ", ".join(f"{name} {100 * seen[name] / len(tried):.0f} %" for name in names))
    assert len(tried) >= at_least
    often = [name for name in names if name.endswith("> 1") or name == "ragged"]
    assert len(often) == 7
    assert all(seen[name] >= 0.2 * len(tried) for name in often), seen
    assert all(seen[name] >= 0.05 * len(tried) for name in names), seen


def test_every_fold_equals_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    fold_and_compare(1, 3, 15, capsys)


EVERYTHING = {"masked": True, "bias": True, "shared": "sharded", "layers": 2, "auxiliary": "batch", "hidden": 4}


@pytest.mark.parametrize(
    "case",
    [
        Case(solve_layout(4, tp=2, ep=2, etp=2), ((3, 0), (4, 1)), consumer="columns", **EVERYTHING),
        Case(solve_layout(4, tp=2, ep=4), ((0,), (0,)), partition="assignments", **EVERYTHING),
        Case(solve_layout(6, tp=3, ep=6, cp=2), ((5,), (2,)), lanes="sharded", consumer="own rows", **EVERYTHING),
    ],
    ids=lambda case: f"{case.layout.world}-{case.lanes}-{case.partition}",
)
def test_processes_with_gloo_equal_one_process(case: Case) -> None:
    check(replace(case, experts=12), backend="spawned").raise_if(TOLERANCE)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_very_many_folds_equal_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    fold_and_compare(11, 20, 1000, capsys)
