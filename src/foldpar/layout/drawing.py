"""A layout as a drawing: one SVG of both views (:func:`svg`), and a page on which a click shows a rank's groups.

Cells are ranks. Their colour is the node; a line to a peer has the colour of the axis, dashed where it leaves the node.
The page is one file and asks the network for nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from math import ceil, prod, sqrt

from foldpar.errors import LayoutError
from foldpar.layout.layout import Axis, FoldedLayout, View

__all__ = ["html", "svg"]

_VIEWS: dict[View, tuple[tuple[Axis, Axis], tuple[Axis, Axis]]] = {
    "dense": (("pp", "dp"), ("cp", "tp")),
    "expert": (("pp", "edp"), ("ep", "etp")),
}
_CROSSES: dict[Axis, tuple[str, str]] = {
    "tp": ("#d62728", "activations of every dense layer, summed over the lanes"),
    "cp": ("#9467bd", "keys and values of the same sequences"),
    "dp_cp": ("#7f7f7f", "gradients of dense weights, gathers of their shards"),
    "ep": ("#1f77b4", "rows on their way to experts, and back"),
    "etp": ("#e377c2", "rows that slices of one expert share"),
    "edp": ("#2ca02c", "gradients of experts, gathers of their shards"),
    "pp": ("#8c564b", "activations from stage to stage"),
}
_MOST_RANKS = 4096
_LEFT, _TOP, _GAP = 16, 46, 36


def svg(layout: FoldedLayout, *, rank: int | None = None, gpus_per_node: int | None = None) -> str:
    """Both views beside each other, a cell for each rank, coloured by node; a title on each cell says where it sits.

    Args:
        layout: what to draw.
        rank: outline this rank, and draw its links to the ranks of its groups.
        gpus_per_node: ranks of a node; without it all cells have one colour.

    Example:
        >>> drawing = svg(FoldedLayout(8, tp=2, ep=4), gpus_per_node=4)
        >>> drawing.count('class="cell"')
        16

    Raises:
        LayoutError: the rank is not in the world, ``gpus_per_node`` is not a positive integer, or there are more ranks
            than can be seen.
    """
    _check(layout, rank, gpus_per_node)
    panels, right, bottom = [], float(_LEFT), 0.0
    places: dict[tuple[str, int], tuple[float, float]] = {}
    widest = max(prod(layout.size(axis) for axis in by_column) for _, by_column in _VIEWS.values())
    cell = max(18, min(34 if layout.world <= 64 else 24 if layout.world <= 256 else 18, 800 // widest))
    for view in _VIEWS:
        panel, width, height = _panel(layout, view, right, cell, gpus_per_node, places)
        panels.append(panel)
        right, bottom = right + width + _GAP, max(bottom, height)
    title = f"world {layout.world} = pp {layout.pp} x stage {layout.stage_size}, order {layout.order}"
    links = "" if rank is None else _links(layout, rank, gpus_per_node, places, cell)
    legend, legend_height = _legend(layout, bottom + 22, max(right - _GAP, 460))
    width, height = max(right - _GAP + _LEFT, 480), bottom + legend_height + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f'<text x="{_LEFT}" y="20" font-weight="600" fill="#111111">{escape(title)}</text>\n'
        f'{"".join(panels)}<g id="links" fill="none" pointer-events="none">{links}</g>\n{legend}</svg>\n'
    )


def html(layout: FoldedLayout, *, rank: int | None = None, gpus_per_node: int | None = None) -> str:
    """A page with the drawing: hover a rank to see its groups, click it to keep them; axes can be switched off.

    Arguments and errors are those of :func:`svg`.
    """
    _check(layout, rank, gpus_per_node)
    drawing = svg(layout, gpus_per_node=gpus_per_node)
    axes = [axis for axis in _CROSSES if layout.size(axis) > 1]
    data = {
        "groups": {axis: layout.groups(axis) for axis in axes},
        "colours": {axis: _CROSSES[axis][0] for axis in axes},
        "crosses": {axis: _CROSSES[axis][1] for axis in axes},
        "perNode": gpus_per_node or layout.world,
        "first": rank,
    }
    boxes = "".join(
        f'<label><input type="checkbox" data-axis="{axis}" {"" if axis == "dp_cp" else "checked"}> '
        f'<b style="color:{_CROSSES[axis][0]}">{axis}</b> ({layout.size(axis)})</label>'
        for axis in axes
    )
    script = _SCRIPT.replace("DATA", json.dumps(data).replace("<", "\\u003c"))
    title = f"foldpar: {layout.world} ranks"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n<body>'
        f'<div id="axes">{boxes}</div>\n<div id="drawing">{drawing}</div>\n'
        f'<pre id="told">Hover a rank to see its groups; click it to keep them.</pre>\n<script>{script}</script>\n'
        f"</body></html>\n"
    )


def _check(layout: FoldedLayout, rank: int | None, gpus_per_node: int | None) -> None:
    if gpus_per_node is not None and (type(gpus_per_node) is not int or gpus_per_node < 1):
        raise LayoutError(f"gpus_per_node = {gpus_per_node!r} is not a positive integer.")
    if rank is not None:
        layout.position("dense", rank)
    if layout.world > _MOST_RANKS:
        stage = f"; or draw one stage: world = {layout.stage_size} without pp" if layout.pp > 1 else ""
        raise LayoutError(
            f"world = {layout.world} has more ranks than a drawing can show, which is {_MOST_RANKS}. The picture in "
            f"text cuts what is long{stage}."
        )


def _panel(
    layout: FoldedLayout,
    view: View,
    left: float,
    cell: int,
    gpus_per_node: int | None,
    places: dict[tuple[str, int], tuple[float, float]],
) -> tuple[str, float, float]:
    """One view: rows by its outer axes, columns by its inner ones; long panels are folded into several columns."""
    by_row, by_column = _VIEWS[view]
    columns = prod(layout.size(axis) for axis in by_column)
    rows = layout.world // columns
    label = 8 + 6 * max(len(_label(layout, by_row, row)) for row in (0, rows - 1))
    strips = _strips(rows, columns * cell + label, cell)
    height = ceil(rows / strips)
    sizes = " x ".join(f"{axis} {layout.size(axis)}" for axis in (by_row[0], by_row[1], *by_column))
    head = f"{view} view: {sizes}"
    parts = [f'<text x="{left}" y="40" fill="#333333">{head}</text>\n']
    for row in range(rows):
        strip, line = divmod(row, height)
        x, y = left + strip * (columns * cell + label + 10), _TOP + 14 + line * cell
        parts.append(
            f'<text x="{x + label - 5}" y="{y + cell / 2 + 4:.0f}" text-anchor="end" font-size="10" fill="#555555">'
            f"{_label(layout, by_row, row)}</text>"
        )
        if line == 0 and cell * 0.9 > 6 * len(_label(layout, by_column, columns - 1)):
            parts += [
                f'<text x="{x + label + (column + 0.5) * cell:.0f}" y="{_TOP + 10}" text-anchor="middle" '
                f'font-size="10" fill="#555555">{_label(layout, by_column, column)}</text>'
                for column in range(columns)
            ]
        for column in range(columns):
            member = layout.rank_at(view, row * columns + column)
            places[view, member] = (x + label + column * cell + cell / 2, y + cell / 2)
            parts.append(_cell(layout, member, x + label + column * cell, y, cell, gpus_per_node))
    width = max(strips * (columns * cell + label + 10), 6.5 * len(head))
    return "".join(parts) + "\n", width, _TOP + 14 + height * cell


def _strips(rows: int, width: float, cell: int) -> int:
    """As many columns of rows as make a panel about as wide as high."""
    return max(1, min(rows, round(sqrt(rows * cell / width))))


def _cell(layout: FoldedLayout, rank: int, x: float, y: float, cell: int, gpus_per_node: int | None) -> str:
    node = 0 if gpus_per_node is None else rank // gpus_per_node
    fill = "#e8eef7" if gpus_per_node is None else _node_colour(node)
    where = ", ".join(f"{axis} {index}" for axis, index in asdict(layout.coordinate(rank)).items())
    told = f"rank {rank}" + ("" if gpus_per_node is None else f" on node {node}") + f": {where}"
    size = 11 if cell > 30 else 9 if cell > 20 else 7
    return (
        f'<g class="cell" data-rank="{rank}"><title>{told}</title>'
        f'<rect x="{x + 1:.0f}" y="{y + 1:.0f}" width="{cell - 2}" height="{cell - 2}" rx="3" fill="{fill}" '
        f'stroke="#8894a8" stroke-width="0.7"/><text x="{x + cell / 2:.0f}" y="{y + cell / 2 + size / 3:.0f}" '
        f'text-anchor="middle" font-size="{size}" fill="#111111">{rank}</text></g>'
    )


def _node_colour(node: int) -> str:
    """Neighbouring nodes differ: hues a golden angle apart, all light enough for black digits."""
    return f"hsl({node * 137.5 % 360:.0f}, 62%, {82 if node % 2 else 88}%)"


def _label(layout: FoldedLayout, axes: tuple[Axis, Axis], index: int) -> str:
    named = zip(axes, divmod(index, layout.size(axes[1])), strict=True)
    return " ".join(f"{axis}{place}" for axis, place in named if layout.size(axis) > 1) or f"{axes[1]}0"


def _links(
    layout: FoldedLayout,
    rank: int,
    gpus_per_node: int | None,
    places: dict[tuple[str, int], tuple[float, float]],
    cell: int,
) -> str:
    lines = []
    for axis, (colour, _) in _CROSSES.items():
        view = layout.span(axis).view
        x, y = places[view, rank]
        for peer in layout.group(axis, rank) if layout.size(axis) > 1 else ():
            leaves = gpus_per_node is not None and peer // gpus_per_node != rank // gpus_per_node
            dash = ' stroke-dasharray="4 3"' if leaves else ""
            to_x, to_y = places[view, peer]
            if peer != rank:
                lines.append(
                    f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{to_x:.0f}" y2="{to_y:.0f}" stroke="{colour}"{dash}/>'
                )
    marks = "".join(
        f'<rect x="{places[view, rank][0] - cell / 2:.0f}" y="{places[view, rank][1] - cell / 2:.0f}" width="{cell}" '
        f'height="{cell}" stroke="#000000" stroke-width="2.5"/>'
        for view in _VIEWS
    )
    return "".join(lines) + marks


def _legend(layout: FoldedLayout, top: float, width: float) -> tuple[str, float]:
    """What crosses the links of each axis, a line each."""
    parts, y = [], top
    for axis, (colour, crosses) in _CROSSES.items():
        if layout.size(axis) > 1:
            parts.append(
                f'<line x1="{_LEFT}" x2="{_LEFT + 22}" y1="{y - 4:.0f}" y2="{y - 4:.0f}" stroke="{colour}" '
                f'stroke-width="3"/><text x="{_LEFT + 30}" y="{y:.0f}" fill="#333333">{axis}: {crosses}</text>\n'
            )
            y += 17
    return "".join(parts), y - top + 10


_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #111; --box: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181d; --ink: #e6e6e6; --box: #23262d; } }
body { font-family: system-ui, sans-serif; margin: 16px; color: var(--ink); background: var(--ground); }
#axes label { margin-right: 14px; white-space: nowrap; } #axes b { filter: brightness(1.25); }
#drawing { overflow-x: auto; margin: 10px 0; } #drawing svg { border-radius: 6px; }
#told { min-height: 9em; background: var(--box); padding: 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.cell { cursor: pointer; } .cell.faint { opacity: 0.3; }
"""
_SCRIPT = """
const data = DATA, links = document.getElementById('links'), told = document.getElementById('told');
const hint = told.textContent;
const cells = [...document.querySelectorAll('.cell')], places = new Map();
for (const cell of cells) {
  const box = cell.querySelector('rect'), rank = +cell.dataset.rank, size = +box.getAttribute('width');
  const place = {x: +box.getAttribute('x') + size / 2, y: +box.getAttribute('y') + size / 2, size: size};
  places.set(rank, [...(places.get(rank) || []), place]);
}
const dense = new Set(['tp', 'cp', 'dp_cp', 'pp']), node = rank => Math.floor(rank / data.perNode);
let kept = data.first;
function shape(name, values) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key in values) element.setAttribute(key, values[key]);
  links.appendChild(element);
}
function draw(rank) {
  links.replaceChildren();
  if (rank === null) { cells.forEach(cell => cell.classList.remove('faint')); told.textContent = hint; return; }
  const lit = new Set([rank]), lines = [document.querySelector(`[data-rank="${rank}"] title`).textContent];
  for (const box of document.querySelectorAll('#axes input')) {
    if (!box.checked) continue;
    const axis = box.dataset.axis, peers = data.groups[axis].find(group => group.includes(rank));
    const view = dense.has(axis) ? 0 : 1, from = places.get(rank)[view];
    const away = peers.filter(peer => node(peer) !== node(rank));
    for (const peer of peers) {
      lit.add(peer);
      if (peer === rank) continue;
      const to = places.get(peer)[view];
      shape('line', {x1: from.x, y1: from.y, x2: to.x, y2: to.y, stroke: data.colours[axis], 'stroke-width': 1.3,
                     'stroke-dasharray': node(peer) === node(rank) ? 'none' : '4 3'});
    }
    lines.push(`${axis}: ${peers.join(' ')}` + (away.length ? `   (${away.length} on other nodes)` : '')
               + `\\n    ${data.crosses[axis]}`);
  }
  for (const place of places.get(rank))
    shape('rect', {x: place.x - place.size / 2, y: place.y - place.size / 2, width: place.size, height: place.size,
                   stroke: '#000', 'stroke-width': 2.5});
  cells.forEach(cell => cell.classList.toggle('faint', !lit.has(+cell.dataset.rank)));
  told.textContent = lines.join('\\n');
}
for (const cell of cells) {
  cell.addEventListener('mouseenter', () => draw(+cell.dataset.rank));
  cell.addEventListener('mouseleave', () => draw(kept));
  cell.addEventListener('click', () => {
    const rank = +cell.dataset.rank;
    kept = kept === rank ? null : rank;
    draw(kept);
  });
}
document.querySelectorAll('#axes input').forEach(box => box.addEventListener('change', () => draw(kept)));
draw(kept);
"""
