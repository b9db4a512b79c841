"""Auxiliary losses and the bias that replaces them: values, gradients and counts are those of one process."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from dense import dense_experts, feed_forward
from lane_cases import (
    ALL_FOLDS,
    DIM,
    EXPERTS,
    FOLDS,
    TOP_K,
    Fold,
    batches,
    of_lane,
    reference,
    run_folded,
    task_loss,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import foldpar
from foldpar import LaneState, Routing, TopKRouter, load_balancing_loss, router_z_loss, update_correction_bias
from foldpar.errors import ShapeError
from foldpar.testing import run_ranks

ONE = LaneState(foldpar.create_groups(foldpar.solve_layout(1)))
BALANCE, Z, SEQUENCES = 0.7, 0.3, 4  # large coefficients: an error in the auxiliary loss must show


# -- Formulae, by hand -------------------------------------------------------------------------------------------------


def balance_by_hand(probabilities: Tensor, ids: Tensor) -> Tensor:
    """Of one pool of tokens."""
    if len(ids) == 0:
        return probabilities.sum()
    fraction = torch.stack([(ids == expert).double().mean() for expert in range(EXPERTS)])
    return EXPERTS * (fraction * probabilities.mean(0)).sum()


def z_by_hand(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1).square().mean() if len(logits) else logits.sum()


def sequences_of(tokens: int) -> Tensor:
    """The number of each token's sequence; sequence 3 has no tokens, and a short batch has none of others."""
    return (torch.arange(tokens) * 5 + 1) % 7 % 3


def pools(routed: list[dict[str, Tensor]], fold: Fold, scope: str) -> list[list[dict[str, Tensor]]]:
    """For each term of the step's loss, whose mean it is: the pools whose mean the term is."""
    replicas = [_joined(routed[first : first + fold.cp]) for first in range(0, len(routed), fold.cp)]
    if scope == "global":
        return [[_joined(routed)]]
    if scope == "batch":
        return [[replica] for replica in replicas]
    terms = []
    for replica in replicas:
        each = [{key: value[replica["sequence"] == number] for key, value in replica.items()} for number in range(3)]
        terms.append([pool for pool in each if len(pool["ids"])])
    return terms


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def auxiliary_by_hand(inputs: list[Tensor], router: Tensor, fold: Fold, scope: str, score: str) -> Tensor:
    routed = []
    for x in inputs:
        logits = F.linear(x, router)
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
        ids = scores.topk(TOP_K, dim=-1).indices
        routed.append({"logits": logits, "p": probabilities, "ids": ids, "sequence": sequences_of(len(x))})
    balance = [
        torch.stack([balance_by_hand(pool["p"], pool["ids"]) for pool in term]).mean()
        for term in pools(routed, fold, scope)
        if term
    ]
    of_z = "global" if scope == "global" else "batch"
    z = [z_by_hand(pool["logits"]) for term in pools(routed, fold, of_z) for pool in term]
    replicas = 1 if scope == "global" else len(inputs) // fold.cp
    return BALANCE * sum(balance) / replicas + Z * torch.stack(z).mean()


# -- In every layout ---------------------------------------------------------------------------------------------------


def folded(fold: Fold, want: dict[str, Any], scope: str, score: str, loss: str) -> float:
    """What this rank adds to its loss; gradients are compared on the way."""
    added: list[float] = []

    def auxiliary(routing: Routing, moe: foldpar.FoldedMoE, x: Tensor) -> Tensor:
        sequences = None
        if scope == "sequence":
            whole = batches(fold.data_ranks)[moe.groups.dp_cp.index]
            sequences = (of_lane(sequences_of(len(whole)), fold, moe.groups), SEQUENCES)
        balance = load_balancing_loss(routing, moe.lane_state, scope=scope, sequences=sequences, loss=loss)
        of_z = "global" if scope == "global" else "batch"
        value = BALANCE * balance + Z * router_z_loss(routing, moe.lane_state, scope=of_z, loss=loss)
        added.append(float(value.detach()))
        return value

    router = TopKRouter(DIM, EXPERTS, TOP_K, score=score, dtype=torch.float64)
    run_folded(fold, router, auxiliary, want, loss)
    return added[0]


def check_auxiliary(fold: Fold, scope: str, score: str, loss: str) -> None:
    auxiliary: list[Tensor] = []

    def step_loss(inputs: list[Tensor], router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        auxiliary.append(auxiliary_by_hand(inputs, router, fold, scope, score))
        outputs = []
        for x in inputs:
            logits = F.linear(x, router)
            scores, ids = (logits.softmax(-1) if score == "softmax" else logits.sigmoid()).topk(TOP_K)
            outputs.append(dense_experts(x, ids, scores / scores.sum(-1, keepdim=True), feed_forward(gate_up, down)))
        return task_loss(outputs) + auxiliary[0]

    want = reference(fold.data_ranks, step_loss)
    values = run_ranks(folded, fold.world, fold, want, scope, score, loss, backend="threads")

    # Put together as the table of foldpar.moe.routing.losses says.
    of_replica = []
    for replica in range(fold.data_ranks):
        lanes = values[replica * fold.tp : (replica + 1) * fold.tp]
        all_tokens = fold.partition == "assignments"
        if fold.lane_grads == "post-hoc" or (all_tokens and fold.lane_grads == "replicated"):
            of_replica.append(sum(lanes) / fold.tp)
        else:
            of_replica.append(sum(lanes))
        if all_tokens:
            assert lanes == pytest.approx([lanes[0]] * fold.tp, rel=1e-12)
    total = sum(of_replica) / (len(of_replica) if loss == "mean" else 1)
    assert total == pytest.approx(float(auxiliary[0].detach()), rel=1e-12)


SCOPES = ("batch", "sequence", "global")
CASES = [
    (fold, SCOPES[place % 3], ("softmax", "sigmoid")[place // 3 % 2], ("mean", "sum")[place // 2 % 2])
    for place, fold in enumerate(FOLDS)
]


@pytest.mark.parametrize(("fold", "scope", "score", "loss"), CASES, ids=str)
def test_auxiliary_losses_do_not_depend_on_the_layout(fold: Fold, scope: str, score: str, loss: str) -> None:
    check_auxiliary(fold, scope, score, loss)


@pytest.mark.long
@pytest.mark.parametrize("fold", ALL_FOLDS, ids=str)
@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_auxiliary_loss_in_every_layout(fold: Fold, scope: str, score: str, loss: str) -> None:
    check_auxiliary(fold, scope, score, loss)


# -- What the numbers mean ---------------------------------------------------------------------------------------------


def routing_of(logits: Tensor, **more: Any) -> Routing:
    weights, ids = logits.softmax(-1).topk(TOP_K)
    return Routing(ids, weights, logits, **more)


def test_an_even_routing_has_the_loss_1_and_a_collapsed_one_num_experts_over_top_k() -> None:
    even = torch.eye(EXPERTS, dtype=torch.float64) * 3
    ids = torch.stack([torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS], dim=1)
    assert float(load_balancing_loss(Routing(ids, ids.double(), even), ONE)) == pytest.approx(1.0)
    collapsed = torch.zeros(5, EXPERTS, dtype=torch.float64)
    collapsed[:, :2] = 50.0
    assert float(load_balancing_loss(routing_of(collapsed), ONE)) == pytest.approx(EXPERTS / TOP_K)


def test_scores_come_before_logits_and_logits_mean_softmax() -> None:
    logits = torch.randn(9, EXPERTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    routing = routing_of(logits)
    assert float(load_balancing_loss(routing, ONE)) == pytest.approx(
        float(balance_by_hand(logits.softmax(-1), routing.ids))
    )
    scored = routing_of(logits, scores=logits.sigmoid())
    assert float(load_balancing_loss(scored, ONE)) == pytest.approx(
        float(balance_by_hand(logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True), scored.ids))
    )


def test_padding_tokens_are_no_tokens_and_dropped_decisions_still_count() -> None:
    logits = torch.randn(9, EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    padding = torch.arange(9) % 4 == 0
    padded, alone = routing_of(logits.requires_grad_(), padding=padding), routing_of(logits[~padding])
    for loss in (load_balancing_loss, router_z_loss):
        value = loss(padded, ONE)
        assert float(value.detach()) == pytest.approx(float(loss(alone, ONE).detach()), rel=1e-12)
        (gradient,) = torch.autograd.grad(value, logits)
        assert (gradient[padding] == 0).all() and gradient.abs().sum() > 0
    limited = foldpar.limit_capacity(alone, ONE, foldpar.Capacity(0.5), num_experts=EXPERTS)
    assert not limited.mask.all()
    assert float(load_balancing_loss(limited, ONE).detach()) == float(load_balancing_loss(alone, ONE).detach())


def test_no_tokens_at_all_give_zero_and_zero_gradients() -> None:
    logits = torch.zeros(0, EXPERTS, dtype=torch.float64, requires_grad=True)
    empty = Routing(torch.zeros(0, TOP_K, dtype=torch.int64), torch.zeros(0, TOP_K), logits)
    total = load_balancing_loss(empty, ONE) + router_z_loss(empty, ONE)
    total.backward()
    assert float(total.detach()) == 0.0
    assert logits.grad.shape == (0, EXPERTS)


def test_wrong_use_is_refused() -> None:
    routing = routing_of(torch.randn(4, EXPERTS))
    with pytest.raises(ValueError, match=r"scope is 'expert'; choose one of 'batch', 'sequence', 'global'"):
        load_balancing_loss(routing, ONE, scope="expert")
    with pytest.raises(ValueError, match=r"scope is 'sequence'; choose one of 'batch', 'global'"):
        router_z_loss(routing, ONE, scope="sequence")
    with pytest.raises(ValueError, match=r"scope='sequence' needs sequences: the number of every token's sequence"):
        load_balancing_loss(routing, ONE, scope="sequence")
    with pytest.raises(ValueError, match=r"scope='batch' takes no sequences"):
        load_balancing_loss(routing, ONE, sequences=(torch.zeros(4, dtype=torch.int64), 1))
    with pytest.raises(ShapeError, match=r"of its 3 torch.int64 numbers 3 fall on this lane, whose router saw 4 row"):
        load_balancing_loss(routing, ONE, scope="sequence", sequences=(torch.zeros(3, dtype=torch.int64), 1))
    bare = Routing(routing.ids, routing.weights)
    with pytest.raises(ShapeError, match=r"load_balancing_loss needs the logits of the router"):
        load_balancing_loss(bare, ONE)
    with pytest.raises(ShapeError, match=r"router_z_loss needs the logits of the router"):
        router_z_loss(bare, ONE)
    with pytest.raises(ValueError, match=r"loss = 'median' is unknown"):
        load_balancing_loss(routing, ONE, loss="median")


# -- The correction bias -----------------------------------------------------------------------------------------------

RATE, STEPS = 0.05, 3


class Stack(nn.Module):
    """Two layers with routers of their own; recomputed in the backward, if it says so."""

    def __init__(self, fold: Fold, groups: foldpar.FoldedGroups, recompute: bool | None) -> None:
        super().__init__()
        self.recompute = recompute  # None: not; else use_reentrant
        self.layers = nn.ModuleList()
        for number in range(2):
            weight, gate_up, down = weights()
            router = TopKRouter(DIM, EXPERTS, TOP_K, score="sigmoid", correction_bias=True, dtype=torch.float64)
            router.weight = nn.Parameter(weight.roll(number, 0))
            # The loss is nobody's here: of partial gradients the lanes send equal ones.
            self.layers.append(foldpar.FoldedMoE.from_dense(router, gate_up, down, groups, **fold.options, check=False))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            call = partial(layer, padding=padding)
            y = (
                call(x)
                if self.recompute is None or not self.training
                else checkpoint(call, x, use_reentrant=self.recompute)
            )
            x = x + y
        return x


def train_bias(fold: Fold, recompute: bool | None) -> list[Tensor]:
    """The counts of every step, then the biases."""
    with foldpar.create_groups(fold.layout) as groups:
        model = Stack(fold, groups, recompute)
        whole = batches(fold.data_ranks)[groups.dp_cp.index]
        seen = []
        for step in range(STEPS):
            for micro in range(2):
                x = of_lane(whole.roll(step + 2 * micro, 1), fold, groups).clone().requires_grad_()
                padding = of_lane(torch.arange(len(whole)) % 3 == micro, fold, groups)
                model(x, padding).sum().backward()
            model.eval()
            with torch.no_grad():
                model(x, padding)  # a validation: does not count
            model.train()
            counts = [layer.router.assignments_per_expert.clone() for layer in model.layers]
            seen += [model.layers[0].lane_state.sum_counts(count, "global") for count in counts]
            update_correction_bias(model, rate=RATE)
            assert all(layer.router.assignments_per_expert.sum() == 0 for layer in model.layers)
        return seen + [layer.router.correction_bias for layer in model.layers]


def bias_by_hand(data_ranks: int) -> list[Tensor]:
    biases, seen = [torch.zeros(EXPERTS), torch.zeros(EXPERTS)], []
    for step in range(STEPS):
        counts = torch.zeros(2, EXPERTS, dtype=torch.int64)
        for whole in batches(data_ranks):
            for micro in range(2):
                x, padding = whole.roll(step + 2 * micro, 1), torch.arange(len(whole)) % 3 == micro
                for number in range(2):
                    weight, gate_up, down = weights()
                    scores = F.linear(x, weight.roll(number, 0)).sigmoid()
                    ids = (scores + biases[number]).topk(TOP_K).indices
                    counts[number] += ids[~padding].flatten().bincount(minlength=EXPERTS)
                    chosen = scores.gather(1, ids)
                    mask = ~padding[:, None].expand(ids.shape)
                    x = x + dense_experts(
                        x, ids, chosen / chosen.sum(-1, keepdim=True), feed_forward(gate_up, down), mask
                    )
        for number in range(2):
            biases[number] += RATE * (counts[number].double().mean() - counts[number]).sign()
        seen += counts.unbind()
    return seen + biases


def check_bias(fold: Fold, recompute: bool | None) -> None:
    want = bias_by_hand(fold.data_ranks)
    assert not torch.equal(want[-1], want[-2])
    for numbers in run_ranks(train_bias, fold.world, fold, recompute, backend="threads"):
        for number, wanted in zip(numbers, want, strict=True):
            assert torch.equal(number, wanted)


@pytest.mark.parametrize(
    ("fold", "recompute"), [(fold, (None, False, True)[place % 3]) for place, fold in enumerate(FOLDS)], ids=str
)
def test_the_bias_counts_each_decision_of_training_once(fold: Fold, recompute: bool | None) -> None:
    check_bias(fold, recompute)


@pytest.mark.long
@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("fold", ALL_FOLDS, ids=str)
def test_the_bias_in_every_layout(fold: Fold, recompute: bool | None) -> None:
    check_bias(fold, recompute)


@pytest.mark.long
def test_a_compiled_router_is_one_graph_and_counts_once() -> None:
    router = TopKRouter(DIM, EXPERTS, TOP_K, correction_bias=True, group_limit=foldpar.GroupLimit(4, 2))
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, DIM, requires_grad=True)
    want = router(x)
    for calls, reentrant in ((2, False), (3, True)):
        weights = checkpoint(lambda x: compiled(x).weights, x, use_reentrant=reentrant)
        torch.testing.assert_close(weights, want.weights)
        weights.square().sum().backward()
        assert router.assignments_per_expert.sum() == calls * 6 * TOP_K


def test_a_balanced_step_leaves_the_bias_and_a_shared_router_moves_once() -> None:
    router = TopKRouter(DIM, EXPERTS, TOP_K, correction_bias=True, dtype=torch.float64)
    groups = ONE.groups
    layers = [foldpar.FoldedMoE.from_dense(router, *weights()[1:], groups) for _ in range(2)]
    model = nn.ModuleList([*layers, copy.deepcopy(layers[0])])
    update_correction_bias(model, rate=RATE)
    assert router.correction_bias.tolist() == [0.0] * EXPERTS
    router.assignments_per_expert.copy_(torch.tensor([5, 1, 1, 1, 2, 2, 2, 2]))
    update_correction_bias(model, rate=RATE)
    assert router.correction_bias.tolist() == pytest.approx([-RATE, RATE, RATE, RATE, 0, 0, 0, 0])
    assert model[2].router.correction_bias.tolist() == [0.0] * EXPERTS
    assert model.state_dict()["0.router.correction_bias"].tolist() == router.correction_bias.tolist()


def test_a_model_without_such_a_router_and_a_rate_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"The model has no router with a correction bias inside a FoldedMoE"):
        update_correction_bias(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"rate = 0 must be positive; DeepSeek-V3 takes 0.001"):
        update_correction_bias(nn.Linear(2, 2), rate=0)
