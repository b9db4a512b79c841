"""Blocks that the page of models calls proven, on ranks: their experts folded over ep and etp, beside one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from pages import DOCS, models_script, table
from torch import Tensor, nn

import foldpar
from foldpar.models.plan import Block, survey
from foldpar.testing import check_against_one_process

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        f"transformers {transformers.__version__} whose" not in DOCS["models"], reason="the page is of another version"
    ),
]

ONE = foldpar.solve_layout(1)
LAYOUTS = [foldpar.solve_layout(4, ep=2, etp=2), foldpar.solve_layout(4, ep=4)]
FOLDING = {cells[0].strip("`"): cells[1] for cells in table(DOCS["models"], "`model_type`")}
PROVEN = [model_type for model_type, folding in FOLDING.items() if folding.startswith("proven")]
WIDTH, UNITS = 128, 32
NARROW = {"ernie4_5_vl_moe": {"num_attention_heads": 1, "num_key_value_heads": 1, "moe_intermediate_size": [32, 32]}}
"""What else makes the text part of a type narrow."""


class Alone(nn.Module):
    """A block by itself, called with rows; or its experts behind a router of this class, where it needs more."""

    def __init__(self, block: nn.Module, experts: str, dim: int, alone: bool) -> None:
        super().__init__()
        self.block = block.get_submodule(experts) if alone else block
        self.alone, self.dim = alone, dim
        self.router = nn.Linear(dim, 16, bias=False) if alone else None

    def forward(self, rows: Tensor) -> Tensor:
        if self.router is None:
            found = self.block(rows[None])
            return (found[0] if isinstance(found, tuple) else found).reshape(rows.shape)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        return self.block(rows, ids, weights)


def small(model_type: str) -> transformers.PreTrainedConfig:
    """The page's configuration of a type, narrow."""
    config = models_script().small(model_type)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, int) and value > UNITS and name.endswith(("intermediate_size", "ffn_hidden_size")):
                setattr(part, name, UNITS)
            if name == "hidden_size":
                part.hidden_size = WIDTH
        if part is not None:
            part._experts_implementation = "eager"
    for name, value in NARROW.get(model_type, {}).items():
        setattr(config.text_config, name, value)
    return config


def one_of_each_kind(model_type: str) -> list[Block]:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(small(model_type))
    return list({type(block.module): block for block in survey(model, ONE, ()).blocks}.values())


def filled(block: nn.Module) -> nn.Module:
    block = block.to_empty(device="cpu").double()
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 1 / math.sqrt(tensor.shape[-1]) if tensor.dim() > 1 else 0.1)
            else:
                tensor.zero_()
    return block


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"ep{layout.ep}-etp{layout.etp}")
@pytest.mark.parametrize("model_type", PROVEN)
def test_what_is_proven_in_one_process_is_exact_on_ranks(model_type: str, layout: foldpar.FoldedLayout) -> None:
    alone = FOLDING[model_type] == "proven, its experts alone"
    for block in one_of_each_kind(model_type):

        def make(block: Block = block) -> nn.Module:
            return Alone(filled(block.module), block.adapter.experts, WIDTH, alone)

        def fold(model: Any, groups: foldpar.FoldedGroups) -> nn.Module:
            foldpar.fold_model(model, groups)
            return model

        report = check_against_one_process(make, fold, layout, batch=lambda rank: torch.randn(5 + rank, WIDTH))
        report.raise_if(1e-5)
