"""Fixtures of several files. Of large matrices ``make test`` runs every n-th case, ``make test-long`` the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import foldpar

settings.register_profile("foldpar", deadline=None)  # a clock would fail where a machine is busy
settings.load_profile("foldpar")

collect_ignore = ["support"]  # what tests share, and programs for environments of their own

EVERY = {
    "test_accumulation.py::test_hooked_reduction_equals_one_process": 7,
    "test_accumulation.py::test_micro_batches_reduced_once_equal_one_process": 5,
    "test_auxiliary.py::test_the_bias_counts_each_decision_of_training_once": 7,
    "test_checkpoint.py::test_training_goes_on_in_another_layout": 5,
    "test_conventions.py::test_gradient_norms_over_those_of_the_unfolded_model_are_one": 7,
    "test_conventions.py::test_post_hoc_is_exact_with_nothing_sharded_over_tp": 7,
    "test_fold_parity.py::test_options_are_exact": 5,
    "test_gradients.py::test_a_norm_counts_every_logical_element_once": 7,
    "test_interplay.py::test_recomputation_routes_alike_and_gives_equal_gradients": 7,
    "test_interplay.py::test_two_runs_give_the_same_bits": 7,
    "test_moe.py::test_raw_gradients_are_what_the_theory_says": 7,
    "test_parameter_uses.py::test_biases_of_experts_equal_one_process_and_count_once": 7,
    "test_pipeline.py::test_every_shape_equals_one_process": 7,
    "test_pipeline.py::test_layers_that_fold_differently_equal_one_process": 7,
    "test_sharding.py::test_some_steps_equal_one_process": 5,
    "test_sharding_pieces.py::test_bytes_are_those_predicted": 5,
    "test_sharding_pieces.py::test_every_family_equals_one_process": 5,
    "test_sharding_pieces.py::test_models_of_other_kinds": 5,
    "test_steps.py::test_an_optimizer_without_experts_looks_at_what_it_has": 5,
    "test_steps.py::test_what_enters_late_is_exact_or_refused": 5,
    "test_training.py::test_every_consumer_equals_one_process": 7,
    "test_training.py::test_every_fold_equals_one_process": 7,
}


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0].rpartition("/")[2]
        if name in EVERY:
            if seen[name] % EVERY[name]:
                item.add_marker(pytest.mark.long)
            seen[name] += 1


@pytest.fixture(scope="module")
def groups() -> Iterator[foldpar.FoldedGroups]:
    """Of one rank alone."""
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        yield groups


@pytest.fixture(scope="module")
def original(groups: foldpar.FoldedGroups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, to be copied and spoilt."""
    from checkpoint_killer import trained

    path = tmp_path_factory.mktemp("saved") / "step-9"
    foldpar.save_checkpoint(path, *trained(groups, 1), groups, step=9)
    return path
