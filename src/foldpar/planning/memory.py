"""Bytes of one rank: what it holds between steps, what a step adds, and the largest sum of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from math import ceil, prod
from typing import TypeVar

from foldpar.families import numbers_in_shard
from foldpar.layout import FoldedLayout
from foldpar.planning import formulas
from foldpar.planning.folds import Recompute, Transport, Workload
from foldpar.planning.once import Once
from foldpar.planning.shape import ModelShape, Weight

__all__ = ["LOADS", "Memory", "MemoryModel", "PipelineStage", "pipeline_stages"]

T = TypeVar("T")

LOADS = (1.0, 1.5, 3.0)
"""Times the balanced number of rows at the slowest rank's experts, for which bytes are told."""

BUCKET = 64 * 2**20
"""Bytes of a bucket of :func:`foldpar.reduce_gradients`."""

WORKSPACES = 2 * 32 * 2**20
"""Bytes of cuBLAS, for each of the two threads that launch forwards and backwards (ATen's default on Hopper)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank. ``peak`` is less than the sum of the others, which are not there at the same time.

    Attributes:
        parameters, gradients, optimizer: what it holds of them between steps; gradients from the last backward on.
        gathered: parameters that are whole besides their shards, and gradients that are.
        activations: what forwards keep for their backwards.
        working: what the backward of one layer needs beside that.
        communication: rows on their way, and buckets of gradients.
        logits: what the loss holds.
        peak: the largest sum of a moment.
        moment: which one: ``"loss"``, ``"backward"`` (its begin), ``"end of backward"`` or ``"optimizer"``.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    working: float
    communication: float
    logits: float
    peak: float
    moment: str

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {each.name: _whole(getattr(self, each.name)) for each in fields(self)}


def _whole(value: object) -> object:
    return round(value) if isinstance(value, float) else value


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """The layers of one pipeline stage, by kind, and whether it is the first and the last."""

    dense: int
    moe: int
    first: bool
    last: bool
    behind: int
    """Stages behind it, itself included: so many micro-batches are in flight, if there are so many."""
    chunks: int = 1
    """Parts of its layers that take turns."""


def pipeline_stages(shape: ModelShape, pp: int, chunks: int = 1) -> tuple[PipelineStage, ...]:
    """The stages that can be the slowest or largest of a pipeline that cuts the layers as evenly as it can.

    The first, the last, and of those between the first with most layers and the first with most experts.
    """
    found = []
    for stage in range(pp):
        layers = range(shape.layers * stage // pp, shape.layers * (stage + 1) // pp)
        moe = sum(shape.is_moe(layer) for layer in layers)
        parts = min(chunks, shape.layers // pp)  # equally many on all stages, each a layer or more
        found.append(PipelineStage(len(layers) - moe, moe, stage == 0, stage == pp - 1, pp - stage, parts))
    largest = max(found, key=lambda each: each.dense + each.moe)
    widest = max(found, key=lambda each: each.moe)
    return tuple(dict.fromkeys((found[0], largest, widest, found[-1])))


@dataclass(frozen=True, slots=True)
class _Held:
    """Numbers of a set of weights on a rank: whole (as folding left them), and its shard."""

    dense: int
    expert: int
    dense_shard: int
    expert_shard: int


class MemoryModel:
    """The bytes of every fold of a model; keeps what several folds have in common.

    Args:
        shape, work: what is trained.
        device: ``"cuda"`` or ``"cpu"``, whose kernel of attention copies its output.
        hopper: GPUs that run the own products of :mod:`foldpar.moe`, which read rows where they lie.
    """

    def __init__(self, shape: ModelShape, work: Workload, device: str = "cuda", *, hopper: bool = True) -> None:
        self.shape, self.work, self.device = shape, work, device
        self.hopper = hopper and device == "cuda"
        self._once = Once()

    def of(
        self,
        layout: FoldedLayout,
        *,
        stage: int,
        recompute: Recompute,
        transport: Transport,
        micro: int,
        load: float | None = None,
    ) -> Memory:
        """Of the pipeline stage that needs the most, with ``micro`` sequences in a forward."""
        load = self.work.load if load is None else load
        micro_batches = self.work.batch // layout.dp // micro
        stages: tuple[PipelineStage, ...] = self._once(
            ("stages", layout.pp), partial(pipeline_stages, self.shape, layout.pp, self.work.chunks)
        )
        found = [
            self._of_stage(layout, each, stage, recompute, transport, micro, micro_batches, load) for each in stages
        ]
        return max(found, key=lambda memory: memory.peak)

    def _of_stage(
        self,
        layout: FoldedLayout,
        pipeline: PipelineStage,
        stage: int,
        recompute: Recompute,
        transport: Transport,
        micro: int,
        micro_batches: int,
        load: float,
    ) -> Memory:
        shape, work = self.shape, self.work
        tokens = micro * work.tokens / layout.cp
        stored, item = work.stored, work.item
        held = self.held(layout, pipeline)
        unit_dense, unit_expert, root, extra = self._units(layout, pipeline, stage > 0)
        layers = pipeline.dense + pipeline.moe
        shards_dense = stage > 0 and (layout.dp * layout.cp > 1 or work.precision == "mixed")
        shards_expert = stage > 0 and layout.edp > 1
        converted = unit_expert if stage > 0 and layout.edp == 1 and work.precision == "mixed" else 0  # one at a time
        own = (held.dense_shard if shards_dense else held.dense) + (held.expert_shard if shards_expert else held.expert)
        whole = (held.dense if shards_dense else 0) + (held.expert if shards_expert else 0)
        parameters, optimizer = stored * own, stored * own * work.optimizer_states
        of_unit = max(unit_dense if shards_dense else 0, unit_expert if shards_expert else 0, converted)
        of_block = (unit_dense if shards_dense else 0) + (unit_expert if shards_expert else 0)
        of_root = root if shards_dense else 0
        summed = 4 if work.precision == "mixed" else stored  # dtype in which shards are summed
        several = micro_batches > 1
        alone = stage == 3 and shards_expert and not shards_dense and layers > 1
        # What is whole where backward ends; where only experts are units, another layer's were gathered ahead.
        first_layer = float(item * (of_root + of_block))
        last_whole = first_layer + item * of_block * alone if stage else 0.0
        gathered = 0.0 if stage == 0 else float(item * whole)
        if stage == 3:  # one block, and the next one, if there is one, without its experts
            gathered = min(gathered, first_layer + item * (unit_dense if shards_dense else 0))
        gathered += item * converted
        whole_gradients = float(summed * whole) if stage == 1 and several else 0.0
        of_one_unit = float(item * of_unit) if stage else 0.0  # its gradient, and a copy that is summed over ranks
        copied = float(summed * of_unit) if stage else 0.0
        gradients = stored * own

        in_flight = formulas.in_flight(pipeline.behind, layout.pp, micro_batches, pipeline.chunks)
        apart = stage == 0 or not (shards_expert or converted)  # experts are no unit, whose gradients are counted there
        of_experts = float(item * unit_expert * apart)
        of_one = working = exchanged = persistent = kept_of_one = 0.0
        for moe, count in ((False, pipeline.dense), (True, pipeline.moe)):
            if count:
                layer = self.layer(layout, moe, tokens, transport, load)
                kept = _kept(layer, recompute, moe)
                of_one += count * kept
                kept_of_one = max(kept_of_one, kept)
                again = layer.all_of_it - kept
                working = max(working, again + max(layer.working, layer.with_weights + of_experts))
                exchanged, persistent = max(exchanged, layer.exchanged), persistent + layer.persistent
        lanes = layout.tp if work.lanes == "sharded" else 1
        stream = tokens / lanes * shape.hidden
        activations = in_flight * of_one + (stream * item if pipeline.first else 0)
        logits = last_norm = 0.0
        if pipeline.last:
            last_norm = tokens / lanes * formulas.norm_kept(shape.hidden, item)
            logits = tokens / lanes * formulas.head_peak(shape.vocab, item)
        bucket = float(min(BUCKET, stored * own)) if layout.world > 1 else 0.0
        head_gradient = float(stored * root) if pipeline.last and stage == 0 else 0.0

        base = parameters + optimizer + persistent + (WORKSPACES if self.device == "cuda" else 0)
        earlier = float(gradients if several else 0)
        if stage == 1 and several:
            earlier = whole_gradients
        unsummed = float(gradients)
        if not several:  # those of the first layer are still to come
            unsummed -= gradients / layers if stage else float(stored * (unit_dense + unit_expert))
        moments = {
            "loss": base + earlier + gathered + activations + last_norm + logits,
            "backward": base + max(earlier, head_gradient) + gathered + activations
            + max(of_one_unit + working, of_one_unit + copied - kept_of_one),
            "end of backward": base + max(unsummed, whole_gradients) + last_whole
            + max(of_one_unit + kept_of_one + working, of_one_unit + copied),
            "optimizer": base + gradients + max(bucket, extra),
        }  # fmt: skip
        moment = max(moments, key=lambda name: moments[name])
        whole_or_summed = gathered + whole_gradients + of_one_unit + copied
        return Memory(
            float(parameters), float(gradients), float(optimizer), whole_or_summed, activations + last_norm, working,
            max(exchanged + persistent, bucket), logits, moments[moment], moment,
        )  # fmt: skip

    # -- Weights ------------------------------------------------------------------------------------------------------

    def held(self, layout: FoldedLayout, pipeline: PipelineStage) -> _Held:
        """Numbers on the rank with the largest shards: the first one."""
        key = ("held", pipeline, layout.tp, layout.dp * layout.cp, layout.ep, layout.etp, layout.edp)
        return self._once(key, lambda: self._of_pipeline(layout, pipeline))

    def _of_pipeline(self, layout: FoldedLayout, pipeline: PipelineStage) -> _Held:
        total = [0, 0, 0, 0]
        kinds = ((False, pipeline.dense), (True, pipeline.moe))
        parts = [(self._layer_weights(layout, moe), times) for moe, times in kinds if times]
        for sizes, times in [*parts, (self._outer_weights(layout, pipeline), 1)]:
            total = [one + times * other for one, other in zip(total, sizes, strict=True)]
        return _Held(*total)

    def _layer_weights(self, layout: FoldedLayout, moe: bool) -> tuple[int, int, int, int]:
        key = ("layer", moe, layout.tp, layout.dp * layout.cp, layout.ep, layout.etp, layout.edp)
        return self._once(key, lambda: _sizes(self.shape.layer_weights(moe), layout))

    def _outer_weights(self, layout: FoldedLayout, pipeline: PipelineStage) -> tuple[int, int, int, int]:
        key = ("outer", pipeline.first, pipeline.last, layout.tp, layout.dp * layout.cp)
        outer = partial(self.shape.outer_weights, first=pipeline.first, last=pipeline.last)
        return self._once(key, lambda: _sizes(outer(), layout))

    def _units(self, layout: FoldedLayout, pipeline: PipelineStage, sharded: bool) -> tuple[int, int, int, float]:
        """Whole numbers of the largest block without its experts, of its experts, and of what is in no block; and the
        bytes of Adam's temporaries: of a group of tensors at once (foreach, on GPUs), experts or the others, or of one
        tensor at a time."""

        def make() -> tuple[int, int, int, float]:
            kinds = [moe for moe, times in ((False, pipeline.dense), (True, pipeline.moe)) if times]
            layers = [self._layer_weights(layout, moe) for moe in kinds]
            dense, expert = max(((each[0], each[1]) for each in layers), key=sum)
            held = self.held(layout, pipeline)
            own = (held.dense_shard, held.expert_shard) if sharded else (held.dense, held.expert)
            extra = float(self.work.stored * max(own))
            if self.device == "cpu":
                weights = [*self.shape.outer_weights(first=pipeline.first, last=pipeline.last)]
                weights += [weight for moe in kinds for weight in self.shape.layer_weights(moe)]
                extra = 2.0 * self.work.stored * max(_shard(weight, layout, sharded) for weight in weights)
            return dense, expert, self._outer_weights(layout, pipeline)[0], extra

        key = ("units", pipeline, sharded, layout.tp, layout.dp * layout.cp, layout.ep, layout.etp, layout.edp)
        return self._once(key, make)

    # -- One layer ----------------------------------------------------------------------------------------------------

    def layer(self, layout: FoldedLayout, moe: bool, tokens: float, transport: Transport, load: float) -> _Layer:
        """The bytes of one layer in one forward and backward."""
        key = ("bytes", moe, layout.tp, layout.ep, layout.etp, tokens, transport, load)
        return self._once(key, lambda: self._layer(layout, moe, tokens, transport, load))

    def _layer(self, layout: FoldedLayout, moe: bool, tokens: float, transport: Transport, load: float) -> _Layer:
        shape, item, tp = self.shape, self.work.item, layout.tp
        stream = tokens / tp if self.work.lanes == "sharded" else tokens
        norms = 2 * stream * formulas.norm_kept(shape.hidden, item, wide_weight=shape.sinks)
        attention = norms + tokens * self._attention_kept(tp)
        queries = shape.query_width // tp
        scores = shape.heads // tp * self.work.tokens if shape.sinks else 0
        attention_working = tokens * item * (6 * queries + 3 * scores) + 3 * stream * shape.hidden * item
        if not moe:
            units = shape.intermediate // tp
            kept = tokens * formulas.feed_forward_kept(units, item)
            working = max(attention_working, tokens * item * 3 * units + 3 * stream * shape.hidden * item)
            return _Layer(attention, kept, stream * shape.hidden * item, working, 0.0, 0.0, 0.0)
        return self._moe_layer(layout, tokens, stream, transport, load, attention, attention_working)

    def _moe_layer(
        self,
        layout: FoldedLayout,
        tokens: float,
        stream: float,
        transport: Transport,
        load: float,
        attention: float,
        attention_working: float,
    ) -> _Layer:
        shape, item, hidden = self.shape, self.work.item, self.shape.hidden
        own, units = tokens / layout.tp, shape.expert_hidden // layout.etp
        local = shape.experts // layout.ep
        rows = formulas.routed_rows(own, shape.top_k, layout.etp, load, layout.ep, local)
        deepseek = shape.shared_name == "shared_experts"
        kept = tokens * formulas.router_kept(shape.experts, shape.top_k, hidden, item, wide=deepseek)
        if deepseek:
            kept += 4 * shape.experts * hidden if item < 4 else 0
        if shape.shared_hidden:
            gate = hidden if shape.shared_gate else 0
            kept += tokens * formulas.feed_forward_kept(shape.shared_hidden // layout.tp, item, gated_output=gate)
        carry = self._in_messages if transport == "messages" else self._one_sided
        way = carry(layout, own, rows, load)
        kept += formulas.rows_kept(way.rows, way.kept, hidden, units, item) + way.tables
        own_products = self._own_products(layout, way.rows)
        residual = stream * hidden * item
        first, later = formulas.experts_backward(
            way.rows, way.arriving, hidden, units, item, in_places=way.in_places, own_products=own_products,
            one_kernel=self.device == "cuda" and not shape.expert_bias,
        )  # fmt: skip
        first = max(first, way.exchanged + way.arriving * hidden * item)
        working = max(residual + first, attention_working)
        return _Layer(attention, kept, residual, working, residual + later, way.exchanged, way.shared)

    def _in_messages(self, layout: FoldedLayout, own: float, rows: float, load: float) -> _Way:
        """Rows are copied for each of their experts, unless all experts are here and read them where they lie."""
        shape, item = self.shape, self.work.item
        met = formulas.distinct_ranks(shape.experts, shape.top_k, layout.ep)
        arriving = min(load * own * met, own * layout.ep)
        stays = layout.ep == layout.etp == 1 and self._own_products(layout, rows)
        tables = formulas.tables_in_messages(rows, own, arriving * layout.etp, met, layout.ep, shape.top_k)
        payload = shape.hidden * item + 4 * shape.top_k
        exchanged = (own * met + arriving) * payload if layout.ep > 1 else 0.0
        if layout.etp > 1:
            exchanged += arriving * (layout.etp + 1) * payload
        return _Way(rows, own if stays else rows, 0.0 if stays else rows, stays, tables, exchanged, 0.0)

    def _one_sided(self, layout: FoldedLayout, own: float, rows: float, load: float) -> _Way:
        """Rows arrive once for all their copies where those would take more; there may be room for more than come."""
        shape, ranks, tokens = self.shape, layout.ep * layout.etp, ceil(own)
        local = shape.experts // layout.ep
        room = formulas.one_sided_room(ranks, layout.etp, tokens, shape.top_k, local, shape.hidden, self.work.item)
        rows = float(room) if room is not None and not shape.expert_bias else rows
        slots = float(ranks * tokens)
        apart = rows > slots
        in_places = apart and self._own_products(layout, rows)
        tables = formulas.tables_one_sided(rows, own, slots, shape.top_k, apart=apart, in_places=in_places)
        arriving = slots if in_places else rows
        shared = formulas.shared_bytes(ranks, tokens, shape.hidden, shape.top_k, self.work.item)
        return _Way(rows, arriving, arriving, in_places, tables, 0.0, float(shared))

    def _own_products(self, layout: FoldedLayout, rows: float) -> bool:
        """Whether they are used; then rows are read where they lie, if they do: ``moe.kernels.products.takes``."""
        units, local = self.shape.expert_hidden // layout.etp, self.shape.experts // layout.ep
        plain = self.work.item == 2 and not self.shape.expert_bias
        return self.hopper and plain and units <= 1024 and rows >= 32 * local

    def _attention_kept(self, tp: int) -> float:
        shape, item, copies = self.shape, self.work.item, self.device == "cpu"
        heads, queries = shape.heads // tp, shape.query_width // tp
        if shape.latent is not None:
            latent = shape.latent
            return formulas.latent_attention_kept(
                latent.q_rank, latent.kv_rank, latent.nope, latent.rope, latent.value, heads, item, copies_output=copies
            )
        if shape.sinks:
            return formulas.eager_attention_kept(queries, heads, self.work.tokens, item)
        keys = max(shape.key_value_heads // tp, 1) * shape.head_width
        return formulas.attention_kept(queries, keys, heads, item, qk_norm=shape.qk_norm)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Bytes of one layer: what its attention and its network keep, its input, and what its backward needs beside;
    ``with_weights``: what it needs beside them and the gradients of the experts' weights."""

    attention: float
    network: float
    input: float
    working: float
    with_weights: float
    exchanged: float
    persistent: float

    @property
    def all_of_it(self) -> float:
        return self.attention + self.network


@dataclass(frozen=True, slots=True)
class _Way:
    """What a way of rows means for a layer.

    Expert-major ``rows``, those that are ``arriving`` (once for all their copies if they are read ``in_places``), and
    of these those that are ``kept``; bytes of ``tables`` that are kept, of messages, and of memory that is shared.
    """

    rows: float
    arriving: float
    kept: float
    in_places: bool
    tables: float
    exchanged: float
    shared: float


def _kept(layer: _Layer, recompute: Recompute, moe: bool) -> float:
    if recompute == "full":
        return layer.input
    return layer.attention if recompute == "experts" and moe else layer.all_of_it


def _sizes(weights: Iterable[Weight], layout: FoldedLayout) -> tuple[int, int, int, int]:
    dense = expert = dense_shard = expert_shard = 0
    for weight in weights:
        whole, shard = prod(weight.local_shape(layout)), _shard(weight, layout, True)
        if weight.expert:
            expert, expert_shard = expert + whole, expert_shard + shard
        else:
            dense, dense_shard = dense + whole, dense_shard + shard
    return dense, expert, dense_shard, expert_shard


def _shard(weight: Weight, layout: FoldedLayout, sharded: bool) -> int:
    ranks = (layout.edp if weight.expert else layout.dp * layout.cp) if sharded else 1
    return numbers_in_shard(weight.local_shape(layout), ranks, experts=weight.expert)
