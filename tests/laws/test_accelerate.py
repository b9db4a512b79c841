"""accelerate and the Trainer of transformers on a folded model: refused before anything changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hf_models import tiny_model
from torch import nn

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.errors import ModelError
from foldpar.testing import run_ranks

pytest.importorskip("accelerate")


def prepare(model: nn.Module, folder: str) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).prepare(model)


def train(model: nn.Module, folder: str) -> None:
    from transformers import Trainer, TrainingArguments

    data: Any = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    arguments = TrainingArguments(folder, use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True)
    Trainer(model=model, args=arguments, train_dataset=data).train()


def refused(tp: int, stage: int, folder: str) -> None:
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    with mock.patch.dict(os.environ, names), foldpar.create_groups(foldpar.solve_layout(2, tp=tp, ep=2)) as groups:
        model = tiny_model("qwen3_moe", dtype=torch.float64)
        foldpar.fold_model(model, groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        before = {name: local_tensor(each).detach().clone() for name, each in model.named_parameters()}
        for tool in (prepare, train):
            with pytest.raises(ModelError, match=r"^DistributedDataParallel cannot be used on a folded model: .*"):
                tool(model, folder)
        assert all(torch.equal(local_tensor(each), before[name]) for name, each in model.named_parameters())


@pytest.mark.parametrize(("tp", "stage"), [(2, 0), pytest.param(1, 3, marks=pytest.mark.long)])
def test_accelerate_and_the_trainer_are_refused(tp: int, stage: int, tmp_path: Path) -> None:
    run_ranks(refused, 2, tp, stage, str(tmp_path), backend="spawned")
