"""The building blocks: values against plain arithmetic, backwards by the adjoint identity, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import foldpar
from foldpar.comm.c10d import GroupFactory
from foldpar.comm.collectives import even_row_counts
from foldpar.errors import ShapeError
from foldpar.testing import RanksFailed, run_ranks

ORDERS = {2: [(0, 1), (1, 0)], 3: [(0, 1, 2), (2, 0, 1)], 4: [(0, 1, 2, 3), (0, 2, 1, 3)]}
DIM = 3
ONE = foldpar.AxisGroup("tp", (0,), 0, None)


def group_in_order(order: tuple[int, ...]) -> foldpar.AxisGroup:
    """All ranks, in a coordinate order that a group of torch's own, which is sorted, does not have."""
    factory = GroupFactory.of_default_group(None, None, 0, int.from_bytes(bytes(order), "big"))
    return foldpar.AxisGroup("tp", order, order.index(dist.get_rank()), factory.create(order))


# -- The adjoint identity ---------------------------------------------------------------------------------------------
# A block is a function of (x, group, counts). Value and gradient of its input and output are replicated (R) or differ
# per rank (V). A pairing of a replicated value with a replicated gradient counts once, all others sum over the ranks.

Block = Callable[[Tensor, foldpar.AxisGroup, tuple[int, ...]], Tensor]
BLOCKS: dict[str, tuple[Block, str, str, str, str]] = {
    # name: (block, value in, gradient in, value out, gradient out)
    "split_rows/all_gather": (lambda x, g, c: foldpar.split_rows(x, g, backward="all_gather"), "R", "R", "V", "V"),
    "split_rows/zero_pad": (lambda x, g, c: foldpar.split_rows(x, g, backward="zero_pad"), "R", "V", "V", "V"),
    "all_gather_rows/slice": (
        lambda x, g, c: foldpar.all_gather_rows(x, g, row_counts=c, backward="slice"), "V", "V", "R", "R"),
    "all_gather_rows/reduce_scatter": (
        lambda x, g, c: foldpar.all_gather_rows(x, g, backward="reduce_scatter"), "V", "V", "R", "V"),
    "reduce_scatter_rows": (lambda x, g, c: foldpar.reduce_scatter_rows(x, g, row_counts=c), "V", "V", "V", "V"),
    "all_reduce/identity": (lambda x, g, c: foldpar.all_reduce(x, g, backward="identity"), "V", "V", "R", "R"),
    "all_reduce/sum": (lambda x, g, c: foldpar.all_reduce(x, g, backward="sum"), "V", "V", "R", "V"),
    "copy_to_group": (lambda x, g, c: foldpar.copy_to_group(x, g), "R", "R", "R", "V"),
    "all_to_all_rows": (lambda x, g, c: foldpar.all_to_all_rows(x, *sent_and_received(g), g), "V", "V", "V", "V"),
}  # fmt: skip


def sent_and_received(group: foldpar.AxisGroup) -> tuple[list[int], list[int]]:
    """Coordinate i sends (i + 2 j) % 3 rows to coordinate j: uneven, and zero for some."""
    places = range(group.size)
    return [(group.index + 2 * j) % 3 for j in places], [(i + 2 * group.index) % 3 for i in places]


def rows_into(name: str, group: foldpar.AxisGroup, counts: tuple[int, ...]) -> int:
    if name.startswith("all_gather_rows"):
        return counts[group.index]
    return sum(sent_and_received(group)[0]) if name == "all_to_all_rows" else sum(counts)


def draw(state: str, shape: torch.Size | tuple[int, ...], layout: str, seed: int) -> Tensor:
    """Random float64, the same on all ranks if replicated; contiguous, transposed in memory, or expanded."""
    generator = torch.Generator().manual_seed(seed if state == "R" else 100 * seed + dist.get_rank() + 1)
    if layout == "expanded":
        return torch.randn((), generator=generator, dtype=torch.float64).expand(shape)
    drawn = torch.randn(tuple(reversed(shape)), generator=generator, dtype=torch.float64)
    return drawn.T if layout == "strided" else drawn.T.contiguous()


def pairings(order: tuple[int, ...], counts: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """On one rank: both sides of the identity for every block and memory layout, this rank's summand of each."""
    group = group_in_order(order)
    sides = {}
    for name, (block, value_in, gradient_in, value_out, gradient_out) in BLOCKS.items():
        for layout in ("contiguous", "strided", "expanded"):
            x = draw(value_in, (rows_into(name, group, counts), DIM), layout if layout != "expanded" else "strided", 1)
            x.requires_grad_()
            out = block(x, group, counts)
            y = draw(gradient_out, out.shape, layout, 2)
            before = y.clone()
            (gradient,) = torch.autograd.grad(out, x, y)
            assert torch.equal(y, before), f"{name} wrote into the arriving gradient"
            left = float((out * y).sum().detach()) / (group.size if value_out == gradient_out == "R" else 1)
            right = float((x * gradient).sum().detach()) / (group.size if value_in == gradient_in == "R" else 1)
            sides[f"{name} {layout}"] = (left, right)
    return sides


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_block_is_adjoint_to_its_backward(world: int) -> None:
    for order in ORDERS[world]:
        for rows in (0, 1, 7, 12):
            results = run_ranks(pairings, world, order, even_row_counts(rows, world))
            for name in results[0]:
                left = sum(result[name][0] for result in results)
                right = sum(result[name][1] for result in results)
                assert left == pytest.approx(right, rel=1e-12, abs=1e-12), (name, order, rows)


# -- Values -----------------------------------------------------------------------------------------------------------


def values_in(order: tuple[int, ...], counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Rows are named by coordinate: row j of coordinate i is 10 i + j."""
    group = group_in_order(order)
    own = 10.0 * group.index + torch.arange(counts[group.index], dtype=torch.float64)[:, None]
    everything = torch.arange(sum(counts), dtype=torch.float64)[:, None]
    send, receive = sent_and_received(group)
    labelled = torch.cat([torch.full((rows, 1), 10.0 * group.index + to) for to, rows in enumerate(send)])
    return {
        "index": torch.tensor(group.index),
        "gathered": foldpar.all_gather_rows(own, group, backward="slice"),
        "split": foldpar.split_rows(everything, group, backward="zero_pad"),
        "scattered": foldpar.reduce_scatter_rows(everything * (group.index + 1), group, row_counts=counts),
        "exchanged": foldpar.all_to_all_rows(labelled, send, receive, group),
        "reduced": foldpar.all_reduce(torch.tensor([1.0 + group.index]), group, backward="sum"),
    }


@pytest.mark.parametrize("world", [2, 3, 4])
def test_blocks_speak_in_coordinates_in_any_order_of_the_ranks(world: int) -> None:
    for order in ORDERS[world]:
        for counts in [tuple(range(world)), (3,) * world, (4, *(0,) * (world - 1))]:
            gathered = [10.0 * i + j for i in range(world) for j in range(counts[i])]
            total = sum(range(1, world + 1))
            for result in run_ranks(values_in, world, order, counts):
                index = int(result["index"])
                start, even = sum(counts[:index]), even_row_counts(sum(counts), world)
                assert result["gathered"].flatten().tolist() == gathered
                assert result["split"].flatten().tolist() == list(range(sum(even[:index]), sum(even[: index + 1])))
                assert result["scattered"].flatten().tolist() == [
                    total * row for row in range(start, start + counts[index])
                ]
                expected = [10.0 * i + index for i in range(world) for _ in range((i + 2 * index) % 3)]
                assert result["exchanged"].flatten().tolist() == expected
                assert result["reduced"].tolist() == [total]


def input_survives() -> bool:
    group = group_in_order((0, 1))
    x = torch.ones(2, requires_grad=True)
    (foldpar.all_reduce(x, group, backward="sum") + foldpar.copy_to_group(x, group)).sum().backward()
    return bool((x == 1).all()) and x.grad is not None and x.grad.tolist() == [4.0, 4.0]


def test_a_forward_input_is_never_reduced_in_place() -> None:
    assert run_ranks(input_survives, 2) == [True, True]


def test_a_group_of_one_is_a_local_operation() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    for block in (
        foldpar.split_rows(x, ONE, backward="all_gather"),
        foldpar.all_gather_rows(x, ONE, backward="slice"),
        foldpar.reduce_scatter_rows(x, ONE),
        foldpar.all_reduce(x, ONE, backward="identity"),
        foldpar.copy_to_group(x, ONE),
        foldpar.all_to_all_rows(x, [4], [4], ONE),
    ):
        assert block is x


def test_scale_gradient_scales_only_the_gradient() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = foldpar.scale_gradient(x, Fraction(1, 3))
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1 / 3] * 3


def test_what_comes_out_of_a_collective_can_be_changed_in_place() -> None:
    def changed(counts: tuple[int, int]) -> list[Tensor]:
        groups = foldpar.create_groups(foldpar.solve_layout(2, tp=2))
        own, gradients = counts[groups.tp.index], []
        for change in (lambda y: y.mul_(3), lambda y: y * 3):
            rows = torch.ones(own, 2, requires_grad=True)
            whole = torch.ones(sum(counts), 2, requires_grad=True)
            for y in (
                foldpar.all_gather_rows(rows, groups.tp, row_counts=counts, backward="slice"),
                foldpar.all_gather_rows(rows, groups.tp, row_counts=counts, backward="reduce_scatter"),
                foldpar.reduce_scatter_rows(whole, groups.tp, row_counts=counts),
                foldpar.split_rows(whole, groups.tp, backward="all_gather"),
                foldpar.all_reduce(whole, groups.tp, backward="sum"),
                foldpar.all_to_all_rows(rows, [own, 0], [[counts[0], counts[1]], [0, 0]][groups.tp.index], groups.tp),
            ):
                change(y).square().sum().backward()
            gradients += [rows.grad, whole.grad]
        groups.destroy()
        return gradients

    for counts in ((2, 2), (3, 1)):
        for rows, whole, rows_after, whole_after in run_ranks(changed, 2, counts, backend="threads"):
            torch.testing.assert_close(rows, rows_after)
            torch.testing.assert_close(whole, whole_after)


# -- Errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_the_block_the_numbers_and_the_choices() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"split_rows: backward is 'sum'; choose one of 'all_gather', 'zero_pad'"):
        foldpar.split_rows(x, ONE, backward="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"all_gather_rows: backward is 'x'; choose one of 'slice', 'reduce_scatter'"):
        foldpar.all_gather_rows(x, ONE, backward="x")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"row_counts = \(3,\) says that rank 0 .* has 3 row\(s\), .* has 4"):
        foldpar.all_gather_rows(x, ONE, row_counts=[3], backward="slice")
    with pytest.raises(
        ShapeError, match=r"row_counts = \(2, 2\) must hold one count, .* each of the 1 rank\(s\) of tp"
    ):
        foldpar.reduce_scatter_rows(x, ONE, row_counts=[2, 2])
    with pytest.raises(ShapeError, match=r"send_rows = \(5,\) adds up to 5, but the tensor has 4 row\(s\)"):
        foldpar.all_to_all_rows(x, [5], [5], ONE)
    with pytest.raises(ShapeError, match=r"split_rows takes a tensor of rows, \[rows, ...\], and got a scalar"):
        foldpar.split_rows(torch.tensor(1.0), ONE, backward="zero_pad")


def test_a_rank_that_raises_does_not_leave_the_others_hanging() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(waits_for_a_peer_that_raised, 2, timeout=4.0)
    text = str(failed.value)
    assert "this rank has a bug" in text
    assert "all_to_all over tp failed on rank 0 (ranks (0, 1))" in text


def waits_for_a_peer_that_raised() -> None:
    group = group_in_order((0, 1))
    if group.index == 1:
        raise KeyError("this rank has a bug")
    foldpar.all_to_all_rows(torch.zeros(2, 1), [1, 1], [1, 1], group)
