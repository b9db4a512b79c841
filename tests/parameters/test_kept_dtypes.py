"""What a model's class keeps in float32 stays so in every conversion, and when the rest is sharded in less."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import tiny_model
from torch.distributed.fsdp import MixedPrecisionPolicy

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.testing import run_ranks

# family, in bfloat16 too or in float16 only
DEMANDS = {
    "deepseek_v3": ("e_score_correction_bias", True),
    "ernie4_5_moe": ("gate.weight", True),
    "gpt_oss": ("layernorm", False),
}

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


def dtypes(model: torch.nn.Module, part: str) -> set[torch.dtype]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {tensor.dtype for name, tensor in tensors.items() if part in name}


def conversions(family: str, tp: int) -> None:
    part, in_bfloat16 = DEMANDS[family]
    with foldpar.create_groups(foldpar.solve_layout(2, tp=tp, ep=2)) as groups:
        model = tiny_model(family, dtype=torch.float32)
        foldpar.fold_model(model, groups)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        before = {name: local_tensor(tensor).detach().clone() for name, tensor in tensors.items() if part in name}
        for way in (lambda of: of.half(), lambda of: of.to(torch.float16), lambda of: of.model.layers.half()):
            again = copy.deepcopy(model)
            way(again)
            assert dtypes(again, part) == {torch.float32}, family
            assert again.model.layers[-1].mlp.experts.down_proj.dtype is torch.float16
            tensors = {**dict(again.named_parameters()), **dict(again.named_buffers())}
            assert all(torch.equal(local_tensor(tensors[name]), tensor) for name, tensor in before.items())
        assert dtypes(model, part) == {torch.float32}
        model.bfloat16()
        assert dtypes(model, part) == {torch.float32 if in_bfloat16 else torch.bfloat16}
        model.double()
        assert dtypes(model, part) == {torch.float64}
        model.bfloat16()
        tokens = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.half()  # gradients go with their parameters
        assert all(each.grad is None or each.grad.dtype is each.dtype for each in model.parameters())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", DEMANDS)
def test_conversions_leave_what_the_class_demands(family: str, tp: int) -> None:
    run_ranks(conversions, 2, family, tp)


def sharded(stage: int, stored: torch.dtype) -> None:
    """Ernie's router computes in the dtype of its weight: with a float32 one, training equals that of stage 0."""
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2)) as groups:
        whole = tiny_model("ernie4_5_moe", dtype=torch.float32)
        model = tiny_model("ernie4_5_moe", dtype=torch.float32)
        for each in (whole, model):
            foldpar.fold_model(each, groups)
            each.to(torch.bfloat16 if each is whole else stored)
        policy = (
            MixedPrecisionPolicy() if stored == torch.bfloat16 else MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        )
        foldpar.shard_model(model, groups, stage=stage, mixed_precision=policy)
        seen = set()
        gates = [module for name, module in model.named_modules() if name.endswith("gate")]
        for gate in gates:
            gate.register_forward_hook(lambda module, args, out: seen.add(module.weight.dtype))
        tokens = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(groups.dp.index))
        for each in (whole, model):
            each(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            foldpar.reduce_gradients(each, groups, reduce_dtype=torch.float32)
        assert seen == {torch.float32}
        wanted = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            if "gate.weight" in name:
                assert parameter.dtype is torch.float32
                torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(("stage", "stored"), [(3, torch.float32), (2, torch.bfloat16)])
def test_a_sharded_model_computes_with_what_the_class_demands(stage: int, stored: torch.dtype) -> None:
    run_ranks(sharded, 4, stage, stored)
