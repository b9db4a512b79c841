"""A plan as one page: the verdict, the ranked table, a rank's bytes as bars, memory against time; no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from foldpar.planning.memory import Memory
from foldpar.planning.report import HEADS, Plan, PlanRow, commands, describe, sureness, table_of, verdict

__all__ = ["page"]

_PARTS = {
    "parameters": "#1f77b4",
    "gradients": "#ff7f0e",
    "optimizer": "#2ca02c",
    "gathered": "#17becf",
    "activations": "#d62728",
    "working": "#e377c2",
    "communication": "#8c564b",
    "logits": "#9467bd",
}
_WIDTH = 900
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #111; --box: #f5f6f8; --bad: #c00; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181d; --ink: #e6e6e6; --box: #23262d; --bad: #ff6b6b; } }
body { font-family: system-ui, sans-serif; margin: 20px auto; max-width: 1320px; padding: 0 16px; }
body { color: var(--ink); background: var(--ground); } .bad { fill: var(--bad); }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: 4px 9px; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
tr:first-of-type td { font-weight: 600; } pre { background: var(--box); padding: 12px; overflow-x: auto; }
.verdict { font-size: 17px; } .left td { text-align: left; white-space: normal; }
svg { max-width: 100%; height: auto; fill: currentColor; }
"""


def page(plan: Plan) -> str:
    """The page of a plan, as HTML."""
    sections = [f'<h1>foldpar plan</h1><p class="verdict">{escape(verdict(plan))}</p>']
    if plan.rows:
        best = plan.rows[0]
        sections += [
            "<h2>The fastest layouts</h2><p>GB on the GPU that needs the most, at balanced load, 1.5 and 3 times that; "
            "! is more than there is.</p>" + _table(HEADS, table_of(plan, plan.rows)),
            "<h2>Bytes of a rank of the first</h2><p>Not all are there at the same moment; the mark is the most that "
            "are.</p>" + _bars(plan, best),
            "<h2>Memory against time</h2><p>All choices that no other beats in both.</p>" + _pareto(plan),
            "<h2>Milliseconds of the first</h2>" + _milliseconds(best),
            f"<h2>To set it up</h2><pre>{escape(commands(plan, best))}</pre>",
            "<h2>What would change it</h2><ul>"
            + "".join(f"<li>{escape(each)}</li>" for each in plan.changes)
            + "</ul>",
        ]
    left = [(f"{each.count:,}", each.rule, each.example) for each in plan.left_out]
    sections.append(f'<h2>Left out</h2><div class="left">{_table(("", "rule", "for example"), left)}</div>')
    sections.append(f"<p>{escape(sureness(plan))}</p>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>foldpar plan: {escape(plan.shape.name)}'
        f'</title>\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bars(plan: Plan, row: PlanRow) -> str:
    """A bar for each load, and a line where the memory ends."""
    loads = plan.at_loads(row)
    most = max([plan.machine.memory, *(_total(memory) for memory in loads.values())])
    scale, parts, y = (_WIDTH - 130) / most, [], 12.0
    for load, memory in loads.items():
        x = 100.0
        parts.append(f'<text x="92" y="{y + 19:.0f}" text-anchor="end">{load:g} x load</text>')
        for name, colour in _PARTS.items():
            size = getattr(memory, name)
            width = size * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="28" fill="{colour}">'
                f"<title>{name}: {size / 1e9:.2f} GB</title></rect>"
            )
            x += width
        peak = 100 + memory.peak * scale
        parts.append(
            f'<path d="M{peak:.1f} {y - 3:.0f} v34" stroke="currentColor" stroke-width="2.5"><title>peak</title></path>'
        )
        side = 'text-anchor="end"' if memory.peak <= plan.machine.usable else ""  # away from where the memory ends
        at = peak - 4 if side else peak + 4
        told = f"peak {memory.peak / 1e9:.1f}"
        parts.append(f'<text x="{at:.1f}" y="{y + 43:.0f}" font-size="11" {side}>{told}</text>')
        y += 54
    end = 100 + plan.machine.usable * scale
    parts.append(f'<path d="M{end:.1f} 0 V{y:.0f}" stroke="var(--bad)" stroke-dasharray="5 4" stroke-width="2"/>')
    parts.append(f'<text x="{end - 4:.1f}" y="{y + 8:.0f}" text-anchor="end" class="bad">usable</text>')
    y += 30
    for place, (name, colour) in enumerate(_PARTS.items()):
        x = 100 + place % 4 * 180
        line = y + place // 4 * 20
        parts.append(f'<rect x="{x}" y="{line - 11:.0f}" width="13" height="13" fill="{colour}"/>')
        parts.append(f'<text x="{x + 19}" y="{line:.0f}">{name}</text>')
    return _svg(_WIDTH, y + 32, parts)


def _total(memory: Memory) -> float:
    return sum(float(getattr(memory, name)) for name in _PARTS)


def _pareto(plan: Plan) -> str:
    """GB to the right, milliseconds up; the front and the fastest choices of the layouts."""
    points = [(row.memory.peak / 1e9, row.seconds.total * 1e3, row) for row in (*plan.pareto, *plan.rows)]
    front = {id(row) for row in plan.pareto}
    high, low = max(y for _, y, _ in points) * 1.05, min(y for _, y, _ in points) * 0.9
    right = max(plan.machine.usable / 1e9, *(x for x, _, _ in points)) * 1.03
    left = min(x for x, _, _ in points) * 0.9

    def at(x: float, y: float) -> tuple[float, float]:
        return 80 + (x - left) / (right - left) * (_WIDTH - 110), 20 + (high - y) / (high - low) * 300

    parts = [f'<path d="M80 20 V320 H{_WIDTH - 20}" fill="none" stroke="currentColor"/>']
    for step in range(6):
        x, y = left + (right - left) * step / 5, low + (high - low) * step / 5
        parts.append(f'<text x="{at(x, low)[0]:.0f}" y="338" text-anchor="middle" font-size="11">{x:.0f}</text>')
        parts.append(f'<text x="74" y="{at(left, y)[1] + 4:.0f}" text-anchor="end" font-size="11">{y:,.0f}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="358" text-anchor="middle">peak on a GPU, GB</text>')
    parts.append('<text x="84" y="14">ms a step</text>')
    line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y, row in points if id(row) in front)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>')
    for x, y, row in points:
        to_x, to_y = at(x, y)
        fill = "#1f77b4" if id(row) in front else "none"
        parts.append(
            f'<circle cx="{to_x:.1f}" cy="{to_y:.1f}" r="5" fill="{fill}" stroke="#1f77b4">'
            f"<title>{escape(describe(row))}, micro-batch {row.micro}: {x:.1f} GB, {y:,.0f} ms</title></circle>"
        )
    return _svg(_WIDTH, 366, parts)


def _milliseconds(row: PlanRow) -> str:
    parts = {name: value for name, value in row.seconds.to_dict().items() if value > 0}
    return _table(tuple(name.replace("_", " ") for name in parts), [tuple(f"{value:,.1f}" for value in parts.values())])


def _svg(width: float, height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="13">{"".join(parts)}</svg>'
    )
