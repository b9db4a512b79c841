"""Routers: each family against its formula, alike in every layout; replay, forced balance, and wrong use."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    reference,
    run_folded,
    task_loss,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F

import foldpar
from foldpar import GroupLimit, TopKRouter
from foldpar.errors import ReplicaError, ShapeError
from foldpar.testing import run_ranks

# -- Families against hand-written formulae ----------------------------------------------------------------------------
# Each takes logits [tokens, 8] and returns (ids, weights). `bias` is the correction bias.

Formula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mixtral(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(2, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True)


def olmoe(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(2, dim=-1)
    return ids, weights


def gpt_oss(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    chosen, ids = logits.topk(2, dim=-1)
    return ids, chosen.exp() / chosen.exp().sum(-1, keepdim=True)


def llama4(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    chosen, ids = logits.topk(2, dim=-1)
    return ids, chosen.sigmoid()


def deepseek_v2(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1)
    best_groups = scores.view(-1, 4, 2).max(-1).values.topk(2, dim=-1).indices
    allowed = torch.zeros(len(logits), 4, dtype=torch.bool).scatter_(1, best_groups, True).repeat_interleave(2, 1)
    weights, ids = scores.masked_fill(~allowed, 0.0).topk(2, dim=-1)
    return ids, weights * 16.0


def deepseek_v3(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    corrected = scores + bias
    of_group = corrected.view(-1, 2, 4).topk(2, dim=-1).values.sum(-1)
    best_group = of_group.topk(1, dim=-1).indices
    allowed = torch.zeros(len(logits), 2, dtype=torch.bool).scatter_(1, best_group, True).repeat_interleave(4, 1)
    ids = corrected.masked_fill(~allowed, float("-inf")).topk(2, dim=-1).indices
    chosen = scores.gather(1, ids)
    return ids, 2.5 * chosen / chosen.sum(-1, keepdim=True)


def minimax_m2(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = (logits.sigmoid() + bias).topk(2, dim=-1).indices
    chosen = logits.sigmoid().gather(1, ids)
    return ids, chosen / chosen.sum(-1, keepdim=True)


def sqrt_softplus(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.softplus(logits).sqrt()
    ids = (scores + bias).topk(2, dim=-1).indices
    chosen = scores.gather(1, ids)
    return ids, 1.5 * chosen / chosen.sum(-1, keepdim=True)


FAMILIES: dict[str, tuple[Formula, dict[str, Any]]] = {
    "mixtral": (mixtral, {}),
    "olmoe": (olmoe, {"renormalize": False}),
    "gpt_oss": (gpt_oss, {"score_over": "chosen"}),
    "llama4": (llama4, {"score": "sigmoid", "renormalize": False}),
    "deepseek_v2": (deepseek_v2, {"renormalize": False, "group_limit": GroupLimit(4, 2), "scaling_factor": 16.0}),
    "deepseek_v3": (
        deepseek_v3,
        {
            "score": "sigmoid",
            "correction_bias": True,
            "group_limit": GroupLimit(2, 1, "top2_sum"),
            "scaling_factor": 2.5,
        },
    ),
    "minimax_m2": (minimax_m2, {"score": "sigmoid", "correction_bias": True}),
    "sqrt_softplus": (sqrt_softplus, {"score": "sqrt_softplus", "correction_bias": True, "scaling_factor": 1.5}),
}
BIAS = torch.tensor([0.0, -0.3, 0.1, 0.2, -0.1, 0.4, 0.0, -0.2])  # large enough to change most choices


def router_of(family: str, **more: Any) -> TopKRouter:
    router = TopKRouter(DIM, EXPERTS, TOP_K, dtype=torch.float64, **FAMILIES[family][1], **more)
    if router.correction_bias is not None:
        router.correction_bias.copy_(BIAS)
    return router


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_its_formula_in_value_and_gradient(family: str) -> None:
    formula, options = FAMILIES[family]
    x = torch.randn(64, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    router = router_of(family, bias=family == "gpt_oss")
    weight, bias = weights()[0].requires_grad_(), None if router.bias is None else router.bias.detach().requires_grad_()
    router.weight = nn.Parameter(weight.detach().clone())
    cotangent = torch.linspace(-1, 1, 128, dtype=torch.float64).view(64, 2)

    routing = router(x)
    ids, want = formula(F.linear(x, weight, bias), BIAS)
    assert torch.equal(routing.ids, ids)
    torch.testing.assert_close(routing.weights, want, rtol=1e-12, atol=1e-14)
    (routing.weights * cotangent).sum().backward()
    (want * cotangent).sum().backward()
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-11, atol=1e-13)
    if bias is not None:
        torch.testing.assert_close(router.bias.grad, bias.grad, rtol=1e-11, atol=1e-13)
    if options.get("correction_bias"):
        unbiased = formula(F.linear(x, weight), torch.zeros(EXPERTS))[0]
        assert not torch.equal(ids, unbiased), "the bias of this test must change choices"
    for tokens in (0, 1):
        assert router(x[:tokens]).weights.shape == (tokens, TOP_K)


def family_loss(family: str) -> Callable[..., Tensor]:
    def loss(inputs: list[Tensor], router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routed = [FAMILIES[family][0](F.linear(x, router), BIAS) for x in inputs]
        outputs = [
            dense_experts(x, ids, weights, feed_forward(gate_up, down))
            for x, (ids, weights) in zip(inputs, routed, strict=True)
        ]
        return task_loss(outputs)

    return loss


def check_family(family: str, fold: Fold) -> None:
    want = reference(fold.data_ranks, family_loss(family))
    run_ranks(run_folded, fold.world, fold, router_of(family), None, want, backend="threads")


# Every family on some fold, every fold with some family.
PAIRS = [(list(FAMILIES)[place % len(FAMILIES)], fold) for place, fold in enumerate(FOLDS)]


@pytest.mark.parametrize(("family", "fold"), PAIRS, ids=str)
def test_a_router_does_not_depend_on_the_layout(family: str, fold: Fold) -> None:
    check_family(family, fold)


@pytest.mark.long
@pytest.mark.parametrize("fold", ALL_FOLDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_router_in_every_layout(family: str, fold: Fold) -> None:
    check_family(family, fold)


# -- Selection ---------------------------------------------------------------------------------------------------------


def test_of_equal_scores_the_lower_id_wins() -> None:
    router = TopKRouter(DIM, 16, 4, group_limit=GroupLimit(4, 2))
    nn.init.zeros_(router.weight)
    assert router(torch.randn(5, DIM)).ids.tolist() == [[0, 1, 2, 3]] * 5
    plain = TopKRouter(1, 6, 3, dtype=torch.float64)
    plain.weight = nn.Parameter(torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0], [0.0]], dtype=torch.float64))
    assert plain(torch.ones(1, 1, dtype=torch.float64)).ids.tolist() == [[1, 3, 0]]


def test_a_negative_corrected_score_inside_the_groups_beats_all_outside() -> None:
    router = TopKRouter(1, 4, 2, score="sigmoid", correction_bias=True, group_limit=GroupLimit(2, 1))
    router.weight = nn.Parameter(torch.tensor([[2.0], [0.0], [1.0], [1.0]]))
    router.correction_bias.copy_(torch.tensor([0.0, -2.0, 0.0, 0.0]))
    assert router(torch.ones(1, 1)).ids.tolist() == [[0, 1]]


def test_the_correction_bias_is_saved_has_no_gradient_and_stays_in_float32() -> None:
    router = router_of("deepseek_v3").to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.correction_bias.dtype == torch.float32
    assert torch.equal(router.correction_bias, BIAS)
    assert {name for name, _ in router.named_parameters()} == {"weight"}
    assert set(router.state_dict()) == {"weight", "correction_bias"}
    meta = TopKRouter(DIM, EXPERTS, TOP_K, correction_bias=True, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert meta.correction_bias.tolist() == [0.0] * EXPERTS


# -- Precision ---------------------------------------------------------------------------------------------------------


def test_router_dtype_is_the_dtype_of_the_product_also_under_autocast() -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = TopKRouter(64, 8, 2, dtype=torch.bfloat16, bias=True, router_dtype=torch.float32)
    narrow = TopKRouter(64, 8, 2, dtype=torch.bfloat16, bias=True)
    narrow.load_state_dict(wide.state_dict())
    want = F.linear(x.float(), wide.weight.float(), wide.bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(x).logits, want)
        assert torch.equal(narrow(x).logits, F.linear(x, narrow.weight, narrow.bias).float())
    assert not torch.equal(narrow(x).logits, want)
    for router in (wide, narrow):
        assert {router(x).logits.dtype, router(x).scores.dtype, router(x).weights.dtype} == {torch.float32}
    double = TopKRouter(64, 8, 2, dtype=torch.bfloat16, router_dtype=torch.float64)
    assert double(x).weights.dtype == torch.float64


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_extreme_logits_have_finite_weights_and_gradients(score: str) -> None:
    router = TopKRouter(1, 4, 2, score=score)
    router.weight = nn.Parameter(torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0]]))
    x = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weights = router(x).weights
    weights.square().sum().backward()
    assert weights.isfinite().all() and x.grad.isfinite().all() and router.weight.grad.isfinite().all()


# -- Jitter ------------------------------------------------------------------------------------------------------------


def test_jitter_multiplies_the_routers_input_in_training_only() -> None:
    x = torch.randn(1000, DIM, dtype=torch.float64)
    router = TopKRouter(DIM, EXPERTS, TOP_K, dtype=torch.float64, jitter=0.1)
    plain = F.linear(x, router.weight)
    assert router.is_random
    torch.manual_seed(3)
    logits = router(x).logits
    torch.manual_seed(3)
    factors = torch.rand_like(x) * 0.2 + 0.9
    torch.testing.assert_close(logits, F.linear(x * factors, router.weight))
    assert not torch.equal(logits, plain)
    router.eval()
    assert not router.is_random
    assert torch.equal(router(x).logits, plain)


# -- Replay and forced balance -----------------------------------------------------------------------------------------


def replayed(fold: Fold, recorded: list[Tensor], record: bool) -> Tensor:
    with foldpar.create_groups(fold.layout) as groups:
        router = router_of("mixtral")
        _, gate_up, down = weights()
        router.weight = nn.Parameter(weights()[0] if record else -weights()[0])  # a router of another opinion
        moe = foldpar.FoldedMoE.from_dense(router, gate_up, down, groups, **fold.options)
        x = batches(4)[groups.dp_cp.index + 2 * (groups.dp_cp.index > 0)]
        ids = recorded[groups.dp_cp.index] if recorded else None
        y, routing = moe(x.view(1, *x.shape), ids=None if ids is None else ids[None], return_routing=True)
        seen = moe.lane_state.gather(routing.ids)
        if ids is not None:
            assert torch.equal(seen, ids)
            logits = F.linear(x, router.weight)
            scores = logits.softmax(-1).gather(1, ids)
            want = dense_experts(x, ids, scores / scores.sum(-1, keepdim=True), feed_forward(gate_up, down))
            torch.testing.assert_close(y[0], want, rtol=1e-11, atol=1e-12)
        return seen


def test_a_recorded_routing_is_replayed_in_another_layout() -> None:
    first, second = Fold(4, 2, 4), Fold(4, 2, 2, etp=2, partition="assignments")
    recorded = run_ranks(replayed, 4, first, [], True, backend="threads")
    assert torch.equal(recorded[0], recorded[1])  # all lanes know the routing of all tokens
    run_ranks(replayed, 4, second, recorded[::2], False, backend="threads")
    own = run_ranks(replayed, 4, second, [], False, backend="threads")
    assert not torch.equal(own[0], recorded[0])


def test_forced_balance_is_round_robin_with_the_weights_of_the_scores() -> None:
    router = router_of("deepseek_v2")
    x = torch.randn(6, DIM, dtype=torch.float64)
    routing = foldpar.BalancedRouter(router)(x)
    assert routing.ids.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [2, 3]]
    scores = F.linear(x, router.weight).softmax(-1)
    torch.testing.assert_close(routing.weights, 16.0 * scores.gather(1, routing.ids))
    counts = foldpar.BalancedRouter(router)(torch.randn(12, DIM, dtype=torch.float64)).ids.flatten().bincount()
    assert counts.tolist() == [3] * EXPERTS


def balanced_layer() -> list[int]:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        _, gate_up, down = weights()
        router = foldpar.BalancedRouter(router_of("mixtral", jitter=0.1))
        moe = foldpar.FoldedMoE.from_dense(router, gate_up, down, groups, counters=foldpar.LayerCounters())
        assert router.is_random
        moe(torch.randn(16, DIM, dtype=torch.float64)).sum().backward()
        assert foldpar.parameter_families(moe, groups)["router.router.weight"].name == "router_own_tokens"
        assert router.router.weight.grad.abs().sum() > 0
        received = moe.counters.read()
        return [received.rows_sent, received.rows_received]


def test_forced_balance_in_a_layer_sends_equal_shares() -> None:
    assert run_ranks(balanced_layer, 4) == [[6, 6]] * 4  # 8 tokens to 4 ranks, two experts of one rank each


# -- Padding -----------------------------------------------------------------------------------------------------------


def padded_tokens(fold: Fold) -> None:
    with foldpar.create_groups(fold.layout) as groups:
        router_weight, gate_up, down = weights()
        router = router_of("mixtral")
        router.weight = nn.Parameter(router_weight)
        moe = foldpar.FoldedMoE.from_dense(router, gate_up, down, groups, **fold.options)
        x = batches(4)[3].clone().requires_grad_()
        padding = torch.arange(len(x)) % 3 == 0
        y = moe(x, padding=padding)
        y.sum().backward()
        want_x = x.detach().clone().requires_grad_()
        ids, scores = mixtral(F.linear(want_x, router_weight), BIAS)
        want = dense_experts(want_x, ids, scores, feed_forward(gate_up, down), ~padding[:, None])
        want.sum().backward()
        torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(x.grad, want_x.grad, rtol=1e-11, atol=1e-12)
        assert (y[padding] == 0).all() and (x.grad[padding] == 0).all()


@pytest.mark.parametrize("fold", [Fold(4, 2, 4), Fold(4, 4, 2, partition="assignments")], ids=str)
def test_padding_tokens_reach_no_expert_and_get_exact_zeros(fold: Fold) -> None:
    run_ranks(padded_tokens, fold.world, fold, backend="threads")


def with_narrow_ids(partition: str, capacity: foldpar.Capacity | None) -> None:
    """Replicas replay one routing, some in int32 and some in int64."""
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        router = router_of("deepseek_v3")
        router.weight = nn.Parameter(weights()[0])
        options: dict[str, Any] = {"partition": partition, "capacity": capacity}
        moe = foldpar.FoldedMoE.from_dense(router, *weights()[1:], groups, **options)
        x = batches(1)[0].requires_grad_()
        whole = router(x).ids
        found = []
        for dtypes in ((torch.int64, torch.int64), (torch.int32, torch.int32), (torch.int32, torch.int64)):
            y = moe(x, ids=whole.to(dtypes[groups.dp.index]))
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, router.weight])))
        for others in found[1:]:
            for one, other in zip(found[0], others, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("partition", ["tokens", "assignments"])
@pytest.mark.parametrize("capacity", [None, foldpar.Capacity(1.0)])
def test_ids_may_be_int32(partition: str, capacity: foldpar.Capacity | None) -> None:
    run_ranks(with_narrow_ids, 4, partition, capacity, backend="threads")


# -- Lanes that must decide alike --------------------------------------------------------------------------------------


def lanes_that_disagree(differ: bool) -> str:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        _, gate_up, down = weights()
        router = router_of("mixtral")
        router.weight = nn.Parameter(weights()[0] * (1 + differ * (groups.rank == 3)))
        moe = foldpar.FoldedMoE.from_dense(router, gate_up, down, groups, partition="assignments", check=True)
        try:
            moe(batches(1)[0])
        except ReplicaError as error:
            return str(error)
        return ""


def test_lanes_that_route_the_same_tokens_differently_are_named_when_checked() -> None:
    assert run_ranks(lanes_that_disagree, 4, False, backend="threads") == [""] * 4
    texts = run_ranks(lanes_that_disagree, 4, True, backend="threads")
    for text in texts[2:]:
        assert "The routing of tokens that all lanes hold differs over tp" in text
        assert "field 'weights' at [0, 0]" in text and "on rank 3 (tp 1)" in text
        assert "or if a router draws random numbers after lanes were seeded differently" in text
    for text in texts[:2]:
        assert text == "The routing differs between the lanes of another TP group that this step meets; see its ranks."


# -- Wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"score": "tanh"}, ValueError, "score is 'tanh'; choose 'softmax' or 'sigmoid' or 'sqrt_softplus'."),
        ({"score_over": "some"}, ValueError, "score_over is 'some'; choose 'all' or 'chosen'."),
        (
            {"score": "sigmoid", "score_over": "chosen"},
            ValueError,
            "score_over='chosen' changes only a softmax: the sigmoid of a logit does not depend on the others.",
        ),
        (
            {"score_over": "chosen", "renormalize": False},
            ValueError,
            "so their weights sum to 1 and renormalize=False cannot hold.",
        ),
        ({"jitter": 1.0}, ValueError, "jitter = 1.0 must be at least 0 and below 1"),
        (
            {"group_limit": GroupLimit(3, 1)},
            ShapeError,
            "num_groups = 3 does not divide num_experts = 8. With num_experts = 8, num_groups can be 1, 2, 4 or 8.",
        ),
        (
            {"group_limit": GroupLimit(8, 1)},
            ShapeError,
            "top_k = 2 experts need 2 or more of the num_groups = 8 groups of 1. top_groups can be 2 to 8.",
        ),
        ({"group_limit": GroupLimit(4, 5)}, ShapeError, "top_groups = 5 does not fit"),
        (
            {"group_limit": GroupLimit(8, 2, "top2_sum")},
            ShapeError,
            "score='top2_sum' adds the two best experts of a group, but num_groups = 8 leaves 1 expert in each.",
        ),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as refused:
        TopKRouter(DIM, EXPERTS, TOP_K, **options)
    assert text in str(refused.value)


def test_ids_and_padding_must_go_with_the_tokens() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        router = router_of("mixtral")
        moe = foldpar.FoldedMoE.from_dense(copy.deepcopy(router), *weights()[1:], groups)
        x = torch.zeros(2, 3, DIM, dtype=torch.float64)
        with pytest.raises(
            ShapeError, match=r"ids must go with the tokens of the input, \[2, 3\] of \[2, 3, 4\]; they"
        ):
            moe(x, ids=torch.zeros(6, 2, dtype=torch.int64))
        with pytest.raises(ShapeError, match=r"padding must go with the tokens of the input"):
            moe(x, padding=torch.zeros(2, dtype=torch.bool))
        with pytest.raises(
            ShapeError, match=r"ids must be int32 or int64, \[tokens, top_k\] = \[6, 2\]; they are torch"
        ):
            moe(x, ids=torch.zeros(2, 3, 1, dtype=torch.int64))
        with pytest.raises(
            ShapeError, match=r"padding must be bool, \[tokens\] = \[6\], true for padding tokens; it is"
        ):
            moe(x, padding=torch.zeros(2, 3))
        with pytest.raises(ShapeError, match=r"Expert ids outside \[0, 8\)"):
            moe(x, ids=torch.full((2, 3, 2), 8))
