"""Every Triton kernel computes what its plain torch twin computes.

Runs on a GPU. Without one, ``TRITON_INTERPRET=1`` runs the kernels in Triton's interpreter where Triton is installed.
"""

from __future__ import annotations

import pytest
import torch
from kernels_device import DEVICE
from torch import Tensor

from foldpar.moe.kernels import activations, permutation
from foldpar.moe.kernels import triton_rows as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


@pytest.fixture(autouse=True)
def twins_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``permutation`` and ``activations`` compute here is the twin, on every device."""
    monkeypatch.setattr(permutation, "_HAS_TRITON", False)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def routing(tokens: int, experts: int, top_k: int, kind: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "skewed":
        scores[:, : top_k + 1] += 1
    ids = scores.topk(top_k).indices
    mask = torch.rand(tokens, top_k, generator=generator) < 0.6 if kind == "masked" else None
    return ids.to(DEVICE), None if mask is None else mask.to(DEVICE)


SHAPES = [(0, 8, 2, 4), (1, 8, 2, 2), (5, 6, 3, 3), (37, 128, 8, 4), (70, 64, 6, 8), (600, 8, 2, 4), (2, 4, 4, 1)]
SHAPES += [(3000, 8, 8, 1), (5500, 6, 4, 2)]  # longer than one program works on


@pytest.mark.parametrize("kind", ["random", "skewed", "masked"])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "ranks"), SHAPES)
def test_tables(tokens: int, experts: int, top_k: int, ranks: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = routing(tokens, experts, top_k, kind)
    for listed in {0, min(8, experts // ranks)}:
        counts = permutation.count_rows(ids, mask, experts, ranks, listed)
        assert torch.equal(kernels.count_rows(ids, mask, experts, ranks, listed), counts)
    wanted = permutation.place_rows(ids, mask, counts, experts)
    made = kernels.place_rows(ids, mask, counts, experts)
    rows = int(counts[:, 0].sum())
    assert torch.equal(made[0][:rows], wanted[0][:rows])
    assert torch.equal(made[1], wanted[1])
    assert torch.equal(made[2][:rows], wanted[2][:rows])

    local_ids = wanted[2][:rows].contiguous()
    assignments = int((local_ids >= 0).sum())
    sorted_by_expert = permutation.place_experts(local_ids, experts // ranks, assignments)
    for few in (kernels.FEW_BLOCKS, 0):
        monkeypatch.setattr(kernels, "FEW_BLOCKS", few)
        placed = kernels.place_experts(local_ids, experts // ranks, assignments)
        assert all(torch.equal(one, other) for one, other in zip(placed, sorted_by_expert, strict=True))


@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize("top_k", [1, 3])
def test_ids_of_no_expert_go_nowhere_and_leave_tables_that_can_be_read(
    top_k: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FEW_BLOCKS", few)
    ids = torch.tensor([[0, 9, 2], [-1, 3, 1], [2**40, 1, 4]], device=DEVICE)[:, :top_k].contiguous()
    slots, rows, inverse, ends, sizes = kernels.place_experts(ids, 4, ids.numel())
    wanted = permutation.place_experts(ids, 4, ids.numel())
    placed = int(ends[-1])
    assert placed == int(((ids >= 0) & (ids < 4)).sum()) == int(sizes.sum())
    assert torch.equal(slots[:placed], wanted[0][:placed].int()) and torch.equal(inverse, wanted[2].int())
    assert all(int(each.min()) >= 0 and int(each.max()) < ids.numel() for each in (slots, rows))
    assert torch.equal(ends, wanted[3]) and torch.equal(sizes, wanted[4])


def test_illegal_ids_are_counted_and_go_nowhere() -> None:
    ids = torch.tensor([[0, 9], [-1, 3], [2**40, 1]], device=DEVICE)
    counts = permutation.count_rows(ids, None, 4, 2)
    assert torch.equal(kernels.count_rows(ids, None, 4, 2), counts)
    assert counts[:, 2].tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 8), (37, 96), (20, 2048), (3, 5000)])
def test_rows(tokens: int, dim: int, dtype: torch.dtype) -> None:
    ids, mask = routing(tokens, 8, 2, "masked")
    token_of_sent, sent_of_token, _ = permutation.place_rows(
        ids, mask, counts := permutation.count_rows(ids, mask, 8, 4), 8
    )
    token_of_sent = token_of_sent[: int(counts[:, 0].sum())]
    x = draw(tokens, dim, dtype=dtype)
    assert torch.equal(kernels.copy_rows(x, token_of_sent), permutation.copy_rows(x, token_of_sent))
    rows = draw(len(token_of_sent), dim, dtype=dtype)
    rows = rows if len(rows) else draw(1, dim, dtype=dtype)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}  # one rounding
    torch.testing.assert_close(
        kernels.sum_copies(rows, sent_of_token), permutation.sum_copies(rows, sent_of_token), **close
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim", "top_k"), [(1, 8, 2), (37, 96, 3), (20, 2048, 8), (3, 5000, 1)])
def test_rows_with_their_weights(tokens: int, dim: int, top_k: int, dtype: torch.dtype) -> None:
    ids, mask = routing(tokens, 16, top_k, "masked")
    counts = permutation.count_rows(ids, mask, 16, 4)
    sent = int(counts[:, 0].sum())
    token_of_sent, sent_of_token, local_ids = permutation.place_rows(ids, mask, counts, 16)
    assignments = int(counts[:, 1].sum())
    slots, _, copies, _, _ = permutation.place_experts(local_ids[:sent].contiguous(), 4, assignments)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}  # one rounding

    x, weights = draw(tokens, dim, dtype=dtype), draw(tokens, top_k, seed=1)
    payload = permutation.pack(x, weights, token_of_sent[:sent])
    assert torch.equal(kernels.pack(x, weights, token_of_sent[:sent]).view(torch.uint8), payload.view(torch.uint8))
    rows, row_weights = permutation.unpack(payload, slots, dim, top_k)
    for one, other in zip(kernels.unpack(payload, slots, dim, top_k), (rows, row_weights), strict=True):
        assert torch.equal(one, other)

    grad = permutation.pack_sums(rows, row_weights, copies)
    made = kernels.pack_sums(rows, row_weights, copies)
    torch.testing.assert_close(made[:, :dim], grad[:, :dim], **close)
    assert torch.equal(made[:, dim:].contiguous().view(torch.uint8), grad[:, dim:].contiguous().view(torch.uint8))
    summed, weight_sums = kernels.sum_packed(grad, sent_of_token, dim, top_k)
    wanted, wanted_weights = permutation.sum_packed(grad, sent_of_token, dim, top_k)
    torch.testing.assert_close(summed, wanted, **close)
    torch.testing.assert_close(weight_sums, wanted_weights)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(0, 16), (1, 8), (37, 96), (5, 3000)])
def test_swiglu(rows: int, hidden: int, dtype: torch.dtype, weighted: bool) -> None:
    gate_up, grad = draw(rows, 2 * hidden, dtype=dtype), draw(rows, hidden, dtype=dtype, seed=1)
    weights = draw(rows, seed=2) if weighted else None
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-2}
    torch.testing.assert_close(
        kernels.swiglu_forward(gate_up, weights), activations.forward(gate_up, weights, "swiglu"), **close
    )
    for one, other in zip(
        kernels.swiglu_backward(grad, gate_up, weights),
        activations.backward(grad, gate_up, weights, "swiglu"),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **close)


def test_weights_of_swiglu_that_lie_by_slot() -> None:
    gate_up, grad, weights = draw(5, 16), draw(5, 8, seed=1), draw(4, 2, seed=2)
    slots = torch.tensor([6, 0, 3, 1, 4], device=DEVICE, dtype=torch.int32)
    *wanted, of_weights = kernels.swiglu_backward(grad, gate_up, weights.flatten()[slots.long()])
    *got, by_slot = kernels.swiglu_backward(grad, gate_up, weights, None, slots)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert torch.equal(by_slot.flatten()[slots.long()], of_weights)
    assert by_slot.shape == weights.shape and int((by_slot == 0).sum()) == 3, "where nothing is computed"
