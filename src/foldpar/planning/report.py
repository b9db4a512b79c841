"""What a plan found, and in words: one line of verdict, a ranked table, the winner, and the lines that set it up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from foldpar.errors import FoldingError
from foldpar.layout import FoldedLayout
from foldpar.planning import formulas
from foldpar.planning.folds import LeftOut, Recompute, Transport, Workload
from foldpar.planning.machine import Machine
from foldpar.planning.memory import LOADS, Memory, MemoryModel
from foldpar.planning.shape import ModelShape
from foldpar.planning.timing import Seconds

__all__ = [
    "Plan",
    "PlanError",
    "PlanRow",
    "arguments",
    "commands",
    "describe",
    "sureness",
    "table_of",
    "text",
    "verdict",
]

_NAMES = {
    "none": "nothing", "experts": "MoE blocks", "full": "whole layers",
}  # fmt: skip
HEADS = (
    "", "tp", "cp", "pp", "dp", "ep", "etp", "edp", "order", "stage", "recomputed", "rows", "micro", "GB", "at 1.5x",
    "at 3x", "ms", "tokens/s", "MFU", "bound by",
)  # fmt: skip


SHARED_BITS = 30
"""Less than so many bits of bytes are shared by ``OneSided()``."""


class PlanError(FoldingError, ValueError):
    """A question that a plan cannot answer: sizes that are none, choices that do not exist, or nothing that fits."""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One candidate and what is predicted of it.

    Attributes:
        layout: degrees and order.
        stage: that of :func:`foldpar.shard_model`.
        recompute: what a backward computes again: nothing, the MoE blocks, or whole layers.
        transport: how rows travel.
        micro: sequences of one forward on a data rank.
        micro_batches: forwards of a step.
        memory: bytes of the rank that needs the most, at the load that was asked for.
        seconds: of a step, and what they consist of.
        tokens_per_second: of all GPUs together.
        mfu: model FLOPs as a part of the makers' number.
    """

    layout: FoldedLayout
    stage: int
    recompute: Recompute
    transport: Transport
    micro: int
    micro_batches: int
    memory: Memory
    seconds: Seconds
    tokens_per_second: float
    mfu: float

    def choices(self) -> dict[str, object]:
        """What a user chooses, as plain data."""
        layout = self.layout
        degrees = {
            name: getattr(layout, name) for name in ("world", "tp", "cp", "pp", "dp", "ep", "etp", "edp", "order")
        }
        return {
            **degrees, "stage": self.stage, "recompute": self.recompute, "transport": self.transport,
            "micro": self.micro, "micro_batches": self.micro_batches,
        }  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """All of it as plain data: bytes and milliseconds."""
        return {
            **self.choices(), "bytes": self.memory.to_dict(), "milliseconds": self.seconds.to_dict(),
            "tokens_per_second": self.tokens_per_second, "mfu": self.mfu, "bound_by": self.seconds.bound,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What :func:`foldpar.plan` found; ``print`` it to read it.

    Attributes:
        shape, machine, work, gpus: what was asked.
        rows: the fastest layouts, each with its fastest choices that fit, the fastest first.
        pareto: of all choices on these layouts those that no other beats in both memory and time, the smallest first.
        candidates: how many choices of layout, stage, recomputation and micro-batch there were.
        left_out: the rules that layouts break, each with how many break it first.
        changes: what would change the winner.
        smallest: where nothing fits, the candidate with the smallest peak.
    """

    shape: ModelShape
    machine: Machine
    work: Workload
    gpus: int
    rows: tuple[PlanRow, ...]
    pareto: tuple[PlanRow, ...]
    candidates: int
    left_out: tuple[LeftOut, ...]
    changes: tuple[str, ...]
    smallest: PlanRow | None

    @property
    def best(self) -> PlanRow:
        """The winner.

        Raises:
            PlanError: nothing fits; the text says how much is missing.
        """
        if not self.rows:
            raise PlanError(self.verdict())
        return self.rows[0]

    def at_loads(self, row: PlanRow) -> dict[float, Memory]:
        """The bytes of a candidate at balanced, 1.5 and 3 times the balanced load."""
        model = MemoryModel(self.shape, self.work, self.machine.device, hopper=self.machine.hopper)
        return {load: model.of(**arguments(row), load=load) for load in LOADS}

    def verdict(self) -> str:
        """One line: what to do, and how fast it would be; or what is missing."""
        return verdict(self)

    def commands(self, row: PlanRow | None = None) -> str:
        """The lines that set up a candidate, the winner by default."""
        return commands(self, row or self.best)

    def __str__(self) -> str:
        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data: bytes, milliseconds, the machine with its sources."""
        rows = [
            {**row.to_dict(), "bytes_at_load": {str(load): each.to_dict() for load, each in self.at_loads(row).items()}}
            for row in self.rows
        ]
        return {
            "verdict": self.verdict(),
            "model": {**self.shape.to_dict(), "parameters": self.shape.parameters,
                      "active_parameters": self.shape.active_parameters},
            "machine": self.machine.to_dict(), "work": asdict(self.work), "gpus": self.gpus,
            "candidates": self.candidates, "rows": rows,
            "pareto": [row.to_dict() for row in self.pareto],
            "smallest": None if self.smallest is None else self.smallest.to_dict(),
            "left_out": [asdict(each) for each in self.left_out], "changes": list(self.changes),
            "commands": self.commands() if self.rows else None,
        }  # fmt: skip

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)


def arguments(row: PlanRow) -> dict[str, Any]:
    return {
        "layout": row.layout, "stage": row.stage, "recompute": row.recompute, "transport": row.transport,
        "micro": row.micro,
    }  # fmt: skip


def describe(row: PlanRow) -> str:
    """A candidate in one line."""
    layout = row.layout
    degrees = [f"{name}={getattr(layout, name)}" for name in ("tp", "cp", "pp", "ep", "etp")]
    shown = [each for each in degrees if not each.endswith("=1")]
    order = f" {layout.order}" if layout.tp > 1 and layout.ep * layout.etp > 1 else ""
    again = "" if row.recompute == "none" else f", {_NAMES[row.recompute]} computed again"
    way = ", one-sided" if row.transport == "one-sided" else ""
    return f"{' '.join(shown) or 'data parallelism alone'}{order}, stage {row.stage}{again}{way}"


def forwards(row: PlanRow) -> str:
    """Its micro-batches, in words."""
    return f"{row.micro_batches} micro-batch{'' if row.micro_batches == 1 else 'es'} of {row.micro}"


def verdict(plan: Plan) -> str:
    """One line."""
    shape = plan.shape
    used = "" if not shape.experts else f", {_numbers(shape.active_parameters)} of them used by a token"
    what = f"{shape.name} ({_numbers(shape.parameters)} parameters{used}) on {plan.gpus} x {plan.machine.name}"
    if not plan.rows:
        least = plan.smallest
        if least is None:
            return f"{what}: no layout is possible; see what is left out, and why."
        return (
            f"{what} does not fit: the least is {least.memory.peak / 1e9:.1f} GB on a GPU, with {describe(least)} and "
            f"micro-batches of {least.micro}, and {plan.machine.usable / 1e9:.1f} GB can be used. "
            f"{_ways_to_less(plan)} would make it less."
        )
    best = plan.rows[0]
    return (
        f"{what}: {describe(best)}, {forwards(best)}: "
        f"{best.memory.peak / 1e9:.1f} of {plan.machine.usable / 1e9:.1f} GB, {best.seconds.total * 1e3:,.0f} ms a "
        f"step, {best.tokens_per_second:,.0f} tokens/s, MFU {best.mfu:.1%}, bound by {best.seconds.bound}."
    )


def _ways_to_less(plan: Plan) -> str:
    """To need less memory."""
    if plan.work.precision == "bfloat16":
        return "More GPUs or shorter sequences"
    return "More GPUs, shorter sequences or precision 'bfloat16'"


def _numbers(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def table_of(plan: Plan, rows: tuple[PlanRow, ...]) -> list[tuple[str, ...]]:
    """Cells of the ranked table, without its heads."""
    lines = []
    for place, row in enumerate(rows, 1):
        layout, loads = row.layout, plan.at_loads(row)
        fits = [_checked(memory.peak, plan.machine.usable) for memory in loads.values()]
        lines.append((
            str(place), *(str(getattr(layout, name)) for name in ("tp", "cp", "pp", "dp", "ep", "etp", "edp")),
            layout.order if layout.tp > 1 else "-", str(row.stage), _NAMES[row.recompute], row.transport,
            str(row.micro), *fits, f"{row.seconds.total * 1e3:,.0f}", f"{row.tokens_per_second:,.0f}", f"{row.mfu:.1%}",
            row.seconds.bound,
        ))  # fmt: skip
    return lines


def _checked(peak: float, usable: float) -> str:
    return f"{peak / 1e9:.1f}{'' if peak <= usable else '!'}"


def text(plan: Plan, shown: int = 10) -> str:
    """All of it, for people."""
    sections = [verdict(plan)]
    if plan.rows:
        best = plan.rows[0]
        sections.append(_aligned([HEADS, *table_of(plan, plan.rows[:shown])]))
        sections.append("bytes of the first (GB)\n" + _aligned(_bytes(plan.at_loads(best))))
        parts = [(name.replace("_", " "), f"{value:,.1f}") for name, value in best.seconds.to_dict().items() if value]
        sections.append("milliseconds of the first\n" + _aligned(parts))
    sections.append("left out, by the first rule that is broken\n" + _aligned(
        [(f"{each.count:,} x", each.rule, f"({each.example})") for each in plan.left_out]
    ))  # fmt: skip
    if plan.changes:
        sections.append("what would change it\n" + "\n".join(f"  {each}" for each in plan.changes))
    if plan.rows:
        sections.append("to set it up\n" + commands(plan, plan.rows[0]))
    return "\n\n".join([*sections, sureness(plan)])


def _bytes(loads: dict[float, Memory]) -> list[tuple[str, ...]]:
    heads = ("", *("balanced" if load == 1 else f"{load:g}x load" for load in loads))
    names = [each.name for each in fields(Memory)]
    rows = [(name, *(_gigabytes(getattr(memory, name)) for memory in loads.values())) for name in names]
    return [heads, *rows]


def _gigabytes(value: object) -> str:
    return f"{value / 1e9:.2f}" if isinstance(value, (int, float)) else str(value)


def commands(plan: Plan, row: PlanRow) -> str:
    """``solve_layout``, fold, recompute, ``shard_model`` and ``torchrun`` for one candidate, with their imports."""
    layout, shape, per_node = row.layout, plan.shape, plan.machine.gpus_per_node
    degrees = "".join(
        f", {name}={getattr(layout, name)}" for name in ("tp", "cp", "pp", "ep", "etp") if getattr(layout, name) > 1
    )
    order = f', order="{layout.order}"' if layout.tp > 1 and layout.ep * layout.etp > 1 else ""
    lines = [*_imports(plan, row), f"layout = foldpar.solve_layout({layout.world}{degrees}{order})"]
    lines.append('groups = foldpar.create_groups(layout, separate=("dp_cp", "edp"))')
    if shape.experts:
        lines.append(f"foldpar.fold_model(model, groups{_way_of_rows(plan, row)})")
    else:
        lines.append("foldpar.mark_parameters(model, foldpar.families.REPLICATED)  # nothing to fold without experts")
    if plan.work.lanes == "sharded":
        lines[-1] = 'model = ...  # your own blocks: foldpar.FoldedMoE(..., lanes="sharded")'
    lines += _recomputation(plan, row)
    if row.stage:
        precision = ""
        if plan.work.precision == "mixed":
            precision = ", mixed_precision=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)"
        lines.append(f"foldpar.shard_model(model, groups, stage={row.stage}{precision})")
    lines.append(f"# {forwards(row)} x {plan.work.tokens} tokens on each data rank")
    if layout.pp > 1:
        turns = f", {plan.work.chunks} chunks of layers a rank" if plan.work.chunks > 1 else ""
        lines.append(f"# pp = {layout.pp}: a schedule of your own, such as torch.distributed.pipelining's{turns}")
    if layout.cp > 1:
        lines.append(f"# cp = {layout.cp}: attention over context-parallel ranks is your own")
    if layout.tp > 1 and not shape.experts:
        lines.append(f"# tp = {layout.tp}: of a model without experts it is torch's parallelize_module")
    nodes = -(-layout.world // per_node)
    each = layout.world if nodes == 1 else per_node
    lines.append(f"# torchrun {'--standalone' if nodes == 1 else f'--nnodes {nodes}'} --nproc-per-node {each} train.py")
    return "\n".join(f"  {line}" for line in lines)


def _way_of_rows(plan: Plan, row: PlanRow) -> str:
    """``OneSided`` without numbers, but for a bound on shared memory that these rows would exceed."""
    layout, shape = row.layout, plan.shape
    if row.transport == "messages":  # else they travel one-sided where GPUs can, and that was not predicted
        return ", one_sided=False" if layout.ep * layout.etp > 1 and plan.machine.device != "cpu" else ""
    own = -(-row.micro * plan.work.tokens // (layout.cp * layout.tp))
    shared = formulas.shared_bytes(layout.ep * layout.etp, own, shape.hidden, shape.top_k, plan.work.item)
    bits = shared.bit_length()
    return f", one_sided=foldpar.OneSided({f'most_bytes=2**{bits}' if bits > SHARED_BITS else ''})"


def _imports(plan: Plan, row: PlanRow) -> list[str]:
    mixed, again = row.stage > 0 and plan.work.precision == "mixed", row.recompute == "experts"
    lines = {
        "from functools import partial": again,
        "import torch": mixed,
        "from torch.distributed.fsdp import MixedPrecisionPolicy": mixed,
        "from torch.utils.checkpoint import checkpoint": again,
        "import foldpar": True,
    }
    return [line for line, needed in lines.items() if needed]


def _recomputation(plan: Plan, row: PlanRow) -> list[str]:
    if row.recompute == "full":
        return ["model.gradient_checkpointing_enable()"]
    if row.recompute == "none":
        return []
    which = ' if hasattr(each.mlp, "experts")' if plan.shape.dense_layers else ""
    blocks = f"[each.mlp for each in model.model.layers{which}]"
    return [f"for block in {blocks}:", "    block.forward = partial(checkpoint, block.forward, use_reentrant=False)"]


def sureness(plan: Plan) -> str:
    """How sure the numbers are, and from what."""
    kinds: dict[str, list[str]] = {"measured": [], "published": [], "assumed": [], "not measured": []}
    for name, source in plan.machine.sources.items():
        kind = next(filter(source.startswith, kinds), "published" if "data sheet" in source else "assumed")
        kinds[kind].append(name.replace("_", " "))
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    return (
        f"How sure: bytes follow from the code of foldpar and transformers line by line (benchmarks/NOTES.md has what "
        f"was compared). Milliseconds are a model: within a factor, better for comparing folds than as numbers. Of "
        f"{plan.machine.gpu}, {told or 'nothing says where the numbers come from'}."
    )


def _aligned(table: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)] if table else []
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
