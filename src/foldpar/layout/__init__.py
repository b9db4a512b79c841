"""Where every rank sits: pure integers, no torch.

A world of ranks is cut into pipeline stages, and each stage is partitioned twice: for the dense layers as TP x CP x DP,
for the routed experts as ETP x EP x EDP. Sizes are chosen, ``dp`` and ``edp`` derived.

    layout           FoldedLayout, solve_layout: rank tables, coordinates, groups, in two orders
    picture          a layout for people and for programs
    drawing          a layout as SVG, and as a page to click in; loaded when it is asked for
    config           FoldingConfig: sizes that do not know the world yet; loaded when it is asked for
    foreign_configs  what other libraries call the same sizes

Laws: both views cover the same ranks, each once; every axis partitions the world into groups of one size; a question
about one rank costs what its answer costs.
"""

from __future__ import annotations

from foldpar.layout import picture as picture  # layouts print as it
from foldpar.layout.layout import AXES, ORDERS, Axis, Coordinate, FoldedLayout, Order, solve_layout

__all__ = [
    "AXES",
    "ORDERS",
    "Axis",
    "Coordinate",
    "FoldedLayout",
    "Order",
    "solve_layout",
]
