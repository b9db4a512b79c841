"""What foldpar's own tests stand on, for yours: ranks on a laptop, and hypothesis strategies for layouts and routings.

    ranks       run_ranks: a function on many ranks, threads or processes; ``decorators``: the same as a test
    outcomes    what ranks gave back, or which of them failed first
    parity      check_against_one_process: one step of a folded module beside one process
    shares      which part of a whole tensor a rank should hold, on its own, not by the code that folds
    report      what differs, and by how much; ``mistakes``: what such a ratio looks like
    strategies  layouts, routings and batches for hypothesis

Needs the extra ``foldpar[testing]``. The library itself imports nothing from here, and importing this package loads
neither torch nor hypothesis: names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldpar.testing.decorators import multi_rank
    from foldpar.testing.outcomes import RankFailure, RanksFailed, live_groups
    from foldpar.testing.parity import check_against_one_process
    from foldpar.testing.ranks import run_ranks
    from foldpar.testing.report import Comparison, ParityFailed, ParityReport
    from foldpar.testing.strategies import MaskedRouting, layouts, routings, row_counts, token_batches

__all__ = [
    "Comparison",
    "MaskedRouting",
    "ParityFailed",
    "ParityReport",
    "RankFailure",
    "RanksFailed",
    "check_against_one_process",
    "layouts",
    "live_groups",
    "multi_rank",
    "routings",
    "row_counts",
    "run_ranks",
    "token_batches",
]

_MODULES = {
    "Comparison": "report",
    "MaskedRouting": "strategies",
    "ParityFailed": "report",
    "ParityReport": "report",
    "RankFailure": "outcomes",
    "RanksFailed": "outcomes",
    "check_against_one_process": "parity",
    "layouts": "strategies",
    "live_groups": "outcomes",
    "multi_rank": "decorators",
    "routings": "strategies",
    "row_counts": "strategies",
    "run_ranks": "ranks",
    "token_batches": "strategies",
}


def register_with_hypothesis() -> None:
    """Teach ``st.from_type`` to draw a ``FoldedLayout``; hypothesis calls this through its entry point.

    It runs in every hypothesis session, whoever's tests those are, hence it loads nothing but the integers. It is here
    and not next to the strategies because a module that imports hypothesis is half loaded when hypothesis calls back.
    """
    from hypothesis import strategies

    from foldpar.layout import FoldedLayout

    strategies.register_type_strategy(FoldedLayout, lambda _: __getattr__("layouts")())


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
