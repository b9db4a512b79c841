"""The kernels of the experts' products compute what their plain torch twins compute, and nothing foreign.

Runs on a Hopper GPU. Elsewhere ``TRITON_INTERPRET=1`` runs the kernels in Triton's interpreter, in float16: it has no
bfloat16. ``tests/gpu/gpu_kernels.py`` goes through real shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
if not HOPPER and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a Hopper GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton.tools.ragged_tma")

import foldpar  # noqa: E402
from foldpar.comm import distributed_parameter  # noqa: E402
from foldpar.moe import Places  # noqa: E402
from foldpar.moe.kernels import products  # noqa: E402
from foldpar.moe.kernels import triton_products as kernels  # noqa: E402
from foldpar.moe.kernels.permutation import place_experts  # noqa: E402
from foldpar.moe.kernels.triton_products import Blocks  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]
DEVICE, DTYPE = ("cuda", torch.bfloat16) if HOPPER else ("cpu", torch.float16)
TOLERANCE = 8e-3 if HOPPER else 2e-3

# Sizes of groups, dim, hidden: empty groups first, in between and last; none of them a multiple of a tile.
CASES = [((0, 5, 17, 0, 1, 0), 40, 24), ((33, 0, 16), 48, 40)]
BLOCKS = [Blocks(16, 16, 16, 2, 4, chunk=2), Blocks(16, 32, 32, 3, 4, flat=False)]
JUNK = 3  # places behind the last group that hold nothing


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


class Problem:
    def __init__(self, sizes: tuple[int, ...], dim: int, hidden: int) -> None:
        self.experts, self.dim, self.hidden = len(sizes), dim, hidden
        self.ends = torch.tensor(sizes).cumsum(0).to(DEVICE, torch.int32)
        self.rows, self.places = sum(sizes), sum(sizes) + JUNK
        generator = torch.Generator().manual_seed(1)
        self.source = torch.randint(0, 7, (self.places,), generator=generator).to(DEVICE, torch.int32)
        self.scales = torch.rand(self.places, generator=generator).to(DEVICE)
        self.slots = torch.randperm(self.places, generator=generator).to(DEVICE, torch.int32)
        self.gate_up = draw(self.experts, 2 * hidden, dim, seed=2) * dim**-0.5
        self.down = draw(self.experts, dim, hidden, seed=3) * hidden**-0.5

    def side(self, width: int, gathered: bool, seed: int) -> tuple[Tensor, Tensor | None]:
        """Rows and their source. What lies by groups is NaN behind the last one."""
        if gathered:
            return draw(7, width, seed=seed), self.source
        rows = draw(self.places, width, seed=seed)
        rows[self.rows :] = float("nan")
        return rows, None

    def near(self, got: Tensor, wanted: Tensor) -> None:
        got = got[: self.rows] if got.dim() < 3 else got
        assert got.shape == wanted.shape
        assert float((got.double() - wanted).norm()) <= TOLERANCE * float(wanted.norm())


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [each if each is None or not each.is_floating_point() else each.double() for each in tensors]


@pytest.mark.parametrize("block", [1, 16, 128])
@pytest.mark.parametrize("sizes", [(0,), (5,), (0, 5, 17, 0, 1, 0), (16, 16, 33)])
def test_tiles_cover_each_group_by_itself(sizes: tuple[int, ...], block: int) -> None:
    ends = torch.tensor(sizes).cumsum(0).to(DEVICE, torch.int32)
    table = kernels.tiles_of(ends, sum(sizes), block)
    tiles = int(table[0, 0])
    assert tiles < len(table)
    assert [tuple(row) for row in table[1 : tiles + 1, :3].tolist()] == products.tiles_of(ends, block)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize(("sizes", "dim", "hidden"), CASES)
def test_products(sizes: tuple[int, ...], dim: int, hidden: int, gathered: bool, blocks: Blocks) -> None:
    problem = Problem(sizes, dim, hidden)
    table = kernels.tiles_of(problem.ends, problem.places, blocks.rows)

    rows, source = problem.side(dim, gathered, seed=4)
    scales, slots = (problem.scales, problem.slots) if gathered else (None, None)
    got = kernels.first_product(rows, source, problem.gate_up, scales, table, problem.places, blocks, slots)
    wide_rows, wide_weight, wide_scales = wide(rows[: None if gathered else problem.rows], problem.gate_up, scales)
    places = None if source is None else source[: problem.rows]
    slots = None if slots is None else slots[: problem.rows]
    for one, other in zip(
        got, products.first_product(wide_rows, places, wide_weight, wide_scales, problem.ends, slots), strict=True
    ):
        problem.near(one, other)

    for weight, transposed in ((problem.gate_up, True), (problem.down, False)):
        got_product = kernels.product(rows, source, weight, table, problem.places, blocks, transposed=transposed)
        (wide_weight,) = wide(weight)
        problem.near(got_product, products.product(wide_rows, places, wide_weight, problem.ends, transposed=transposed))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("gathered", ["grad", "rows"])
@pytest.mark.parametrize(("sizes", "dim", "hidden"), CASES)
def test_gradients_of_weights(sizes: tuple[int, ...], dim: int, hidden: int, gathered: str, blocks: Blocks) -> None:
    problem = Problem(sizes, dim, hidden)
    grad, _ = problem.side(hidden, gathered == "grad", seed=4)
    rows, _ = problem.side(dim, gathered == "rows", seed=5)
    got = kernels.weight_gradient(grad, rows, problem.source, gathered, problem.ends, blocks)
    places = problem.source[: problem.rows]
    problem.near(got, products.weight_gradient(grad.double(), rows.double(), places, gathered, problem.ends))
    assert not got[torch.tensor(sizes) == 0].any()


@pytest.fixture
def groups() -> Iterator[foldpar.FoldedGroups]:
    dist.init_process_group("nccl" if HOPPER else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        yield groups
    dist.destroy_process_group()


@pytest.mark.parametrize("copied", [False, True])
def test_distributed_weights_are_opened_and_their_gradients_lie_alike(
    groups: foldpar.FoldedGroups, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    monkeypatch.setattr(products, "takes", lambda *_, **__: True)
    monkeypatch.setattr(products, "LONG_GROUP", 1000 if copied else 0)
    experts = foldpar.GroupedExperts(6, 40, 24, groups, seed=0, device=DEVICE, dtype=DTYPE)
    for name, own in dict(experts.named_parameters()).items():  # as they lie on several ranks
        cuts = (0, experts._cut_over_etp(name))
        setattr(experts, name, distributed_parameter(own.detach(), groups.mesh_of_shares, cuts, requires_grad=True))
    ids = torch.rand(9, 6, generator=torch.Generator().manual_seed(0)).topk(2).indices.to(DEVICE)
    slots, source, copies, ends, sizes = place_experts(ids, 6, ids.numel())
    places = Places(source, slots, copies, ends)
    rows, weights = draw(9, 40).requires_grad_(), torch.rand(9, 2, device=DEVICE).requires_grad_()

    distributed = [experts.gate_up_proj, experts.down_proj]
    y = experts.compute(rows, sizes, weights, None, places)
    steps = {type(step).__name__ for step, _ in y.grad_fn.next_functions if step is not None}
    assert steps == {"AccumulateGrad"}, "one autograd function from rows and weights to what they sum up to"
    of_rows, of_weights, *grads = torch.autograd.grad(y, [rows, weights, *distributed], torch.ones_like(y))

    plain = [each.detach().to_local().requires_grad_() for each in distributed]
    wanted_y = experts.product((*plain, None, None), rows, sizes, weights, None, places)
    wanted = torch.autograd.grad(wanted_y, [rows, weights, *plain], torch.ones_like(y))
    assert torch.equal(y, wanted_y)
    for grad, parameter in zip(grads, distributed, strict=True):
        assert grad.placements == parameter.placements and grad.device_mesh == parameter.device_mesh
    got = [of_rows, of_weights, *(grad.to_local() for grad in grads)]
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))

    experts.down_proj.requires_grad_(False)
    y = experts.compute(rows, sizes, weights, None, places)
    assert torch.equal(torch.autograd.grad(y, rows, torch.ones_like(y))[0], of_rows)
