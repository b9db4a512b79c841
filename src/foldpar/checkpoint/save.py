"""Training state into files that a crash cannot damage, for any layout to load.

A checkpoint is one directory of ``torch.distributed.checkpoint`` plus ``foldpar.json``. Every tensor in it is global
and has a name; which rank wrote which part leaves no trace in what is loaded.
"""

from __future__ import annotations

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

from foldpar import __version__
from foldpar.checkpoint.agreement import check_same_arguments, check_same_model
from foldpar.checkpoint.copies import check_copies
from foldpar.checkpoint.dcp import Writing, write_blocks
from foldpar.checkpoint.files import (
    Claim,
    begin,
    check_shared,
    discard,
    failed_write,
    publish,
    remove_leftovers,
    remove_old,
    unfinished,
)
from foldpar.checkpoint.manifest import Manifest, OptimizerRecord
from foldpar.checkpoint.optimizers import Optimizers, as_optimizers
from foldpar.checkpoint.pending import PendingSave, settle
from foldpar.checkpoint.schedulers import Scheduler, as_schedulers, scheduler_states
from foldpar.checkpoint.state import (
    Block,
    Entry,
    ModelState,
    OptimizerState,
    model_state,
    optimizer_state,
    random_state,
)
from foldpar.checkpoint.values import encode
from foldpar.comm import FoldedGroups, Ranks, attempt, raise_interruption, told
from foldpar.errors import CheckpointError

__all__ = ["save_checkpoint"]


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
    check_same_arguments(ranks, optimizer=optimizer is not None, **given)
    check_same_model(ranks, part.stage, part.held())
    if check_replicas and groups.layout.world > 1:
        check_copies(ranks, part.entries, part.stage)
    start = _begin(ranks, path, part, groups, step)
    if not asynchronous:
        _write(ranks, path, start, part.blocks, part.values, keep, background=False)
        return None
    with _discarded_on_error(start.claim):
        blocks = ranks.together(lambda: [replace(block, tensor=_snapshot(block.tensor)) for block in part.blocks])
        background = Ranks.separate(groups, ranks.doing)
    work = partial(_write, background, path, start, blocks, part.values, keep, background=True)
    return PendingSave(work, model, groups, background.close)


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

    def held(self) -> dict[str, Mapping[str, Any]]:
        """What all ranks of a stage must have in common, by what it is called in errors."""
        return {
            "parameters": self.state.parameters,
            "buffers": self.state.buffers,
            "optimizer's options": {} if self.optimizer is None else self.optimizer.record.options,
            "optimizer's states": {} if self.optimizer is None else self.optimizer.record.state,
            "schedulers' states": self.schedulers,
        }


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
