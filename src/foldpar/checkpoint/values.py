"""Plain Python values as JSON and back, without loss: what JSON would change is tagged, what cannot be kept is refused.

{"step": 3, "bounds": (1, 2), 7: None}  ->  {"$python": "dict", "of": [["step", 3], ["bounds", {"$python": "tuple", ...
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from foldpar.errors import CheckpointError

__all__ = ["decode", "encode"]

_TAG = "$python"
_DEPTH = 100
_DIGITS = 4000  # Python reads integers of up to 4300 from text
_PLAIN = (str, int, float, bool, type(None))
# Containers other than JSON's own, and how they are made again from a list.
_MAKE: Mapping[str, Callable[[list[Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
_NAMES: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter", tuple: "tuple", set: "set"}
_NAMES[frozenset] = "frozenset"


def encode(value: Any, where: str) -> Any:
    """What JSON can hold, for :func:`decode` to give back an equal value of the same types.

    Raises:
        CheckpointError: something in it is of a type that is not known here; names its place, starting at ``where``.
    """
    return _encode(value, where, _DEPTH)


def _encode(value: Any, where: str, depth: int) -> Any:
    kind = type(value)
    if depth == 0:
        raise CheckpointError(f"{where[:200]} ... is nested more than {_DEPTH} deep, or holds itself.")
    if kind is int and abs(value) >= 10**_DIGITS:
        raise CheckpointError(f"{where} is an integer of more than {_DIGITS} digits, which JSON does not give back.")
    if kind in _PLAIN:
        return value
    if kind is bytes:
        return {_TAG: "bytes", "of": value.hex()}
    if kind is complex:
        return {_TAG: "complex", "of": [value.real, value.imag]}
    if kind is list:
        return [_encode(each, f"{where}[{place}]", depth - 1) for place, each in enumerate(value)]
    if kind is dict and all(type(key) is str for key in value) and _TAG not in value:
        return {key: _encode(each, f"{where}[{key!r}]", depth - 1) for key, each in value.items()}
    if kind in (dict, OrderedDict, Counter):
        items = [
            [_encode(key, f"{where}'s key {key!r}", depth - 1), _encode(each, f"{where}[{key!r}]", depth - 1)]
            for key, each in value.items()
        ]
        return {_TAG: _NAMES[kind], "of": items}
    if kind in _NAMES:
        ordered = sorted(value, key=repr) if kind in (set, frozenset) else value
        return {_TAG: _NAMES[kind], "of": [_encode(each, f"{where}[{n}]", depth - 1) for n, each in enumerate(ordered)]}
    raise CheckpointError(
        f"{where.partition('[')[0].partition(chr(39))[0]} cannot be written as JSON: Object of type {kind.__name__} at "
        f"{where} is no plain Python value. It can hold numbers, strings, bytes, booleans, None, and lists, tuples, "
        f"sets and dictionaries of them; of tensors, arrays and objects take what is to be kept: .item(), .tolist(), "
        f"state_dict()."
    )


def decode(value: Any) -> Any:
    """The value again.

    Raises:
        CheckpointError: it is none that :func:`encode` made.
    """
    try:
        return _decode(value)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"foldpar.json holds a value that no save wrote ({type(error).__name__}: {error})"
        ) from None


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(each) for key, each in value.items()}
    tag, of = value[_TAG], value["of"]
    if tag == "bytes":
        return bytes.fromhex(of)
    if tag == "complex":
        return complex(*of)
    return _MAKE[tag]([_decode(each) for each in of])
