"""Rows that lie anywhere: ``places`` is what spreading them before and summing them afterwards is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foldpar.moe import Places, collect, grouped_feed_forward, pick, spread
from foldpar.moe.kernels import products
from foldpar.moe.kernels.permutation import place_experts

EXPERTS, DIM, HIDDEN, TOKENS, TOP_K = 5, 8, 6, 7, 3


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def tables(kind: str) -> tuple[Places, Tensor]:
    """Where rows lie, and the ends of the groups; one expert and one token have nothing to do."""
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    scores[:, 2] = -1
    ids = scores.topk(TOP_K).indices.int()
    if kind == "masked":
        ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4] = -1
        ids[3] = -1
    if kind == "nothing":
        ids[:] = -1
    slots, source, copies, ends, sizes = place_experts(ids, EXPERTS, int((ids >= 0).sum()))
    assert torch.equal(sizes.cumsum(0), ends)
    return Places(source, slots, copies, ends), ends


@pytest.mark.parametrize("kind", ["all", "masked", "nothing"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("activation", "interleaved"), [("swiglu", False), ("swiglu", True), ("gelu", False)])
def test_places_are_spread_before_and_collect_after(
    activation: Any, interleaved: bool, biased: bool, kind: str
) -> None:
    places, ends = tables(kind)
    source, copies = places.source, places.copies
    columns = HIDDEN if activation == "gelu" else 2 * HIDDEN
    rows, weights = draw(TOKENS, DIM, seed=2), draw(TOKENS, TOP_K, seed=3)
    parameters = [draw(EXPERTS, columns, DIM, seed=4), draw(EXPERTS, DIM, HIDDEN, seed=5)]
    biases = [draw(EXPERTS, columns, seed=6), draw(EXPERTS, DIM, seed=7)] if biased else []
    options: dict[str, Any] = {"interleaved": interleaved}
    options |= dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))

    at_once = grouped_feed_forward(rows, *parameters, ends, activation, weights=weights, places=places, **options)
    options["weights"], spread_rows = pick(weights, places.slots, copies), spread(rows, source, copies)
    in_steps = collect(grouped_feed_forward(spread_rows, *parameters, ends, activation, **options), source, copies)
    assert torch.equal(at_once, in_steps)
    given, grad = [rows, weights, *parameters, *biases], draw(TOKENS, DIM, seed=8)
    pairs = zip(torch.autograd.grad(at_once, given, grad), torch.autograd.grad(in_steps, given, grad), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_own_kernels_leave_alone_what_they_were_not_measured_for() -> None:
    rows = torch.empty(0, DIM, dtype=torch.bfloat16)
    assert not products.takes(rows, rows, rows, 10**6, "swiglu", plain=True), "they run on no CPU"


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"hidden": products.MOST_UNITS + 8}, False),
        ({"hidden": 12}, False),
        ({"dim": 12}, False),
        ({"places": EXPERTS * products.FEWEST_ROWS - 1}, False),
        ({"activation": "geglu"}, False),
        ({"plain": False}, False),
    ],
    ids=str,
)
def test_what_own_kernels_take(change: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"dtype": torch.bfloat16, "dim": 16, "hidden": 24, "places": EXPERTS * products.FEWEST_ROWS}
    case |= {"activation": "swiglu", "plain": True} | change
    monkeypatch.setattr(products, "runs_on_triton", lambda _: True)
    monkeypatch.setattr(products, "_on_hopper", lambda _: True)
    dim, hidden, dtype = case["dim"], case["hidden"], case["dtype"]
    gate_up, down = torch.empty(EXPERTS, 2 * hidden, dim, dtype=dtype), torch.empty(EXPERTS, dim, hidden, dtype=dtype)
    rows = torch.empty(4, dim, dtype=dtype)
    takes = products.takes(rows, gate_up, down, case["places"], case["activation"], plain=case["plain"])
    assert takes is taken
    transposed = torch.empty(EXPERTS, dim, 2 * hidden, dtype=dtype).transpose(1, 2)
    assert not products.takes(rows, transposed, down, case["places"], case["activation"], plain=case["plain"])


def test_rows_need_not_lie_together() -> None:
    """In float32, whose grouped products are torch's, which takes strides of whole 16 bytes only."""
    rows = torch.randn(DIM, TOKENS).T
    gate_up, down = torch.randn(2, 16, DIM), torch.randn(2, DIM, 8)
    ends = torch.tensor([3, TOKENS], dtype=torch.int32)
    got, wanted = (grouped_feed_forward(each, gate_up, down, ends, "swiglu") for each in (rows, rows.contiguous()))
    assert torch.equal(got, wanted)
