"""The laws of layouts: on drawn ones, on all of up to 64 ranks, and on the shapes that fold across lanes."""

import copy
import dataclasses
import pickle
import re
import time
import tracemalloc
from fractions import Fraction
from itertools import chain, combinations, product
from statistics import median

import numpy as np
import pytest
from every_layout import every_layout, layouts
from hypothesis import given
from hypothesis import strategies as st

import foldpar
from foldpar import FoldedLayout, LayoutError, solve_layout
from foldpar.layout.layout import AXES, ORDERS

VIEWS = {"dense": ("pp", "dp", "cp", "tp"), "expert": ("pp", "edp", "ep", "etp")}
PARTS = {axis: tuple(axis.split("_")) for axis in AXES}
VIEW_OF = {axis: next(view for view in VIEWS if set(PARTS[axis]) <= set(VIEWS[view])) for axis in AXES}


def naive_groups(layout: FoldedLayout, axis: str) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Groups by the coordinates that they have in common, from a table of the world that is sorted, not computed."""
    view, sizes = VIEWS[VIEW_OF[axis]], {name: getattr(layout, name) for name in chain(*VIEWS.values())}
    ranks = list(range(layout.world))
    if VIEW_OF[axis] == "expert" and layout.order == "tp-lane-major":
        ranks.sort(key=lambda rank: (rank // layout.stage_size, rank % layout.tp, rank))
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in zip(ranks, product(*(range(sizes[name]) for name in view)), strict=True):
        common = tuple(index for name, index in zip(view, place, strict=True) if name not in PARTS[axis])
        groups.setdefault(common, []).append(rank)
    return {common: tuple(members) for common, members in groups.items()}


def assert_axes_partition_the_world(layout: FoldedLayout) -> None:
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(chain.from_iterable(groups)) == list(range(layout.world))
        assert {len(group) for group in groups} == {layout.size(axis)}


def assert_groups_are_the_naive_ones_in_lexicographic_order(layout: FoldedLayout) -> None:
    for axis in AXES:
        groups = naive_groups(layout, axis)
        assert layout.groups(axis) == tuple(groups[common] for common in sorted(groups))


def assert_a_rank_finds_its_own_group(layout: FoldedLayout) -> None:
    for axis in AXES:
        for group in layout.groups(axis):
            assert all(layout.group(axis, rank) == group for rank in group)


def assert_axes_of_one_view_meet_in_one_rank(layout: FoldedLayout) -> None:
    for view in VIEWS.values():
        for one, other in combinations(view, 2):
            for rank in range(layout.world):
                assert set(layout.group(one, rank)) & set(layout.group(other, rank)) == {rank}


def assert_coordinates_round_trip(layout: FoldedLayout) -> None:
    for rank in range(layout.world):
        index = dataclasses.asdict(layout.coordinate(rank))
        assert layout.dense_rank(**{axis: index[axis] for axis in VIEWS["dense"]}) == rank
        assert layout.expert_rank(**{axis: index[axis] for axis in VIEWS["expert"]}) == rank
        assert all(layout.rank_at(view, layout.position(view, rank)) == rank for view in VIEWS)
        index |= {"dp_cp": index["dp"] * layout.cp + index["cp"], "ep_etp": index["ep"] * layout.etp + index["etp"]}
        assert all(layout.group(axis, rank)[index[axis]] == rank for axis in AXES)


def assert_orders_agree_without_tensor_parallelism(layout: FoldedLayout) -> None:
    one, other = (dataclasses.replace(layout, tp=1, cp=1, order=order) for order in ORDERS)
    assert all(one.groups(axis) == other.groups(axis) for axis in AXES)


def assert_spans_list_the_groups(layout: FoldedLayout) -> None:
    for axis in AXES:
        span = layout.span(axis)
        for number, group in enumerate(layout.groups(axis)):
            assert tuple(layout.rank_at(span.view, position) for position in span.nth(number)) == group
            assert all(span.around(position) == span.nth(number) for position in span.nth(number))


def assert_equal_rank_sets_are_listed_in_equal_order(layout: FoldedLayout) -> None:
    """So one communicator serves all axes of the same ranks."""
    for rank in range(layout.world):
        order_of: dict[frozenset[int], tuple[int, ...]] = {}
        for group in (layout.group(axis, rank) for axis in AXES):
            assert order_of.setdefault(frozenset(group), group) == group


LAWS = (
    assert_equal_rank_sets_are_listed_in_equal_order,
    assert_axes_partition_the_world,
    assert_groups_are_the_naive_ones_in_lexicographic_order,
    assert_a_rank_finds_its_own_group,
    assert_axes_of_one_view_meet_in_one_rank,
    assert_coordinates_round_trip,
    assert_orders_agree_without_tensor_parallelism,
    assert_spans_list_the_groups,
)


@pytest.mark.parametrize("law", LAWS)
@given(layout=layouts())
def test_every_drawn_layout_obeys(law, layout):
    law(layout)


@pytest.mark.parametrize(("world", "layouts"), [(16, 3_060), pytest.param(64, 55_284, marks=pytest.mark.long)])
def test_every_layout_of_up_to_so_many_ranks_obeys(world, layouts):
    """The table laws on all of them; the slow per-rank laws up to 8 ranks."""
    count = 0
    for layout in every_layout(world):
        for axis in AXES:
            groups = naive_groups(layout, axis)
            assert layout.groups(axis) == tuple(groups[common] for common in sorted(groups)), (layout, axis)
        if layout.world <= 8:
            for law in LAWS:
                law(layout)
        count += 1
    assert count == layouts


@given(layouts(), st.data())
def test_a_layout_is_a_plain_value(layout, data):
    same = FoldedLayout(**{field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)})
    assert same == layout
    assert hash(same) == hash(layout)
    assert pickle.loads(pickle.dumps(layout)) == copy.deepcopy(layout) == layout
    assert eval(repr(layout), vars(foldpar) | {"FoldedLayout": FoldedLayout}) == layout
    field = data.draw(st.sampled_from(dataclasses.fields(layout))).name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(layout, field, 1)


def test_derived_sizes_cannot_disagree():
    layout = solve_layout(48, tp=2, cp=3, ep=4, etp=3, pp=2)
    assert layout.stage_size == layout.tp * layout.cp * layout.dp == layout.etp * layout.ep * layout.edp == 24
    assert {axis: layout.size(axis) for axis in AXES} == {
        "pp": 2, "dp": 4, "cp": 3, "tp": 2, "edp": 2, "ep": 4, "etp": 3, "dp_cp": 12, "ep_etp": 12,
    }  # fmt: skip


# Folds across lanes: an EP group that holds ranks of several lanes.


def lanes_and_replicas(layout: FoldedLayout) -> list[tuple[set[int], set[int]]]:
    return [
        ({layout.coordinate(rank).tp for rank in group}, {layout.coordinate(rank).dp for rank in group})
        for group in layout.groups("ep")
    ]


def test_world_4_tp4_ep4_folds_all_experts_over_one_tp_group():
    layout = solve_layout(4, tp=4, ep=4)
    assert (layout.dp, layout.edp) == (1, 1)
    assert lanes_and_replicas(layout) == [({0, 1, 2, 3}, {0})]


def test_world_4_tp2_ep4_spans_both_lanes_and_both_replicas():
    assert solve_layout(4, tp=2, ep=4).groups("ep") == ((0, 2, 1, 3),)
    assert lanes_and_replicas(solve_layout(4, tp=2, ep=4)) == [({0, 1}, {0, 1})]


def test_world_8_tp4_ep4_spans_two_lanes_per_group():
    assert lanes_and_replicas(solve_layout(8, tp=4, ep=4)) == [({0, 1}, {0, 1}), ({2, 3}, {0, 1})]
    assert solve_layout(8, tp=4, ep=4).groups("edp") == ((0, 2), (4, 6), (1, 3), (5, 7))


def test_world_12_tp3_ep4_keeps_each_group_on_one_lane():
    assert solve_layout(12, tp=3, ep=4).groups("ep") == ((0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11))
    assert solve_layout(12, tp=3, ep=4, order="consecutive").groups("ep") == (
        (0, 1, 2, 3),
        (4, 5, 6, 7),
        (8, 9, 10, 11),
    )


def test_world_12_tp4_ep6_cuts_a_group_in_the_middle_of_a_lane():
    assert solve_layout(12, tp=4, ep=6).groups("ep") == ((0, 4, 8, 1, 5, 9), (2, 6, 10, 3, 7, 11))
    assert solve_layout(12, tp=4, ep=2).groups("ep") == ((0, 4), (8, 1), (5, 9), (2, 6), (10, 3), (7, 11))


def test_stages_fold_alike():
    one, two = solve_layout(8, tp=4, ep=4), solve_layout(16, tp=4, ep=4, pp=2)
    for axis in set(AXES) - {"pp"}:
        second = tuple(tuple(rank + 8 for rank in group) for group in one.groups(axis))
        assert two.groups(axis) == one.groups(axis) + second
    assert two.groups("pp") == tuple((rank, rank + 8) for rank in range(8))


def test_context_ranks_are_more_token_owners():
    layout = solve_layout(8, tp=2, cp=2, ep=4)
    assert layout.groups("cp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("dp_cp") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert layout.groups("ep") == solve_layout(8, tp=2, ep=4).groups("ep")


@pytest.mark.parametrize(("tp", "etp"), [(4, 2), (2, 2), (2, 4)])
def test_expert_tensor_parallelism_may_be_smaller_equal_or_larger_than_tp(tp, etp):
    layout = solve_layout(8, tp=tp, ep=2, etp=etp)
    for whole in layout.groups("ep_etp"):
        slices = [layout.group("etp", rank) for rank in whole[::etp]]
        assert tuple(chain(*slices)) == whole


# Size: a question about one rank costs what its answer costs.


@pytest.mark.parametrize("order", ORDERS)
def test_a_rank_of_a_million_asks_cheaply(order):
    layout = solve_layout(1_048_576, tp=8, ep=64, order=order)
    for ask in (lambda: layout.coordinate(777_777), lambda: layout.group("ep", 777_777)):
        ask()
        tracemalloc.start()
        ask()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000
        seconds = []
        for _ in range(200):
            start = time.perf_counter()
            ask()
            seconds.append(time.perf_counter() - start)
        assert median(seconds) < 100e-6


# Errors: their text is part of the interface.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"world": 8, "ep": 3, "etp": 2},
            "ep * etp = 3 * 2 = 6 does not divide stage_size = 8, so edp would not be whole. "
            "With etp = 2, ep can be 1, 2 or 4.",
        ),
        (
            {"world": 8, "ep": 8, "etp": 2},
            "ep * etp = 8 * 2 = 16 does not divide stage_size = 8, so edp would not be whole. "
            "With etp = 2, ep can be 1, 2 or 4. With ep = 8, etp can be 1.",
        ),
        (
            {"world": 8, "ep": 3, "etp": 5},
            "ep * etp = 3 * 5 = 15 does not divide stage_size = 8, so edp would not be whole. "
            "Each must divide it: 1, 2, 4 or 8.",
        ),
        (
            {"world": 8, "tp": 4, "pp": 4},
            "tp * cp = 4 * 1 = 4 does not divide stage_size = 2 (world / pp = 8 / 4), so dp would not be whole. "
            "With cp = 1, tp can be 1 or 2. With tp * cp = 4 and ep * etp = 1, pp can be 1 or 2.",
        ),
        (
            {"world": 12, "cp": 5},
            "tp * cp = 1 * 5 = 5 does not divide stage_size = 12, so dp would not be whole. "
            "With tp = 1, cp can be 1, 2, 3, 4, 6 or 12.",
        ),
        (
            {"world": 12, "pp": 5, "tp": 2},
            "pp = 5 does not divide world = 12, so the stages would not be of one size. "
            "With tp * cp = 2 and ep * etp = 1, pp can be 1, 2, 3 or 6.",
        ),
        (
            {"world": 12, "pp": 5, "tp": 7},
            "pp = 5 does not divide world = 12, so the stages would not be of one size. "
            "It must divide the world: 1, 2, 3, 4, 6 or 12.",
        ),
        ({"world": 8, "tp": 0}, "tp = 0 is not a positive integer. With cp = 1, tp can be 1, 2, 4 or 8."),
        ({"world": 8, "ep": -2}, "ep = -2 is not a positive integer. With etp = 1, ep can be 1, 2, 4 or 8."),
        (
            {"world": 6, "pp": 0, "cp": 2},
            "pp = 0 is not a positive integer. With tp * cp = 2 and ep * etp = 1, pp can be 1 or 3.",
        ),
        (
            {"world": 8, "tp": True},
            "tp = True, of type bool, is not a positive integer. With cp = 1, tp can be 1, 2, 4 or 8.",
        ),
        (
            {"world": 8, "etp": 2.0},
            "etp = 2.0, of type float, is not a positive integer. With ep = 1, etp can be 1, 2, 4 or 8.",
        ),
        (
            {"world": 0, "tp": 2, "ep": 3},
            "world = 0 is not a positive integer. With these degrees, world can be any multiple of 6.",
        ),
        (
            {"world": "8"},
            "world = '8', of type str, is not a positive integer. With these degrees, world can be any multiple of 1.",
        ),
        (
            {"world": 8, "order": "lanes"},
            "order = 'lanes' is unknown: it can be 'tp-lane-major' or 'consecutive'.",
        ),
    ],
)
def test_a_fold_that_cannot_be_names_what_can(arguments, text):
    with pytest.raises(LayoutError) as caught:
        solve_layout(**arguments)
    assert str(caught.value) == text
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, foldpar.FoldingError)


@pytest.mark.parametrize("name", ["world", "tp", "ep", "etp", "pp", "cp"])
@pytest.mark.parametrize("value", [0, -1, True, False, None, 1.0, "1", Fraction(1), [1], np.float64(1), np.True_])
def test_only_positive_integers_are_sizes(name, value):
    with pytest.raises(LayoutError, match=rf"^{name} = .* is not a positive integer\."):
        solve_layout(**({"world": 8} | {name: value}))


@given(layouts(max_world=32), st.data())
def test_the_values_that_an_error_lists_do_work(layout, data):
    degrees = {name: getattr(layout, name) for name in ("tp", "ep", "etp", "pp", "cp")}
    name = data.draw(st.sampled_from(sorted(degrees)))
    good, listed = [], []
    for size in range(1, layout.world + 1):
        try:
            solve_layout(layout.world, **(degrees | {name: size}))
            good.append(size)
        except LayoutError as error:
            listed.append(re.search(rf"\b{name} can be ([^.]*)\.", str(error)).group(1))
    assert all([int(size) for size in re.findall(r"\d+", text)] == good for text in listed)


def test_a_long_list_of_choices_is_cut():
    with pytest.raises(LayoutError, match=r"1, 2, 3, .*, \.\.\., .* or 720720\.$") as caught:
        solve_layout(720_720, tp=17)
    assert len(str(caught.value)) < 300


def test_integers_of_other_kinds_are_taken_as_ints():
    layout = solve_layout(np.int64(8), tp=np.int32(2), ep=np.uint8(4))
    assert layout == solve_layout(8, tp=2, ep=4)
    assert {type(getattr(layout, field.name)) for field in dataclasses.fields(layout)} == {int, str}
    assert layout.group("ep", np.int64(3)) == (1, 3, 5, 7)
    assert {type(rank) for rank in layout.group("tp", np.int64(3))} == {int}


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda it: it.coordinate(8), "rank = 8 is out of range for world = 8: it can be 0 to 7."),
        (lambda it: it.group("ep", -1), "rank = -1 is out of range for world = 8: it can be 0 to 7."),
        (lambda it: it.group("ep", 1.0), "rank = 1.0, of type float, is not an integer from 0 to 7."),
        (lambda it: it.coordinate(True), "rank = True, of type bool, is not an integer from 0 to 7."),
        (lambda it: it.dense_rank(tp=2), "tp = 2 is out of range for an axis of size 2: it can be 0 to 1."),
        (lambda it: it.expert_rank(etp=1), "etp = 1 is out of range for an axis of size 1: it can be only 0."),
        (lambda it: it.rank_at("expert", 8), "position = 8 is out of range for world = 8: it can be 0 to 7."),
        (lambda it: it.position("moe", 0), "'moe' is not a view: it can be 'dense' or 'expert'."),
    ],
)
def test_questions_without_an_answer_are_refused(ask, text):
    with pytest.raises(LayoutError) as caught:
        ask(solve_layout(8, tp=2, ep=4))
    assert str(caught.value) == text


@pytest.mark.parametrize("ask", ["size", "span", "groups"])
@pytest.mark.parametrize("axis", ["tpx", "", None, ["tp"], "ep_edp"])
def test_an_unknown_axis_is_refused(ask, axis):
    with pytest.raises(LayoutError, match=r"is not an axis: it can be 'pp', 'dp', .* or 'ep_etp'\.$"):
        getattr(solve_layout(8), ask)(axis)
