"""Checkpoints that load in any layout, and that a crash cannot damage.

A checkpoint is one directory of ``torch.distributed.checkpoint`` plus ``foldpar.json``. Every tensor in it is global
and has a name; which rank wrote which part leaves no trace in what is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foldpar import __version__
from foldpar.checkpoint.copies import check_copies
from foldpar.checkpoint.dcp import StoredTensors, Writing, write_blocks
from foldpar.checkpoint.files import (
    Claim,
    begin,
    check_shared,
    check_sizes,
    damaged_sums,
    discard,
    failed_write,
    latest_checkpoint,
    publish,
    read_manifest,
    remove_leftovers,
    remove_old,
    unfinished,
    wrong_sums,
)
from foldpar.checkpoint.manifest import Manifest, OptimizerRecord
from foldpar.checkpoint.matching import Match, left_over, match_model, match_optimizers
from foldpar.checkpoint.optimizers import Optimizers, as_optimizers
from foldpar.checkpoint.pending import PendingSave, settle
from foldpar.checkpoint.schedulers import (
    Scheduler,
    as_schedulers,
    install_schedulers,
    match_schedulers,
    scheduler_states,
)
from foldpar.checkpoint.state import (
    Block,
    Entry,
    ModelState,
    OptimizerState,
    model_state,
    optimizer_state,
    random_state,
    restore_random_state,
)
from foldpar.checkpoint.values import decode, encode
from foldpar.comm import FoldedGroups, Ranks, attempt, raise_interruption, separate_world, told
from foldpar.errors import CheckpointError
from foldpar.layout import FoldedLayout

__all__ = ["CheckpointInfo", "PendingSave", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

_SHOWN = 8


@overload
def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers | None,
    groups: FoldedGroups,
    *,
    step: int | None = ...,
    extra: Any = ...,
    schedulers: Scheduler | Sequence[Scheduler] = ...,
    asynchronous: Literal[False] = ...,
    keep: int | None = ...,
    check_replicas: bool = ...,
    piece_bytes: int = ...,
) -> None: ...
@overload
def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers | None,
    groups: FoldedGroups,
    *,
    step: int | None = ...,
    extra: Any = ...,
    schedulers: Scheduler | Sequence[Scheduler] = ...,
    asynchronous: bool,
    keep: int | None = ...,
    check_replicas: bool = ...,
    piece_bytes: int = ...,
) -> PendingSave | None: ...
def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers | None,
    groups: FoldedGroups,
    *,
    step: int | None = None,
    extra: Any = None,
    schedulers: Scheduler | Sequence[Scheduler] = (),
    asynchronous: bool = False,
    keep: int | None = None,
    check_replicas: bool = True,
    piece_bytes: int = 2**26,
) -> PendingSave | None:
    """Save everything that training needs to go on, for any layout to load; call it on every rank.

    Saved are the parameters and persistent buffers, the states and options of the optimizer by parameter name, the
    schedulers, the random state of every rank (Python's, NumPy's, torch's), ``step`` and ``extra``. Every rank writes
    its own part of what several hold, and nothing is gathered. Extra states of modules (``get_extra_state``) are not
    saved.

    The checkpoint appears at ``path`` in one atomic step, when all of it is on the disk. Until then it is a folder
    ``path.<token>.incomplete`` of this save alone, which loading refuses, and which the next save to this path removes
    if this one is dead. So a save that is killed at any moment leaves the checkpoints before it as they were, and two
    saves never mix: while one runs, another at its name is an error at once. What killed saves left in the folder
    around it is removed when a save there has succeeded.

    Args:
        path: where all ranks can write. What is there must not be a complete checkpoint.
        optimizer: any ``torch.optim.Optimizer`` whose states have the shapes of their parameters or are single
            numbers (:func:`foldpar.check_optimizer` tells after the first step); or several, as a list or a mapping,
            where each parameter belongs to one of them. ``None`` saves the model alone.
        step: the number of the step.
        extra: plain Python values, the same on all ranks, such as the place in the data: numbers, strings, bytes,
            ``None``, and lists, tuples, sets and dictionaries of them. They come back equal and of the same types.
        schedulers: one or several learning rate schedulers of this optimizer, torch's, transformers' or others with a
            ``state_dict`` of plain values, alone or in a ``SequentialLR``. What they keep for each parameter group is
            saved by parameter, so they load in any layout, where there may be other groups.
        asynchronous: copy this rank's part to the CPU, write it in a thread, and return a :class:`PendingSave`. What
            training changes afterwards does not change what is saved. Errors come from its ``wait()``, or else from
            the next save or ``groups.destroy()``, which wait for it; at the interpreter's exit they are a warning.
        keep: when this checkpoint is complete, remove older ones beside it, so that it and the newest others, ``keep``
            in all, are left: of those whose names differ from this one's in numbers alone (``step-100``, ``step-200``),
            and that hold nothing but a checkpoint's files. ``None`` removes none.
        check_replicas: compare what several ranks hold, bit by bit by a digest, and refuse to save copies that differ.
            It costs one pass over what this rank holds copies of, where it is, none of what is sharded: 0.5 s for a GB
            on a CPU core, to the 1.7 s of its writing (``benchmarks/checkpoint.py``).
        piece_bytes: no piece of a file is larger. Loading in another layout holds one such piece at a time.

    Example::

        save_checkpoint(f"runs/step-{step}", model, optimizer, groups, step=step, keep=3)

    Raises:
        CheckpointError: on every rank: there is a complete checkpoint or something else at the path, or it is being
            saved; the ranks do not see one shared folder; ranks passed different arguments, or hold different copies;
            a state cannot be placed; writing failed on some rank, such as a full disk. Also where
            another rank ended: then after the timeout of the process group at most.
        FamilyError: see :func:`~foldpar.parameter_placements`.
    """
    path = Path(os.path.abspath(path))
    ranks = Ranks.of(groups, f"Saving {path}")
    settle(ranks, model, groups)
    part = ranks.together(
        partial(_describe, model, optimizer, groups, path, step, extra, schedulers, keep, piece_bytes)
    )
    given = {"path": path, "step": step, "extra": _text(part.extra), "asynchronous": asynchronous, "keep": keep}
    given["check_replicas"] = check_replicas
    _check_same_arguments(ranks, optimizer=optimizer is not None, **given)
    _check_same_model(ranks, part)
    if check_replicas and groups.layout.world > 1:
        check_copies(ranks, part.entries, part.stage)
    start = _begin(ranks, path, part, groups, step)
    if not asynchronous:
        _write(ranks, path, start, part.blocks, part.values, keep, background=False)
        return None
    with _discarded_on_error(start.claim):
        blocks = ranks.together(lambda: [replace(block, tensor=_snapshot(block.tensor)) for block in part.blocks])
        own = separate_world(groups)
    background = Ranks.of(groups, f"Saving {path}", None if own is None else own.tp.process_group)
    work = partial(_write, background, path, start, blocks, part.values, keep, background=True)
    return PendingSave(work, model, groups, own)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What :func:`load_checkpoint` found beside tensors.

    Without a checkpoint (``path`` is ``None``) the step is 0, and everything else is as it was.
    """

    path: Path | None
    step: int | None
    extra: Any
    layout: FoldedLayout
    """That of the run which saved it."""
    random_state: Literal["restored", "other layout", "left as it was", "nothing loaded"]
    """Random states are of ranks, so they are put back only where the layout is the same."""
    optimizer: str | None
    """The class of the optimizer in the checkpoint, loaded or not."""
    foldpar: str
    torch: str


def load_checkpoint(
    path: str | os.PathLike[str] | None,
    model: nn.Module,
    optimizer: Optimizers | None,
    groups: FoldedGroups,
    *,
    schedulers: Scheduler | Sequence[Scheduler] = (),
    random_state: bool = True,
    cast: bool = False,
    verify: bool = False,
    staged: bool = False,
) -> CheckpointInfo:
    """Load a checkpoint of any layout into this one; call it on every rank.

    The model is built, folded and sharded as for training, and the optimizer is made from it. Every rank reads its own
    part: parameters and buffers in place, states of the optimizer into the tensors that it has or new ones. Options of
    the optimizer (``lr``, ``betas``, ...) become those of the checkpoint, except how it computes (``fused``,
    ``foreach``, ``capturable``, ``differentiable``).

    Everything that does not fit is found before the first write, on all ranks together, and named in one error. A file
    that turns out unreadable later leaves model and optimizer half loaded, unless ``staged``. Nothing in the files is
    run, and nothing outside of the folder is read; values are as good as whoever wrote them.

    Args:
        path: ``None``, which ``latest_checkpoint`` gives where there is none, loads nothing: training starts at step 0.
        optimizer: one or several, as in saving, in any order. ``None`` loads the model alone.
        schedulers: those whose states were saved, as many and of the same classes, in the same order.
        random_state: put the random states back, in the layout that they were saved in. ``False`` for a model that is
            loaded beside the one in training, such as an average, and should not rewind the generators.
        cast: convert parameters and buffers of another dtype, and states with them.
        verify: compare the SHA-256 sums of all files first, which reads them once more; sizes are always compared, but
            a bit that has flipped in a tensor loads as a wrong value without. Each rank sums up its part of the
            files: 0.8 s for a GB on a CPU core, to the 0.8 s of its loading where files are in memory, so it is not the
            default (``benchmarks/checkpoint.py``).
        staged: read into new tensors and copy at the end: twice the memory of this rank's part.

    Example::

        info = load_checkpoint(latest_checkpoint("runs"), model, optimizer, groups)
        first_step = info.step + 1  # 1, if there was none

    Raises:
        CheckpointError: on every rank: no complete checkpoint, files of another size or sum, a newer format, another
            model, shape, dtype or optimizer; with nothing written. Or reading failed on some rank.
        FamilyError: see :func:`~foldpar.parameter_placements`.
    """
    path = None if path is None else Path(os.path.abspath(path))
    ranks = Ranks.of(groups, f"Loading {path or 'nothing'}")
    given = {"path": path, "cast": cast, "verify": verify, "staged": staged, "random_state": random_state}
    of_schedulers = ranks.together(partial(as_schedulers, schedulers))
    optimizers = ranks.together(partial(as_optimizers, optimizer))
    _check_same_arguments(ranks, optimizer=len(optimizers), **given)
    if path is None:
        return CheckpointInfo(None, 0, None, groups.layout, "nothing loaded", None, __version__, str(torch.__version__))
    manifest = ranks.together(partial(_open, path, ranks))
    extra = ranks.together(partial(decode, manifest.extra))
    if verify:
        _verify(ranks, path, manifest)
    with torch.no_grad():
        match = ranks.together(partial(_match, manifest, model, optimizers, groups, of_schedulers, cast, staged))
        _raise_problems(ranks, path, manifest, match, groups, bool(optimizers))
        same_layout = manifest.layout == groups.layout
        restored = same_layout and random_state
        value = _read(ranks, path, manifest, match, groups.rank if restored else None, staged)
        for target, fresh in match.copies:
            target.copy_(fresh)
    _install(optimizers, match)
    ranks.together(partial(install_schedulers, of_schedulers, match.schedulers))
    if value is not None:
        ranks.together(partial(restore_random_state, value))
    return CheckpointInfo(
        path,
        manifest.step,
        extra,
        manifest.layout,
        "restored" if restored else "other layout" if random_state else "left as it was",
        None if manifest.optimizer is None else manifest.optimizer.kind,
        manifest.foldpar,
        manifest.torch,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Saving.


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one rank brings to a checkpoint."""

    stage: int
    state: ModelState
    optimizer: OptimizerState | None
    entries: list[Entry]
    blocks: list[Block]
    values: Mapping[str, Any]
    extra: Any
    """As :func:`~foldpar.checkpoint.values.encode` writes it."""
    schedulers: Mapping[str, Any]


def _describe(
    model: nn.Module,
    optimizer: Optimizers | None,
    groups: FoldedGroups,
    path: Path,
    step: int | None,
    extra: Any,
    schedulers: Scheduler | Sequence[Scheduler],
    keep: int | None,
    piece_bytes: int,
) -> _Part:
    if piece_bytes < 1:
        raise ValueError(f"piece_bytes = {piece_bytes} must be positive: the size of the largest piece in bytes.")
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep = {keep!r} must be 1 or more, the checkpoints to keep, or None for all of them.")
        if not any(letter.isdigit() for letter in path.name):
            raise CheckpointError(
                f"keep = {keep} counts checkpoints whose names differ in numbers, and {path.name} has none: give it "
                f"one, such as {path.name}-{step or 100}."
            )
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise CheckpointError(f"step = {step!r} is not an integer. Other things to remember go into extra.")
    encoded = encode(extra, "extra")
    state = model_state(model, groups)
    optimizers = as_optimizers(optimizer)
    of_optimizer = optimizer_state(optimizers, state, groups) if optimizers else None
    entries = [*state.entries.values(), *(of_optimizer.entries if of_optimizer is not None else ())]
    blocks = [block for entry in entries for block in entry.blocks(piece_bytes)]
    values = {f"random.{groups.rank}": random_state()}
    of_schedulers = scheduler_states(as_schedulers(schedulers), optimizers, state)
    return _Part(groups.coordinate.pp, state, of_optimizer, entries, blocks, values, encoded, of_schedulers)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _check_same_arguments(ranks: Ranks, **given: object) -> None:
    """Every rank looks at the same list, so that all raise if any differs."""
    first, *others = ranks.all_gather({name: str(value) for name, value in given.items()})
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise CheckpointError(
                    f"{ranks.doing}: ranks were given different arguments: {name} differs between rank 0 and rank "
                    f"{rank}. There is one of it for the whole checkpoint, so every rank must pass the same."
                )


def _check_same_model(ranks: Ranks, part: _Part) -> None:
    """Compare names, shapes, options and plain states among the ranks of each stage."""
    held = {
        "parameters": part.state.parameters,
        "buffers": part.state.buffers,
        "optimizer's options": {} if part.optimizer is None else part.optimizer.record.options,
        "optimizer's states": {} if part.optimizer is None else part.optimizer.record.state,
        "schedulers' states": part.schedulers,
    }
    sums = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in held.items()}
    of_stage: dict[int, tuple[int, dict[str, str]]] = {}
    for rank, (stage, found) in enumerate(ranks.all_gather((part.stage, sums))):
        first, of_first = of_stage.setdefault(stage, (rank, found))
        differing = [name for name in sums if of_first[name] != found[name]]
        if differing:
            texts = ranks.all_gather(_texts(held[differing[0]]) if ranks.rank in (first, rank) else {})
            raise CheckpointError(
                f"Rank {first} and rank {rank} of one pipeline stage have different {differing[0]}, by name, global "
                f"shape, dtype, family or value, so that no whole model can be saved: "
                f"{_first_difference(texts[first], texts[rank], first, rank)}. Build the same model and the same "
                f"optimizer on every rank of a stage, and let them take the same steps."
            )


def _texts(value: Mapping[str, Any]) -> dict[str, str]:
    """A line for each thing in one or two levels of dictionaries."""
    return {
        f"{name}{f': {inner}' if inner else ''}": repr(each)[:80]
        for name, of in value.items()
        for inner, each in (of.items() if isinstance(of, Mapping) else [("", of)])
    }


def _first_difference(one: Mapping[str, str], other: Mapping[str, str], first: int, rank: int) -> str:
    name = next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)
    if name is None:
        return "they are the same, in another order"
    return f"{name} is {one.get(name, 'missing')} on rank {first} and {other.get(name, 'missing')} on rank {rank}"


@dataclass(frozen=True, slots=True)
class _Start:
    """A save that has begun: its token, and on rank 0 its claim on the name and its manifest, still without files."""

    token: str
    claim: Claim | None
    manifest: Manifest | None


@contextmanager
def _discarded_on_error(claim: Claim | None) -> Iterator[None]:
    """On rank 0: what was begun is removed if the save does not come to its end, by Ctrl-C for example."""
    try:
        yield
    except BaseException:
        if claim is not None:
            with suppress(OSError):
                discard(claim)
        raise


def _begin(ranks: Ranks, path: Path, part: _Part, groups: FoldedGroups, step: int | None) -> _Start:
    """Make the folder of this save, and see it on every rank; an error is raised on every rank."""
    first_of_stage = groups.rank % groups.layout.stage_size == 0
    of_optimizer = None if part.optimizer is None else part.optimizer.record
    record = (part.state.parameters, part.state.buffers, of_optimizer, part.schedulers) if first_of_stage else None
    records = ranks.gather(record)
    begun, error = None, None
    if ranks.rank == 0:

        def prepare() -> tuple[Manifest, Claim]:
            stages = [record for record in records if record is not None]
            _check_names([(parameters, buffers) for parameters, buffers, *_ in stages])
            found = Manifest(
                foldpar=__version__,
                torch=str(torch.__version__),
                time=time.time(),
                step=step,
                extra=part.extra,
                layout=groups.layout,
                parameters={name: tensor for parameters, *_ in stages for name, tensor in parameters.items()},
                buffers={name: tensor for _, buffers, *_ in stages for name, tensor in buffers.items()},
                optimizer=_joined([optimizer for *_, optimizer, _ in stages if optimizer is not None]),
                files={},
                schedulers=[schedulers for *_, schedulers in stages if schedulers],
            )
            return found, begin(path)

        begun, error = attempt(prepare)
    manifest, claim = begun or (None, None)
    with _discarded_on_error(claim):
        _raise_on_all(ranks, error)
        token = ranks.broadcast(claim.token if claim is not None else "")
        ranks.together(partial(check_shared, path, token))
    return _Start(token, claim, manifest)


def _check_names(stages: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    seen: dict[str, int] = {}
    for stage, (parameters, buffers) in enumerate(stages):
        for name in (*parameters, *buffers):
            if name in seen:
                raise CheckpointError(
                    f"{name} is in pipeline stage {seen[name]} and in stage {stage}. A checkpoint knows tensors by "
                    f"name, so that one name must mean one tensor of the whole model. Give the modules of a stage the "
                    f"names that they have in the whole model (blocks.7 and not blocks.0)."
                )
            seen[name] = stage


def _joined(records: Sequence[OptimizerRecord]) -> OptimizerRecord | None:
    if not records:
        return None
    return OptimizerRecord(
        records[0].kind,
        {name: options for record in records for name, options in record.options.items()},
        {name: state for record in records for name, state in record.state.items()},
        {name: kind for record in records for name, kind in record.kinds.items()},
    )


def _snapshot(tensor: Tensor) -> Tensor:
    """A copy on the CPU that nothing else refers to."""
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.to("cpu")


def _write(
    ranks: Ranks,
    path: Path,
    start: _Start,
    blocks: Sequence[Block],
    values: Mapping[str, Any],
    keep: int | None,
    *,
    background: bool,
) -> None:
    with _discarded_on_error(start.claim):
        writing = Writing(unfinished(path, start.token), start.token, blocks, values, background)
        results, records = write_blocks(writing, ranks)
        error = None
        if start.claim is not None and start.manifest is not None:
            claim, manifest = start.claim, start.manifest

            def finish() -> None:
                # The metadata is written by this rank too, so its records are complete only then.
                files = {**records, **writing.finish(results)}
                publish(claim, manifest.with_files(files))

            _, error = attempt(finish)
        _raise_on_all(ranks, error)
    if ranks.rank == 0:
        _clear(path, keep)


def _clear(path: Path, keep: int | None) -> None:
    """Remove what is not to be kept any more; the checkpoint itself is complete."""
    try:
        remove_leftovers(path.parent)
        if keep is not None:
            remove_old(path, keep)
    except (OSError, CheckpointError) as error:
        warnings.warn(f"{path} is saved, but older files beside it were not removed: {error}", stacklevel=2)


def _raise_on_all(ranks: Ranks, error: BaseException | None) -> None:
    """Raise an error of rank 0 on every rank."""
    failed_disk = isinstance(error, Exception) and not isinstance(error, CheckpointError)
    text = ranks.broadcast(None if error is None else failed_write(error) if failed_disk else told(error))
    raise_interruption(error)
    if text is not None:
        raise CheckpointError(f"{ranks.doing}: {text}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Loading.


def _open(path: Path, ranks: Ranks) -> Manifest:
    manifest = read_manifest(path)
    if ranks.rank == 0:
        check_sizes(path, manifest)
    return manifest


def _verify(ranks: Ranks, path: Path, manifest: Manifest) -> None:
    """Every rank sums up some of the files."""
    mine = [name for place, name in enumerate(manifest.files) if place % ranks.size == ranks.rank]
    wrong = ranks.all_gather(ranks.together(lambda: wrong_sums(path, manifest, mine)))
    names = sorted(name for of_rank in wrong for name in of_rank)
    if names:
        raise CheckpointError(damaged_sums(path, names))


def _match(
    manifest: Manifest,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    groups: FoldedGroups,
    schedulers: Sequence[Scheduler],
    cast: bool,
    staged: bool,
) -> Match:
    state, match = model_state(model, groups), Match()
    match_model(match, manifest, state, cast=cast, staged=staged)
    if optimizers:
        match_optimizers(match, manifest, state, optimizers, staged=staged)
    match.schedulers = match_schedulers(manifest.schedulers, schedulers, optimizers, state, match.problems)
    return match


def _raise_problems(
    ranks: Ranks, path: Path, manifest: Manifest, match: Match, groups: FoldedGroups, with_optimizer: bool
) -> None:
    """One error on every rank, about all that any rank found."""
    first_of_stage = groups.rank % groups.layout.stage_size == 0
    used = (match.used, match.used_by_optimizer) if first_of_stage else (set(), set())
    gathered = ranks.all_gather((match.problems, used))
    problems = list(dict.fromkeys(problem for found, _ in gathered for problem in found))
    all_used: set[str] = set().union(*(names for _, (names, _) in gathered))
    by_optimizer: set[str] = set().union(*(names for _, (_, names) in gathered))
    problems += left_over(manifest, all_used, by_optimizer if with_optimizer and by_optimizer else None)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        listed = "".join(f"\n    {problem}" for problem in [*problems[:_SHOWN], *more])
        raise CheckpointError(f"{path} does not fit. Nothing was loaded.{listed}")


def _read(ranks: Ranks, path: Path, manifest: Manifest, match: Match, random_rank: int | None, staged: bool) -> Any:
    """Read all tensors, and the random state of a rank if asked to."""
    key = None if random_rank is None else f"random.{random_rank}"

    def plan() -> tuple[StoredTensors, list[Any]]:
        try:
            stored = StoredTensors(path, manifest)
            items = [item for entry in match.entries for item in stored.read_items(entry)]
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {error}. Nothing was loaded.") from error
        return stored, items

    stored, items = ranks.together(plan)
    values, error = attempt(lambda: stored.read(match.entries, items, [] if key is None else [key]))
    errors = ranks.all_gather(None if error is None else f"{type(error).__name__}: {error}")
    raise_interruption(error)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    if failed:
        left = (
            "The model and the optimizer are as they were."
            if staged
            else "The model and the optimizer are in an undefined state, with some tensors loaded and some not: load "
            "another checkpoint before using them. staged=True would have left them as they were."
        )
        raise CheckpointError(f"Reading {path} failed on {len(failed)} rank(s), {failed[0]}. {left}") from error
    return None if key is None or values is None else values[key]


def _install(optimizers: Sequence[Optimizer], match: Match) -> None:
    owners = {
        each: optimizer for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]
    }
    for parameter, states in match.states.items():
        optimizer = owners[parameter]
        if states:
            optimizer.state[parameter] = states
        else:
            optimizer.state.pop(parameter, None)
    for group, options in match.options:
        for name, value in options.items():
            old = group.get(name)
            if isinstance(old, Tensor):  # a captured graph reads it from there
                old.fill_(value)
            else:
                group[name] = tuple(value) if isinstance(old, tuple) else value
