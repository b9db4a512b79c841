"""Random numbers that are the same on the lanes where they must be, and different everywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from foldpar.arguments import expect
from foldpar.layout import Coordinate

Region = Literal["replicated", "own_rows", "tp_sharded"]


def region_generator(
    region: Region,
    coordinate: Coordinate,
    *,
    seed: int,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A generator for one region of a model on one rank, derived from nothing but these arguments.

    ========================  ==============================================================  =================
    region                    what lies in it                                                 the lanes draw
    ========================  ==============================================================  =================
    ``"replicated"``          replicated activations, a router that sees all tokens           the same
    ``"own_rows"``            rows of the lane: sharded lanes, a router of own tokens,        different numbers
                              whatever runs at the experts
    ``"tp_sharded"``          heads or columns of the lane: attention dropout                 different numbers
    ========================  ==============================================================  =================

    Ranks of other data-parallel, context or pipeline coordinates draw different numbers in every region. The degrees of
    tp, ep and etp do not enter: on other folds of the same data ranks, ``"replicated"`` draws the same.

    Args:
        coordinate: ``groups.coordinate``.
        seed: the stream: of the run, or of a layer in it.
        offset: the place in the stream, such as the number of the step. Equal arguments give equal numbers.
        device: where the generator draws.

    Example:
        >>> from foldpar import solve_layout
        >>> at = solve_layout(4, tp=2).coordinate
        >>> draw = lambda region, rank: torch.rand(1, generator=region_generator(region, at(rank), seed=7)).item()
        >>> draw("replicated", 0) == draw("replicated", 1), draw("own_rows", 0) == draw("own_rows", 1)
        (True, False)

    Raises:
        ValueError: an unknown region.

    Source: the random number generators of tensor parallelism (Shoeybi et al. 2019, appendix B.2), here without state.
    """
    expect("region_generator", coordinate=(coordinate, Coordinate))
    return torch.Generator(device).manual_seed(_derived_seed(region, coordinate, seed, offset))


@contextmanager
def random_region(
    region: Region,
    coordinate: Coordinate,
    *,
    seed: int | None = None,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[None]:
    """Let what draws from torch's default generators, such as dropout, draw the numbers of a region.

    The default generators (the CPU's, and that of one CUDA device) are put back at the end as they were at the start.
    Regions and derivation are those of :func:`region_generator`.

    Args:
        coordinate: ``groups.coordinate``.
        seed: the stream, with ``offset`` the place in it. ``None`` draws one number from the CPU's default generator
            instead. That generator must be in the same state on all lanes, which it is after equal
            ``torch.manual_seed`` as long as lanes draw from it alike: outside regions only what is replicated.
        device: the CUDA device whose generator takes part; by default the current one, if CUDA is in use.

    Recomputation draws the same numbers. With ``seed=None``, because ``torch.utils.checkpoint`` (both variants) puts
    the default generators back (``preserve_rng_state=True``, its default). With a seed, because nothing else counts:
    pass the step into the function that is recomputed. Under ``torch.compile`` the graph breaks here.

    Example:
        >>> from foldpar import solve_layout
        >>> def dropped(rank, region):
        ...     _ = torch.manual_seed(0)
        ...     with random_region(region, solve_layout(4, tp=2).coordinate(rank)):
        ...         return torch.nn.functional.dropout(torch.ones(64)).tolist()
        >>> dropped(0, "replicated") == dropped(1, "replicated"), dropped(0, "replicated") == dropped(2, "replicated")
        (True, False)

    Raises:
        ValueError: an unknown region.
    """
    expect("random_region", coordinate=(coordinate, Coordinate))
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu").item())
    derived = _derived_seed(region, coordinate, seed, offset)
    index = _cuda_index(device)
    with torch.random.fork_rng([] if index is None else [index]):
        torch.default_generator.manual_seed(derived)
        if index is not None:
            torch.cuda.default_generators[index].manual_seed(derived)
        yield


def _derived_seed(region: Region, coordinate: Coordinate, seed: int, offset: int) -> int:
    if region not in get_args(Region):
        raise ValueError(f"region is {region!r}; choose one of {', '.join(map(repr, get_args(Region)))}.")
    lane = None if region == "replicated" else coordinate.tp
    key = (region, coordinate.pp, coordinate.dp, coordinate.cp, lane, int(seed), int(offset))
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _cuda_index(device: torch.device | str | None) -> int | None:
    """The CUDA device whose generator takes part; asking for the current one would start CUDA where nobody uses it."""
    if device is None:
        return torch.cuda.current_device() if torch.cuda.is_initialized() else None
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return None
    return torch.cuda.current_device() if chosen.index is None else chosen.index
