"""LoRA of peft on folded models: cases, and the gradients of their adapters beside those of one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from boxes import cut
from draws import seeded
from hf_models import FAMILIES
from torch import Tensor, nn

import foldpar
import foldpar.parameters

peft = pytest.importorskip("peft", reason="adapters are tested with peft, which is not installed")

VOCAB, BATCH, LENGTH = 32, 2, 6

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"]

SHARED = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"]

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """Adapters of one kind on one family and layout."""

    family: str = "qwen2_moe"
    world: int = 4
    tp: int = 2
    ep: int = 2
    etp: int = 1
    stage: int = 0
    first: str = "fold"
    """Which comes first: ``"fold"`` or ``"peft"``."""
    modules: tuple[str, ...] = (*DENSE, *SHARED)
    parameters: tuple[str, ...] = (*EXPERTS, "mlp.gate.weight")
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.family}-tp{self.tp}-ep{self.ep}-etp{self.etp}-stage{self.stage}-{self.first}-first"

    @property
    def layout(self) -> foldpar.FoldedLayout:
        return foldpar.solve_layout(self.world, tp=self.tp, ep=self.ep, etp=self.etp)


@cache
def base(family: str) -> nn.Module:
    with seeded(3):
        return FAMILIES[family].make().double()


def adapted(model: nn.Module, case: Case) -> nn.Module:
    config = peft.LoraConfig(
        r=2, target_modules=list(case.modules), target_parameters=list(case.parameters), **case.options
    )
    return peft.get_peft_model(model, config)


def drawn(model: nn.Module) -> dict[str, Tensor]:
    """Values for adapters on one process: B starts at zero, which would hide mistakes."""
    return {
        name: on_device(torch.randn(each.shape, generator=generator(place), dtype=each.dtype, device="cpu")) / 4
        for place, (name, each) in enumerate(sorted(adapters(model).items()))
    }


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def batch(data_rank: int) -> Tensor:
    return on_device(torch.randint(VOCAB, (BATCH, LENGTH), generator=generator(data_rank), device="cpu"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_device(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_device())


def loss_of(model: nn.Module, data_rank: int) -> Tensor:
    tokens = batch(data_rank)
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


@cache
def one_process(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adapters and their gradients."""
    model = adapted(copy.deepcopy(base(case.family)), case)
    model.load_state_dict(drawn(model), strict=False)
    data_ranks = case.layout.dp
    for data_rank in range(data_ranks):
        (loss_of(model, data_rank) / data_ranks).backward()
    assert {name for name, each in model.named_parameters() if each.requires_grad} == adapters(model).keys()
    found = adapters(model)
    return {name: each.detach() for name, each in found.items()}, {name: each.grad for name, each in found.items()}


def folded(case: Case, groups: foldpar.FoldedGroups, values: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(base(case.family))
    if case.first == "fold":
        foldpar.fold_model(model, groups)
        model = adapted(model, case)
    else:
        model = adapted(model, case)
        foldpar.fold_model(model, groups)
    model.load_state_dict(values, strict=False)
    if case.stage:
        foldpar.shard_model(model, groups, stage=case.stage)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def differences(case: Case, values: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """On one rank: how far gradients are from those of one process."""
    with foldpar.create_groups(case.layout) as groups:
        model = folded(case, groups, values)
        loss_of(model, groups.dp.index).backward()
        foldpar.reduce_gradients(model, groups)
        norm = foldpar.get_total_norm(model, groups)
        assert not [name for name, each in model.named_parameters() if "lora_" not in name and each.grad is not None]
        total = torch.stack([each.norm() for each in want.values()]).norm()
        found = {"the norm": float(abs(norm - total) / total), **gradient_differences(model, groups, want)}
        assert found.keys() == {*want, "the norm"}
        return found


def gradient_differences(model: nn.Module, groups: foldpar.FoldedGroups, want: dict[str, Tensor]) -> dict[str, float]:
    """How far this rank's part of each gradient is from that of the whole one, which is not zero."""
    found = {}
    for placement in foldpar.parameters.parameter_placements(model, groups):
        if (name := placement.name) in want:
            own = cut(want[name], placement.share)
            found[name] = float((placement.local(placement.parameter.grad) - own).norm() / want[name].norm())
    return found
