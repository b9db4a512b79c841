"""``foldpar.testing``: ranks that answer, fail and hang as they should, and strategies that shrink as they should."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor

import foldpar.testing
from foldpar import FoldedLayout, LayoutError
from foldpar.layout.layout import ORDERS
from foldpar.testing import RanksFailed, layouts, live_groups, routings, row_counts, run_ranks, token_batches
from foldpar.testing.strategies import Balance

both_backends = pytest.mark.parametrize("backend", ["spawned", "threads"])


# -- What comes back --------------------------------------------------------------------------------------------------


def rank_and_world():
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


@both_backends
@pytest.mark.parametrize("world", range(1, 9))
def test_results_come_in_rank_order(backend, world):
    results = run_ranks(rank_and_world, world, backend=backend)
    assert [(rank, size) for rank, size, _ in results] == [(rank, world) for rank in range(world)]
    assert {int(total) for _, _, total in results} == {world * (world - 1) // 2}


class SendRows(torch.autograd.Function):
    """Uneven all-to-all; the backward sends the gradients back the way the rows came."""

    @staticmethod
    def forward(ctx, rows, send, receive):
        ctx.counts = send, receive
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx, grad):
        send, receive = ctx.counts
        out = grad.new_empty(sum(send), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), send, receive)
        return out, None, None


def exchange(counts):
    """Rank ``s`` sends ``counts[s][d]`` rows to rank ``d``; returns what it got and the gradient of what it sent."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(sum(counts[rank]), 3, dtype=torch.float64, generator=generator, requires_grad=True)
    got = SendRows.apply(rows, counts[rank], [row[rank] for row in counts])
    (got.square().sum() * (rank + 1)).backward()
    return rows, got, rows.grad


def test_both_backends_agree_on_an_uneven_exchange_and_its_backward():
    counts = [[1, 0, 4], [2, 3, 0], [0, 0, 0]]
    spawned, threads = (run_ranks(exchange, 3, counts, backend=backend) for backend in ("spawned", "threads"))
    for source, (rows, got, grad) in enumerate(spawned):
        for ours, theirs in zip((rows, got, grad), threads[source], strict=True):
            assert torch.equal(ours, theirs.detach())
        factors = [d + 1.0 for d in range(3) for _ in range(counts[source][d])]
        torch.testing.assert_close(grad, 2 * rows.detach() * torch.tensor(factors, dtype=torch.float64)[:, None])


def sum_in_place(tensor: Tensor, nested: dict[str, list[Tensor]]):
    tensor += dist.get_rank()
    return {"plain": tensor, "nested": (nested["key"][0] * 2,)}


@both_backends
def test_every_rank_has_its_own_copy_of_the_arguments(backend):
    zeros = torch.zeros(3, dtype=torch.bfloat16)
    results = run_ranks(sum_in_place, 3, zeros, {"key": [torch.ones(0, 2)]}, backend=backend)
    assert torch.equal(zeros, torch.zeros(3, dtype=torch.bfloat16))
    assert [result["plain"].tolist() for result in results] == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert results[0]["nested"][0].shape == (0, 2)


def draw_and_where():
    return torch.rand(3), Path.cwd(), torch.get_num_threads(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_spawned_calls_start_from_the_same_state_in_the_callers_surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again = (run_ranks(draw_and_where, 2) for _ in range(2))
    assert torch.equal(first[0][0], again[1][0])
    assert [rest for _, *rest in first] == [[tmp_path, 1, "0", "2"], [tmp_path, 1, "1", "2"]]


@both_backends
def test_without_init_there_is_no_process_group(backend):
    assert run_ranks(dist.is_initialized, 2, backend=backend, init=False) == [False, False]


def initialise_and_sum():
    dist.init_process_group("gloo")
    return rank_and_world()


def test_spawned_ranks_can_initialise_themselves_as_under_torchrun():
    for _ in range(2):
        assert [int(total) for _, _, total in run_ranks(initialise_and_sum, 3, init=False)] == [3, 3, 3]


def start_that_fails_on_rank_0():
    if os.environ["RANK"] == "0":
        with pytest.raises(dist.DistStoreError, match="timeout"):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=timedelta(seconds=1))


def test_a_start_that_failed_on_one_rank_leaves_nothing_to_the_next_call():
    run_ranks(start_that_fails_on_rank_0, 2, init=False)
    assert [int(total) for _, _, total in run_ranks(rank_and_world, 2)] == [1, 1]


def leave_threads(number):
    never = threading.Event()
    for _ in range(number):
        threading.Thread(target=never.wait, daemon=True).start()
    return os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_workers_full_of_threads_are_replaced():
    first = run_ranks(leave_threads, 2, 10)
    assert run_ranks(leave_threads, 2, 150) == first
    assert run_ranks(os.getpid, 2) == first  # they say so with this answer
    fresh = run_ranks(os.getpid, 2)
    assert not set(first) & set(fresh)
    assert run_ranks(os.getpid, 2) == fresh


def test_threads_take_closures_and_run_backward():
    weight = torch.tensor([2.0, 3.0])

    def gradient():
        own = weight.clone().requires_grad_()
        (own.square().sum() * dist.get_rank()).backward()
        dist.all_reduce(own.grad)
        return own.grad.tolist()

    assert run_ranks(gradient, 4, backend="threads") == [[24.0, 36.0]] * 4


# -- What is left behind ----------------------------------------------------------------------------------------------


def leave_groups():
    dist.new_group([0, 1])
    if dist.get_rank() == 0:  # an uneven one: the counts of the ranks now differ
        dist.new_group([0], use_local_synchronization=True)
    return live_groups()


def leave_groups_in_a_cycle():
    held = [dist.new_group([0, 1])]
    held.append(held)


def footprint():
    time.sleep(0.3)  # groups close in the background
    return live_groups(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_fifty_spawned_calls_leak_no_group_file_or_thread():
    before = run_ranks(footprint, 2)
    for _ in range(50):
        assert [len(names) for names in run_ranks(leave_groups, 2)] == [2, 1]
    assert run_ranks(footprint, 2) == before
    assert before[0][0] == []


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_groups_in_cycles_are_freed_while_a_worker_lives():
    (_, _, before), _ = run_ranks(footprint, 2)
    for _ in range(30):
        run_ranks(leave_groups_in_a_cycle, 2)
    (_, _, after), _ = run_ranks(footprint, 2)
    assert after < before + 60  # a group has several


def test_fifty_calls_with_threads_leak_no_group_or_thread():
    run_ranks(leave_groups, 2, backend="threads")
    threads = threading.active_count()
    for _ in range(50):
        assert [len(names) for names in run_ranks(leave_groups, 2, backend="threads")] == [2, 1]
    assert threading.active_count() == threads
    assert live_groups() == []
    assert not dist.is_initialized()


@both_backends
def test_groups_left_behind_can_be_an_error(backend):
    with pytest.raises(RanksFailed, match=r"rank 0 raised.*the function left process groups behind: \S+, \S+\n"):
        run_ranks(leave_groups, 2, backend=backend, groups_left="error")
    assert run_ranks(live_groups, 2, backend=backend, groups_left="error") == [[], []]


def test_workers_are_reused_and_the_pool_grows():
    small = run_ranks(os.getpid, 2)
    large = run_ranks(os.getpid, 4)
    assert large[:2] == small
    assert run_ranks(os.getpid, 3) == large[:3]
    assert os.getpid() not in large


def test_reuse_is_fast():
    for backend in ("spawned", "threads"):
        run_ranks(rank_and_world, 2, backend=backend)
        start = time.perf_counter()
        for _ in range(10):
            run_ranks(rank_and_world, 2, backend=backend)
        assert time.perf_counter() - start < 2.0


def test_threads_leave_the_callers_own_process_group_alone():
    """In a process of its own, since the caller's group is a global."""
    script = """
import torch, torch.distributed as dist
from foldpar.testing import run_ranks

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
own = dist.new_group([0])
torch.set_num_threads(2)
assert run_ranks(lambda: dist.get_world_size(), 4, backend="threads") == [4] * 4
dist.all_reduce(torch.ones(1), group=own)
assert dist.get_world_size() == 1
assert torch.get_num_threads() == 2
assert torch.autograd.is_multithreading_enabled()
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# -- What goes wrong --------------------------------------------------------------------------------------------------


def fail_on(ranks):
    if dist.get_rank() in ranks:
        raise LookupError(f"no such thing on {dist.get_rank()}")
    dist.barrier()


@both_backends
def test_one_error_tells_the_cause_from_its_consequences(backend):
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(fail_on, 4, [2], backend=backend)
    assert time.monotonic() - start < 10
    text = str(caught.value)
    assert text.startswith("fail_on: 4 of 4 ranks failed. First cause: rank 2.\n\nrank 2 raised (first failure): Look")
    assert text.count("no such thing on 2") == 2  # in the summary and at the end of the traceback
    assert 'in fail_on\n        raise LookupError(f"no such' in text
    assert "_spawned.py" not in text.split("rank 2")[2].split("\n\n")[0]
    for rank in (0, 1, 3):
        assert f"\n\nrank {rank} failed because a peer vanished or did not come: " in text
    assert [failure.cause for failure in caught.value.failures] == ["raised", "peer", "peer", "peer"]
    assert [rank for rank, _, _ in run_ranks(rank_and_world, 4, backend=backend)] == [0, 1, 2, 3]


KEPT = []


def keep_groups_and_fail():
    KEPT.append(dist.group.WORLD)
    fail_on([1])


def test_peers_of_a_failed_rank_are_freed_even_if_it_keeps_its_groups():
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(keep_groups_and_fail, 3)
    assert time.monotonic() - start < 10
    assert [failure.cause for failure in caught.value.failures] == ["raised", "peer", "peer"]


def test_workers_that_answered_survive_a_failure():
    workers = run_ranks(os.getpid, 3)
    with pytest.raises(RanksFailed):
        run_ranks(fail_on, 3, [1])
    assert run_ranks(os.getpid, 3) == workers


@both_backends
def test_every_rank_that_raises_is_reported(backend):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(fail_on, 3, [0, 1, 2], backend=backend)
    assert sorted(failure.rank for failure in caught.value.failures) == [0, 1, 2]
    assert all(failure.error.startswith("LookupError: no such") for failure in caught.value.failures)


def fail_before_a_new_group():
    if dist.get_rank() == 1:
        raise LookupError("no group for me")
    dist.new_group([0, 1])


def test_threads_that_wait_for_a_new_group_are_woken():
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"2 of 3 ranks failed\. First cause: rank 1."):
        run_ranks(fail_before_a_new_group, 3, backend="threads")
    assert time.monotonic() - start < 2


def oversleep(peers_wait):
    if dist.get_rank() == 1:
        for _ in range(1000):
            time.sleep(0.05)
        dist.barrier()
    if peers_wait:
        dist.barrier()


@both_backends
@pytest.mark.parametrize("peers_wait", [False, True])
def test_a_rank_that_does_not_answer_is_named_with_its_stack(backend, peers_wait):
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(oversleep, 3, peers_wait, backend=backend, timeout=2.0)
    assert time.monotonic() - start < 5.3
    first, *others = caught.value.failures
    assert (first.rank, first.cause) == (1, "silent")
    assert "rank 1 did not answer (first failure): it was still running after 2" in str(caught.value)
    assert "in oversleep" in first.trace
    assert "_spawned.py" not in first.trace
    assert "_threads.py" not in first.trace
    assert [failure.cause for failure in others] == ["peer", "peer"] * peers_wait
    time.sleep(0.1)  # a thread that was left behind wakes up and must not disturb what follows
    assert [rank for rank, _, _ in run_ranks(rank_and_world, 3, backend=backend)] == [0, 1, 2]


def leave_early():
    if dist.get_rank() == 1:
        return
    dist.barrier()


@both_backends
def test_ranks_that_wait_for_one_that_is_done_say_where(backend):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(leave_early, 3, backend=backend, timeout=0.7)
    for failure in caught.value.failures:
        assert (failure.cause, "in leave_early" in failure.trace) == ("peer", True)
    assert len(caught.value.failures) == 2


def die(how):
    if dist.get_rank() == 1:
        how()
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "said"),
    [(partial(os._exit, 3), "exit code 3"), (os.abort, "signal SIGABRT\n    Fatal Python error: Aborted")],
)
def test_a_process_that_dies_is_a_failure_of_its_rank(how, said):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(die, 2, how)
    assert f"rank 1 died (first failure): its process ended with {said}" in str(caught.value)


def warn():
    warnings.warn("careful", UserWarning, stacklevel=2)
    return 1


@both_backends
def test_the_callers_warning_filters_hold_on_the_ranks(backend):
    with pytest.raises(RanksFailed, match="UserWarning: careful"):
        run_ranks(warn, 2, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_ranks(warn, 2, backend=backend) == [1, 1]


def assert_something():
    seen = [dist.get_rank(), 7]
    assert seen == [0, 8]


@both_backends
def test_asserts_of_test_modules_say_their_values(backend):
    with pytest.raises(RanksFailed, match=r"rank 1 raised.*: AssertionError: assert \[1, 7\] == \[0, 8\]"):
        run_ranks(assert_something, 2, backend=backend)


def test_spawned_ranks_refuse_what_they_could_not_find():
    with pytest.raises(TypeError, match="<lambda> cannot run on spawned ranks: a worker finds a function by module"):
        run_ranks(lambda: 1, 2)

    def inner():
        return 1

    with pytest.raises(TypeError, match=r'inner cannot run .* Move it to module level, or use backend="threads"'):
        run_ranks(partial(inner), 2)


def run_ranks_again(backend):
    run_ranks(os.getpid, 2, backend=backend)


@both_backends
def test_a_rank_cannot_have_ranks(backend):
    with pytest.raises(RanksFailed, match="RuntimeError: run_ranks was called on a rank of run_ranks"):
        run_ranks(run_ranks_again, 2, backend, backend=backend)


@pytest.mark.parametrize("world", [0, -1, True, 2.0])
def test_a_world_is_a_positive_integer(world):
    with pytest.raises(ValueError, match=f"world = {world} is not a number of ranks"):
        run_ranks(os.getpid, world)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend = 'nccl' is unknown; the choices are"):
        run_ranks(os.getpid, 2, backend="nccl")


def test_functions_run_from_files_that_no_path_leads_to(tmp_path, monkeypatch):
    for directory in ("one", "two"):  # two test directories may hold modules of one name
        file = tmp_path / directory / "test_of_that_name.py"
        file.parent.mkdir()
        file.write_text(f"def where():\n    return {directory!r}\n")
        spec = importlib.util.spec_from_file_location("test_of_that_name", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "test_of_that_name", module)
        spec.loader.exec_module(module)
        assert run_ranks(module.where, 2) == [directory, directory]


# -- Lightness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import foldpar.testing", {"torch", "hypothesis"}),
        ("from foldpar.testing import run_ranks, RanksFailed", {"torch", "hypothesis"}),
        ("from foldpar.testing import layouts; layouts().example", {"torch"}),
        ("import hypothesis, foldpar.testing; foldpar.testing.register_with_hypothesis()", {"torch"}),
    ],
)
def test_imports_stay_light(statement, absent):
    script = f"import sys; {statement}; print(*{absent!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", foldpar.testing.__all__)
def test_exported_names_load_and_are_documented(name):
    assert getattr(foldpar.testing, name).__doc__
    assert name in dir(foldpar.testing)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match=r"module 'foldpar.testing' has no attribute 'nothing'"):
        foldpar.testing.nothing  # noqa: B018


# -- Strategies -------------------------------------------------------------------------------------------------------


def every_layout(max_world):
    """By brute force: try all degrees, keep what is a layout."""
    found = set()
    for world in range(1, max_world + 1):
        degrees = [n for n in range(1, world + 1) if world % n == 0]
        for pp in degrees:
            stage = world // pp
            dense = [(tp, cp) for tp in degrees for cp in degrees if stage % (tp * cp) == 0]
            expert = [(ep, etp) for ep in degrees for etp in degrees if stage % (ep * etp) == 0]
            found |= {
                FoldedLayout(world, tp=tp, ep=ep, etp=etp, pp=pp, cp=cp, order=order)
                for tp, cp in dense
                for ep, etp in expert
                for order in ORDERS
            }
    return found


@given(layouts(4))
def test_layouts_are_layouts(layout):
    assert layout in every_layout(4)


def test_every_layout_can_be_drawn():
    for layout in every_layout(4):
        degrees = {axis: layout.size(axis) for axis in ("pp", "dp", "cp", "tp", "edp", "ep", "etp")}
        assert find(layouts(4, **degrees, orders=[layout.order]), lambda _: True) == layout


@given(layouts(64, min_world=6, tp=(2, 8), ep=4, edp=(1, 3), pp=(1, 2), orders=["consecutive"]))
def test_layouts_keep_their_bounds(layout):
    assert 6 <= layout.world <= 64
    assert 2 <= layout.tp <= 8
    assert layout.ep == 4
    assert 1 <= layout.edp <= 3
    assert layout.pp in (1, 2)
    assert layout.order == "consecutive"


def test_every_degree_is_often_larger_than_one():
    seen, distinct = Counter(), set()

    @settings(max_examples=400, database=None, derandomize=True, deadline=None)
    @given(layouts(8, min_world=4, pp=1))
    def draw(layout):
        distinct.add(layout)
        seen.update([axis for axis in ("tp", "cp", "dp", "ep", "etp", "edp") if layout.size(axis) > 1])
        seen["draws"] += 1

    draw()
    assert seen["draws"] == 400
    assert all(count > 0.25 * 400 for count in seen.values())
    assert len(distinct) > 80


@pytest.mark.parametrize(
    ("fails", "smallest"),
    [
        (lambda layout: True, FoldedLayout(1)),
        (lambda layout: layout.tp > 1 and layout.ep > 1, FoldedLayout(2, tp=2, ep=2)),
        (lambda layout: layout.tp > 1 and layout.ep > layout.tp, FoldedLayout(4, tp=2, ep=4)),
        (lambda layout: layout.cp > 1 and layout.etp > 2, FoldedLayout(4, cp=2, etp=4)),
        (lambda layout: layout.dp > 1 and layout.edp > 1, FoldedLayout(2)),
        (lambda layout: layout.pp > 1 and layout.tp > 2, FoldedLayout(6, pp=2, tp=3)),
        (lambda layout: list(layout.group("ep", 0)) != sorted(layout.group("ep", 0)), FoldedLayout(4, tp=2, ep=4)),
        (
            lambda layout: layout.order == "consecutive" and layout.dp > 1,
            FoldedLayout(2, order="consecutive"),
        ),
    ],
)
def test_layouts_shrink_to_the_smallest_that_fails(fails, smallest):
    repeatable = settings(max_examples=1000, database=None, derandomize=True)
    assert find(layouts(16), fails, settings=repeatable) == smallest


def test_a_failing_property_ends_with_the_smallest_layout():
    seen = []

    @settings(database=None, derandomize=True)
    @given(layouts(32))
    def experts_never_meet_lanes(layout):
        seen.append(layout)
        assert layout.tp == 1 or layout.ep == 1

    with pytest.raises(AssertionError):
        experts_never_meet_lanes()
    assert seen[-1] == FoldedLayout(2, tp=2, ep=2)


def test_impossible_bounds_are_refused():
    with pytest.raises(LayoutError, match="No layout of 1 to 8 ranks has tp = 3, ep = 4: no such world is both"):
        layouts(tp=3, ep=4)
    with pytest.raises(LayoutError, match="one of no orders"):
        layouts(orders=[])


@pytest.fixture
def registered():
    foldpar.testing.register_with_hypothesis()  # what the entry point does


@pytest.mark.usefixtures("registered")
def test_layouts_are_drawn_from_their_type():
    assert find(st.from_type(FoldedLayout), lambda layout: layout.etp > 1) == FoldedLayout(2, etp=2)


@given(row_counts(3, 5))
def test_row_counts_are_per_rank(rows):
    assert len(rows) == 3
    assert all(0 <= count <= 5 for count in rows)


@given(st.data(), layouts(12), st.sampled_from(["replicated", "sharded"]))
def test_token_batches_are_equal_where_ranks_hold_the_same_tokens(data, layout, lanes):
    tokens = data.draw(token_batches(layout, max_tokens=5, lanes=lanes))
    assert len(tokens) == layout.world
    assert all(0 <= count <= 5 for count in tokens)
    for axis in ("pp", "tp") if lanes == "replicated" else ("pp",):
        for group in layout.groups(axis):
            assert len({tokens[rank] for rank in group}) == 1


def test_token_batches_are_ragged_and_sometimes_empty():
    layout = FoldedLayout(8, tp=2)
    assert find(token_batches(layout), lambda tokens: len(set(tokens)) == 4)
    assert find(token_batches(layout), lambda tokens: tokens[0] > 0 == sum(tokens[2:]))
    assert find(token_batches(layout), lambda tokens: True) == (0,) * 8


@given(st.data(), st.integers(0, 9), st.integers(1, 8), st.sampled_from(["balanced", "one", "skewed", "random"]))
def test_routings_are_distinct_ids_of_their_kind(data, num_tokens, num_experts, balance: Balance):
    top_k = data.draw(st.integers(1, num_experts))
    ids = data.draw(routings(num_tokens, num_experts, top_k, balances=[balance]))
    assert len(ids) == num_tokens
    for token in ids:
        assert len(token) == len(set(token)) == top_k
        assert set(token) <= set(range(num_experts))
    counts = Counter(expert for token in ids for expert in token)
    if balance == "balanced":
        assert max(counts.values(), default=0) - min(counts[expert] for expert in range(num_experts)) <= 1
    elif balance == "one":
        assert len(counts) == (top_k if num_tokens else 0)
    elif balance == "skewed":
        assert len(counts) <= max(top_k, num_experts // 2)


def test_routings_shrink_and_refuse():
    assert find(routings(3, 4, 2), lambda ids: True) == [[0, 1], [2, 3], [0, 1]]
    assert find(routings(2, 4, 1), lambda ids: ids[0] == ids[1]) == [[0], [0]]
    with pytest.raises(ValueError, match="top_k = 5 distinct experts of 4 cannot be chosen; top_k can be 1 to 4"):
        routings(3, 4, 5)
