"""Private names of torch and transformers: each in one room, and all on one page, docs/house.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import foldpar

SOURCE = Path(foldpar.__file__).parent
TREES = {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
PAGE = Path(__file__).parents[2] / "docs" / "house.md"

EVERYWHERE = re.compile(
    r"_parameters|_buffers|_modules|_backward_hooks|_apply|_foreach_\w+|_C|_fields|_current_frames|_pytest"
)
"""Of ``nn.Module`` and torch's optimizers, as old as they are; the door to torch's C++; two of Python's own; pytest."""


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """What the library itself calls so: modules, functions, classes, variables and attributes of ``self``."""
    names = {Path(file).stem for file in TREES}
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root_of(node) in ("self", "cls"):
            names.add(node.attr)
    return names


def root_of(node: ast.expr) -> str:
    return ast.unparse(node).partition(".")[0]


def private_names(tree: ast.AST, own: set[str] = frozenset()) -> Iterator[str]:
    """Parts of imported modules, attributes, what ``getattr`` and ``hasattr`` ask for; where they are not our own."""
    of_torch = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            dotted = [prefix + alias.name for alias in node.names if not prefix.startswith("foldpar.")]
            if dotted and dotted[0].startswith(("torch.", "transformers.")):
                of_torch |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            dotted = [node.attr] if root_of(node) in {"torch", *of_torch} or node.attr not in own else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            dotted = [name] if name not in own else []
        else:
            continue
        yield from (part for name in dotted for part in name.split(".") if is_private(part))


def used() -> set[tuple[str, str]]:
    """File and name of all that is somebody else's."""
    own = own_names()
    return {
        (file, name)
        for file, tree in TREES.items()
        for name in private_names(tree, own)
        if not name.startswith("_foldpar") and not EVERYWHERE.fullmatch(name)
    }


def rooms() -> dict[str, set[str]]:
    """By the page: file or wing -> the private names that it may use."""
    table = PAGE.read_text().partition("## Private names")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}


def test_private_names_of_others_are_those_of_the_page_each_in_its_room():
    table = rooms()
    assert table
    room_of = {(file, name): next((room for room in table if file.startswith(room)), None) for file, name in used()}
    outside = [f"{file}: {name}" for (file, name), room in room_of.items() if name not in table.get(room or "", ())]
    assert not sorted(outside), "private names of others outside their room; docs/house.md lists the rooms"
    left = {room: names - {name for (_, name), of in room_of.items() if of == room} for room, names in table.items()}
    assert not {room: names for room, names in left.items() if names}, "listed in docs/house.md and not used"


def test_a_private_name_has_one_room():
    names = [name for of_room in rooms().values() for name in of_room]
    assert len(names) == len(set(names))


def test_a_private_name_outside_its_room_is_seen():
    sources = (
        "import torch.distributed._symmetric_memory as memory",
        "from torch.distributed._symmetric_memory import empty",
        "torch.distributed._symmetric_memory.empty(3)",
        "getattr(torch.distributed, '_symmetric_memory')",
    )
    for source in sources:
        assert list(private_names(ast.parse(source))) == ["_symmetric_memory"]
    assert not list(private_names(ast.parse("self.__dict__, torch.distributed.tensor")))
