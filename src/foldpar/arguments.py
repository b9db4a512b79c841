"""Arguments of a wrong kind, refused before anything is done: what is wanted, what was given, and what was meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from foldpar.errors import ArgumentError, ShapeError
from foldpar.wording import as_integer

__all__ = ["expect", "expect_sizes", "expect_writable"]

Kind = type[Any] | tuple[type[Any], ...]

_INSTEAD = {
    ("FoldedGroups", "FoldedLayout"): "A layout is numbers; its communicators are foldpar.create_groups(layout).",
    ("FoldedGroups", "AxisGroup"): "That is one axis; pass the whole, what create_groups returned.",
    ("FoldedLayout", "FoldedGroups"): "Pass groups.layout.",
    ("FoldedLayout", "int"): "Solve one first: foldpar.solve_layout(world, tp=..., ep=...).",
    ("AxisGroup", "FoldedGroups"): "Say over which axis: groups.tp, groups.ep, ...",
    ("AxisGroup", "FoldedLayout"): "Say over which axis: foldpar.create_groups(layout).tp, for example.",
    ("AxisGroup", "ProcessGroup"): "Wrap it: foldpar.AxisGroup.from_process_group(process_group).",
    ("Module", "generator"): "Pass the model itself, not model.parameters(): families and names are looked up in it.",
    ("Module", "list"): "Pass the model itself, not its parameters: families and names are looked up in it.",
    ("Module", "str"): "Load it first, with transformers' from_pretrained for example.",
    ("LaneState", "FoldedGroups"): "A layer's is moe.lane_state.",
    ("Coordinate", "FoldedGroups"): "Pass groups.coordinate.",
    ("Routing", "tuple"): "A router returns foldpar.Routing(ids, weights).",
    ("Routing", "Tensor"): "A router returns foldpar.Routing(ids, weights).",
    ("Routing", "NoneType"): "A router returns foldpar.Routing(ids, weights).",
    ("Tensor", "list"): "Make it one: torch.tensor(...).",
    ("Capacity", "float"): "Write foldpar.Capacity(factor).",
    ("LayerCounters", "bool"): "Write foldpar.LayerCounters().",
    ("OneSided", "bool"): "Write foldpar.OneSided(), or nothing: rows travel one-sided where they can.",
    ("OneSided", "int"): "Write foldpar.OneSided(max_tokens=...).",
    ("GroupLimit", "tuple"): "Write foldpar.GroupLimit(num_groups, top_groups).",
}


def expect(what: str, **given: tuple[object, Kind]) -> None:
    """Raise unless every argument, by name, is of its kind: ``expect("f", x=(x, Tensor))``.

    >>> expect("f", world=("8", int))
    Traceback (most recent call last):
    foldpar.errors.ArgumentError: f: world must be an int, and is a str: '8'.

    Raises:
        ArgumentError: names the argument, what it must be, what it is, and what was probably meant.
    """
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise ArgumentError(_text(what, name, value, kind, given))


def expect_sizes(what: str, **sizes: object) -> None:
    """Raise unless every size is a positive integer.

    Raises:
        ShapeError: names all of them.
    """
    wrong = [name for name, size in sizes.items() if (as_integer(size) or 0) < 1]
    if wrong:
        values = ", ".join(f"{name} = {size!r}" for name, size in sizes.items())
        raise ShapeError(f"{what}: {' and '.join(wrong)} must be a positive integer; given were {values}.")


def expect_writable(file: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written there: before the work whose result it is to hold.

    Raises:
        OSError: says what is there instead.
    """
    path = Path(file)
    if path.is_dir():
        raise IsADirectoryError(f"{str(file)!r} is a folder; name a file to write.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder, so {file} cannot be written there.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{file} cannot be written: permission denied.")


def _text(what: str, name: str, value: object, kind: Kind, given: dict[str, tuple[object, Kind]]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(_named(each) for each in kinds)
    text = f"{what}: {name} must be {wanted}, and is {_named(type(value))}{_shown(value)}."
    for other, (its, of_kind) in given.items():
        if other != name and not isinstance(its, of_kind) and isinstance(value, of_kind) and isinstance(its, kind):
            return f"{text} {name} and {other} are swapped."
    bases = [base.__name__ for base in type(value).__mro__]
    for one in kinds:
        for base in bases:
            if hint := _INSTEAD.get((one.__name__, base)):
                return f"{text} {hint}"
    return text


def _named(kind: type[Any]) -> str:
    if kind is type(None):
        return "None"
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"


def _shown(value: object) -> str:
    return f": {value!r}" if isinstance(value, (str, int, float)) and len(repr(value)) < 60 else ""
