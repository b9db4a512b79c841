"""Folded Hugging Face models train exactly as they do in one process: every family, layouts of all kinds."""

from __future__ import annotations

import pytest
import torch
from fold_parity import Case, worst
from hf_models import BRIEFLY, FAMILIES
from toys import name_of

import foldpar.models.fold
import foldpar.models.tensor_parallel
import foldpar.moe.lane_ends
from foldpar import families

FOLDABLE = [family for family in FAMILIES if family != "jetmoe"]
ROUNDING_GROWS = (
    "qwen3_next",
    "qwen3_5_moe",
    "lfm2_moe",
    "deepseek_v4",
    "kimi_linear",
    "nemotron_h",
    "granitemoehybrid",
)
FOUR_HEADS = {"num_key_value_heads": 4, "linear_num_key_heads": 4}


def check(case: Case) -> None:
    error, name = worst(case)
    assert error < case.tolerance, f"{case}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("family", [family for family in FOLDABLE if family not in BRIEFLY])
def test_every_family_is_exact(family: str) -> None:
    check(Case(family))


@pytest.mark.parametrize(
    "case",
    [
        Case("qwen3_moe", ep=2, etp=2, partition="assignments", checkpointing=False, steps=1),
        Case("gpt_oss", ep=2, etp=2, dtype=torch.float32, checkpointing=True, steps=1),
        Case("deepseek_v3", tp=4, attention="sdpa", order="consecutive", steps=1),
        Case("mixtral", overrides={"tie_word_embeddings": True}, steps=1),
        Case("qwen2_moe", overrides={"tie_word_embeddings": True, "pad_token_id": 5}, steps=1),
        Case("olmoe", overrides={"vocab_size": 33, "num_experts": 8}, steps=1),
        Case("qwen3_next", unplanned="linear_attn", steps=1),
        Case("qwen2_moe", tp=4, steps=2),  # two heads of keys for four lanes
        Case("gpt_oss", tp=4, overrides={"num_key_value_heads": 1}, steps=1),
        Case("granitemoe", tp=1, ep=2, steps=1),
    ],
    ids=name_of,
)
def test_options_are_exact(case: Case) -> None:
    check(case)


def _matrix() -> list[Case]:
    cases = []
    for family in FOLDABLE:
        for order in ("tp-lane-major", "consecutive"):
            cases += [
                Case(family, order=order, partition="assignments"),
                Case(family, order=order, ep=2, etp=2),
                Case(family, order=order, tp=4, overrides=FOUR_HEADS),
                Case(family, order=order, tp=4),  # with fewer heads of keys than lanes
                Case(family, order=order, world=8),
            ]
        cases += [
            Case(family, world=8, ep=2, etp=2, partition="assignments"),
            Case(family, attention="eager" if family in ("gpt_oss", "deepseek_v4") else "sdpa"),
            Case(family),
            Case(family, checkpointing=True),
            Case(family, checkpointing=False),
            # One step in float32 where rounding grows from step to step: in one process, weights of Qwen3-Next that
            # differ by 1e-7 have gradients that differ by 2e-5, and by 5e-3 a step later. LFM2 reaches 2e-5 at the
            # third step; in float64 all three are exact at every step.
            Case(family, dtype=torch.float32, steps=1 if family in ROUNDING_GROWS else 3),
        ]
    return cases


@pytest.mark.long
@pytest.mark.parametrize(
    "case", _matrix(), ids=lambda case: f"{case}-{case.attention}-{case.checkpointing}-{case.dtype}"
)
def test_the_matrix_is_exact(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        Case("qwen3_moe", backend="spawned"),
        Case("gpt_oss", backend="spawned"),
        Case("deepseek_v3", backend="spawned"),
        Case("phimoe", backend="spawned", random=True),
        Case("mixtral", backend="spawned", random=True, overrides={"router_jitter_noise": 0.1}),
    ],
    ids=name_of,
)
def test_processes_are_exact(case: Case) -> None:
    check(case)


# -- The comparison can fail ------------------------------------------------------------------------------------------


def test_gains_of_own_heads_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldpar.models.fold, "REPLICATED_PARTIAL", families.REPLICATED)
    monkeypatch.setattr(foldpar.models.fold, "_check_done", lambda *arguments: None)
    error, name = worst(Case("qwen3_moe", steps=1))
    assert error > 1e-2 and "_norm.weight" in name


def test_what_goes_to_own_heads_past_the_projections_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldpar.models.tensor_parallel, "copy_to_group", lambda x, group: x)
    error, name = worst(Case("deepseek_v3", steps=1))
    assert error > 1e-2 and "gradient" in name


def test_the_router_sees_the_gradients_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    split = foldpar.split_rows
    monkeypatch.setattr(
        foldpar.moe.lane_ends, "split_rows", lambda x, group, *, backward: split(x, group, backward="zero_pad")
    )
    error, name = worst(Case("mixtral", steps=1, check=False))  # which the check of the first step sees too
    assert error > 1e-2 and "gradient" in name
