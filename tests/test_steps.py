"""A step that was not reduced, reduced twice, or taken by an optimizer of other parameters is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hf_models import tiny_model
from toys import fold, loss_of, plain_model, tokens_of

import foldpar
from foldpar import families
from foldpar.dtensors import local_tensor
from foldpar.errors import FamilyError, GradientError
from foldpar.testing import run_ranks

STAGES = [0, 2, 3]

# A biased linear layer over [batch, length, dim] returns a view, of which torch 2.13 warns where it ends the model.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


def text_of(call: Callable[[], object]) -> str:
    with pytest.raises(GradientError) as refused:
        call()
    return str(refused.value)


def steps(stage: int, tp: int) -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=4 // tp)) as groups:
        model = fold(plain_model(), groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
        for set_to_none in (True, False):
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            if set_to_none or stage:  # gradients that stay tensors keep the stamp of the step before
                before = [local_tensor(each).detach().clone() for each in model.parameters()]
                text = text_of(lambda: foldpar.clip_grad_norm_(model, 1.0, groups))
                assert "clip_grad_norm_: the gradient of embedding.weight is not reduced" in text
                assert "reduce_gradients(model, groups) after the last backward" in text
                assert "SGD.step(): the gradient of an expert is not reduced" in text_of(optimizer.step)
                after = [local_tensor(each) for each in model.parameters()]
                assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
            foldpar.reduce_gradients(model, groups)
            for again in (False, True):
                text = text_of(lambda: foldpar.reduce_gradients(model, groups))
                assert "was reduced already, and no backward has run since" in text
                if not again:
                    foldpar.clip_grad_norm_(model, 1.0, groups)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, tokens_of(groups.dp_cp.index)).backward()
        foldpar.declare_reduced(model)  # a reduction of its own
        foldpar.clip_grad_norm_(model, 1.0, groups)
        optimizer.step()


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_was_not_reduced_once_is_refused(stage: int) -> None:
    run_ranks(steps, 4, stage, 2)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_was_not_reduced_once_is_refused_without_lanes(stage: int) -> None:
    run_ranks(steps, 4, stage, 1)


def too_early(when: str) -> str:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        model = tiny_model("qwen3_moe", dtype=torch.float64)
        if when == "shard_model":
            foldpar.fold_model(model, groups)
        optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=0.01)
        if when == "fold_model":
            foldpar.fold_model(model, groups)
        foldpar.shard_model(model, groups, stage=3)
        tokens = torch.randint(32, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        foldpar.reduce_gradients(model, groups)
        text = text_of(optimizer.step)
    optimizer.step()  # nothing is watched any more
    return text


@pytest.mark.parametrize("when", ["fold_model", "shard_model"])
def test_an_optimizer_that_was_made_too_early_says_so_in_its_first_step(when: str) -> None:
    for text in run_ranks(too_early, 2, when):
        assert text.startswith("This AdamW holds a parameter of shape [")
        assert "fold_model or shard_model has replaced" in text
        assert "Make the optimizer after them, from foldpar.parameter_groups(model)" in text


# -- What enters a folded model later ---------------------------------------------------------------------------------


def late(tp: int) -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=4)) as groups:
        original = tiny_model("qwen3_moe", dtype=torch.float64)
        foldpar.fold_model(original, groups)
        experts = "model.layers.0.mlp.experts"
        for place, owner in {
            "model": "a head", "model.layers.0.self_attn.q_proj": "beside", experts: "inside the experts"
        }.items():  # fmt: skip
            model = copy.deepcopy(original)
            module = model.get_submodule(place)
            module.add_module("late", torch.nn.Linear(3, 2, bias=False, dtype=torch.float64))
            name = f"{place}.late.weight"
            if tp == 1 and place != experts:  # no lanes: every rank has the same
                assert foldpar.parameter_families(model, groups)[name] is families.REPLICATED, owner
                continue
            with pytest.raises(FamilyError) as refused:
                foldpar.reduce_gradients(model, groups)
            assert name in str(refused.value), owner
            assert "mark_parameters(module, families." in str(refused.value)
            foldpar.mark_parameters(module.late, families.REPLICATED_PARTIAL)
            assert foldpar.parameter_families(model, groups)[name] is families.REPLICATED_PARTIAL
        model = copy.deepcopy(original)
        model.soft_prompt = torch.nn.Parameter(torch.zeros(4, 16, dtype=torch.float64))
        if tp > 1:
            with pytest.raises(FamilyError, match="1 parameter has no family: soft_prompt"):
                foldpar.parameter_families(model, groups)
        for wrong in (families.REPLICATED, families.REPLICATED_PARTIAL):
            model = copy.deepcopy(original)
            foldpar.mark_parameters(model.get_submodule(experts), wrong)
            with pytest.raises(FamilyError, match=r"lies on the mesh of the experts, but its family 'replicated"):
                foldpar.reduce_gradients(model, groups)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_enters_later_inside_or_beside_distributed_layers_needs_a_word(tp: int) -> None:
    run_ranks(late, 4, tp)


def test_a_normalisation_that_is_shared_by_all_experts_is_a_sum_over_all_ranks() -> None:
    """What the error about parameters inside experts advises: each rank's experts see other rows."""

    class Scaled(foldpar.GroupedExperts):
        def forward(self, rows: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
            return super().forward(rows * self.gain, *args, **options)

    plain = plain_model(blocks=1)
    gain = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)

    def reference() -> torch.Tensor:
        own = gain.clone().requires_grad_()
        model = copy.deepcopy(plain)
        moe = model.blocks[0].moe
        # An expert whose input is scaled is one whose first weight is.
        weight = moe.experts.gate_up_proj
        del moe.experts.gate_up_proj
        moe.experts.gate_up_proj = weight.detach() * own
        torch.stack([loss_of(model, tokens_of(rank)) for rank in range(2)]).mean().backward()
        return own.grad

    want = reference()

    def rank() -> float:
        with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2)) as groups:
            model = fold(plain, groups)
            moe = model.blocks[0].moe
            moe.experts.__class__ = Scaled
            moe.experts.gain = torch.nn.Parameter(gain.clone())
            foldpar.mark_parameters(moe.experts, families.REPLICATED_PARTIAL, names=("gain",))
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            foldpar.reduce_gradients(model, groups)
            return float((moe.experts.gain.grad - want).norm() / want.norm())

    assert max(run_ranks(rank, 4, backend="threads")) < 1e-12
