"""``multi_rank``: a test whose body runs on every rank of a world."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from foldpar.layout import FoldedLayout
from foldpar.testing.ranks import run_ranks

__all__ = ["multi_rank"]

_ON_A_RANK = "_foldpar_on_a_rank"


def multi_rank(
    world: int | None = None,
    *,
    backend: Literal["spawned", "threads"] = "spawned",
    timeout: float = 60.0,
    groups_left: Literal["destroy", "error"] = "error",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test function on every rank of a world, with ``torch.distributed`` initialised.

    It passes if it passes on all ranks. Otherwise one error holds the traceback of each rank, the first cause first.
    Spawned workers are reused by all tests of a session. Parameters and fixtures of the test reach every rank as a copy
    of its own (for spawned ranks they are pickled).

    Args:
        world: how many ranks. Left out, the test has an argument ``layout``, and it is that layout's world.
        backend, timeout, groups_left: as for :func:`~foldpar.testing.run_ranks`; groups that a test leaves behind are
            an error here.

    Example::

        @multi_rank(2)
        def test_ranks_count_up():
            assert dist.get_rank() < 2

        @pytest.mark.parametrize("layout", [solve_layout(4, tp=2, ep=4), solve_layout(8, tp=2, ep=2, etp=2)], ids=str)
        @multi_rank()
        def test_my_layer(layout):
            with create_groups(layout) as groups:
                ...

    Raises:
        RanksFailed: from the decorated test, if any rank fails. TypeError: neither ``world`` nor an argument
            ``layout``.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        if world is None and "layout" not in inspect.signature(test).parameters:
            raise TypeError(
                f"multi_rank() takes the world from the argument 'layout', and {test.__qualname__} has none. Write "
                f"multi_rank(4), or let the test take a layout."
            )

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            if kwargs.pop(_ON_A_RANK, False):
                return test(*args, **kwargs)
            bound = inspect.signature(test).bind(*args, **kwargs)
            ranks = world if world is not None else _world_of(bound.arguments["layout"])
            # A spawned rank finds this wrapper under the test's name, and asks it for the test itself.
            on_a_rank = functools.partial(run, *args, **kwargs, **{_ON_A_RANK: True})
            setattr(on_a_rank, "__qualname__", test.__qualname__)  # noqa: B010 - a partial has no such attribute to mypy
            run_ranks(on_a_rank, ranks, backend=backend, timeout=timeout, groups_left=groups_left)
            return None

        return run

    return decorate


def _world_of(layout: object) -> int:
    if not isinstance(layout, FoldedLayout):
        raise TypeError(f"The argument 'layout' of a multi_rank() test is {layout!r}, not a FoldedLayout.")
    return layout.world
