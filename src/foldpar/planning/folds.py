"""Which folds a model has on so many GPUs, and for the others the first rule that they break.

The rules are those of :func:`foldpar.solve_layout`, :func:`foldpar.plan_fold` and :func:`foldpar.shard_model`, told
from numbers: what passes them here is not refused there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from foldpar.layout import ORDERS, Axis, FoldedLayout, Order, solve_layout
from foldpar.planning.machine import Machine
from foldpar.planning.shape import ModelShape
from foldpar.wording import divisors

__all__ = [
    "LeftOut",
    "Recompute",
    "Transport",
    "Workload",
    "broken_rule",
    "folds",
    "layouts",
    "node_span",
    "rules_of_stage",
    "transports",
]

Recompute = Literal["none", "experts", "full"]
Transport = Literal["messages", "one-sided"]
Precision = Literal["mixed", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a step trains on, and how.

    Attributes:
        tokens: tokens of one sequence.
        batch: sequences of one step, all ranks together.
        precision: ``"mixed"``: float32 shards, bfloat16 computation; otherwise everything in one dtype.
        lanes: ``"sharded"`` where the lanes of a TP group hold slices of the tokens (sequence parallelism).
        optimizer_states: tensors like the parameter that the optimizer keeps, 2 for Adam.
        load: how many times the balanced number of rows the slowest rank's experts get.
        chunks: parts of a pipeline stage's layers that take turns in an interleaved schedule, at most one a layer.
    """

    tokens: int
    batch: int
    precision: Precision = "mixed"
    lanes: Literal["replicated", "sharded"] = "replicated"
    optimizer_states: int = 2
    load: float = 1.0
    chunks: int = 1

    @property
    def item(self) -> int:
        """Bytes of a number in computation."""
        return 4 if self.precision == "float32" else 2

    @property
    def stored(self) -> int:
        """Bytes of a number of the parameters, gradients and optimizer states."""
        return 2 if self.precision == "bfloat16" else 4


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A rule, how many candidates break it before any other, and the first of them in words."""

    rule: str
    count: int
    example: str


def folds(world: int) -> Iterator[dict[str, int]]:
    """The degrees of every layout of so many ranks, one order."""
    for pp in divisors(world):
        stage = world // pp
        for dense in divisors(stage):
            for tp in divisors(dense):
                for expert in divisors(stage):
                    for etp in divisors(expert):
                        yield {"tp": tp, "cp": dense // tp, "pp": pp, "ep": expert // etp, "etp": etp}


def layouts(world: int, degrees: Mapping[str, int], orders: tuple[Order, ...] = ORDERS) -> Iterator[FoldedLayout]:
    """The layouts of these degrees in these orders, one where they do not differ."""
    first = solve_layout(world, **degrees, order=orders[0])
    one_order = degrees["tp"] in (1, first.stage_size) or degrees["ep"] * degrees["etp"] == 1
    for order in orders[:1] if one_order else orders:
        yield replace(first, order=order)


def broken_rule(shape: ModelShape, world: int, degrees: Mapping[str, int], work: Workload) -> tuple[str, str] | None:
    """The first rule that these degrees break, and how; ``None`` where they break none."""
    tp, cp, pp, ep, etp = (degrees[name] for name in ("tp", "cp", "pp", "ep", "etp"))
    dp = world // (pp * tp * cp)
    if pp > shape.layers:
        return "a pipeline stage has at least one layer", f"pp = {pp}, layers = {shape.layers}"
    if shape.experts == 0 and ep * etp > 1:
        return "a model without experts has nothing to fold: ep = etp = 1", f"ep = {ep}, etp = {etp}"
    if shape.heads % tp:
        return "tp divides the attention heads", f"tp = {tp}, heads = {shape.heads}"
    heads = shape.key_value_heads
    if shape.latent is None and heads % tp and tp % heads:
        return "tp divides the key-value heads, or is a multiple of them", f"tp = {tp}, kv_heads = {heads}"
    if len(shape.moe_layers) < shape.layers and shape.intermediate % tp:
        return "tp divides the width of dense layers", f"tp = {tp}, intermediate = {shape.intermediate}"
    if shape.shared_hidden % tp:
        return "tp divides the width of the shared experts", f"tp = {tp}, shared_hidden = {shape.shared_hidden}"
    if shape.experts and shape.experts % ep:
        return "ep divides the experts", f"ep = {ep}, experts = {shape.experts}"
    if shape.experts and shape.expert_hidden % etp:
        return "etp divides an expert's hidden units", f"etp = {etp}, expert_hidden = {shape.expert_hidden}"
    if work.tokens % cp:
        return "cp divides a sequence", f"cp = {cp}, tokens = {work.tokens}"
    if work.batch % dp:
        return "dp divides the batch, so that every data rank gets a sequence", f"dp = {dp}, batch = {work.batch}"
    return None


def rules_of_stage(layout: FoldedLayout, stage: int, work: Workload) -> tuple[str, str] | None:
    """The first rule that a stage of ``shard_model`` breaks on a layout."""
    if stage == 0 and work.precision == "mixed":
        return "float32 shards with bfloat16 computation are shard_model's: stage 1, 2 or 3", "stage = 0"
    if stage and layout.dp * layout.cp == 1 and layout.edp == 1 and work.precision != "mixed":
        return "there are several data ranks to shard over", f"stage = {stage}, dp * cp = 1, edp = 1"
    return None


def transports(shape: ModelShape, layout: FoldedLayout, machine: Machine, work: Workload) -> dict[Transport, str]:
    """The ways of rows, with the reason where one is not possible."""
    reason = ""
    if layout.ep * layout.etp == 1:
        reason = "rows stay where they are with ep = etp = 1"
    elif machine.device == "cpu":
        reason = "one-sided rows travel through the memory of GPUs"
    elif node_span(layout, "ep_etp", machine.gpus_per_node) < layout.ep * layout.etp:
        reason = "one-sided rows travel inside a node"
    return {"messages": "", "one-sided": reason}


def node_span(layout: FoldedLayout, axis: Axis, gpus_per_node: int) -> int:
    """How many ranks of a group lie in one node: the fewest that its first rank, or the world's last, meets in its own.

    Example:
        >>> layout = solve_layout(16, tp=2, ep=8)
        >>> node_span(layout, "ep", 8), node_span(replace(layout, order="consecutive"), "ep", 8)
        (4, 8)
    """
    return min(
        sum(peer // gpus_per_node == rank // gpus_per_node for peer in layout.group(axis, rank))
        for rank in (0, layout.world - 1)
    )
