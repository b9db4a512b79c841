"""``check_against_one_process`` on layers and consumers that a user may have, and how it says what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from folded_model import Case, check
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from toys import name_of

import foldpar
from foldpar import FoldedGroups, FoldedLayout, LayoutError, families, mark_parameters, solve_layout
from foldpar.testing import (
    MaskedRouting,
    ParityFailed,
    ParityReport,
    RanksFailed,
    check_against_one_process,
    layouts,
    multi_rank,
    routings,
    run_ranks,
)
from foldpar.testing.mistakes import explain_ratio
from foldpar.testing.report import compare

DIM = 8
REPEATABLE = settings(max_examples=30, derandomize=True, database=None, deadline=None)
SEARCH = settings(REPEATABLE, max_examples=2000)


# -- A user's own layer -----------------------------------------------------------------------------------------------


class OwnMoE(nn.Module):
    """Experts by name, as many model files have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 4, bias=False)
        layers = [(nn.Linear(DIM, 6, bias=False), nn.ReLU(), nn.Linear(6, DIM, bias=False)) for _ in range(4)]
        self.experts = nn.ModuleList(nn.Sequential(*expert) for expert in layers)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = (ids == number).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(x[token]) * weights[token, choice, None])
        return y


def fold_own(own: OwnMoE, groups: FoldedGroups, **options: Any) -> foldpar.FoldedMoE:
    router = foldpar.TopKRouter(DIM, 4, 2, renormalize=False)
    router.weight = own.gate.weight
    up, down = (torch.stack([expert[place].weight for expert in own.experts]) for place in (0, 2))
    return foldpar.FoldedMoE.from_dense(router, up, down, groups, activation="relu", **options)


def stacked(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name == "router.weight":
        return tensors["gate.weight"]
    place = {"experts.gate_up_proj": 0, "experts.down_proj": 2}[name]
    return torch.stack([tensors[f"experts.{expert}.{place}.weight"] for expert in range(4)])


def ragged(data_rank: int) -> Tensor:
    return torch.randn(3 + data_rank, DIM)


@pytest.mark.parametrize(
    ("options", "check_options"),
    [
        ({}, {}),
        ({"partition": "assignments"}, {"losses": "sum"}),
        ({"lane_grads": "partial"}, {"lane_grads": "partial"}),
        ({"lane_grads": "post-hoc"}, {"lane_grads": "post-hoc"}),
        ({"lanes": "sharded"}, {"lanes": "sharded"}),
        ({"lanes": "sharded"}, {"lanes": "sharded", "lane_rows": lambda rows: (rows, 0)}),
    ],
    ids=name_of,
)
def test_an_own_layer_in_a_few_lines(options: dict[str, Any], check_options: dict[str, Any]) -> None:
    report = check_against_one_process(
        OwnMoE,
        partial(fold_own, **options),
        solve_layout(4, tp=2, ep=2, etp=2),
        batch=ragged,
        whole=stacked,
        **check_options,
    )
    report.raise_if(1e-12)
    kinds = {(each.kind, each.name) for each in report.comparisons}
    assert {("output", "all"), ("input gradient", "all"), ("gradient norm", "all")} <= kinds
    for kind in ("parameter", "raw gradient", "gradient"):
        assert {name for found, name in kinds if found == kind} == {"router.weight", "experts.gate_up_proj",
                                                                   "experts.down_proj"}  # fmt: skip


@pytest.mark.long
def test_spawned_ranks_and_those_of_torchrun_find_the_same() -> None:
    layout = solve_layout(2, tp=2, ep=2)
    arguments = OwnMoE, fold_own, layout
    threads = check_against_one_process(*arguments, batch=ragged, whole=stacked)
    spawned = check_against_one_process(*arguments, batch=ragged, whole=stacked, backend="spawned")
    for report in (spawned, *run_ranks(on_a_rank_of_torchrun, 2, layout)):
        assert report.ok(1e-12)
        assert [each.name for each in report.comparisons] == [each.name for each in threads.comparisons]


def on_a_rank_of_torchrun(layout: FoldedLayout) -> ParityReport:
    return check_against_one_process(OwnMoE, fold_own, layout, batch=ragged, whole=stacked, backend="torchrun")


def test_one_rank_needs_no_process_group() -> None:
    options = {"batch": ragged, "whole": stacked}
    assert check_against_one_process(OwnMoE, fold_own, solve_layout(1), backend="torchrun", **options).ok()
    assert not dist.is_initialized()


def test_one_rank_of_torchrun_with_another_layout_is_refused() -> None:
    with pytest.raises(foldpar.FoldingError, match="needs that many processes"):
        on_a_rank_of_torchrun(solve_layout(4, tp=2, ep=4))


# -- A user's own dense layers, sharded by torch ----------------------------------------------------------------------


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 12), nn.Linear(12, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def shard(module: FeedForward, groups: FoldedGroups, *, converts_again: bool = False) -> FeedForward:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(module, groups.mesh("dense")["tp"], plan)
    if converts_again:
        module.norm.register_forward_hook(lambda norm, args, y: foldpar.copy_to_group(y, groups.tp))
    return mark_parameters(module, families.REPLICATED)


def test_dtensor_placements_are_understood() -> None:
    report = check_against_one_process(FeedForward, shard, solve_layout(4, tp=2), batch=ragged)
    report.raise_if(1e-12)
    assert set(report.families) == {"replicated", "dense_sharded"}


def test_a_gradient_converted_twice_is_called_so() -> None:
    layout = solve_layout(6, tp=3, ep=6)
    report = check_against_one_process(FeedForward, partial(shard, converts_again=True), layout, batch=ragged)
    wrong = {each.name: each.looks_like for each in report.wrong() if each.kind == "raw gradient"}
    assert set(wrong) == {"norm.weight", "norm.bias"}
    assert all(text.startswith("3 = tp: summed over lanes that each hold the whole.") for text in wrong.values())
    assert "A gradient converted twice (copy_to_group before a layer that has it built in" in str(report)
    after = [each.looks_like for each in report.wrong() if each.kind == "gradient"]
    assert after == ["wrong before reduction already"] * 2
    assert report.families["dense_sharded"] < 1e-12 < 1 < report.families["replicated"]


class Columns(nn.Linear):
    """Gives back its lane's columns, and needs no conversion since there is nothing below."""


def take_columns(whole: nn.Linear, groups: FoldedGroups) -> nn.Linear:
    own = nn.Linear(DIM, 6 // groups.tp.size, bias=False)
    own.weight = nn.Parameter(whole.weight.detach().chunk(groups.tp.size)[groups.tp.index].clone())
    own.register_forward_pre_hook(lambda module, args: foldpar.copy_to_group(args[0], groups.tp))
    return mark_parameters(own, families.DENSE_SHARDED)


def test_an_own_consumer_and_an_own_share() -> None:
    """A head whose output is a slice: the loss adds up over the lanes, and share says which columns a rank has."""

    def loss(module: nn.Module, y: Tensor, batch: Any) -> Tensor:
        return (y.tanh().sum(1) * batch[1]).sum()

    def on_a_lane(module: nn.Module, y: Tensor, batch: Any, groups: FoldedGroups) -> Tensor:
        return foldpar.all_reduce((y.tanh().sum(1) * batch[1]).sum(), groups.tp, backward="identity")

    def columns(name: str, whole: Tensor, groups: FoldedGroups) -> Tensor | None:
        return whole.chunk(groups.tp.size, dim=1)[groups.tp.index] if name == "output" else None

    options: dict[str, Any] = {
        "reference": lambda: nn.Linear(DIM, 6, bias=False),
        "folded": take_columns,
        "layout": solve_layout(6, tp=3),
        "batch": lambda data_rank: (ragged(data_rank), torch.arange(3.0 + data_rank)),
        "loss": loss,
        "folded_loss": on_a_lane,
    }
    check_against_one_process(**options, share=columns).raise_if(1e-12)
    with pytest.raises(
        RanksFailed, match=r"The output is \[3, 2\] on this rank, but its share .* is \[3, 6\].*'output'"
    ):
        check_against_one_process(**options)


def test_integers_have_no_gradient_and_micro_batches_add_up() -> None:
    report = check_against_one_process(
        lambda: nn.Embedding(5, DIM),
        lambda whole, groups: mark_parameters(whole, families.REPLICATED),
        solve_layout(4, tp=2),
        batch=lambda data_rank: [torch.arange(4) + data_rank % 2, torch.arange(data_rank)],
    )
    report.raise_if(1e-12)
    kinds = [each.kind for each in report.comparisons]
    assert kinds == ["parameter", "output", "output", "raw gradient", "gradient", "gradient norm"]


def test_another_reduction_can_be_checked() -> None:
    """What forgets to divide, on three data ranks."""
    layout = solve_layout(3, ep=3)

    def reduce(module: nn.Module, groups: FoldedGroups) -> None:
        foldpar.reduce_gradients(module, groups, loss="sum")

    report = check_against_one_process(
        lambda: nn.Linear(DIM, DIM), lambda whole, groups: whole, layout, batch=ragged, reduce=reduce
    )
    first = report.wrong()[0]
    assert (first.kind, first.name) == ("gradient", "weight")
    assert first.ratio == pytest.approx(3)
    assert first.looks_like.startswith("3 = dp*cp = ep: not divided by dp*cp although the losses are means")


# -- What it refuses --------------------------------------------------------------------------------------------------


def test_a_pipeline_is_checked_stage_by_stage() -> None:
    with pytest.raises(LayoutError, match=r"pp = 2: stages hold different layers.*a layout of world = 2"):
        check_against_one_process(OwnMoE, fold_own, solve_layout(4, pp=2, tp=2), batch=ragged)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"losses": "max"}, r"losses is 'max'; choose one of 'mean', 'sum'\."),
        ({"lanes": "split"}, r"lanes is 'split'; choose one of 'replicated', 'sharded'\."),
        ({"lane_grads": "whole"}, r"lane_grads is 'whole'; choose one of 'replicated', 'partial', 'post-hoc'\."),
        (
            {"lanes": "sharded", "lane_grads": "partial"},
            r"every lane gets the gradients of its own rows, so lane_grads",
        ),
        ({"lane_rows": lambda rows: (rows, 0)}, r"with lanes='replicated' every lane has all"),
        ({"batch": lambda data_rank: [ragged(0)] * (data_rank + 1)}, r"The data ranks have 1, 2 micro-batches\. Every"),
        ({"backend": "nccl"}, r"backend = 'nccl' is unknown"),
    ],
    ids=name_of,
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"batch": ragged, "whole": stacked, **options}
    with pytest.raises(ValueError, match=says):
        check_against_one_process(OwnMoE, fold_own, solve_layout(4, tp=2, ep=2), **arguments)


def refused(**options: Any) -> str:
    arguments: dict[str, Any] = {"batch": ragged, "whole": stacked, **options}
    with pytest.raises(RanksFailed) as caught:
        check_against_one_process(OwnMoE, fold_own, solve_layout(2, tp=2, ep=2), **arguments)
    assert caught.value.failures[0].cause == "raised"
    return caught.value.failures[0].error


def test_what_has_no_counterpart_is_named() -> None:
    text = refused(whole=None)
    assert "The folded module has a parameter 'router.weight' that the reference has not; it has gate.weight, " in text
    assert "Say what it is a share of with whole(name, tensors of the reference)" in text


def test_what_would_go_unchecked_is_named() -> None:
    text = refused(whole=lambda name, tensors: tensors["gate.weight"])
    assert "that no parameter of the folded module is a share of: experts.0.0.weight, experts.0.2.weight" in text


def test_rows_of_lanes_must_add_up() -> None:
    text = refused(lanes="sharded", lane_rows=lambda rows: (rows, 1))
    assert "lane_rows(3) = (3, 1) must hold one count for each of the 2 lane(s), and they must add up to 3." in text


def test_a_share_of_another_shape_is_named() -> None:
    text = refused(share=lambda name, whole, groups: whole[:1] if name == "router.weight" else None)
    assert (
        "The parameter of router.weight is [4, 8] on this rank, but its share of one process' tensor is [1, 8]" in text
    )


# -- The report -------------------------------------------------------------------------------------------------------

LAYOUT = solve_layout(210, tp=2, ep=3, etp=5)  # edp = 14, dp = 105: every degree is another number


def compared(got: list[Tensor], want: list[Tensor], kind: Any = "gradient", layout: FoldedLayout = LAYOUT) -> Any:
    return compare(kind, "w", "family", list(zip(got, want, strict=True)), layout, largest=1.0)


def random_per_rank(layout: FoldedLayout = LAYOUT) -> list[Tensor]:
    return list(torch.randn(layout.world, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("kind", "ratio", "says"),
    [
        ("raw gradient", 2, "2 = tp: summed over lanes that each hold the whole"),
        ("raw gradient", 0.5, "0.5 = 1/tp: a lane's part taken for the whole"),
        ("raw gradient", 4, "4 = tp**2: summed twice over lanes that each hold the whole"),
        ("input gradient", 3, "3 = ep: counted once per EP rank"),
        ("input gradient", 1 / 5, "0.2 = 1/etp: one slice of an expert for all of them"),
        ("gradient", 2, "2 = tp: SUM over lanes that each hold the whole"),
        ("gradient", 0.5, "0.5 = 1/tp: AVERAGE over lanes that each hold a part"),
        ("gradient", 7.5, "7.5 = (dp*cp)/edp: an expert's gradient averaged over edp"),
        ("gradient", 2 / 15, "0.1333 = edp/(dp*cp): an expert's gradient reduced twice"),
        ("gradient", 105, "105 = dp*cp: not divided by dp*cp"),
        ("gradient", 1 / 105, "0.009524 = 1/(dp*cp): divided by dp*cp twice"),
        ("gradient", 1 / 14, "0.07143 = 1/edp: an expert's gradient averaged over edp, and divided by dp*cp as well"),
        ("gradient", 1 / 3, "0.3333 = 1/ep: divided by ep"),
        ("gradient norm", 14**0.5, "3.742 = sqrt(edp): squares counted once per rank of replicas"),
        ("output", 0.5, "0.5 = 1/tp: a lane's part taken for the whole, or averaged over lanes"),
        ("output", 0, "0: nothing arrived"),
        ("raw gradient", -1, "-1: the sign is wrong"),
        ("gradient", 7.25, "7.25 times what it should be, on every rank"),
    ],
)
def test_a_ratio_is_read_as_a_mistake(kind: Any, ratio: float, says: str) -> None:
    want = random_per_rank()
    found = compared([tensor * ratio for tensor in want], want, kind)
    assert found.ratio == pytest.approx(ratio)
    assert found.difference == pytest.approx(abs(ratio - 1))
    assert found.looks_like.startswith(says), found.looks_like


def test_degrees_of_one_number_are_all_named() -> None:
    text = explain_ratio(2, solve_layout(4, tp=2, ep=2), "raw gradient")
    assert text.startswith("2 = tp = ep = dp*cp = edp: summed over lanes")
    assert "; or counted once per EP rank" in text


def test_twice_is_read_where_no_degree_is_two() -> None:
    layout = solve_layout(3, tp=3, ep=3)
    assert explain_ratio(2, layout, "raw gradient").startswith("2: counted twice (a second backward")
    assert explain_ratio(2, layout, "output") == ""
    assert explain_ratio(1, layout) == ""


def test_context_ranks_forgotten() -> None:
    layout = solve_layout(12, cp=3, tp=2, ep=2)
    assert explain_ratio(3, layout, "gradient").startswith("3 = cp: divided by dp alone: context ranks are data ranks")


def test_parts_are_recognised_by_their_sum() -> None:
    """Every lane has a part; what each should have is the sum."""
    got = random_per_rank()
    want = [sum(got[other] for other in LAYOUT.group("tp", rank)) for rank in range(LAYOUT.world)]
    assert compared(got, want).looks_like == "ranks of tp hold parts, and the sum is right: a SUM is missing"
    mean = [tensor / 2 for tensor in want]
    assert compared(got, mean).looks_like == "ranks of tp hold parts, and their mean is right"
    thirds = [tensor / 3 for tensor in want]
    assert compared(got, thirds).looks_like == "ranks of tp hold parts, and their sum is 3 times what it should be"


def test_exchanged_shares_are_recognised() -> None:
    want = random_per_rank()
    got = [want[rank ^ 1] if rank < 4 else want[rank] for rank in range(LAYOUT.world)]
    assert compared(got, want).looks_like == (
        "ranks hold each other's shares (rank 0 that of rank 1, rank 1 that of rank 0, rank 2 that of rank 3, rank 3 "
        "that of rank 2): a coordinate taken for another number"
    )


def test_some_wrong_ranks_are_named() -> None:
    want = random_per_rank()
    got = [tensor if rank not in (3, 7) else tensor.flip(0) for rank, tensor in enumerate(want)]
    assert compared(got, want).looks_like == "wrong on rank 3, 7 and right on the others"


def test_rounding_in_a_narrower_dtype_is_recognised() -> None:
    want = random_per_rank()
    assert "as large as float32 rounds" in compared([tensor.float().double() for tensor in want], want).looks_like
    assert compared(want, want).looks_like == ""


def test_a_value_that_is_zero_but_for_rounding_is_measured_by_its_peers() -> None:
    noise = [torch.full((5,), 1e-16, dtype=torch.float64)] * LAYOUT.world
    zero = [torch.zeros(5, dtype=torch.float64)] * LAYOUT.world
    for got, want in ((zero, noise), (noise, zero), (zero, zero)):
        assert compared(got, want).difference < 1e-14
    assert compared([tensor + 1e-9 for tensor in zero], noise).difference > 1e-11


def test_not_a_number_is_the_worst_of_all() -> None:
    want = random_per_rank()
    bad = compared([tensor * float("nan") for tensor in want], want)
    report = ParityReport(LAYOUT, (compared([tensor * 9 for tensor in want], want), bad))
    assert report.worst is bad
    assert not report.ok(1e300)
    assert bad.looks_like == "not a number"


def test_a_report_reads_from_top_to_bottom() -> None:
    want = random_per_rank()
    good, doubled = compared(want, want, "output"), compared([tensor * 2 for tensor in want], want)
    report = ParityReport(LAYOUT, (good, doubled))
    assert report.families == {"family": pytest.approx(1)}
    assert report.select("output").ok()
    report.select("output").raise_if(1e-11)
    assert "2 comparisons, 1 differ by more than 1e-11" in str(report)
    assert "gradient  family  1        1\n" in str(report)
    assert "gradient of w (family) differs by 1: 2 = tp: SUM over lanes" in str(report)
    assert "1 comparisons, the largest difference is 0 (output of w)" in str(report.select("output"))
    with pytest.raises(ParityFailed, match="2 = tp: SUM over lanes"):
        report.raise_if(0.5)
    report.raise_if(1.5)
    with pytest.raises(
        ValueError, match=r"Nothing of the kind 'parameter' was compared; there is 'output', 'gradient'"
    ):
        report.select("parameter")


def test_a_long_report_is_cut() -> None:
    want = random_per_rank()
    report = ParityReport(LAYOUT, (compared([tensor * 2 for tensor in want], want),) * 11)
    assert str(report).count("differs by 1: ") == 8
    assert str(report).endswith("\nand 3 more")


# -- Tests on many ranks ----------------------------------------------------------------------------------------------


@multi_rank(3)
def test_runs_on_spawned_ranks() -> None:
    assert dist.get_world_size() == 3


@pytest.mark.parametrize(
    "layout", [solve_layout(2, tp=2), solve_layout(4, tp=2, ep=4)], ids=lambda layout: layout.world
)
@multi_rank(backend="threads")
def test_takes_its_world_from_a_layout(layout: FoldedLayout) -> None:
    with foldpar.create_groups(layout) as groups:
        assert groups.layout.world == dist.get_world_size()


@pytest.fixture
def number() -> int:
    return 7


@pytest.mark.parametrize("offset", [1])
@multi_rank(2)
def test_parameters_and_fixtures_reach_the_ranks(number: int, offset: int) -> None:
    assert dist.is_initialized()
    assert number + offset == 8


@multi_rank(2)
def fails_on_rank_one() -> None:
    assert dist.get_rank() == 0, "this rank is one"


@multi_rank(2, backend="threads")
def leaves_a_group() -> None:
    dist.new_group([0, 1])


def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)fails_on_rank_one: 1 of 2 ranks failed.*this rank is one"):
        fails_on_rank_one()
    with pytest.raises(RanksFailed, match="the function left process groups behind"):
        leaves_a_group()


def test_a_world_must_come_from_somewhere() -> None:
    with pytest.raises(TypeError, match=r"takes the world from the argument 'layout', and test_one_rank\S+ has none"):
        multi_rank()(test_one_rank_needs_no_process_group)
    with pytest.raises(TypeError, match=r"The argument 'layout' of a multi_rank\(\) test is 3, not a FoldedLayout"):
        multi_rank()(lambda layout: None)(3)


def test_threads_put_the_excepthook_back() -> None:
    before = sys.excepthook
    run_ranks(dist.get_rank, 2, backend="threads")
    assert sys.excepthook is before


# -- Routings with masks ----------------------------------------------------------------------------------------------


@REPEATABLE
@given(st.integers(0, 6), st.data())
def test_masked_routings_have_a_mask_of_their_shape(num_tokens: int, data: st.DataObject) -> None:
    routing = data.draw(routings(num_tokens, 4, 2, masked=True))
    assert isinstance(routing, MaskedRouting)
    assert [len(row) for row in routing.mask] == [len(row) for row in routing.ids] == [2] * num_tokens


@pytest.mark.parametrize(
    "wanted",
    [
        lambda routing: all(map(all, routing.mask)),
        lambda routing: not any(map(any, routing.mask)),
        lambda routing: routing.mask == [[True, True]] * 3 + [[False, False]] * 2,
        lambda routing: routing.mask[0] == [False, True] and routing.mask[4] == [True, False],
    ],
    ids=["all", "none", "padding", "anywhere"],
)
def test_masks_of_every_kind_are_drawn(wanted: Any) -> None:
    find(routings(5, 4, 2, masked=True), wanted, settings=SEARCH)


def test_a_capacity_keeps_the_first_of_each_expert() -> None:
    def over_capacity(routing: MaskedRouting) -> bool:
        return routing.ids == [[0, 1]] * 4 and routing.mask == [[True, True]] * 2 + [[False, False]] * 2

    routing = find(routings(4, 4, 2, balances=["one"], masked=True), over_capacity, settings=SEARCH)
    assert routing.mask[:2] == [[True, True]] * 2


def dispatch_masked(routing: MaskedRouting, layout: FoldedLayout) -> None:
    """Experts that multiply by their number: what counts is added up, and the rest leaves no trace."""
    with foldpar.create_groups(layout) as groups:
        ids = torch.tensor(routing.ids, dtype=torch.int64).view(-1, 2)
        mask = torch.tensor(routing.mask, dtype=torch.bool).view(-1, 2)
        x = torch.ones(len(ids), 1, dtype=torch.float64, requires_grad=True)
        weights = torch.ones(ids.shape, dtype=torch.float64, requires_grad=True)
        experts = 4 * layout.ep
        plan = foldpar.plan_dispatch(ids, groups, num_experts=experts, mask=mask)
        first = 4.0 * groups.ep.index
        number = torch.repeat_interleave(torch.arange(first, first + 4, dtype=torch.float64), plan.rows_per_expert)
        y = foldpar.combine(foldpar.dispatch(x, plan) * number[:, None] / layout.etp, weights, plan)
        want = (ids * mask).sum(1, keepdim=True).to(y)
        torch.testing.assert_close(y, want)
        y.sum().backward()
        torch.testing.assert_close(x.grad, want)
        assert not weights.grad[~mask].any()


@REPEATABLE
@given(st.integers(0, 5).flatmap(lambda tokens: routings(tokens, 4, 2, masked=True)), layouts(4, pp=1))
def test_masked_assignments_leave_no_trace(routing: MaskedRouting, layout: FoldedLayout) -> None:
    run_ranks(dispatch_masked, layout.world, routing, layout, backend="threads")


# -- A failing layer shrinks ------------------------------------------------------------------------------------------


def test_a_failing_check_shrinks_to_the_smallest_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldpar.moe.lanes, "ROUTER_OWN_TOKENS", families.ROUTER_ALL_TOKENS)

    def fails(layout: FoldedLayout) -> bool:
        return not check(Case(layout, ((3,),) * (layout.dp * layout.cp))).ok()

    assert find(layouts(4, pp=1), fails, settings=SEARCH) == FoldedLayout(2, tp=2)
