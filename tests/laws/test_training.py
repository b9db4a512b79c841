"""N SGD steps, folded and in one process: every gradient and every update is the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from parity import CONSUMERS, Case, Trace, train_folded, train_reference, worst

from foldpar.testing import run_ranks

# World 4 and 8, every cross-lane shape; (tp, ep, etp, cp)
FOLDS: dict[int, list[tuple[int, int, int, int]]] = {
    4: [(2, 2, 1, 1), (2, 4, 1, 1), (4, 4, 1, 1), (4, 2, 1, 1), (1, 4, 1, 1), (2, 1, 1, 1), (2, 2, 2, 1), (2, 2, 1, 2)],
    8: [(2, 4, 1, 1), (4, 4, 1, 1), (2, 8, 1, 1), (8, 8, 1, 1), (4, 2, 2, 1), (2, 4, 2, 2)],
}
ORDERS = ("tp-lane-major", "consecutive")


PLAIN = {"order": ORDERS[0], "consumer": CONSUMERS[0], "partition": "tokens", "shared": "tp"}
FLOAT32 = {"dtype": torch.float32, "rate": 0.3, "steps": 4}


def folds(*worlds: int) -> list[Case]:
    return [
        Case(world, tp, ep, etp, cp, order)
        for world in worlds
        for tp, ep, etp, cp in FOLDS[world]
        for order in (ORDERS if tp > 1 else ORDERS[:1])  # at tp = 1 both orders are one
    ]


@cache
def _reference(key: Case) -> Trace:
    trace = train_reference(key)
    assert trace.losses[-1] < 0.9 * trace.losses[0], f"the loss must fall by 10 %: {trace.losses}"
    return trace


def reference(case: Case) -> Trace:
    """One process knows only how many data ranks there are, and the dtype."""
    return _reference(replace(case, world=case.data_ranks, **dict.fromkeys(("tp", "ep", "etp", "cp"), 1), **PLAIN))


def assert_equal_to_one_process(case: Case) -> list[dict[str, Any]]:
    trace = reference(case)
    results = run_ranks(train_folded, case.world, case, trace, timeout=120.0)
    error, name = worst(results)
    assert error < case.tolerance, f"{name} is off by {error:.3g} (relative L2)"
    assert all(abs(result["loss"] - trace.losses[-1]) < 1e-5 for result in results)
    return results


@pytest.mark.parametrize("case", folds(4) + folds(8)[::3], ids=str)
def test_every_fold_equals_one_process(case: Case) -> None:
    """All of world 4, some of world 8, of which ``make test`` runs every third; the long matrix below has the rest."""
    assert_equal_to_one_process(case)


SOME = [Case(4, 2, 4), Case(4, 2, 2, 2, order="consecutive")]


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize(
    ("case", "partition"), [*((case, "tokens") for case in SOME), (SOME[0], "assignments")], ids=str
)
def test_every_consumer_equals_one_process(case: Case, consumer: str, partition: str) -> None:
    assert_equal_to_one_process(replace(case, consumer=consumer, partition=partition))


@pytest.mark.parametrize("case", [replace(case, shared="replicated") for case in (SOME[0], Case(8, 4, 4))], ids=str)
def test_replicated_shared_experts_equal_one_process(case: Case) -> None:
    assert_equal_to_one_process(case)


@pytest.mark.parametrize("case", [replace(case, **FLOAT32) for case in folds(4)[::8]], ids=str)
def test_float32_runs_grouped_mm_and_equals_one_process(case: Case) -> None:
    assert_equal_to_one_process(case)


@pytest.mark.parametrize("case", [Case(4, 2, 4, length=3), Case(4, 4, 4, length=1), Case(8, 8, 8, length=1)], ids=str)
def test_token_counts_that_tp_does_not_divide(case: Case) -> None:
    assert_equal_to_one_process(case)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="DTensor before torch 2.13 cannot view a batch of no tokens")
@pytest.mark.parametrize("order", ORDERS)
def test_a_data_rank_without_tokens_still_steps(order: str) -> None:
    assert_equal_to_one_process(Case(4, 2, 4, order=order, empty=(1,)))


@pytest.mark.long
@pytest.mark.parametrize("case", [replace(case, **FLOAT32) for case in folds(4, 8)], ids=str)
def test_every_fold_in_float32(case: Case) -> None:
    assert_equal_to_one_process(case)


@pytest.mark.long
@pytest.mark.parametrize("partition", ["tokens", "assignments"])
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("case", folds(4, 8), ids=str)
def test_every_fold_with_every_consumer(case: Case, consumer: str, partition: str) -> None:
    assert_equal_to_one_process(replace(case, consumer=consumer, partition=partition))
