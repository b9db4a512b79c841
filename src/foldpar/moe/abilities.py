"""What experts can do with rows that have arrived: said by the experts, asked once by the journey."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BIASED", "Abilities"]

BIASED = "the experts have biases, whose gradients are sums over all rows"


@dataclass(frozen=True, slots=True)
class Abilities:
    """The attribute ``abilities`` of experts that do more than compute ``(rows, rows_per_expert)``.

    They are called with each row's routing weight as well, and with the sizes on the host or ``None``; they weight what
    they compute, and answer in the dtype that they are asked in.

    Attributes:
        reads_places: they may be given rows that lie anywhere, as ``grouped_feed_forward`` takes them.
        needs_sizes: why no rows may come that hold nothing, behind the last expert's: the host then learns how many
            there are. ``None``: such rows are left alone.
    """

    reads_places: bool = False
    needs_sizes: str | None = None
