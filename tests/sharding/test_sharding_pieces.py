"""One idea of sharding each: biases and scalars, memory by stage, norms, precision, prefetch, evaluation, errors."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
import toys
from dense import dense_experts, feed_forward, softmax_routing
from einops import rearrange
from hf_models import tiny_model
from sharded_parity import data_axis, shard_of
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from toys import loss_of, plain_gradients, plain_model, relative, tokens_of

import foldpar
from foldpar import create_groups, families, solve_layout
from foldpar.errors import ArgumentError, FamilyError, FoldingError, ReplicaError, ShapeError, ShardingError
from foldpar.families import REPLICATED, ROUTED_EXPERT
from foldpar.models.plan import FoldPlan, FoldPlanRow
from foldpar.sharding.memory import LocalParameter, planned_parameters, predict_memory
from foldpar.sharding.shard import accumulate, shard_model
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

STAGES = (1, 2, 3)

# A biased linear layer over [batch, length, dim] returns a view, of which torch 2.13 warns where it ends the model.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def errors(model: nn.Module, shares: Shares, want: dict[str, Tensor], factor: float = 1.0) -> tuple[float, str]:
    """The worst relative difference of a gradient; shares are those before the model was sharded."""
    found = []
    for name, parameter in model.named_parameters():
        wanted = shard_of(shares.share_of(name, want[name]), parameter) * factor
        assert parameter.grad is not None, f"{name} has no gradient"
        assert toys.own(parameter.grad, wanted).shape == wanted.shape, name
        found.append((relative(parameter.grad, wanted), name))
    return max(found)


def micro_batches(model: nn.Module, data_rank: int, count: int, scale: float = 1.0) -> None:
    with accumulate(model):
        for micro in range(count - 1):
            (loss_of(model, tokens_of(data_rank, micro)) * scale).backward()
    (loss_of(model, tokens_of(data_rank, count - 1)) * scale).backward()


# ---------------------------------------------------------------------------------------------------------------------
# Every family.


def gradients_of_every_family(
    plain: toys.Model, want: dict[str, Tensor], layout: foldpar.FoldedLayout, replicas: int = 1
) -> set[str]:
    """Hand-sliced dense layers, biases of every kind, a frozen parameter, two micro-batches, both kinds of loss."""
    with create_groups(layout) as groups:
        for stage in STAGES:
            model = toys.fold(plain, groups)
            shares = Shares(model, groups)
            shard_model(model, groups, stage=stage, replicas=replicas)
            for loss in ("mean", "sum"):
                micro_batches(model, groups.dp_cp.index, 2, 0.5)
                foldpar.reduce_gradients(model, groups, loss=loss)
                factor = 1.0 if loss == "mean" else float(layout.dp * layout.cp)
                error, name = errors(model, shares, want, factor)
                assert error < 1e-12, (layout, stage, loss, name, error)
                if loss == "mean":
                    check_norms(model, groups, want)
                model.zero_grad()
            foldpar.check_replicas(model, groups)
        return {name for name, parameter in model.named_parameters() if data_axis(parameter) is None}


def check_norms(model: nn.Module, groups: foldpar.FoldedGroups, want: dict[str, Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in want.values()])
    for order in (0.5, 1.0, 2.0, 3.0, math.inf):
        norm = foldpar.get_total_norm(model, groups, norm_type=order)
        # Square roots blow up what rounding leaves of zeros.
        assert relative(norm, torch.linalg.vector_norm(flat, order)) < (1e-12 if order >= 1 else 1e-9)
    of_ranks = foldpar.comm.collectives.all_gather(norm, groups.dp_cp)
    assert (of_ranks == norm).all()


# In the first two, edp is (0 2 1 3) and 2 of 4; in the third an expert's shards over edp are more than its rows; in the
# last, the edp groups (0 4 3) and (2 1 5) do not ascend and hold etp replicas of an output bias.
LAYOUTS = [
    solve_layout(4, tp=2),
    solve_layout(4, tp=2, ep=2, order="consecutive"),
    solve_layout(4, ep=1, cp=2),
    solve_layout(4, tp=2, etp=2),
    solve_layout(6, tp=2, etp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_every_family_equals_one_process(layout: foldpar.FoldedLayout) -> None:
    plain = plain_model(bias=True, shared=True)
    want = plain_gradients(plain, layout.dp * layout.cp, 2)
    for whole in run_ranks(gradients_of_every_family, layout.world, plain, want, layout):
        assert not whole


# With edp (0 2 1 3) in two pieces; edp 2 and 1, so that experts stay whole; edp 8 and dp 4; and dp 4 and edp 8 / 4.
REPLICAS = [
    (solve_layout(4), 2),
    (solve_layout(4, ep=2), 2),
    (solve_layout(4, tp=2), 2),
    (solve_layout(4, ep=4), 2),
    (solve_layout(8, tp=2), 4),
    (solve_layout(8, tp=2, etp=2), 2),
    (solve_layout(8, tp=2, ep=2, order="consecutive"), 2),
    (solve_layout(8, cp=2, ep=2, etp=2), 2),
]


@pytest.mark.parametrize(
    ("layout", "replicas"), [REPLICAS[1], *(pytest.param(*each, marks=pytest.mark.long) for each in REPLICAS)]
)
def test_replicas_of_shards_of_every_family(layout: foldpar.FoldedLayout, replicas: int) -> None:
    plain = plain_model(bias=True, shared=True)
    want = plain_gradients(plain, layout.dp * layout.cp, 2)
    for whole in run_ranks(gradients_of_every_family, layout.world, plain, want, layout, replicas, timeout=120.0):
        assert any("experts" in name for name in whole) == (layout.edp <= replicas)
        assert any("experts" not in name for name in whole) == (layout.dp * layout.cp <= replicas)


def replicas_lie_in_blocks(layout: foldpar.FoldedLayout) -> None:
    """The mesh says which ranks hold the same; whatever reads DTensors sees the whole; drift is found by name."""
    plain = plain_model()
    with create_groups(layout) as groups:
        model = toys.fold(plain, groups)
        wanted = {name: local(parameter).clone() for name, parameter in model.named_parameters()}
        shard_model(model, groups, stage=3, replicas=2)
        weight, experts = model.norm.weight, model.blocks[0].moe.experts.down_proj
        assert weight.device_mesh.mesh_dim_names == ("dp_cp_replicas", "dp_cp")
        assert weight.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
        assert experts.device_mesh.mesh_dim_names == ("edp_replicas", "edp", "ep", "etp")
        assert experts.device_mesh.mesh.flatten().tolist() == [0, 1, 2, 3]
        assert torch.equal(weight.full_tensor(), wanted["norm.weight"])
        assert torch.equal(experts.full_tensor(), wanted["blocks.0.moe.experts.down_proj"])
        for placement in foldpar.parameter_placements(model, groups):
            assert placement.replicas == 2 and placement.replica == groups.rank // 2, placement.name
        foldpar.check_replicas(model, groups)
        with torch.no_grad():
            if groups.rank == 3:
                experts.to_local().add_(1.0)
        text = text_of(ReplicaError, foldpar.check_replicas, model, groups)
        assert "1 parameter differs between replicas" in text
        assert "blocks.0.moe.experts.down_proj over edp: rank 3 differs from the first rank of its group" in text


def test_replicas_are_compared_and_lie_in_blocks() -> None:
    run_ranks(replicas_lie_in_blocks, 4, solve_layout(4))


class Gained(nn.Module):
    """A scalar parameter in front of a layer."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.gain, self.moe = nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), moe

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0 + self.gain / 2 * self.moe(x)


def fewer_rows_than_ranks(layout: foldpar.FoldedLayout) -> None:
    """Four local experts over three ranks, in chunks of two: one holds nothing. And a scalar, which stays whole."""
    torch.manual_seed(0)
    plain = Gained(toys.MoE(bias=True).double())
    x = torch.randn(layout.dp, 5, toys.DIM, dtype=torch.float64)  # [data rank, tokens, dim]
    plain(x).square().mean().backward()
    want = {name: parameter.grad for name, parameter in plain.named_parameters()}
    with create_groups(layout) as groups:
        for stage in STAGES:
            model = Gained(toys.fold_moe(plain.moe, groups))
            foldpar.mark_parameters(model, families.REPLICATED)
            shares = Shares(model, groups)
            shard_model(model, groups, stage=stage)
            assert [name for name, p in model.named_parameters() if data_axis(p) is None] == ["gain"]
            assert model.moe.experts.down_proj.to_local().shape[0] == (2, 2, 0)[groups.edp.index]
            model(x[groups.dp.index]).square().mean().backward()
            foldpar.reduce_gradients(model, groups)
            error, name = errors(model, shares, want)
            assert error < 1e-12, name
            foldpar.clip_grad_norm_(model, 1.0, groups)
            labels = {(group["family"], len(group["params"])) for group in foldpar.parameter_groups(model)}
            assert labels == {("replicated", 1), ("router_own_tokens", 1), ("routed_expert", 3), ("expert_bias", 1)}
            for options in ({"foreach": True}, {"fused": True}):
                torch.optim.AdamW(foldpar.parameter_groups(model), **options).step()


def test_ranks_may_hold_nothing_and_scalars_stay_whole() -> None:
    run_ranks(fewer_rows_than_ranks, 6, solve_layout(6, tp=2, ep=2))


class OfThree(nn.Module):
    """Three experts with biases, as one process has them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        sizes = {"gate_up_proj": (3, 16, 8), "down_proj": (3, 8, 8), "gate_up_bias": (3, 16), "down_bias": (3, 8)}
        self.experts = nn.ParameterDict({name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        of = self.experts
        experts = feed_forward(of["gate_up_proj"], of["down_proj"], of["gate_up_bias"], of["down_bias"])
        return dense_experts(x, *softmax_routing(x, self.router.weight, 2), experts)


def cut_along_another_dimension(layout: foldpar.FoldedLayout, of_bias: int) -> None:
    """What edp does not divide by experts lies evenly on all ranks; a bias too, whose gate and up etp holds apart."""
    torch.manual_seed(0)
    plain = OfThree().double()
    x = torch.randn(layout.dp, 6, 8, dtype=torch.float64)
    torch.stack([plain(rows).square().mean() for rows in x]).mean().backward()
    want = {name: parameter.grad for name, parameter in plain.named_parameters()}
    with create_groups(layout) as groups:
        for stage in STAGES:
            router = foldpar.TopKRouter(8, 3, 2)
            router.weight = nn.Parameter(plain.router.weight.detach().clone())
            weights = {name: parameter.detach().clone() for name, parameter in plain.experts.items()}
            model = foldpar.FoldedMoE.from_dense(router, groups=groups, **weights)
            shares = Shares(model, groups)
            wanted = predict_memory(model, layout, stage=stage, rank=groups.rank).parameters
            shard_model(model, groups, stage=stage)
            assert numbers_of(model.parameters()) == wanted
            dims = {name: each.placements[0].dim for name, each in model.experts.named_parameters()}
            assert dims == {"gate_up_proj": 3, "down_proj": 1, "gate_up_bias": of_bias, "down_bias": 1}
            for place in foldpar.parameter_placements(model, groups):
                held = place.local(place.parameter)
                assert held.numel() == sum(box.volume for box in place.share.boxes)
                for box in place.share.boxes:
                    inside, whole = held, dict(plain.named_parameters())[place.name]
                    for dim, (offset, start, size) in enumerate(zip(box.offsets, box.starts, box.sizes, strict=True)):
                        inside, whole = inside.narrow(dim, start, size), whole.narrow(dim, offset, size)
                    assert torch.equal(inside, whole), place.name
            model(x[groups.dp.index]).square().mean().backward()
            foldpar.reduce_gradients(model, groups)
            error, name = errors(model, shares, want)
            assert error < 1e-12, name
            norm = foldpar.clip_grad_norm_(model, 1.0, groups)
            assert relative(norm, torch.stack([grad.norm() for grad in want.values()]).norm()) < 1e-12
            torch.optim.AdamW(foldpar.parameter_groups(model), foreach=True).step()


@pytest.mark.parametrize(
    ("layout", "of_bias"), [(solve_layout(4, tp=2, etp=2), 1), (solve_layout(8, tp=4, etp=2), 2)], ids=repr
)
def test_experts_that_data_ranks_do_not_divide_are_cut_along_another_dimension(
    layout: foldpar.FoldedLayout, of_bias: int
) -> None:
    run_ranks(cut_along_another_dimension, layout.world, layout, of_bias)


def folds_of_two_layers() -> None:
    """The layers' experts fold differently, so their shards lie over different edp groups."""
    plain = plain_model(bias=True)
    want = plain_gradients(plain, 2)
    with create_groups(solve_layout(4, tp=2, ep=2)) as first, create_groups(solve_layout(4, tp=2)) as second:
        model = toys.fold(plain, [first, second])
        shares = Shares(model, first)
        shard_model(model, first, stage=3)
        assert [block.moe.experts.down_proj.device_mesh["edp"].size() for block in model.blocks] == [2, 4]
        loss_of(model, tokens_of(first.dp_cp.index)).backward()
        foldpar.reduce_gradients(model, first)
        error, name = errors(model, shares, want)
        assert error < 1e-12, name


def stages_of_a_pipeline(layout: foldpar.FoldedLayout, replicas: int) -> None:
    """Two stages of other models: each is sharded over its own data ranks, and the norm is of both."""
    with create_groups(layout) as groups:
        plain = [plain_model(seed) for seed in (0, 1)]
        want = [plain_gradients(model, layout.dp) for model in plain]
        here = groups.pp.index
        model = toys.fold(plain[here], groups)
        shares = Shares(model, groups)
        shard_model(model, groups, stage=3, replicas=replicas)
        ranks = torch.arange(here * layout.dp, (here + 1) * layout.dp)
        blocks = ranks if replicas == 1 else rearrange(ranks, "(replica rank) -> replica rank", replica=replicas)
        assert torch.equal(model.embedding.weight.device_mesh.mesh, blocks)
        loss_of(model, tokens_of(groups.dp_cp.index)).backward()
        foldpar.reduce_gradients(model, groups)
        error, name = errors(model, shares, want[here])
        assert error < 1e-12, name
        flat = torch.cat([gradient.flatten() for stage in want for gradient in stage.values()])
        assert relative(foldpar.get_total_norm(model, groups), flat.norm()) < 1e-12


def partial_by_dtensor() -> None:
    """Sequence parallelism: norms have DTensor gradients partial over tp, which FSDP2 sums; nobody sums them again,
    whatever default the model is marked with."""
    for family in (families.REPLICATED, families.REPLICATED_PARTIAL):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)).double()
        model = copy.deepcopy(plain)
        x = torch.randn(2, 4, 8, dtype=torch.float64)  # [data rank, length, dim]
        plain(x).square().mean().backward()
        with create_groups(solve_layout(4, tp=2)) as groups:
            styles = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)), "2": RowwiseParallel()}
            parallelize_module(model, groups.mesh("dense")["tp"], styles)
            shard_model(foldpar.mark_parameters(model, family), groups, stage=3)
            own = x[groups.dp.index, None].chunk(2, 1)[groups.tp.index]
            model(own).square().mean().backward()
            foldpar.reduce_gradients(model, groups)
            assert model[0].weight.device_mesh.mesh_dim_names == ("dp_cp", "tp")
            for name, parameter in model.named_parameters():
                want = dict(plain.named_parameters())[name].grad
                assert relative(parameter.grad.full_tensor(), want) < 1e-12, (family.name, name)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def recomputed_and_balanced() -> None:
    """Activation checkpointing inside the units, and a router with a correction bias, whose buffers stay whole."""
    biases = []
    for stage in (0, 1, 3):
        with create_groups(solve_layout(4, tp=2)) as groups:
            torch.manual_seed(5)
            plain = plain_model(bias=True)
            model = toys.fold(plain, groups)
            for block in model.blocks:
                router = foldpar.TopKRouter(toys.DIM, toys.EXPERTS, toys.TOP_K, correction_bias=True).double()
                router.weight = block.moe.router.weight
                block.moe.router = router
            model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
            foldpar.mark_parameters(model, families.REPLICATED)
            if stage:
                shard_model(model, groups, stage=stage)
            optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
            for step in range(2):
                loss_of(model, tokens_of(groups.dp_cp.index, step)).backward()
                foldpar.reduce_gradients(model, groups)
                norm = foldpar.clip_grad_norm_(model, 1.0, groups)
                optimizer.step()
                optimizer.zero_grad()
                foldpar.update_correction_bias(model)
            biases.append([*(block.block.moe.router.correction_bias.clone() for block in model.blocks), norm.double()])
    for of_stage in biases[1:]:
        assert all(relative(got, want) < 1e-12 for got, want in zip(of_stage, biases[0], strict=True))
    assert any(bias.abs().max() > 0 for bias in biases[0][:2])


@pytest.mark.parametrize("function", [folds_of_two_layers, partial_by_dtensor, recomputed_and_balanced])
def test_models_of_other_kinds(function: Any) -> None:
    run_ranks(function, 4)


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [(solve_layout(8, pp=2), 2), pytest.param(solve_layout(4, pp=2, ep=2), 1, marks=pytest.mark.long)],
)
def test_stages_of_a_pipeline_are_sharded_by_themselves(layout: foldpar.FoldedLayout, replicas: int) -> None:
    run_ranks(stages_of_a_pipeline, layout.world, layout, replicas)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes.


def numbers_of(tensors: Any) -> int:
    return sum(local(tensor).numel() * tensor.dtype.itemsize for tensor in tensors if tensor is not None)


def bytes_by_stage(layout: foldpar.FoldedLayout, replicas: int = 1) -> None:
    plain = plain_model(bias=True)
    with create_groups(layout) as groups:
        for dtypes in (None, MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)):
            for stage in (0, *STAGES) if dtypes is None else (1, 2):
                model = toys.fold(plain, groups)
                model.head.bias.requires_grad_(False)
                options: dict[str, Any] = {"stage": stage, "replicas": replicas, "mixed_precision": dtypes}
                wanted = predict_memory(model, layout, rank=groups.rank, **options)
                if stage:
                    shard_model(model, groups, **options)
                optimizer = torch.optim.AdamW(foldpar.parameter_groups(model))
                shards = list(model.parameters())
                assert numbers_of(shards) == wanted.parameters, stage
                with accumulate(model):
                    loss = loss_of(model, tokens_of(groups.dp_cp.index))
                    assert numbers_of(whole_now(model)) == wanted.gathered_parameters or stage == 3, stage
                    loss.backward()
                    early = numbers_of(
                        parameter.grad for parameter in shards if stage > 1 or data_axis(parameter) is None
                    )
                    unsharded = numbers_of(p for p in shards if p.requires_grad and data_axis(p) is None)
                    assert early == (unsharded if stage == 1 else wanted.gradients), stage
                    assert stage != 1 or all(p.grad is None for p in shards if data_axis(p) is not None)
                    if dtypes is None and stage == 1:
                        assert numbers_of(parameter.grad for parameter in whole_now(model)) == wanted.whole_gradients
                loss_of(model, tokens_of(groups.dp_cp.index, 1)).backward()
                foldpar.reduce_gradients(model, groups)
                assert not whole_now(model)
                assert numbers_of(parameter.grad for parameter in shards) == wanted.gradients, stage
                optimizer.step()
                states = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
                assert numbers_of(states) == wanted.optimizer, stage
                assert wanted.between_steps == wanted.parameters + wanted.gradients + wanted.optimizer


def whole_now(model: nn.Module) -> list[Tensor]:
    """The parameters that are registered whole at the moment though they are sharded between steps."""
    names = {name for module in model.modules() for name in (getattr(module, "_foldpar_sharded", None) or NONE).names}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1] in names and data_axis(parameter) is None
    ]


class NONE:
    names = frozenset[str]()


@pytest.mark.parametrize("layout", [solve_layout(4, tp=2), solve_layout(4, ep=4)], ids=repr)
def test_bytes_are_those_predicted(layout: foldpar.FoldedLayout) -> None:
    run_ranks(bytes_by_stage, layout.world, layout)


@pytest.mark.long
@pytest.mark.parametrize("layout", [solve_layout(4), solve_layout(4, ep=2), solve_layout(8, tp=2)], ids=repr)
def test_bytes_of_replicas_are_those_predicted(layout: foldpar.FoldedLayout) -> None:
    run_ranks(bytes_by_stage, layout.world, layout, 2, timeout=120.0)


def test_predictions_count_the_shards_of_a_replica() -> None:
    weight = LocalParameter("weight", (10, 4), torch.float32, families.REPLICATED)
    held = [predict_memory([weight], solve_layout(4), stage=3, replicas=2, rank=rank).parameters for rank in range(4)]
    assert held == [80, 80, 80, 80]
    held = [predict_memory([weight], solve_layout(8), stage=3, replicas=2, rank=rank).parameters for rank in range(8)]
    assert held == [48, 48, 48, 16] * 2
    with pytest.raises(ShardingError, match=r"replicas = 3 does not go into the dp \* cp = 4 ranks"):
        predict_memory([weight], solve_layout(4), stage=3, replicas=3)
    with pytest.raises(ShapeError, match="replicas must be a positive integer"):
        predict_memory([weight], solve_layout(4), stage=3, replicas=0)


def test_a_plan_predicts_before_there_are_ranks() -> None:
    layout = solve_layout(8, tp=2, ep=2)  # dp 4, edp 4
    rows = (
        FoldPlanRow("norm", "RMSNorm", "left whole", (10,), (10,), REPLICATED),
        FoldPlanRow("experts.down_proj", "Experts", "6 of 12 experts", (12, 5, 5), (6, 5, 5), ROUTED_EXPERT),
        FoldPlanRow("experts.gate_up_proj", "Experts", "6 of 12 experts", (12, 5, 8), (6, 5, 8), ROUTED_EXPERT),
    )
    parameters = planned_parameters(FoldPlan("Model", layout, rows), dtype=torch.bfloat16)
    # edp (0 4 1 5): ranks 0 and 1 have the places 0 and 1, rank 5 the last, behind 2 + 2 + 2 experts; of the 8 columns
    # every rank has 2
    held = [predict_memory(parameters, layout, stage=2, rank=rank).parameters // 2 for rank in (0, 1, 5)]
    assert held == [3 + 2 * 25 + 60, 3 + 2 * 25 + 60, 3 + 60]
    of_last = predict_memory(parameters, layout, stage=2, rank=6).parameters // 2
    assert of_last == 1 + 2 * 25 + 60  # rows of the norm: 3 3 3 1
    taken_over = FoldPlanRow("moe.w", "Own", "replaced by its adapter", (4,), None, None)
    with pytest.raises(
        ValueError, match=r"does not say what a rank will hold of moe.w, .* Fold the model, on the meta"
    ):
        planned_parameters(FoldPlan("Model", layout, (taken_over,)), dtype=torch.float32)


def test_predictions_refuse_what_they_cannot_know() -> None:
    with pytest.raises(ValueError, match=r"stage = 4 is unknown. It can be 0 \(not sharded\), 1, 2 or 3"):
        predict_memory(nn.Linear(2, 2), solve_layout(1), stage=4)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, offloading, evaluation, prefetch.


def in_mixed_precision(layout: foldpar.FoldedLayout) -> None:
    """Gathered in bf16 and summed in float32: the gradients of the model in bf16, whatever the size of a mesh."""
    plain = plain_model(bias=True).float()
    with create_groups(layout) as groups:
        tokens = tokens_of(groups.dp_cp.index)
        rough = toys.fold(plain, groups).bfloat16()
        loss_of(lambda x: rough(x).float(), tokens).backward()
        foldpar.reduce_gradients(rough, groups, reduce_dtype=torch.float32)
        want = dict(rough.named_parameters())
        for stage in STAGES:
            model = toys.fold(plain, groups)
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
            )
            shard_model(model, groups, stage=stage, mixed_precision=policy)
            logits = model(tokens[:, :-1])
            assert logits.dtype is torch.float32
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            foldpar.reduce_gradients(model, groups)
            for name, parameter in model.named_parameters():
                is_alone = layout.edp == 1 and ".experts." in name
                assert (data_axis(parameter) is None) == is_alone, name
                assert parameter.dtype is parameter.grad.dtype is torch.float32
                wanted = shard_of(toys.own(want[name].grad).float(), parameter)
                assert relative(local(parameter.grad), wanted) < 0.03, (stage, name)
                if wanted.numel() and wanted.abs().max() > 0:
                    assert local(parameter.grad).abs().max() > 0


@pytest.mark.parametrize("layout", [solve_layout(4, tp=2, ep=2), solve_layout(4, tp=4, ep=4)], ids=repr)
def test_mixed_precision_tracks_a_bf16_model(layout: foldpar.FoldedLayout) -> None:
    run_ranks(in_mixed_precision, layout.world, layout)


def converted_and_given_back() -> None:
    """Experts that no other rank holds compute in bf16 without FSDP2, in whatever way the forward runs."""
    plain = plain_model().float()
    with create_groups(solve_layout(4, tp=2, ep=4)) as groups:
        tokens = tokens_of(groups.dp_cp.index)
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
        gradients = []
        for recompute in (None, True, False):
            model = toys.fold(plain, groups)
            shard_model(model, groups, stage=3, mixed_precision=policy)
            experts = model.blocks[0].moe.experts
            copies: list[Tensor] = []
            experts.register_forward_pre_hook(lambda module, _, seen=copies: seen.append(module.down_proj))
            if recompute is not None:
                for block in model.blocks:
                    block.forward = partial(checkpoint, block.forward, use_reentrant=recompute)
            if recompute is None:
                with torch.no_grad():
                    model(tokens[:, :-1])
            loss = loss_of(model, tokens)
            assert all(copy.dtype is torch.bfloat16 for copy in copies)
            assert experts.down_proj.dtype is torch.float32
            if recompute is not True:  # which runs its forward without gradients first
                assert local(copies[-1]).untyped_storage().nbytes() == 0
            loss.backward()
            loss_of(model, tokens).backward()
            foldpar.reduce_gradients(model, groups)
            assert experts.down_proj.grad.dtype is torch.float32
            gradients.append([local(parameter.grad) for parameter in model.parameters()])
        for others in gradients[1:]:
            assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))
        with pytest.raises(ShapeError, match="rows_per_expert must be"):
            experts(torch.zeros(1, 1), torch.zeros(1))
        assert experts.down_proj.dtype is torch.float32  # what failed has left nothing


def test_experts_of_one_rank_are_converted_for_each_pass() -> None:
    run_ranks(converted_and_given_back, 4)


def offloaded(layout: foldpar.FoldedLayout, replicas: int) -> None:
    plain = plain_model(bias=True)
    want = plain_gradients(plain, layout.dp, 2)
    with create_groups(layout) as groups:
        for stage in STAGES:
            model = toys.fold(plain, groups)
            shares = Shares(model, groups)
            shard_model(model, groups, stage=stage, replicas=replicas, offload=CPUOffloadPolicy(pin_memory=False))
            micro_batches(model, groups.dp_cp.index, 2, 0.5)
            foldpar.reduce_gradients(model, groups)
            error, name = errors(model, shares, want)
            assert error < 1e-12, name
            foldpar.clip_grad_norm_(model, 1.0, groups)
            torch.optim.AdamW(foldpar.parameter_groups(model)).step()


@pytest.mark.long
def test_offloading_changes_no_number() -> None:
    run_ranks(offloaded, 4, solve_layout(4, tp=2, ep=2), 1)


@pytest.mark.long
def test_offloaded_replicas_of_one_shard_too() -> None:
    run_ranks(offloaded, 4, solve_layout(4, ep=2), 2)


def evaluated_in_between() -> None:
    """A forward without gradients leaves nothing whole, so the next step trains what the last one wrote."""
    plain = plain_model()
    with create_groups(solve_layout(4, tp=2, ep=2)) as groups:
        tokens, losses = tokens_of(groups.dp_cp.index), {}
        for stage in (0, *STAGES):
            model = toys.fold(plain, groups)
            if stage:
                shard_model(model, groups, stage=stage)
            optimizer, losses[stage] = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.5), []
            for _ in range(3):
                loss_of(model, tokens).backward()
                with torch.no_grad():
                    losses[stage].append(float(loss_of(model, tokens)))
                foldpar.reduce_gradients(model, groups)
                foldpar.clip_grad_norm_(model, 1.0, groups)
                with torch.inference_mode():
                    losses[stage].append(float(loss_of(model, tokens)))
                optimizer.step()
                losses[stage].append(float(loss_of(model, tokens).detach()))  # and no backward
                model.zero_grad()
                optimizer.zero_grad()
        assert losses[0][0] > losses[0][-1]
        for stage in STAGES:
            assert losses[stage] == pytest.approx(losses[0], rel=1e-12), stage


@pytest.mark.long
def test_evaluation_in_between_changes_nothing() -> None:
    run_ranks(evaluated_in_between, 4)


def evaluated_first(layout: foldpar.FoldedLayout) -> None:
    """In inference mode, whose tensors FSDP2 would keep, and could not train with."""
    plain = plain_model()
    want = plain_gradients(plain, layout.dp)
    with create_groups(layout) as groups:
        for stage in STAGES:
            model = toys.fold(plain, groups)
            shares = Shares(model, groups)
            shard_model(model, groups, stage=stage)
            tokens = tokens_of(groups.dp_cp.index)
            with torch.inference_mode():
                before = float(loss_of(model, tokens))
            loss = loss_of(model, tokens)
            loss.backward()
            assert float(loss.detach()) == before
            foldpar.reduce_gradients(model, groups)
            error, name = errors(model, shares, want)
            assert error < 1e-12, name


def test_a_model_that_is_evaluated_first_can_be_trained() -> None:
    run_ranks(evaluated_first, 4, solve_layout(4, tp=2, ep=2))


def without_a_layer(prefetch: bool) -> str:
    with create_groups(solve_layout(2, ep=2)) as groups:
        whole = tiny_model("qwen3_moe", dtype=torch.float64)
        model = copy.deepcopy(whole)
        foldpar.fold_model(model, groups)
        shares = Shares(model, groups)
        shard_model(model, groups, stage=3, prefetch=prefetch)
        del model.model.layers[1], whole.model.layers[1]
        tokens = torch.arange(16).view(2, 8)
        try:
            model(input_ids=tokens, labels=tokens).loss.backward()
        except ShardingError as error:
            return str(error)
        foldpar.reduce_gradients(model, groups)
        whole(input_ids=tokens, labels=tokens).loss.backward()
        want = {name: each.grad for name, each in whole.named_parameters() if each.grad is not None}
        return f"{errors(model, shares, want)[0] < 1e-12}"


def test_a_layer_that_was_taken_out_is_not_gathered_ahead() -> None:
    for text in run_ranks(without_a_layer, 2, True):
        assert text.startswith("A part of the model was taken out after shard_model, and FSDP2 would still gather its")
        assert text.endswith("Take it out before, or call shard_model(..., prefetch=False).")
    assert run_ranks(without_a_layer, 2, False) == ["True", "True"]


def gathers_in_order(prefetch: bool) -> list[str]:
    """What is gathered and what runs, in a forward and a backward at stage 3."""
    seen: list[str] = []
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as torch_module

    original = torch_module.foreach_all_gather

    def noting(fsdp_params: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(f"gather {name_of[id(fsdp_params)]}")
        return original(fsdp_params, *args, **kwargs)

    with create_groups(solve_layout(4, tp=2, ep=2)) as groups:
        model = toys.fold(plain_model(), groups)
        shard_model(model, groups, stage=3, prefetch=prefetch)
        name_of = {}
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                for group in foldpar.parameters.fsdp._parameter_groups(module):
                    name_of[id(group.fsdp_params)] = name or "model"
        for index, block in enumerate(model.blocks):
            block.moe.router.register_forward_hook(lambda *args, i=index: seen.append(f"route {i}"))
        torch_module.foreach_all_gather = noting
        try:
            loss = loss_of(model, tokens_of(groups.dp_cp.index))
            seen.append("backward")
            loss.backward()
        finally:
            torch_module.foreach_all_gather = original
    return seen


def test_experts_are_gathered_before_the_router_runs() -> None:
    experts = ["gather blocks.0.moe.experts", "gather blocks.1.moe.experts"]
    ahead = run_ranks(gathers_in_order, 4, True)[0]
    assert ahead == [
        *("gather model", "gather blocks.0", experts[0], "gather blocks.1", "route 0", experts[1], "route 1"),
        *("backward", "gather blocks.1", experts[1], "gather blocks.0", experts[0]),
    ]
    late = run_ranks(gathers_in_order, 4, False)[0]
    assert late.index(experts[0]) > late.index("route 0")


# ---------------------------------------------------------------------------------------------------------------------
# Errors.


def text_of(error: type[Exception], function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


class Mixed(nn.Module):
    def __init__(self, groups: foldpar.FoldedGroups) -> None:
        super().__init__()
        self.router, self.w = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        foldpar.mark_parameters(self, families.ROUTED_EXPERT, names=("w",))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.router @ self.w


def refused() -> None:
    with create_groups(solve_layout(4, tp=2)) as groups:
        plain = plain_model()

        def folded() -> nn.Module:
            return toys.fold(plain, groups)

        def refusal(error: type[Exception], model: nn.Module, **options: Any) -> str:
            text = text_of(error, shard_model, model, groups, **{"stage": 3, **options})
            assert not any(isinstance(module, FSDPModule) for module in model.modules()) or "already" in text
            assert isinstance(error("x"), FoldingError) or error is ValueError
            return text

        for wrong in (0, 4, True, "3"):
            text = refusal(ValueError, folded(), stage=wrong)
            assert f"stage = {wrong!r} is unknown. It can be 1 (shards of optimizer states), 2" in text
            assert "is stage 0, and needs no call" in text
        text = refusal(ShardingError, folded(), replicas=3)
        assert "replicas = 3 does not go into the dp * cp = 2 ranks that the dense parameters are sharded over" in text
        assert "It can be 1, 2, or a multiple of 2, which leaves the dense parameters whole" in text
        text = refusal(ShardingError, folded(), replicas=6)
        assert "replicas = 6 does not go into the edp = 4 ranks that the experts are sharded over" in text
        assert "It can be 1, 2, 4, or a multiple of 4" in text
        text = refusal(ShardingError, folded(), replicas=4)
        assert "replicas = 4 leaves one rank in each replica, of dp * cp = 2 and edp = 4" in text
        for wrong in (0, -1, 1.5, True, "2"):
            assert "replicas must be a positive integer" in refusal(ShapeError, folded(), replicas=wrong)
        assert "4 parameters have no family" in refusal(FamilyError, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))

        twice = folded()
        foldpar.mark_parameters(twice.head, families.REPLICATED)
        shard_model(twice, groups, stage=1)
        text = text_of(ShardingError, shard_model, twice, groups, stage=3)
        assert "The model was sharded by shard_model before. Shard the whole model once" in text
        assert "blocks.0 was sharded" not in text
        text = text_of(ShardingError, foldpar.GradientReducer, twice, groups)
        assert "embedding.weight and" in text
        assert "FSDP2 sums their gradients while backward runs: a GradientReducer would sum them again" in text
        text = text_of(ShardingError, predict_memory, twice, groups.layout, stage=1)
        assert "its shapes are those of shards" in text
        with accumulate(twice):
            loss_of(twice, tokens_of(groups.dp_cp.index)).backward()
        text = text_of(ShardingError, foldpar.reduce_gradients, twice, groups)
        assert "its last backward ran inside 'with accumulate(model):'" in text
        text = text_of(ShardingError, foldpar.reduce_gradients, twice.head, groups)
        assert "weight was sharded over its data axis by shard_model, but is not a shard over dp_cp now" in text
        loss_of(twice, tokens_of(groups.dp_cp.index)).backward()
        foldpar.reduce_gradients(twice, groups)

        by_hand = folded()
        fully_shard(by_hand.blocks[0].dense, mesh=groups.mesh("dense")["dp"])
        text = text_of(ShardingError, shard_model, by_hand, groups, stage=3)
        assert "fully_shard was applied to blocks.0.dense already" in text

        text = refusal(ShardingError, foldpar.mark_parameters(Mixed(groups), families.REPLICATED))
        assert "The model (Mixed) owns the expert parameters w, and holds other parameters too" in text
        bare = nn.ParameterDict({"w": torch.ones(2, 2)})
        bare = nn.ModuleDict({"experts": foldpar.mark_parameters(bare, families.ROUTED_EXPERT)})
        assert "experts (ParameterDict) owns the expert parameters w, and has no forward" in refusal(
            ShardingError, bare
        )

        stranger = refusal(ShardingError, folded(), blocks=[nn.Linear(2, 2)])
        assert "blocks has a Linear that is no module of the model" in stranger
        model = folded()
        assert "which has no forward, before which" in refusal(ShardingError, model, blocks=[model.blocks])
        mixed = folded()
        mixed.blocks[0].dense_norm.float()
        text = refusal(ShardingError, mixed)
        assert "The unit blocks.0 (Block) has trainable parameters of several dtypes" in text
        assert "blocks.0.dense_norm.weight is float32" in text
        tied = folded()
        tied.blocks[1].dense_norm.weight = tied.blocks[0].dense_norm.weight
        text = refusal(ShardingError, tied)
        assert "blocks.0.dense_norm.weight is used in several units: blocks.0 (Block), blocks.1 (Block)" in text
        shard_model(tied, groups, stage=3, blocks=[])  # both uses in one unit
        strided = folded()
        strided.head.weight = nn.Parameter(torch.ones(toys.DIM, toys.VOCABULARY, dtype=torch.float64).t())
        assert "head.weight is not contiguous (strides (1, 12)" in refusal(ShapeError, strided)
        inside = folded()
        inside.blocks[0].moe.experts.inner = nn.Linear(2, 2)
        foldpar.mark_parameters(inside.blocks[0].moe.experts.inner, families.ROUTED_EXPERT)
        text = refusal(ShardingError, inside, blocks=[inside.blocks[0].moe.experts.inner])
        assert "lies in the unit blocks.0.moe.experts.inner (Linear), which is sharded over dp_cp" in text

        copies = folded()
        mesh = groups.mesh("dense")["tp"]
        copies.norm.weight = nn.Parameter(distribute_tensor(copies.norm.weight.detach(), mesh, [Replicate()]))
        foldpar.mark_parameters(copies.norm, families.REPLICATED_PARTIAL)
        text = refusal(FamilyError, copies)
        assert "norm.weight is a DTensor replicated over tp and marked 'replicated_partial'" in text

        drifted = folded()
        shard_model(drifted, groups, stage=3)
        with torch.no_grad():
            drifted.norm.weight.to_local().add_(groups.tp.index)
        text = text_of(ReplicaError, foldpar.check_replicas, drifted, groups)
        assert "norm.weight over tp: ranks 1, 3 differ" in re.sub(r"\s+", " ", text)


def test_errors_teach_and_come_before_anything_is_touched() -> None:
    run_ranks(refused, 4)


OF_ONE_RANK: list[dict[str, Any]] = [
    {"stage": 2},
    {"stage": 4},
    {"replicas": 2},
    {"replicas": 3},
    {"mixed_precision": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    {"offload": CPUOffloadPolicy()},
    {"prefetch": False},
    {"blocks": []},
]


def embedded_alone(ids: Tensor) -> tuple[str, bool]:
    plain = tiny_model("qwen3_moe")
    with create_groups(solve_layout(4, tp=2, ep=2)) as groups:
        model, other = copy.deepcopy(plain), copy.deepcopy(plain)
        for each in (model, other):
            foldpar.fold_model(each, groups)
        shard_model(model, groups, stage=2)
        told = text_of(ShardingError, model.get_input_embeddings(), ids)
        embedding = other.get_input_embeddings()
        shard_model(other, groups, stage=2, blocks=[embedding])
        return told, torch.equal(embedding(ids), plain.get_input_embeddings()(ids))


def test_a_layer_that_is_called_by_itself_does_not_take_a_shard_for_the_whole() -> None:
    """The rows of a data rank's shard are not those of the lane; its own unit puts them together."""
    for told, equal in run_ranks(embedded_alone, 4, torch.arange(4), backend="threads"):
        assert re.match(r"A layer was called by itself while a parameter of it, \[\d+, \d+\], lies in shards", told)
        assert equal


def given_no_policy() -> list[str]:
    with create_groups(solve_layout(2)) as groups:
        wrong: list[dict[str, Any]] = [{"mixed_precision": object()}, {"offload": object()}]
        return [text_of(ArgumentError, shard_model, plain_model(), groups, stage=2, **options) for options in wrong]


def test_what_is_no_policy_is_told_alike_on_every_rank() -> None:
    for precision, offload in run_ranks(given_no_policy, 2, backend="threads"):
        assert "shard_model: mixed_precision must be a MixedPrecisionPolicy or None, and is an object" in precision
        assert "shard_model: offload must be an OffloadPolicy or None, and is an object" in offload


def given_to_one_rank(layout: foldpar.FoldedLayout) -> None:
    with create_groups(layout) as groups:
        for options in OF_ONE_RANK:
            model = toys.fold(plain_model(), groups)
            own = options if groups.rank == 1 else {}
            text = text_of(ReplicaError, shard_model, model, groups, **{"stage": 3, **own})
            assert f"{next(iter(options))}: " in text or "Other ranks that this step meets differ" in text
            assert not any(isinstance(module, FSDPModule) for module in model.modules())


@pytest.mark.parametrize("layout", [solve_layout(2, tp=2, ep=2), solve_layout(4, ep=2)], ids=str)
def test_arguments_of_one_rank_are_told_on_every_rank(layout: foldpar.FoldedLayout) -> None:
    run_ranks(given_to_one_rank, layout.world, layout, backend="threads")


def test_one_rank_needs_no_wrapper() -> None:
    groups = create_groups(solve_layout(1))
    model = nn.Linear(2, 2)
    shard_model(model, groups, stage=3)
    assert type(model) is nn.Linear


def test_a_model_without_parameters_is_nothing_to_shard() -> None:
    with create_groups(solve_layout(1)) as groups:
        shard_model(nn.Sequential(nn.ReLU()), groups, stage=3)
