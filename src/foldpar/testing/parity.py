"""Fold a module and compare everything that one step touches with one process: ``check_against_one_process``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foldpar.comm import FoldedGroups, all_gather_rows, create_groups, even_row_counts, is_dtensor, split_rows
from foldpar.errors import LayoutError, ShapeError
from foldpar.families import ParameterFamily, Reduction
from foldpar.gradients import get_total_norm, reduce_gradients
from foldpar.layout import Axis, FoldedLayout
from foldpar.testing.mistakes import Kind
from foldpar.testing.ranks import run_ranks
from foldpar.testing.report import Comparison, ParityReport, compare, norm_of_wanted
from foldpar.testing.shares import Share, Shares, Whole, placed

__all__ = ["check_against_one_process"]

Batch: TypeAlias = "Tensor | tuple[Tensor, ...]"
Loss: TypeAlias = Callable[[nn.Module, Tensor, Batch], Tensor]
FoldedLoss: TypeAlias = Callable[[nn.Module, Tensor, Batch, FoldedGroups], Tensor]
Lanes = Literal["replicated", "sharded"]
LaneGradients = Literal["replicated", "partial", "post-hoc"]
Losses = Literal["mean", "sum"]


def lopsided_loss(module: nn.Module, output: Tensor, batch: Batch) -> Tensor:
    """A loss without symmetries: every entry of the output counts differently. The mean over the output's rows."""
    flat = output.flatten()
    slopes = torch.arange(flat.numel(), device=flat.device).sin().to(flat.dtype)
    return (flat * slopes + flat.square() / 2).sum() / max(1, output.shape[0])


def check_against_one_process(
    reference: Callable[[], nn.Module],
    folded: Callable[[nn.Module, FoldedGroups], nn.Module],
    layout: FoldedLayout,
    *,
    batch: Callable[[int], Batch | list[Batch]],
    loss: Loss = lopsided_loss,
    folded_loss: FoldedLoss | None = None,
    losses: Losses = "mean",
    lanes: Lanes = "replicated",
    lane_rows: Callable[[int], Sequence[int]] | None = None,
    lane_grads: LaneGradients = "replicated",
    reduce: Callable[[nn.Module, FoldedGroups], None] | None = None,
    whole: Whole | None = None,
    share: Share | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    backend: Literal["threads", "spawned", "torchrun"] = "threads",
    timeout: float = 60.0,
) -> ParityReport:
    """Run one step folded and in one process, and report the difference of everything that it touches.

    The plain module runs on the batch of every data rank in turn. Then every rank folds a copy of it, runs on its own
    batch and reduces. Compared, each as the relative L2 difference over all ranks: the folded parameters, outputs,
    input gradients, parameter gradients before reduction (on every rank, or added up over those ranks whose gradients
    are parts by their family) and after it, and the total gradient norm. A ratio is read as the mistake it looks like.

    Example, a layer of your own beside its dense twin, on 4 ranks in this process::

        report = check_against_one_process(
            reference=lambda: DenseMoE(dim=16, experts=8),
            folded=lambda dense, groups: FoldedMoE.from_dense(dense.router, dense.gate_up, dense.down, groups),
            layout=solve_layout(4, tp=2, ep=4),
            batch=lambda data_rank: torch.randn(5 + data_rank, 16),
            whole=lambda name, of_reference: of_reference[{"experts.gate_up_proj": "gate_up", ...}[name]],
        )
        report.raise_if(1e-11)

    Args:
        reference: makes the module that one process runs; plain torch, no random numbers in its forward.
        folded: folds that module on a rank and returns what runs there. With ``tp > 1`` its parameters need marks
            (:func:`foldpar.mark_parameters`), as for training.
        layout: any with ``pp = 1``; a stage of a pipeline is checked as a layout of its own.
        batch: what data rank ``0 ... dp * cp - 1`` works on. The module is called with it, or with its first entry if
            it is a tuple; its dimension 0 are rows. A list: micro-batches of one step, equally many everywhere.
        loss: ``(module, output, batch) -> scalar``. The default weighs all entries of the output differently.
        folded_loss: ``(module, output, batch, groups) -> scalar`` on a rank, where a consumer works differently there.
            The default is ``loss`` of the whole output, with a gradient in the state that ``lanes`` and ``lane_grads``
            say.
        losses: whether the loss of the step is the mean or the sum of the data ranks' losses; as for
            :func:`foldpar.reduce_gradients`.
        lanes: ``"sharded"``: every lane gets its own slice of its data rank's rows, and gives back their outputs.
        lane_rows: for sharded lanes, ``rows -> rows of each lane``; as even as possible if left out.
        lane_grads: the state in which the module takes and gives gradients on replicated lanes, as for
            :class:`foldpar.FoldedMoE`: equal on all lanes, adding up over them, or averaging over them.
        reduce: what makes gradients complete; ``reduce_gradients(module, groups, loss=losses)`` if left out.
        whole: ``(name, tensors of the reference by name) -> the whole tensor`` that a folded parameter of this name is
            a share of, where the two modules name or stack parameters differently.
        share: ``(name, whole tensor, groups) -> this rank's share``, or None for the default, which knows foldpar's
            experts however they are stored, DTensor placements, contiguous slices over tp of what is marked as
            TP-sharded, and replicated tensors. Called with ``"output"`` for a module that gives back a part of its
            output.
        dtype, device: of the modules and batches. In float64, rounding stays far below any mistake.
        seed: for the random numbers that ``reference`` and ``batch`` draw on the CPU.
        backend: ``"threads"`` and ``"spawned"`` as for :func:`~foldpar.testing.run_ranks` (spawned ranks must be able
            to import every function). ``"torchrun"``: on the ranks that are there already, GPUs included; every rank
            makes the same call and gets the same report.
        timeout: of ranks that are started here, in seconds.

    Raises:
        LayoutError: ``pp > 1``. ValueError: arguments that contradict each other. RanksFailed: something raised on a
            rank; among that, a ``ShapeError`` says which tensor has no counterpart, or a share of another shape.
    """
    _check_options(layout, losses, lanes, lane_rows, lane_grads)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = reference().to(device, dtype)
        batches = [_micro_batches(batch(data_rank), dtype, device) for data_rank in range(layout.dp * layout.cp)]
    if len({len(own) for own in batches}) > 1:
        raise ValueError(
            f"The data ranks have {', '.join(str(len(own)) for own in batches)} micro-batches. Every forward is a "
            f"meeting of all ranks, so they need equally many; one without tokens may be [0, ...]."
        )
    task = _Task(
        module=module,
        batches=batches,
        steps=[_step_of_one_process(copy.deepcopy(module), own, loss) for own in batches],
        layout=layout,
        folded=folded,
        loss=loss,
        folded_loss=folded_loss,
        losses=losses,
        lanes=lanes,
        lane_rows=lane_rows,
        lane_grads=lane_grads,
        reduce=reduce,
        whole=whole,
        share=share,
    )
    if backend == "torchrun":
        return _report(task, _on_ranks_of_torchrun(task))
    return _report(task, run_ranks(_on_rank, layout.world, task, backend=backend, timeout=timeout))


def _check_options(layout: FoldedLayout, losses: str, lanes: str, lane_rows: object, lane_grads: str) -> None:
    if layout.pp > 1:
        raise LayoutError(
            f"pp = {layout.pp}: stages hold different layers, and one module is not a pipeline. Check the layers of a "
            f"stage on a layout of world = {layout.stage_size}, which folds in the same way."
        )
    for name, value, choices in (
        ("losses", losses, get_args(Losses)),
        ("lanes", lanes, get_args(Lanes)),
        ("lane_grads", lane_grads, get_args(LaneGradients)),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")
    if lanes == "sharded" and lane_grads != "replicated":
        raise ValueError(
            f"lanes='sharded' means that every lane gets the gradients of its own rows, so lane_grads={lane_grads!r} "
            f"cannot apply. Leave the default."
        )
    if lanes == "replicated" and lane_rows is not None:
        raise ValueError("lane_rows says how rows lie on sharded lanes; with lanes='replicated' every lane has all.")


@dataclass
class _Step:
    """What one process computed for one data rank: a value per micro-batch, and gradients by name."""

    outputs: list[Tensor] = field(default_factory=list)
    input_gradients: list[Tensor | None] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    """What a rank is told."""

    module: nn.Module
    batches: list[list[Batch]]
    steps: list[_Step]
    layout: FoldedLayout
    folded: Callable[[nn.Module, FoldedGroups], nn.Module]
    loss: Loss
    folded_loss: FoldedLoss | None
    losses: Losses
    lanes: Lanes
    lane_rows: Callable[[int], Sequence[int]] | None
    lane_grads: LaneGradients
    reduce: Callable[[nn.Module, FoldedGroups], None] | None
    whole: Whole | None
    share: Share | None

    def __deepcopy__(self, memo: object) -> _Task:
        return self  # nothing here is written to; a rank copies the module before it folds it

    def rows_of_lanes(self, rows: int) -> tuple[int, ...]:
        if self.lane_rows is None:
            return even_row_counts(rows, self.layout.tp)
        counts = tuple(self.lane_rows(rows))
        if len(counts) != self.layout.tp or sum(counts) != rows:
            raise ShapeError(
                f"lane_rows({rows}) = {counts} must hold one count for each of the {self.layout.tp} lane(s), and they "
                f"must add up to {rows}."
            )
        return counts


@dataclass(frozen=True)
class _Meeting:
    """Over which axes the ranks' parts of a tensor are added up, and what the sum is multiplied by."""

    axes: tuple[Axis, ...] = ()
    factor: float = 1.0
    layout: FoldedLayout | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor of one rank, and what it should be once the parts of all ranks have met."""

    kind: Kind
    name: str
    family: str
    got: Tensor
    want: Tensor
    meeting: _Meeting = _Meeting()


# ---------------------------------------------------------------------------------------------------------------------
# One process.


def _micro_batches(given: Batch | list[Batch], dtype: torch.dtype, device: torch.device | str) -> list[Batch]:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    batches = given if isinstance(given, list) else [given]
    return [tuple(map(moved, each)) if isinstance(each, tuple) else moved(each) for each in batches]


def _step_of_one_process(module: nn.Module, batches: list[Batch], loss: Loss) -> _Step:
    step = _Step()
    for each in batches:
        x = _input(each)
        output = module(x)
        loss(module, output, each).backward()
        step.outputs.append(output.detach())
        step.input_gradients.append(x.grad)
    step.gradients = {name: _gradient(parameter) for name, parameter in module.named_parameters()}
    return step


def _input(batch: Batch, rows: slice | None = None) -> Tensor:
    x = batch[0] if isinstance(batch, tuple) else batch
    x = (x if rows is None else x[rows]).detach().clone()
    return x.requires_grad_() if x.is_floating_point() else x


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


# ---------------------------------------------------------------------------------------------------------------------
# One rank.


def _on_rank(task: _Task) -> list[_Entry]:
    with create_groups(task.layout) as groups:
        return _entries_of_rank(task, groups)


def _on_ranks_of_torchrun(task: _Task) -> list[list[_Entry]]:
    with create_groups(task.layout) as groups:
        own = _entries_of_rank(task, groups)
        if task.layout.world == 1:
            return [own]
        gathered: list[list[_Entry]] = [[] for _ in range(task.layout.world)]
        dist.all_gather_object(gathered, own)
        return gathered


def _entries_of_rank(task: _Task, groups: FoldedGroups) -> list[_Entry]:
    data_rank = groups.dp_cp.index
    step = task.steps[data_rank]
    module = task.folded(copy.deepcopy(task.module), groups)
    shares = Shares(module, groups, whole=task.whole, share=task.share)
    weights = {name: parameter.detach() for name, parameter in task.module.named_parameters()}
    total = {name: sum((each.gradients[name] for each in task.steps[1:]), task.steps[0].gradients[name])
             for name in weights}  # fmt: skip
    entries = [
        _Entry("parameter", name, shares.family(name), shares.local(name, parameter.detach()).clone(), want)
        for (name, parameter), want in zip(shares.parameters.items(), shares.of(weights), strict=True)
    ]
    for number, each in enumerate(task.batches[data_rank]):
        entries += _forward_and_backward(module, each, step, number, task, groups)

    raw_wants, wants = shares.of(step.gradients), shares.of(total)
    for (name, parameter), own, everybody in zip(shares.parameters.items(), raw_wants, wants, strict=True):
        family = shares.families[name]
        want = everybody if family.view == "expert" else own
        got, meeting = _raw_gradient(parameter, family, shares.groups_of[name].layout, task.lane_grads)
        entries.append(_Entry("raw gradient", name, family.name, shares.local(name, got), want, meeting))

    if task.reduce is None:
        reduce_gradients(module, groups, loss=task.losses)
    else:
        task.reduce(module, groups)
    owners = task.layout.dp * task.layout.cp if task.losses == "mean" else 1
    for (name, parameter), want in zip(shares.parameters.items(), wants, strict=True):
        got = shares.local(name, _gradient(parameter))
        entries.append(_Entry("gradient", name, shares.family(name), got, want / owners))
    norm = torch.stack([gradient.double().norm() for gradient in total.values()]).norm() / owners
    entries.append(_Entry("gradient norm", "all", "-", get_total_norm(module, groups).double(), norm))
    return [replace(entry, got=_fitting(entry).cpu(), want=entry.want.cpu()) for entry in entries]


def _forward_and_backward(
    module: nn.Module, batch: Batch, step: _Step, number: int, task: _Task, groups: FoldedGroups
) -> Iterator[_Entry]:
    whole_input, whole_output = _input(batch), step.outputs[number]
    own = slice(None)
    counts: tuple[int, ...] = ()
    if task.lanes == "sharded":
        counts = task.rows_of_lanes(whole_input.shape[0])
        start = sum(counts[: groups.tp.index])
        own = slice(start, start + counts[groups.tp.index])
    x = _input(batch, own)
    output = module(x)
    if task.folded_loss is not None:
        loss = task.folded_loss(module, output, batch, groups)
    else:
        loss = task.loss(module, _whole_output(output, counts, task, groups), batch)
    loss.backward()

    given = task.share("output", whole_output, groups) if task.share is not None else None
    want = whole_output[own] if given is None else given
    if is_dtensor(output):
        output, want = output.to_local(), placed(want, output)
    yield _Entry("output", "all", "-", output.detach(), want)
    gradient = step.input_gradients[number]
    if gradient is not None:
        got = torch.zeros_like(x) if x.grad is None else x.grad
        meeting = _Meeting()
        if task.lanes == "replicated" and task.lane_grads != "replicated":
            meeting = _Meeting(("tp",), 1.0 if task.lane_grads == "partial" else 1 / task.layout.tp, task.layout)
        yield _Entry("input gradient", "all", "-", got, gradient[own], meeting)


def _whole_output(output: Tensor, counts: Sequence[int], task: _Task, groups: FoldedGroups) -> Tensor:
    """The output as one process has it, whose gradient comes back in the state that the module expects."""
    if task.lanes == "sharded":
        return all_gather_rows(output, groups.tp, row_counts=counts, backward="slice")
    if task.lane_grads == "partial":
        rows = even_row_counts(output.shape[0], groups.tp.size)
        own = split_rows(output, groups.tp, backward="zero_pad")
        return all_gather_rows(own, groups.tp, row_counts=rows, backward="slice")
    return output


def _raw_gradient(
    parameter: nn.Parameter, family: ParameterFamily, layout: FoldedLayout, lane_grads: LaneGradients
) -> tuple[Tensor, _Meeting]:
    """A gradient before reduction, and what makes it the replica's (or, of an expert, everybody's)."""
    gradient = _gradient(parameter)
    declared = is_dtensor(gradient) and is_dtensor(parameter)
    if is_dtensor(gradient) and is_dtensor(parameter):
        # It declares its state: placing it like its parameter is the reduction over the lanes.
        gradient = gradient.redistribute(placements=parameter.placements).to_local().clone()
    if declared and family.view == "dense":
        return gradient, _Meeting()
    axes: list[Axis] = []
    factor = float(family.factor)
    if family.reduction is Reduction.SUM and family.lane_axis is not None and not declared:
        axes.append(family.lane_axis)
    # Under AVERAGE each lane holds the whole already, unless lanes only average to it.
    if family.reduction is Reduction.AVERAGE and family.lane_axis is not None and lane_grads == "post-hoc":
        axes.append(family.lane_axis)
        factor /= layout.size(family.lane_axis)
    if family.reduction is Reduction.EXPERT_TP_CANCEL:
        factor /= layout.tp
    if family.view == "expert":
        axes.append("edp")
    return gradient, _Meeting(tuple(axes), factor, layout)


def _fitting(entry: _Entry) -> Tensor:
    if entry.got.shape == entry.want.shape:
        return entry.got
    of = "" if entry.name == "all" else f" of {entry.name}"
    name = "output" if entry.kind == "output" else entry.name
    raise ShapeError(
        f"The {entry.kind}{of} is {list(entry.got.shape)} on this rank, but its share of one process' tensor is "
        f"{list(entry.want.shape)}. Where a rank holds another share, say which: share(name, whole, groups) is called "
        f"with the name {name!r}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# All ranks.


def _report(task: _Task, entries_of_rank: list[list[_Entry]]) -> ParityReport:
    met = [(entries[0], _met(entries, task.layout)) for entries in zip(*entries_of_rank, strict=True)]
    largest: dict[Kind, float] = {}
    for first, pairs in met:
        largest[first.kind] = max(largest.get(first.kind, 0.0), norm_of_wanted(pairs))
    comparisons: list[Comparison] = []
    wrong_before: set[str] = set()
    for first, pairs in met:
        found = compare(first.kind, first.name, first.family, pairs, task.layout, largest=largest[first.kind])
        if found.looks_like and first.kind == "raw gradient":
            wrong_before.add(first.name)
        if found.looks_like and first.kind == "gradient" and first.name in wrong_before:
            found = replace(found, looks_like="wrong before reduction already")
        comparisons.append(found)
    return ParityReport(task.layout, tuple(comparisons))


def _met(entries: Sequence[_Entry], layout: FoldedLayout) -> list[tuple[Tensor, Tensor]]:
    """Every rank's tensor, completed by those that it meets, beside what it should be then."""
    tensors = [entry.got for entry in entries]
    meeting = entries[0].meeting
    for axis in meeting.axes:
        groups = [(meeting.layout or layout).group(axis, rank) for rank in range(layout.world)]
        tensors = [torch.stack([tensors[member] for member in members]).sum(0) for members in groups]
    return [(tensor * meeting.factor, entry.want) for tensor, entry in zip(tensors, entries, strict=True)]
