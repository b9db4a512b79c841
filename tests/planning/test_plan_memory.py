"""Predicted bytes against those of tensors that live at the same time in a step, on CPU ranks."""

from __future__ import annotations

import pytest
from live_bytes import LiveBytes
from plan_memory_cases import Case

import foldpar
from foldpar.testing import run_ranks

COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "pad_token_id": None,
}
QWEN3 = {**COMMON, "moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 128}
QWEN2 = {**QWEN3, "shared_expert_intermediate_size": 160}
MIXTRAL = {**COMMON, "intermediate_size": 192, "num_local_experts": 8, "num_experts_per_tok": 2}
SHORT = [
    Case("qwen3_moe", QWEN3),
    Case("qwen3_moe", QWEN3, precision="bfloat16", recompute="full"),
    Case("mixtral", MIXTRAL, recompute="experts"),
]
LONG = [
    Case(name, config, precision=precision, recompute=recompute)
    for name, config in (("qwen3_moe", QWEN3), ("qwen2_moe", QWEN2), ("mixtral", MIXTRAL))
    for precision in ("float32", "bfloat16")
    for recompute in ("none", "experts", "full")
] + [
    Case("qwen3_moe", QWEN3, micro_batches=2),
    Case("qwen3_moe", QWEN3, world=2, degrees={"tp": 2, "ep": 2}),
    Case("qwen3_moe", QWEN3, world=2, degrees={"ep": 2}),
]  # fmt: skip


def live_peak(step) -> int:
    with LiveBytes() as live:
        step()
    return live.peak


def measured(case: Case) -> int:
    with foldpar.create_groups(case.layout) as groups:
        return case.measured(groups, "cpu", live_peak)


def assert_within(case: Case, allowed: float) -> None:
    bytes_measured = max(run_ranks(measured, case.world, case)) if case.world > 1 else measured(case)
    predicted = case.predicted("cpu")
    assert abs(predicted.peak / bytes_measured - 1) < allowed, (
        f"{case}: {bytes_measured / 1e6:.1f} MB measured, {predicted.peak / 1e6:.1f} predicted ({predicted.moment})"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_the_peak_of_a_step_is_predicted(case):
    assert_within(case, 0.05)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LONG, ids=str)
def test_the_peaks_of_many_steps_are_predicted(case):
    assert_within(case, 0.05)
