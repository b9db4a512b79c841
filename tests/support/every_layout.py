"""Layouts: drawn ones, and all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from hypothesis import strategies as st

from foldpar import FoldedLayout, solve_layout
from foldpar.layout.layout import ORDERS


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@st.composite
def layouts(draw: st.DrawFn, max_world: int = 64) -> FoldedLayout:
    world = draw(st.integers(1, max_world))
    pp = draw(st.sampled_from(divisors(world)))
    stage = world // pp
    tp, ep = draw(st.sampled_from(divisors(stage))), draw(st.sampled_from(divisors(stage)))
    cp, etp = draw(st.sampled_from(divisors(stage // tp))), draw(st.sampled_from(divisors(stage // ep)))
    return solve_layout(world, tp=tp, ep=ep, etp=etp, pp=pp, cp=cp, order=draw(st.sampled_from(ORDERS)))


def every_layout(max_world: int) -> Iterator[FoldedLayout]:
    for world in range(1, max_world + 1):
        for pp in divisors(world):
            dense = [(tp, cp) for tp in divisors(world // pp) for cp in divisors(world // pp // tp)]
            for (tp, cp), (ep, etp), order in product(dense, dense, ORDERS):
                yield FoldedLayout(world, tp=tp, ep=ep, etp=etp, pp=pp, cp=cp, order=order)
