"""The suite can fail: faults put into the library, one at a time, and the shipped check (or a law) finds each.

Attributes of modules are shared by rank threads, so a patch here is a patch on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from folded_model import DIM, Case, check
from torch import Tensor

import foldpar.comm.collectives
import foldpar.gradients.buckets
import foldpar.gradients.norms
import foldpar.gradients.reduce
import foldpar.moe.experts
import foldpar.moe.kernels.permutation
import foldpar.moe.lane_ends
import foldpar.moe.routing.losses
import foldpar.moe.transport.journey
import foldpar.moe.transport.messages
from foldpar import FoldedGroups, ParameterFamily, Reduction, families, solve_layout
from foldpar.factors import gradient_factor, loss_factor
from foldpar.testing import ParityFailed, run_ranks

Patch = Callable[[pytest.MonkeyPatch], None]

# Degrees that differ as far as 8 ranks allow; batches of several micro-batches, ragged.
FOLDED = Case(solve_layout(8, tp=2, ep=4), ((3, 4), (5, 2), (2, 6), (4, 1)), top_k=3, shared="replicated")
ASSIGNMENTS = replace(FOLDED, partition="assignments")
PARTIAL = replace(FOLDED, lane_grads="partial", consumer="columns")
SHARDED = replace(FOLDED, lanes="sharded", consumer="own rows")
POST_HOC = replace(FOLDED, lane_grads="post-hoc")
SLICED = Case(solve_layout(8, tp=2, ep=2, etp=2), ((3, 4), (5, 2), (2, 6), (4, 1)), top_k=3, bias=True)
EVEN = Case(solve_layout(4, tp=2, etp=4), ((4,), (4,)), experts=2, hidden=4, top_k=2)
CONTEXT = Case(solve_layout(8, tp=2, ep=2, cp=2), ((3, 4), (5, 2), (2, 6), (4, 1)))
EXPERTS_APART = Case(solve_layout(12, tp=2, ep=3), tuple((rows,) for rows in (3, 4, 5, 2, 6, 1)), experts=6)
UNSORTED = Case(solve_layout(4, tp=2, ep=4), ((3,), (5,)), experts=4)
CASES = (UNSORTED, FOLDED, ASSIGNMENTS, PARTIAL, SHARDED, POST_HOC, SLICED, EVEN, CONTEXT, EXPERTS_APART)


@dataclass(frozen=True)
class Fault:
    """A patch, where it shows, and what the report then says."""

    name: str
    patch: Patch
    case: Case
    first: str
    """The kind of the first tensor that is wrong."""
    says: str = ""


FAULTS: list[Fault] = []


def fault(name: str, case: Case, first: str, says: str = "") -> Callable[[Patch], Patch]:
    def add(patch: Patch) -> Patch:
        FAULTS.append(Fault(name, patch, case, first, says))
        return patch

    return add


def always(function: Callable[..., Any], **forced: Any) -> Callable[..., Any]:
    """The function with some keywords forced, whatever it is called with."""
    return lambda *args, **kwargs: function(*args, **{**kwargs, **forced})


# -- The ends of the layer --------------------------------------------------------------------------------------------


@fault("the exit sums equal copies: a factor tp that nothing cancels", FOLDED, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.lane_ends, "all_gather_rows", always(foldpar.all_gather_rows, backward="reduce_scatter"))


@fault("the exit slices gradients that are partial", PARTIAL, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.lane_ends, "all_gather_rows", always(foldpar.all_gather_rows, backward="slice"))


@fault("the exit of assignments sums equal copies", ASSIGNMENTS, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.lane_ends, "all_reduce", always(foldpar.all_reduce, backward="sum"))


@fault("the enter hands on a lane's part", ASSIGNMENTS, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.lane_ends, "copy_to_group", lambda x, group: x)


@fault("the weights bypass the enter", ASSIGNMENTS, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    enter = foldpar.copy_to_group
    patch.setattr(foldpar.moe.lane_ends, "copy_to_group", lambda x, group: enter(x, group) if x.shape[-1] == DIM else x)


@fault("own rows are padded with zeros where gradients are replicated", FOLDED, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.lane_ends, "split_rows", always(foldpar.split_rows, backward="zero_pad"))


@fault("a gradient is converted twice", ASSIGNMENTS, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    enter = foldpar.copy_to_group
    patch.setattr(foldpar.moe.lane_ends, "copy_to_group", lambda x, group: enter(enter(x, group), group))


@fault("a lane takes another lane's slice", EVEN, "output")
def _(patch: pytest.MonkeyPatch) -> None:
    def of_the_next_lane(x: Tensor, counts: tuple[int, ...], group: foldpar.AxisGroup) -> Tensor:
        place = (group.index + 1) % group.size
        return x[sum(counts[:place]) :][: counts[place]]

    patch.setattr(foldpar.comm.collectives, "_own_slice", of_the_next_lane)


# -- The way to the experts -------------------------------------------------------------------------------------------


@fault("chunks of a group are read in the order of its ranks, not of its coordinates", EVEN, "output")
def _(patch: pytest.MonkeyPatch) -> None:
    gather = foldpar.comm.collectives._gathered

    def by_rank(tensor: Tensor, shape: Any, group: foldpar.AxisGroup) -> Tensor:
        chunks = gather(tensor, shape, group).unflatten(0, (group.size, -1))
        return chunks[[group.ranks.index(rank) for rank in sorted(group.ranks)]].view(shape)

    patch.setattr(foldpar.comm.collectives, "_gathered", by_rank)


@fault("experts are those of the rank in the process group", UNSORTED, "parameter", "each other's shares")
def _(patch: pytest.MonkeyPatch) -> None:
    make = foldpar.GroupedExperts.__init__

    def misplaced(self: foldpar.GroupedExperts, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        ep = self.groups.ep
        self.first_expert = sorted(ep.ranks).index(ep.ranks[ep.index]) * self.local_experts

    patch.setattr(foldpar.GroupedExperts, "__init__", misplaced)


@fault("a dropped assignment is computed", replace(FOLDED, masked=True), "output")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.transport.journey, "plan_dispatch", always(foldpar.plan_dispatch, mask=None))


@fault("a stale plan", replace(FOLDED, tokens=((4, 4),) * 4), "output")
def _(patch: pytest.MonkeyPatch) -> None:
    plans: dict[int, Any] = {}

    def plan_once(ids: Tensor, groups: FoldedGroups, **options: Any) -> Any:
        if groups.rank not in plans:
            plans[groups.rank] = foldpar.plan_dispatch(ids, groups, **options)
        return plans[groups.rank]

    patch.setattr(foldpar.moe.transport.journey, "plan_dispatch", plan_once)


@fault("weights are applied twice", FOLDED, "output")
def _(patch: pytest.MonkeyPatch) -> None:
    route = foldpar.TopKRouter.forward

    def squared(self: foldpar.TopKRouter, x: Tensor, **options: Any) -> foldpar.Routing:
        routing = route(self, x, **options)
        return replace(routing, weights=routing.weights.square())

    patch.setattr(foldpar.TopKRouter, "forward", squared)


@fault("of a row's copies only one hands back its gradient", SLICED, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    def of_the_last(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        return foldpar.moe.kernels.permutation.sum_copies(grad, copies.amax(dim=1, keepdim=True)), None, None

    patch.setattr(foldpar.moe.kernels.permutation._Spread, "backward", staticmethod(of_the_last))


# -- Slices of experts ------------------------------------------------------------------------------------------------


@fault("partial sums over etp are not reduced", SLICED, "output")
def _(patch: pytest.MonkeyPatch) -> None:
    def own(x: Tensor, row_counts: tuple[int, ...], group: foldpar.AxisGroup) -> Tensor:
        return x.split(list(row_counts))[group.index]

    patch.setattr(foldpar.moe.transport.messages, "scatter_sum_rows", own)


@fault("gradients of rows are not summed over etp", SLICED, "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.transport.messages, "all_gather_rows", always(foldpar.all_gather_rows, backward="slice"))


@fault("gate and up of a slice belong to different units", replace(SLICED, hidden=4), "parameter")
def _(patch: pytest.MonkeyPatch) -> None:
    def contiguous(self: foldpar.GroupedExperts, weight: Tensor) -> Tensor:
        size = self.groups.etp.size
        return weight.chunk(size, dim=1)[self.groups.etp.index]

    patch.setattr(foldpar.GroupedExperts, "_gate_up_slice", contiguous)


@fault("the output bias is added once per etp rank", SLICED, "output")
def _(patch: pytest.MonkeyPatch) -> None:
    make = foldpar.moe.experts.grouped_feed_forward
    whole: dict[int, Tensor] = {}
    forward = foldpar.GroupedExperts.forward

    def remember(self: foldpar.GroupedExperts, *args: Any, **options: Any) -> Tensor:
        whole[torch.distributed.get_rank()] = self.down_bias.to_local()
        return forward(self, *args, **options)

    def everywhere(*args: Any, **options: Any) -> Tensor:
        return make(*args, **{**options, "down_bias": whole[torch.distributed.get_rank()]})

    patch.setattr(foldpar.GroupedExperts, "forward", remember)
    patch.setattr(foldpar.moe.experts, "grouped_feed_forward", everywhere)


@fault("an output bias is averaged over etp", SLICED, "raw gradient", "ranks of etp hold parts, and the sum is right")
def _(patch: pytest.MonkeyPatch) -> None:
    averaged = replace(families.EXPERT_BIAS, reduction=Reduction.AVERAGE)
    patch.setattr(foldpar.moe.experts, "EXPERT_BIAS", averaged)
    patch.setattr(foldpar.comm.dtensors, "_of_gradient", lambda spec, partial_over: spec)


# -- Reduction --------------------------------------------------------------------------------------------------------


@fault("AVERAGE for SUM", FOLDED, "raw gradient", "ranks of tp hold parts, and the sum is right: a SUM is missing")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.lanes, "ROUTER_OWN_TOKENS", families.ROUTER_ALL_TOKENS)


@fault("SUM for AVERAGE", ASSIGNMENTS, "raw gradient", "2 = tp")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.lanes, "ROUTER_ALL_TOKENS", families.ROUTER_OWN_TOKENS)


def with_factor(patch: pytest.MonkeyPatch, wrong: Callable[[ParameterFamily, Any, str], Fraction]) -> None:
    patch.setattr(foldpar.gradients.buckets, "gradient_factor", wrong)


@fault("the factor of an average is forgotten", FOLDED, "gradient", "2 = tp")
def _(patch: pytest.MonkeyPatch) -> None:
    with_factor(patch, lambda family, layout, loss: loss_factor(layout, loss) * family.factor)


@fault("the factor tp of post-hoc experts is not cancelled", POST_HOC, "gradient", "2 = tp")
def _(patch: pytest.MonkeyPatch) -> None:
    def uncancelled(family: ParameterFamily, layout: Any, loss: Any) -> Fraction:
        skip = replace(family, reduction=Reduction.SKIP)
        return gradient_factor(skip if family.reduction is Reduction.EXPERT_TP_CANCEL else family, layout, loss)

    with_factor(patch, uncancelled)


@fault("experts are averaged over edp", EXPERTS_APART, "gradient", "1.5 = (dp*cp)/edp")
def _(patch: pytest.MonkeyPatch) -> None:
    def averaged(family: ParameterFamily, layout: Any, loss: Any) -> Fraction:
        return Fraction(1, layout.edp) if family.view == "expert" else gradient_factor(family, layout, loss)

    with_factor(patch, averaged)


@fault("context ranks are no data ranks", CONTEXT, "gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ParameterFamily, "data_axis", property(lambda family: "edp" if family.view == "expert" else "dp"))


@fault("experts are summed over dp_cp, which mixes different ones", FOLDED, "gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ParameterFamily, "data_axis", property(lambda family: "dp_cp"))


@fault("gradients are reduced twice", FOLDED, "gradient", "edp/(dp*cp)")
def _(patch: pytest.MonkeyPatch) -> None:
    once = foldpar.gradients.reduce._reduce_bucket

    def twice(pieces: list[Any]) -> None:
        once(pieces)
        once(pieces)

    patch.setattr(foldpar.gradients.reduce, "_reduce_bucket", twice)


@fault("a gradient is summed over the lanes but not over the data ranks", FOLDED, "gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    add = foldpar.comm.collectives.all_reduce_
    only_lanes = lambda tensor, group, *op: add(tensor, group, *op) if group.axis == "tp" else tensor  # noqa: E731
    patch.setattr(foldpar.gradients.reduce, "all_reduce_", only_lanes)


@fault("the norm counts replicas", FOLDED, "gradient norm")
def _(patch: pytest.MonkeyPatch) -> None:
    of_shards = foldpar.gradients.norms._shard_groups
    patch.setattr(
        foldpar.gradients.norms,
        "_shard_groups",
        lambda axes, groups, replicas: [*of_shards(axes, groups, replicas), groups.tp],
    )


@fault("the norm leaves out the experts of other ranks", FOLDED, "gradient norm")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.gradients.norms, "_shard_groups", lambda axes, groups, replicas: [])


# -- Auxiliary losses -------------------------------------------------------------------------------------------------


@fault("an auxiliary loss is a mean over own rows", replace(FOLDED, auxiliary="batch"), "input gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(foldpar.moe.layer.LaneState, "sum_counts", lambda self, counts, scope: counts)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout.world}-{case.partition}-{case.lane_grads}")
def test_without_a_fault_the_check_passes(case: Case) -> None:
    check(case).raise_if(1e-11)


def test_there_are_faults_of_every_kind() -> None:
    assert len(FAULTS) >= 14
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    seen = {fault.first for fault in FAULTS}
    assert seen == {"parameter", "output", "input gradient", "raw gradient", "gradient", "gradient norm"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_check_finds_every_fault(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.patch(monkeypatch)
    report = check(fault.case)
    wrong = report.wrong(1e-3)
    assert wrong, f"not found:\n{report}"
    assert wrong[0].kind == fault.first, f"{report}"
    assert fault.says in str(report), f"{report}"
    with pytest.raises(ParityFailed):
        report.raise_if(1e-11)


# -- Laws, for faults that change no number ---------------------------------------------------------------------------


def rows_of_every_expert(seed: int) -> Tensor:
    """How many rows each local expert computes for this lane's assignments."""
    layout = solve_layout(2, tp=2)
    with foldpar.create_groups(layout) as groups:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.rand(9, 6, generator=draw).topk(2).indices
        return foldpar.plan_dispatch(ids, groups, num_experts=6, partition="assignments").rows_per_expert


def lanes_share_every_expert_evenly() -> bool:
    both = [run_ranks(rows_of_every_expert, 2, seed, backend="threads") for seed in range(5)]
    return all(bool(((one - other).abs() <= 1).all()) for one, other in both)


def test_lanes_share_every_expert_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lanes_share_every_expert_evenly()
    unsorted = lambda ids, active, num_experts: torch.arange(ids.numel()).view_as(ids)  # noqa: E731
    monkeypatch.setattr(foldpar.moe.transport.messages, "ordinal_in_expert", unsorted)
    assert not lanes_share_every_expert_evenly()
