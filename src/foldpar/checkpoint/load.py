"""Training state out of files, into any layout: all that does not fit is found before the first write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foldpar import __version__
from foldpar.checkpoint.agreement import check_same_arguments
from foldpar.checkpoint.dcp import StoredTensors
from foldpar.checkpoint.files import check_sizes, damaged_sums, read_manifest, wrong_sums
from foldpar.checkpoint.manifest import Manifest
from foldpar.checkpoint.matching import Match, left_over, match_model, match_optimizers
from foldpar.checkpoint.optimizers import Optimizers, as_optimizers
from foldpar.checkpoint.schedulers import Scheduler, as_schedulers, install_schedulers, match_schedulers
from foldpar.checkpoint.state import model_state, restore_random_state
from foldpar.checkpoint.values import decode
from foldpar.comm import FoldedGroups, Ranks, attempt, raise_interruption
from foldpar.errors import CheckpointError
from foldpar.layout import FoldedLayout
from foldpar.wording import below

__all__ = ["CheckpointInfo", "load_checkpoint"]


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
    check_same_arguments(ranks, optimizer=len(optimizers), **given)
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
        raise CheckpointError(f"{path} does not fit. Nothing was loaded.{below(problems, 8)}")


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
