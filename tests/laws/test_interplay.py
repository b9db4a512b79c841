"""A folded model under what PyTorch puts around models: checkpointing, compilation, autocast, scaling, copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils.checkpoint import checkpoint
from toys import (
    DIM,
    Model,
    fold,
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
from foldpar.errors import GroupsError, ShapeError
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

LAYOUT = foldpar.solve_layout(4, tp=2, ep=4)
WITH_ETP = foldpar.solve_layout(4, tp=2, ep=2, etp=2, order="consecutive")


# -- Checkpointing ----------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """A router that remembers what it decided."""

    def __init__(self, router: foldpar.TopKRouter) -> None:
        super().__init__()
        self.router, self.ids = router, []
        self.num_experts = router.num_experts

    def forward(self, x: Tensor, **arguments: Any) -> foldpar.Routing:
        routing = self.router(x, **arguments)
        self.ids.append(routing.ids)
        return routing


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def checkpointed(plain: Model, layout: foldpar.FoldedLayout, reentrant: bool, partition: str, hooked: bool) -> None:
    with foldpar.create_groups(layout) as groups:
        tokens = tokens_of(groups.dp_cp.index)
        whole, model = (fold(plain, groups, partition=partition) for _ in range(2))
        loss_of(whole, tokens).backward()
        foldpar.reduce_gradients(whole, groups)

        routers = []
        for number, block in enumerate(model.blocks):
            block.moe.router = Recorded(block.moe.router)
            routers.append(foldpar.mark_parameters(block.moe.router, families.ROUTER_OWN_TOKENS))
            if partition == "assignments":
                foldpar.mark_parameters(block.moe.router, families.ROUTER_ALL_TOKENS)
            model.blocks[number] = Checkpointed(block, reentrant)
        if hooked:
            with foldpar.GradientReducer(model, groups, bucket_bytes=500) as reducer:
                loss_of(model, tokens).backward()
                reducer.finish()
        else:
            loss_of(model, tokens).backward()
            foldpar.reduce_gradients(model, groups)
        for router in routers:
            first, again = router.ids
            assert torch.equal(first, again)
        for want, got in zip(whole.parameters(), model.parameters(), strict=True):
            assert relative(got.grad, want.grad) < 1e-14
            assert hooked or torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("hooked", [False, True], ids=["by hand", "hooked"])
@pytest.mark.parametrize("partition", ["tokens", "assignments"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("layout", [LAYOUT, WITH_ETP], ids=repr)
def test_recomputation_routes_alike_and_gives_equal_gradients(
    layout: foldpar.FoldedLayout, reentrant: bool, partition: str, hooked: bool
) -> None:
    arguments = (plain_model(), layout, reentrant, partition, hooked)
    run_ranks(checkpointed, layout.world, *arguments, backend="threads")


# -- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(plain: Model, want: dict[str, Tensor]) -> tuple[int, int, list[str]]:
    from torch._dynamo import explain
    from torch._dynamo.testing import CompileCounterWithBackend

    warnings.simplefilter("ignore")  # the tracer touches things that torch warns of
    torch._dynamo.reset()
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
        counter = CompileCounterWithBackend("aot_eager")
        model = fold(plain, groups)
        compiled_model = torch.compile(model, backend=counter, fullgraph=True)
        loss_of(compiled_model, tokens_of(0)).backward()
        graphs = counter.frame_count
        foldpar.reduce_gradients(model, groups)
        assert worst(gradient_errors(model, want, groups))[0] < 1e-12
        for micro in range(1, 4):  # other tokens, so other routings
            tokens = tokens_of(0, micro)[:, :-1]
            assert relative(compiled_model(tokens), plain(tokens)) < 1e-14
        reasons = [str(reason.reason) for reason in explain(fold(plain, groups))(tokens_of(0)).break_reasons]
        return graphs, counter.frame_count - graphs, reasons


@pytest.mark.long
def test_a_compiled_model_is_one_graph_and_never_compiles_anew_for_a_routing() -> None:
    plain = plain_model(shared=True)
    for graphs, more, reasons in run_ranks(compiled, 2, plain, plain_gradients(plain, 1), timeout=240.0):
        assert (graphs, more, reasons) == (1, 0, [])


# -- Precisions -------------------------------------------------------------------------------------------------------


def under_autocast(
    plain: Model, want: dict[str, Tensor], rounded: dict[str, Tensor], layout: foldpar.FoldedLayout
) -> None:
    """Weights and reductions in float32, products in bf16: off by as much as one process under autocast."""
    with foldpar.create_groups(layout) as groups:
        model = fold(plain, groups).float()
        tokens = tokens_of(groups.dp_cp.index)
        seen: list[torch.dtype] = []
        model.blocks[0].moe.experts.register_forward_hook(
            lambda _, given, rows: seen.extend([given[0].dtype, rows.dtype])
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens)
        assert seen == [torch.bfloat16] * 2  # rows travel in bf16 too
        loss.backward()
        assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
        foldpar.reduce_gradients(model, groups)
        shares = Shares(model, groups)
        for name, parameter in model.named_parameters():
            exact, near = (shares.share_of(name, gradients[name]) for gradients in (want, rounded))
            assert relative(parameter.grad, exact) < 3 * relative(near, exact) + 2e-3, name


@pytest.mark.parametrize("layout", [LAYOUT, WITH_ETP], ids=repr)
def test_autocast_computes_in_bf16_and_keeps_float32_gradients(layout: foldpar.FoldedLayout) -> None:
    plain = plain_model(bias=True, shared=True)
    for block in plain.blocks:  # clear decisions, so that rounding routes no token elsewhere
        block.moe.router.weight.data *= 8
    want = plain_gradients(plain, layout.dp)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = plain_gradients(copy.deepcopy(plain).float(), layout.dp)
    run_ranks(under_autocast, layout.world, plain, want, rounded, layout, backend="threads")


def test_experts_alone_know_autocast_too() -> None:
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    experts = foldpar.GroupedExperts(2, 16, 8, groups, bias=True, seed=0)
    rows, sizes = torch.randn(5, 16, requires_grad=True), torch.tensor([2, 3], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = experts(rows, sizes)
    assert outputs.dtype is torch.bfloat16
    torch.testing.assert_close(outputs, experts(rows, sizes).bfloat16(), rtol=0.1, atol=0.02)
    outputs.sum().backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in (rows, *experts.parameters()))


def not_autocast(plain: Model) -> None:
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    moe = fold(plain, groups).blocks[0].moe
    with pytest.raises(
        ShapeError,
        match=r"The input is torch.float32 and the experts are torch.float64; convert one, or use torch.autocast",
    ):
        moe(torch.zeros(2, DIM))


def test_mixed_dtypes_without_autocast_are_refused() -> None:
    not_autocast(plain_model(blocks=1))


def scaled(
    plain: Model, scaler_class: Callable[[foldpar.FoldedGroups], Any], overflow: bool, replicas: int = 0
) -> tuple[bool, float]:
    """One step in fp16 with float32 weights; an overflow in one expert's gradient, on one rank, if so wanted.

    Returns whether this rank has stepped, and its next scale. With ``replicas`` of shards, of another layout.
    """
    with foldpar.create_groups(foldpar.solve_layout(4) if replicas else LAYOUT) as groups:
        model = fold(plain, groups).float()
        if replicas:
            foldpar.shard_model(model, groups, stage=3, replicas=replicas)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
        scaler = scaler_class(groups)
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, tokens_of(groups.dp_cp.index))
        scaler.scale(loss).backward()
        if overflow and groups.rank == 1:
            own(model.blocks[1].moe.experts.down_proj.grad)[0, 0, 0] = torch.inf
        foldpar.reduce_gradients(model, groups)
        if scaler_class is not folded_scaler:
            with pytest.raises(foldpar.GradientError, match="torch's gradient scalers cannot be used"):
                scaler.unscale_(optimizer)
            return False, scaler.get_scale()
        scaler.unscale_(optimizer)
        assert bool(foldpar.get_total_norm(model, groups).isfinite()) != overflow  # alike on all ranks, in any case
        scaler.step(optimizer)
        scaler.update()
        after = list(model.parameters())
        return any(not torch.equal(own(one), own(two)) for one, two in zip(before, after, strict=True)), (
            scaler.get_scale()
        )


def scaler_of_one_rank(groups: foldpar.FoldedGroups) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def scaler_of_all_ranks(groups: foldpar.FoldedGroups) -> ShardedGradScaler:
    return ShardedGradScaler("cpu", init_scale=1024.0)


def folded_scaler(groups: foldpar.FoldedGroups) -> foldpar.GradScaler:
    return foldpar.GradScaler("cpu", groups=groups, init_scale=1024.0)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_a_grad_scaler_over_all_ranks_skips_a_step_everywhere_or_nowhere() -> None:
    """Experts are not replicas of each other: an overflow in one of them is known to a part of the ranks only.

    foldpar's ``GradScaler`` asks all ranks; torch's two refuse DTensors beside plain tensors, before any step.
    """
    plain = plain_model()
    for block in plain.blocks:
        block.moe.router.weight.data *= 8
    assert run_ranks(scaled, 4, plain, folded_scaler, False) == [(True, 1024.0)] * 4
    assert run_ranks(scaled, 4, plain, folded_scaler, True) == [(False, 512.0)] * 4
    assert run_ranks(scaled, 4, plain, folded_scaler, True, 2) == [(False, 512.0)] * 4
    for of_torch in (scaler_of_all_ranks, scaler_of_one_rank):
        assert run_ranks(scaled, 4, plain, of_torch, True) == [(False, 1024.0)] * 4


# -- Inference, repetition, copies ------------------------------------------------------------------------------------


def without_gradients(plain: Model, layout: foldpar.FoldedLayout, partition: str) -> None:
    with foldpar.create_groups(layout) as groups:
        model, tokens = fold(plain, groups, partition=partition), tokens_of(groups.dp_cp.index)
        want = model(tokens)
        assert want.requires_grad
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                got = model(tokens)
            assert torch.equal(got, want) and not got.requires_grad
        loss_of(model, tokens).backward()  # and training goes on


@pytest.mark.parametrize("partition", ["tokens", "assignments"])
@pytest.mark.parametrize("layout", [LAYOUT, WITH_ETP], ids=repr)
def test_no_grad_and_inference_mode_compute_the_same_bits(layout: foldpar.FoldedLayout, partition: str) -> None:
    run_ranks(without_gradients, layout.world, plain_model(), layout, partition, backend="threads")


def trained(plain: Model, layout: foldpar.FoldedLayout, dtype: torch.dtype, hooked: bool) -> list[Tensor]:
    with foldpar.create_groups(layout) as groups:
        model = fold(plain, groups).to(dtype)
        optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            tokens = tokens_of(groups.dp_cp.index, step)
            if hooked:
                with foldpar.GradientReducer(model, groups, bucket_bytes=1000) as reducer:
                    loss_of(model, tokens).backward()
                    reducer.finish()
            else:
                loss_of(model, tokens).backward()
                foldpar.reduce_gradients(model, groups)
            foldpar.clip_grad_norm_(model, 0.5, groups)
            optimizer.step()
        foldpar.check_replicas(model, groups)
        return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("layout", "dtype", "hooked"),
    [(LAYOUT, torch.bfloat16, False), (WITH_ETP, torch.float64, False), (WITH_ETP, torch.bfloat16, True)],
    ids=repr,
)
def test_two_runs_give_the_same_bits(layout: foldpar.FoldedLayout, dtype: torch.dtype, hooked: bool) -> None:
    plain = plain_model(bias=True)
    once, again = (run_ranks(trained, 4, plain, layout, dtype, hooked) for _ in range(2))
    for mine, same in zip(once, again, strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, same, strict=True))
        assert all(parameter.isfinite().all() for parameter in mine)


def copied(plain: Model) -> None:
    with foldpar.create_groups(WITH_ETP) as groups:
        model, tokens = fold(plain, groups), tokens_of(groups.dp_cp.index)
        twin = copy.deepcopy(model)
        assert twin.blocks[0].moe.groups is groups
        assert foldpar.parameter_families(twin, groups) == foldpar.parameter_families(model, groups)
        assert copy.copy(groups) is groups and copy.copy(groups.tp) is groups.tp
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        assert not torch.equal(model(tokens), twin(tokens))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens), twin(tokens))


def test_copies_share_communicators_and_nothing_else() -> None:
    run_ranks(copied, 4, plain_model(bias=True), backend="threads")


def pickled(plain: Model) -> None:
    with foldpar.create_groups(LAYOUT) as groups:
        model = fold(plain, groups)
        for what, subject in (
            (groups, "FoldedGroups"),
            (groups.tp, "The tp group"),
            (model, "The .* group|FoldedGroups"),
        ):
            with pytest.raises(
                GroupsError, match=rf"^({subject}) cannot be pickled: live communicators .* save the state_dict"
            ):
                pickle.dumps(what)
        file = io.BytesIO()
        torch.save({"layout": groups.layout, "model": model.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loaded["layout"] == groups.layout
        model.load_state_dict(loaded["model"])
        assert pickle.loads(pickle.dumps(groups.pp)).ranks == groups.pp.ranks  # nobody to talk to


def test_groups_are_not_pickled_and_the_error_says_what_is() -> None:
    run_ranks(pickled, 4, plain_model())
