"""A layout as a picture for people (:func:`text`) and as plain data for programs (:func:`data`).

The picture stays small however large the world: long rows, columns and groups are cut, and what is cut is not computed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from math import prod

from foldpar.errors import LayoutError
from foldpar.layout.layout import ORDERS, Axis, FoldedLayout, Order, View

__all__ = ["data", "text"]

_ROWS_AND_COLUMNS: dict[View, tuple[tuple[Axis, Axis], tuple[Axis, Axis]]] = {
    "dense": (("pp", "dp"), ("cp", "tp")),
    "expert": (("pp", "edp"), ("ep", "etp")),
}
_PEERS: dict[Axis, str] = {  # whom a rank meets on each axis
    "pp": "the same place in every stage",
    "dp": "other sequences, same dense shards",
    "cp": "other parts of the same sequences",
    "tp": "the lanes of one dense layer",
    "edp": "replicas of the same experts",
    "ep": "one whole set of experts",
    "etp": "slices of the same experts",
    "dp_cp": "replicas of the same dense shards",
    "ep_etp": "one whole set of expert slices",
}
_MOST_LISTED = 2**20
_MOST_ROWS = 32
_MOST_COLUMNS = _MOST_MEMBERS = 16
_MOST_RANKS_PER_AXIS = 64
_LINE = 100
_GAP = "..."


def text(layout: FoldedLayout, *, rank: int | None = None, gpus_per_node: int | None = None) -> str:
    """The layout as a picture: its sizes, a grid of ranks for each view, and the groups of every axis.

    Args:
        layout: what to draw.
        rank: mark this rank, and list the groups that it is in instead of all groups.
        gpus_per_node: mark the groups that leave a node (which is ``rank // gpus_per_node``), and name the order that
            would keep them inside, where one does.

    Example:
        >>> from foldpar import FoldedLayout
        >>> print(text(FoldedLayout(8, tp=2, ep=4), gpus_per_node=4))
        world 8 = pp 1 x stage 8, order tp-lane-major
        <BLANKLINE>
        dense view: stage 8 = dp 4 x cp 1 x tp 2
               tp0  tp1
          dp0    0    1
          dp1    2    3
          dp2    4    5
          dp3    6    7
        <BLANKLINE>
        expert view: stage 8 = edp 2 x ep 4 x etp 1
                ep0  ep1  ep2  ep3
          edp0    0    2    4    6
          edp1    1    3    5    7
        <BLANKLINE>
        groups, in coordinate order (* leaves its node)
          dp   2 of 4  (0 2 4 6)* (1 3 5 7)*
          tp   4 of 2  (0 1) (2 3) (4 5) (6 7)
          edp  4 of 2  (0 1) (2 3) (4 5) (6 7)
          ep   2 of 4  (0 2 4 6)* (1 3 5 7)*
          size 1: pp, cp, etp
        <BLANKLINE>
        nodes of 4 GPUs
          dp: 2 of 2 groups leave their node, in either order
          ep: 2 of 2 groups leave their node; order consecutive keeps them inside, but then edp would leave

    Raises:
        LayoutError: the rank is not in the world, ``gpus_per_node`` is not a positive integer, or it is given for a
            world of more than a million ranks.
    """
    _check_gpus_per_node(layout, gpus_per_node)
    title = f"world {layout.world} = pp {layout.pp} x stage {layout.stage_size}, order {layout.order}"
    sections = [title, *(_view(layout, view, rank) for view in _ROWS_AND_COLUMNS)]
    if rank is None:
        sections.append(_all_groups(layout, gpus_per_node))
    else:
        sections.append(_groups_of_rank(layout, rank, gpus_per_node))
    if gpus_per_node is not None:
        sections.append(_nodes(layout, gpus_per_node))
    return "\n\n".join(sections)


# A layout prints as its picture. It is said here, since the picture is drawn from the layout and not the reverse; the
# face of the wing loads both.
FoldedLayout.__str__ = text  # type: ignore[method-assign,assignment]


def data(layout: FoldedLayout, *, rank: int | None = None, gpus_per_node: int | None = None) -> dict[str, object]:
    """The same as plain data, complete where the picture is cut: ready for ``json.dumps``.

    ``groups`` maps each axis to all of its groups or, with ``rank``, to the one that holds the rank. With
    ``gpus_per_node``, ``leaving`` counts the groups of each axis that leave a node, and ``order_inside`` names an
    order that keeps all of them inside (None where there is none).

    Example:
        >>> from foldpar import FoldedLayout
        >>> picture = data(FoldedLayout(4, tp=2, ep=4), rank=2)
        >>> picture["coordinate"]
        {'pp': 0, 'dp': 1, 'cp': 0, 'tp': 0, 'edp': 0, 'ep': 1, 'etp': 0}
        >>> picture["groups"]["ep"]
        (0, 2, 1, 3)

    Raises:
        LayoutError: the rank is not in the world, ``gpus_per_node`` is not a positive integer, or all groups of a world
            of more than a million ranks are asked for.
    """
    _check_gpus_per_node(layout, gpus_per_node)
    if rank is None:
        _check_listed(layout, "With a rank, data has the groups of that one; the picture in text cuts what is long.")
    result: dict[str, object] = {
        "world": layout.world,
        "stage_size": layout.stage_size,
        "order": layout.order,
        "sizes": {axis: layout.size(axis) for axis in _PEERS},
    }
    if rank is None:
        result["groups"] = {axis: layout.groups(axis) for axis in _PEERS}
    else:
        result["rank"] = layout.position("dense", rank)
        result["coordinate"] = asdict(layout.coordinate(rank))
        result["groups"] = {axis: layout.group(axis, rank) for axis in _PEERS}
    if gpus_per_node is not None:
        result["gpus_per_node"] = gpus_per_node
        result["leaving"] = {axis: _count_leaving(layout, axis, gpus_per_node) for axis in _PEERS}
        result["order_inside"] = {axis: _order_inside(layout, axis, gpus_per_node) for axis in _PEERS}
    return result


def _view(layout: FoldedLayout, view: View, rank: int | None) -> str:
    """A grid with one cell per rank, rows by the outer axes of the view and columns by the inner ones."""
    by_row, by_column = _ROWS_AND_COLUMNS[view]
    width = prod(layout.size(axis) for axis in by_column)
    row_of_rank, column_of_rank = divmod(0 if rank is None else layout.position(view, rank), width)
    columns = _shown(width, _MOST_COLUMNS, keep=column_of_rank)
    table = [["", *(_label(layout, by_column, column) for column in columns)]]
    for row in _shown(layout.world // width, _MOST_ROWS, keep=row_of_rank):
        places = (None if row is None or column is None else row * width + column for column in columns)
        cells = (_GAP if place is None else _cell(layout.rank_at(view, place), rank) for place in places)
        table.append([_label(layout, by_row, row), *cells])
    sizes = " x ".join(f"{axis} {layout.size(axis)}" for axis in (by_row[1], *by_column))
    return _section(f"{view} view: stage {layout.stage_size} = {sizes}", _aligned(table, str.rjust))


def _all_groups(layout: FoldedLayout, gpus_per_node: int | None) -> str:
    table = []
    for axis in _split_axes(layout):
        span, count = layout.span(axis), layout.world // layout.size(axis)
        most = max(_MOST_RANKS_PER_AXIS // min(span.size, _MOST_MEMBERS), 4)
        groups = [
            _GAP if number is None else _group(layout, axis, span.nth(number), None, gpus_per_node)
            for number in _shown(count, most)
        ]
        beside = [axis, f"{count} of {span.size}"]
        for line in _wrapped(groups):
            table.append([*beside, line])
            beside = ["", ""]
    return _section("groups, in coordinate order" + _legend(gpus_per_node), _aligned(table), _unsplit_axes(layout))


def _groups_of_rank(layout: FoldedLayout, rank: int, gpus_per_node: int | None) -> str:
    table = []
    for axis in _split_axes(layout):
        span = layout.span(axis)
        positions = span.around(layout.position(span.view, rank))
        table.append([axis, _group(layout, axis, positions, rank, gpus_per_node), _PEERS[axis]])
    place = ", ".join(f"{axis} {index}" for axis, index in asdict(layout.coordinate(rank)).items())
    title = f"rank {rank} is {place}; its groups" + _legend(gpus_per_node)
    return _section(title, _aligned(table), _unsplit_axes(layout))


def _group(layout: FoldedLayout, axis: Axis, positions: range, rank: int | None, gpus_per_node: int | None) -> str:
    """``(0 2 ... 14)``, with a star where the group leaves its node."""
    view, size, _ = layout.span(axis)
    index_of_rank = 0 if rank is None else positions.index(layout.position(view, rank))
    members = [
        _GAP if index is None else _cell(layout.rank_at(view, positions[index]), rank).strip()
        for index in _shown(size, _MOST_MEMBERS, keep=index_of_rank)
    ]
    leaves = gpus_per_node is not None and (
        size > gpus_per_node or _leaves([layout.rank_at(view, position) for position in positions], gpus_per_node)
    )
    return f"({' '.join(members)})" + "*" * leaves


def _nodes(layout: FoldedLayout, gpus_per_node: int) -> str:
    lines = []
    for axis in _split_axes(layout):
        if leaving := _count_leaving(layout, axis, gpus_per_node):
            count = layout.world // layout.size(axis)
            lines.append(
                f"  {axis}: {leaving} of {count} groups leave their node{_remedy(layout, axis, gpus_per_node)}"
            )
    return _section(f"nodes of {gpus_per_node} GPUs", lines or ["  every group stays inside its node"])


def _remedy(layout: FoldedLayout, axis: Axis, gpus_per_node: int) -> str:
    if layout.size(axis) > gpus_per_node:
        return f", which is too small for {layout.size(axis)} ranks"
    order = _order_inside(layout, axis, gpus_per_node)
    if order is None:
        return ", in either order"
    other = replace(layout, order=order)
    worse = [
        name
        for name in _split_axes(layout)
        if _count_leaving(other, name, gpus_per_node) and not _count_leaving(layout, name, gpus_per_node)
    ]
    return f"; order {order} keeps them inside" + (f", but then {' and '.join(worse)} would leave" if worse else "")


def _order_inside(layout: FoldedLayout, axis: Axis, gpus_per_node: int) -> Order | None:
    """An order that keeps every group of ``axis`` inside a node, this layout's own before the other one."""
    for order in sorted(ORDERS, key=lambda order: order != layout.order):
        if not _count_leaving(replace(layout, order=order), axis, gpus_per_node):
            return order
    return None


def _count_leaving(layout: FoldedLayout, axis: Axis, gpus_per_node: int) -> int:
    if layout.size(axis) > gpus_per_node:
        return layout.world // layout.size(axis)
    return sum(_leaves(group, gpus_per_node) for group in layout.groups(axis))


def _leaves(group: Sequence[int], gpus_per_node: int) -> bool:
    return min(group) // gpus_per_node != max(group) // gpus_per_node


def _split_axes(layout: FoldedLayout) -> list[Axis]:
    """The axes worth showing: larger than 1, and compounds only where they are more than one of their parts."""
    sizes: dict[str, int] = {axis: layout.size(axis) for axis in _PEERS}
    return [axis for axis in _PEERS if all(sizes[part] > 1 for part in axis.split("_"))]


def _unsplit_axes(layout: FoldedLayout) -> list[str]:
    axes = [axis for axis in _PEERS if layout.size(axis) == 1 and "_" not in axis]
    return [f"  size 1: {', '.join(axes)}"] if axes else []


def _shown(count: int, most: int, keep: int = 0) -> list[int | None]:
    """Which of ``count`` things to show: all, or else few, with ``keep``; None stands for those left out."""
    if count <= most:
        return list(range(count))
    picks = sorted({*range(most // 2 - 2), keep, count - 1})
    shown: list[int | None] = []
    for previous, pick in zip([-1, *picks], picks, strict=False):
        shown += [pick] if pick == previous + 1 else [None, pick]
    return shown


def _label(layout: FoldedLayout, axes: tuple[Axis, Axis], index: int | None) -> str:
    """``pp1 dp3``, or ``dp3`` where the other axis has size 1."""
    if index is None:
        return _GAP
    named = zip(axes, divmod(index, layout.size(axes[1])), strict=True)
    return " ".join(f"{axis}{place}" for axis, place in named if layout.size(axis) > 1) or f"{axes[1]}0"


def _cell(rank: int, marked: int | None) -> str:
    if marked is None:
        return str(rank)
    return f"[{rank}]" if rank == marked else f" {rank} "


def _legend(gpus_per_node: int | None) -> str:
    return "" if gpus_per_node is None else " (* leaves its node)"


def _wrapped(words: list[str]) -> list[str]:
    glue = "\N{NO-BREAK SPACE}"
    lines = textwrap.wrap(" ".join(word.replace(" ", glue) for word in words), _LINE, break_long_words=False)
    return [line.replace(glue, " ") for line in lines]


def _aligned(table: list[list[str]], justify: Callable[[str, int], str] = str.ljust) -> list[str]:
    """Lines with the columns of a table below each other; the first column always to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(justify(cell, width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in table
    ]


def _section(title: str, *parts: list[str]) -> str:
    return "\n".join([title, *chain.from_iterable(parts)])


def _check_gpus_per_node(layout: FoldedLayout, gpus_per_node: int | None) -> None:
    if gpus_per_node is None:
        return
    if type(gpus_per_node) is not int or gpus_per_node < 1:
        raise LayoutError(f"gpus_per_node = {gpus_per_node!r} is not a positive integer.")
    _check_listed(layout, "Without gpus_per_node, nothing is looked at group by group.")


def _check_listed(layout: FoldedLayout, instead: str) -> None:
    if layout.world > _MOST_LISTED:
        raise LayoutError(
            f"world = {layout.world} has more ranks than are looked at one by one, which is {_MOST_LISTED:,}. {instead}"
        )
