"""Random numbers: the same on lanes where they must be, different everywhere else, and repeated on recomputation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from lane_cases import DIM, EXPERTS, TOP_K, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import foldpar
from foldpar import FoldedLayout, random_region, region_generator
from foldpar.testing import run_ranks
from foldpar.testing.strategies import layouts

REGIONS = ("replicated", "own_rows", "tp_sharded")
ORIGIN = foldpar.solve_layout(1).coordinate(0)


def drawn(region: str, layout: FoldedLayout, rank: int, **place: int) -> tuple[float, ...]:
    generator = region_generator(region, layout.coordinate(rank), **{"seed": 5, **place})
    return tuple(torch.rand(3, generator=generator, dtype=torch.float64).tolist())


# -- Laws --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(layout=layouts(16))
def test_replicated_regions_differ_between_tp_groups_only_and_others_between_all_ranks(layout: FoldedLayout) -> None:
    ranks = range(layout.world)
    tp_groups = {layout.group("tp", rank) for rank in ranks}
    replicated = {rank: drawn("replicated", layout, rank) for rank in ranks}
    for group in tp_groups:
        assert len({replicated[rank] for rank in group}) == 1
    assert len(set(replicated.values())) == len(tp_groups)
    for region in REGIONS[1:]:
        assert len({drawn(region, layout, rank) for rank in ranks}) == layout.world


def test_regions_seeds_and_offsets_are_streams_of_their_own() -> None:
    one = foldpar.solve_layout(1)
    places = itertools.product(REGIONS, range(4), range(4))
    numbers = [drawn(region, one, 0, seed=seed, offset=offset) for region, seed, offset in places]
    assert len(set(numbers)) == len(numbers) == 48
    assert drawn("own_rows", one, 0, seed=1, offset=2) == drawn("own_rows", one, 0, seed=1, offset=2)


def test_another_fold_of_the_same_data_ranks_draws_the_same_in_replicated_regions() -> None:
    few, many = foldpar.solve_layout(2, ep=2), foldpar.solve_layout(8, tp=4, ep=2, etp=2)
    assert drawn("replicated", few, 1) == drawn("replicated", many, 4) == drawn("replicated", many, 7)


def test_an_unknown_region_is_refused() -> None:
    with pytest.raises(ValueError, match=r"region is 'all'; choose one of 'replicated', 'own_rows', 'tp_sharded'"):
        region_generator("all", ORIGIN, seed=0)
    with pytest.raises(ValueError, match=r"region is 'all'"), random_region("all", ORIGIN):
        pass


# -- The context manager -----------------------------------------------------------------------------------------------


def test_a_region_with_a_seed_leaves_the_default_generator_as_it_was() -> None:
    torch.manual_seed(1)
    want = torch.rand(4)
    torch.manual_seed(1)
    with random_region("own_rows", ORIGIN, seed=3, offset=7):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), want)
    generator = region_generator("own_rows", ORIGIN, seed=3, offset=7)
    assert torch.equal(inside, torch.rand(4, generator=generator))


def test_without_a_seed_every_entry_is_a_new_place_and_takes_one_number() -> None:
    torch.manual_seed(1)
    entries = []
    for _ in range(3):
        with random_region("own_rows", ORIGIN):
            entries.append(tuple(torch.rand(4).tolist()))
    after = torch.rand(1)
    assert len(set(entries)) == 3
    torch.manual_seed(1)
    for _ in range(3):
        torch.randint(2**62, ())
    assert torch.equal(torch.rand(1), after)


def test_the_default_generator_comes_back_after_an_error() -> None:
    torch.manual_seed(1)
    want = torch.rand(2)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), random_region("own_rows", ORIGIN, seed=0):
        raise ZeroDivisionError
    assert torch.equal(torch.rand(2), want)


def dropout(x: Tensor, step: int, seed: int | None) -> Tensor:
    with random_region("tp_sharded", ORIGIN, seed=seed, offset=step):
        return F.dropout(x * 1.0, 0.5) * x  # d/dx is twice what it is in value, if the mask is the same


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("seed", "preserve"), [(None, True), (11, True), (11, False)])
def test_recomputation_draws_the_same_numbers(reentrant: bool, seed: int | None, preserve: bool) -> None:
    torch.manual_seed(0)
    x, options = torch.ones(64, requires_grad=True), {"use_reentrant": reentrant, "preserve_rng_state": preserve}
    outputs = [checkpoint(dropout, x, step, seed, **options) for step in range(3)]  # three forwards in flight
    torch.rand(5)
    for y in outputs:
        (gradient,) = torch.autograd.grad(y.sum(), x) if not reentrant else (_gradient(y, x),)
        assert torch.equal(gradient, 2 * y.detach())
        assert set(y.tolist()) == {0.0, 2.0}
    assert len({tuple(y.tolist()) for y in outputs}) == 3


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    x.grad = None  # reentrant checkpoints know .backward() only
    y.sum().backward()
    return x.grad


# -- In a layer --------------------------------------------------------------------------------------------------------


def jittered(options: dict[str, Any], recompute: bool | None, seeds: tuple[int, ...]) -> list[Any]:
    """Routed logits on every rank, gathered over the lanes, and the router's gradient; twice."""
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        torch.manual_seed(seeds[groups.rank])
        router = foldpar.TopKRouter(DIM, EXPERTS, TOP_K, dtype=torch.float64, jitter=0.3)
        router.weight = nn.Parameter(weights()[0])
        moe = foldpar.FoldedMoE.from_dense(router, *weights()[1:], groups, check=True, **options)
        x = torch.ones(6, DIM, dtype=torch.float64, requires_grad=True)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            y, routing = moe(x, return_routing=True)
            return y, routing.logits

        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            return forward(x) if recompute is None else checkpoint(forward, x, use_reentrant=recompute)

        first, second = call(x), call(x)
        second[0].square().sum().backward()
        first[0].square().sum().backward()
        return [first[1].detach(), second[1].detach(), router.weight.grad.clone(), x.grad.clone()]


@pytest.mark.parametrize("options", [{}, {"partition": "assignments"}, {"lanes": "sharded"}], ids=str)
def test_jitter_is_alike_where_lanes_route_the_same_tokens_and_recomputed(options: dict[str, Any]) -> None:
    plain = run_ranks(jittered, 4, options, None, (3, 3, 3, 3))
    alike = "partition" in options
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(plain[first][0], plain[second][0]) == alike
    assert not torch.equal(plain[0][0], plain[2][0])  # data ranks
    assert not torch.equal(plain[0][0], plain[0][1])  # forwards
    for reentrant in (False, True):
        for got, want in zip(run_ranks(jittered, 4, options, reentrant, (3, 3, 3, 3)), plain, strict=True):
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_lanes_seeded_differently_are_found_by_the_check() -> None:
    with pytest.raises(AssertionError, match=r"a router draws random numbers after lanes were seeded differently"):
        run_ranks(jittered, 4, {"partition": "assignments"}, None, (3, 4, 3, 3))


# -- On a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_on_a_gpu_draws_in_the_region_and_is_recomputed(reentrant: bool) -> None:
    layout = foldpar.solve_layout(4, tp=2)
    x = torch.ones(4096, device="cuda", requires_grad=True)
    masks = []
    for rank in range(3):
        torch.manual_seed(0)
        at = layout.coordinate(rank)

        def forward(x: Tensor, at: foldpar.Coordinate = at) -> Tensor:
            with random_region("replicated", at):
                return F.dropout(x * 1.0, 0.5) * x

        y = checkpoint(forward, x, use_reentrant=reentrant)
        after = torch.rand(1, device="cuda")
        assert torch.equal(_gradient(y, x), 2 * y.detach())
        masks.append((y.detach(), after))
    assert torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0], masks[2][0])
    assert torch.equal(masks[0][1], masks[2][1])
