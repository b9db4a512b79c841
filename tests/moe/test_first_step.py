"""What is taken on trust is compared in the first step, or in every one; it says nothing when all is well, hangs
nothing, and costs nothing afterwards."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from draws import seeded
from hf_models import tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import foldpar
from foldpar.comm import collectives
from foldpar.errors import ReplicaError, ShapeError
from foldpar.moe.lane_checks import ModelChecks, rounds
from foldpar.testing import run_ranks

LAYOUT = foldpar.solve_layout(4, tp=2, ep=4)
DIM = 8


def layer(groups: foldpar.FoldedGroups, **options: Any) -> foldpar.FoldedMoE:
    with seeded(0):
        experts = foldpar.GroupedExperts(8, DIM, 8, groups)
        return foldpar.FoldedMoE(foldpar.TopKRouter(DIM, 8, 2), experts, groups, **options)


def rows(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def said_on_each_rank(function: Callable[[foldpar.FoldedGroups], object], layout: Any = LAYOUT) -> list[str]:
    """What each rank was told: the text of the error, or nothing."""

    def rank() -> str:
        with foldpar.create_groups(layout) as groups:
            try:
                function(groups)
            except (ReplicaError, ShapeError) as error:
                return str(error)
            return ""

    return run_ranks(rank, layout.world, backend="threads")


# -- Lanes that hold different tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"partition": "assignments"}, {"lane_grads": "partial"}, {"check": True}])
def test_lanes_that_hold_other_tokens_are_told_on_every_rank(options: dict[str, Any]) -> None:
    for text in said_on_each_rank(lambda groups: layer(groups, **options)(rows(groups.rank))):
        assert "What enters a FoldedMoE differs between the lanes (" in text
        assert "field 'x' at [0, 0]: " in text
        assert "num_replicas=groups.dp.size and rank=groups.dp.index" in text


def test_other_row_counts_are_told_before_anything_travels() -> None:
    for text in said_on_each_rank(lambda groups: layer(groups)(rows(0, 5 + groups.tp.index))):
        assert "field 'x' float32 [6, 8] on rank" in text and "float32 [5, 8] on rank" in text


def test_all_that_goes_with_the_tokens_is_compared() -> None:
    def padding_of_one_lane(groups: foldpar.FoldedGroups) -> None:
        layer(groups)(rows(0), padding=torch.arange(6) < 1 + groups.tp.index)

    def replay_on_one_lane(groups: foldpar.FoldedGroups) -> None:
        layer(groups)(
            rows(0), ids=torch.zeros(6, 2, dtype=torch.int64).add(torch.arange(2)) if groups.tp.index else None
        )

    for text in said_on_each_rank(padding_of_one_lane):
        assert "field 'padding' at [1]: True on rank" in text
    for text in said_on_each_rank(replay_on_one_lane):
        assert "field 'ids' int64 [6, 2] on rank" in text and "missing on rank" in text


def test_one_row_that_differs_is_found_and_rounding_is_not() -> None:
    def one_row(groups: foldpar.FoldedGroups, dtype: torch.dtype, change: float) -> None:
        x = rows(0, 500).to(dtype)
        if groups.tp.index == 1:
            x[400] += torch.full((DIM,), change, dtype=dtype)
        layer(groups, check=True).to(dtype)(x)

    for dtype, noise in ((torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        assert said_on_each_rank(partial(one_row, dtype=dtype, change=noise)) == [""] * 4
        for text in said_on_each_rank(partial(one_row, dtype=dtype, change=1.0)):
            assert "field 'x' at [400, 0]" in text


def test_a_row_that_is_not_finite_hides_no_other() -> None:
    def with_nan(groups: foldpar.FoldedGroups, lanes: tuple[int, ...], value: float, differs: bool) -> None:
        x = rows(groups.rank if differs else groups.dp.index)
        if groups.tp.index in lanes:
            x[5, 0] = value
        with torch.no_grad():
            layer(groups, check=True)(x)

    for value in (float("nan"), float("inf")):
        for lanes, differs in (((0,), True), ((0, 1), True), ((0,), False), ((1,), False)):
            for text in said_on_each_rank(partial(with_nan, lanes=lanes, value=value, differs=differs)):
                assert "What enters a FoldedMoE differs between the lanes" in text
        for text in said_on_each_rank(partial(with_nan, lanes=(0, 1), value=value, differs=False)):
            assert "differs between the lanes" not in text


def test_those_who_meet_the_lanes_that_differ_are_told_too() -> None:
    """Of two expert groups over four TP groups, one meets the TP group that is wrong."""
    layout = foldpar.solve_layout(8, tp=2, ep=2)

    def one_group(groups: foldpar.FoldedGroups) -> None:
        layer(groups)(rows(groups.tp.index if groups.dp.index == 0 else 7))

    texts = said_on_each_rank(one_group, layout)
    assert all("differs between the lanes (0, 1)" in texts[rank] for rank in (0, 1))
    assert all("The lanes of another TP group that this step meets" in texts[rank] for rank in (2, 3))
    assert texts[4:] == [""] * 4


@pytest.mark.parametrize("order", ["tp-lane-major", "consecutive"])
def test_a_word_reaches_all_whom_a_forward_links_in_any_layout(order: Any) -> None:
    seen = set()
    for size in range(1, 19):
        for tp in (each for each in range(1, size + 1) if size % each == 0):
            for ep in (each for each in range(1, size + 1) if size % each == 0):
                layout = foldpar.solve_layout(size, tp=tp, ep=ep, order=order)
                told = {rank: {rank} for rank in range(size)}
                for start in told:
                    for _ in range(rounds(layout)):
                        for axis in ("tp", "ep_etp"):
                            told[start] = {to for rank in told[start] for to in layout.group(axis, rank)}  # type: ignore[arg-type]
                    for axis in ("tp", "ep_etp"):
                        assert {to for rank in told[start] for to in layout.group(axis, rank)} == told[start]  # type: ignore[arg-type]
                seen.add(rounds(layout))
    assert max(seen) > 1


# -- When --------------------------------------------------------------------------------------------------------------


@contextmanager
def counted(calls: Counter[str]) -> Iterator[None]:
    """Count the collectives of each rank, a thread."""
    original = collectives._named

    def counting(collective: str, group: foldpar.AxisGroup) -> Any:
        calls[threading.current_thread().name] += 1
        return original(collective, group)

    collectives._named = counting
    try:
        yield
    finally:
        collectives._named = original


def collectives_per_step(check: bool | None, grad: bool) -> list[int]:
    calls: Counter[str] = Counter()

    def rank() -> list[int]:
        found = []
        with foldpar.create_groups(LAYOUT) as groups:
            moe = layer(groups, check=check)
            for _ in range(3):
                before = calls[threading.current_thread().name]
                with nullcontext() if grad else torch.no_grad():
                    y = moe(rows(groups.dp.index))
                if grad:
                    moe.zero_grad()
                    y.square().sum().backward()
                    foldpar.reduce_gradients(moe, groups, check=check)
                found.append(calls[threading.current_thread().name] - before)
        return found

    with counted(calls):
        return run_ranks(rank, 4, backend="threads")[0]


@pytest.mark.parametrize("grad", [True, False])
def test_the_first_step_is_checked_and_the_next_costs_nothing(grad: bool) -> None:
    never, always, first = (collectives_per_step(check, grad) for check in (False, True, None))
    assert never[0] == never[1] == never[2]
    assert first == [always[0], never[1], never[2]]
    assert always[0] == always[1] == always[2] > never[0]


def test_an_evaluation_before_training_does_not_use_the_check_up() -> None:
    def evaluate_first(groups: foldpar.FoldedGroups) -> None:
        moe = layer(groups)
        with torch.no_grad():
            moe(rows(0))
            moe(rows(groups.rank))  # the second without gradients
        moe(rows(groups.rank))

    assert all("What enters a FoldedMoE differs" in text for text in said_on_each_rank(evaluate_first))


def test_check_is_one_of_three() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        with pytest.raises(TypeError, match="check is 'yes'"):
            layer(groups, check="yes")
        with pytest.raises(TypeError, match="check is 1"):  # it equals True
            layer(groups, check=1)


# -- What must not hang ------------------------------------------------------------------------------------------------


def train(moe: nn.Module, groups: foldpar.FoldedGroups, x: Tensor, run: Callable[..., Tensor] | None = None) -> None:
    (moe(x) if run is None else run(moe, x)).square().sum().backward()
    foldpar.reduce_gradients(moe, groups)


def save_collectives(context: Any, operator: Any, *args: Any, **options: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    saved = operator.namespace in ("c10d", "_c10d_functional") or operator is torch.ops.aten.abs.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "selective"])
def test_recomputation(kind: str) -> None:
    options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, save_collectives)

    def rank(groups: foldpar.FoldedGroups) -> None:
        gradients = []
        for check in (False, None):
            moe = layer(groups, check=check)
            x = rows(groups.dp.index).requires_grad_()
            train(moe, groups, x, lambda moe, x: checkpoint(moe, x, **options))
            assert x.grad is not None
            gradients.append([x.grad, moe.router.weight.grad])  # type: ignore[union-attr]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    assert said_on_each_rank(rank) == [""] * 4


def test_recomputation_finds_what_is_wrong_with_the_gradient() -> None:
    def own_rows_above(groups: foldpar.FoldedGroups, reentrant: bool) -> None:
        x = rows(groups.dp.index).requires_grad_()
        checkpoint(layer(groups), x, use_reentrant=reentrant)[groups.tp.index :: 2].sum().backward()

    for reentrant in (False, True):
        texts = said_on_each_rank(partial(own_rows_above, reentrant=reentrant))
        assert all("The gradient that arrived at this layer differs between the lanes" in text for text in texts)


def test_ranks_that_others_do_not_wait_for() -> None:
    """An evaluation on one rank alone, a replica of the experts that joins later, and ranks without rows."""

    def alone(groups: foldpar.FoldedGroups) -> None:
        moe = layer(groups)
        if groups.rank == 0:
            with torch.no_grad():
                moe(rows(0))
        train(moe, groups, rows(groups.dp.index))

    def later(groups: foldpar.FoldedGroups) -> None:
        moe = layer(groups)
        if groups.dp.index < 2:  # those who share one set of experts
            moe(rows(groups.dp.index)).sum().backward()
        moe(rows(groups.dp.index)).sum().backward()
        foldpar.reduce_gradients(moe, groups)

    def no_rows(groups: foldpar.FoldedGroups) -> None:
        moe = layer(groups)
        for step in range(2):
            moe.zero_grad()
            train(moe, groups, rows(0, 6 if groups.dp.index == step else 0))

    assert said_on_each_rank(alone, foldpar.solve_layout(2)) == [""] * 2
    assert said_on_each_rank(later, foldpar.solve_layout(8, tp=2, ep=2)) == [""] * 8
    assert said_on_each_rank(later, foldpar.solve_layout(4, ep=2)) == [""] * 4
    assert said_on_each_rank(no_rows) == [""] * 4


def test_micro_batches_in_flight_are_checked_once() -> None:
    def in_flight(groups: foldpar.FoldedGroups) -> None:
        moe = layer(groups)
        outputs = [moe(rows(groups.dp.index)) for _ in range(3)]
        for y in reversed(outputs):
            y.sum().backward()
        foldpar.reduce_gradients(moe, groups)

    assert said_on_each_rank(in_flight) == [""] * 4


# -- Whole models ------------------------------------------------------------------------------------------------------


def call(groups: foldpar.FoldedGroups, seed: int, length: int = 6, labels: int | None = None, **options: Any) -> Any:
    model = copy.deepcopy(MODEL)
    foldpar.fold_model(model, groups, **options)
    ids = torch.randint(32, (2, length), generator=torch.Generator().manual_seed(seed))
    more: dict[str, Any] = {}
    if labels is not None:
        more["labels"] = torch.where(torch.arange(length) % 2 == labels, ids, -100)
    return model(input_ids=ids, **more), ids


MODEL = tiny_model("qwen3_moe")


def test_a_folded_model_on_other_tokens_is_told() -> None:
    for text in said_on_each_rank(lambda groups: call(groups, seed=groups.rank)):
        assert "What Qwen3MoeForCausalLM was called with differs between the lanes" in text
        assert "field 'input_ids' at [0, 0]" in text
    for text in said_on_each_rank(lambda groups: call(groups, seed=0, length=5 + groups.tp.index)):
        assert "field 'input_ids' int64 [2, 6] on rank" in text
    for text in said_on_each_rank(lambda groups: call(groups, seed=0, labels=groups.tp.index)):
        assert "field 'labels' at [0, 0]" in text


def own_half(groups: foldpar.FoldedGroups, **options: Any) -> None:
    output, ids = call(groups, seed=groups.dp.index, **options)
    logits = output.logits[:, groups.tp.index :: 2]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, groups.tp.index :: 2].flatten()).backward()


def test_a_loss_over_the_lanes_own_half_of_a_folded_model_is_found() -> None:
    for text in said_on_each_rank(own_half):
        assert "The gradient that arrived at the model's output differs between the lanes" in text
        assert "foldpar.split_rows(x, groups.tp, backward='all_gather')" in text
    assert said_on_each_rank(partial(own_half, check=False)) == [""] * 4


def loss_and_own_term(groups: foldpar.FoldedGroups, where: str, convert: bool = False) -> None:
    """The model's own loss, which all lanes have, and a term of the lane's own: over its half, or on one lane only."""
    model = copy.deepcopy(MODEL)
    foldpar.fold_model(model, groups)
    ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(groups.dp.index))
    out = model(input_ids=ids, labels=ids)
    logits = out.logits
    if convert:
        logits = foldpar.copy_to_group(logits, groups.tp)
    loss = out.loss
    if where == "half":
        loss = loss + 0.1 * logits[:, groups.tp.index :: 2].square().mean()
    if (where, groups.tp.index) == ("one lane", 1) or (where, groups.dp.index) == ("one data rank, all lanes", 1):
        loss = loss + 0.1 * logits.square().mean()
    loss.backward()


@pytest.mark.parametrize("where", ["half", "one lane"])
def test_a_term_over_the_lanes_own_half_beside_the_models_own_loss_is_found(where: str) -> None:
    for text in said_on_each_rank(lambda groups: loss_and_own_term(groups, where)):
        assert "The gradient that arrived at the model's output differs between the lanes" in text


@pytest.mark.parametrize("where", ["none", "one data rank, all lanes"])
def test_a_sound_term_beside_the_models_own_loss_says_nothing(where: str) -> None:
    assert said_on_each_rank(lambda groups: loss_and_own_term(groups, where)) == [""] * 4


def test_a_converted_term_over_the_lanes_own_half_says_nothing() -> None:
    assert said_on_each_rank(lambda groups: loss_and_own_term(groups, "half", convert=True)) == [""] * 4


class TwoEnds(nn.Module):
    """Two outputs, neither of which is made of the other."""

    def __init__(self, groups: foldpar.FoldedGroups) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


def two_ends(groups: foldpar.FoldedGroups, weights: Callable[[int, int], tuple[int, int]]) -> None:
    model = TwoEnds(groups)
    ModelChecks(groups, None, experts=True).watch(model)
    loss = torch.zeros(())
    for weight, y in zip(weights(groups.tp.index, groups.dp.index), model(rows(groups.dp.index)), strict=True):
        loss = loss + weight * y.sum() if weight else loss
    loss.backward()


@pytest.mark.parametrize(
    ("weights", "sound"),
    [
        (lambda lane, data: (1, 1), True),
        (lambda lane, data: (1, data), True),  # other data ranks may use other outputs
        (lambda lane, data: (1 - data, data), True),
        (lambda lane, data: (1, lane), False),
        (lambda lane, data: (lane, 1 - lane), False),
        (lambda lane, data: (1, 1 + lane * data), False),  # on the lanes of one TP group only: the others are told too
    ],
)
def test_each_output_is_compared_whichever_lanes_and_data_ranks_use_it(weights: Any, sound: bool) -> None:
    said = said_on_each_rank(lambda groups: two_ends(groups, weights))
    assert [text == "" for text in said] == [sound] * 4
    assert sound or any("arrived at the model's output differs between the lanes" in text for text in said)


def test_a_sound_step_leaves_no_hooks_and_says_nothing() -> None:
    def step(groups: foldpar.FoldedGroups) -> None:
        model = copy.deepcopy(MODEL)
        before = len(model._forward_hooks)
        foldpar.fold_model(model, groups)
        model = copy.deepcopy(model)
        ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(groups.dp.index))
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
            with torch.no_grad():
                model(input_ids=ids)
        assert before == len(model._forward_hooks)
        assert [type(hook).__name__ for hook in model._forward_pre_hooks.values()] == ["_Doorman"]  # adapters may come

    assert said_on_each_rank(step) == [""] * 4


class Same(torch.autograd.Function):
    """Its node in a graph is a Python object, of which a weak reference can tell whether the graph is alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("steps", [(False, False, True), (True, True)], ids=str)
@pytest.mark.parametrize("check", [None, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_nothing_of_a_checked_step_lives_on(
    monkeypatch: pytest.MonkeyPatch, tp: int, check: bool | None, steps: tuple[bool, ...]
) -> None:
    monkeypatch.setattr("foldpar.moe.lane_checks._MOST_IN_FLIGHT", 1)

    def step(groups: foldpar.FoldedGroups) -> None:
        model = copy.deepcopy(MODEL)
        foldpar.fold_model(model, groups, check=check)
        nodes: list[weakref.ref[Any]] = []

        def mark(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
            output = Same.apply(output)
            nodes.append(weakref.ref(output.grad_fn))
            return output

        model.get_input_embeddings().register_forward_hook(mark)
        ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(groups.dp.index))
        for backward in steps:
            loss = model(input_ids=ids, labels=ids).loss
            if backward:
                loss.backward()
        del loss
        gc.collect()
        assert [node() for node in nodes] == [None] * len(steps)
        for parameter in model.parameters():  # as torch's parametrize does; a graph that lives on would be poisoned
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))
        model(input_ids=ids, labels=ids).loss.backward()

    assert said_on_each_rank(step, foldpar.solve_layout(2, tp=tp, ep=2)) == [""] * 2


# -- The first reduction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlapped", [False, True])
def test_replicas_that_start_apart_are_told_before_the_first_reduction(overlapped: bool) -> None:
    def unseeded(groups: foldpar.FoldedGroups, check: bool | None, drift_at: int) -> None:
        model = foldpar.mark_parameters(nn.Linear(2, 2), foldpar.families.REPLICATED)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        reducer = foldpar.GradientReducer(model, groups, check=check) if overlapped else None
        for step in range(2):
            with torch.no_grad():
                model.weight += groups.rank if step == drift_at else 0
            model.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            foldpar.reduce_gradients(model, groups, check=check) if reducer is None else reducer.finish()

    layout = foldpar.solve_layout(2)
    for text in said_on_each_rank(partial(unseeded, check=None, drift_at=0), layout):
        assert "weight over dp_cp: rank 1 differs from the first rank of its group" in text
    assert said_on_each_rank(partial(unseeded, check=None, drift_at=1), layout) == ["", ""]
    assert said_on_each_rank(partial(unseeded, check=False, drift_at=0), layout) == ["", ""]
    assert all(said_on_each_rank(partial(unseeded, check=True, drift_at=1), layout))
