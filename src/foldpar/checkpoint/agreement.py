"""What the ranks of a save or a load must have in common, compared before anything is written or read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from foldpar.comm import Ranks
from foldpar.errors import CheckpointError

__all__ = ["check_same_arguments", "check_same_model"]


def check_same_arguments(ranks: Ranks, **given: object) -> None:
    """Every rank looks at the same list, so that all raise if any differs."""
    first, *others = ranks.all_gather({name: str(value) for name, value in given.items()})
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise CheckpointError(
                    f"{ranks.doing}: ranks were given different arguments: {name} differs between rank 0 and rank "
                    f"{rank}. There is one of it for the whole checkpoint, so every rank must pass the same."
                )


def check_same_model(ranks: Ranks, stage: int, held: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare names, shapes, options and plain states among the ranks of each stage.

    Args:
        held: what is compared, by what it is called.
    """
    sums = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in held.items()}
    of_stage: dict[int, tuple[int, dict[str, str]]] = {}
    for rank, (of, found) in enumerate(ranks.all_gather((stage, sums))):
        first, of_first = of_stage.setdefault(of, (rank, found))
        differing = [name for name in sums if of_first[name] != found[name]]
        if differing:
            texts = ranks.all_gather(_texts(held[differing[0]]) if ranks.rank in (first, rank) else {})
            raise CheckpointError(
                f"Rank {first} and rank {rank} of one pipeline stage have different {differing[0]}, by name, global "
                f"shape, dtype, family or value, so that no whole model can be saved: "
                f"{_first_difference(texts[first], texts[rank], first, rank)}. Build the same model and the same "
                f"optimizer on every rank of a stage, and let them take the same steps."
            )


def _texts(value: Mapping[str, Any]) -> dict[str, str]:
    """A line for each thing in one or two levels of dictionaries."""
    return {
        f"{name}{f': {inner}' if inner else ''}": repr(each)[:80]
        for name, of in value.items()
        for inner, each in (of.items() if isinstance(of, Mapping) else [("", of)])
    }


def _first_difference(one: Mapping[str, str], other: Mapping[str, str], first: int, rank: int) -> str:
    name = next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)
    if name is None:
        return "they are the same, in another order"
    return f"{name} is {one.get(name, 'missing')} on rank {first} and {other.get(name, 'missing')} on rank {rank}"
