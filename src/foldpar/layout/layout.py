"""Which rank sits where: one set of ranks, partitioned twice.

A *view* lays the ranks of the world on a line of positions and reads each position as a mixed-radix number:

    dense view    position = ((pp * DP + dp) * CP + cp) * TP + tp
    expert view   position = ((pp * EDP + edp) * EP + ep) * ETP + etp

The position of a rank in the dense view is the rank itself. In the expert view the *order* decides. Inside a stage of
6 ranks with tp = 2, so that ranks 0 2 4 are lane 0 and ranks 1 3 5 are lane 1:

    position           0 1 2 3 4 5
    "tp-lane-major"    0 2 4 1 3 5     sorted by (lane, rank)
    "consecutive"      0 1 2 3 4 5

So an axis is a ``Span``: its groups are ``size`` positions, ``stride`` apart. All else here is arithmetic on that, and
questions about one rank cost what their answer costs: nothing on that path builds a table of the world.

The expert groups of some folds, cross-lane ones included, in both orders:

>>> def ep_groups(world, **degrees):
...     return [solve_layout(world, **degrees, order=order).groups("ep") for order in ORDERS]
>>> ep_groups(8, tp=2, ep=4)
[((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1, 2, 3), (4, 5, 6, 7))]
>>> ep_groups(4, tp=2, ep=4)
[((0, 2, 1, 3),), ((0, 1, 2, 3),)]
>>> ep_groups(4, tp=4, ep=4)
[((0, 1, 2, 3),), ((0, 1, 2, 3),)]
>>> ep_groups(8, tp=4, ep=4)
[((0, 4, 1, 5), (2, 6, 3, 7)), ((0, 1, 2, 3), (4, 5, 6, 7))]
>>> ep_groups(8, tp=2, ep=2, etp=2)
[((0, 4), (2, 6), (1, 5), (3, 7)), ((0, 2), (1, 3), (4, 6), (5, 7))]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import chain
from math import lcm
from typing import Any, Literal, NamedTuple, get_args

from foldpar.errors import LayoutError
from foldpar.wording import as_integer, divisors, listed

__all__ = ["AXES", "ORDERS", "Axis", "Coordinate", "FoldedLayout", "Order", "Span", "View", "solve_layout"]

View = Literal["dense", "expert"]
Order = Literal["tp-lane-major", "consecutive"]
Axis = Literal["pp", "dp", "cp", "tp", "edp", "ep", "etp", "dp_cp", "ep_etp"]

ORDERS: tuple[Order, ...] = get_args(Order)
AXES: tuple[Axis, ...] = get_args(Axis)


def solve_layout(
    world: int,
    *,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    pp: int = 1,
    cp: int = 1,
    order: Order = "tp-lane-major",
) -> FoldedLayout:
    """Fold ``world`` ranks into a dense and an expert view; ``dp`` and ``edp`` are what remains.

    Args:
        world: how many ranks there are.
        tp: tensor parallelism of the dense layers (lanes per TP group).
        ep: expert parallelism: ranks that share the experts out among them. It need not be a part of ``dp``.
        etp: tensor parallelism inside an expert. Not tied to ``tp``.
        pp: pipeline stages.
        cp: context parallelism: ranks that share one sequence.
        order: which rank sits at which position of the expert view. ``"tp-lane-major"`` keeps an EP group on one
            lane as far as it fits, ``"consecutive"`` keeps it on neighbouring ranks.

    Example:
        >>> layout = solve_layout(8, tp=2, ep=4)
        >>> layout.dp, layout.edp, layout.stage_size
        (4, 2, 8)
        >>> solve_layout(8, etp=2, ep=3)
        Traceback (most recent call last):
        foldpar.errors.LayoutError: ep * etp = 3 * 2 = 6 does not divide stage_size = 8, so edp would not be whole. \
With etp = 2, ep can be 1, 2 or 4.

    Raises:
        LayoutError: a degree is not a positive integer, or ``pp`` does not divide ``world``, or ``tp * cp`` or
            ``ep * etp`` does not divide ``world / pp``; the text lists the values that would.
    """
    return FoldedLayout(world, tp=tp, ep=ep, etp=etp, pp=pp, cp=cp, order=order)


class Span(NamedTuple):
    """Where an axis lies in its view: each of its groups is ``size`` positions, ``stride`` apart.

    Example:
        >>> span = solve_layout(8, tp=2, ep=4).span("dp")
        >>> span
        Span(view='dense', size=4, stride=2)
        >>> list(span.around(5)), list(span.nth(0))
        ([1, 3, 5, 7], [0, 2, 4, 6])
    """

    view: View
    size: int
    stride: int

    def around(self, position: int) -> range:
        """The positions of the group that holds ``position``."""
        return self._from(position - position // self.stride % self.size * self.stride)

    def nth(self, group: int) -> range:
        """The positions of one group, counted as in :meth:`FoldedLayout.groups`."""
        block, offset = divmod(group, self.stride)
        return self._from(block * self.size * self.stride + offset)

    def _from(self, first: int) -> range:
        return range(first, first + self.size * self.stride, self.stride)


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Where one rank sits in both views; ``tp`` is its lane.

    Example:
        >>> solve_layout(8, tp=2, ep=4).coordinate(5)
        Coordinate(pp=0, dp=2, cp=0, tp=1, edp=1, ep=2, etp=0)
    """

    pp: int
    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True, slots=True)
class FoldedLayout:
    """One world of ranks, partitioned once for the dense layers and once for the experts.

    A plain value: it compares, hashes, pickles and prints (``print(layout)`` draws both views) and holds no process
    group. Constructed means valid. See :func:`solve_layout` for the degrees.

    Example:
        >>> layout = FoldedLayout(4, tp=2, ep=4)
        >>> layout.group("ep", 3), layout.group("tp", 3)
        ((0, 2, 1, 3), (2, 3))
        >>> layout == FoldedLayout(4, tp=2, ep=4), hash(layout) == hash(FoldedLayout(4, tp=2, ep=4))
        (True, True)

    Raises:
        LayoutError: the degrees do not fold this world; see :func:`solve_layout`.
    """

    world: int
    _: KW_ONLY
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    cp: int = 1
    order: Order = "tp-lane-major"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("world", *_DEGREES)}
        sizes = {name: as_integer(value) for name, value in given.items()}
        for name, size in sizes.items():
            if size is None or size < 1:
                usable = {other: size if size and size > 0 else 1 for other, size in sizes.items()}
                raise LayoutError(_not_an_integer(name, given[name], "a positive integer") + _advice(name, usable))
            object.__setattr__(self, name, size)
        if self.order not in ORDERS:
            raise LayoutError(f"order = {self.order!r} is unknown: it can be {listed(ORDERS)}.")
        _check_divisions({name: getattr(self, name) for name in given})

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: ``world / pp``."""
        return self.world // self.pp

    @property
    def dp(self) -> int:
        """Data parallelism of the dense layers: ``stage_size / (tp * cp)``."""
        return self.stage_size // (self.tp * self.cp)

    @property
    def edp(self) -> int:
        """Data parallelism of the experts: ``stage_size / (ep * etp)`` replicas of each expert."""
        return self.stage_size // (self.ep * self.etp)

    def to_dict(self) -> dict[str, Any]:
        """What it is made of, as plain data: ``FoldedLayout(**layout.to_dict()) == layout``.

        Example:
            >>> solve_layout(8, tp=2, ep=4).to_dict()
            {'world': 8, 'tp': 2, 'ep': 4, 'etp': 1, 'pp': 1, 'cp': 1, 'order': 'tp-lane-major'}
        """
        return asdict(self)

    def span(self, axis: Axis) -> Span:
        """The view, the size and the stride of an axis.

        Example:
            >>> solve_layout(8, tp=2, ep=4).span("edp")
            Span(view='expert', size=2, stride=4)

        Raises:
            LayoutError: there is no such axis.
        """
        match axis:
            case "tp":
                return Span("dense", self.tp, 1)
            case "cp":
                return Span("dense", self.cp, self.tp)
            case "dp":
                return Span("dense", self.dp, self.tp * self.cp)
            case "dp_cp":
                return Span("dense", self.dp * self.cp, self.tp)
            case "pp":
                return Span("dense", self.pp, self.stage_size)
            case "etp":
                return Span("expert", self.etp, 1)
            case "ep":
                return Span("expert", self.ep, self.etp)
            case "edp":
                return Span("expert", self.edp, self.etp * self.ep)
            case "ep_etp":
                return Span("expert", self.ep * self.etp, 1)
        raise LayoutError(f"{axis!r} is not an axis: it can be {listed(AXES)}.")

    def size(self, axis: Axis) -> int:
        """Ranks in each group of ``axis``.

        Example:
            >>> layout = solve_layout(16, tp=2, cp=2, ep=4, etp=2)
            >>> layout.size("dp"), layout.size("dp_cp"), layout.size("ep_etp")
            (4, 8, 8)

        Raises:
            LayoutError: there is no such axis.
        """
        return self.span(axis).size

    def position(self, view: View, rank: int) -> int:
        """The position of a rank in a view; the inverse of :meth:`rank_at`.

        Example:
            >>> layout = solve_layout(6, tp=2)
            >>> [layout.position("expert", rank) for rank in range(6)]
            [0, 3, 1, 4, 2, 5]

        Raises:
            LayoutError: the rank is not in the world, or there is no such view.
        """
        rank = _index("rank", rank, self.world, f"world = {self.world}")
        if not self._permutes(view):
            return rank
        start, within = rank - rank % self.stage_size, rank % self.stage_size
        return start + within % self.tp * (self.stage_size // self.tp) + within // self.tp

    def rank_at(self, view: View, position: int) -> int:
        """The rank at a position of a view; the inverse of :meth:`position`.

        Example:
            >>> layout = solve_layout(6, tp=2)
            >>> [layout.rank_at("expert", position) for position in range(6)]
            [0, 2, 4, 1, 3, 5]

        Raises:
            LayoutError: the position is not in the world, or there is no such view.
        """
        position = _index("position", position, self.world, f"world = {self.world}")
        return self._ranks_at(view, (position,))[0]

    def coordinate(self, rank: int) -> Coordinate:
        """Where ``rank`` sits in both views, by arithmetic alone.

        Example:
            >>> solve_layout(8, tp=4, ep=4).coordinate(5)
            Coordinate(pp=0, dp=1, cp=0, tp=1, edp=0, ep=3, etp=0)

        Raises:
            LayoutError: the rank is not in the world.
        """
        dense, expert = self.position("dense", rank), self.position("expert", rank)
        return Coordinate(
            pp=dense // self.stage_size,
            dp=dense // (self.tp * self.cp) % self.dp,
            cp=dense // self.tp % self.cp,
            tp=dense % self.tp,
            edp=expert // (self.etp * self.ep) % self.edp,
            ep=expert // self.etp % self.ep,
            etp=expert % self.etp,
        )

    def dense_rank(self, *, pp: int = 0, dp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The rank at a dense coordinate: ``((pp * DP + dp) * CP + cp) * TP + tp``.

        Example:
            >>> solve_layout(8, tp=2, ep=4).dense_rank(dp=2, tp=1)
            5

        Raises:
            LayoutError: a coordinate is not below the size of its axis.
        """
        return self._rank_at_coordinate("dense", {"pp": pp, "dp": dp, "cp": cp, "tp": tp})

    def expert_rank(self, *, pp: int = 0, edp: int = 0, ep: int = 0, etp: int = 0) -> int:
        """The rank at an expert coordinate: position ``((pp * EDP + edp) * EP + ep) * ETP + etp`` of the order.

        Example:
            >>> solve_layout(8, tp=2, ep=4).expert_rank(edp=1, ep=2)
            5

        Raises:
            LayoutError: a coordinate is not below the size of its axis.
        """
        return self._rank_at_coordinate("expert", {"pp": pp, "edp": edp, "ep": ep, "etp": etp})

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks of the ``axis`` group that holds ``rank``, in coordinate order, which need not ascend.

        Costs O(size of the group), whatever the world.

        Example:
            >>> solve_layout(8, tp=4, ep=4).group("ep", 5)
            (0, 4, 1, 5)

        Raises:
            LayoutError: there is no such axis, or the rank is not in the world.
        """
        span = self.span(axis)
        return self._ranks_at(span.view, span.around(self.position(span.view, rank)))

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of ``axis``: a partition of the world, sorted by the other coordinates of the axis' view.

        Example:
            >>> solve_layout(8, tp=2, pp=2, ep=2).groups("dp")
            ((0, 2), (1, 3), (4, 6), (5, 7))

        Raises:
            LayoutError: there is no such axis.
        """
        view, size, stride = self.span(axis)
        ranks = self._ranks_by_position(view)
        return tuple(
            tuple(ranks[first : start + size * stride : stride])
            for start in range(0, self.world, size * stride)
            for first in range(start, start + stride)
        )

    def _permutes(self, view: View) -> bool:
        if view not in get_args(View):
            raise LayoutError(f"{view!r} is not a view: it can be {listed(get_args(View))}.")
        return view == "expert" and self.order == "tp-lane-major"

    def _rank_at_coordinate(self, view: View, coordinate: Mapping[Axis, int]) -> int:
        position = 0
        for axis, index in coordinate.items():
            _, size, stride = self.span(axis)
            position += _index(axis, index, size, f"an axis of size {size}") * stride
        return self.rank_at(view, position)

    def _ranks_at(self, view: View, positions: Sequence[int]) -> tuple[int, ...]:
        """The ranks at positions of one stage (any stages, where the view is not permuted)."""
        if not self._permutes(view):
            return tuple(positions)
        tp, per_lane = self.tp, self.stage_size // self.tp
        start = positions[0] - positions[0] % self.stage_size
        return tuple(
            [start + (position - start) % per_lane * tp + (position - start) // per_lane for position in positions]
        )

    def _ranks_by_position(self, view: View) -> Sequence[int]:
        """The whole world as :meth:`_ranks_at` would list it, lane by lane instead of rank by rank."""
        if not self._permutes(view):
            return range(self.world)
        stage_starts = range(0, self.world, self.stage_size)
        lanes = (
            range(start + lane, start + self.stage_size, self.tp) for start in stage_starts for lane in range(self.tp)
        )
        return tuple(chain.from_iterable(lanes))


_DEGREES = ("tp", "ep", "etp", "pp", "cp")
_PARTNER = {"tp": "cp", "cp": "tp", "ep": "etp", "etp": "ep"}


def _check_divisions(sizes: Mapping[str, int]) -> None:
    """Refuse degrees that do not divide, with what the user gave and what would do."""
    world, pp = sizes["world"], sizes["pp"]
    if world % pp:
        raise LayoutError(
            f"pp = {pp} does not divide world = {world}, so the stages would not be of one size."
            + (_advice("pp", sizes) or f" It must divide the world: {listed(divisors(world))}.")
        )
    stage = world // pp
    for first, second, rest in (("tp", "cp", "dp"), ("ep", "etp", "edp")):
        product = sizes[first] * sizes[second]
        if stage % product:
            made_of = f" (world / pp = {world} / {pp})" if pp > 1 else ""
            advice = _advice(first, sizes) + _advice(second, sizes) + (_advice("pp", sizes) if pp > 1 else "")
            raise LayoutError(
                f"{first} * {second} = {sizes[first]} * {sizes[second]} = {product} does not divide "
                f"stage_size = {stage}{made_of}, so {rest} would not be whole."
                + (advice or f" Each must divide it: {listed(divisors(stage))}.")
            )


def _advice(name: str, sizes: Mapping[str, int]) -> str:
    """A sentence with the valid values of one degree beside the others as given; empty where there are none."""
    world, pp, dense, expert = sizes["world"], sizes["pp"], sizes["tp"] * sizes["cp"], sizes["ep"] * sizes["etp"]
    if name == "world":
        return f" With these degrees, world can be any multiple of {pp * lcm(dense, expert)}."
    if name == "pp":
        given, whole, taken = f"tp * cp = {dense} and ep * etp = {expert}", world, lcm(dense, expert)
    else:
        other = _PARTNER[name]
        given, whole, taken = f"{other} = {sizes[other]}", world // pp if world % pp == 0 else 0, sizes[other]
    if whole == 0 or whole % taken:
        return ""
    return f" With {given}, {name} can be {listed(divisors(whole // taken))}."


def _not_an_integer(name: str, value: object, wanted: str) -> str:
    kind = "" if type(value) is int else f", of type {type(value).__name__},"
    return f"{name} = {value!r}{kind} is not {wanted}."


def _index(name: str, value: object, size: int, whole: str) -> int:
    """``value`` as an index below ``size``; ``whole`` says what has that size."""
    index = as_integer(value)
    if index is None:
        raise LayoutError(_not_an_integer(name, value, f"an integer from 0 to {size - 1}"))
    if not 0 <= index < size:
        choices = "only 0" if size == 1 else f"0 to {size - 1}"
        raise LayoutError(f"{name} = {index} is out of range for {whole}: it can be {choices}.")
    return index
