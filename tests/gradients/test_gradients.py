"""Reduction, norms, clipping and replica checks on real ranks, against sums written out in plain Python.

Gradients are set by hand, a different random one on every rank, so no symmetry of a model can hide a wrong sum.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import foldpar.gradients.reduce
from foldpar import (
    FoldedLayout,
    assert_same_on_group,
    check_replicas,
    clip_grad_norm_,
    create_groups,
    get_total_norm,
    mark_parameters,
    parameter_families,
    reduce_gradients,
    solve_layout,
)
from foldpar.comm import agreement
from foldpar.errors import FamilyError, ReplicaError, ShapeError
from foldpar.families import (
    DENSE_SHARDED,
    EXPERT_BIAS,
    REPLICATED,
    REPLICATED_PARTIAL,
    ROUTED_EXPERT,
    ROUTER_ALL_TOKENS,
    ROUTER_OWN_TOKENS,
    ParameterFamily,
    Reduction,
)
from foldpar.parameters.marks import parameter_groups
from foldpar.parameters.steps import declare_reduced
from foldpar.testing import run_ranks

POST_HOC_EXPERT = ParameterFamily("post_hoc_expert", ("ep", "etp"), ("edp",), Reduction.EXPERT_TP_CANCEL)
UNGUARDED = ParameterFamily("unguarded", (), ("tp", "dp_cp"), Reduction.SKIP)
FAMILIES = {
    family.name: family
    for family in (
        DENSE_SHARDED,
        REPLICATED,
        REPLICATED_PARTIAL,
        ROUTER_OWN_TOKENS,
        ROUTER_ALL_TOKENS,
        ROUTED_EXPERT,
        EXPERT_BIAS,
        POST_HOC_EXPERT,
        UNGUARDED,
    )
}

# Family -> the axes whose coordinates the summed ranks share, and what the sum is divided by
# besides dp * cp.
SUMMED: dict[str, tuple[tuple[str, ...], Callable[[FoldedLayout], int]]] = {
    "dense_sharded": (("pp", "tp"), lambda layout: 1),
    "replicated": (("pp",), lambda layout: layout.tp),
    "replicated_partial": (("pp",), lambda layout: 1),
    "router_own_tokens": (("pp",), lambda layout: 1),
    "router_all_tokens": (("pp",), lambda layout: layout.tp),
    "routed_expert": (("pp", "ep", "etp"), lambda layout: 1),
    "expert_bias": (("pp", "ep"), lambda layout: 1),
    "post_hoc_expert": (("pp", "ep", "etp"), lambda layout: layout.tp),
    "unguarded": (("pp", "tp"), lambda layout: 1),
}

LAYOUTS_OF_FOUR = [
    solve_layout(4, **degrees, order=order)
    for degrees in (
        {"tp": 2, "ep": 4},
        {"tp": 4, "ep": 4},
        {"tp": 2, "ep": 2},
        {"tp": 2, "ep": 2, "etp": 2},
        {"tp": 2, "ep": 1, "etp": 2},
        {"tp": 2, "cp": 2, "ep": 2},
        {"ep": 4},
        {"ep": 2, "cp": 4},
        {"tp": 2, "pp": 2, "ep": 2},
        {"pp": 2, "etp": 2},
        {},
    )
    for order in ("tp-lane-major", "consecutive")
]
EACH_FOLD_ONCE = [*LAYOUTS_OF_FOUR[::4], *LAYOUTS_OF_FOUR[3::4]]
LAYOUTS_OF_THREE = [solve_layout(3, tp=3, ep=3), solve_layout(3, cp=3, etp=3)]

Missing = Callable[[str, int], bool]


def nothing_missing(name: str, rank: int) -> bool:
    return False


def some_missing(name: str, rank: int) -> bool:
    """Parameters 0 have all gradients, 1 on rank 2 only, 2 on odd ranks only, 3 nowhere."""
    number = int(name[-1])
    return (number == 1 and rank != 2) or (number == 2 and rank % 2 == 0) or number == 3


def shape_of(name: str, layout: FoldedLayout, rank: int) -> tuple[int, int]:
    """Shards may be uneven; replicas are of one shape."""
    rows = 2 + int(name[-1])
    if name.startswith("dense_sharded"):
        rows += layout.coordinate(rank).tp
    return rows, 3


def gradient_of(name: str, layout: FoldedLayout, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {rank}".encode()))
    return torch.randn(shape_of(name, layout, rank), generator=generator, dtype=torch.float64)


def toy(layout: FoldedLayout, rank: int, missing: Missing = nothing_missing) -> nn.ParameterDict:
    """Four parameters of each family, with gradients; every other one strided in memory by columns."""
    model = nn.ParameterDict()
    for family_name, family in FAMILIES.items():
        for number in range(4):
            name = f"{family_name}_{number}"
            parameter = nn.Parameter(torch.zeros(shape_of(name, layout, rank), dtype=torch.float64))
            model[name] = mark_parameters(parameter, family)
            if not missing(name, rank):
                grad = gradient_of(name, layout, rank)
                parameter.grad = grad if number % 2 else grad.t().contiguous().t()
    return model


def expected(name: str, layout: FoldedLayout, rank: int, loss: str, missing: Missing) -> Tensor | None:
    """The reduced gradient on a rank, by the table; None where no rank that it is reduced with has one."""
    axes, divisor = SUMMED[name[:-2]]
    own = layout.coordinate(rank)
    together = [
        other
        for other in range(layout.world)
        if all(getattr(layout.coordinate(other), axis) == getattr(own, axis) for axis in axes)
    ]
    parts = [gradient_of(name, layout, other) for other in together if not missing(name, other)]
    owners = layout.dp * layout.cp if loss == "mean" else 1
    return sum(parts) / (owners * divisor(layout)) if parts else None


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm().clamp_min(1e-300))


@contextmanager
def counted_all_reduces(of: Any = foldpar.gradients.reduce) -> Iterator[list[tuple[str, int]]]:
    """The (axis, elements) of every all-reduce over more than one rank."""
    calls: list[tuple[str, int]] = []
    original = of.all_reduce_

    def counting(tensor: Tensor, group: Any, op: str = "sum") -> Tensor:
        if group.size > 1:
            calls.append((group.axis, tensor.numel()))
        return original(tensor, group, op)

    of.all_reduce_ = counting
    try:
        yield calls
    finally:
        of.all_reduce_ = original


@contextmanager
def bucket_bytes(size: int) -> Iterator[None]:
    original = foldpar.gradients.reduce.BUCKET_BYTES
    foldpar.gradients.reduce.BUCKET_BYTES = size
    try:
        yield
    finally:
        foldpar.gradients.reduce.BUCKET_BYTES = original


def text_of(error: type[Exception], function: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# reduce_gradients.


def reduce_all_families(layouts: list[FoldedLayout], bucket: int) -> None:
    for layout in layouts:
        with create_groups(layout) as groups:
            for missing, loss in ((nothing_missing, "mean"), (some_missing, "sum")):
                model = toy(layout, groups.rank, missing)
                with bucket_bytes(bucket):
                    reduce_gradients(model, groups, loss=loss)
                for name, parameter in model.items():
                    wanted = expected(name, layout, groups.rank, loss, missing)
                    if wanted is None:
                        assert parameter.grad is None, (layout, name)
                    else:
                        assert relative(parameter.grad, wanted) < 1e-14, (layout, name, loss)


def test_every_family_is_reduced_by_the_table():
    run_ranks(reduce_all_families, 4, EACH_FOLD_ONCE, 300)


@pytest.mark.long
def test_every_family_is_reduced_by_the_table_in_both_orders():
    run_ranks(reduce_all_families, 4, LAYOUTS_OF_FOUR, 300)


def test_every_family_is_reduced_by_the_table_with_three_lanes():
    for bucket in (1, 2**26):
        run_ranks(reduce_all_families, 3, LAYOUTS_OF_THREE, bucket)


def test_every_family_is_reduced_by_the_table_on_one_rank():
    reduce_all_families([solve_layout(1)], 300)


def reduce_and_count() -> None:
    rank = torch.distributed.get_rank()
    # All lanes, no data parallelism: one collective over the lanes, and experts stay at home.
    layout = solve_layout(4, tp=4, ep=4)
    with create_groups(layout) as groups, counted_all_reduces() as calls:
        reduce_gradients(toy(layout, rank), groups)
    assert [axis for axis, _ in calls] == ["tp"]

    # Two lanes, two data-parallel ranks: lanes travel as one segment, then all of the bucket; edp on its own.
    layout = solve_layout(4, tp=2, ep=2)
    with create_groups(layout) as groups, counted_all_reduces() as calls:
        reduce_gradients(toy(layout, rank), groups)
    assert [axis for axis, _ in calls] == ["tp", "dp_cp", "edp"]
    of_family = sum(shape_of(f"replicated_{number}", layout, rank)[0] * 3 for number in range(4))
    shards = sum(shape_of(f"dense_sharded_{number}", layout, rank)[0] * 3 for number in range(4))
    assert calls[0][1] == 4 * (of_family + 4)
    assert calls[1][1] == calls[0][1] + shards + of_family + 2 * 4

    # Nothing to reduce with anybody.
    layout = solve_layout(4, pp=4)
    with create_groups(layout) as groups, counted_all_reduces() as calls:
        reduce_gradients(toy(layout, rank), groups)
    assert calls == []


def test_gradients_travel_in_few_collectives():
    run_ranks(reduce_and_count, 4)


def reduce_in_float32() -> None:
    rank = torch.distributed.get_rank()
    with create_groups(solve_layout(4, tp=2, ep=4)) as groups:
        for family in (REPLICATED, REPLICATED_PARTIAL):
            for missing in (False, True):
                model = nn.ParameterDict(
                    {name: torch.zeros(257, dtype=torch.bfloat16) for name in ("here", "lonely", "unused")}
                )
                mark_parameters(model, family)
                parts = [gradient_of("mixed_0", groups.layout, other).flatten().repeat(43)[:257] for other in range(4)]
                parts = [part.bfloat16() for part in parts]
                model["here"].grad = parts[rank].clone()
                if rank == 3 or not missing:
                    model["lonely"].grad = parts[rank].clone()
                reduce_gradients(model, groups, reduce_dtype=torch.float32)
                tp = 2 if family is REPLICATED else 1
                # Few bf16 summands and halves are exact in fp32, so all rounding is the one back to bf16.
                exact = sum(part.double() for part in parts) / (2 * tp)
                assert torch.equal(model["here"].grad, exact.bfloat16())
                alone = parts[3].double() / (2 * tp) if missing else exact
                assert torch.equal(model["lonely"].grad, alone.bfloat16())
                assert model["unused"].grad is None
                # In bf16 throughout, flags of many ranks must still be found.
                for parameter in model.values():
                    parameter.grad = None
                if rank == 1:
                    model["lonely"].grad = parts[1].clone()
                reduce_gradients(model, groups)
                torch.testing.assert_close(model["lonely"].grad, parts[1] / (2 * tp), rtol=2**-7, atol=0)
                assert model["lonely"].grad.dtype is torch.bfloat16
                assert model["unused"].grad is None
        with counted_all_reduces() as calls:
            mixed = nn.ParameterDict({"narrow": torch.zeros(2, dtype=torch.bfloat16), "wide": torch.zeros(3)})
            for reduce_dtype in (None, torch.float32):
                for parameter in mark_parameters(mixed, REPLICATED).values():
                    parameter.grad = torch.ones_like(parameter)
                reduce_gradients(mixed, groups, reduce_dtype=reduce_dtype)
        assert [elements for _, elements in calls] == [3, 3, 4, 4, 7, 7]


def test_bf16_gradients_reduced_in_float32_round_once():
    run_ranks(reduce_in_float32, 4)


def reduce_accumulated() -> None:
    """Gradients of two micro-batches, reduced once, are the gradient of both; frozen parameters are left alone."""
    torch.manual_seed(0)
    with create_groups(solve_layout(4, tp=2, ep=4)) as groups:
        model = mark_parameters(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), REPLICATED).double()
        model[0].bias.requires_grad_(False)
        model[0].bias.grad = torch.full((4,), 7.0, dtype=torch.float64)
        batches = torch.randn(2, 2, 5, 3, dtype=torch.float64)  # [micro-batch, dp, tokens, dim]
        for batch in batches[:, groups.dp.index]:
            model(batch).square().mean().backward()
        reduce_gradients(model, groups)
        assert (model[0].bias.grad == 7).all()
        wanted = torch.autograd.grad(
            model(batches).square().mean((2, 3)).mean(1).sum(), [model[0].weight, *model[1].parameters()]
        )
        for parameter, grad in zip([model[0].weight, *model[1].parameters()], wanted, strict=True):
            assert relative(parameter.grad, grad) < 1e-14


def test_accumulated_gradients_are_reduced_once_and_frozen_ones_never():
    run_ranks(reduce_accumulated, 4)


def reduce_to_its_own_dtype() -> None:
    """A rank without a gradient receives one in the dtype that the parameter wants it in."""
    with create_groups(solve_layout(2)) as groups:
        model = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
        torch.nn.init.ones_(model.weight)
        model.weight.grad_dtype = torch.float32
        if groups.rank == 1:
            model.weight.grad = torch.full((1, 2), 1 + 2.0**-12)
        reduce_gradients(model, groups, loss="sum")
        assert model.weight.grad.dtype is torch.float32
        assert model.weight.grad.tolist() == [[1 + 2.0**-12] * 2]


def test_a_gradient_wider_than_its_parameter_is_received():
    run_ranks(reduce_to_its_own_dtype, 2, backend="threads")


def test_wrong_arguments_of_reduce_gradients_teach():
    groups = create_groups(solve_layout(1))
    with pytest.raises(ValueError, match="loss = 'total' is unknown: it can be 'mean'"):
        reduce_gradients(nn.Module(), groups, loss="total")
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ShapeError, match=r"gradient of weight is sparse.* build the embedding with sparse=False"):
        reduce_gradients(embedding, groups)


# ---------------------------------------------------------------------------------------------------------------------
# DTensor.


class Block(nn.Module):
    """A residual MLP that torch shards over tp, between a norm and a head that are plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


def new_block() -> Block:
    torch.manual_seed(3)
    return Block().double()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_dtensor_block(layout: FoldedLayout) -> None:
    data = torch.randn(layout.dp, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    reference = new_block()
    reference(data).square().mean().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}
    norm_before = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)

    with create_groups(layout) as groups:
        model = mark_parameters(new_block(), REPLICATED)
        parallelize_module(model, groups.mesh("dense")["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        families = parameter_families(model, groups)
        assert {name for name, family in families.items() if family is DENSE_SHARDED} == {
            "up.weight",
            "up.bias",
            "down.weight",
        }
        apart = [(group["family"], len(group["params"])) for group in parameter_groups(model)]
        assert apart == [("replicated", 4), ("dense_sharded", 3), ("replicated", 1)]
        model(data[groups.dp.index]).square().mean().backward()
        reduce_gradients(model, groups)
        for name, parameter in model.named_parameters():
            assert relative(whole(parameter.grad), wanted[name]) < 1e-13, name
        norm = clip_grad_norm_(model, 0.1, groups)
        assert relative(norm, norm_before) < 1e-13
        for name, parameter in model.named_parameters():
            assert relative(whole(parameter.grad), dict(reference.named_parameters())[name].grad) < 1e-12, name
        torch.optim.SGD(parameter_groups(model), lr=0.1).step()
        check_replicas(model, groups)


def reduce_declared_dtensors() -> None:
    rank = torch.distributed.get_rank()
    with create_groups(solve_layout(4, tp=2, ep=4)) as groups:
        mesh = groups.mesh("dense")["tp"]
        parts = [gradient_of("mixed_0", groups.layout, other) for other in range(4)]

        def replicated(family: ParameterFamily, placement: Any, drop: tuple[int, ...] = ()) -> nn.ParameterDict:
            zeros = torch.zeros(2, 3, dtype=torch.float64)
            model = nn.ParameterDict({"w": nn.Parameter(distribute_tensor(zeros, mesh, [Replicate()]))})
            if rank not in drop:
                local = parts[rank][: 1 if isinstance(placement, Shard) else 2].clone()
                model["w"].grad = DTensor.from_local(local, mesh, [placement], run_check=False)
            return mark_parameters(model, family)

        def reduced(*args: Any) -> Tensor:
            model = replicated(*args)
            if "P" in str(args[1]):
                text = text_of(FamilyError, get_total_norm, model, groups) if rank not in (args[2:] or [()])[0] else ""
                assert not text or "w is a DTensor that is still partial over mesh dimension 'tp'" in text
            reduce_gradients(model, groups)
            assert model["w"].grad.placements == (Replicate(),)
            get_total_norm(model, groups)
            return model["w"].grad.to_local()

        total = sum(parts) / 2
        assert relative(reduced(REPLICATED_PARTIAL, Replicate()), total) < 1e-15
        assert relative(reduced(REPLICATED, Replicate()), total / 2) < 1e-15
        assert relative(reduced(REPLICATED, Partial("avg")), total / 2) < 1e-15
        for family in (REPLICATED, REPLICATED_PARTIAL, UNGUARDED):  # a partial gradient declares its state
            assert relative(reduced(family, Partial()), total) < 1e-15
            assert relative(reduced(family, Partial(), (0, 1)), (parts[2] + parts[3]) / 2) < 1e-15

        # A mark against a placement.
        sharded = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
        model = nn.ModuleDict({"layer": nn.Linear(3, 4, bias=False)})
        model["layer"].weight = nn.Parameter(sharded)
        assert parameter_families(model, groups) == {"layer.weight": DENSE_SHARDED}  # no mark needed
        assert parameter_families(mark_parameters(model, REPLICATED), groups) == {"layer.weight": DENSE_SHARDED}
        mark_parameters(model["layer"], REPLICATED)
        text = text_of(FamilyError, parameter_families, model, groups)
        assert f"layer.weight is a DTensor sharded over mesh dimension 'tp', ranks {groups.tp.ranks}, but its" in text
        text = text_of(FamilyError, parameter_families, replicated(DENSE_SHARDED, Replicate()), groups)
        assert "w is a DTensor replicated over mesh dimension 'tp'" in text
        assert "counted once per lane" in text
        # A gradient in other shards than its parameter is one global tensor all the same.
        rows = [torch.cat([parts[rank][:1] for rank in lanes]) for lanes in ((0, 1), (2, 3))]
        for family in (REPLICATED, REPLICATED_PARTIAL):
            assert relative(reduced(family, Shard(0)), sum(rows) / 2) < 1e-15

        # Sharded over data-parallel ranks: somebody else's business.
        by_fsdp = nn.ParameterDict(
            {"w": nn.Parameter(distribute_tensor(torch.zeros(4), groups.mesh("dense")["dp"], [Shard(0)]))}
        )
        text = text_of(FamilyError, parameter_families, mark_parameters(by_fsdp, REPLICATED), groups)
        assert "such as FSDP2 shards a parameter over data-parallel ranks" in text

        # A mesh of another layout.
        other = torch.distributed.device_mesh.DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp"))
        alien = nn.ParameterDict({"w": nn.Parameter(distribute_tensor(torch.zeros(4), other["tp"], [Shard(0)]))})
        text = text_of(FamilyError, parameter_families, alien, groups)
        assert "Build the mesh with groups.mesh('dense')['tp']" in text


@pytest.mark.parametrize("layout", [solve_layout(4, tp=2, ep=4), solve_layout(4, tp=4, ep=4)], ids=repr)
def test_a_dtensor_block_equals_one_process(layout):
    run_ranks(train_dtensor_block, 4, layout)


def test_dtensor_placements_decide_and_contradictions_are_errors():
    run_ranks(reduce_declared_dtensors, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Norms.

ORDERS_OF_NORM = (0.5, 1.0, 2.0, 3.0, math.inf)


def norms_and_gradients(layout: FoldedLayout) -> tuple[dict[float, Tensor], dict[str, Tensor]]:
    with create_groups(layout) as groups:
        model = toy(layout, groups.rank, some_missing)
        reduce_gradients(model, groups)
        for name in model:
            if name.startswith("unguarded"):
                model[name].grad = None  # it differs between lanes that should be equal, so its norm has no meaning
        norms = {order: get_total_norm(model, groups, norm_type=order) for order in ORDERS_OF_NORM}
        gradients = {name: parameter.grad.clone() for name, parameter in model.items() if parameter.grad is not None}

        before = clip_grad_norm_(model, 0.5, groups)
        assert torch.equal(before, norms[2.0])
        assert float(get_total_norm(model, groups)) == pytest.approx(0.5, rel=1e-5)
        assert torch.equal(clip_grad_norm_(model, 100.0, groups), get_total_norm(model, groups))
        for name, gradient in gradients.items():
            assert relative(model[name].grad, gradient * (0.5 / (norms[2.0] + 1e-6))) < 1e-12
        return norms, gradients


@pytest.mark.parametrize("layout", LAYOUTS_OF_FOUR, ids=repr)
def test_a_norm_counts_every_logical_element_once(layout):
    results = run_ranks(norms_and_gradients, layout.world, layout)
    distinct = {}
    for rank, (_, gradients) in enumerate(results):
        place = layout.coordinate(rank)
        for name, gradient in gradients.items():
            shards = tuple(getattr(place, axis) for axis in ("pp", *FAMILIES[name[:-2]].shard_axes))
            distinct[name, shards] = gradient.flatten()
    for order in ORDERS_OF_NORM:
        wanted = torch.linalg.vector_norm(torch.cat(list(distinct.values())), order)
        for norms, _ in results:
            assert torch.equal(norms[order], results[0][0][order])
            assert norms[order].dtype is torch.float64
            assert relative(norms[order], wanted) < 1e-13


def norms_of_few() -> None:
    rank = torch.distributed.get_rank()
    with create_groups(solve_layout(4, tp=2, ep=4)) as groups:
        model = mark_parameters(nn.ParameterDict({"w": torch.zeros(2), "b": torch.zeros(0)}), ROUTED_EXPERT)
        for order in ORDERS_OF_NORM:
            assert get_total_norm(model, groups, norm_type=order).item() == 0
        assert clip_grad_norm_(model, 1.0, groups).item() == 0
        if rank == 1:  # an expert's gradient on one rank only
            model["w"].grad = torch.tensor([3.0, 4.0])
            model["b"].grad = torch.zeros(0)
        assert get_total_norm(model, groups).item() == 5
        assert get_total_norm(model, groups, norm_type=math.inf).item() == 4
        assert get_total_norm(model, groups).dtype is torch.float32

        model.to(torch.bfloat16)
        if rank == 1:  # in bf16 the squares would round, and in fp16 overflow
            model["w"].grad = torch.full((2,), 257.0, dtype=torch.bfloat16)
            assert relative(get_total_norm(model, groups), (model["w"].grad.double().norm())) < 1e-6
            model["w"].grad = torch.tensor([math.inf, 1.0], dtype=torch.bfloat16)
        else:
            get_total_norm(model, groups)
        declare_reduced(model)
        text = text_of(RuntimeError, clip_grad_norm_, model, 1.0, groups, error_if_nonfinite=True)
        assert "The gradient norm of order 2.0 is inf" in text
        if rank == 1:
            assert model["w"].grad[1] == 1
        assert clip_grad_norm_(model, 1.0, groups).isinf()
        for wrong in (0, -1.0, math.nan):
            assert "must be a positive number or infinity" in text_of(
                ValueError, get_total_norm, model, groups, norm_type=wrong
            )


def test_norms_of_few_empty_and_infinite_gradients():
    run_ranks(norms_of_few, 4)


def test_one_process_agrees_with_torch():
    groups = create_groups(solve_layout(1))
    for order in ORDERS_OF_NORM:
        ours, theirs = new_block(), new_block()
        for model in (ours, theirs):
            model(torch.ones(3, 6, dtype=torch.float64)).square().sum().backward()
        reduce_gradients(ours, groups)
        norm = clip_grad_norm_(ours, 0.1, groups, norm_type=order)
        assert relative(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.1, order)) < 1e-14
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert relative(mine.grad, other.grad) < 1e-13
    assert get_total_norm(nn.Module(), groups).item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# check_replicas.


def drift(layout: FoldedLayout, changed: Mapping[int, tuple[str, ...]]) -> str:
    """The error on this rank after some ranks changed one entry of some parameters; empty where there was none."""
    with create_groups(layout) as groups:
        model = toy(layout, groups.rank)
        with torch.no_grad():
            for parameter in model.values():
                parameter[0, 1] = math.nan
            for name in changed.get(groups.rank, ()):
                model[name][-1, -1] = 1e-300
        try:
            check_replicas(model, groups)
        except ReplicaError as error:
            return str(error)
        return ""


def test_replicas_that_are_equal_pass_nan_included():
    for layout in (*LAYOUTS_OF_FOUR[::2], solve_layout(4, pp=4)):
        assert run_ranks(drift, 4, layout, {}) == [""] * 4


@pytest.mark.parametrize(
    ("layout", "changed", "lines"),
    [
        # rank 1 is lane 1 of TP group (0, 1); over dp_cp, rank 3 differs from the first, rank 1
        (
            solve_layout(4, tp=2, ep=4),
            {1: ("replicated_1",)},
            [
                "replicated_1 over dp_cp: rank 3 differs from the first rank of its group",
                "replicated_1 over tp: rank 1 differs from the first rank of its group",
            ],
        ),
        (
            solve_layout(4, tp=4, ep=4),
            {1: ("unguarded_2",), 3: ("unguarded_2",)},
            ["unguarded_2 over tp: ranks 1, 3 differ from the first rank of their group"],
        ),
        # edp groups (0, 1) and (2, 3): expert replicas across the lanes
        (
            solve_layout(4, tp=2, ep=2),
            {3: ("routed_expert_0",)},
            ["routed_expert_0 over edp: rank 3 differs from the first rank of its group"],
        ),
        (
            # etp groups (0, 2) and (1, 3); the changed expert has no replica
            solve_layout(4, tp=2, ep=2, etp=2),
            {3: ("expert_bias_3", "routed_expert_0")},
            ["expert_bias_3 over etp: rank 3 differs from the first rank of its group"],
        ),
    ],
)
def test_a_replica_that_drifted_is_named_on_every_rank(layout, changed, lines):
    texts = run_ranks(drift, 4, layout, changed)
    assert len(set(texts)) == 1
    assert "1 parameter differs between replicas:\n" in texts[0]
    assert re.findall(r"^    (.*)$", texts[0], re.MULTILINE) == lines
    assert "parameter_families(model, groups)" in texts[0]


def test_ranks_of_other_stages_raise_too():
    texts = run_ranks(drift, 4, solve_layout(4, pp=2, tp=2), {3: ("replicated_0", "replicated_2")})
    assert "Replicas differ in pipeline stage 1, whose ranks name the parameters. This rank is of stage 0" in texts[0]
    assert texts[0] == texts[1]
    assert "2 parameters differ between replicas:" in texts[2]
    assert texts[2] == texts[3]


def drift_of_models() -> str:
    with create_groups(solve_layout(4, tp=2)) as groups:
        model = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(2)})
        if groups.rank == 3:
            model["c"] = torch.zeros(2)
        return text_of(ReplicaError, check_replicas, mark_parameters(model, REPLICATED), groups)


def test_ranks_with_different_parameters_do_not_hang():
    texts = run_ranks(drift_of_models, 4)
    assert len(set(texts)) == 1
    assert "Ranks of one stage have different parameters" in texts[0]
    assert "over tp: rank 3 differs" in texts[0]


def test_a_digest_sees_what_sums_overlook():
    digest = agreement.digest
    tensor = torch.randn(5, 7, dtype=torch.float64)
    seen = {int(digest(tensor))}
    two_signs = tensor.clone()
    two_signs[1, 2] *= -1
    two_signs[3, 3] *= -1
    for other in (two_signs, tensor.flip(0), tensor.t().contiguous(), -tensor, tensor.view(7, 5), tensor.float()):
        seen.add(int(digest(other)))
    assert len(seen) == 7
    assert digest(tensor) == digest(tensor.t().contiguous().t())
    kinds = (torch.bool, torch.uint8, torch.int32, torch.bfloat16, torch.complex64, torch.complex128)
    assert len({int(digest(torch.ones(3).to(kind))) for kind in kinds}) == len(kinds)
    assert digest(torch.zeros(0)) != digest(torch.zeros(1))
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))


# ---------------------------------------------------------------------------------------------------------------------
# assert_same_on_group.


def same_on_group() -> None:
    rank = torch.distributed.get_rank()
    with create_groups(solve_layout(4, tp=2, ep=4)) as groups:
        same = {
            "ids": torch.arange(6).view(3, 2),
            "weights": torch.tensor([math.nan, -0.0, math.inf]),
            "mask": torch.tensor([True, False]),
            "none": torch.zeros(0, 2),
            "half": torch.ones(3, 2, dtype=torch.bfloat16).t(),
            "scalar": torch.tensor(3),
        }
        for group in (groups.tp, groups.ep, groups.dp):
            assert_same_on_group(same, group)
            assert_same_on_group(dict(reversed(same.items())) if rank == 1 else same, group)
            for tensor in same.values():
                assert_same_on_group(tensor, group)

        # ep has the ranks (0, 2, 1, 3); ranks 1 (ep 2) and 3 (ep 3) differ from rank 0
        ids = torch.arange(6).view(3, 2)
        if rank % 2:
            ids[2, 1] = 50 + rank
            ids[0, 1] = 70
        text = text_of(ReplicaError, assert_same_on_group, {**same, "ids": ids}, groups.ep, what="routing of layer 3")
        assert text == (
            "routing of layer 3 differs over ep:\n"
            "    field 'ids' at [0, 1]: 70 on rank 1 (ep 2), 1 on rank 0 (ep 0); "
            "[2, 1]: 51 on rank 1 (ep 2), 5 on rank 0 (ep 0)\n"
            "    field 'ids' at [0, 1]: 70 on rank 3 (ep 3), 1 on rank 0 (ep 0); "
            "[2, 1]: 53 on rank 3 (ep 3), 5 on rank 0 (ep 0)"
        )

        first = groups.tp.ranks[0]
        text = text_of(ReplicaError, assert_same_on_group, torch.zeros(2 + rank % 2), groups.tp)
        assert text == (
            f"tensor differs over tp:\n    float32 [3] on rank {first + 1} (tp 1), float32 [2] on rank {first} (tp 0)"
        )
        wrong = torch.zeros(2, dtype=torch.float64 if rank % 2 else torch.float32)
        text = text_of(ReplicaError, assert_same_on_group, {"w": wrong}, groups.tp)
        assert f"field 'w' float64 [2] on rank {first + 1} (tp 1), float32 [2] on rank {first} (tp 0)" in text
        text = text_of(ReplicaError, assert_same_on_group, {"wé" if rank % 2 else "v": wrong[:1]}, groups.tp)
        assert f"field 'v' missing on rank {first + 1} (tp 1), float32 [1] on rank {first} (tp 0)" in text
        assert f"field 'wé' float64 [1] on rank {first + 1} (tp 1), missing on rank {first} (tp 0)" in text
        text = text_of(ReplicaError, assert_same_on_group, {"w": wrong} if rank % 2 else {}, groups.tp)
        assert f"field 'w' float64 [2] on rank {first + 1} (tp 1), missing on rank {first} (tp 0)" in text

        # Beyond the first chunk, and bits that print alike; all else equal.
        large = torch.zeros(agreement._CHUNK + 9, dtype=torch.bfloat16)
        large[-2] = -0.0 if rank % 2 else 0.0
        text = text_of(ReplicaError, assert_same_on_group, large, groups.tp)
        assert f"at [{large.numel() - 2}]: -0.0 on rank {first + 1} (tp 1), 0.0 on rank {first} (tp 0)" in text
        quiet = torch.tensor([math.nan]).view(torch.int32) + rank % 2
        assert "nan on rank" in text_of(ReplicaError, assert_same_on_group, quiet.view(torch.float32), groups.tp)
        truth = torch.tensor([False, rank % 2 == 1])
        assert "at [1]: True on rank" in text_of(ReplicaError, assert_same_on_group, truth, groups.tp)
        scalar = torch.tensor(1j * (rank % 2), dtype=torch.complex128)
        assert "at []: 1j on rank" in text_of(ReplicaError, assert_same_on_group, scalar, groups.tp)
        assert_same_on_group(torch.tensor(rank), groups.edp)  # a group of one agrees with itself


def test_differences_are_named_on_every_rank_of_the_group():
    run_ranks(same_on_group, 4)
