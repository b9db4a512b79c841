"""All ranks of a world as one: values gathered on the first, errors raised on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup

from foldpar.comm.groups import FoldedGroups, separate_world
from foldpar.errors import CheckpointError, FoldingError
from foldpar.requirements import require_numpy

__all__ = ["Ranks", "attempt", "raise_interruption", "told"]

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of the world, over the default process group or over one of their own; without any, a single rank."""

    rank: int
    size: int
    group: ProcessGroup | None
    doing: str
    """What they do, for errors: ``"saving runs/step-300"``."""

    @classmethod
    def of(cls, groups: FoldedGroups, doing: str) -> Ranks:
        """Over the default process group."""
        return cls(groups.rank, groups.layout.world, None, doing)

    @classmethod
    def separate(cls, groups: FoldedGroups, doing: str) -> Ranks:
        """Over a process group of their own, of Gloo, for traffic from another thread; :meth:`close` it when done.

        Call it on every rank.
        """
        return cls(groups.rank, groups.layout.world, separate_world(groups, "gloo"), doing)

    def close(self) -> None:
        """Destroy the process group that :meth:`separate` made."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        verb = self.doing.partition(" ")[0].lower()
        with self._in_touch():
            dist.all_gather_object(values, (verb, value), group=self.group)
        verbs = [of_rank for of_rank, _ in values]
        other = next((rank for rank, of_rank in enumerate(verbs) if of_rank != verbs[0]), None)
        if other is not None:
            raise CheckpointError(
                f"{self.doing}: ranks do different things: rank 0 is {verbs[0]}, and rank {other} is {verbs[other]}. "
                f"Call the same functions in the same order on every rank. Nothing was read or written."
            )
        return [value for _, value in values]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, on rank 0; elsewhere nothing."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._in_touch():
            dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def scatter(self, values: Sequence[Value]) -> Value:
        """Rank 0's value for this rank."""
        if self.size == 1:
            return values[0]
        received: list[Any] = [None]
        with self._in_touch():
            dist.scatter_object_list(received, list(values) if self.rank == 0 else None, src=0, group=self.group)
        return cast(Value, received[0])

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with self._in_touch():
            dist.broadcast_object_list(values, src=0, group=self.group)
        return cast(Value, values[0])

    def together(self, work: Callable[[], Value]) -> Value:
        """Do something that communicates nothing, on every rank; an error anywhere is an error everywhere.

        A rank that failed raises its own exception, the others a ``CheckpointError`` that quotes it.
        """
        value, error = attempt(work)
        errors = self.all_gather(None if error is None else told(error))
        if error is not None:
            raise error
        self.raise_first(errors)
        return cast(Value, value)

    def raise_first(self, errors: Sequence[str | None]) -> None:
        """Raise if any rank has an error; all ranks were given the same list."""
        failed = [rank for rank, text in enumerate(errors) if text is not None]
        if failed:
            others = f" ({len(failed)} ranks failed)" if len(failed) > 1 else ""
            raise CheckpointError(f"{self.doing}: rank {failed[0]} failed{others}: {errors[failed[0]]}")

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        require_numpy(self.doing)
        try:
            yield
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.doing}: rank {self.rank} lost touch with the others, of which one has ended or did not come in "
                f"time. Checkpoints that were complete before are untouched."
            ) from error


def attempt(work: Callable[[], Value]) -> tuple[Value | None, BaseException | None]:
    """What some work gives, or the exception that ended it; Ctrl-C too, or the others would wait for this rank."""
    try:
        return work(), None
    except BaseException as error:
        return None, error


def told(error: BaseException) -> str:
    """How the other ranks hear of an error."""
    return str(error) if isinstance(error, FoldingError) else f"{type(error).__name__}: {error}".rstrip(": ")


def raise_interruption(error: BaseException | None) -> None:
    """Raise what is no failure but a wish to end, such as Ctrl-C, as it came; the other ranks have been told."""
    if error is not None and not isinstance(error, Exception):
        raise error
