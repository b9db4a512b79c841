"""Plans: what they propose is refused by nobody, what they leave out is, and the numbers keep their laws."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from dataclasses import replace
from itertools import product
from math import comb, isclose, prod
from textwrap import dedent
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from hf_models import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import MixedPrecisionPolicy

import foldpar
from foldpar import OneSided, cli
from foldpar.comm import AxisGroup, peers
from foldpar.comm.peers import DeviceMemories
from foldpar.errors import FoldingError, LayoutError, ModelError, ShapeError
from foldpar.moe.transport import messages, one_sided
from foldpar.moe.transport.one_sided import RowExchange
from foldpar.planning import (
    HostCost,
    LatentAttention,
    Machine,
    ModelShape,
    PlanError,
    Seconds,
    Workload,
    plan,
    read_machine,
    read_model,
)
from foldpar.planning.folds import (
    Recompute,
    Transport,
    broken_rule,
    folds,
    layouts,
    node_span,
    rules_of_stage,
    transports,
)
from foldpar.planning.formulas import (
    MOST_LISTED,
    UNASKED,
    distinct_ranks,
    in_flight,
    most_rows,
    one_sided_room,
    product_seconds,
    routed_rows,
    shared_bytes,
)
from foldpar.planning.memory import MemoryModel, pipeline_stages
from foldpar.planning.timing import TimeModel
from foldpar.testing import run_ranks

QWEN3_30B = ModelShape(
    name="qwen3-30b", hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128, vocab=151936,
    experts=128, top_k=8, expert_hidden=768, qk_norm=True,
)  # fmt: skip
MIXTRAL_8X22B = ModelShape(
    name="mixtral-8x22b", hidden=6144, layers=56, heads=48, kv_heads=8, vocab=32768, experts=8, top_k=2,
    expert_hidden=16384,
)  # fmt: skip
QWEN2_57B = ModelShape(
    name="qwen2-57b-a14b", hidden=3584, layers=28, heads=28, kv_heads=4, vocab=151936, experts=64, top_k=8,
    expert_hidden=2560, shared_hidden=20480, shared_gate=True, qkv_bias=True,
)  # fmt: skip
DEEPSEEK_V3 = ModelShape(
    name="deepseek-v3", hidden=7168, layers=61, heads=128, vocab=129280, intermediate=18432, experts=256, top_k=8,
    expert_hidden=2048, shared_hidden=2048, dense_layers=(0, 1, 2), latent=LatentAttention(1536, 512, 128, 64, 128),
    shared_name="shared_experts",
)  # fmt: skip
GPT_OSS_120B = ModelShape(
    name="gpt-oss-120b", hidden=2880, layers=36, heads=64, kv_heads=8, head_dim=64, vocab=201088, experts=128, top_k=4,
    expert_hidden=2880, qkv_bias=True, out_bias=True, sinks=True, expert_bias=True, router_bias=True, transposed=True,
    embedding_whole=True, router_name="router",
)  # fmt: skip
LLAMA_8B = ModelShape(name="llama-8b", hidden=4096, layers=32, heads=32, kv_heads=8, vocab=128256, intermediate=14336)
TIED = replace(LLAMA_8B, name="tied", tied=True)
MODELS = [QWEN3_30B, MIXTRAL_8X22B, QWEN2_57B, DEEPSEEK_V3, GPT_OSS_120B, LLAMA_8B, TIED]
SMALL = {"gpus": 4, "tokens": 64, "batch": 8}
TINY = ModelShape(hidden=64, layers=2, heads=4, vocab=64, experts=4, top_k=2, expert_hidden=32)
H100 = read_machine("h100")


# -- Nobody refuses what is proposed, and what is left out is refused ------------------------------------------------


FAMILIES_TRIED = ["qwen2_moe", "deepseek_v3", *(pytest.param(name, marks=pytest.mark.long) for name in (
    "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"))]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES_TRIED)
def test_a_fold_is_kept_exactly_where_plan_fold_takes_it(name):
    with torch.device("meta"):
        model = FAMILIES[name].make(num_attention_heads=6, num_key_value_heads=6 if name == "deepseek_v3" else 3)
    shape = read_model(model.config.to_dict())
    work, seen = Workload(tokens=48, batch=48), set()
    for degrees in folds(12):
        kept = broken_rule(shape, 12, degrees, work) is None
        key = (degrees["tp"], degrees["ep"], degrees["etp"])
        if key in seen or degrees["pp"] > 1:
            continue
        seen.add(key)
        try:
            foldpar.plan_fold(model, foldpar.solve_layout(12, **degrees))
        except (ModelError, ShapeError):
            assert not kept, f"{degrees} is proposed and refused"
        else:
            assert kept, f"{degrees} is left out and possible"


def _take(name: str, numbers: dict[str, int], rows: list[tuple[foldpar.FoldedLayout, int, bool]]) -> int:
    """Fold and shard the model in every way of the rows, on the meta device; raises where something is refused."""
    for layout, stage, mixed in rows:
        with foldpar.create_groups(layout) as groups:
            with _BUILDING, torch.device("meta"):
                model = FAMILIES[name].make(**numbers)
            foldpar.fold_model(model, groups, check=False)
            if stage:
                precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
                foldpar.shard_model(model, groups, stage=stage, mixed_precision=precision)
    return len(rows)


_BUILDING = threading.Lock()


def _refused_by_nobody(data, gpus: int) -> None:
    name = data.draw(st.sampled_from(["qwen2_moe", "qwen3_moe", "mixtral"]), label="family")
    heads = data.draw(st.sampled_from([2, 3, 4, 6]), label="heads")
    keys = data.draw(st.sampled_from([each for each in (1, 2, 3, 4) if heads % each == 0]), label="kv heads")
    numbers = {"num_attention_heads": heads, "num_key_value_heads": keys}
    precision = data.draw(st.sampled_from(["mixed", "float32"]), label="precision")
    with torch.device("meta"):
        shape = read_model(FAMILIES[name].make(**numbers).config.to_dict())
    stage = data.draw(st.sampled_from([None, 1, 2, 3]), label="stage")
    found = plan(shape, gpus=gpus, tokens=16, batch=12, precision=precision, pp=1, cp=1, stage=stage, best=99)
    rows = {(row.layout, row.stage, precision == "mixed"): None for row in (*found.rows, *found.pareto)}
    if rows:
        assert run_ranks(_take, gpus, name, numbers, list(rows), backend="threads") == [len(rows)] * gpus


@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
@settings(max_examples=3, deadline=None)
def test_what_is_proposed_is_refused_by_nobody(data):
    """Neither by ``solve_layout`` nor by ``fold_model`` nor by ``shard_model``: they are called."""
    _refused_by_nobody(data, 2)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@given(data=st.data(), gpus=st.sampled_from([3, 4, 6]))
@settings(max_examples=15, deadline=None)
def test_what_is_proposed_for_more_ranks_is_refused_by_nobody(data, gpus):
    _refused_by_nobody(data, gpus)


@given(world=st.integers(1, 96))
@settings(max_examples=30, deadline=None)
def test_all_folds_are_layouts_and_all_layouts_are_folds(world):
    found = [tuple(degrees.values()) for degrees in folds(world)]
    assert len(found) == len(set(found))
    for degrees in folds(world):
        for layout in layouts(world, degrees):
            assert layout == foldpar.solve_layout(world, **degrees, order=layout.order)
    for tp, ep in ((tp, ep) for tp in (1, 2, 3) for ep in (1, 4, 5)):
        try:
            layout = foldpar.solve_layout(world, tp=tp, ep=ep)
        except LayoutError:
            continue
        assert (tp, 1, 1, ep, 1) in found


def test_cross_lane_folds_are_among_the_candidates():
    assert plan(TINY, **SMALL, tp=4, ep=4).best.layout.edp == 1


def _paste(name: str, lines: str) -> float:
    """Run the lines that a plan has for a model, and a step."""
    with _BUILDING:
        torch.manual_seed(0)
        names = {"model": FAMILIES[name].make().train()}
    exec(lines, names)
    ids = torch.arange(16)[None] % 50
    loss = names["model"](input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    names["groups"].destroy()
    return loss.item()


@pytest.mark.filterwarnings("ignore")
def test_the_lines_that_set_a_plan_up_run_as_they_are_pasted():
    with torch.device("meta"):
        shape = read_model(FAMILIES["deepseek_v3"].make().config.to_dict())
    degrees, losses = {"tp": 2, "ep": 2, "pp": 1, "cp": 1, "transport": "messages"}, []
    for again, precision, stage in (("none", "float32", 0), ("experts", "mixed", 3), ("full", "mixed", 1)):
        found = plan(shape, **SMALL, **degrees, recompute=again, precision=precision, stage=stage)
        losses += run_ranks(_paste, 4, "deepseek_v3", dedent(found.commands()), backend="threads")
    assert losses == pytest.approx([losses[0]] * 12, rel=1e-3)


# -- Bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_held_bytes_of_all_ranks_add_up_to_the_model(shape):
    """At stage 3, with shards of exactly equal size: weights that lanes repeat count once for each lane."""
    layout = foldpar.solve_layout(16, tp=2, ep=min(4, shape.experts or 1))
    model = MemoryModel(shape, Workload(tokens=64, batch=16))
    (pipeline,) = pipeline_stages(shape, 1)
    held = model.held(layout, pipeline)
    lanes = {weight: layout.tp * prod(weight.local_shape(layout)) / weight.numel for weight in shape.weights()}
    dense = sum(lanes[each] * each.numel for each in shape.weights() if not each.expert)
    experts = sum(each.numel for each in shape.weights() if each.expert)
    assert held.dense * layout.tp == dense
    assert held.expert * layout.ep * layout.etp == experts
    assert dense <= held.dense_shard * layout.world < 1.01 * dense  # chunks are rounded up
    assert held.expert_shard * layout.world == experts, "where data ranks do not divide them, widths are divided"


@pytest.mark.parametrize("precision", ["bfloat16", "mixed", "float32"])
def test_what_is_held_falls_with_the_stage_and_the_peak_with_recomputation(precision):
    layout = foldpar.solve_layout(16, tp=2, ep=4)
    model = MemoryModel(QWEN3_30B, Workload(tokens=4096, batch=64, precision=precision))
    first = 1 if precision == "mixed" else 0
    at = {
        (stage, again): model.of(layout, stage=stage, recompute=again, transport="messages", micro=2)
        for stage in range(first, 4)
        for again in ("none", "experts", "full")
    }
    for again in ("none", "experts", "full"):
        held = [at[stage, again].parameters + at[stage, again].gathered for stage in range(max(first, 1), 4)]
        assert held == sorted(held, reverse=True)
        states = [at[stage, again].optimizer for stage in range(first, 4)]
        assert states == sorted(states, reverse=True)
    for stage in range(first, 4):
        peaks = [at[stage, again].peak for again in ("none", "experts", "full")]
        assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_no_more_is_gathered_than_there_is(layers):
    """At stage 3 one block and the next one are whole, of a model that may have no next one."""
    model = MemoryModel(replace(QWEN3_30B, layers=layers), Workload(tokens=512, batch=64))
    two, three = (
        model.of(foldpar.solve_layout(8, ep=4), stage=stage, recompute="none", transport="messages", micro=1)
        for stage in (2, 3)
    )
    assert three.gathered <= two.gathered
    assert three.peak <= two.peak


def test_held_bytes_are_those_of_predict_memory():
    with torch.device("meta"):
        model = FAMILIES["qwen3_moe"].make(hidden_size=32, num_hidden_layers=3)
    shape, work = read_model(model.config.to_dict()), Workload(tokens=32, batch=16, precision="float32")
    for degrees in ({"tp": 2, "ep": 4}, {"tp": 2, "ep": 2, "etp": 2}, {"ep": 2}):
        layout = foldpar.solve_layout(8, **degrees)
        planned = foldpar.planned_parameters(foldpar.plan_fold(model, layout), dtype=torch.float32)
        for stage in range(4):
            told = foldpar.predict_memory(planned, layout, stage=stage)
            mine = MemoryModel(shape, work).of(layout, stage=stage, recompute="none", transport="messages", micro=1)
            assert (mine.parameters, mine.gradients, mine.optimizer) == (
                told.parameters,
                told.gradients,
                told.optimizer,
            )


@given(load=st.floats(1, 5), micro=st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_more_load_and_more_sequences_never_need_less(load, micro):
    layout = foldpar.solve_layout(8, ep=8)
    model = MemoryModel(QWEN3_30B, Workload(tokens=1024, batch=64))
    one = model.of(layout, stage=3, recompute="none", transport="messages", micro=micro, load=1.0)
    more = model.of(layout, stage=3, recompute="none", transport="messages", micro=micro, load=load)
    twice = model.of(layout, stage=3, recompute="none", transport="messages", micro=2 * micro, load=load)
    assert one.peak <= more.peak <= twice.peak


# -- Formulas and seconds ---------------------------------------------------------------------------------------------


@given(local=st.integers(1, 4), ranks=st.integers(1, 6), data=st.data())
@settings(max_examples=50, deadline=None)
def test_distinct_ranks_are_an_expectation(local, ranks, data):
    experts = local * ranks
    top_k = data.draw(st.integers(1, experts))
    met = distinct_ranks(experts, top_k, ranks)
    assert 1 - 1e-9 <= met <= min(ranks, top_k) + 1e-9
    hit = 1 - comb(experts - local, top_k) / comb(experts, top_k)
    assert isclose(met, ranks * hit)


def test_rows_are_bounded_by_what_can_arrive():
    assert routed_rows(100, 8, 1, 1.0, 4, 32) == 800
    assert routed_rows(100, 8, 1, 3.0, 4, 32) == 2400
    assert routed_rows(100, 2, 1, 9.0, 4, 1) == 400  # every token of four ranks, one expert


def test_products_of_the_tables_are_met():
    """Qwen3's grouped products at 8,192 and 1,024 tokens on one H100, forward and backward: 475 and 138 TFLOP/s."""
    for tokens, rate in ((8192, 475e12), (1024, 138e12)):
        rows, flops = tokens * 8, 2 * tokens * 8 * 3 * 2048 * 768
        moved = 2 * (3 * 128 * 2048 * 768 + rows * (2 * 2048 + 3 * 768))
        predicted = flops / product_seconds(flops, moved, H100.grouped_flops, H100.memory_bandwidth)
        assert abs(predicted / rate - 1) < 0.3


def test_no_choice_is_faster_than_the_bound_that_prunes():
    work = Workload(tokens=512, batch=32)
    model = TimeModel(QWEN3_30B, work, H100)
    for degrees in folds(8):
        if broken_rule(QWEN3_30B, 8, degrees, work) is None:
            for layout in layouts(8, degrees):
                least = model.least(layout)
                for micro in (1, work.batch // layout.dp):
                    for way in ("messages", "one-sided"):
                        seconds = model.of(layout, stage=1, recompute="none", transport=way, micro=micro)
                        assert seconds.total >= least * (1 - 1e-9)


def test_more_shards_never_make_a_step_shorter():
    """So a micro-batch that fits at stage 1 is not looked at with stages 2 and 3."""
    work = Workload(tokens=512, batch=32)
    for model in (TimeModel(QWEN3_30B, work, H100), TimeModel(replace(DEEPSEEK_V3, layers=4), work, H100)):
        for degrees in folds(8):
            layout = foldpar.solve_layout(8, **degrees)
            if broken_rule(model.shape, 8, degrees, work) is None:
                for again, micro in product(get_args(Recompute), (1, work.batch // layout.dp)):
                    keywords = {"recompute": again, "transport": "messages", "micro": micro}
                    steps = [model.of(layout, stage=stage, **keywords).total for stage in (1, 2, 3)]
                    assert steps[0] <= steps[1] * (1 + 1e-9) <= steps[2] * (1 + 1e-8)


def test_a_group_across_nodes_uses_the_network():
    work = Workload(tokens=4096, batch=64)
    times = {
        order: TimeModel(QWEN3_30B, work, H100).of(
            foldpar.solve_layout(16, tp=2, ep=8, order=order),
            stage=1, recompute="none", transport="messages", micro=1,
        )
        for order in ("tp-lane-major", "consecutive")
    }  # fmt: skip
    assert times["consecutive"].exchange_network == 0 < times["consecutive"].exchange_node
    assert times["tp-lane-major"].exchange_network > times["consecutive"].exchange_node
    assert node_span(foldpar.solve_layout(16, tp=2, ep=8), "ep", 8) == 4


NOTHING = HostCost(**dict.fromkeys(HostCost.__dataclass_fields__, 0.0))


def _seconds(machine: Machine, degrees: dict[str, int], stage: int, **work: Any) -> Seconds:
    """Of a step on two GPUs, in which the device is what counts."""
    layout = foldpar.solve_layout(2, **degrees)
    model = TimeModel(QWEN3_30B, Workload(**{"tokens": 8192, "batch": 8, "precision": "bfloat16", **work}), machine)
    return model.of(layout, stage=stage, recompute="none", transport="messages", micro=8 // layout.dp)


@pytest.mark.parametrize(("degrees", "gathers"), [({}, 4), ({"ep": 2}, 3), ({"tp": 2}, 1), ({"tp": 2, "ep": 2}, 0)])
def test_a_sharded_step_begins_when_its_first_gathers_are_launched(degrees, gathers):
    """Those of the outermost unit, the first block with its experts, and the next block; with tp of experts only."""
    slow = replace(H100, host=replace(NOTHING, unit=1e-3))
    for stage in (0, 2, 3):
        later = _seconds(slow, degrees, stage).total - _seconds(replace(H100, host=NOTHING), degrees, stage).total
        assert isclose(later, gathers * 0.5e-3 if stage else 0.0, abs_tol=1e-9)


def test_what_is_in_no_layer_is_gathered_and_summed_with_nothing_beside_it():
    hidden = replace(H100, host=NOTHING, overlap=1.0, memory_bandwidth=1e30, update_bandwidth=1e30)
    outer = 2 * QWEN3_30B.vocab * QWEN3_30B.hidden + QWEN3_30B.hidden
    found = _seconds(hidden, {}, 2)
    assert isclose(found.gathers, hidden.ring.seconds(outer), rel_tol=1e-6)  # half of 2 bytes leave a rank
    assert isclose(found.gradients, hidden.scatter.seconds(outer), rel_tol=1e-6)
    assert _seconds(hidden, {"tp": 2, "ep": 2}, 0).gradients == 0


def test_gradients_that_go_through_no_bucket_are_multiplied_by_their_factor():
    """One over the data ranks: those of experts that no other rank holds, and of all shards; with one there is none."""
    slow = replace(H100, host=NOTHING, update_bandwidth=1e9)
    once = replace(slow, update_bandwidth=2e9)
    of_experts = sum(weight.numel for weight in QWEN3_30B.weights() if weight.expert)
    of_others = QWEN3_30B.parameters - of_experts
    for degrees, stage, numel in (
        ({"ep": 2}, 0, of_experts / 2), ({}, 0, 0), ({}, 2, QWEN3_30B.parameters / 2),
        ({"ep": 2}, 2, of_experts / 2 + of_others / 2), ({"tp": 2}, 2, 0),
    ):  # fmt: skip
        saved = _seconds(slow, degrees, stage).gradients - _seconds(once, degrees, stage).gradients
        assert isclose(saved, 4 * numel / 2e9, rel_tol=1e-9, abs_tol=1e-9)


def test_the_host_waits_for_rows_that_it_does_not_know():
    work = Workload(tokens=8192, batch=8)

    def waits(shape: ModelShape, way: Transport, **degrees: int) -> bool:
        return TimeModel(shape, work, H100)._waits(foldpar.solve_layout(8, **degrees), 8192, way)

    assert not waits(QWEN3_30B, "messages")  # all experts are here
    assert waits(MIXTRAL_8X22B, "messages")  # and so few that their sizes are asked for
    assert waits(QWEN3_30B, "messages", ep=2) and waits(QWEN3_30B, "messages", etp=2)
    assert waits(QWEN3_30B, "one-sided", ep=8) and not waits(QWEN3_30B, "one-sided", etp=8)
    assert waits(GPT_OSS_120B, "one-sided", etp=8)  # biases


def test_experts_of_one_data_rank_are_converted_and_are_no_unit():
    """In mixed precision, for every micro-batch: 18 bytes a number on the device, and the host's hooks."""
    mixed = {"precision": "mixed", "batch": 32}
    slow = replace(H100, host=replace(NOTHING, conversion=1.0))
    free = replace(H100, host=NOTHING)
    layers = QWEN3_30B.layers * 4  # micro-batches
    assert _seconds(slow, {"ep": 2}, 2, **mixed).total > layers * 0.99
    for degrees, precision in (({}, "mixed"), ({"ep": 2}, "bfloat16")):
        work = {**mixed, "precision": precision}
        assert _seconds(slow, degrees, 2, **work).total == _seconds(free, degrees, 2, **work).total


@pytest.mark.parametrize(("stage", "precision", "held"), [(0, "bfloat16", 2), (0, "float32", 4), (1, "mixed", 4)])
def test_every_micro_batch_but_the_first_is_added_to_the_gradients(stage, precision, held):
    """In three passes over them, which nothing else hides."""
    machine, work = replace(H100, host=NOTHING), Workload(tokens=8192, batch=8, precision=precision)
    layout, model = foldpar.solve_layout(1), TimeModel(QWEN3_30B, work, machine)
    seconds = 3 * held * sum(weight.numel for weight in QWEN3_30B.weights()) / machine.memory_bandwidth
    one, four = (model.of(layout, stage=stage, recompute="none", transport="messages", micro=micro) for micro in (8, 2))
    converted = (four.gradients - 3 * seconds) / 4 if stage else 0.0
    assert isclose(one.gradients, converted, abs_tol=1e-12) and converted >= 0
    assert isclose(four.gradients, 3 * seconds + 4 * converted)
    assert four.host == pytest.approx(0, abs=1e-9)


def test_shards_are_added_to_from_stage_2_on():
    layout = foldpar.solve_layout(8, ep=2)
    model = TimeModel(QWEN3_30B, Workload(tokens=8192, batch=64, precision="bfloat16"), H100)
    (pipeline,) = pipeline_stages(QWEN3_30B, 1)
    dense = sum(weight.numel for weight in QWEN3_30B.weights() if not weight.expert)
    experts = sum(weight.numel for weight in QWEN3_30B.weights() if weight.expert) / 2
    of = [6 * numel / H100.memory_bandwidth for numel in (dense + experts, dense / 8 + experts / 4)]
    assert [model._adding(layout, pipeline, stage) for stage in range(4)] == pytest.approx([of[0]] * 2 + [of[1]] * 2)


# -- Whole plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_models_of_all_kinds_plan(shape):
    found = plan(shape, gpus=256, batch=512, gpu="h200", best=3, cp=1, etp=1, pp=8, transport="messages")
    assert found.best.memory.peak <= found.machine.usable
    assert shape.name in found.verdict()
    json.loads(found.to_json())
    assert "foldpar.solve_layout(256" in str(found)
    assert ("fold_model" in found.commands()) == bool(shape.experts)


@pytest.mark.parametrize(
    ("shape", "gpus", "published"),
    [
        (MIXTRAL_8X22B, 128, {"tp": 2, "ep": 8, "pp": 8, "etp": 1}),
        (QWEN2_57B, 64, {"tp": 2, "ep": 4, "pp": 4, "etp": 1}),
    ],
    ids=["mixtral-8x22b", "qwen2-57b-a14b"],
)
def test_the_published_folds_are_among_the_three_best(shape, gpus, published, monkeypatch):
    """MoE Parallel Folding (Liu et al. 2025), table 3: sequences of 4,096, a batch of 256, no context parallelism.

    Megatron-Core shards the optimizer (stage 1), has sequence parallelism, one order, messages, fused norms, rotations
    and other kernels with little work for the host, and grouped products for few experts as for many; it recomputes
    nothing there, and adds a micro-batch to the gradients inside of the products.
    """
    monkeypatch.setattr(TimeModel, "_adding", lambda *_: 0.0)
    machine = replace(
        H100,
        grouped_flops=H100.product_flops,
        elementwise_bandwidth=H100.memory_bandwidth,
        host=HostCost(
            attention=5e-4, dense=1e-4, moe=5e-4, head=1e-4, messages=2e-4, one_sided=0.0, slices=2e-4, lanes=0.0,
            ends=0.0, unit=0.0, regather=0.0, conversion=0.0, reduction=0.0, bucket=0.0, parameter=0.0,
        ),
    )  # fmt: skip
    found = plan(
        shape, gpus=gpus, gpu=machine, tokens=4096, batch=256, lanes="sharded", cp=1, stage=1, recompute="none",
        transport="messages", order="consecutive",
    )  # fmt: skip
    degrees = [{name: getattr(row.layout, name) for name in published} for row in found.rows]
    assert published in degrees[:3]


def test_interleaved_chunks_make_the_bubble_smaller_and_keep_more_activations():
    """Narayanan et al. 2021, section 2.2: the bubble is a v-th, activations of the first stage 1 + (p - 1) / (p v)."""
    layout = foldpar.solve_layout(8, pp=4, ep=2)
    keywords = {"stage": 1, "recompute": "none", "transport": "messages", "micro": 1}
    plain, turns = (
        (TimeModel(QWEN3_30B, work, H100).of(layout, **keywords), MemoryModel(QWEN3_30B, work).of(layout, **keywords))
        for work in (Workload(tokens=1024, batch=64, chunks=chunks) for chunks in (1, 4))
    )
    assert 0 < turns[0].bubble < plain[0].bubble
    assert plain[1].peak <= turns[1].peak
    assert in_flight(4, 4, 64, 4) == 4 * (1 + 3 / 16)
    assert (in_flight(4, 4, 64, 1), in_flight(4, 4, 2, 4)) == (4, 2)
    assert pipeline_stages(QWEN3_30B, 16, 99)[0].chunks == 3  # a chunk is a layer or more
    uneven = pipeline_stages(replace(QWEN3_30B, layers=5), 3, 2)
    assert {each.dense + each.moe for each in uneven} == {1, 2}
    assert {each.chunks for each in uneven} == {1}  # a schedule has equally many on all stages


def _choices(shape: ModelShape, gpus: int, work: Workload, machine: Machine) -> list[tuple[float, float]]:
    """Tokens a second and bytes of every choice there is."""
    memory, time, found = MemoryModel(shape, work), TimeModel(shape, work, machine), []
    for degrees in folds(gpus):
        for layout in layouts(gpus, degrees) if broken_rule(shape, gpus, degrees, work) is None else ():
            for stage, again, way, micro in product(range(4), get_args(Recompute), get_args(Transport), (1, 2, 4, 8)):
                possible = not transports(shape, layout, machine, work)[way] and work.batch // layout.dp % micro == 0
                if possible and rules_of_stage(layout, stage, work) is None:
                    keywords = {"stage": stage, "recompute": again, "transport": way, "micro": micro}
                    seconds = time.of(layout, **keywords)
                    assert time.least(layout) <= seconds.total * (1 + 1e-9)
                    found.append((time.tokens_per_second(seconds), memory.of(layout, **keywords).peak))
    return found


@pytest.mark.parametrize(
    ("layers", "experts", "precision", "chunks"),
    [(1, 2, "bfloat16", 1), (1, 0, "mixed", 1), (5, 4, "mixed", 3), (3, 8, "bfloat16", 2)],
)
def test_a_plan_finds_the_fastest_choice_that_fits(layers, experts, precision, chunks):
    routed = {"experts": experts, "top_k": 1, "expert_hidden": 1536} if experts else {"intermediate": 512}
    shape = ModelShape(hidden=256, layers=layers, heads=4, vocab=1000, **routed)
    work = Workload(tokens=512, batch=8, precision=precision, chunks=chunks)
    choices = _choices(shape, 6, work, H100)
    peaks = sorted(peak for _, peak in choices)
    for usable in peaks[:: max(1, len(peaks) // 25)]:
        machine = replace(H100, memory=usable + 1, reserved=0)
        found = plan(
            shape, gpus=6, gpu=machine, tokens=512, batch=8, precision=precision, chunks=chunks, best=1
        )  # fmt: skip
        fastest = max(speed for speed, peak in choices if peak <= usable + 1)
        assert found.best.tokens_per_second == pytest.approx(fastest)


def test_a_model_without_experts_has_none_to_compute_again():
    found = plan(ModelShape(hidden=64, layers=2, heads=4, vocab=64, intermediate=128), gpus=2, recompute="experts")
    assert "no layout is possible" in found.verdict()
    assert "there are experts to compute again" in str(found)


def _looks(monkeypatch, gpus: int, batch: int) -> tuple[Counter[str], int]:
    """How often a plan computes bytes and seconds, of candidates and of single layers; and how many candidates it has.

    They bound what it takes; how long that is, ``benchmarks/NOTES.md`` says (``plan_memory.py``).
    """
    looks = Counter[str]()
    for kind, names in ((MemoryModel, ("of", "_layer")), (TimeModel, ("of", "least", "_of_layer"))):
        for name in names:
            compute, key = getattr(kind, name), f"{kind.__name__}.{name}"

            def counted(self, *args, compute=compute, key=key, **options):
                looks[key] += 1
                return compute(self, *args, **options)

            monkeypatch.setattr(kind, name, counted)
    return looks, plan(QWEN3_30B, gpus=gpus, batch=batch).candidates


def _few(looks: Counter[str], candidates: int) -> None:
    assert looks["TimeModel.of"] < looks["MemoryModel.of"] < 1.5 * candidates, "most that is slow is left out unseen"
    assert looks["MemoryModel._layer"] < candidates / 20, "layers are shared by stages, orders and pipelines"
    assert looks["TimeModel._of_layer"] < candidates / 5


def test_a_plan_looks_at_few_of_its_candidates(monkeypatch):
    _few(*_looks(monkeypatch, 16, 64))


@pytest.mark.long
def test_a_plan_of_a_thousand_gpus_leaves_most_of_its_candidates_out_unseen(monkeypatch):
    looks, candidates = _looks(monkeypatch, 1024, 2048)
    _few(looks, candidates)
    assert looks["MemoryModel.of"] < candidates / 4


# -- Rows that travel one-sided ---------------------------------------------------------------------------------------


ROWS = {
    "ranks": st.integers(1, 16), "tokens": st.integers(1, 20000), "hidden": st.integers(1, 4096),
    "top_k": st.integers(1, 16), "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
}  # fmt: skip


@given(**ROWS)
@settings(max_examples=30, deadline=None)
def test_shared_bytes_are_those_that_an_exchange_has_made(ranks, tokens, hidden, top_k, dtype):
    """With one rank in its group a memory is plain; its halves are those of the exchange of so many."""
    exchange = RowExchange(ranks, tokens, hidden, top_k, dtype)
    memories = DeviceMemories(AxisGroup("ep_etp", (0,), 0, None), torch.device("meta"))
    with (
        mock.patch.object(peers, "_allocated", lambda size, group, device: (size, "")),
        mock.patch.object(
            peers, "PeerMemory", lambda group, halves, own: SimpleNamespace(size=own, is_shared=lambda: True)
        ),
    ):
        made = memories.holding(exchange.halves(), 2**40)
    assert made.size == shared_bytes(ranks, tokens, hidden, top_k, dtype.itemsize)


@given(**ROWS, etp=st.sampled_from([1, 2, 4]), local=st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_room_is_that_of_one_sided_rows(ranks, tokens, hidden, top_k, dtype, etp, local):
    exchange = RowExchange(ranks * etp, tokens, hidden, top_k, dtype)
    groups = SimpleNamespace(etp=SimpleNamespace(size=etp))
    room = one_sided_room(ranks * etp, etp, tokens, top_k, local, hidden, dtype.itemsize)
    assert room == OneSided()._room(exchange, groups, local)
    assert room is None or room == exchange.most(local) == most_rows(ranks * etp, tokens, top_k, local)
    assert (UNASKED, MOST_LISTED) == (one_sided.UNASKED, messages.MOST_LISTED)


@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 8, 1), (2, 8, 1), (1, 4, 2), (1, 1, 8)])
def test_the_line_that_sets_up_one_sided_rows_allows_as_many_as_a_rank_routes(tp, ep, etp):
    found = plan(
        QWEN3_30B, gpus=8, gpu="h200", tokens=4096, batch=128, tp=tp, ep=ep, etp=etp, pp=1, cp=1, stage=3,
        recompute="full", transport="one-sided", micro=1,
    )  # fmt: skip
    assert found.best.transport == "one-sided"
    assert "fold_model(model, groups, one_sided=foldpar.OneSided())" in found.commands()
    assert "fold_model(model, groups, one_sided=False)" in found.commands(replace(found.best, transport="messages"))
    for micro in (1, 2, 5, 8, 16, 61, 128):
        line = found.commands(replace(found.best, micro=micro))
        written = re.search(r"one_sided=foldpar\.OneSided\((?:most_bytes=2\*\*(\d+))?\)\)", line)
        bound = OneSided() if written[1] is None else OneSided(most_bytes=2 ** int(written[1]))
        assert bound.most_tokens(ep * etp, 2048, 8, torch.bfloat16) >= micro * 4096 // tp


def test_rows_travel_one_sided_with_slices_and_with_biases_and_inside_a_node_only():
    work = Workload(tokens=64, batch=16)
    for shape, degrees, way in (
        (QWEN3_30B, {"ep": 8}, ""),
        (QWEN3_30B, {"etp": 2}, ""),
        (QWEN3_30B, {"ep": 4, "etp": 2}, ""),
        (GPT_OSS_120B, {"ep": 8}, ""),
        (QWEN3_30B, {}, "rows stay where they are"),
        (QWEN3_30B, {"ep": 8, "etp": 2}, "inside a node"),
    ):
        reason = transports(shape, foldpar.solve_layout(16, **degrees), H100, work)["one-sided"]
        assert way in reason and bool(way) == bool(reason)


def test_few_rows_have_room_and_many_are_counted():
    """Beyond 128 MiB of rows that may not come the host waits for their number, and there is room for just as many."""
    layout = foldpar.solve_layout(8, ep=8)

    def of(tokens: int, load: float) -> tuple[float, bool]:
        work = Workload(tokens=tokens, batch=8)
        keywords = {"stage": 3, "recompute": "none", "transport": "one-sided", "micro": 1, "load": load}
        waits = TimeModel(QWEN3_30B, work, H100)._waits(layout, tokens, "one-sided")
        return MemoryModel(QWEN3_30B, work).of(layout, **keywords).activations, waits

    few, many = 584, 586  # (64 - 8) * 585.1 rows of 2,048 numbers are 128 MiB
    assert of(few, 1.0) == of(few, 3.0) == (of(few, 1.0)[0], False)
    assert of(many, 1.0)[1] and of(many, 1.0)[0] < of(few, 1.0)[0]
    assert of(many, 1.0)[0] <= of(many, 3.0)[0]


def test_a_model_that_does_not_fit_says_what_is_missing():
    found = plan(DEEPSEEK_V3, gpus=8, batch=8)
    assert not found.rows
    assert re.search(r"does not fit: the least is \d+\.\d GB on a GPU", found.verdict())
    with pytest.raises(PlanError, match="does not fit"):
        _ = found.best
    assert "does not fit" in str(found)
    assert "precision 'bfloat16' would make it less" in found.verdict()
    assert "bfloat16" not in plan(DEEPSEEK_V3, gpus=8, batch=8, precision="bfloat16").verdict()


def test_what_has_no_way_for_its_rows_is_not_said_to_be_too_large():
    found = plan(LLAMA_8B, gpus=4, transport="one-sided", pp=1, cp=1, gpu="h200")
    assert {each.rule for each in found.left_out} == {
        "a model without experts has nothing to fold: ep = etp = 1",
        "float32 shards with bfloat16 computation are shard_model's: stage 1, 2 or 3",
        "rows stay where they are with ep = etp = 1",
    }


BAD = [
    (lambda: plan(TINY, **{**SMALL, "gpus": 0}), "gpus = 0 is not a positive integer"),
    (lambda: plan(TINY, **{**SMALL, "gpus": "8"}), "gpus = '8' is not a positive integer"),
    (lambda: plan(TINY, **{**SMALL, "batch": -1}), "batch = -1 is not a positive integer"),
    (lambda: plan(TINY, **{**SMALL, "tokens": 1.5}), "tokens = 1.5 is not a positive integer"),
    (lambda: plan(TINY, **SMALL, tp=3), r"no layout of gpus = 4 has tp = 3.* divided by 1, 2 or 4"),
    (lambda: plan(TINY, **SMALL, tp=True), "tp = True is not a positive integer"),
    (lambda: plan(TINY, **SMALL, stage=4), "stage = 4 is unknown: it can be 0, 1, 2 or 3"),
    (lambda: plan(TINY, **SMALL, stage=True), "stage = True is unknown"),
    (lambda: plan(TINY, **SMALL, order="x"), "it can be 'tp-lane-major' or 'consecutive'"),
    (lambda: plan(TINY, **SMALL, recompute="all"), "it can be 'none', 'experts' or 'full'"),
    (lambda: plan(TINY, **SMALL, transport="x"), "it can be 'messages' or 'one-sided'"),
    (lambda: plan(TINY, **SMALL, precision="fp8"), "it can be 'mixed', 'bfloat16' or 'float32'"),
    (lambda: plan(TINY, **SMALL, lanes="x"), "it can be 'replicated' or 'sharded'"),
    (lambda: plan(TINY, **SMALL, load=0.5), "the slowest rank has at least the balanced rows"),
    (lambda: plan(TINY, **SMALL, load="x"), "load = 'x' is not a number from 1"),
    (lambda: plan(TINY, **SMALL, gpu="h10"), r"neither a machine that is known \(h100, h200; did you mean h100\?\)"),
    (lambda: plan(TINY, **SMALL, gpu=3), "and not 3"),
    (lambda: plan(TINY, **SMALL, gpus_per_node=0), "gpus_per_node = 0 is not a positive integer"),
    (lambda: plan(TINY, **{**SMALL, "gpus": 10**18}), "is more than a plan counts with, which is 131,072"),
    (lambda: plan(TINY, **{**SMALL, "batch": 10**60}), "is more than a plan counts with, which is 4,294,967,296"),
    (lambda: plan(TINY, **{**SMALL, "tokens": 10**400}), "is more than a plan counts with"),
    (lambda: plan(TINY, **SMALL, load=1e9), "load = 1000000000.0 is not a number from 1 to 1,000,000"),
    (
        lambda: plan(TINY, **{**SMALL, "gpus": 12}),
        "gpus_per_node = 8 does not divide gpus = 12, .* With 12 GPUs, gpus_per_node can be 1, 2, 3, 4, 6 or 12",
    ),
    (lambda: plan("nowhere", **SMALL), "does not exist"),
    (lambda: plan({"model_type": ["llama"]}, **SMALL), "is not known to the planner. Known are"),
    (lambda: plan(None, **SMALL), "and not None"),
    (lambda: plan({"model_type": "bert"}, **SMALL), "is not known to the planner. Known are"),
    (lambda: read_machine({"name": "x"}), "network, host are missing"),
    (lambda: read_machine({**H100.to_dict(), "memori": 1}), "'memori' is not known; did you mean 'memory'"),
    (lambda: read_machine({**H100.to_dict(), "memory": -1}), "memory = -1 is not a positive number"),
    (lambda: read_machine({**H100.to_dict(), "node": 3}), "node is an object of numbers"),
    (lambda: read_machine({**H100.to_dict(), "node": {"latency": 0}}), "node: bandwidth is missing"),
    (lambda: read_machine({**H100.to_dict(), "gpus_per_node": 1.5}), "is not a whole number"),
    (lambda: read_machine({**H100.to_dict(), "device": "gpu"}), "device = 'gpu' can be 'cuda' or 'cpu'"),
    (lambda: read_machine({**H100.to_dict(), "overlap": 1.5}), "overlap = 1.5 is a part of the computation"),
    (lambda: read_machine({**H100.to_dict(), "memory": float("inf")}), "memory = inf is not from 1 to 1e\\+24"),
    (lambda: read_machine({**H100.to_dict(), "memory": 10**400}), "is not from 1 to 1e\\+24"),
    (lambda: read_machine({**H100.to_dict(), "product_flops": 1e-300}), "product_flops = 1e-300 is not from 1 to"),
    (lambda: read_machine({**H100.to_dict(), "node": {"latency": 1e9, "bandwidth": 1e9}}), "is not from 0 to 3600"),
    (lambda: read_machine({**H100.to_dict(), "sources": {"memory": 3}}), "sources holds a text for each number"),
    (lambda: read_machine({**H100.to_dict(), "reserved": 1e12}), "reserved = 1e\\+12 leaves none to train with"),
]


@pytest.mark.parametrize(("ask", "text"), BAD, ids=[text for _, text in BAD])
def test_what_cannot_be_planned_is_refused_in_words(ask, text):
    with pytest.raises(FoldingError, match=text):
        ask()


NUMBERS = "--hidden 64 --layers 2 --heads 4 --vocab 64 --experts 4 --top-k 2 --expert-hidden 32"
COMMAND = f"plan --gpus 4 --tokens 64 --batch 8 {NUMBERS}"


def test_the_command_line_prints_what_plan_says(capsys, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main([*COMMAND.split(), "--html", str(page)]) == 0
    found = plan(TINY, **SMALL)
    assert capsys.readouterr().out == f"{found}\n"
    assert cli.main([*COMMAND.split(), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"] == found.verdict()
    assert data["rows"][0]["bytes_at_load"].keys() == {"1.0", "1.5", "3.0"}
    assert data["machine"]["sources"]
    text = page.read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", text)
    assert text.count("<svg") == 2


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("plan --gpus 4", "say MODEL, a folder or file with a config.json, or its numbers; --hidden, --layers"),
        (f"{COMMAND} --tp 3", "no layout of gpus = 4 has tp = 3"),
        ("plan nowhere --gpus 4", "nowhere does not exist"),
        ("plan nowhere --gpus 4 --hidden 3", "--hidden is a number of a model without a file"),
        (f"{COMMAND} --gpu a100", "neither a machine that is known"),
        (f"{COMMAND} --gpu h200 --machine here.json", "--gpu h200 and --machine here.json are two machines; say one"),
        (f"{COMMAND} --machine=", " is neither a machine that is known"),
        (f"{COMMAND} --dense-layers 3", "--dense-layers 3 can be 0 to --layers"),
        (f"{COMMAND} --dense-layers {10**30}", "can be 0 to --layers"),
        (f"{COMMAND} --html nowhere/page.html", "nowhere is not a folder, so nowhere/page.html cannot be written"),
        (f"{COMMAND} --html .", "'.' is a folder; name a file to write"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(command, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(command.split())
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("foldpar: error: ")
    assert text in told
    assert told.count("\n") == 1


def test_a_command_runs_where_nobody_listens():
    """Its output is closed, as ``>&-`` does."""
    with mock.patch("sys.stdout", None):
        assert cli.main(COMMAND.split()) == 0


def test_data_has_the_smallest_choice_where_none_fits():
    found = plan(DEEPSEEK_V3, gpus=8, batch=8)
    smallest = json.loads(found.to_json())["smallest"]
    assert smallest["bytes"]["peak"] == round(found.smallest.memory.peak) > found.machine.usable
    assert f"{smallest['bytes']['peak'] / 1e9:.1f} GB on a GPU" in found.verdict()


def test_links_twice_as_fast_are_all_links():
    """Gathers, sums and lanes inside a node, too: a step that is nothing else takes half as long."""
    slow = {name: replace(getattr(H100, name), latency=0.0, bandwidth=1e6) for name in ("node", "ring", "scatter")}
    machine = replace(H100, **slow, host=NOTHING, overlap=0.0)
    changes = plan(TINY, **SMALL, gpu=machine, tp=2, ep=2, stage=2, micro=4).changes
    assert "links twice as fast: the same fold, 2.00 x the tokens a second" in changes


def test_shipped_machines_say_where_every_number_is_from():
    for name in ("h100", "h200"):
        machine = read_machine(name)
        said = machine.to_dict().keys() - {"name", "gpu", "device", "gpus_per_node", "reserved", "sources", "measured"}
        assert machine.sources.keys() == said
