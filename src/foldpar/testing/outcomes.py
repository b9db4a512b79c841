"""What ranks came back with: results, or why there are none."""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

__all__ = ["Cause", "RankFailure", "RanksFailed", "Returned", "live_groups", "own_traceback"]

Cause = Literal["raised", "silent", "died", "stopped", "peer"]


def live_groups() -> list[str]:
    """Names of the process groups that exist on this rank, the default group apart.

    Call it inside the function that ``run_ranks`` runs, to see that what was created was destroyed.
    """
    from foldpar.comm import living_groups

    return list(living_groups().values())


@dataclass(frozen=True, slots=True)
class Returned:
    """What a rank gave back, and the names of the groups that it left behind."""

    value: Any
    groups_left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankFailure:
    """Why one rank has no result.

    ``cause`` is ``"raised"`` (its own exception), ``"silent"`` (no answer in time), ``"died"`` (the process ended),
    ``"peer"`` (another rank was gone or late) or ``"stopped"`` (it still ran when another rank had failed).
    ``trace`` is its traceback, or its Python stack where there is no exception; ``at`` is monotonic, in seconds.
    """

    rank: int
    cause: Cause
    error: str
    trace: str
    at: float

    @classmethod
    def of(cls, rank: int, error: BaseException) -> RankFailure:
        """The failure that an exception stands for, seen where it is caught."""
        summary = "".join(traceback.format_exception_only(error)).strip()
        return cls(rank, "peer" if _blames_peer(error) else "raised", summary, own_traceback(error), time.monotonic())

    @property
    def is_secondary(self) -> bool:
        """Whether another rank's failure explains this one."""
        return self.cause in ("peer", "stopped")


class RanksFailed(AssertionError):  # noqa: N818
    """One or more ranks of a ``run_ranks`` call failed; the text holds the traceback of each, the first cause first.

    ``failures`` lists them in that order.
    """

    failures: tuple[RankFailure, ...]

    def __init__(self, name: str, world: int, failures: Sequence[RankFailure]) -> None:
        self.failures = tuple(sorted(failures, key=lambda failure: (failure.is_secondary, failure.at)))
        super().__init__(_report(name, world, self.failures))


_LABELS: dict[Cause, str] = {
    "raised": "raised",
    "silent": "did not answer",
    "died": "died",
    "peer": "failed because a peer vanished or did not come",
    "stopped": "was stopped because another rank had failed",
}


def _report(name: str, world: int, failures: Sequence[RankFailure]) -> str:
    lines = [f"{name}: {len(failures)} of {world} ranks failed. First cause: rank {failures[0].rank}."]
    for place, failure in enumerate(failures):
        first = " (first failure)" if place == 0 else ""
        lines += ["", f"rank {failure.rank} {_LABELS[failure.cause]}{first}: {failure.error}"]
        lines += [f"    {line}" for line in failure.trace.rstrip().splitlines()]
    return "\n".join(lines)


# What Gloo and the stores say when the other side is gone or late. A failure with such a text is a consequence, unless
# no rank failed in another way.
_PEER_IS_GONE = re.compile(
    r"gloo/transport|connection (?:was )?(?:closed|reset|refused)|broken pipe|timed out|socket ?timeout", re.IGNORECASE
)


def _blames_peer(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, says that another rank is gone or late."""
    if isinstance(error, (RuntimeError, OSError)) and _PEER_IS_GONE.search(str(error)):
        return True
    return error.__cause__ is not None and _blames_peer(error.__cause__)


def own_traceback(error: BaseException) -> str:
    """The traceback from the function that ran on, without the frames of this package above it."""
    frames = error.__traceback__
    here = os.path.dirname(__file__)
    while frames is not None and frames.tb_next is not None and _lies_in(frames, here):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _lies_in(frames: TracebackType, directory: str) -> bool:
    return os.path.dirname(frames.tb_frame.f_code.co_filename) == directory
