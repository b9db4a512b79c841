"""Hypothesis strategies for layouts, row counts, token batches and routings: integers only, no torch.

All of them construct what they return (nothing is drawn and thrown away), and all shrink to what is easiest to think
about: the smallest world, degrees of 1, no rows, balanced experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import isqrt, lcm
from typing import Literal, NamedTuple, TypeAlias, get_args, overload

from hypothesis import strategies as st

from foldpar.errors import LayoutError
from foldpar.layout import ORDERS, FoldedLayout, Order

__all__ = ["Balance", "Bound", "MaskedRouting", "layouts", "routings", "row_counts", "token_batches"]

Bound: TypeAlias = "int | tuple[int, int] | None"
Balance = Literal["balanced", "one", "skewed", "random"]


def layouts(
    max_world: int = 8,
    *,
    min_world: int = 1,
    pp: Bound = None,
    dp: Bound = None,
    cp: Bound = None,
    tp: Bound = None,
    edp: Bound = None,
    ep: Bound = None,
    etp: Bound = None,
    orders: Sequence[Order] = ORDERS,
) -> st.SearchStrategy[FoldedLayout]:
    """Layouts of ``min_world`` to ``max_world`` ranks, every one whose degrees lie within the bounds.

    A bound is a number (exactly that), a pair (both ends included) or ``None`` (anything). Small degrees are drawn more
    often than large ones. Shrinks to the smallest world that it finds, to degrees of 1, and to the first of ``orders``.

    Example:
        >>> from hypothesis import find
        >>> smallest = find(layouts(64, ep=(2, 64)), lambda layout: layout.cp > 1)
        >>> smallest == FoldedLayout(2, cp=2, ep=2)
        True

    Raises:
        LayoutError: no layout lies within the bounds.
    """
    bounds = {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "edp": edp, "ep": ep, "etp": etp}
    folds = [fold for world in range(min_world, max_world + 1) for fold in _folds(world, bounds)]
    if not folds or not orders:
        given = ", ".join(f"{name} = {bound}" for name, bound in bounds.items() if bound is not None)
        raise LayoutError(
            f"No layout of {min_world} to {max_world} ranks has {given or 'one of no orders'}: no such world is both "
            "pp * dp * cp * tp and pp * edp * ep * etp. Widen a bound or raise max_world."
        )
    # Worlds that fold in many ways are drawn more often, and so are small degrees.
    ways = Counter(fold.world for fold in folds)
    worlds = [world for world in sorted(ways) for _ in range(isqrt(ways[world]))]
    wishes = [value for value in range(1, max_world + 1) for _ in range(max_world // value)]

    @st.composite
    def draw_layout(draw: st.DrawFn) -> FoldedLayout:
        # A degree is drawn as a wish, which means the same in every world, and becomes the nearest possible degree. So
        # the world and each degree can shrink alone, and the others stay what they are or give way a little.
        world = draw(st.sampled_from(worlds))
        left = [fold for fold in folds if fold.world <= world]
        for place in range(1, len(_Fold._fields)):
            wish = draw(st.sampled_from(wishes))
            degree = min({fold[place] for fold in left}, key=lambda value: (abs(value - wish), -value))
            left = [fold for fold in left if fold[place] == degree]
        return left[0].layout(draw(st.sampled_from(tuple(orders))))

    return draw_layout()


def row_counts(ranks: int, max_rows: int = 8) -> st.SearchStrategy[tuple[int, ...]]:
    """How many rows each of ``ranks`` ranks holds: ragged, and 0 on some or all of them. Shrinks to no rows.

    Example:
        >>> from hypothesis import find
        >>> find(row_counts(3), lambda rows: sum(rows) >= 5 and max(rows) < 5)
        (0, 1, 4)
    """
    return st.tuples(*[st.integers(0, max_rows)] * ranks)


def token_batches(
    layout: FoldedLayout, *, max_tokens: int = 8, lanes: Literal["replicated", "sharded"] = "replicated"
) -> st.SearchStrategy[tuple[int, ...]]:
    """How many tokens each rank of the world brings to a layer: ragged, and 0 on some or all of them.

    The lanes of a TP group bring the same tokens if they are ``"replicated"``, and counts of their own if they are
    ``"sharded"``. Pipeline stages work on the same tokens.

    Example:
        >>> from hypothesis import find
        >>> layout = FoldedLayout(4, tp=2, ep=4)
        >>> find(token_batches(layout), lambda tokens: tokens[3] > 0)
        (0, 0, 1, 1)
        >>> find(token_batches(layout, lanes="sharded"), lambda tokens: tokens[3] > 0)
        (0, 0, 0, 1)
    """
    coordinates = [layout.coordinate(rank) for rank in range(layout.world)]
    owners = [(at.dp, at.cp, at.tp if lanes == "sharded" else 0) for at in coordinates]
    places = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
    return row_counts(len(places), max_tokens).map(lambda counts: tuple(counts[places[owner]] for owner in owners))


class MaskedRouting(NamedTuple):
    """Expert ids and which of them count, both ``[num_tokens][top_k]``."""

    ids: list[list[int]]
    mask: list[list[bool]]


@overload
def routings(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    balances: Sequence[Balance] = ...,
    masked: Literal[False] = ...,
) -> st.SearchStrategy[list[list[int]]]: ...
@overload
def routings(
    num_tokens: int, num_experts: int, top_k: int, *, balances: Sequence[Balance] = ..., masked: Literal[True]
) -> st.SearchStrategy[MaskedRouting]: ...
def routings(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    balances: Sequence[Balance] = get_args(Balance),
    masked: bool = False,
) -> st.SearchStrategy[list[list[int]]] | st.SearchStrategy[MaskedRouting]:
    """Expert ids ``[num_tokens][top_k]``, distinct within a token; with ``masked`` also which of them count.

    ``balances`` says which kinds are drawn: ``"balanced"`` gives all experts equally many assignments (one more or
    less), ``"one"`` sends all tokens to the same ``top_k`` experts, ``"skewed"`` leaves half of the experts or more
    without any, unless ``top_k`` needs them, and ``"random"`` is anything. Shrinks to the balanced one.

    A mask is ``False`` for the last tokens (padding), beyond a number of assignments per expert (capacity, the first
    ones stay), or anywhere; all may count, or none. Shrinks to all.

    Example:
        >>> from hypothesis import find
        >>> find(routings(3, 4, 2), lambda ids: True)
        [[0, 1], [2, 3], [0, 1]]
        >>> find(routings(3, 4, 2, masked=True), lambda routing: True).mask
        [[True, True], [True, True], [True, True]]

    Raises:
        ValueError: ``top_k`` is not one of 1 to ``num_experts``.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k = {top_k} distinct experts of {num_experts} cannot be chosen; top_k can be 1 to {num_experts}."
        )

    def spread(first: int) -> list[list[int]]:
        return [[(first + top_k * token + slot) % num_experts for slot in range(top_k)] for token in range(num_tokens)]

    def same(ids: list[int]) -> list[list[int]]:
        return [list(ids) for _ in range(num_tokens)]

    def each(experts: Sequence[int]) -> st.SearchStrategy[list[list[int]]]:
        return st.lists(_distinct(experts, top_k), min_size=num_tokens, max_size=num_tokens)

    every = range(num_experts)
    some = st.integers(top_k, max(top_k, num_experts // 2)).flatmap(lambda size: _distinct(every, size))
    kinds: dict[Balance, st.SearchStrategy[list[list[int]]]] = {
        "balanced": st.integers(0, num_experts - 1).map(spread),
        "one": _distinct(every, top_k).map(same),
        "skewed": some.flatmap(each),
        "random": each(every),
    }
    ids = st.one_of([kinds[balance] for balance in balances])
    return ids.flatmap(_with_mask) if masked else ids


def _with_mask(ids: list[list[int]]) -> st.SearchStrategy[MaskedRouting]:
    tokens, top_k = len(ids), len(ids[0]) if ids else 0

    def without_padding(kept: int) -> list[list[bool]]:
        return [[token < kept] * top_k for token in range(tokens)]

    def within(capacity: int) -> list[list[bool]]:
        taken: Counter[int] = Counter()
        mask = []
        for token in ids:
            mask.append([taken[expert] < capacity for expert in token])
            taken.update(token)
        return mask

    everything = st.just(without_padding(tokens))
    anywhere = st.lists(
        st.lists(st.sampled_from([True, False]), min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens
    )
    # Numbers shrink to 0, and what is drawn should shrink to all that counts.
    padding = st.integers(0, tokens).map(lambda dropped: without_padding(tokens - dropped))
    capacity = st.integers(0, tokens).map(lambda dropped: within(tokens - dropped))
    masks = st.one_of(everything, anywhere, padding, capacity)
    return masks.map(lambda mask: MaskedRouting(ids, mask))


@st.composite
def _distinct(draw: st.DrawFn, choices: Sequence[int], count: int) -> list[int]:
    """``count`` of the choices in any order; shrinks to the first ones."""
    left = list(choices)
    return [left.pop(draw(st.integers(0, len(left) - 1))) for _ in range(count)]


class _Fold(NamedTuple):
    """The degrees of a layout, and how many times larger its stages are than these degrees need."""

    world: int
    tp: int
    ep: int
    cp: int
    etp: int
    pp: int
    slack: int

    def layout(self, order: Order) -> FoldedLayout:
        return FoldedLayout(self.world, tp=self.tp, ep=self.ep, etp=self.etp, pp=self.pp, cp=self.cp, order=order)


def _folds(world: int, bounds: Mapping[str, Bound]) -> Iterator[_Fold]:
    """Every way to fold a world within the bounds."""
    for pp in _divisors(world, bounds["pp"]):
        stage = world // pp
        expert = _splits(stage, bounds["ep"], bounds["etp"], bounds["edp"])
        for tp, cp in _splits(stage, bounds["tp"], bounds["cp"], bounds["dp"]):
            for ep, etp in expert:
                yield _Fold(world, tp, ep, cp, etp, pp, stage // lcm(tp * cp, ep * etp))


def _splits(stage: int, inner: Bound, middle: Bound, outer: Bound) -> list[tuple[int, int]]:
    """All (inner, middle) degrees that leave an outer one within the bounds."""
    return [
        (a, b)
        for a in _divisors(stage, inner)
        for b in _divisors(stage // a, middle)
        if _divisors(stage // (a * b), outer)[-1:] == [stage // (a * b)]
    ]


def _divisors(number: int, bound: Bound) -> list[int]:
    low, high = (1, number) if bound is None else (bound, bound) if isinstance(bound, int) else bound
    return [degree for degree in range(max(low, 1), min(high, number) + 1) if number % degree == 0]
