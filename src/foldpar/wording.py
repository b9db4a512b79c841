"""What errors are made of: whole numbers, their divisors, lists of choices, and the first few of many in words."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import isqrt

__all__ = ["as_integer", "below", "disk_failed", "divisors", "listed", "not_dividing", "some", "some_ranks"]


def divisors(number: int) -> list[int]:
    """All of them, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def listed(values: Sequence[object]) -> str:
    """``1``, ``1 or 2``, ``1, 2 or 4``; the middle of a long list is left out."""
    words = [repr(value) for value in values]
    if len(words) > 24:
        words[12:-4] = ["..."]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def some(texts: Sequence[str], most: int = 5, *, joint: str = ", ") -> str:
    """The first few of many, and how many are left out.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    left = f" and {len(texts) - most} more" if len(texts) > most else ""
    return joint.join(texts[:most]) + left


def below(texts: Sequence[str], most: int = 5, *, indent: int = 4) -> str:
    """The first few of many as lines below each other, each after a line break.

    >>> print("Wrong are:" + below(["a", "b", "c", "d"], 2))
    Wrong are:
        a
        b
        and 2 more
    """
    left = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "".join(f"\n{' ' * indent}{text}" for text in [*texts[:most], *left])


def some_ranks(ranks: Sequence[int], most: int = 16) -> str:
    """``0, 1, 5``: the first of them, and ``...`` for what is left out."""
    return ", ".join(map(str, ranks[:most])) + (" ..." if len(ranks) > most else "")


def disk_failed(error: str, left: str) -> str:
    """What to say where writing failed; ``left`` says what became of the files.

    >>> disk_failed("No space left on device", "Nothing is left of it")
    'No space left on device. Nothing is left of it. If the disk is full, free space and save again.'
    """
    return f"{error}. {left}. If the disk is full, free space and save again."


def as_integer(value: object) -> int | None:
    """``value`` as an int where it is one (numpy's and the like too); None for booleans and all else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def not_dividing(degree: str, value: int, name: str, total: int, why: str = "") -> str | None:
    """What to say where a degree does not divide a size; None where it does.

    >>> print(not_dividing("ep", 3, "num_experts", 8, "so ranks would hold different numbers of experts"))
    ep = 3 does not divide num_experts = 8, so ranks would hold different numbers of experts. With num_experts = 8, ep \
can be 1, 2, 4 or 8.
    """
    if total % value == 0:
        return None
    because = f", {why}" if why else ""
    return (
        f"{degree} = {value} does not divide {name} = {total}{because}. With {name} = {total}, {degree} can be "
        f"{listed(divisors(total))}."
    )
