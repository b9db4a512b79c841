"""A data rank without data stays in step and adds nothing: one helper for models of one's own and of the hub."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fold_parity import batch_of, float64_stays
from hf_models import tiny_model
from pages import DOCS, blocks
from torch import Tensor, nn

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.errors import ArgumentError
from foldpar.moe.stand_ins import lockstep
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

DIM, EXPERTS = 4, 8
PROGRAM = blocks("python", DOCS["start"], "Lockstep")[0].text
"""Of the page: a step of a loop whose rank may have no data."""


class Own(nn.Module):
    """A dense layer and a folded one, with everything that counts tokens."""

    def __init__(self, groups: foldpar.FoldedGroups, **options: Any) -> None:
        super().__init__()
        self.below = nn.Linear(DIM, DIM, dtype=torch.float64)
        router = foldpar.TopKRouter(DIM, EXPERTS, 2, correction_bias=True, dtype=torch.float64)
        experts = foldpar.GroupedExperts(EXPERTS, DIM, 6, groups, bias=True, seed=0, dtype=torch.float64)
        counters = foldpar.LayerCounters()
        self.moe = foldpar.FoldedMoE(
            router, experts, groups, capacity=foldpar.Capacity(8.0), counters=counters, **options
        )
        draw = torch.Generator().manual_seed(0)  # thread ranks share the default one
        with torch.no_grad():
            for parameter in [*self.below.parameters(), *router.parameters()]:
                parameter.uniform_(-0.5, 0.5, generator=draw)
        foldpar.mark_parameters(self, foldpar.families.REPLICATED)

    def loss(self, x: Tensor, rows: Tensor) -> Tensor:
        y, routing = self.moe(self.below(x), return_routing=True)
        state: Any = self.moe.lane_state
        balance = foldpar.load_balancing_loss(routing, state, scope="global", loss="sum")
        small = foldpar.router_z_loss(routing, state, scope="global", loss="sum")
        # On lanes that route their own tokens each adds its share; the gradients of the lanes are parts of one sum.
        return y.square().sum() / rows + 0.5 * balance + 0.1 * small


def data(seed: int) -> Tensor:
    return torch.randn(6, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_step(layout: foldpar.FoldedLayout, options: dict[str, Any]) -> dict[str, Tensor]:
    """Two micro-batches, in the second of which only data rank 0 has data; whole gradients, the bias and the counts."""
    with foldpar.create_groups(layout) as groups:
        model = Own(groups, **options)
        data_ranks = (0, 1) if layout.world == 1 else (groups.dp.index,)
        for batches in ([data(rank) for rank in data_ranks], [data(2) if rank == 0 else None for rank in data_ranks]):
            if layout.world == 1:  # what all ranks have, in one batch
                batches = [torch.cat([batch for batch in batches if batch is not None])]
            with lockstep(model, batches[0], like=data(9)) as (x, weight):
                rows = foldpar.all_reduce(torch.tensor(weight * len(x)), groups.dp_cp, backward="identity")
                (weight * model.loss(x, rows)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        foldpar.reduce_gradients(model, groups, loss="sum")
        counted: Any = model.moe.router.assignments_per_expert
        found = {"counts": counted.clone()}
        foldpar.update_correction_bias(model)
        found["bias"] = model.moe.router.correction_bias.clone()
        values = model.moe.counters.read()
        found["travelled"] = torch.tensor(values.assignments - values.padded)
        for name, parameter in model.named_parameters():
            grad: Any = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        return found


@pytest.mark.parametrize("options", [{}, {"partition": "assignments"}], ids=["tokens", "assignments"])
def test_a_step_of_ones_own_model_equals_one_process_on_the_data_that_there_is(options: dict[str, Any]) -> None:
    want = one_step(foldpar.solve_layout(1), options)
    results = run_ranks(one_step, 4, foldpar.solve_layout(4, tp=2, ep=4), options, backend="threads")
    for got in results:
        assert torch.equal(got["bias"], want["bias"]) and got["bias"].any()
        for name in want.keys() - {"bias", "counts", "travelled"}:
            assert torch.allclose(got[name], want[name], rtol=1e-12, atol=1e-14), name
    lanes = 1 if options == {} else 2  # that see all tokens, and count them
    assert torch.equal(sum(got["counts"] for got in results), lanes * want["counts"])  # type: ignore[arg-type]
    assert sum(int(got["travelled"]) for got in results) == want["travelled"]


def hub_step(model: nn.Module, layout: foldpar.FoldedLayout, wanted: dict[str, Tensor], partition: Any) -> list[str]:
    model = copy.deepcopy(model)
    with foldpar.create_groups(layout) as groups:
        foldpar.fold_model(model, groups, partition=partition)
        tokens, first = batch_of(0, 0), batch_of(7, 7)
        batch = {"input_ids": tokens, "labels": tokens} if groups.dp.index == 0 else None
        loader = [{"input_ids": first, "labels": first}]
        names = {"foldpar": foldpar, "torch": torch, "model": model, "groups": groups, "loader": loader, "batch": batch}
        exec(PROGRAM, names)
        foldpar.reduce_gradients(model, groups, loss="sum")
        wrong, shares = [], Shares(model, groups)
        for name, parameter in model.named_parameters():
            if name in wanted:
                want = shares.share_of(name, wanted[name])
                got: Any = parameter.grad
                if not torch.allclose(local_tensor(got), want, rtol=1e-10, atol=1e-12):
                    wrong.append(name)
        return wrong


def hub_loss(model: nn.Module, tokens: Tensor, count: Tensor) -> Tensor:
    """With the model's own auxiliary loss, as its ``loss`` has it."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=count).loss
    return loss


@pytest.mark.parametrize(("family", "partition"), [("mixtral", "tokens"), ("deepseek_v3", "assignments")])
def test_a_step_of_a_hub_model_equals_one_process_on_the_data_that_there_is(family: str, partition: str) -> None:
    model = tiny_model(family).train()
    with float64_stays():
        reference = copy.deepcopy(model)
        tokens = batch_of(0, 0)
        hub_loss(reference, tokens, torch.tensor(float(tokens[:, 1:].numel()))).backward()
        wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        layout = foldpar.solve_layout(4, tp=2, ep=4)
        assert run_ranks(hub_step, 4, model, layout, wanted, partition, backend="threads") == [[]] * 4


class Blind(nn.Module):
    """A router that knows nothing of padding."""

    def forward(self, x: Tensor) -> foldpar.Routing:
        return foldpar.Routing(torch.zeros(len(x), 1, dtype=torch.int64), x[:, :1])


def test_a_router_without_padding_sends_nothing_either_and_afterwards_all_is_as_before() -> None:
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    experts = foldpar.GroupedExperts(2, DIM, 4, groups, seed=0, dtype=torch.float64)
    moe = foldpar.FoldedMoE(Blind(), experts, groups)
    with lockstep(moe, None, like=data(0)) as (x, weight):
        assert weight == 0.0 and x is not None and not moe(x).any()
        with lockstep(moe, None, like=data(0)):
            pass
        assert not moe(x).any()  # still, after an inner one
    assert moe(data(0)).any()
    with pytest.raises(foldpar.errors.ShapeError), lockstep(moe, None, like=data(0)):
        moe(data(0)[:, :2])
    assert moe(data(0)).any()


def test_a_batch_passes_as_it_is() -> None:
    batch, like = {"input_ids": torch.ones(1, 2)}, {"input_ids": torch.zeros(2, 2)}
    with lockstep(nn.Linear(1, 1), batch, like=like) as given:
        assert given[0] is batch and given[1] == 1.0


@pytest.mark.parametrize("batch", [None, torch.ones(1)])
def test_what_stands_in_must_be_there_before_it_is_needed(batch: Tensor | None) -> None:
    with pytest.raises(ArgumentError, match=r"^lockstep: like must be a batch that the model can run, on every rank"):
        lockstep(nn.Linear(1, 1), batch, like=None).__enter__()
    with pytest.raises(ArgumentError, match=r"^lockstep: model must be a Module, and is a list"):
        lockstep([], batch, like=batch).__enter__()  # type: ignore[arg-type]
