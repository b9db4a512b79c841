"""Gradients are reduced once, when they are complete: by hand after several micro-batches, or hooked, with overlap."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from draws import seeded
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from toys import Model, fold, gradient_errors, loss_of, plain_gradients, plain_model, relative, tokens_of, worst

import foldpar
from foldpar import GradientReducer, families
from foldpar.errors import FamilyError, GradientError, ShardingError
from foldpar.testing import run_ranks

LAYOUTS = [
    foldpar.solve_layout(4, tp=2, ep=4),
    foldpar.solve_layout(4, tp=2, ep=2, etp=2, order="consecutive"),
    foldpar.solve_layout(4, ep=2),
    foldpar.solve_layout(8, tp=2, ep=2, cp=2),
]


# -- By hand ----------------------------------------------------------------------------------------------------------


def accumulated(
    plain: Model, want: dict[str, Tensor], layout: foldpar.FoldedLayout, micro_batches: int
) -> tuple[float, str]:
    with foldpar.create_groups(layout) as groups:
        model = fold(plain, groups)
        for micro in range(micro_batches):
            (loss_of(model, tokens_of(groups.dp_cp.index, micro)) / micro_batches).backward()
        foldpar.reduce_gradients(model, groups)
        return worst(gradient_errors(model, want, groups))


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_micro_batches_reduced_once_equal_one_process(layout: foldpar.FoldedLayout, micro_batches: int) -> None:
    plain = plain_model(bias=True)
    want = plain_gradients(plain, layout.dp * layout.cp, micro_batches)
    for error, name in run_ranks(accumulated, layout.world, plain, want, layout, micro_batches, backend="threads"):
        assert error < 1e-12, name


def given_up(
    plain: Model, stage: Any, policy: MixedPrecisionPolicy | None, micro_batches: int
) -> list[tuple[float, float]]:
    """Norms of a step behind one that was given up, or that follows without ``zero_grad``: found and wanted."""
    found = []
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2)) as groups:
        model = fold(plain, groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage, mixed_precision=policy)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)

        def loss(micro: int) -> Tensor:
            return loss_of(model, tokens_of(groups.dp_cp.index, micro))

        def norm() -> float:
            foldpar.reduce_gradients(model, groups)
            return float(foldpar.get_total_norm(model, groups))

        def accumulated() -> None:
            for micro in range(1, 1 + micro_batches):
                with foldpar.accumulate(model):
                    loss(micro).backward()

        loss(0).backward()
        wanted = norm()
        for clear in (optimizer.zero_grad, partial(optimizer.zero_grad, set_to_none=False), model.zero_grad):
            clear()
            accumulated()
            with torch.no_grad():
                loss(0)
            clear()
            loss(0).backward()
            found.append((norm(), wanted))
        optimizer.zero_grad()
        with suppress(KeyError), foldpar.accumulate(model):
            loss(1).backward()
            raise KeyError
        optimizer.zero_grad()
        loss(0).backward()
        found.append((norm(), wanted))
        optimizer.zero_grad()
        for micro in range(1, 1 + micro_batches):
            loss(micro).backward()
        loss(0).backward()
        whole = norm()
        optimizer.zero_grad()
        accumulated()
        loss(0).backward()
        found.append((norm(), whole))
        if stage == 1:
            optimizer.zero_grad()
            accumulated()
            with pytest.raises(ShardingError, match="are whole and not yet summed over the data axis"):
                foldpar.reduce_gradients(model, groups)
            optimizer.zero_grad()
            foldpar.reduce_gradients(model, groups)
            loss(0).backward()
            found.append((norm(), wanted))
    return found


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("policy", [None, MixedPrecisionPolicy(reduce_dtype=torch.float64)], ids=["plain", "reduced"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_given_up_leaves_nothing_behind(stage: int, policy: MixedPrecisionPolicy | None) -> None:
    for of_rank in run_ranks(given_up, 4, plain_model(), stage, policy, 2, backend="threads"):
        for found, wanted in of_rank:
            assert found == pytest.approx(wanted, rel=1e-12)


# -- Hooked, with overlap ---------------------------------------------------------------------------------------------


def hooked(
    plain: Model, want: dict[str, Tensor], layout: foldpar.FoldedLayout, micro_batches: int, bucket_bytes: int
) -> tuple[float, str]:
    """Two steps, so that the second starts from what the first has left behind."""
    with foldpar.create_groups(layout) as groups:
        model = fold(plain, groups)
        with GradientReducer(model, groups, bucket_bytes=bucket_bytes) as reducer:
            for _ in range(2):
                model.zero_grad()
                with reducer.no_sync():
                    for micro in range(micro_batches - 1):
                        (loss_of(model, tokens_of(groups.dp_cp.index, micro)) / micro_batches).backward()
                last = tokens_of(groups.dp_cp.index, micro_batches - 1)
                (loss_of(model, last) / micro_batches).backward()
                reducer.finish()
        return worst(gradient_errors(model, want, groups))


@pytest.mark.parametrize(("micro_batches", "bucket_bytes"), [(1, 1), (3, 1000), (2, 2**20)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_hooked_reduction_equals_one_process(
    layout: foldpar.FoldedLayout, micro_batches: int, bucket_bytes: int
) -> None:
    plain = plain_model(bias=True)
    want = plain_gradients(plain, layout.dp * layout.cp, micro_batches)
    arguments = (plain, want, layout, micro_batches, bucket_bytes)
    for error, name in run_ranks(hooked, layout.world, *arguments, backend="threads", groups_left="error"):
        assert error < 1e-12, name


def on_one_rank() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        model = foldpar.mark_parameters(nn.Linear(2, 1, bias=False), families.REPLICATED)
        with GradientReducer(model, groups) as reducer:
            model(torch.tensor([[3.0, 4.0]])).sum().backward()
            reducer.finish()
        assert model.weight.grad.tolist() == [[3.0, 4.0]]


def test_hooked_reduction_on_one_rank() -> None:
    on_one_rank()


class Branches(nn.Module):
    """Three branches and a folded layer, whose use and whose order in backward the caller chooses."""

    def __init__(self, groups: foldpar.FoldedGroups) -> None:
        super().__init__()
        self.frozen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        router = foldpar.TopKRouter(8, 4, 2)
        self.moe = foldpar.FoldedMoE(router, foldpar.GroupedExperts(4, 8, 4, groups, seed=0), groups)
        self.branches = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))  # the first to leave
        foldpar.mark_parameters(self, families.REPLICATED)

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for branch in used:
            x = x + self.branches[branch](x).tanh()
            x = x + self.moe(x)  # all ranks of the stage meet here, in forward and in backward
        return x


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def uneven(layout: foldpar.FoldedLayout, rounds: list[list[list[int]]]) -> list[tuple[list[tuple[str, int]], int]]:
    """Every round, rank r uses the branches in the order rounds[.][r]; returns what was sent, and how much of it early.

    The hooked reduction must give what the reduction by hand gives, whatever each rank uses.
    """
    report = []
    with foldpar.create_groups(layout) as groups:
        with seeded(0):
            model = Branches(groups).double()
        sent: list[tuple[str, int]] = []
        original = foldpar.gradients.overlapped.start_all_reduce

        def recording(tensor: Tensor, group: foldpar.AxisGroup) -> Any:
            sent.append((group.axis, tensor.numel()))
            return original(tensor, group)

        foldpar.gradients.overlapped.start_all_reduce = recording
        try:
            reducer = GradientReducer(model, groups, bucket_bytes=1)
            for used_by in rounds:
                x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(groups.dp_cp.index))
                model.zero_grad()
                sent.clear()
                model(x, used_by[groups.rank]).square().mean().backward()
                raw, early = gradients(model), len(sent)
                reducer.finish()
                report.append((list(sent), early))
                hooked_gradients = gradients(model)
                for name, parameter in model.named_parameters():
                    parameter.grad = raw[name]
                foldpar.reduce_gradients(model, groups)
                for name, by_hand in gradients(model).items():
                    assert (by_hand is None) == (hooked_gradients[name] is None), name
                    if by_hand is not None:
                        torch.testing.assert_close(hooked_gradients[name], by_hand, rtol=1e-14, atol=1e-15)
            assert model.frozen.weight.grad is None
            assert model.unused.weight.grad is None
            reducer.close()
        finally:
            foldpar.gradients.overlapped.start_all_reduce = original
    return report


@pytest.mark.parametrize(
    "layout",
    [
        foldpar.solve_layout(4, tp=2, ep=2),
        foldpar.solve_layout(4, ep=4),  # gradients and rows travel among the same ranks
    ],
    ids=repr,
)
def test_ranks_may_differ_in_which_gradients_they_get_and_when(layout: foldpar.FoldedLayout) -> None:
    alike = [[0, 1, 2]] * 4
    orders = [[0, 1, 2], [0, 1, 2], [2, 1, 0], [2, 1, 0]]
    some = [[0, 1], [0, 1], [1, 2], [1, 2]]
    results = run_ranks(uneven, 4, layout, [alike, orders, some, alike], timeout=40.0, groups_left="error")
    for number in range(4):
        sequences = [sent for sent, _ in (result[number] for result in results)]
        assert sequences == [sequences[0]] * 4  # the same collectives in the same order, whatever was used
    assert all(early > 0 for _, early in (result[0] for result in results))


def test_buckets_leave_while_backward_runs() -> None:
    def sent_when_each_layer_was_done() -> list[int]:
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
            sent: list[int] = []
            with GradientReducer(model, groups, bucket_bytes=1, check=False) as reducer:
                for layer in model:
                    layer.weight.register_post_accumulate_grad_hook(lambda _: sent.append(len(reducer._travelling)))
                model(torch.ones(3, 4)).sum().backward()
                reducer.finish()
            return sent

    assert run_ranks(sent_when_each_layer_was_done, 2, backend="threads") == [[1, 2, 3, 4, 5]] * 2


def untouched_until_finish(plain: Model) -> None:
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
        tokens = tokens_of(0)
        alone, model = fold(plain, groups), fold(plain, groups)
        loss_of(alone, tokens).backward()
        with GradientReducer(model, groups, bucket_bytes=1000) as reducer:
            loss_of(model, tokens).backward()
            assert len(reducer._travelling) == len(reducer._buckets) > 1  # all have left
            for (name, raw), parameter in zip(gradients(alone).items(), model.parameters(), strict=True):
                assert torch.equal(parameter.grad, raw), name
            reducer.finish()


def test_no_gradient_is_touched_before_finish() -> None:
    run_ranks(untouched_until_finish, 2, plain_model(), backend="threads")


def one_rank_without_backward(reduce_dtype: torch.dtype | None) -> None:
    with foldpar.create_groups(foldpar.solve_layout(3)) as groups:
        model = nn.Linear(2, 1, bias=False).bfloat16()
        nn.init.zeros_(model.weight)
        with GradientReducer(model, groups, loss="sum", reduce_dtype=reduce_dtype) as reducer:
            if groups.rank:
                model(torch.tensor([[1.0, 2.0**-8 * groups.rank]]).bfloat16()).sum().backward()
            reducer.finish()
        assert model.weight.grad.dtype is torch.bfloat16
        assert model.weight.grad.tolist() == [[2.0, 3 * 2.0**-8]]


def one_rank_with_a_wide_gradient() -> None:
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        model = nn.Linear(3, 1, bias=False).bfloat16()
        model.weight.grad_dtype = None  # any
        with GradientReducer(model, groups, loss="sum", check=False) as reducer:
            if groups.rank:
                model.weight.grad = torch.tensor([[1.0, 2.0, 3.0]])
            reducer.finish()
        assert model.weight.grad.tolist() == [[1.0, 2.0, 3.0]]


def test_ranks_need_not_have_gradients_of_one_dtype() -> None:
    run_ranks(one_rank_with_a_wide_gradient, 2)


def test_a_rank_without_a_backward_takes_part_with_zeros() -> None:
    for reduce_dtype in (None, torch.float32):
        run_ranks(one_rank_without_backward, 3, reduce_dtype, backend="threads")


def sharded_by_dtensor() -> float:
    """Sequence parallelism gives norms partial DTensor gradients, which say themselves that they are to be summed."""
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2)) as groups:
        torch.manual_seed(0)
        mesh = groups.mesh("dense")["tp"]
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)).double()
        parallelize_module(
            model, mesh, {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)), "2": RowwiseParallel()}
        )
        foldpar.mark_parameters(model, families.REPLICATED)
        x = torch.randn(1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(groups.dp.index))
        with GradientReducer(model, groups, bucket_bytes=100) as reducer:
            model(x.chunk(2, 1)[groups.tp.index]).square().mean().backward()
            raw = {name: parameter.grad for name, parameter in model.named_parameters()}
            copies = {name: grad.clone() for name, grad in raw.items()}
            reducer.finish()
        got = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = copies[name]
        foldpar.reduce_gradients(model, groups)
        return max(relative(got[name], parameter.grad.full_tensor()) for name, parameter in model.named_parameters())


def test_hooked_reduction_of_dtensors_equals_that_by_hand() -> None:
    assert max(run_ranks(sharded_by_dtensor, 4)) < 1e-14


def placed_elsewhere() -> None:
    """A gradient whose shards lie elsewhere is placed in finish, where no backward waits for these lanes."""
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2)) as groups:
        layer = nn.Linear(8, 16, bias=False)
        parallelize_module(layer, groups.mesh("dense")["tp"], ColwiseParallel())

        def gather(weight: Tensor) -> None:
            weight.grad = weight.grad.redistribute(placements=[Replicate()])

        layer.weight.register_post_accumulate_grad_hook(gather)
        with GradientReducer(layer, groups) as reducer:
            layer(torch.full((1, 8), 1.0 + groups.dp.index)).sum().backward()
            assert not reducer._travelling
            reducer.finish()
        assert layer.weight.grad.placements == (Shard(0),)
        assert torch.equal(layer.weight.grad.to_local(), torch.full((8, 8), 1.5))


def test_a_gradient_to_be_placed_anew_waits_for_finish() -> None:
    run_ranks(placed_elsewhere, 4)


def stages_with_other_folds() -> list[tuple[str, ...]]:
    """Only the second stage has a layer of the second layout; the communicators of all ranks still fit together."""
    first, second = (foldpar.solve_layout(4, pp=2, **degrees) for degrees in ({"ep": 2}, {"etp": 2}))
    with foldpar.create_groups(first) as one, foldpar.create_groups(second) as two:
        of_stage = [one] if one.pp.index == 0 else [one, two]
        model = nn.ModuleList(foldpar.GroupedExperts(4, 8, 4, groups, seed=0) for groups in of_stage)
        foldpar.mark_parameters(model, families.ROUTED_EXPERT)
        with GradientReducer(model, one) as reducer:
            for experts in model:
                experts.down_proj.grad = torch.ones_like(experts.down_proj)
            reducer.finish()
            return sorted(repr(layout) for layout in reducer._own_groups)


def test_stages_may_hold_layers_of_different_layouts() -> None:
    results = run_ranks(stages_with_other_folds, 4, backend="threads", groups_left="error")
    assert results == [results[0]] * 4
    assert len(results[0]) == 2


# -- Wrong use --------------------------------------------------------------------------------------------------------


def wrong_use(plain: Model) -> None:
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
        model = fold(plain, groups)
        reducer = GradientReducer(model, groups, bucket_bytes=1)
        loss_of(model, tokens_of(0)).backward()
        with pytest.raises(RuntimeError, match=r"gradient of head.bias grew after its bucket had left.*no_sync"):
            loss_of(model, tokens_of(0)).backward()
        reducer.finish()
        reducer.close()
        reducer.close()
        loss_of(model, tokens_of(0)).backward()  # no hook is left

        model.head.bias.requires_grad_(False)
        reducer = GradientReducer(model, groups)
        model.head.bias.requires_grad_(True)
        with pytest.raises(FamilyError, match=r"head.bias requires a gradient, but it was frozen or another tensor"):
            reducer.finish()
        reducer.close()
        with pytest.raises(ValueError, match="loss = 'total' is unknown"):
            GradientReducer(model, groups, loss="total")  # type: ignore[arg-type]
        with pytest.raises(FamilyError, match="1 parameter has no family: weight"):
            GradientReducer(nn.Linear(2, 2, bias=False), groups)


def test_wrong_use_teaches() -> None:
    run_ranks(wrong_use, 2, plain_model(blocks=1), backend="threads", groups_left="error")


def finish_again(reduced_by: str) -> None:
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        layer = nn.Linear(2, 1, bias=False)
        nn.init.ones_(layer.weight)
        with GradientReducer(layer, groups, loss="sum") as reducer:
            for _ in range(2):  # what was refused does not disturb the next step
                layer(torch.ones(1, 2)).sum().backward()
                if reduced_by == "finish":
                    reducer.finish()
                else:
                    foldpar.reduce_gradients(layer, groups, loss="sum")
                with pytest.raises(GradientError, match="gradient of weight was reduced already"):
                    reducer.finish()
                assert layer.weight.grad is not None and layer.weight.grad.tolist() == [[2.0, 2.0]]
                layer.zero_grad()


@pytest.mark.parametrize("reduced_by", ["finish", "reduce_gradients"])
def test_gradients_that_were_reduced_are_not_finished_again(reduced_by: str) -> None:
    run_ranks(finish_again, 2, reduced_by, backend="threads")


def gradient_in_parts(variant: str) -> None:
    """A weight used in two reentrant segments gets its gradient in two parts, and its bucket may leave in between."""
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        layer = nn.Linear(4, 4, bias=False)
        x = torch.ones(2, 4, requires_grad=True)
        for _ in range(2):
            x = checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=variant == "reentrant")
        with GradientReducer(layer, groups, check=False) as reducer:
            if variant == "reentrant":
                with pytest.raises(
                    RuntimeError, match=r"gradient in parts, use checkpoint\(..., use_reentrant=False\)"
                ):
                    x.sum().backward()
            else:
                x.sum().backward()
            reducer.finish()


@pytest.mark.parametrize("variant", ["reentrant", "not reentrant"])
def test_a_gradient_that_comes_in_parts_is_never_sent_half(variant: str) -> None:
    run_ranks(gradient_in_parts, 2, variant, backend="threads")
