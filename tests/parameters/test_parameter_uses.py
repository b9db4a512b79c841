"""A parameter's use decides its family: inside a TP-sharded region, on own rows, in two states, once per etp slice.

Every case is trained against one plain process, and every other family that one might guess is shown to be wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn import functional as F
from toys import (
    DIM,
    EXPERTS,
    HIDDEN,
    FeedForward,
    Model,
    fold,
    fold_moe,
    gradient_errors,
    loss_of,
    own,
    plain_gradients,
    plain_model,
    relative,
    tokens_of,
    worst,
)

import foldpar
from foldpar import families
from foldpar.errors import FamilyError, ReplicaError, ShapeError
from foldpar.testing import run_ranks

HEADS, HEAD_DIM = 4, 2
LAYOUTS = [
    foldpar.solve_layout(4, tp=2, ep=4),
    foldpar.solve_layout(4, tp=4, ep=2, order="consecutive"),
    foldpar.solve_layout(4, tp=2, cp=2, ep=2, etp=2),
]
Folding = Callable[[nn.Module, foldpar.FoldedGroups, families.ParameterFamily], nn.Module]


def loss_of_all_tokens(model: nn.Module, tokens: Tensor, groups: foldpar.FoldedGroups) -> Tensor:
    return loss_of(model, tokens)


def errors_on_ranks(
    plain: nn.Module,
    layout: foldpar.FoldedLayout,
    folding: Folding,
    family: families.ParameterFamily,
    loss: Callable[[nn.Module, Tensor, foldpar.FoldedGroups], Tensor] = loss_of_all_tokens,
) -> dict[str, float]:
    """The largest error of every parameter, where ``folding`` gives those in question this family."""
    want = plain_gradients(plain, layout.dp * layout.cp)

    def errors() -> dict[str, float]:
        with foldpar.create_groups(layout) as groups:
            model = folding(copy.deepcopy(plain), groups, family)
            loss(model, tokens_of(groups.dp_cp.index), groups).backward()
            foldpar.reduce_gradients(model, groups)
            return gradient_errors(model, want, groups)

    results = run_ranks(errors, layout.world, backend="threads")
    return {name: max(result[name] for result in results) for name in want}


def assert_only(family: families.ParameterFamily, cases: set[str], of: Callable[..., dict[str, float]]) -> None:
    """With this family all gradients are exact; with the other one those of the case are wrong, and only they."""
    exact = of(family)
    assert max(exact.values()) < 1e-12, worst(exact)
    other = families.REPLICATED if family is families.REPLICATED_PARTIAL else families.REPLICATED_PARTIAL
    wrong = of(other)
    assert {name for name, error in wrong.items() if error > 0.1} == cases
    assert {name for name, error in wrong.items() if error > 1e-12} == cases


# -- Inside a TP-sharded region ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Heads may be sharded over the lanes. One key-value head, gains for queries and keys, a sink per head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False), nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.k, self.v = nn.Linear(DIM, HEAD_DIM, bias=False), nn.Linear(DIM, HEAD_DIM, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.tp: foldpar.AxisGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.tp is None else foldpar.copy_to_group(x, self.tp)
        q = self.q_norm(self.q(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2))  # [batch, own heads, length, head_dim]
        k, v = self.k_norm(self.k(x))[:, None], self.v(x)[:, None]  # [batch, 1, length, head_dim]
        sinks = self.sinks if self.tp is None else self.sinks.chunk(self.tp.size)[self.tp.index]
        scores = q @ k.transpose(-1, -2) + torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        sinks = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        heads = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v
        y = self.o(heads.transpose(1, 2).flatten(2))
        return y if self.tp is None else foldpar.all_reduce(y, self.tp, backward="identity")

    def shard(self, tp: foldpar.AxisGroup, replicated: families.ParameterFamily) -> None:
        self.tp = tp
        self.q.weight = nn.Parameter(self.q.weight.detach().chunk(tp.size, 0)[tp.index].clone())
        self.o.weight = nn.Parameter(self.o.weight.detach().chunk(tp.size, 1)[tp.index].clone())
        foldpar.mark_parameters(self, families.DENSE_SHARDED)
        for module in (self.k, self.v, self.q_norm, self.k_norm):
            foldpar.mark_parameters(module, replicated)
        foldpar.mark_parameters(self, replicated, names=("sinks",))


def attentive_model() -> Model:
    model = plain_model()
    for block in model.blocks:
        block.dense = Attention().double()
    return model


def fold_attention(model: Model, groups: foldpar.FoldedGroups, family: families.ParameterFamily) -> Model:
    for block in model.blocks:
        block.moe = fold_moe(block.moe, groups)
        block.dense.shard(groups.tp, family)
    return foldpar.mark_parameters(model, families.REPLICATED)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_norm_gains_key_value_heads_and_sinks_inside_sharded_attention_are_summed(
    layout: foldpar.FoldedLayout,
) -> None:
    used_by_own_heads = ("k.weight", "v.weight", "q_norm.weight", "k_norm.weight", "sinks")
    cases = {f"blocks.{block}.dense.{name}" for block in (0, 1) for name in used_by_own_heads}
    plain = attentive_model()
    assert_only(
        families.REPLICATED_PARTIAL,
        cases,
        lambda family: errors_on_ranks(plain, layout, fold_attention, family),
    )


# -- On own rows ------------------------------------------------------------------------------------------------------


def on_own_rows(function: Callable[[Tensor], Tensor], x: Tensor, tp: foldpar.AxisGroup | None) -> Tensor:
    """Work on the lane's rows, between a split and a gather that are each other's conjugates."""
    if tp is None:
        return function(x)
    rows = x.flatten(0, 1)
    own = function(foldpar.split_rows(rows, tp, backward="all_gather"))
    counts = foldpar.comm.collectives.even_row_counts(len(rows), tp.size)
    return foldpar.all_gather_rows(own, tp, row_counts=counts, backward="slice").view(*x.shape[:-1], -1)


class WithShared(nn.Module):
    def __init__(self, routed: nn.Module) -> None:
        super().__init__()
        self.routed, self.own = routed, FeedForward().double()
        self.tp: foldpar.AxisGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + on_own_rows(self.own, x, self.tp)


def fold_with_shared(model: Model, groups: foldpar.FoldedGroups, family: families.ParameterFamily) -> Model:
    moe = model.blocks[0].moe
    moe.routed, moe.tp = fold_moe(moe.routed, groups), groups.tp
    foldpar.mark_parameters(moe.own, family)
    return foldpar.mark_parameters(model, families.REPLICATED)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=repr)
def test_a_replicated_shared_expert_on_own_rows_is_summed(layout: foldpar.FoldedLayout) -> None:
    plain = plain_model(blocks=1)
    plain.blocks[0].moe = WithShared(plain.blocks[0].moe)
    assert_only(
        families.REPLICATED_PARTIAL,
        {"blocks.0.moe.own.up.weight", "blocks.0.moe.own.down.weight"},
        lambda family: errors_on_ranks(plain, layout, fold_with_shared, family),
    )


def fold_below_own_tokens(model: Model, groups: foldpar.FoldedGroups, family: families.ParameterFamily) -> Model:
    for block in model.blocks:
        block.moe = fold_moe(block.moe, groups)
    foldpar.mark_parameters(model.norm, family)
    foldpar.mark_parameters(model.head, family)
    return foldpar.mark_parameters(model, families.REPLICATED)


def loss_of_own_tokens(model: Model, tokens: Tensor, groups: foldpar.FoldedGroups) -> Tensor:
    """The lane's share of the loss: norm and head see the lane's own tokens."""
    x = foldpar.split_rows(model.features(tokens[:, :-1]).flatten(0, 1), groups.tp, backward="all_gather")
    targets = foldpar.split_rows(tokens[:, 1:].flatten(), groups.tp, backward="zero_pad")
    return F.cross_entropy(model.logits(x), targets, reduction="sum") / tokens[:, 1:].numel()


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_norm_and_head_above_split_rows_are_summed(layout: foldpar.FoldedLayout) -> None:
    plain = plain_model()
    assert_only(
        families.REPLICATED_PARTIAL,
        {"norm.weight", "norm.bias", "head.weight", "head.bias"},
        lambda family: errors_on_ranks(plain, layout, fold_below_own_tokens, family, loss_of_own_tokens),
    )


# -- In two states ----------------------------------------------------------------------------------------------------


class Tied(Model):
    """The embedding is the head too. With ``tp``, its gradient is converted where it is the head."""

    def __init__(self) -> None:
        super().__init__(blocks=1)
        self.head = nn.Identity()
        self.tp: foldpar.AxisGroup | None = None

    def logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight
        return F.linear(self.norm(x), weight if self.tp is None else foldpar.copy_to_group(weight, self.tp))


def fold_tied(convert: bool) -> Folding:
    def folding(model: Tied, groups: foldpar.FoldedGroups, family: families.ParameterFamily) -> Tied:
        model.tp = groups.tp if convert else None
        model.blocks[0].moe = fold_moe(model.blocks[0].moe, groups)
        foldpar.mark_parameters(model.norm, families.REPLICATED_PARTIAL)
        foldpar.mark_parameters(model.embedding, family)
        return foldpar.mark_parameters(model, families.REPLICATED)

    return folding


def test_a_tied_embedding_is_converted_where_it_is_the_head_and_no_reduction_replaces_that() -> None:
    torch.manual_seed(0)
    plain, name = Tied().double(), "embedding.weight"

    def errors(convert: bool, family: families.ParameterFamily) -> dict[str, float]:
        return errors_on_ranks(plain, LAYOUTS[0], fold_tied(convert), family, loss_of_own_tokens)

    assert_only(families.REPLICATED, {name}, lambda family: errors(True, family))
    for family in (families.REPLICATED, families.REPLICATED_PARTIAL):
        unconverted = errors(False, family)
        assert unconverted.pop(name) > 0.1
        assert max(unconverted.values()) < 1e-12


# -- Biases of experts ------------------------------------------------------------------------------------------------

BIASED_LAYOUTS = [
    foldpar.solve_layout(**degrees, order=order)
    for degrees in (
        {"world": 2, "tp": 2, "ep": 2},
        {"world": 2, "tp": 2, "ep": 1, "etp": 2},
        {"world": 4, "tp": 2, "ep": 2, "etp": 2},
        {"world": 4, "tp": 4, "ep": 1, "etp": 2},
        {"world": 4, "tp": 2, "ep": 1, "etp": 4},
        {"world": 8, "tp": 2, "ep": 2, "etp": 2, "cp": 2},
    )
    for order in foldpar.layout.layout.ORDERS
]


def one_biased_step(
    plain: Model, want: dict[str, Tensor], norm: float, layout: foldpar.FoldedLayout, partition: str
) -> tuple[float, str]:
    with foldpar.create_groups(layout) as groups:
        model = copy.deepcopy(fold(plain, groups, partition=partition))  # marks by name survive a copy
        tokens = tokens_of(groups.dp_cp.index)
        assert relative(model(tokens), plain(tokens)) < 1e-14
        loss_of(model, tokens).backward()
        foldpar.reduce_gradients(model, groups)
        assert float(foldpar.get_total_norm(model, groups)) == pytest.approx(norm, rel=1e-12)
        found = foldpar.parameter_families(model, groups)
        assert found["blocks.0.moe.experts.down_bias"] == families.EXPERT_BIAS
        assert found["blocks.0.moe.experts.gate_up_bias"] == families.ROUTED_EXPERT
        return worst(gradient_errors(model, want, groups))


@pytest.mark.parametrize("partition", ["tokens", "assignments"])
@pytest.mark.parametrize("layout", BIASED_LAYOUTS, ids=repr)
def test_biases_of_experts_equal_one_process_and_count_once(layout: foldpar.FoldedLayout, partition: str) -> None:
    plain = plain_model(blocks=1, bias=True)
    want = plain_gradients(plain, layout.dp * layout.cp)
    norm = float(torch.cat([gradient.flatten() for gradient in want.values()]).norm())
    for error, name in run_ranks(
        one_biased_step, layout.world, plain, want, norm, layout, partition, backend="threads"
    ):
        assert error < 1e-12, name


def test_an_output_bias_says_that_it_is_a_sum_and_is_not_marked_like_the_weights_of_its_expert() -> None:
    layout = foldpar.solve_layout(2, tp=2, ep=1, etp=2)
    plain = plain_model(blocks=1, bias=True)
    want = plain_gradients(plain, 1)

    def error_of_the_bias() -> float:
        with foldpar.create_groups(layout) as groups:
            model = fold(plain, groups)
            experts = model.blocks[0].moe.experts
            loss_of(model, tokens_of(0)).backward()
            assert bool(own(experts.down_bias.grad).any()) == (groups.etp.index == 0)  # it is added once
            assert experts.down_bias.grad.placements == (Shard(0), Partial())
            foldpar.reduce_gradients(model, groups)
            assert experts.down_bias.grad.placements == experts.down_bias.placements == (Shard(0), Replicate())
            error = gradient_errors(model, want, groups)["blocks.0.moe.experts.down_bias"]
            foldpar.mark_parameters(experts, families.ROUTED_EXPERT, names="down_bias")
            with pytest.raises(
                FamilyError, match=r"replicated over .*'etp'.* shards over etp: its norm would be counted"
            ):
                foldpar.reduce_gradients(model, groups)
            return error

    assert max(run_ranks(error_of_the_bias, 2, backend="threads")) < 1e-12


def drifted(plain: Model, name: str) -> str:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2, etp=2)) as groups:
        model = fold(plain, groups)
        foldpar.check_replicas(model, groups)
        if groups.rank == 1:
            own(getattr(model.blocks[0].moe.experts, name).data)[0, 0] += 1
        if name == "gate_up_bias":  # sharded over etp: nobody holds a replica of it
            foldpar.check_replicas(model, groups)
            return ""
        with pytest.raises(ReplicaError) as refused:
            foldpar.check_replicas(model, groups)
        return str(refused.value)


def test_replicas_of_an_output_bias_are_checked_over_etp() -> None:
    plain = plain_model(blocks=1, bias=True)
    for text in run_ranks(drifted, 4, plain, "down_bias", backend="threads"):
        assert "blocks.0.moe.experts.down_bias over etp: rank" in text
    run_ranks(drifted, 4, plain, "gate_up_bias", backend="threads")


def drawn_biases(layout: foldpar.FoldedLayout) -> tuple[Any, ...]:
    with foldpar.create_groups(layout) as groups:
        experts = foldpar.GroupedExperts(EXPERTS, DIM, HIDDEN, groups, bias=True, seed=3)
        unbiased = foldpar.GroupedExperts(EXPERTS, DIM, HIDDEN, groups, seed=3)
        # Weights do not depend on whether there are biases.
        assert torch.equal(own(experts.down_proj), own(unbiased.down_proj))
        return groups.coordinate, own(experts.gate_up_bias.detach(), torch.empty(1, 1)), own(experts.down_bias.detach())


def test_one_seed_gives_the_same_biases_in_every_layout() -> None:
    ((_, gate_up, down),) = run_ranks(drawn_biases, 1, foldpar.solve_layout(1), backend="threads")
    assert 0.9 * DIM**-0.5 < gate_up.abs().max() <= DIM**-0.5
    assert 0.9 * HIDDEN**-0.5 < down.abs().max() <= HIDDEN**-0.5
    layout = foldpar.solve_layout(4, ep=2, etp=2)
    for at, own_gate_up, own_down in run_ranks(drawn_biases, 4, layout, backend="threads"):
        gate, up = gate_up.chunk(2)[at.ep].chunk(2, dim=1)
        assert torch.equal(own_gate_up, torch.cat([gate.chunk(2, 1)[at.etp], up.chunk(2, 1)[at.etp]], dim=1))
        assert torch.equal(own_down, down.chunk(2)[at.ep])


def test_wrong_biases_and_marks_by_name_teach() -> None:
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    gate_up, down = torch.zeros(EXPERTS, 2 * HIDDEN, DIM), torch.zeros(EXPERTS, DIM, HIDDEN)
    with pytest.raises(ShapeError, match=r"down_bias is given without gate_up_bias. Give both, or neither"):
        foldpar.GroupedExperts.from_dense(gate_up, down, groups, down_bias=down[..., 0])
    with pytest.raises(ShapeError, match=r"gate_up_bias must be \[8, 8\], a number per output, and is \[8, 4\]"):
        foldpar.GroupedExperts.from_dense(
            gate_up, down, groups, gate_up_bias=gate_up[:, :HIDDEN, 0], down_bias=down[..., 0]
        )
    with pytest.raises(FamilyError, match=r"names has 'sinks', but the own parameters of this Linear are weight, bias"):
        foldpar.mark_parameters(nn.Linear(2, 2), families.REPLICATED_PARTIAL, names=("sinks",))
    with pytest.raises(FamilyError, match=r"own parameters of this Sequential are none. .* mark the child"):
        foldpar.mark_parameters(nn.Sequential(nn.Linear(2, 2)), families.REPLICATED, names="0.weight")
