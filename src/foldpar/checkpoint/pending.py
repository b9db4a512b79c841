"""Saves in the background: none is lost without a word.

save -> thread writes -> wait()             the caller asks
                      -> the next save      asks for the one of the same model, and tells of others that failed
                      -> groups.destroy()   waits for all
                      -> interpreter exit   waits for all, and warns of what failed
"""

from __future__ import annotations

import atexit
import threading
import warnings
import weakref
from collections.abc import Callable

from torch import nn

from foldpar.comm import FoldedGroups, Kept, Ranks
from foldpar.errors import CheckpointError

__all__ = ["PendingSave", "settle"]


class PendingSave:
    """A save that is being written in the background; :meth:`wait` for it.

    One that nobody waits for is waited for when its groups are destroyed, and when the interpreter exits. If it failed
    and nobody has asked, the next save or ``groups.destroy()`` raises its error, and the interpreter's exit warns.
    """

    def __init__(
        self, work: Callable[[], None], model: nn.Module, groups: FoldedGroups, close: Callable[[], None]
    ) -> None:
        self._close: Callable[[], None] | None = close
        self._model = weakref.ref(model)
        self._error: Exception | None = None
        self._told = False
        groups.keep(_Pending).add(self)
        self._thread = threading.Thread(target=self._run, args=(work,), name="foldpar-save")
        self._thread.start()
        atexit.register(self._report)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is complete; call it on every rank.

        Raises:
            CheckpointError: the save failed; the text says on which rank and why. Earlier checkpoints are untouched.
        """
        error = self._end()
        self._told = True
        if error is not None:
            raise error

    def _end(self) -> Exception | None:
        """Wait, and free what it needed; returns its error."""
        self._thread.join()
        close, self._close = self._close, None
        if close is not None:
            close()
        atexit.unregister(self._report)
        return self._error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
        except BaseException as error:  # a thread has nobody to raise it to
            self._error = CheckpointError(f"The save was ended by {type(error).__name__}: {error}")

    def _untold(self) -> Exception | None:
        return None if self._told else self._error

    def _report(self) -> None:
        """At the interpreter's exit, which waits for threads before."""
        self._thread.join()
        error = self._untold()
        if error is not None:
            warnings.warn(_lost(error), RuntimeWarning, stacklevel=1)


class _Pending(Kept):
    """The saves of some groups that may still be written, by their numbers, which are the same on every rank."""

    def __init__(self, groups: FoldedGroups) -> None:
        self.saves: dict[int, PendingSave] = {}
        self.count = 0

    def add(self, save: PendingSave) -> None:
        self.saves[self.count] = save
        self.count += 1

    def close(self) -> Exception | None:
        """Wait for all, before the groups are destroyed; returns an error that nobody has asked for."""
        untold = None
        for save in self.saves.values():
            save._end()
            error, save._told = save._untold(), True
            untold = untold or error
        self.saves.clear()
        return None if untold is None else CheckpointError(_lost(untold))


def settle(ranks: Ranks, model: nn.Module, groups: FoldedGroups) -> None:
    """Wait for the save before this one of the same model, and let all ranks know of any that failed.

    Raises:
        CheckpointError: on every rank: one failed, and some rank has not been told.
    """
    pending = groups.keep(_Pending)
    if not pending.count:
        return
    for save in pending.saves.values():
        if save._model() is model:
            save._end()
    found: dict[int, str] = {}
    for of_rank in ranks.all_gather(
        {number: str(save._untold()) for number, save in pending.saves.items() if save.done and save._untold()}
    ):
        found = {**of_rank, **found}
    for number in found:
        if number in pending.saves:
            pending.saves[number]._told = True
    for number, save in list(pending.saves.items()):
        if save.done:
            save._end()
            del pending.saves[number]
    if found:
        raise CheckpointError(_lost(found[min(found)]))


def _lost(error: object) -> str:
    return f"The save before this one, in the background, failed. {error}"
