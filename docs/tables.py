"""The tables of the page about gradients and the pages of the API, written from the library itself."""

from __future__ import annotations

import re
from pathlib import Path

import foldpar
from foldpar import families
from foldpar.families import ParameterFamily, Reduction

HERE = Path(__file__).parent

ON_LANES = {
    Reduction.SKIP: "nothing",
    Reduction.SUM: "sum",
    Reduction.AVERAGE: "average",
    Reduction.EXPERT_TP_CANCEL: "divide by `tp`, send nothing",
}
SEEN_BY_A_COPY = """
TP slice: attention, MLP, shared experts, vocabulary-parallel head
    DENSE_SHARDED | - | DENSE_SHARDED | -
whole, used on all rows: norms, embeddings
    REPLICATED | REPLICATED_PARTIAL | REPLICATED_PARTIAL | REPLICATED
whole, inside a TP-sharded region: QK-norm gains, replicated KV heads, attention sinks
    REPLICATED_PARTIAL | - | REPLICATED_PARTIAL | -
whole, used on own rows: a head or norm above `split_rows`
    REPLICATED_PARTIAL | REPLICATED_PARTIAL | REPLICATED_PARTIAL | REPLICATED_PARTIAL
router of the lane's own tokens (`partition="tokens"`)
    ROUTER_OWN_TOKENS | ROUTER_OWN_TOKENS | ROUTER_OWN_TOKENS | ROUTER_POST_HOC
router of all tokens (`partition="assignments"`)
    ROUTER_ALL_TOKENS | ROUTER_OWN_TOKENS | | ROUTER_POST_HOC
routed experts, slices over etp included
    ROUTED_EXPERT | ROUTED_EXPERT | ROUTED_EXPERT | ROUTED_EXPERT_POST_HOC
an expert's output bias
    EXPERT_BIAS | EXPERT_BIAS | EXPERT_BIAS | EXPERT_BIAS, divided by tp
"""
"""The family of a parameter, by what its copy on a lane sees, and by the gradient that arrives: replicated, partial, of
sharded lanes, post-hoc. The one table that is written by hand: this is the theory; ``-`` cannot be."""


def family_constants() -> dict[str, ParameterFamily]:
    """The families by the names of their constants, in the order of ``foldpar.families``."""
    return {name: value for name, value in vars(families).items() if isinstance(value, ParameterFamily)}


def table_of_families() -> str:
    """One row a family: the axes that shard it, the axes that repeat it, and what is done over which."""
    rows = []
    for name, family in family_constants().items():
        lanes = ON_LANES[family.reduction] + (f", over `{family.lane_axis}`" if family.lane_axis else "")
        shards = " ".join(f"`{axis}`" for axis in family.shard_axes) or "no axis"
        copies = " ".join(f"`{axis}`" for axis in family.replica_axes)
        rows.append((f"`{name}`", shards, copies, f"{family.reduction.name}: {lanes}", f"`{family.data_axis}`"))
    return markdown_table(("family", "other elements on", "copies on", "over the lanes", "then summed over"), rows)


def families_by_use() -> dict[str, tuple[str, ...]]:
    """``SEEN_BY_A_COPY``, read: four cells for each use of a parameter; ``-`` where there can be none."""
    lines = SEEN_BY_A_COPY.strip().splitlines()
    return {
        use: tuple(cell.strip() for cell in cells.split("|"))
        for use, cells in zip(lines[::2], lines[1::2], strict=True)
    }


def table_of_parameters() -> str:
    """The family of a parameter, and below it what is done over the lanes."""

    def cell(text: str) -> str:
        if text in ("", "-"):
            return "cannot be" if text else ""
        name, comma, rest = text.partition(",")
        return f"`{name}`{comma}{rest}: {family_constants()[name].reduction.name}"

    rows = [(use, *map(cell, cells)) for use, cells in families_by_use().items()]
    heads = ("parameter", "gradient replicated (default)", "gradient partial", "sharded lanes", "post-hoc")
    return markdown_table(heads, rows)


def markdown_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# The API: one page for each table of "At a glance".


def themes() -> dict[str, list[str]]:
    """The public names by theme, in the order of the tables of ``api.md``."""
    found: dict[str, list[str]] = {}
    for table in re.findall(r"(?:^\|.*\n)+", (HERE / "api.md").read_text(), re.MULTILINE):
        title, *_ = (cell.strip() for cell in table.strip("| \n").split("|"))
        found[title] = re.findall(r"^\| `([\w.]+)", table, re.MULTILINE)
    return found


def page_of_theme(title: str, names: list[str]) -> str:
    """A page in reStructuredText; names are documented as users write them, wherever their code lives."""
    return "\n".join([title.capitalize(), "=" * len(title), "", *(directive(name) for name in names)])


def directive(name: str) -> str:
    if "." in name:
        return f".. automodule:: {name}\n   :members:\n"
    thing = getattr(foldpar, name)
    if not isinstance(thing, type):
        return f".. autofunction:: foldpar.{name}\n"
    if issubclass(thing, Exception):
        return f".. autoexception:: foldpar.{name}\n   :show-inheritance:\n"
    return f".. autoclass:: foldpar.{name}\n   :members:\n"


def write_api() -> None:
    """Write ``api/``; a page that says the same already keeps its time, so that it is not built again."""
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    pages = {f"{title.replace(' ', '-')}.rst": page_of_theme(title, names) for title, names in themes().items()}
    for old in {path.name for path in folder.iterdir()} - pages.keys():
        (folder / old).unlink()
    for name, text in pages.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)
