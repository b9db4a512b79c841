"""Where a rank's local tensor lies inside the global one: boxes of integers.

Every way to distribute a tensor is a chain of one step: cut a dimension into sections, take one chunk of each section,
and put these chunks after one another. A gated projection with 4 hidden units, ``[8, dim]``, on the second of two ranks
that share the hidden units:

    rows of the whole      g0 g1 g2 g3 u0 u1 u2 u3
    rows of the local      .  .  g2 g3 .  .  u2 u3      -> two boxes: rows 2..3 and rows 6..7
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from foldpar.families import chunk

__all__ = ["Box", "Share", "pieces"]


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a global tensor, and where it starts in the local one; all three tuples have a number per dimension.

    Example:
        >>> Box(offsets=(4, 0), sizes=(2, 8), starts=(0, 0)).volume
        16
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def volume(self) -> int:
        """How many elements it has."""
        return prod(self.sizes)

    def narrowed(self, dim: int, start: int, length: int, to: int) -> Box | None:
        """What of it lies in ``[start, start + length)`` of the local tensor, where that moves to ``to``."""
        first = max(start, self.starts[dim])
        end = min(start + length, self.starts[dim] + self.sizes[dim])
        if first >= end:
            return None
        return Box(
            replaced_at(self.offsets, dim, self.offsets[dim] + first - self.starts[dim]),
            replaced_at(self.sizes, dim, end - first),
            replaced_at(self.starts, dim, to + first - start),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a tensor: the global shape, the local shape, and the boxes that fill the local tensor.

    Example:
        >>> share = Share.whole((8, 3)).cut(0, count=2, index=1, parts=2)
        >>> share.local, [(box.offsets, box.sizes, box.starts) for box in share.boxes]
        ((4, 3), [((2, 0), (2, 3), (0, 0)), ((6, 0), (2, 3), (2, 0))])
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Share:
        """All of a tensor; one without elements has no boxes."""
        nothing = (0,) * len(shape)
        return cls(tuple(shape), tuple(shape), (Box(nothing, tuple(shape), nothing),) if prod(shape) else ())

    @property
    def is_whole(self) -> bool:
        """Whether the local tensor is the global one."""
        return self == Share.whole(self.shape)

    def cut(self, dim: int, count: int, index: int, *, parts: int = 1) -> Share:
        """Of every one of ``parts`` equal sections of a local dimension, keep chunk ``index`` of ``count``.

        Chunks are those of ``torch.chunk``: all of one size, except that the last ones may be smaller or empty.

        Example:
            >>> [Share.whole((5,)).cut(0, 3, index).boxes for index in (0, 2)]
            [(Box(offsets=(0,), sizes=(2,), starts=(0,)),), (Box(offsets=(4,), sizes=(1,), starts=(0,)),)]

        Raises:
            ValueError: there is no such dimension or chunk, or the sections are not equal.
        """
        dim = range(len(self.local))[dim] if -len(self.local) <= dim < len(self.local) else -1
        if dim < 0 or not 0 <= index < count or parts < 1 or self.local[dim] % parts:
            raise ValueError(f"chunk {index} of {count} in {parts} section(s) of dimension {dim} of {self.local}")
        section = self.local[dim] // parts
        start, size = chunk(section, count, index)
        boxes = (
            box.narrowed(dim, part * section + start, size, to=part * size)
            for part in range(parts)
            for box in self.boxes
        )
        return Share(
            self.shape, replaced_at(self.local, dim, parts * size), tuple(box for box in boxes if box is not None)
        )


def pieces(box: Box, limit: int) -> Iterator[Box]:
    """The box in pieces of at most ``limit`` elements each, cut along its first dimensions, in order.

    Example:
        >>> [piece.offsets for piece in pieces(Box((0, 0), (3, 4), (0, 0)), limit=8)]
        [(0, 0), (2, 0)]
    """
    if box.volume <= max(limit, 1):
        yield box
        return
    dim = next(dim for dim, size in enumerate(box.sizes) if size > 1)
    step = max(1, limit // (box.volume // box.sizes[dim]))
    for start in range(0, box.sizes[dim], step):
        part = box.narrowed(dim, box.starts[dim] + start, step, to=box.starts[dim] + start)
        assert part is not None
        yield from pieces(part, limit)


def replaced_at(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    """A shape with another size in one dimension."""
    return (*values[:dim], value, *values[dim + 1 :])
