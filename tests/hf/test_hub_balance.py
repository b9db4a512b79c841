"""Correction biases of hub models are moved by the counts of one process: over lanes, data ranks, micro-batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fold_parity import Case, batch_of, float64_stays, model_of
from torch import Tensor, nn
from toys import name_of

import foldpar
from foldpar.errors import ModelError
from foldpar.moe import correction_bias_in
from foldpar.testing import run_ranks

STEPS, MICRO_BATCHES, RATE = 3, 2, 0.05


def biases(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_buffers(), *model.named_parameters()]
    return {name: each.detach().clone() for name, each in named if "e_score_correction_bias" in name}


def forward_backward(model: nn.Module, data_rank: int, step: int) -> None:
    for micro_batch in range(MICRO_BATCHES):
        tokens = batch_of(data_rank, STEPS * micro_batch + step)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def in_one_process(model: nn.Module, data_ranks: int) -> list[dict[str, Tensor]]:
    """By hand: what the experts are called with is counted before each forward, not in recomputations."""
    model.set_experts_implementation("eager")
    counts: dict[str, Tensor] = {}
    seen: set[tuple[str, int]] = set()
    run = [0]

    def count(name: str, ids: Tensor) -> None:
        if (name, run[0]) not in seen:
            seen.add((name, run[0]))
            counts[name] = counts.get(name, 0) + torch.bincount(ids.flatten(), minlength=4)

    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            module.register_forward_pre_hook(lambda _, given, name=name: count(name, given[1]))
    found = []
    for step in range(STEPS):
        for data_rank in range(data_ranks):
            for micro_batch in range(MICRO_BATCHES):
                run[0] += 1
                tokens = batch_of(data_rank, STEPS * micro_batch + step)
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        for name, total in counts.items():
            bias = correction_bias_in(model.get_submodule(name.rpartition(".")[0]))
            if bias is not None:
                with torch.no_grad():
                    bias += (RATE * torch.sign(total.double().mean() - total)).view(bias.shape)
        counts.clear()
        found.append(biases(model))
    return found


def folded(model: nn.Module, case: Case) -> list[dict[str, Tensor]]:
    with foldpar.create_groups(case.layout) as groups:
        foldpar.fold_model(model, groups, partition=case.partition)
        found = []
        for step in range(STEPS):
            forward_backward(model, groups.dp.index, step)
            with torch.no_grad():  # which is not counted
                model.eval()(input_ids=batch_of(9, 9))
                model.train()
            foldpar.update_correction_bias(model, rate=RATE)
            found.append(biases(model))
        return found


@pytest.mark.parametrize(
    "case",
    [
        Case("deepseek_v3"),
        Case("glm4_moe", partition="assignments", checkpointing=False),
        pytest.param(Case("minimax_m2", checkpointing=True), marks=pytest.mark.long),
        pytest.param(Case("ernie4_5_moe", ep=2, etp=2), marks=pytest.mark.long),
        pytest.param(Case("nemotron_h", tp=1, ep=2), marks=pytest.mark.long),
        pytest.param(Case("deepseek_v4", world=4, tp=2, ep=2), marks=pytest.mark.long),
        pytest.param(Case("glm4_moe_lite", checkpointing=True), marks=pytest.mark.long),
    ],
    ids=name_of,
)
def test_biases_are_those_of_one_process(case: Case) -> None:
    model = model_of(case)
    before = biases(model)
    with float64_stays():
        wanted = in_one_process(copy.deepcopy(model), case.layout.dp)
        ranks = run_ranks(lambda: folded(copy.deepcopy(model), case), case.world, backend="threads", timeout=200)
    assert before and any(not torch.equal(before[name], wanted[-1][name]) for name in before)
    for found in ranks:
        for got, want in zip(found, wanted, strict=True):
            assert got.keys() == want.keys()
            for name in want:
                assert torch.allclose(got[name], want[name], rtol=0, atol=1e-6), name
                assert got[name].dtype == want[name].dtype


def test_a_rank_without_data_adds_nothing() -> None:
    model: Any = model_of(Case("deepseek_v3"))
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        foldpar.fold_model(model, groups)
        with foldpar.lockstep(model, None, like=batch_of(0, 0)) as (tokens, weight):
            (weight * model(input_ids=tokens, labels=tokens).loss).backward()
        before = biases(model)
        foldpar.update_correction_bias(model)
        assert all(torch.equal(before[name], each) for name, each in biases(model).items())


def test_a_forward_in_inference_mode_does_not_keep_training_from_counting() -> None:
    model: Any = model_of(Case("deepseek_v3"))
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        foldpar.fold_model(model, groups)
        tokens = batch_of(0, 0)
        with torch.inference_mode():
            model.train()(input_ids=tokens, use_cache=False)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        counted = [each.decisions for each in model.modules() if isinstance(each, foldpar.FoldedExperts)]
        assert counted
        assert all(int(each.sum()) == 2 * tokens.numel() * model.config.num_experts_per_tok for each in counted)


def test_a_bias_that_would_not_move_is_refused() -> None:
    model: Any = model_of(Case("deepseek_v3"))
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        foldpar.fold_model(model, groups)
        gate = model.model.layers[1].mlp.gate
        gate.e_score_correction_bias = gate.e_score_correction_bias.bfloat16()
        with pytest.raises(ModelError, match=r"mlp.experts is torch.bfloat16, .* Keep it in float32"):
            foldpar.update_correction_bias(model)


def test_models_without_a_bias_say_so() -> None:
    model: Any = model_of(Case("qwen3_moe"))
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        foldpar.fold_model(model, groups)
        with pytest.raises(ValueError, match="no folded block of transformers with an e_score_correction_bias"):
            foldpar.update_correction_bias(model)
