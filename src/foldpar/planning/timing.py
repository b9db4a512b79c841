"""Seconds of one step, and what they consist of: what the device computes, what links carry, what the host launches."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil, prod
from typing import Literal, TypeVar

from foldpar.layout import Axis, FoldedLayout
from foldpar.planning import formulas
from foldpar.planning.folds import Recompute, Transport, Workload, node_span
from foldpar.planning.machine import Link, Machine
from foldpar.planning.memory import PipelineStage, pipeline_stages
from foldpar.planning.once import Once
from foldpar.planning.shape import ModelShape

__all__ = ["Seconds", "TimeModel"]

T = TypeVar("T")
Bound = Literal["tensor cores and memory", "links", "host", "pipeline bubble"]

NORM_PASSES = 2 * formulas.NORM_MOVES + 34
"""Bytes that norms and residuals of one layer move for each number of the stream: two norms, and 17 passes of sums."""
ROW_PASSES, UNIT_PASSES = 6, 8
"""How often an expert's row, and its hidden units, are read or written beside the products.

Rows are copied for one weight gradient and summed twice; SwiGLU's backward reads and writes three times each.
"""
LOGIT_PASSES = 40
"""Bytes that the loss moves for each logit, forward and backward."""
BUCKET_PASSES = 7
"""How often ``reduce_gradients`` reads or writes a number beside its sum: zeros, copied in, scaled, copied out."""
SHARD_PASSES = 2
"""How often a gather, or a sum into shards, reads or writes a number of the whole: split into tensors, or joined."""
CONVERSION_BYTES = 18
"""Bytes moved for each number of experts that are converted: to bfloat16 twice, and their gradients to float32.

Source: :mod:`foldpar.sharding.conversion`.
"""


_AXES_OF_LAYERS: tuple[Axis, ...] = ("ep", "tp", "etp", "cp")


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one step on the slowest rank; ``total`` is their sum.

    Attributes:
        attention: attention with its projections, norms and residual sums.
        experts: grouped products, router, and passes over the rows.
        dense: dense layers, shared experts, embedding, head and loss.
        exchange_node, exchange_network: rows between the ranks of an EP (and ETP) group, by link.
        tp: what crosses the lanes, and keys and values over context parallelism.
        gradients: sums of gradients over data ranks, as far as nothing hides them.
        gathers: gathers of sharded parameters, as far as nothing hides them.
        bubble: waiting of a pipeline, and what its stages send each other.
        optimizer: reading and writing all states.
        host: launching, as far as the device waits for it.
    """

    attention: float
    experts: float
    dense: float
    exchange_node: float
    exchange_network: float
    tp: float
    gradients: float
    gathers: float
    bubble: float
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return (
            self.attention + self.experts + self.dense + self.exchange_node + self.exchange_network + self.tp
            + self.gradients + self.gathers + self.bubble + self.optimizer + self.host
        )  # fmt: skip

    @property
    def bound(self) -> Bound:
        """What the largest part of the step waits for."""
        device = self.attention + self.experts + self.dense + self.optimizer
        links = self.exchange_node + self.exchange_network + self.tp + self.gradients + self.gathers
        parts: dict[Bound, float] = {
            "tensor cores and memory": device, "links": links, "host": self.host, "pipeline bubble": self.bubble,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])

    def to_dict(self) -> dict[str, float]:
        """Milliseconds by name, and ``total``."""
        return {**{each.name: 1e3 * getattr(self, each.name) for each in fields(self)}, "total": 1e3 * self.total}


@dataclass(frozen=True, slots=True)
class _Layer:
    """Seconds of one layer in one micro-batch, forward and backward; ``forward`` and ``host_forward`` of the first.

    ``waits``: the host waits for the device in its forward, since it has to know how many rows come; then the device
    is ``idle``.
    """

    attention: float
    experts: float
    dense: float
    node: float
    network: float
    tp: float
    forward: float
    host: float
    host_forward: float
    idle: float = 0.0
    waits: bool = False
    waits_again: bool = False

    @property
    def device(self) -> float:
        return self.attention + self.experts + self.dense + self.node + self.network + self.tp


@dataclass(frozen=True, slots=True)
class _Clocks:
    """When the host has launched everything so far, and when the device is done with it."""

    host: float = 0.0
    device: float = 0.0

    def after(self, host: float, device: float, count: int = 1, *, waits: bool = False) -> _Clocks:
        """After ``count`` alike pieces of work, in each of which the host may have to wait for the device."""
        if waits:
            both = max(self.host + host, self.device + device) + (count - 1) * max(host, device)
            return _Clocks(both, both)
        launched = self.host + count * host
        return _Clocks(launched, max(max(self.host, self.device) + count * device, launched))

    @property
    def end(self) -> float:
        return max(self.host, self.device)


class TimeModel:
    """The seconds of every fold of a model on a machine; keeps what several folds have in common."""

    def __init__(self, shape: ModelShape, work: Workload, machine: Machine) -> None:
        self.shape, self.work, self.machine = shape, work, machine
        self._once = Once()
        moe = len(shape.moe_layers)
        self._kinds = [kind for kind, count in ((False, shape.layers - moe), (True, moe)) if count]
        self._weights_of_layer = {kind: len(shape.layer_weights(kind)) for kind in self._kinds}

    def least(self, layout: FoldedLayout) -> float:
        """No choice of stage, recomputation, rows' way or micro-batch makes a step of this layout shorter than this.

        The largest micro-batch, nothing computed again, no shards, and the bubble of the smallest micro-batch.
        """
        whole = self.work.batch // layout.dp
        tokens = whole * self.work.tokens / layout.cp
        stages = self._once(("stages", layout.pp), lambda: pipeline_stages(self.shape, layout.pp, self.work.chunks))
        found = []
        ranks = layout.ep * layout.etp
        near = ranks > 1 and self._reach(layout, "ep_etp")[0] == ranks
        for way in ("messages", "one-sided") if near else ("messages",):
            layers = {moe: self._layer(layout, moe, tokens, "none", way, self.work.load) for moe in self._kinds}
            found.append(max(max(self._sums(each, layers)) for each in stages))
        return min(found) * (1 + formulas.pipeline_bubble(layout.pp, whole, stages[0].chunks))

    @staticmethod
    def _sums(pipeline: PipelineStage, layers: dict[bool, _Layer]) -> tuple[float, float]:
        """Seconds of the device and of the host for all layers of a stage."""
        count = {False: pipeline.dense, True: pipeline.moe}
        return (
            sum(count[moe] * layer.device for moe, layer in layers.items()),
            sum(count[moe] * layer.host for moe, layer in layers.items()),
        )

    def of(
        self,
        layout: FoldedLayout,
        *,
        stage: int,
        recompute: Recompute,
        transport: Transport,
        micro: int,
        load: float | None = None,
    ) -> Seconds:
        """Of a step with ``micro`` sequences in a forward, on the slowest pipeline stage."""
        load = self.work.load if load is None else load
        micro_batches = self.work.batch // layout.dp // micro
        tokens = micro * self.work.tokens / layout.cp
        stages = self._once(("stages", layout.pp), lambda: pipeline_stages(self.shape, layout.pp, self.work.chunks))
        layers = {moe: self._layer(layout, moe, tokens, recompute, transport, load) for moe in self._kinds}
        head = self._head(layout, tokens)
        slowest = max(stages, key=lambda each: max(self._sums(each, layers)) + each.last * max(head.device, head.host))
        return self._of_stage(layout, slowest, layers, head, stage, micro_batches, tokens)

    def _of_stage(
        self,
        layout: FoldedLayout,
        pipeline: PipelineStage,
        layers: dict[bool, _Layer],
        head: _Layer,
        stage: int,
        micro_batches: int,
        tokens: float,
    ) -> Seconds:
        count = {False: pipeline.dense, True: pipeline.moe}
        attention = experts = dense = node = network = lanes = 0.0
        for layer, times in [*((layer, count[moe]) for moe, layer in layers.items()), (head, int(pipeline.last))]:
            times *= micro_batches
            attention, experts, dense = (
                attention + times * layer.attention, experts + times * layer.experts, dense + times * layer.dense,
            )  # fmt: skip
            node, network, lanes = node + times * layer.node, network + times * layer.network, lanes + times * layer.tp
        clocks, forward, backward = self._through(layout, pipeline, layers, head, stage, micro_batches)
        gathers, gradients, copies = self._shards(layout, pipeline, stage, micro_batches)
        if self._converts(layout, stage):
            converted = CONVERSION_BYTES * self._numel(layout, pipeline)[1] / self.machine.memory_bandwidth
            copies += micro_batches * converted
        if stage:  # gathers run behind forwards, at stage 3 half of them behind backwards, as the sums do
            first, often = gathers / 2 if stage == 3 else gathers, micro_batches if stage == 3 else 1
            sums = micro_batches if stage > 1 else 1
            gather_outer, sum_outer = self._outer_shards(layout, pipeline)
            before = self._felt(first, forward * often, often * gather_outer)
            behind = self._felt(gathers - first + gradients, backward * sums, sums * sum_outer)
            gradients, gathers = behind, before
        bubble = formulas.pipeline_bubble(layout.pp, micro_batches, pipeline.chunks) * clocks.end
        if layout.pp > 1:
            own = tokens / layout.tp if self.work.lanes == "sharded" else tokens
            sent = own * self.shape.hidden * self.work.item
            bubble += 2 * pipeline.chunks * micro_batches * self._reach(layout, "pp")[1].seconds(sent)
        clocks = _Clocks(clocks.host, clocks.device + bubble + gathers)
        host, weights = self.machine.host, self._count(pipeline)
        of_one = host.reduction + (host.bucket if layout.world > 1 and not stage else 0.0)
        clocks = clocks.after(weights * of_one, gradients + copies)
        optimizer = self._optimizer(layout, pipeline, stage)
        clocks = clocks.after(weights * host.parameter, optimizer)
        gradients += copies + (micro_batches - 1) * self._adding(layout, pipeline, stage)
        device = attention + experts + dense + node + network + lanes + bubble + gathers + gradients + optimizer
        return Seconds(
            attention=attention, experts=experts, dense=dense, exchange_node=node, exchange_network=network, tp=lanes,
            gradients=gradients, gathers=gathers, bubble=bubble, optimizer=optimizer,
            host=max(0.0, clocks.end - device),
        )  # fmt: skip

    def _felt(self, communication: float, computation: float, alone: float) -> float:
        """Seconds that gathers or sums add to the computation behind which they run: they slow it a little, and the
        outermost unit's, before the first layer and behind the last, have none to run behind."""
        behind = max(0.0, communication - alone)
        return min(communication, alone) + max(
            (1 - self.machine.overlap) * behind, behind - self.machine.overlap * computation
        )

    def _through(
        self,
        layout: FoldedLayout,
        pipeline: PipelineStage,
        layers: dict[bool, _Layer],
        head: _Layer,
        stage: int,
        micro_batches: int,
    ) -> tuple[_Clocks, float, float]:
        """All forwards and backwards, and the seconds of one of each; from the second on, all take as long."""
        counts = [(layer, pipeline.moe if moe else pipeline.dense, moe) for moe, layer in layers.items()]
        extra = {moe: self._launching_shards(layout, moe, stage, micro_batches) for moe in layers}
        found, forward = [self._start(layout, pipeline, stage)], 0.0
        for micro_batch in range(min(2, micro_batches)):
            clocks = found[-1]
            for layer, count, moe in counts:
                clocks = clocks.after(
                    layer.host_forward + extra[moe][0], layer.forward + layer.idle, count, waits=layer.waits
                )
            if pipeline.last:
                clocks = clocks.after(head.host, head.device)
            forward = clocks.end - found[-1].end
            for layer, count, moe in reversed(counts):
                host = layer.host - layer.host_forward + extra[moe][1]
                clocks = clocks.after(
                    host, layer.device - layer.forward + layer.idle * layer.waits_again, count, waits=layer.waits_again
                )
            if micro_batch:
                clocks = clocks.after(0.0, self._adding(layout, pipeline, stage))
            found.append(clocks)
        more, last, before = micro_batches - len(found) + 1, found[-1], found[-2]
        clocks = _Clocks(
            last.host + more * (last.host - before.host), last.device + more * (last.device - before.device)
        )
        return clocks, forward, last.end - before.end - forward

    def _start(self, layout: FoldedLayout, pipeline: PipelineStage, stage: int) -> _Clocks:
        """When the device has something to do: the host has launched the gathers of the outermost unit, of the first
        block with its experts, and of the next block, which it gathers ahead. All but the first are counted there."""
        if not stage:
            return _Clocks()
        mixed = self.work.precision == "mixed"
        dense, experts = mixed or layout.dp * layout.cp > 1, pipeline.moe > 0 and layout.edp > 1
        gather = self.machine.host.unit / 2
        blocks = min(2, pipeline.dense + pipeline.moe)
        return _Clocks(dense * gather, (dense * (1 + blocks) + experts) * gather)

    def _launching_shards(self, layout: FoldedLayout, moe: bool, stage: int, micro_batches: int) -> tuple[float, float]:
        """Seconds of the host for the units of one layer, in its forward and in its backward."""
        if not stage:
            return 0.0, 0.0
        mixed, host = self.work.precision == "mixed", self.machine.host
        units = (mixed or layout.dp * layout.cp > 1) + (moe and layout.edp > 1)
        often = 1 / micro_batches if stage == 1 else 1.0
        half = units * host.unit * often / 2
        half += host.conversion / 2 if moe and self._converts(layout, stage) else 0.0
        return half, half + (units * host.regather if stage == 3 else 0.0)

    def _converts(self, layout: FoldedLayout, stage: int) -> bool:
        """Whether experts that no other rank holds are converted for every forward and backward, without a unit."""
        return stage > 0 and layout.edp == 1 and self.work.precision == "mixed"

    def tokens_per_second(self, seconds: Seconds) -> float:
        """Of all ranks together."""
        return self.work.tokens * self.work.batch / seconds.total

    def mfu(self, seconds: Seconds, gpus: int) -> float:
        """The model's FLOPs, without recomputation, as a part of what the makers promise.

        Six for each number that a token is multiplied with, and causal attention three times.

        Source: PaLM (Chowdhery et al. 2022), appendix B.
        """
        shape = self.shape
        looked_up = 0 if shape.tied else shape.vocab * shape.hidden
        attention = formulas.attention_flops(1, self.work.tokens, shape.query_width, shape.value_width)
        flops = 6 * (shape.active_parameters - looked_up) + 3 * shape.layers * attention
        return flops * self.tokens_per_second(seconds) / (gpus * self.machine.peak_flops)

    # -- One layer ----------------------------------------------------------------------------------------------------

    def _layer(
        self, layout: FoldedLayout, moe: bool, tokens: float, recompute: Recompute, transport: Transport, load: float
    ) -> _Layer:
        choice = (moe, tokens, recompute, transport, load)
        place = self._once.of(layout)("place", lambda: (layout.tp, layout.cp, layout.ep, layout.etp, *(
            self._reach(layout, axis)[0] for axis in _AXES_OF_LAYERS)))  # fmt: skip
        return self._once((choice, place), lambda: self._of_layer(layout, *choice))

    def _of_layer(
        self, layout: FoldedLayout, moe: bool, tokens: float, recompute: Recompute, transport: Transport, load: float
    ) -> _Layer:
        again = {"none": (0, 0), "experts": (0, 1), "full": (1, 1)}[recompute]
        stream = tokens / layout.tp if self.work.lanes == "sharded" else tokens
        attention = self._attention(layout, tokens, stream, again[0])
        tp = self._lanes(layout, tokens, moe, again)
        part = "shared" if moe else "dense"
        dense = self._matrices(layout, moe, part, tokens, again[1] if moe else again[0])
        experts = node = network = 0.0
        waits = moe and self._waits(layout, tokens, transport)
        if moe:
            experts = self._experts(layout, tokens, again[1], load, waits=waits)
            node, network = self._exchange(layout, tokens, again[1], transport, load)
        first, second = self._launching(layout, moe, transport)
        forward = attention / (3 + again[0]) + (dense + experts) / (3 + again[1 if moe else 0])
        forward += (node + network) * 2 / (4 + 2 * again[1]) + tp / (3 + again[0])
        computed_again = again[0] * first + again[1 if moe else 0] * second
        idle = self._idle(layout) if waits and transport == "messages" else 0.0
        return _Layer(
            attention, experts, dense, node, network, tp, forward, first + second + computed_again / 2,
            (first + second) / 2, idle, waits, waits and bool(again[1]),
        )  # fmt: skip

    def _waits(self, layout: FoldedLayout, tokens: float, transport: Transport) -> bool:
        """Whether the host waits in a forward to learn how many rows came."""
        shape, ranks = self.shape, layout.ep * layout.etp
        if ranks == 1:  # it knows, and needs the sizes of few experts only
            return shape.experts <= formulas.MOST_LISTED
        if transport == "messages" or shape.expert_bias:
            return True
        own, local = ceil(tokens / layout.tp), shape.experts // layout.ep
        item = self.work.item
        return formulas.one_sided_room(ranks, layout.etp, own, shape.top_k, local, shape.hidden, item) is None

    def _idle(self, layout: FoldedLayout) -> float:
        """Seconds in which the device has nothing to do in a forward: the host, which has just learned how many rows
        come, launches the exchange."""
        host = self.machine.host
        return ((host.messages if layout.ep > 1 else 0.0) + (host.slices if layout.etp > 1 else 0.0)) / 2

    def _launching(self, layout: FoldedLayout, moe: bool, transport: Transport) -> tuple[float, float]:
        """Seconds of the host for attention, and for what follows it."""
        host = self.machine.host
        lanes = host.lanes if layout.tp > 1 else 0.0
        if not moe:
            return host.attention + lanes, host.dense + lanes
        network = host.moe + (host.ends if layout.tp > 1 and self.work.lanes == "replicated" else 0.0)
        if transport == "one-sided":
            network += host.one_sided
        else:
            network += (host.messages if layout.ep > 1 else 0.0) + (host.slices if layout.etp > 1 else 0.0)
        return host.attention + lanes, network + (host.dense + lanes if self.shape.shared_hidden else 0.0)

    def _attention(self, layout: FoldedLayout, tokens: float, stream: float, again: int) -> float:
        shape, machine, item = self.shape, self.machine, self.work.item
        queries, values = shape.query_width / layout.tp, shape.value_width / layout.tp
        flops = formulas.attention_flops(tokens, self.work.tokens, int(queries), int(values))
        scores = flops * (formulas.ATTENTION_PASSES + again) / machine.attention_flops
        if shape.sinks:  # every pair is written and read
            pairs = tokens * self.work.tokens * shape.heads / layout.tp
            scores = pairs * item * (12 + 5 * again) / machine.memory_bandwidth
        heads = (queries + shape.key_value_width / layout.tp) * tokens
        moved = stream * shape.hidden * NORM_PASSES + heads * item * formulas.ROTATION_MOVES
        moved += heads * formulas.NORM_MOVES if shape.qk_norm else 0.0
        elementwise = moved * (1 + again / 3) / machine.elementwise_bandwidth
        return self._matrices(layout, False, "attention", tokens, again) + scores + elementwise

    def _matrices(self, layout: FoldedLayout, moe: bool, part: str, tokens: float, again: int) -> float:
        """Products with all matrices of a part, three times (and as often as it is computed again)."""
        key = ("matrices", moe, part, layout.tp)
        shapes = self._once(key, lambda: [
            weight.local_shape(layout)
            for weight in self.shape.layer_weights(moe)
            if weight.part == part and len(weight.shape) == 2
        ])  # fmt: skip
        units = sum(shape[0] for shape in shapes) if part != "attention" else 0
        elementwise = tokens * units * self.work.item * 6 * (1 + again / 3) / self.machine.memory_bandwidth
        return elementwise + sum((3 + again) * self._product(tokens, shape) for shape in shapes)

    def _product(self, rows: float, shape: tuple[int, ...]) -> float:
        outer, inner = shape
        moved = self.work.item * (outer * inner + rows * (outer + inner))
        flops = formulas.matrix_flops(rows, inner, outer)
        return formulas.product_seconds(flops, moved, self._rate(), self.machine.memory_bandwidth)

    def _rate(self) -> float:
        return self.machine.product_flops / (2 if self.work.item == 4 else 1)

    def _experts(self, layout: FoldedLayout, tokens: float, again: int, load: float, *, waits: bool) -> float:
        shape, machine, item = self.shape, self.machine, self.work.item
        own, local = tokens / layout.tp, shape.experts // layout.ep
        units = shape.expert_hidden // layout.etp
        rows = formulas.routed_rows(own, shape.top_k, layout.etp, load, layout.ep, local)
        flops = formulas.matrix_flops(rows, shape.hidden, 3 * units)
        weights = 3 * local * shape.hidden * units
        moved = item * (weights + rows * (2 * shape.hidden + 3 * units))
        plain = waits and local <= formulas.MOST_LISTED and rows >= 1024 * local  # the host knows few large groups
        rate = (machine.product_flops if plain else machine.grouped_flops) / (2 if item == 4 else 1)
        products = (3 + again) * formulas.product_seconds(flops, moved, rate, machine.memory_bandwidth)
        passes = rows * item * (ROW_PASSES * shape.hidden + UNIT_PASSES * units) + tokens * shape.experts * 40
        return products + passes * (1 + again / 3) / machine.memory_bandwidth

    def _exchange(
        self, layout: FoldedLayout, tokens: float, again: int, transport: Transport, load: float
    ) -> tuple[float, float]:
        """Seconds on the link inside the node and on that between nodes; both run at once, the longer one counts.

        One-sided, a row crosses the link once for every slice of its experts, and ranks meet twice each way.
        """
        shape, machine = self.shape, self.machine
        own = tokens / layout.tp
        payload = shape.hidden * self.work.item + 4 * shape.top_k
        met = formulas.distinct_ranks(shape.experts, shape.top_k, layout.ep)
        rows = min(load * own * met, own * layout.ep)
        times = 4 + 2 * again
        node = network = 0.0
        if transport == "one-sided":
            return machine.node.seconds(times * rows * payload * (layout.etp - 1 / layout.ep), times / 2), 0.0
        if layout.ep > 1:
            inside = self._reach(layout, "ep")[0]
            node = machine.node.seconds(times * rows * payload * (inside - 1) / layout.ep, times)
            network = machine.network.seconds(times * rows * payload * (layout.ep - inside) / layout.ep, times)
            node, network = (node, 0.0) if node >= network else (0.0, network)
        if layout.etp > 1:
            gathered = rows * layout.etp * payload
            link = self._reach(layout, "etp")[1]
            crossing = link.seconds(times * formulas.collective_bytes("all_gather", layout.etp, gathered), times)
            if self._reach(layout, "etp")[0] < layout.etp:
                network += crossing
            else:
                node += crossing
        return node, network

    def _lanes(self, layout: FoldedLayout, tokens: float, moe: bool, again: tuple[int, int]) -> float:
        """What crosses the lanes: an all-reduce behind each sharded region, and one for each projection that it has;
        and the keys and values of the other context-parallel ranks, with their gradients."""
        shape, sharded = self.shape, self.work.lanes == "sharded"
        keys = shape.key_value_width if shape.latent is None else shape.query_width
        around = 0.0
        if layout.cp > 1:
            total = 2 * layout.cp * tokens * keys / layout.tp * self.work.item * (3 + again[0])
            sent = formulas.collective_bytes("all_gather", layout.cp, total)
            around = self._reach(layout, "cp")[1].seconds(sent, (layout.cp - 1) * (3 + again[0]))
        if layout.tp == 1:
            return around
        back = 1 if sharded else 2 if shape.latent is not None else 3
        reduces = 1 + back + again[0]
        if not moe or shape.shared_hidden:
            reduces += 1 + (1 if sharded else 2) + again[0]
        size = tokens * shape.hidden * self.work.item
        sent = reduces * formulas.collective_bytes("all_reduce", layout.tp, size)
        times = reduces
        if moe and not sharded:  # the ends of the experts: rows are gathered forward, their gradients backward
            sent += (2 + again[1]) * formulas.collective_bytes("all_gather", layout.tp, size)
            times += 2 + again[1]
        return around + self._reach(layout, "tp")[1].seconds(sent, times)

    def _head(self, layout: FoldedLayout, tokens: float) -> _Layer:
        """Embedding, last norm, head and loss."""

        def make() -> _Layer:
            shape = self.shape
            sharded = self.work.lanes == "sharded"  # the loss of a lane is that of its own tokens
            cut = layout.tp if sharded or (shape.vocab % layout.tp == 0 and not shape.head_whole) else 1
            products = 3 * self._product(tokens, (shape.vocab // cut, shape.hidden))
            own = tokens / layout.tp if sharded else tokens
            moved = own * shape.vocab * LOGIT_PASSES / self.machine.memory_bandwidth
            moved += own * shape.hidden * NORM_PASSES / 2 / self.machine.elementwise_bandwidth
            tp = 0.0
            if cut > 1 and not sharded:
                logits = tokens * shape.vocab * self.work.item
                stream = tokens * shape.hidden * self.work.item
                sent = formulas.collective_bytes("all_gather", cut, logits)
                sent += 2 * formulas.collective_bytes("all_reduce", cut, stream)
                tp = self._reach(layout, "tp")[1].seconds(sent, 3)
            dense, host = products + moved, self.machine.host.head
            return _Layer(0.0, 0.0, dense, 0.0, 0.0, tp, (dense + tp) / 3, host, host / 2)

        return self._once(("head", layout.tp, tokens, self._reach(layout, "tp")[0]), make)

    # -- Links, shards, optimizer -------------------------------------------------------------------------------------

    def _reach(self, layout: FoldedLayout, axis: Axis) -> tuple[int, Link]:
        """How many ranks of a group are in one node, and the link of a collective over all of it.

        Between nodes every member of a node brings its own port.
        """

        def make() -> tuple[int, Link]:
            view, size, stride = layout.span(axis)
            machine, inside = self.machine, 1
            if size > 1:
                order = (layout.order, layout.tp, layout.stage_size) if view == "expert" else ()
                key = ("span", axis, size, stride, order, layout.world)
                inside = self._once(key, lambda: node_span(layout, axis, machine.gpus_per_node))
            if inside == size:
                return inside, machine.ring
            network = machine.network
            return inside, Link(network.latency, min(network.bandwidth * inside, machine.ring.bandwidth))

        return self._once.of(layout)(axis, make)

    def _shards(
        self, layout: FoldedLayout, pipeline: PipelineStage, stage: int, micro_batches: int
    ) -> tuple[float, float, float]:
        """Seconds of gathers, of sums of gradients, and of the copies before and after them."""
        sums = micro_batches if stage >= 2 else 1
        gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[stage]
        key = ("shards", pipeline, stage > 0)
        gather, gather_copies, summing, sum_copies = self._once.of(layout)(
            key, lambda: self._of_shards(layout, pipeline, sharded=stage > 0)
        )
        return gathers * gather, sums * summing, gathers * gather_copies + sums * sum_copies

    def _of_shards(
        self, layout: FoldedLayout, pipeline: PipelineStage, *, sharded: bool
    ) -> tuple[float, float, float, float]:
        """Seconds of one gather of everything, of one sum of all gradients, and of their copies."""
        machine, item = self.machine, self.work.item
        summed = 4 if self.work.precision == "mixed" else self.work.stored
        gather = gather_copies = summing = sum_copies = 0.0
        axes: tuple[tuple[Axis, bool], ...] = (("dp_cp", False), ("edp", True))
        for axis, expert in axes:
            size, numel = layout.size(axis), self._numel(layout, pipeline)[expert]
            if size == 1 or not numel:
                continue
            units = pipeline.moe if expert else pipeline.dense + pipeline.moe + 1
            link = self._reach(layout, axis)[1]
            if sharded:
                summing += self._scattering(layout, axis, summed * numel, units)
            else:
                summing += link.seconds(formulas.collective_bytes("all_reduce", size, summed * numel), units)
            gather += link.seconds(formulas.collective_bytes("all_gather", size, item * numel), units)
            gather_copies += SHARD_PASSES * item * numel / machine.memory_bandwidth
            if sharded:
                sum_copies += SHARD_PASSES * summed * numel / machine.memory_bandwidth
            else:  # the pieces of a bucket are not aligned
                sum_copies += BUCKET_PASSES * summed * numel / machine.elementwise_bandwidth
        return gather, gather_copies, summing, sum_copies + self._scaling(layout, pipeline, sharded=sharded)

    def _scattering(self, layout: FoldedLayout, axis: Axis, total: float, units: int) -> float:
        """Seconds of summing so many bytes into shards: what the link gives a reduce-scatter."""
        inside, link = self._reach(layout, axis)
        if inside == layout.size(axis):
            link = self.machine.scatter
        return link.seconds(formulas.collective_bytes("reduce_scatter", layout.size(axis), total), units)

    def _outer_shards(self, layout: FoldedLayout, pipeline: PipelineStage) -> tuple[float, float]:
        """Seconds of one gather, and of one sum, of what is in no layer."""
        size = layout.dp * layout.cp
        if size == 1:
            return 0.0, 0.0

        def make() -> tuple[float, float]:
            numel = sum(
                prod(weight.local_shape(layout))
                for weight in self.shape.outer_weights(first=pipeline.first, last=pipeline.last)
            )
            sent = formulas.collective_bytes("all_gather", size, self.work.item * numel)
            summed = 4 if self.work.precision == "mixed" else self.work.stored
            summing = self._scattering(layout, "dp_cp", summed * numel, 1)
            return self._reach(layout, "dp_cp")[1].seconds(sent), summing

        return self._once.of(layout)(("outer", pipeline), make)

    def _scaling(self, layout: FoldedLayout, pipeline: PipelineStage, *, sharded: bool) -> float:
        """Seconds in which gradients that go through no bucket are multiplied by their factor, ``1 / (dp * cp)``."""
        ranks = layout.dp * layout.cp
        if ranks == 1:
            return 0.0
        dense, expert = self._numel(layout, pipeline)
        numel = dense / ranks + expert / layout.edp if sharded else expert * (layout.edp == 1)
        return 2 * numel * self.work.stored / self.machine.update_bandwidth

    def _adding(self, layout: FoldedLayout, pipeline: PipelineStage, stage: int) -> float:
        """Seconds in which a later micro-batch is added to the gradients, or from stage 2 on to their shards."""
        dense, expert = self._numel(layout, pipeline)
        numel = dense / (layout.dp * layout.cp) + expert / layout.edp if stage > 1 else dense + expert
        held = 4 if stage and self.work.precision == "mixed" else self.work.stored
        return 3 * numel * held / self.machine.memory_bandwidth

    def _numel(self, layout: FoldedLayout, pipeline: PipelineStage) -> tuple[int, int]:
        def make() -> tuple[int, int]:
            total = [0, 0]
            outer = self.shape.outer_weights(first=pipeline.first, last=pipeline.last)
            kinds = [(weight, 1) for weight in outer]
            for moe, times in ((False, pipeline.dense), (True, pipeline.moe)):
                kinds += [(weight, times) for weight in self.shape.layer_weights(moe)] if times else []
            for weight, times in kinds:
                total[weight.expert] += times * prod(weight.local_shape(layout))
            return total[0], total[1]

        return self._once(("numel", layout.tp, layout.ep, layout.etp, pipeline), make)

    def _optimizer(self, layout: FoldedLayout, pipeline: PipelineStage, stage: int) -> float:
        """Seconds of the device."""
        dense, expert = self._numel(layout, pipeline)
        own = (dense / (layout.dp * layout.cp) + expert / layout.edp) if stage else dense + expert
        return own * self.work.stored * formulas.ADAM_PASSES / self.machine.update_bandwidth

    def _count(self, pipeline: PipelineStage) -> int:
        """Of a stage's weights."""
        each = self._weights_of_layer
        return pipeline.dense * each.get(False, 0) + pipeline.moe * each.get(True, 0) + 3
