"""Reading the pages of the repository: fenced blocks, sections and tables."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))
DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the last heading above it."""

    language: str
    text: str
    section: str


def blocks_of(page: str) -> list[Block]:
    """All blocks with a language; Sphinx's directives, ``{...}``, are none."""
    found, section = [], ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^( *)```(\w+)\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL):
        heading, indent, language, text = match.groups()
        section = heading or section
        if language:
            found.append(Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE), section))
    return found


def blocks(language: str, page: str, section: str | None = None) -> list[Block]:
    chosen = [block for block in blocks_of(page) if block.language == language and section in (None, block.section)]
    assert chosen, f"there is no {language} block in {section or 'the page'}"
    return chosen


def section(title: str, page: str) -> str:
    """The text below a heading, up to the next one of its level."""
    return re.split(r"^## ", page.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first column is called so, without its heading."""
    lines = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def models_script() -> ModuleType:
    """What writes the page of models, as a module."""
    if (known := sys.modules.get("models_of_docs")) is not None:
        return known
    spec = importlib.util.spec_from_file_location("models_of_docs", ROOT / "docs" / "models.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
