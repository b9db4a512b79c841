"""How long rank tables take, beside Megatron-Core's RankGenerator in the same run.

    .venv/bin/python -m pip install --no-deps --target build/megatron megatron-core
    PYTHONPATH=build/megatron .venv/bin/python benchmarks/layout.py

Without Megatron-Core only foldpar's own times are printed. The exit code is 1 where foldpar took longer than
Megatron-Core for a table, or where the two tables of the same order differ.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from foldpar import FoldedLayout, solve_layout
from foldpar.layout.layout import AXES, ORDERS, Axis

# Megatron-Core's words for our axes: one generator for the dense layers, one for the experts.
DENSE_TOKENS: dict[Axis, str] = {"pp": "pp", "dp": "dp", "cp": "cp", "tp": "tp", "dp_cp": "dp-cp"}
EXPERT_TOKENS: dict[Axis, str] = {"edp": "dp", "ep": "ep", "etp": "tp", "ep_etp": "tp-ep"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=131_072)
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many runs counts")
    arguments = parser.parse_args()

    layout = solve_layout(arguments.world, tp=8, cp=2, pp=4, ep=64, etp=2)
    peer = megatron_tables(layout)
    print(repr(layout))
    if peer is None:
        print("Megatron-Core is not installed (see the head of this file): foldpar alone.")
    good = compare_tables(layout, peer, arguments.repeats)
    ask_one_rank()
    return 0 if good else 1


def megatron_tables(layout: FoldedLayout) -> Callable[[Axis], list[list[int]]] | None:
    """Megatron-Core's groups of an axis, in its only order, which is our ``consecutive``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about optional parts of Megatron-Core that a rank table does not need
            from megatron.core.parallel_state import RankGenerator
    except ImportError:
        return None
    order = "tp-cp-ep-dp-pp"
    dense: Any = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert: Any = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=order)

    def groups(axis: Axis) -> list[list[int]]:
        return dense.get_ranks(DENSE_TOKENS[axis]) if axis in DENSE_TOKENS else expert.get_ranks(EXPERT_TOKENS[axis])

    return groups


def compare_tables(layout: FoldedLayout, peer: Callable[[Axis], list[list[int]]] | None, repeats: int) -> bool:
    good = True
    layouts = [replace(layout, order=order) for order in ORDERS]
    print(f"\n{'groups(axis)':<14}" + "".join(f"{it:>16}" for it in (*ORDERS, "Megatron-Core")) + f"{'ratio':>9}")
    for axis in AXES:
        times = [best(partial(layout.groups, axis), repeats) for layout in layouts]
        row = f"{axis:<14}" + "".join(f"{seconds * 1e3:>13.1f} ms" for seconds in times)
        if peer is not None:
            peer_time = best(partial(peer, axis), repeats)
            same = [list(group) for group in layouts[1].groups(axis)] == peer(axis)
            row += f"{peer_time * 1e3:>13.1f} ms{max(times) / peer_time:>9.3f}{'' if same else '  TABLES DIFFER'}"
            good = good and same and max(times) <= peer_time
        print(row)
    return good


def ask_one_rank() -> None:
    print("\none rank of world = 1,048,576, tp 8, ep 64")
    for order in ORDERS:
        layout = solve_layout(1_048_576, tp=8, ep=64, order=order)
        for name, ask in (
            ("coordinate", partial(layout.coordinate, 777_777)),
            ("group('ep')", partial(layout.group, "ep", 777_777)),
        ):
            seconds = best(ask, 1000)
            tracemalloc.start()
            ask()
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            print(f"  {order:<14} {name:<12} {seconds * 1e6:6.1f} us, peak {peak / 1e3:.1f} kB")


def best(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
