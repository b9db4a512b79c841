"""What differs between ranks is not saved as if it were equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_killer import trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import foldpar
from foldpar.checkpoint import load_checkpoint, save_checkpoint
from foldpar.comm import digest_of_bits
from foldpar.errors import CheckpointError
from foldpar.testing import run_ranks

solve = foldpar.solve_layout
Fault = Callable[[nn.Module, torch.optim.Optimizer, int], None]


def drifted_weight(model: Any, _: torch.optim.Optimizer, rank: int) -> None:
    if rank == 1:
        model.dense.weight.data.view(-1)[7] += 1e-6


def drifted_expert(model: Any, _: torch.optim.Optimizer, rank: int) -> None:
    if rank == 1:
        model.experts.down_proj.to_local().data.view(-1)[3] += 1e-6


def drifted_state(model: Any, optimizer: torch.optim.Optimizer, rank: int) -> None:
    if rank == 1:
        optimizer.state[model.dense.bias]["exp_avg"][0] = float("nan")


def drifted_buffer(model: nn.Module, _: torch.optim.Optimizer, rank: int) -> None:
    model.register_buffer("seen", torch.tensor([rank]))


def number_of_a_share(model: Any, optimizer: torch.optim.Optimizer, rank: int) -> None:
    optimizer.state[model.experts.down_proj]["scale"] = torch.tensor(1.0 + rank)


def value_of_a_share(model: Any, optimizer: torch.optim.Optimizer, rank: int) -> None:
    optimizer.state[model.experts.down_proj]["scale"] = 1.0 + rank


def other_rate(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.5 + rank


def saved_with(fault: Fault, layout: foldpar.FoldedLayout, path: Path) -> str:
    with foldpar.create_groups(layout) as groups:
        model, optimizer = trained(groups, 1)
        fault(model, optimizer, groups.rank)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(path, model, optimizer, groups)
        return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "layout", "texts"),
    [
        (
            drifted_weight,
            solve(2, ep=2),
            ["model.dense.weight: rank 1 and rank 0", "check_replicas(model, groups) says"],
        ),
        (drifted_expert, solve(2), ["model.experts.down_proj: rank 1 and rank 0"]),
        (drifted_state, solve(2, ep=2), ["optimizer.state.dense.bias.exp_avg: rank 1 and rank 0"]),
        (drifted_buffer, solve(2, ep=2), ["model.seen: rank 1 and rank 0", "registered with persistent=False"]),
        (
            number_of_a_share,
            solve(2, ep=2),
            ["optimizer.state.experts.down_proj.scale: rank 1 and rank 0", "one number of each rank's own share"],
        ),
        (
            value_of_a_share,
            solve(2, ep=2),
            [
                "different optimizer's states",
                "experts.down_proj: scale is",
                "value=1.0) on rank 0",
                "value=2.0) on rank 1",
            ],
        ),
        (
            other_rate,
            solve(2, ep=2),
            ["different optimizer's options", "dense.weight: lr is 0.5 on rank 0 and 1.5 on rank 1"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_differs_is_refused_by_name_on_every_rank(tmp_path, fault, layout, texts):
    for text in run_ranks(saved_with, 2, fault, layout, tmp_path / "c"):
        for part in texts:
            assert part in text
    assert not list(tmp_path.iterdir())


def saved_as_they_are(path: Path) -> None:
    with foldpar.create_groups(solve(2, ep=2)) as groups:
        model, optimizer = trained(groups, 1)
        drifted_weight(model, optimizer, groups.rank)
        save_checkpoint(path, model, optimizer, groups, check_replicas=False)
        load_checkpoint(path, model, optimizer, groups)
        save_checkpoint(path.with_name("again"), model, optimizer, groups)


def test_copies_are_saved_as_they_are_where_it_is_asked_for(tmp_path):
    run_ranks(saved_as_they_are, 2, tmp_path / "c")


@settings(deadline=None)
@given(size=st.integers(1, 70), place=st.integers(0, 1000), bit=st.integers(0, 31), other=st.integers(0, 1000))
def test_any_two_flipped_bits_change_the_digest(size, place, bit, other):
    torch.manual_seed(size)
    tensor = torch.randn(size)
    before = int(digest_of_bits(tensor))
    bits = tensor.view(torch.int32)
    flip = -(2**31) if bit == 31 else 1 << bit
    bits[place % size] ^= flip
    assert int(digest_of_bits(tensor)) != before
    if other % size != place % size:
        bits[other % size] ^= flip  # two signs, for example
        assert int(digest_of_bits(tensor)) != before


def test_the_digest_knows_the_order_of_everything_and_any_dtype():
    rows = torch.arange(2**20, dtype=torch.float32)
    assert int(digest_of_bits(rows)) != int(digest_of_bits(rows.flip(0))) != int(digest_of_bits(rows.roll(2**19)))
    assert int(digest_of_bits(rows.view(2, -1).t())) == int(digest_of_bits(rows.view(2, -1).t().contiguous()))
    for dtype in (torch.bool, torch.int8, torch.bfloat16, torch.float64, torch.complex64):
        one, two = torch.zeros(11, dtype=dtype), torch.zeros(11, dtype=dtype)
        assert int(digest_of_bits(one)) == int(digest_of_bits(two))
        two[10] = 1
        assert int(digest_of_bits(one)) != int(digest_of_bits(two))
        assert int(digest_of_bits(one[:0])) == 0
        assert int(digest_of_bits(two[9:])) == int(digest_of_bits(two[9:].clone()))


def test_the_digest_tells_words_from_their_complements():
    words = torch.arange(5)
    assert int(digest_of_bits(torch.tensor([0]))) != int(digest_of_bits(torch.tensor([-1])))
    assert int(digest_of_bits(words)) != int(digest_of_bits(~words))
    assert int(digest_of_bits(words)) != int(digest_of_bits(torch.where(words == 3, ~words, words)))
