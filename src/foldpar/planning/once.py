"""What many candidates of a plan share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

__all__ = ["Once"]

T = TypeVar("T")


class Once:
    """``once(key, make)`` is ``make()``, the first time; later what that gave."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self._lately: tuple[object, Once] | None = None

    def of(self, thing: object) -> Once:
        """What is kept of one object, until another is asked about: its keys need not say whose they are."""
        if self._lately is None or self._lately[0] is not thing:
            self._lately = (thing, Once())
        return self._lately[1]

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        found: T | None = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
        return found
