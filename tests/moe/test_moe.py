"""The layer: what it computes on its own, what its gradients are before any reduction, and how it refuses wrong use."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from dense import dense_experts, feed_forward, softmax_routing
from torch import Tensor, nn
from torch.nn import functional as F
from toys import own

import foldpar
from foldpar import families
from foldpar.errors import GroupsError, ReplicaError, ShapeError
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

DIM, HIDDEN, EXPERTS, TOP_K = 4, 6, 8, 2
TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}
ONE = foldpar.create_groups(foldpar.solve_layout(1))


def weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(EXPERTS, DIM, generator=generator, dtype=torch.float64)
    gate_up = torch.randn(EXPERTS, 2 * HIDDEN, DIM, generator=generator, dtype=torch.float64)
    down = torch.randn(EXPERTS, DIM, HIDDEN, generator=generator, dtype=torch.float64)
    return router, gate_up, down


def dense(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return dense_experts(x, *softmax_routing(x, router, TOP_K), feed_forward(gate_up, down))


def layer(groups: foldpar.FoldedGroups, **options: Any) -> foldpar.FoldedMoE:
    router, gate_up, down = weights()
    top_k = foldpar.TopKRouter(DIM, EXPERTS, TOP_K)
    top_k.weight = nn.Parameter(router)
    return foldpar.FoldedMoE.from_dense(top_k, gate_up, down, groups, **options)


# -- Gradients before any reduction (so that two errors cannot cancel) -------------------------------------------------


def raw_gradients(layout: foldpar.FoldedLayout, partition: str, tokens: int) -> None:
    """Router: its lanes add up to the replica's gradient. Experts: dp * cp times the part from this edp coordinate."""
    with foldpar.create_groups(layout) as groups:
        data_ranks, mine = layout.dp * layout.cp, groups.dp_cp.index
        batches = [torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                   for i in range(data_ranks)]  # fmt: skip
        cotangent = torch.linspace(-1, 1, tokens * DIM, dtype=torch.float64).view(tokens, DIM)

        moe = layer(groups, partition=partition)
        x = batches[mine].clone().requires_grad_()
        moe(x).backward(cotangent)

        router, gate_up, down = (weight.requires_grad_() for weight in weights())
        want_x = batches[mine].clone().requires_grad_()
        y = dense(want_x, router, gate_up, down)
        (want_router, input_gradient) = torch.autograd.grad(y, [router, want_x], cotangent)
        torch.testing.assert_close(x.grad, input_gradient, **TOLERANCE)  # replicated, exact on every lane

        summed = foldpar.comm.collectives.all_reduce_(moe.router.weight.grad.clone(), groups.tp)
        alike = layout.tp if partition == "assignments" else 1
        torch.testing.assert_close(summed / alike, want_router, **TOLERANCE)

        # An expert's copy of every edp coordinate, used by the assignments that ranks of that coordinate own.
        owners = list(layout.group("tp", groups.rank))
        parts = [torch.zeros_like(gate_up) for _ in range(layout.edp)]
        for data_rank, batch in enumerate(batches):
            lanes = layout.group("tp", layout.group("dp_cp", owners[0])[data_rank])
            for lane, rank in enumerate(lanes):
                edp = layout.coordinate(rank).edp
                used = gate_up.detach().clone().requires_grad_()
                constants = router.detach(), gate_up.detach(), used, down.detach()
                output = dense_of_lane(batch, *constants, lane, layout.tp, partition)
                if output.requires_grad:
                    (gradient,) = torch.autograd.grad(output, used, cotangent)
                    parts[edp] += gradient / data_ranks
        want = Shares(moe, groups).share_of("experts.gate_up_proj", parts[groups.edp.index]) * data_ranks
        torch.testing.assert_close(own(moe.experts.gate_up_proj.grad, want), want, **TOLERANCE)


def dense_of_lane(
    x: Tensor, router: Tensor, gate_up: Tensor, used: Tensor, down: Tensor, lane: int, lanes: int, partition: str
) -> Tensor:
    """The dense loop in which the lane's own assignments use ``used``, and all others the constant weight."""
    ids, scores = softmax_routing(x, router, TOP_K)
    if partition == "tokens":
        lane_of_token = torch.arange(lanes).repeat_interleave(
            torch.tensor(foldpar.comm.collectives.even_row_counts(len(x), lanes))
        )
        mine = (lane_of_token == lane)[:, None]
    else:  # the assignments of an expert, in the order of tokens, go to one lane after the other
        before = F.one_hot(ids.flatten(), EXPERTS).cumsum(0) - 1
        mine = (before.gather(1, ids.flatten()[:, None]) % lanes == lane).view_as(ids)
    return sum(
        dense_experts(x, ids, scores, feed_forward(weight, down), mask)
        for mask, weight in ((mine, used), (~mine, gate_up))
    )


@pytest.mark.parametrize("order", ["tp-lane-major", "consecutive"])
@pytest.mark.parametrize("partition", ["tokens", "assignments"])
@pytest.mark.parametrize(
    "degrees",
    [
        {"world": 4, "tp": 2, "ep": 2},
        {"world": 4, "tp": 2, "ep": 4},
        {"world": 4, "tp": 4, "ep": 2},
        {"world": 4, "tp": 2, "ep": 1, "etp": 2},
        {"world": 8, "tp": 2, "ep": 2, "cp": 2},
    ],
    ids=str,
)
def test_raw_gradients_are_what_the_theory_says(degrees: dict[str, int], partition: str, order: str) -> None:
    layout = foldpar.solve_layout(**degrees, order=order)
    for tokens in (0, 1, 7):
        run_ranks(raw_gradients, layout.world, layout, partition, tokens, backend="threads")


# -- Sharded lanes ----------------------------------------------------------------------------------------------------


def sharded_lanes(layout: foldpar.FoldedLayout, tokens: tuple[int, ...]) -> None:
    """Every rank brings its own, ragged tokens and gets exactly what a dense layer gives them."""
    with foldpar.create_groups(layout) as groups:
        draw = torch.Generator().manual_seed(groups.rank)
        x = torch.randn(tokens[groups.rank], DIM, generator=draw, dtype=torch.float64).requires_grad_()
        want_x = x.detach().clone().requires_grad_()
        router, gate_up, down = (weight.requires_grad_() for weight in weights())
        y, want = layer(groups, lanes="sharded")(x), dense(want_x, router, gate_up, down)
        torch.testing.assert_close(y, want, **TOLERANCE)
        y.square().sum().backward()
        want.square().sum().backward()
        torch.testing.assert_close(x.grad, want_x.grad, **TOLERANCE)


def test_sharded_lanes_take_ragged_tokens() -> None:
    for order in ("tp-lane-major", "consecutive"):
        layout = foldpar.solve_layout(4, tp=2, ep=4, order=order)
        for tokens in ((3, 0, 5, 1), (0, 0, 0, 0), (2, 2, 2, 2)):
            run_ranks(sharded_lanes, 4, layout, tokens, backend="threads")


# -- Construction -----------------------------------------------------------------------------------------------------


def drawn_experts(layout: foldpar.FoldedLayout) -> tuple[Any, ...]:
    torch.manual_seed(3)
    with foldpar.create_groups(layout) as groups:
        experts = foldpar.GroupedExperts(EXPERTS, DIM, HIDDEN, groups, dtype=torch.float64)
        plain = foldpar.GroupedExperts(EXPERTS, DIM, HIDDEN, groups, activation="gelu", seed=5)
        assert torch.rand(1).item() > 0  # what experts draw does not move the default generator differently
        drawn = (experts.gate_up_proj, experts.down_proj, plain.down_proj)
        return groups.coordinate, *(own(each.detach(), torch.empty(1, 1, 1)) for each in drawn)


def test_one_seed_gives_the_same_experts_in_every_layout() -> None:
    ((_, gate_up, down, plain),) = run_ranks(drawn_experts, 1, foldpar.solve_layout(1))
    for degrees in ({"ep": 4}, {"tp": 2, "ep": 2, "etp": 2}, {"tp": 4, "ep": 2}):
        layout = foldpar.solve_layout(4, **degrees)
        for at, own_gate_up, own_down, own_plain in run_ranks(drawn_experts, 4, layout):
            hidden = HIDDEN // layout.etp
            units = slice(at.etp * hidden, (at.etp + 1) * hidden)
            gate, up = gate_up.chunk(layout.ep)[at.ep].chunk(2, dim=1)
            assert torch.equal(own_gate_up, torch.cat([gate[:, units], up[:, units]], dim=1))
            assert torch.equal(own_down, down.chunk(layout.ep)[at.ep][..., units])
            assert torch.equal(own_plain, plain.chunk(layout.ep)[at.ep][..., units])


def test_from_dense_takes_shares_and_shares_no_memory() -> None:
    _, gate_up, down = weights()
    moe = layer(ONE)
    assert torch.equal(moe.experts.gate_up_proj, gate_up)
    experts = foldpar.GroupedExperts.from_dense(gate_up, down, ONE)
    gate_up.zero_()
    assert experts.gate_up_proj.abs().sum() > 0
    assert experts.gate_up_proj.dtype == torch.float64


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "silu", "gelu", "relu"])
def test_activations(activation: str) -> None:
    experts = foldpar.GroupedExperts(2, DIM, HIDDEN, ONE, activation=activation, dtype=torch.float64)
    x = torch.randn(5, DIM, dtype=torch.float64)
    hidden = x @ experts.gate_up_proj[1].T
    function = {"swiglu": F.silu, "geglu": F.gelu, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation]
    if "glu" in activation:
        gate, up = hidden.chunk(2, -1)
        want = function(gate) * up @ experts.down_proj[1].T
    else:
        want = function(hidden) @ experts.down_proj[1].T
    torch.testing.assert_close(experts(x, torch.tensor([0, 5], dtype=torch.int32)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [[0, 0, 0], [0, 5, 0]])
def test_empty_experts_get_zero_gradients_not_none(dtype: torch.dtype, rows: list[int]) -> None:
    experts = foldpar.GroupedExperts(3, 16, 32, ONE, dtype=dtype, seed=0)
    x = torch.randn(sum(rows), 16, dtype=dtype, requires_grad=True)
    experts(x, torch.tensor(rows, dtype=torch.int32)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert [bool(gradient.abs().sum() > 0) for gradient in parameter.grad] == [count > 0 for count in rows]


# -- State ------------------------------------------------------------------------------------------------------------


def in_flight() -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        one, two = (torch.linspace(-1, 2, n * DIM, dtype=torch.float64).view(n, DIM).sin() for n in (3, 6))
        moe = layer(groups)
        moe(one).sum().backward()
        moe(two).square().sum().backward()
        alone = [parameter.grad.clone() for parameter in moe.parameters()]
        moe.zero_grad()
        first, second = moe(one), moe(two)
        first.sum().backward()
        second.square().sum().backward()
        for parameter, want in zip(moe.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, want, **TOLERANCE)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(moe)(one), first)
        with torch.inference_mode():
            assert moe(one.view(1, 3, DIM)).shape == (1, 3, DIM)


def test_two_forwards_in_flight_and_a_copied_layer() -> None:
    run_ranks(in_flight, 4)


def test_families_follow_from_the_arguments() -> None:
    shared = nn.Linear(DIM, DIM)

    def of(**options: Any) -> dict[str, families.ParameterFamily]:
        return foldpar.parameter_families(layer(ONE, shared=copy.deepcopy(shared), **options), ONE)

    plain = of()
    assert plain["router.weight"] is families.ROUTER_OWN_TOKENS
    assert plain["experts.down_proj"] is families.ROUTED_EXPERT
    assert plain["shared.weight"] is families.REPLICATED
    assert of(partition="assignments")["router.weight"] is families.ROUTER_ALL_TOKENS
    assert of(partition="assignments", lane_grads="partial")["router.weight"] is families.ROUTER_OWN_TOKENS
    assert of(lane_grads="partial")["shared.weight"] is families.REPLICATED_PARTIAL
    assert of(lanes="sharded")["shared.weight"] is families.REPLICATED_PARTIAL


def explained() -> str:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2, etp=2)) as groups:
        return layer(groups).explain()


def test_explain_says_which_path_and_which_reduction() -> None:
    text = run_ranks(explained, 4)[1]
    assert "FoldedMoE on rank 1: tp=2 ep=2 etp=2 edp=1" in text
    assert "a lane takes 1/2 of the tokens" in text
    assert "then shared inside the ETP group" in text
    assert "router     router_own_tokens: SUM over tp" in text
    assert "experts    routed_expert: left as it is" in text


class Added(nn.Module):
    """Shared experts of two kinds of parameters: cut over the lanes, and whole on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 8, dtype=torch.float64), nn.Linear(8, DIM, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def explained_and_decided(lane_grads: str) -> tuple[str, dict[str, str]]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        experts = foldpar.GroupedExperts(EXPERTS, DIM, 8, groups, bias=True, seed=0)
        router = foldpar.TopKRouter(DIM, EXPERTS, TOP_K)
        moe = foldpar.FoldedMoE(router, experts, groups, shared=Added(), lane_grads=lane_grads)
        assert moe.shared is not None
        tp = groups.mesh("dense")["tp"]
        parallelize_module(moe.shared, tp, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        foldpar.mark_parameters(moe.router, families.ROUTER_ALL_TOKENS)  # a user's own word wins
        decided = {name: family.name for name, family in foldpar.parameter_families(moe, groups).items()}
        return moe.explain(), decided


@pytest.mark.parametrize("lane_grads", ["replicated", "post-hoc"])
def test_explain_names_the_families_that_decide(lane_grads: str) -> None:
    text, decided = run_ranks(explained_and_decided, 4, lane_grads)[0]
    lines = [line for line in text.splitlines() if line.startswith(("  router ", "  experts ", "  shared "))]
    assert {line.split()[1].rstrip(":") for line in lines} == set(decided.values())
    for name, family in decided.items():
        part, own_name = name.split(".", 1)
        (line,) = [line for line in lines if line.split()[0] == part and line.split()[1].rstrip(":") == family]
        assert own_name in line or [each.split()[0] for each in lines].count(part) == 1
    assert "  shared     dense_sharded (up.weight, up.bias, down.weight): left as it is" in lines
    assert "  shared     replicated (down.bias): AVERAGE over tp" in lines
    assert "  router     router_all_tokens: AVERAGE over tp" in lines
    cancelled = [line for line in lines if "expert_bias_post_hoc" in line and line.endswith(", times 1/2")]
    assert bool(cancelled) == (lane_grads == "post-hoc")
    assert any("divided by tp = 2" in line for line in lines) == (lane_grads == "post-hoc")


def explained_with_a_stranger() -> str:
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
        moe = layer(groups)
        moe.experts.adapter = nn.Linear(DIM, 1)
        moe.own_scale = nn.Parameter(torch.ones(1))
        return moe.explain()


def test_explain_says_what_it_cannot_know_instead_of_failing() -> None:
    text = run_ranks(explained_with_a_stranger, 2, backend="threads")[0]
    assert "no family (adapter.weight): experts.adapter.weight is inside the experts experts" in text
    assert "own_scale  no family: no mark in this layer; one on a module around it decides" in text


# -- Wrong use --------------------------------------------------------------------------------------------------------


def test_wrong_use_is_refused_with_the_rule_and_the_numbers() -> None:
    moe = layer(ONE)
    with pytest.raises(ShapeError, match=r"FoldedMoE takes \[..., dim\] with dim = 4, and got \[2, 5\]"):
        moe(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"The input is torch.float32 and the experts are torch.float64"):
        moe(torch.zeros(2, DIM))
    with pytest.raises(ShapeError, match=r"The input is on meta and the experts on cpu"):
        moe(torch.zeros(2, DIM, dtype=torch.float64, device="meta"))
    with pytest.raises(GroupsError, match=r"The experts were made for other groups than this layer's"):
        foldpar.FoldedMoE(moe.router, moe.experts, foldpar.create_groups(foldpar.solve_layout(1)))
    with pytest.raises(ShapeError, match=r"The router knows 4 experts, but there are 8"):
        foldpar.FoldedMoE(foldpar.TopKRouter(DIM, 4, 2), moe.experts, ONE)
    with pytest.raises(ValueError, match=r"lanes is 'split'; choose one of 'replicated', 'sharded'"):
        layer(ONE, lanes="split")
    with pytest.raises(ValueError, match=r"lanes='sharded' means that every lane brings its own tokens"):
        layer(ONE, lanes="sharded", partition="assignments")
    with pytest.raises(ShapeError, match=r"top_k = 9 must be between 1 and num_experts = 8"):
        foldpar.TopKRouter(DIM, 8, 9)
    with pytest.raises(ValueError, match=r"score is 'tanh'; choose 'softmax' or 'sigmoid'"):
        foldpar.TopKRouter(DIM, 8, 2, score="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation is 'swish'; choose one of 'swiglu', 'geglu'"):
        foldpar.GroupedExperts(8, DIM, HIDDEN, ONE, activation="swish")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"then gate_up_proj must be \[8, 12, 4\] for 'swiglu', and is \[8, 6, 4\]"):
        foldpar.GroupedExperts.from_dense(torch.zeros(8, 6, 4), torch.zeros(8, 4, 6), ONE)


def indivisible() -> str:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2, etp=2)) as groups:
        with pytest.raises(ShapeError, match=r"etp = 2 does not divide hidden_dim = 9.* etp can be 1, 3 or 9"):
            foldpar.GroupedExperts(8, DIM, 9, groups)
        with pytest.raises(ShapeError) as refused:
            foldpar.GroupedExperts(7, DIM, HIDDEN, groups)
    return str(refused.value)


def test_degrees_that_do_not_divide() -> None:
    text = run_ranks(indivisible, 4)[0]
    assert "ep = 2 does not divide num_experts = 7. With num_experts = 7, ep can be 1 or 7." in text


def nan_weights() -> str:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        moe = layer(groups, check=True)
        x = torch.ones(4, DIM, dtype=torch.float64)
        moe(x)
        if groups.coordinate.dp == 1:
            x[0] = float("nan")
        with pytest.raises(ShapeError) as refused:
            moe(x)
        return str(refused.value)


def test_not_finite_routing_weights_raise_on_every_rank_when_checked() -> None:
    texts = run_ranks(nan_weights, 4)
    assert "Routing weights are not finite: 2 of 4 on this rank (2)" in texts[2]
    assert all("on another rank that this step meets" in texts[rank] for rank in (0, 1, 3))


def wrong_lane_gradient(lane_grads: str, consumer: str) -> str:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        moe = layer(groups, check=True, lane_grads=lane_grads)
        y = moe(torch.ones(4, DIM, dtype=torch.float64, requires_grad=True))
        loss = y.sum() if consumer == "same" else y[groups.tp.index :: 2].sum()
        try:
            loss.backward()
        except ReplicaError as error:
            return str(error)
        return ""


def test_an_arriving_gradient_that_is_not_what_was_declared_names_the_remedy() -> None:
    assert run_ranks(wrong_lane_gradient, 4, "replicated", "same") == [""] * 4
    assert run_ranks(wrong_lane_gradient, 4, "partial", "own") == [""] * 4
    for text in run_ranks(wrong_lane_gradient, 4, "replicated", "own"):
        assert "differs between the lanes" in text
        assert "foldpar.copy_to_group(x, groups.tp) before a hand-written column-sharded layer" in text
    for text in run_ranks(wrong_lane_gradient, 4, "partial", "same"):
        assert "is equal on the lanes" in text
        assert "Use lane_grads='replicated'" in text


def reused_children() -> tuple[str, ...]:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        one = layer(groups, partition="tokens")
        two = foldpar.FoldedMoE(one.router, one.experts, groups, partition="assignments")
        own = foldpar.mark_parameters(foldpar.TopKRouter(DIM, EXPERTS, TOP_K), families.REPLICATED_PARTIAL)
        three = foldpar.FoldedMoE(own, one.experts, groups, partition="assignments")
        return tuple(foldpar.parameter_families(moe, groups)["router.weight"].name for moe in (one, two, three))


def test_a_child_takes_no_mark_from_one_layer_into_another() -> None:
    assert run_ranks(reused_children, 4)[0] == ("router_own_tokens", "router_all_tokens", "replicated_partial")


def test_weights_of_a_wrong_shape_are_refused() -> None:
    moe = layer(ONE)

    class TooManyWeights(nn.Module):
        def forward(self, x: Tensor) -> foldpar.Routing:
            routing = moe.router(x)
            return foldpar.Routing(routing.ids, torch.cat([routing.weights, routing.weights], dim=1))

    wrong = foldpar.FoldedMoE(TooManyWeights(), moe.experts, ONE)
    with pytest.raises(ShapeError, match=r"Routing weights must be \[tokens, top_k\] = \[3, 2\], and are \[3, 4\]"):
        wrong(torch.zeros(3, DIM, dtype=torch.float64))


def nothing_takes_bits_for_numbers() -> None:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        moe = layer(groups).bfloat16()
        x = torch.linspace(-3, 3, 64 * DIM).view(64, DIM).bfloat16().requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
            with torch.autograd.detect_anomaly(check_nan=False):  # torch looks for NaN in no DTensor
                moe(x).sum().backward()


def test_anomaly_detection_finds_nothing_in_a_sound_layer() -> None:
    run_ranks(nothing_takes_bits_for_numbers, 2)  # on processes: the mode belongs to a process, not to a thread
