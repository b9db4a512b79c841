"""Process groups: what is made, what is shared, what is left behind, and how mistakes are met."""

from __future__ import annotations

import gc
import os
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import tiny_model
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import foldpar
from foldpar.comm.c10d import default_store
from foldpar.errors import CollectiveError, FoldingError, GroupsError, LayoutError
from foldpar.layout.layout import AXES
from foldpar.testing import live_groups, run_ranks

LAYOUTS = [
    (4, {"tp": 2, "ep": 4}),
    (4, {"tp": 4, "ep": 4}),
    (4, {"tp": 2, "ep": 2, "etp": 2}),
    (8, {"tp": 2, "ep": 4}),
    (8, {"tp": 4, "ep": 4}),
    (8, {"pp": 2, "tp": 2, "ep": 4}),
    (8, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}),
    (6, {"tp": 3, "ep": 2}),
]


def talk_on_every_axis(world: int, degrees: dict[str, int], order: str) -> None:
    """Every axis gathers its ranks in coordinate order, over communicators of exactly those ranks."""
    layout = foldpar.solve_layout(world, order=order, **degrees)
    with foldpar.create_groups(layout) as groups:
        assert groups.coordinate == layout.coordinate(dist.get_rank())
        for axis in AXES:
            group = groups.axis(axis)
            assert group is getattr(groups, axis)
            assert group.ranks == layout.group(axis, dist.get_rank())
            assert group.ranks[group.index] == dist.get_rank()
            assert (group.process_group is None) == (group.size == 1)
            told = foldpar.all_gather_rows(
                torch.tensor([dist.get_rank()]), group, row_counts=[1] * group.size, backward="slice"
            )
            assert tuple(told.tolist()) == group.ranks
        rank_sets = {tuple(sorted(groups.axis(axis).ranks)) for axis in AXES if groups.axis(axis).size > 1}
        assert len(groups.communicators) == len(rank_sets), "one communicator per set of ranks"
    assert live_groups() == []


@pytest.mark.parametrize("order", ["tp-lane-major", "consecutive"])
@pytest.mark.parametrize(("world", "degrees"), LAYOUTS)
def test_every_axis_talks_in_coordinate_order(world: int, degrees: dict[str, int], order: str) -> None:
    run_ranks(talk_on_every_axis, world, world, degrees, order, groups_left="error")


def communicators_of_rank(separate: tuple[str, ...]) -> int:
    with foldpar.create_groups(foldpar.solve_layout(8, tp=2, ep=4), separate=separate) as groups:
        return len(groups.communicators)


def test_world_8_tp2_ep4_needs_two_communicators_and_one_more_per_separate_axis() -> None:
    assert run_ranks(communicators_of_rank, 8, ()) == [2] * 8
    assert run_ranks(communicators_of_rank, 8, ("edp",)) == [3] * 8


def make_after_uneven_groups() -> list[int]:
    """A user's own groups, made on some ranks only, must not confuse ours."""
    if dist.get_rank() < 2:
        for _ in range(3):
            dist.new_group([0, 1], use_local_synchronization=True)
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        return foldpar.comm.collectives.all_gather(torch.tensor(dist.get_rank()), groups.ep).tolist()


def test_creation_after_a_users_uneven_new_group() -> None:
    assert run_ranks(make_after_uneven_groups, 4, timeout=20.0) == [[0, 2, 1, 3]] * 4


def cycle(times: int) -> tuple[list[str], int]:
    for _ in range(times):
        with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4), separate=["edp"]) as groups:
            foldpar.comm.collectives.all_reduce_(torch.ones(1), groups.ep)
    groups.destroy()  # again: nothing happens
    return live_groups(), len(distributed_c10d._world.pg_map)


@pytest.mark.parametrize("cycles", [20, pytest.param(100, marks=pytest.mark.long)])
def test_creating_and_destroying_leaks_nothing(cycles: int) -> None:
    assert run_ranks(cycle, 4, cycles, timeout=120.0, groups_left="error") == [([], 1)] * 4


def train(stage: int) -> list[int]:
    """The threads of this rank after each of some models, with groups of its own."""
    threads = []
    for tp, ep in ((1, 2), (2, 2), (2, 1), (2, 2)):
        with foldpar.create_groups(foldpar.solve_layout(2, tp=tp, ep=ep)) as groups:
            model = tiny_model("qwen3_moe")
            foldpar.fold_model(model, groups)
            if stage:
                foldpar.shard_model(model, groups, stage=stage)
            ids = torch.zeros(1, 4, dtype=torch.int64)
            model(input_ids=ids, labels=ids).loss.backward()
            foldpar.reduce_gradients(model, groups)
        del model, groups
        gc.collect()
        threads.append(len(os.listdir("/proc/self/task")))
    return threads


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("stage", [0, 3])
def test_groups_end_with_what_was_trained_in_them(stage: int) -> None:
    for threads in run_ranks(train, 2, stage):
        assert len(set(threads)) == 1, threads


def two_layouts() -> tuple[list[int], list[int]]:
    with (
        foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as one,
        foldpar.create_groups(foldpar.solve_layout(4, tp=4, ep=2)) as two,
    ):
        rank = torch.tensor(dist.get_rank())
        gathered = [foldpar.comm.collectives.all_gather(rank, group).tolist() for group in (one.ep, two.ep, one.ep)]
        assert gathered[0] == gathered[2]
        one.destroy()
        foldpar.comm.collectives.all_gather(rank, two.tp)
        with pytest.raises(GroupsError, match=r"These groups were destroyed; make new ones"):
            _ = one.tp
        return gathered[0], gathered[1]


def test_two_layouts_coexist() -> None:
    assert run_ranks(two_layouts, 4)[0] == ([0, 2, 1, 3], [0, 1])


def meshes() -> list[int]:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        mesh = groups.mesh("dense")
        assert mesh is groups.mesh("dense")
        assert mesh.mesh_dim_names == ("pp", "dp", "cp", "tp")
        assert mesh["tp"].get_group() is groups.tp.process_group
        assert mesh["cp"].size() == 1
        assert groups.mesh("expert").mesh.flatten().tolist() == [0, 2, 1, 3]
        assert groups.mesh("expert")["ep"].get_local_rank() == groups.ep.index == dist.get_rank(groups.ep.process_group)
        with pytest.raises(LayoutError, match=r"no view 'experts'. Views are 'dense' and 'expert'"):
            groups.mesh("experts")  # type: ignore[arg-type]
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2, order="consecutive")) as groups:
        mesh = groups.mesh("expert")
        assert mesh.mesh_dim_names == ("pp", "edp", "ep", "etp")
        assert mesh["ep"].get_group() is groups.ep.process_group
        assert list(mesh.get_coordinate() or ()) == [0, groups.edp.index, groups.ep.index, 0]
        return mesh.mesh.flatten().tolist()


def test_meshes_of_both_views_in_any_layout() -> None:
    assert run_ranks(meshes, 4, groups_left="error")[0] == [0, 1, 2, 3]


def places(layout: foldpar.FoldedLayout) -> None:
    with foldpar.create_groups(layout) as groups:
        for view, axes in (("dense", ("pp", "dp", "cp", "tp")), ("expert", ("pp", "edp", "ep", "etp"))):
            mesh = groups.mesh(view)
            assert mesh.mesh_dim_names == axes
            assert tuple(mesh.get_coordinate()) == tuple(groups.axis(axis).index for axis in axes)
            for axis in axes:
                group = groups.axis(axis)
                assert tuple(dist.get_process_group_ranks(mesh[axis].get_group())) == group.ranks
                assert dist.get_rank(mesh[axis].get_group()) == group.index


@pytest.mark.parametrize("order", ["tp-lane-major", "consecutive"])
@pytest.mark.parametrize(
    "degrees", [{"tp": 4, "ep": 4}, {"tp": 2, "etp": 2, "ep": 2}, {"tp": 2, "ep": 1}, {"pp": 2, "tp": 2, "ep": 4}]
)
def test_group_rank_mesh_place_and_coordinate_are_one_number(degrees: dict[str, int], order: str) -> None:
    run_ranks(places, 8, foldpar.solve_layout(8, **degrees, order=order))


def inherits_timeouts() -> tuple[timedelta, timedelta, timedelta]:
    def of(group: dist.ProcessGroup) -> timedelta:
        return group._get_backend(torch.device("cpu")).options._timeout

    layout = foldpar.solve_layout(2, tp=2)
    with foldpar.create_groups(layout) as default, foldpar.create_groups(layout, timeout=timedelta(seconds=7)) as own:
        return of(dist.group.WORLD), of(default.tp.process_group), of(own.tp.process_group)


def test_timeout_none_inherits_the_default_groups() -> None:
    world, inherited, own = run_ranks(inherits_timeouts, 2, timeout=33.0)[0]
    assert inherited == world != timedelta(minutes=30)
    assert own == timedelta(seconds=7)


def straight_under_torchrun() -> list[int]:
    assert not dist.is_initialized()
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4), backend="gloo") as groups:
        gathered = foldpar.comm.collectives.all_gather(torch.tensor(dist.get_rank()), groups.ep).tolist()
    assert not dist.is_initialized()
    return gathered


def test_initialises_and_removes_the_default_group_under_torchrun() -> None:
    assert run_ranks(straight_under_torchrun, 4, init=False) == [[0, 2, 1, 3]] * 4


# -- Mistakes ---------------------------------------------------------------------------------------------------------


def wrong_world() -> str:
    with pytest.raises(GroupsError) as refused:
        foldpar.create_groups(foldpar.solve_layout(4, tp=2))
    return str(refused.value)


def test_a_layout_of_another_world_is_refused_on_every_rank() -> None:
    for text in run_ranks(wrong_world, 2):
        assert "The layout is for world = 4, but the default process group has 2 rank(s)" in text


def different_arguments() -> str:
    layout = foldpar.solve_layout(4, tp=2 if dist.get_rank() else 4, ep=2)
    with pytest.raises(GroupsError) as refused:
        foldpar.create_groups(layout, separate=("edp",) if dist.get_rank() == 2 else ())
    return str(refused.value)


def test_ranks_that_disagree_are_refused_on_every_rank() -> None:
    for rank, text in enumerate(run_ranks(different_arguments, 4, groups_left="error")):
        assert "different arguments: tp, separate differ(s)" in text
        assert f"Rank {rank} passed" in text


def other_backends() -> str:
    with pytest.raises(GroupsError) as refused:
        foldpar.create_groups(
            foldpar.solve_layout(2, tp=2), backend="cpu:gloo,cuda:gloo" if dist.get_rank() else "cpu:gloo"
        )
    return str(refused.value)


def test_backends_that_begin_alike_are_told_apart() -> None:
    for text in run_ranks(other_backends, 2, groups_left="error"):
        assert "different arguments: backend differ(s)" in text


def one_rank_fails(where: str) -> str:
    """Rank 1 is wrong in its arguments, or fails while it makes the first group or the last."""
    layout, last = foldpar.solve_layout(4, tp=2, ep=4), dist.get_rank() == 1
    given: dict[str, Any] = {"layout": layout, "separate": (), "timeout": timedelta(seconds=1)}
    made: list[object] = []
    create = distributed_c10d._new_process_group_helper

    def failing(*rest: Any, **options: Any) -> Any:
        made.append(rest)
        if len(made) == (1 if where == "first group" else 2):
            raise OSError(24, "Too many open files")
        return create(*rest, **options)

    wrong = {"separate": ("dep",), "layout": foldpar.solve_layout(8, tp=2), "timeout": 3}
    before = len(distributed_c10d._world.pg_map)
    with pytest.MonkeyPatch.context() as patch:
        if last and where in wrong:
            given[where] = wrong[where]
        elif last:
            patch.setattr(distributed_c10d, "_new_process_group_helper", failing)
        with pytest.raises(FoldingError) as refused:
            foldpar.create_groups(**given)
    assert len(distributed_c10d._world.pg_map) == before
    with foldpar.create_groups(layout) as groups:
        foldpar.comm.collectives.all_reduce_(torch.ones(1), groups.ep)  # still in step
    return f"{type(refused.value).__name__}: {refused.value}"


@pytest.mark.parametrize(
    ("where", "kind", "cause"),
    [
        ("separate", "LayoutError", "separate names the axis 'dep', which does not exist"),
        ("layout", "GroupsError", "The layout is for world = 8, but the default process group has 4"),
        ("timeout", "ArgumentError", "timeout must be a timedelta or None, and is an int: 3"),
        ("first group", "GroupsError", "OSError: [Errno 24] Too many open files"),
        ("last group", "GroupsError", "OSError: [Errno 24] Too many open files"),
    ],
)
def test_a_rank_that_fails_is_quoted_on_all_others(where: str, kind: str, cause: str) -> None:
    for rank, text in enumerate(run_ranks(one_rank_fails, 4, where, groups_left="error")):
        assert cause in text, (rank, text)
        assert text.startswith(f"{kind if rank == 1 else 'GroupsError'}: ")
        assert rank == 1 or "create_groups: rank 1 failed: " in text


def one_gpu_for_all(own_group: bool) -> str:
    def duplicate(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "NCCL error: invalid usage. Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 0"
        )

    with pytest.MonkeyPatch.context() as patch, foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        patch.setattr(dist, "all_reduce", duplicate)
        layout, group = groups.layout, groups.ep
        with pytest.raises((GroupsError, CollectiveError)) as refused:
            _ = (
                foldpar.comm.collectives.all_reduce_(torch.ones(1), group)
                if own_group
                else foldpar.create_groups(layout)
            )
    return str(refused.value)


@pytest.mark.parametrize("own_group", [False, True])
def test_processes_that_share_a_gpu_are_told_to_set_their_device(own_group: bool) -> None:
    for rank, text in enumerate(run_ranks(one_gpu_for_all, 2, own_group)):
        assert 'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))' in text
        assert "Several processes use one GPU" in text and f"LOCAL_RANK={rank}" in text


def test_without_processes_the_error_says_how_to_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(GroupsError, match=r"torchrun --nproc-per-node 4 script.py"):
        foldpar.create_groups(foldpar.solve_layout(4, tp=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(GroupsError, match=r"world = 4, but torchrun started WORLD_SIZE = 2 process"):
        foldpar.create_groups(foldpar.solve_layout(4, tp=2))
    with pytest.raises(LayoutError, match=r"separate names the axis 'dep', which does not exist. Axes are pp, dp"):
        foldpar.create_groups(foldpar.solve_layout(1), separate=["dep"])


def test_one_rank_needs_no_process_group_at_all() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        assert groups.ep.ranks == (0,) and groups.communicators == ()
        with pytest.raises(GroupsError, match=r"A DeviceMesh needs torch.distributed"):
            groups.mesh("dense")
    assert not dist.is_initialized()


def one_rank_of_torchrun() -> tuple[tuple[str, ...] | None, bool]:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        names = groups.mesh("dense").mesh_dim_names
    return names, dist.is_initialized()


def what_starts_find(starts: tuple[str, ...]) -> list[bool]:
    """Whether each finds what the one before has left in the store."""
    found = []
    for start in starts:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = start
        try:
            with foldpar.create_groups(foldpar.solve_layout(2, ep=2)):
                found.append(default_store().check(["address"]))
                dist.barrier()
                default_store().set("address", "of this start")
        finally:
            del os.environ["TORCHELASTIC_RESTART_COUNT"]
    return found


def test_ranks_that_are_started_again_do_not_find_those_before() -> None:
    assert run_ranks(what_starts_find, 2, ("0", "1", "2"), init=False) == [[False] * 3] * 2


def test_one_rank_of_torchrun_has_meshes_as_many_have() -> None:
    assert run_ranks(one_rank_of_torchrun, 1, init=False) == [(("pp", "dp", "cp", "tp"), False)]


def sorted_group() -> None:
    with pytest.raises(GroupsError, match=r"The ep group is \(1, 0\) in coordinate order, but .* as \(0, 1\)"):
        foldpar.AxisGroup("ep", (1, 0), 1 - dist.get_rank(), dist.group.WORLD)


def test_axis_groups_check_themselves() -> None:
    with pytest.raises(GroupsError, match=r"index 2 is outside the tp group of 1 rank\(s\)"):
        foldpar.AxisGroup("tp", (0,), 2, None)
    with pytest.raises(GroupsError, match=r"The tp group \(0, 1\) has several ranks and needs a process group"):
        foldpar.AxisGroup("tp", (0, 1), 0, None)
    run_ranks(sorted_group, 2)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups, pytest.raises(LayoutError, match="no axis 'xp'"):
        groups.axis("xp")


def stuck() -> str:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2), timeout=timedelta(seconds=2)) as groups:
        if dist.get_rank() == 1:
            return "gone"
        with pytest.raises(CollectiveError) as failed:
            foldpar.all_reduce(torch.ones(1), groups.ep, backward="sum")
    return str(failed.value)


def test_a_missing_peer_is_noticed_within_the_timeout() -> None:
    text = run_ranks(stuck, 2)[0]
    assert "all_reduce over ep failed on rank 0 (ranks (0, 1))" in text


# -- Cost -------------------------------------------------------------------------------------------------------------


def test_a_rank_of_4096_makes_only_its_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    create = distributed_c10d._new_process_group_helper

    def counting(size: int, *rest: object, **options: object) -> object:
        made.append(size)
        return create(size, *rest, **options)

    dist.init_process_group("fake", store=FakeStore(), rank=1234, world_size=4096)
    try:
        monkeypatch.setattr(distributed_c10d, "_new_process_group_helper", counting)
        layout = foldpar.solve_layout(4096, tp=8, ep=64, etp=2, pp=4, cp=2)
        with foldpar.create_groups(layout) as groups:
            assert sorted(made) == sorted(
                len(set(ranks))
                for ranks in {tuple(sorted(groups.axis(axis).ranks)) for axis in AXES if groups.axis(axis).size > 1}
            )
            assert len(made) <= len(AXES)
    finally:
        dist.destroy_process_group()


def _meshes_of_two_libraries(first: str) -> None:
    """Meshes that compare equal, one after the other; what an operation gives back lies on its own."""

    def of_foldpar() -> None:
        with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
            _on_its_own_mesh(groups.mesh("dense")["tp"])

    def of_somebody_else() -> None:
        mesh = init_device_mesh("cpu", (1, 1, 1, 2), mesh_dim_names=("pp", "dp", "cp", "tp"))
        _on_its_own_mesh(mesh["tp"])  # over the default group

    in_turn = [of_foldpar, of_somebody_else] if first == "foldpar" else [of_somebody_else, of_foldpar]
    for use in (*in_turn, *in_turn):
        use()


def _on_its_own_mesh(mesh: DeviceMesh) -> None:
    tensor = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    doubled = torch.zeros_like(tensor) + tensor * 2
    assert dist.get_process_group_ranks(doubled.device_mesh.get_group()) == [0, 1]
    assert doubled.device_mesh.get_group() is mesh.get_group()
    assert doubled.full_tensor().tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("first", ["foldpar", "somebody else"])
def test_a_mesh_that_ended_is_not_given_to_the_next_one_that_is_equal(first: str) -> None:
    run_ranks(_meshes_of_two_libraries, 2, first)
