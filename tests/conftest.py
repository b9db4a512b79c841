"""Fixtures of several files. Of large matrices ``make test`` runs every n-th case, ``make test-long`` the others."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import foldpar

settings.register_profile("foldpar", deadline=None)  # a clock would fail where a machine is busy
settings.load_profile("foldpar")

collect_ignore = ["support"]  # what tests share, and programs for environments of their own

EVERY = {
    "test_accumulation.py::test_hooked_reduction_equals_one_process": 21,
    "test_accumulation.py::test_micro_batches_reduced_once_equal_one_process": 10,
    "test_accumulation.py::test_ranks_may_differ_in_which_gradients_they_get_and_when": 2,
    "test_auxiliary.py::test_auxiliary_losses_do_not_depend_on_the_layout": 3,
    "test_auxiliary.py::test_the_bias_counts_each_decision_of_training_once": 7,
    "test_capacity.py::test_what_is_dropped_does_not_depend_on_the_layout": 3,
    "test_checkpoint.py::test_training_goes_on_in_another_layout": 5,
    "test_checkpoint_resharding.py::test_odd_states_schedulers_and_averages_come_and_go": 4,
    "test_conventions.py::test_gradient_norms_over_those_of_the_unfolded_model_are_one": 7,
    "test_conventions.py::test_post_hoc_is_exact_with_nothing_sharded_over_tp": 7,
    "test_dispatch.py::test_dispatch_and_combine_equal_a_dense_loop": 3,
    "test_fold_model.py::test_greedy_generation_is_the_same_and_ranks_that_end_early_go_on": 3,
    "test_fold_model.py::test_the_plan_of_a_model_without_numbers_is_what_folding_does": 4,
    "test_fold_parity.py::test_every_family_is_exact": 5,
    "test_fold_parity.py::test_options_are_exact": 5,
    "test_gradients.py::test_a_norm_counts_every_logical_element_once": 7,
    "test_groups.py::test_every_axis_talks_in_coordinate_order": 3,
    "test_hf.py::test_round_trip": 2,
    "test_hf.py::test_round_trip_with_expert_slices": 2,
    "test_hf.py::test_sharded_models_read_and_write_their_shards": 2,
    "test_hub_balance.py::test_biases_are_those_of_one_process": 2,
    "test_interplay.py::test_recomputation_routes_alike_and_gives_equal_gradients": 7,
    "test_interplay.py::test_two_runs_give_the_same_bits": 7,
    "test_kept_dtypes.py::test_a_sharded_model_computes_with_what_the_class_demands": 2,
    "test_kept_dtypes.py::test_conversions_leave_what_the_class_demands": 6,
    "test_lockstep.py::test_a_step_of_a_hub_model_equals_one_process_on_the_data_that_there_is": 2,
    "test_loss_parts.py::test_a_hub_models_auxiliary_loss_counts_once": 4,
    "test_loss_parts.py::test_a_penalty_on_weights_is_added_to_whole_gradients": 3,
    "test_meta.py::test_the_check_finds_every_fault": 4,
    "test_meta.py::test_without_a_fault_the_check_passes": 4,
    "test_moe.py::test_raw_gradients_are_what_the_theory_says": 7,
    "test_parameter_uses.py::test_biases_of_experts_equal_one_process_and_count_once": 21,
    "test_parameter_uses.py::test_norm_and_head_above_split_rows_are_summed": 3,
    "test_parameter_uses.py::test_norm_gains_key_value_heads_and_sinks_inside_sharded_attention_are_summed": 3,
    "test_peft.py::test_gradients_are_those_of_one_process": 2,
    "test_pipeline.py::test_a_pipeline_of_two_stages_equals_one_process": 4,
    "test_pipeline.py::test_every_shape_equals_one_process": 28,
    "test_pipeline.py::test_layers_that_fold_differently_equal_one_process": 28,
    "test_plan_memory.py::test_the_peak_of_a_step_is_predicted": 3,
    "test_property.py::test_processes_with_gloo_equal_one_process": 3,
    "test_randomness.py::test_jitter_is_alike_where_lanes_route_the_same_tokens_and_recomputed": 3,
    "test_routing.py::test_a_router_does_not_depend_on_the_layout": 3,
    "test_sharding.py::test_some_steps_equal_one_process": 5,
    "test_sharding_pieces.py::test_bytes_are_those_predicted": 5,
    "test_sharding_pieces.py::test_every_family_equals_one_process": 5,
    "test_sharding_pieces.py::test_mixed_precision_tracks_a_bf16_model": 4,
    "test_sharding_pieces.py::test_models_of_other_kinds": 5,
    "test_steps.py::test_a_step_that_was_not_reduced_once_is_refused": 3,
    "test_steps.py::test_an_optimizer_without_experts_looks_at_what_it_has": 5,
    "test_steps.py::test_what_enters_late_is_exact_or_refused": 5,
    "test_testing.py::test_a_rank_that_does_not_answer_is_named_with_its_stack": 3,
    "test_testing.py::test_results_come_in_rank_order": 5,
    "test_testing.py::test_layouts_shrink_to_the_smallest_that_fails": 4,
    "test_training.py::test_a_data_rank_without_tokens_still_steps": 2,
    "test_training.py::test_every_consumer_equals_one_process": 28,
    "test_training.py::test_every_fold_equals_one_process": 28,
    "test_training.py::test_float32_runs_grouped_mm_and_equals_one_process": 2,
    "test_training.py::test_replicated_shared_experts_equal_one_process": 2,
    "test_training.py::test_token_counts_that_tp_does_not_divide": 3,
    "test_weights.py::test_the_files_are_those_of_one_process": 2,
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected is no garbage, and much to look through: a fifth of the time of collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


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
