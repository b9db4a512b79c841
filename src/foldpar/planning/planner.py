"""``plan``: every fold of a model on so many GPUs, its bytes and seconds, the best ones first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from heapq import heappush, heapreplace
from os import PathLike
from typing import Any, get_args

from foldpar.layout import ORDERS, FoldedLayout, Order
from foldpar.planning.folds import (
    LeftOut,
    Precision,
    Recompute,
    Transport,
    Workload,
    broken_rule,
    folds,
    layouts,
    rules_of_stage,
    transports,
)
from foldpar.planning.machine import Machine, read_machine
from foldpar.planning.memory import MemoryModel
from foldpar.planning.model_files import read_model
from foldpar.planning.report import Plan, PlanError, PlanRow
from foldpar.planning.shape import ModelShape
from foldpar.planning.timing import TimeModel
from foldpar.wording import as_integer, divisors, listed

__all__ = ["plan"]

MOST_GPUS = 2**17
STAGES = (0, 1, 2, 3)
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)


def plan(
    model: ModelShape | str | PathLike[str] | Mapping[str, Any],
    *,
    gpus: int,
    gpu: str | PathLike[str] | Machine = "h100",
    gpus_per_node: int | None = None,
    tokens: int = 4096,
    batch: int = 512,
    precision: Precision = "mixed",
    lanes: str = "replicated",
    load: float = 1.0,
    chunks: int = 1,
    tp: int | None = None,
    cp: int | None = None,
    pp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    order: Order | None = None,
    stage: int | None = None,
    recompute: Recompute | None = None,
    transport: Transport | None = None,
    micro: int | None = None,
    best: int = 20,
) -> Plan:
    """Which layout, stage and recomputation to train a model with on so many GPUs, what it costs, whether it fits.

    Every fold is tried, cross-lane ones included, in both orders, with every stage, recomputation, way of rows and
    micro-batch. Nothing is started: it takes seconds on a laptop, and no torch.

    Args:
        model: a :class:`foldpar.planning.ModelShape`, or what :func:`foldpar.planning.read_model` takes: a folder with
            a ``config.json``, the file, or its contents.
        gpus: how many there are.
        gpu: the name of a machine (``"h100"``, ``"h200"``), a file that ``foldpar calibrate`` wrote, or a
            :class:`foldpar.planning.Machine`.
        gpus_per_node: where it is not the machine's own.
        tokens: of one sequence. batch: sequences of a step, all ranks together.
        precision: ``"mixed"`` (float32 shards, bfloat16 computation), ``"bfloat16"`` or ``"float32"``.
        lanes: ``"replicated"``, or ``"sharded"`` for a model of your own with sequence parallelism.
        load: rows of the slowest rank's experts, in multiples of the balanced number; for bytes and seconds.
        chunks: parts of a pipeline stage's layers that take turns (interleaved 1F1B), at most one a layer.
        tp, cp, pp, ep, etp, order, stage, recompute, transport, micro: try only this one.
        best: how many layouts to keep.

    Example:
        >>> shape = ModelShape(hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128, vocab=151936,
        ...                    experts=128, top_k=8, expert_hidden=768, qk_norm=True)
        >>> found = plan(shape, gpus=16, batch=64, pp=1, cp=1)
        >>> found.best.layout.tp, found.best.memory.peak < 80e9
        (1, True)

    Raises:
        ModelError: the model is not known, or its numbers contradict each other. ValueError: an argument that is none
            of its choices, a machine that is not known, or degrees that were asked for and cannot be.
    """
    shape = model if isinstance(model, ModelShape) else read_model(model)
    machine = gpu if isinstance(gpu, Machine) else read_machine(gpu)
    if gpus_per_node is not None:
        machine = replace(machine, gpus_per_node=_size("gpus_per_node", gpus_per_node))
    work = Workload(
        tokens=_size("tokens", tokens),
        batch=_size("batch", batch),
        precision=_one_of("precision", precision, get_args(Precision)),
        lanes=_one_of("lanes", lanes, ("replicated", "sharded")),
        load=_load(load),
        chunks=_size("chunks", chunks),
    )
    gpus, per_node = _size("gpus", gpus, most=MOST_GPUS), machine.gpus_per_node
    if gpus > per_node and gpus % per_node:
        raise PlanError(
            f"plan: gpus_per_node = {per_node} does not divide gpus = {gpus}, and torchrun starts equally many ranks "
            f"on every node. With {gpus} GPUs, gpus_per_node can be {listed(divisors(gpus))}."
        )
    wanted: dict[str, Any] = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp, "micro": micro}
    wanted = {name: _size(name, value) for name, value in wanted.items() if value is not None}
    for name, value, known in (
        ("order", order, ORDERS),
        ("stage", stage, STAGES),
        ("recompute", recompute, RECOMPUTES),
        ("transport", transport, TRANSPORTS),
    ):
        if value is not None:
            wanted[name] = _one_of(name, value, known)
    return _Search(shape, machine, work, gpus, wanted, _size("best", best)).run()


def _size(name: str, value: object, *, most: int = 2**32) -> int:
    size = as_integer(value)
    if size is None or size < 1:
        raise PlanError(f"plan: {name} = {value!r} is not a positive integer.")
    if size > most:
        raise PlanError(f"plan: {name} = {size} is more than a plan counts with, which is {most:,}.")
    return size


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, bool) or value not in choices:
        raise PlanError(f"plan: {name} = {value!r} is unknown: it can be {listed(choices)}.")
    return value


def _load(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 1e6:
        raise PlanError(
            f"plan: load = {value!r} is not a number from 1 to 1,000,000: the slowest rank has at least the balanced "
            f"rows."
        )
    return float(value)


class _Search:
    """One walk over all candidates."""

    def __init__(
        self, shape: ModelShape, machine: Machine, work: Workload, gpus: int, wanted: dict[str, Any], best: int
    ) -> None:
        self.shape, self.machine, self.work, self.gpus, self.wanted, self.best = (
            shape, machine, work, gpus, wanted, best,
        )  # fmt: skip
        self.memory, self.time = (
            MemoryModel(shape, work, machine.device, hopper=machine.hopper),
            TimeModel(shape, work, machine),
        )
        self.left: dict[str, tuple[int, str]] = {}
        self.candidates = self.fitting = 0
        self.heap: list[tuple[float, int, tuple[Any, ...]]] = []
        self.too_large: tuple[float, float, tuple[Any, ...]] | None = None
        self.smallest: tuple[float, tuple[Any, ...]] | None = None

    def run(self) -> Plan:
        for degrees in self._degrees():
            self._try(degrees)
        rows = tuple(self._row(choice) for _, _, choice in sorted(self.heap, key=lambda each: (-each[0], -each[1])))
        smallest = self._row(self.smallest[1]) if self.smallest is not None and not rows else None
        left = tuple(LeftOut(rule, count, example) for rule, (count, example) in self.left.items())
        return Plan(
            self.shape, self.machine, self.work, self.gpus, rows, self._pareto(rows), self.candidates, left,
            self._changes(rows[0]) if rows else (), smallest,
        )  # fmt: skip

    def _degrees(self) -> list[dict[str, int]]:
        """Those that break no rule, the most promising first, so that most others need no second look."""
        names = [name for name in ("tp", "cp", "pp", "ep", "etp") if name in self.wanted]
        asked = [each for each in folds(self.gpus) if all(each[name] == self.wanted[name] for name in names)]
        if not asked:
            words = ", ".join(f"{name} = {self.wanted[name]}" for name in names)
            raise PlanError(
                f"plan: no layout of gpus = {self.gpus} has {words}. pp divides gpus, and tp * cp and ep * etp divide "
                f"gpus / pp; gpus can be divided by {listed(divisors(self.gpus))}."
            )
        kept = []
        for degrees in asked:
            broken = broken_rule(self.shape, self.gpus, degrees, self.work)
            if broken is None:
                kept.append(degrees)
            else:
                self._leave_out(*broken)
        return sorted(kept, key=lambda each: (each["tp"] * each["cp"] * each["pp"] * each["etp"], each["ep"]))

    def _leave_out(self, rule: str, example: str, count: int = 1) -> None:
        before, first = self.left.get(rule, (0, example))
        self.left[rule] = (before + count, first)

    def _leave_out_for_bytes(self, choice: tuple[Any, ...], count: int = 1) -> None:
        needs = f"{self._peak(choice) / 1e9:.0f} GB of {self.machine.usable / 1e9:.0f} at {_words(choice)}"
        self._leave_out("it fits into the memory of a GPU", needs, count)

    def _try(self, degrees: dict[str, int]) -> None:
        orders: tuple[Order, ...] = (self.wanted["order"],) if "order" in self.wanted else ORDERS
        found = list(layouts(self.gpus, degrees, orders))
        per_rank = self.work.batch // found[0].dp
        sizes = [micro for micro in divisors(per_rank) if self.wanted.get("micro", micro) == micro]
        if not sizes:
            example = f"micro = {self.wanted['micro']}, batch / dp = {per_rank}"
            self._leave_out("micro divides a data rank's sequences", example)
            return
        stages = self._stages(found[0])
        if not stages:
            return
        recomputes = self._recomputes()
        if not recomputes:
            self._leave_out("there are experts to compute again", "recompute = 'experts', experts = 0")
            return
        self.candidates += len(found) * len(sizes) * len(stages) * len(recomputes)
        frugal: tuple[Any, ...] = (found[0], stages[-1], recomputes[-1], "messages", sizes[0])
        found = [layout for layout in found if self._may_win(layout, frugal)]
        if not found:
            return
        ways = [(layout, way) for layout in found for way in self._ways(layout)]
        # Shards and more micro-batches mostly need less; in models of few layers, what is whole of one counts for more.
        if ways and not any(
            self._fits((layout, stage, recomputes[-1], way, micro))
            for layout, way in ways
            for stage in reversed(stages)
            for micro in dict.fromkeys((sizes[0], sizes[-1]))
        ):
            self._leave_out_for_bytes(frugal, len(found))
            return
        for layout in found:
            self._try_layout(layout, stages, recomputes, sizes)

    def _may_win(self, layout: FoldedLayout, frugal: tuple[Any, ...]) -> bool:
        """Whether it could be among the best, were there no memory to think of."""
        if len(self.heap) < self.best or self._speed_of(self.time.least(layout)) > self.heap[0][0]:
            return True
        self._leave_out(f"it can be as fast as the {self.best} best", _words((layout, *frugal[1:])))
        return False

    def _stages(self, layout: FoldedLayout) -> list[int]:
        kept = []
        for stage in (self.wanted["stage"],) if "stage" in self.wanted else STAGES:
            broken = rules_of_stage(layout, stage, self.work)
            if broken is None:
                kept.append(stage)
            else:
                self._leave_out(*broken)
        return kept

    def _recomputes(self) -> list[Recompute]:
        chosen = (self.wanted["recompute"],) if "recompute" in self.wanted else RECOMPUTES
        return [each for each in chosen if each != "experts" or self.shape.experts]

    def _try_layout(
        self, layout: FoldedLayout, stages: list[int], recomputes: list[Recompute], sizes: list[int]
    ) -> None:
        """The fastest choice of a layout; with one pipeline stage, the larger the micro-batch the faster it is."""
        fastest: tuple[float, tuple[Any, ...]] | None = None
        smallest: tuple[Any, ...] | None = None
        for way, reason in transports(self.shape, layout, self.machine, self.work).items():
            if self.wanted.get("transport", way) != way:
                continue
            if reason:
                self._leave_out(reason, f"{way}, ep = {layout.ep}, etp = {layout.etp}")
                continue
            smallest = (layout, stages[-1], recomputes[-1], way, sizes[0])
            fitted = {recompute: set[int]() for recompute in recomputes}  # at an earlier stage, which shards less
            for stage in stages:
                for recompute in recomputes:
                    left = [micro for micro in sizes if micro not in fitted[recompute]]
                    fitting = self._fitting(layout, stage, recompute, way, left)
                    if stage:  # without shards, a rank updates more than its part
                        fitted[recompute] |= {*fitting}
                    for micro in fitting[-1:] if layout.pp == 1 else fitting:
                        choice = (layout, stage, recompute, way, micro)
                        speed = self._speed(choice)
                        if fastest is None or speed > fastest[0]:
                            fastest = (speed, choice)
                    if fitting[-1:] == sizes[-1:] or sizes[-1] in fitted[recompute]:
                        break  # to compute more again only costs time
        if fastest is None:
            if smallest is not None:
                self._leave_out_for_bytes(smallest)
            return
        self.fitting += 1
        entry = (fastest[0], -self.fitting, fastest[1])
        if len(self.heap) < self.best:
            heappush(self.heap, entry)
        elif entry > self.heap[0]:
            heapreplace(self.heap, entry)

    def _ways(self, layout: FoldedLayout) -> list[Transport]:
        """Those that the rows of a layout can take, of those that were asked for."""
        ways = transports(self.shape, layout, self.machine, self.work)
        return [way for way, reason in ways.items() if not reason and self.wanted.get("transport", way) == way]

    def _fitting(
        self, layout: FoldedLayout, stage: int, recompute: Recompute, transport: Transport, sizes: list[int]
    ) -> list[int]:
        """The micro-batch sizes that fit, the smaller ones first.

        Bytes mostly grow with them. They fall where a single micro-batch is left, whose gradients meet no earlier ones,
        and where the room of one-sided rows becomes that for those that come.
        """
        fitting = [micro for micro in sizes if self._fits((layout, stage, recompute, transport, micro))]
        if larger := [micro for micro in sizes if micro not in fitting]:
            self._note_too_large((layout, stage, recompute, transport, larger[0]))
        return fitting

    def _peak(self, choice: tuple[Any, ...]) -> float:
        layout, stage, recompute, transport, micro = choice
        return self.memory.of(layout, stage=stage, recompute=recompute, transport=transport, micro=micro).peak

    def _fits(self, choice: tuple[Any, ...]) -> bool:
        peak = self._peak(choice)
        if self.smallest is None or peak < self.smallest[0]:
            self.smallest = (peak, choice)
        return peak <= self.machine.usable

    def _speed(self, choice: tuple[Any, ...]) -> float:
        layout, stage, recompute, transport, micro = choice
        return self.time.tokens_per_second(
            self.time.of(layout, stage=stage, recompute=recompute, transport=transport, micro=micro)
        )

    def _speed_of(self, seconds: float) -> float:
        return self.work.tokens * self.work.batch / seconds

    def _note_too_large(self, choice: tuple[Any, ...]) -> None:
        """What would be fastest with up to twice the memory."""
        peak = self._peak(choice)
        if peak < 2 * self.machine.usable:
            speed = self._speed(choice)
            if self.too_large is None or speed > self.too_large[0]:
                self.too_large = (speed, peak, choice)

    def _row(self, choice: tuple[Any, ...]) -> PlanRow:
        layout, stage, recompute, transport, micro = choice
        keywords: dict[str, Any] = {"stage": stage, "recompute": recompute, "transport": transport, "micro": micro}
        seconds = self.time.of(layout, **keywords)
        return PlanRow(
            layout, stage, recompute, transport, micro, self.work.batch // layout.dp // micro,
            self.memory.of(layout, **keywords), seconds, self.time.tokens_per_second(seconds),
            self.time.mfu(seconds, self.gpus),
        )  # fmt: skip

    def _pareto(self, rows: tuple[PlanRow, ...]) -> tuple[PlanRow, ...]:
        """Of all choices on the layouts of the rows, those that nothing beats in both memory and speed."""
        found: list[tuple[float, float, int, tuple[Any, ...]]] = []
        for layout in {row.layout: None for row in rows}:
            sizes = [each for each in divisors(self.work.batch // layout.dp) if self.wanted.get("micro", each) == each]
            stages = [each for each in STAGES if rules_of_stage(layout, each, self.work) is None]
            stages = [each for each in stages if self.wanted.get("stage", each) == each]
            for way in self._ways(layout):
                for stage in stages:
                    for recompute in self._recomputes():
                        for micro in self._fitting(layout, stage, recompute, way, sizes):
                            choice = (layout, stage, recompute, way, micro)
                            found.append((self._peak(choice), -self._speed(choice), len(found), choice))
        front, fastest = [], 0.0
        for _, slowness, _, choice in sorted(found):
            if -slowness > 1.005 * fastest:
                fastest = -slowness
                front.append(self._row(choice))
        return tuple(front)

    def _changes(self, winner: PlanRow) -> tuple[str, ...]:
        """Other machines and batches, over the best candidate of each fold."""
        said = []
        if self.too_large is not None and self.too_large[0] > 1.02 * winner.tokens_per_second:
            speed, peak, choice = self.too_large
            said.append(
                f"more memory: with {(peak - self.machine.usable) / 1e9:.0f} GB more a GPU, {_words(choice)} would "
                f"be {speed / winner.tokens_per_second:.2f} x as fast"
            )
        links = {name: getattr(self.machine, name) for name in ("node", "ring", "scatter", "network")}
        faster = {name: replace(link, bandwidth=2 * link.bandwidth) for name, link in links.items()}
        for what, machine, work in (
            ("links twice as fast", replace(self.machine, **faster), self.work),
            ("sequences twice as long", self.machine, replace(self.work, tokens=2 * self.work.tokens)),
            ("a batch twice as large", self.machine, replace(self.work, batch=2 * self.work.batch)),
            ("experts' load of 1.5", self.machine, replace(self.work, load=1.5 * self.work.load)),
        ):
            said.append(f"{what}: {self._other(winner, machine, work)}")
        return tuple(said)

    def _other(self, winner: PlanRow, machine: Machine, work: Workload) -> str:
        memory, time = (
            MemoryModel(self.shape, work, machine.device, hopper=machine.hopper),
            TimeModel(self.shape, work, machine),
        )
        found = []
        for _, _, choice in self.heap:
            layout, stage, recompute, transport, micro = choice
            keywords: dict[str, Any] = {
                "stage": stage, "recompute": recompute, "transport": transport, "micro": micro,
            }  # fmt: skip
            if memory.of(layout, **keywords).peak <= machine.usable:
                found.append((time.tokens_per_second(time.of(layout, **keywords)), choice))
        if not found:
            return "none of the leading candidates fits as it is"
        # What differs by rounding alone is equal, and the winner stays.
        speed, choice = max(found, key=lambda each: (float(f"{each[0]:.9g}"), each[1][0] == winner.layout))
        gain = f"{speed / winner.tokens_per_second:.2f} x the tokens a second"
        if choice[0] == winner.layout:
            return f"the same fold, {gain}"
        return f"{_words(choice)} would win, {gain}"


def _words(choice: tuple[Any, ...]) -> str:
    """A candidate in one line."""
    layout, stage, recompute, transport, micro = choice
    degrees = [
        f"{name}={getattr(layout, name)}" for name in ("tp", "cp", "pp", "ep", "etp") if getattr(layout, name) > 1
    ]
    order = f", {layout.order}" if layout.tp > 1 and layout.ep * layout.etp > 1 else ""
    again = "" if recompute == "none" else f", {'whole layers' if recompute == 'full' else 'experts'} recomputed"
    way = ", one-sided" if transport == "one-sided" else ""
    return f"{' '.join(degrees) or 'no model parallelism'}{order}, stage {stage}{again}{way}, micro-batch {micro}"
