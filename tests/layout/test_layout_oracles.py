"""Rank tables that others compute: torch's mesh algebra, where it can express a layout, and Megatron-Core."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
from every_layout import every_layout

from foldpar import FoldedLayout
from foldpar.layout.layout import Axis

mesh_layout = pytest.importorskip("torch.distributed._mesh_layout", reason="this torch has no mesh algebra")

SHORT, LONG = 16, 64


def worlds(short: int, long: int) -> list[object]:
    return [short, pytest.param(long, marks=pytest.mark.long)]


def is_strided(layout: FoldedLayout) -> bool:
    """Whether nested strides can name the ranks of the expert view: blocks of etp and of ep * etp fit into lanes."""
    per_lane = layout.stage_size // layout.tp
    fits = [per_lane % block == 0 or block % per_lane == 0 for block in (layout.etp, layout.ep * layout.etp)]
    return layout.order == "consecutive" or all(fits)


def by_mesh_algebra(layout: FoldedLayout) -> dict[str, list[tuple[int, ...]]] | None:
    """The groups of the expert axes, composed of strides; None where there are none."""
    size, tp = layout.stage_size, layout.tp
    if not hasattr(mesh_layout, "_FlatLayout"):
        pytest.skip("this torch has another mesh algebra")
    places = ((size,), (1,)) if layout.order == "consecutive" else ((tp, size // tp), (1, tp))
    view = mesh_layout._MeshLayout.from_sizes_strides((layout.edp, layout.ep, layout.etp))
    try:
        composed = mesh_layout._FlatLayout(*places).composition(view)
    except (ValueError, AssertionError):
        return None
    ranks = [axis.all_ranks_from_zero() for axis in composed]
    groups: dict[str, list[tuple[int, ...]]] = {"edp": [], "ep": [], "etp": []}
    for stage in range(layout.pp):
        for place, listed in enumerate(groups.values()):
            others = ranks[:place] + ranks[place + 1 :]
            for chosen in product(*others):
                listed.append(tuple(stage * size + sum(chosen) + rank for rank in ranks[place]))
    return groups


@pytest.mark.parametrize("world", worlds(SHORT, LONG))
def test_torchs_mesh_algebra_computes_the_same_tables_wherever_they_are_strided(world: int) -> None:
    agreed = beyond = 0
    for layout in every_layout(world):
        tables = by_mesh_algebra(layout)
        if tables is None:
            assert not is_strided(layout), layout
            beyond += 1
            continue
        assert is_strided(layout), layout
        for axis, groups in tables.items():
            assert list(layout.groups(_axis(axis))) == groups, (layout, axis)
        agreed += 1
    assert agreed > 1000
    assert beyond > 10, "some lane-major layouts are beyond strides, which is why tables are of integers"


@pytest.mark.parametrize("world", worlds(SHORT, LONG))
def test_megatron_core_computes_the_consecutive_tables(world: int) -> None:
    """Expert tensor parallelism included. The set-up leaves megatron-core out: CONTRIBUTING.md says how to get it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional parts that a rank table does not need
        state = pytest.importorskip("megatron.core.parallel_state", reason="megatron-core is not installed")
    count = 0
    for layout in every_layout(world):
        if layout.order != "consecutive":
            continue
        common = {"pp": layout.pp, "order": "tp-cp-ep-dp-pp"}
        dense = state.RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, cp=layout.cp, **common)
        expert = state.RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, cp=1, **common)
        tables = {axis: dense.get_ranks(word) for axis, word in DENSE_WORDS.items()}
        tables |= {axis: expert.get_ranks(word) for axis, word in EXPERT_WORDS.items()}
        for axis, groups in tables.items():
            assert sorted(map(tuple, groups)) == sorted(layout.groups(_axis(axis))), (layout, axis)
        count += 1
    assert count > 1000


DENSE_WORDS = {"pp": "pp", "dp": "dp", "cp": "cp", "tp": "tp", "dp_cp": "dp-cp"}
EXPERT_WORDS = {"edp": "dp", "ep": "ep", "etp": "tp", "ep_etp": "tp-ep"}


def _axis(name: str) -> Axis:
    return name  # type: ignore[return-value]
