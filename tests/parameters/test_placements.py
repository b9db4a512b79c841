"""Where parameters lie: boxes of integers, and the adapter that reads them off a model."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from toys import fold, plain_model

import foldpar
from foldpar import families
from foldpar.errors import FamilyError
from foldpar.families import chunk
from foldpar.moe.storage import ExpertStorage
from foldpar.parameters.boxes import Box, Share, pieces
from foldpar.parameters.placements import Placement, mark_placement, parameter_placements, plain_name
from foldpar.sharding.shard import shard_model
from foldpar.testing import layouts, run_ranks

# -- Integers ---------------------------------------------------------------------------------------------------------


def elements(box: Box) -> list[tuple[int, ...]]:
    return list(product(*(range(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))))


def covered(shares: list[Share]) -> Counter[tuple[int, ...]]:
    return Counter(element for share in shares for box in share.boxes for element in elements(box))


def everything(shape: tuple[int, ...]) -> Counter[tuple[int, ...]]:
    return Counter(product(*map(range, shape)))


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
    """A shape, and cuts of it that fit: dimension, count, parts."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = []
    for dim in draw(st.lists(st.integers(0, len(shape) - 1), max_size=3)):
        first = not any(cut[0] == dim for cut in cuts)
        parts = draw(st.sampled_from([parts for parts in (1, 2, 3) if shape[dim] % parts == 0])) if first else 1
        cuts.append((dim, draw(st.integers(1, 4)), parts))
    return shape, cuts


@given(chains())
def test_the_shares_of_a_chain_of_cuts_cover_a_tensor_once(chain):
    shape, cuts = chain
    shares = [Share.whole(shape)]
    for dim, count, parts in cuts:
        shares = [share.cut(dim, count, index, parts=parts) for share in shares for index in range(count)]
    assert covered(shares) == everything(shape)
    for share in shares:
        assert sum(box.volume for box in share.boxes) == prod(share.local)


@given(chains(), st.randoms(use_true_random=False))
def test_a_share_says_where_chunks_of_a_tensor_are(chain, random):
    shape, cuts = chain
    whole = torch.arange(prod(shape)).view(shape)
    share, local = Share.whole(shape), whole
    for dim, count, parts in cuts:
        index = random.randrange(count)
        share = share.cut(dim, count, index, parts=parts)
        sections = [section.tensor_split(_ends(section.shape[dim], count), dim) for section in local.chunk(parts, dim)]
        local = torch.cat([section[index] for section in sections], dim)
    assert share.local == tuple(local.shape)
    for box in share.boxes:
        at = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
        of = tuple(slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))
        assert torch.equal(whole[at], local[of])


def _ends(length: int, count: int) -> list[int]:
    return [sum(chunk(length, count, index)) for index in range(count - 1)]


@given(st.integers(0, 20), st.integers(1, 6))
def test_chunks_are_those_of_torch(length, count):
    mine = [size for _, size in (chunk(length, count, index) for index in range(count))]
    torchs = [len(part) for part in torch.arange(length).chunk(count)] if length else []
    assert mine == torchs + [0] * (count - len(torchs))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 5)), max_size=3), st.integers(1, 20))
def test_pieces_are_small_and_make_up_the_box(dims, limit):
    box = Box(*(tuple(values) for values in zip(*dims, strict=True))) if dims else Box((), (), ())
    found = list(pieces(box, limit))
    assert all(piece.volume <= limit for piece in found)
    assert Counter(element for piece in found for element in elements(piece)) == Counter(elements(box))
    for piece in found:  # a piece lies in the local tensor as it lies in the global one
        moves = [offset - start for offset, start in zip(piece.offsets, piece.starts, strict=True)]
        assert moves == [offset - start for offset, start in zip(box.offsets, box.starts, strict=True)]


def test_scalars_and_tensors_without_elements():
    assert Share.whole(()).boxes == (Box((), (), ()),)
    assert list(pieces(Box((), (), ()), 1)) == [Box((), (), ())]
    assert Share.whole((0, 3)).boxes == Share.whole((3, 2)).cut(0, 4, 3).boxes == ()


def test_cuts_that_cannot_be():
    for dim, count, index, parts in ((2, 2, 0, 1), (0, 2, 2, 1), (0, 2, 0, 3), (-3, 1, 0, 1)):
        with pytest.raises(ValueError, match="section"):
            Share.whole((4, 2)).cut(dim, count, index, parts=parts)


# -- Every layout -----------------------------------------------------------------------------------------------------


class Sliced(nn.Module):
    """Slices by hand: the columns of a gate above an up projection, and experts of its own kind."""

    def __init__(self, groups: foldpar.FoldedGroups) -> None:
        super().__init__()
        tp, ep, etp = groups.tp, groups.ep, groups.etp
        gate_up = torch.arange(2 * 8 * 3.0).view(2 * 8, 3)
        self.gate_up = nn.Parameter(torch.cat([part.chunk(tp.size)[tp.index] for part in gate_up.chunk(2)]))
        experts = torch.arange(8 * 3 * 8.0).view(8, 3, 8)
        own = experts.chunk(ep.size)[ep.index].chunk(etp.size, 2)[etp.index]
        self.experts = nn.Parameter(own.contiguous())
        foldpar.mark_parameters(self, families.DENSE_SHARDED, names=["gate_up"])
        foldpar.mark_parameters(self, families.ROUTED_EXPERT, names=["experts"])
        mark_placement(self, 0, parts=2, names="gate_up")
        mark_placement(self, {"ep": 0, "etp": 2}, names=["experts"])


def model_of_all_kinds(groups: foldpar.FoldedGroups) -> nn.ModuleDict:
    options: dict[str, Any] = {"bias": True, "seed": 3}
    turned = ExpertStorage(transposed=True, interleaved=True)
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(5),
            "gated": foldpar.GroupedExperts(8, 3, 8, groups, **options),
            "plain": foldpar.GroupedExperts(8, 3, 8, groups, activation="relu", **options),
            "turned": foldpar.GroupedExperts(8, 3, 8, groups, storage=turned, **options),
            "sliced": Sliced(groups),
        }
    )
    return foldpar.mark_parameters(model, families.REPLICATED)


def own_placements(layout: foldpar.FoldedLayout) -> list[tuple[Placement, torch.Tensor]]:
    with foldpar.create_groups(layout) as groups:
        found = parameter_placements(model_of_all_kinds(groups), groups)
        return [(placement, placement.local(placement.parameter.detach()).clone()) for placement in found]


def one_rank() -> dict[str, torch.Tensor]:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        return {name: parameter.detach() for name, parameter in model_of_all_kinds(groups).named_parameters()}


@given(layout=layouts(8, ep=(1, 8), etp=(1, 8), tp=(1, 8)).filter(lambda layout: 8 % layout.ep == 8 % layout.etp == 0))
@settings(max_examples=25, deadline=None)
def test_in_every_layout_each_element_lies_where_the_placements_say(layout):
    """Every element as often as there are copies, once in each copy, and with the value of the model on one rank."""
    if 8 % layout.tp:
        return
    whole = one_rank()
    of_ranks = run_ranks(own_placements, layout.world, layout, backend="threads")
    assert [placement.name for placement, _ in of_ranks[0]] == list(whole)
    for stage in range(layout.pp):  # each stage holds the whole toy
        ranks = of_ranks[stage * layout.stage_size : (stage + 1) * layout.stage_size]
        for place, (name, want) in enumerate(whole.items()):
            here = [rank[place] for rank in ranks]
            replicas = here[0][0].replicas
            every = everything(tuple(want.shape))
            counts = covered([placement.share for placement, _ in here])
            assert counts == Counter(dict.fromkeys(every, replicas)), name
            for replica in range(replicas):
                copy = [placement.share for placement, _ in here if placement.replica == replica]
                assert covered(copy) == every, (name, replica)
            for placement, local in here:
                for box in placement.share.boxes:
                    at = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
                    of = tuple(slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))
                    assert torch.equal(local[of], want[at]), name


# -- DTensors, uneven ones and shards of FSDP2 ------------------------------------------------------------------------


def sharded_pieces(layout: foldpar.FoldedLayout, stage: int) -> list[tuple[str, Share, torch.Tensor, int, int]]:
    """Of the toy with uneven tensor parallelism in its head, and of its shards over the data ranks."""
    with foldpar.create_groups(layout) as groups:
        model = fold(plain_model(), groups)
        for block in model.blocks:
            mark_placement(block.dense.up, 0)
            mark_placement(block.dense.down, 1)
        if layout.tp > 1:
            mesh = groups.mesh("dense")["tp"]
            parallelize_module(model.head, mesh, ColwiseParallel())
            uneven = nn.Linear(7, 3, dtype=torch.float64)  # 7 inputs over 2 or 4 lanes
            model.blocks[0].extra = parallelize_module(uneven, mesh, RowwiseParallel())
        if stage:
            shard_model(model, groups, stage=stage)
        return [
            (
                placement.name,
                placement.share,
                placement.local(placement.parameter).detach().clone(),
                placement.replica,
                placement.replicas,
            )
            for placement in parameter_placements(model, groups)
        ]


@pytest.mark.parametrize(
    ("layout", "stage"),
    [
        (foldpar.solve_layout(4, tp=4, ep=4), 0),
        (foldpar.solve_layout(4, tp=2, ep=1), 3),  # edp (0, 2, 1, 3): coordinates and places on the mesh differ
        (foldpar.solve_layout(4, ep=2), 3),
        pytest.param(foldpar.solve_layout(4, tp=2, ep=4), 2, marks=pytest.mark.long),
        pytest.param(foldpar.solve_layout(3), 3, marks=pytest.mark.long),  # uneven chunks
        pytest.param(foldpar.solve_layout(6, tp=2, etp=2), 3, marks=pytest.mark.long),  # edp (0 4 3) (2 1 5)
        pytest.param(foldpar.solve_layout(8, tp=4, ep=4), 3, marks=pytest.mark.long),
        pytest.param(foldpar.solve_layout(8, tp=2, ep=2, etp=2), 1, marks=pytest.mark.long),
        pytest.param(foldpar.solve_layout(8, tp=2, ep=2, etp=2, order="consecutive"), 3, marks=pytest.mark.long),
        pytest.param(foldpar.solve_layout(8), 3, marks=pytest.mark.long),  # some ranks hold nothing
    ],
    ids=repr,
)
def test_shards_lie_where_the_placements_say(layout, stage):
    whole = dict(plain_model().named_parameters())
    of_ranks = run_ranks(sharded_pieces, layout.world, layout, stage)
    for place, (name, first, _, _, replicas) in enumerate(of_ranks[0]):
        here = [rank[place] for rank in of_ranks]
        counts = covered([share for _, share, _, _, _ in here])
        assert counts == Counter(dict.fromkeys(everything(first.shape), replicas)), name
        for replica in range(replicas):
            assert covered([entry[1] for entry in here if entry[3] == replica]) == everything(first.shape), name
        if name in whole:
            for _, share, local, _, _ in here:
                assert share.shape == tuple(whole[name].shape)
                for box in share.boxes:
                    at = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
                    of = tuple(slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))
                    assert torch.equal(local[of], whole[name][at]), name


# -- What cannot be known ---------------------------------------------------------------------------------------------


def say(layout: foldpar.FoldedLayout, what: str) -> str:
    """The error for a parameter whose place cannot be told."""
    with foldpar.create_groups(layout) as groups:
        head = foldpar.mark_parameters(nn.Linear(3, 4, bias=False), families.DENSE_SHARDED)
        if what == "experts":
            head = foldpar.mark_parameters(nn.Linear(3, 4, bias=False), families.ROUTED_EXPERT)
        elif what == "one dim for two axes":
            head = mark_placement(foldpar.mark_parameters(head, families.ROUTED_EXPERT), 0)
        elif what == "wrong shape":
            head.parameter_shares = lambda: {"weight": Share.whole((11, 3)).cut(0, 2, groups.tp.index)}
        with pytest.raises(FamilyError) as caught:
            parameter_placements(nn.ModuleDict({"head": head}), groups)
        return str(caught.value)


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        (
            "plain",
            ["head.weight is a plain tensor [4, 3]", "sharded over tp", "mark_placement(module, 0, names="],
        ),
        ("experts", ["sharded over ep, but which dimension", "{'ep': 0, 'etp': 2}", "parameter_shares()"]),
        ("one dim for two axes", ["dims = 0", "('ep', 'etp')", "say which dimension is cut over which"]),
        ("wrong shape", ["shape [4, 3] on this rank", "Linear says", "should have [6, 3], of the global [11, 3]"]),
    ],
)
def test_a_place_that_cannot_be_known_is_asked_for(what, texts):
    for text in run_ranks(say, 2, foldpar.solve_layout(2, tp=2, ep=2), what, backend="threads")[:1]:
        for part in texts:
            assert part in text


def uneven_by_hand(layout: foldpar.FoldedLayout) -> tuple[Share, int]:
    with foldpar.create_groups(layout) as groups:
        rows = torch.arange(5.0).chunk(3)[groups.tp.index].clone()
        parameter = mark_placement(foldpar.mark_parameters(nn.Parameter(rows), families.DENSE_SHARDED), 0, size=5)
        [placement] = parameter_placements(nn.ParameterList([parameter]), groups)
        return placement.share, placement.replicas


def test_uneven_slices_by_hand_and_marks_on_parameters():
    shares = run_ranks(uneven_by_hand, 3, foldpar.solve_layout(3, tp=3), backend="threads")
    assert covered([share for share, _ in shares]) == everything((5,))
    assert [replicas for _, replicas in shares] == [1, 1, 1]


def test_mark_placement_refuses_what_it_cannot_mark():
    with pytest.raises(FamilyError, match=r"marks a torch\.nn\.Module or a Parameter, not a Tensor"):
        mark_placement(torch.zeros(1), 0)
    with pytest.raises(FamilyError, match=r"'lanes' is not an axis: it can be pp, dp, cp, tp"):
        mark_placement(nn.Linear(1, 1), {"lanes": 0})
    with pytest.raises(FamilyError, match=r"own parameters of this Linear are weight, bias, and names has 'gain'"):
        mark_placement(nn.Linear(1, 1), 0, names=["gain"])
    with pytest.raises(FamilyError, match=r"own parameters of this Sequential are none\. .* mark the child"):
        mark_placement(nn.Sequential(nn.Linear(1, 1)), 0)


def test_names_are_those_of_the_model_that_was_written():
    assert plain_name("_orig_mod.blocks.0._checkpoint_wrapped_module.norm.weight") == "blocks.0.norm.weight"
    model = nn.Linear(2, 2)
    compiled = torch.compile(nn.Sequential(model, model), backend="eager")
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        found = parameter_placements(compiled, groups)
    assert [(placement.name, placement.aliases) for placement in found] == [
        ("0.weight", ("1.weight",)),
        ("0.bias", ("1.bias",)),
    ]
