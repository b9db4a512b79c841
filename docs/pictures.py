"""Draw the pictures of these pages from the library's own tables: ``python docs/pictures.py`` writes ``pictures/``.

They are SVG with two palettes: they follow the browser's theme as files, and the page's where they are part of a page.
"""

from __future__ import annotations

from pathlib import Path

from foldpar import families, solve_layout
from foldpar.families import ParameterFamily
from foldpar.layout import FoldedLayout

HERE = Path(__file__).parent / "pictures"
HUES = ("#3f83d1", "#dd7f2e", "#2f9e77", "#b461c9")
LIGHT, DARK = "--ink: #1f2937; --faint: #5f6875; --fill: 0.16;", "--ink: #e8eaed; --faint: #a3abb8; --fill: 0.30;"
STYLE = f"""<style>
.foldpar-picture {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ .foldpar-picture {{ {DARK} }} }}
body[data-theme="light"] .foldpar-picture {{ {LIGHT} }}
body[data-theme="dark"] .foldpar-picture {{ {DARK} }}
.foldpar-picture text {{ fill: var(--ink); font: 13px system-ui, "DejaVu Sans", sans-serif; text-anchor: middle; }}
.foldpar-picture .head {{ font-weight: 600; font-size: 14px; }}
.foldpar-picture .faint {{ fill: var(--faint); font-size: 12px; }}
.foldpar-picture .left {{ text-anchor: start; }}
.foldpar-picture .right {{ text-anchor: end; }}
.foldpar-picture .way {{ fill: none; stroke: var(--faint); stroke-width: 1.3; }}
.foldpar-picture .followed {{ stroke-width: 2.4; }}
.foldpar-picture .tip {{ fill: var(--faint); }}
</style>
<defs><marker id="foldpar-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"
markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, hue: str) -> str:
    edge = f'fill="{hue}" style="fill-opacity: var(--fill)" stroke="{hue}" stroke-width="1.5"'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" {edge}/>'


def way(x: float, y: float, to_x: float, to_y: float, hue: str = "", both: bool = False) -> str:
    """A curve that leaves and arrives level; with a hue, the one that is followed."""
    bend = (to_x - x) / 2
    path = f"M{x:g} {y:g} C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"
    start = ' marker-start="url(#foldpar-tip)"' if both else ""
    kind = f'class="way followed" style="stroke: {hue}"' if hue else 'class="way"'
    return f'<path {kind} d="{path}" marker-end="url(#foldpar-tip)"{start}/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="foldpar-picture" role="img">'
    return "\n".join([head, f"<title>{title}</title>", STYLE, *parts, "</svg>"]) + "\n"


# One layout, in two views.


def fold(layout: FoldedLayout, num_experts: int) -> str:
    """The same ranks, once as data ranks and lanes and once as expert ranks; a rank has one hue in both."""
    wide, high, left, top = 84, 52, 58, 62
    parts = [text(left + wide * layout.tp / 2, 18, "dense layers", "head")]
    parts += [text(left + wide * layout.tp / 2, 36, f"tp {layout.tp} x dp {layout.dp}", "faint")]
    for rank in range(layout.world):
        at = layout.coordinate(rank)
        x, y = left + wide * at.tp, top + high * at.dp
        parts += [
            box(x + 3, y + 3, wide - 6, high - 6, HUES[rank]),
            text(x + wide / 2, y + high / 2 + 5, f"rank {rank}"),
        ]
    parts += [text(left - 8, top + high * (dp + 0.5) + 5, f"dp {dp}", "faint right") for dp in range(layout.dp)]
    parts += [text(left + wide * (tp + 0.5), top - 6, f"lane {tp}", "faint") for tp in range(layout.tp)]
    bottom = top + high * layout.dp
    parts += [text(left + wide * layout.tp / 2, bottom + 18, f"1/{layout.tp} of a weight,", "faint")]
    parts += [text(left + wide * layout.tp / 2, bottom + 34, f"1/{layout.dp} of the batch each", "faint")]

    middle = top + high * layout.dp / 2
    start = left + wide * layout.tp + 20
    parts += [way(start, middle, start + 74, middle, both=True), text(start + 37, middle - 10, "fold")]

    left, wide = start + 96, 84
    here = num_experts // layout.ep
    parts += [text(left + wide * layout.ep / 2, 18, "routed experts", "head")]
    parts += [text(left + wide * layout.ep / 2, 36, f"ep {layout.ep} x edp {layout.edp}", "faint")]
    for rank in range(layout.world):
        at = layout.coordinate(rank)
        x, y = left + wide * at.ep, middle - high * layout.edp + 2 * high * at.edp
        names = " ".join(f"e{expert}" for expert in range(at.ep * here, (at.ep + 1) * here))
        parts += [box(x + 3, y + 3, wide - 6, 2 * high - 6, HUES[rank])]
        parts += [text(x + wide / 2, y + high - 8, f"rank {rank}"), text(x + wide / 2, y + high + 14, names)]
    parts += [text(left + wide * (ep + 0.5), top - 6, f"ep {ep}", "faint") for ep in range(layout.ep)]
    parts += [text(left + wide * layout.ep / 2, bottom + 18, f"1/{layout.ep} of the experts each,", "faint")]
    parts += [text(left + wide * layout.ep / 2, bottom + 34, "for the tokens of all ranks", "faint")]
    return picture(int(left + wide * layout.ep + 12), bottom + 46, "One set of ranks, partitioned twice", parts)


# The rows of one forward.

ROUTED = ((0, 3), (2, 5), (1, 6), (4, 7))
"""The two experts of each of four tokens; the second token is the one that is followed."""


def journey(layout: FoldedLayout, num_experts: int, followed: int = 1) -> str:
    """Tokens on their lanes, own rows, experts, sums and tokens again; one row is followed."""
    heads = ("the lanes hold", "a lane routes", "at the experts", "sums come back", "the lanes hold")
    notes = ("split_rows", "dispatch", "combine", "all_gather_rows")
    wide, gap, high, left, top = 104, 52, 62, 66, 58
    columns = [left + place * (wide + gap) for place in range(len(heads))]
    middles = [top + high * (rank + 0.5) for rank in range(layout.world)]
    parts = [text(x + wide / 2, 18, head, "head") for x, head in zip(columns, heads, strict=True)]
    parts += [text(x - gap / 2, 40, note, "faint") for x, note in zip(columns[1:], notes, strict=True)]
    parts += [text(left - 10, y + 5, f"rank {rank}", "right") for rank, y in enumerate(middles)]
    here = num_experts // layout.ep
    place_of = {layout.coordinate(rank).ep: rank for rank in range(layout.world)}
    owner = [layout.group("tp", layout.tp * (token // layout.tp))[token % layout.tp] for token in range(len(ROUTED))]
    for rank, y in enumerate(middles):
        at = layout.coordinate(rank)
        lanes = " ".join(f"t{token}" for token in range(layout.tp * at.dp, layout.tp * (at.dp + 1)))
        own = " ".join(f"t{token}" for token, of in enumerate(owner) if of == rank)
        experts = range(at.ep * here, (at.ep + 1) * here)
        of_expert = [" ".join(f"t{token}" for token, ids in enumerate(ROUTED) if expert in ids) for expert in experts]
        arrived = " ".join(f"e{expert}: {tokens}" for expert, tokens in zip(experts, of_expert, strict=True))
        for x, words in zip(columns, (lanes, own, arrived, own, lanes), strict=True):
            parts += [box(x, y - 21, wide, 42, HUES[rank]), text(x + wide / 2, y + 5, words)]

    def step(place: int, source: int, target: int, token: int) -> str:
        hue = HUES[owner[token]] if token == followed else ""
        return way(columns[place] + wide + 2, middles[source], columns[place + 1] - 3, middles[target], hue)

    order = sorted(range(len(ROUTED)), key=lambda token: token == followed)
    for token in order:
        ranks = sorted({place_of[expert // here] for expert in ROUTED[token]})
        parts += [step(0, owner[token], owner[token], token)]
        parts += [step(1, owner[token], rank, token) for rank in ranks]
        parts += [step(2, rank, owner[token], token) for rank in ranks]
        parts += [step(3, owner[token], lane, token) for lane in layout.group("tp", owner[token])]
    first, second = ROUTED[followed]
    words = f"t{followed} goes to e{first} and e{second}: one row to each rank, and one sum back"
    parts += [text((columns[0] + columns[-1] + wide) / 2, middles[-1] + 50, words, "faint")]
    return picture(columns[-1] + wide + 10, int(middles[-1]) + 62, "A row's journey through one layer", parts)


# Who holds which gradient.

SHOWN = (
    ("a TP slice", families.DENSE_SHARDED),
    ("a norm", families.REPLICATED),
    ("a router", families.ROUTER_OWN_TOKENS),
    ("a routed expert", families.ROUTED_EXPERT),
)

OF = {"tp": "columns of lane {}", "ep": "experts of ep {}"}
"""What a rank holds, by the first axis that shards it."""


def elements(layout: FoldedLayout, family: ParameterFamily, rank: int) -> int:
    """Which part of the parameter a rank holds: the coordinate on the axes that shard it."""
    at, part = layout.coordinate(rank), 0
    for axis in family.shard_axes:
        part = part * getattr(layout, axis) + getattr(at, axis)
    return part


def saw(layout: FoldedLayout, family: ParameterFamily, rank: int) -> str:
    """The tokens behind the gradient that a rank holds after backward."""
    if family.view == "expert":
        return "rows sent to this rank"
    at = layout.coordinate(rank)
    return f"batch {at.dp}, " + ("own rows" if family is families.ROUTER_OWN_TOKENS else "all rows")


def gradients(layout: FoldedLayout) -> str:
    """For four kinds of parameters: what each rank's gradient is of, and which ranks' are put together."""
    wide, high, left, top = 146, 58, 118, 34
    parts = [text(left + wide * (rank + 0.5), 20, f"rank {rank}", "head") for rank in range(layout.world)]
    end = left + wide * layout.world
    for place, (name, family) in enumerate(SHOWN):
        y = top + place * (high + 30)
        lanes = {"SKIP": "lanes: nothing", "AVERAGE": "lanes: average", "SUM": "lanes: sum"}[family.reduction.name]
        groups = layout.groups(family.data_axis)
        together = " and ".join("+".join(str(rank) for rank in group) for group in groups if len(group) > 1)
        data = f"then sum over {family.data_axis}: ranks {together}"
        parts += [text(left - 10, y + high / 2 + 5, name, "right")]
        for rank in range(layout.world):
            part = elements(layout, family, rank)
            what = OF[family.shard_axes[0]].format(part) if family.shard_axes else "all of it"
            x = left + wide * rank
            parts += [box(x + 4, y, wide - 8, high, HUES[part])]
            parts += [text(x + wide / 2, y + 24, what), text(x + wide / 2, y + 43, saw(layout, family, rank), "faint")]
        parts += [
            text(
                left + 6,
                y + high + 17,
                f"{lanes}, {data}",
                "faint left",
            )
        ]
    return picture(end + 8, top + len(SHOWN) * (high + 30), "Who holds which gradient after backward", parts)


def drawn() -> dict[str, str]:
    """The pictures by file name."""
    return {
        "fold.svg": fold(solve_layout(4, tp=2, ep=4), num_experts=8),
        "journey.svg": journey(solve_layout(4, tp=2, ep=4), num_experts=8),
        "gradients.svg": gradients(solve_layout(4, tp=2, ep=2)),
    }


if __name__ == "__main__":
    for name, svg in drawn().items():
        (HERE / name).write_text(svg)
