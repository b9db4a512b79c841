"""``FoldedExperts``: experts whose routing is somebody else's, and the activations and storages that models bring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hand_made import DIM, EXPERTS, HIDDEN, TOP_K, Convention, ConventionExperts, Stored
from torch import Tensor, nn
from toys import assert_gradient_is_autograds, name_of

import foldpar
from foldpar import families
from foldpar.comm.dtensors import local_tensor
from foldpar.errors import ShapeError
from foldpar.moe.folded_experts import FoldedExperts
from foldpar.moe.kernels import activations
from foldpar.moe.kernels.activations import ClampedSwiGLU
from foldpar.moe.storage import ExpertStorage
from foldpar.testing import check_against_one_process, run_ranks

PLAIN = Stored(ExpertStorage())


def fold(block: Convention, groups: foldpar.FoldedGroups, **options: object) -> nn.Module:
    experts = block.experts
    block.experts = FoldedExperts.from_dense(experts.gate_up_proj, experts.down_proj, groups, **options)
    sharded = options.get("lanes") == "sharded"
    foldpar.mark_parameters(block.gate, families.ROUTER_OWN_TOKENS if sharded else families.ROUTER_ALL_TOKENS)
    return block


@pytest.mark.parametrize(
    "options", [{}, {"partition": "assignments"}, {"check": True}, {"lanes": "sharded"}], ids=name_of
)
@pytest.mark.parametrize("layout", [foldpar.solve_layout(4, tp=2, ep=4), foldpar.solve_layout(4, tp=4, ep=2, etp=2)])
def test_every_way_to_share_the_work_is_exact(layout: foldpar.FoldedLayout, options: dict[str, str]) -> None:
    report = check_against_one_process(
        lambda: Convention(PLAIN),
        lambda block, groups: fold(block, groups, **options),
        layout,
        batch=lambda data_rank: torch.randn(5 * data_rank, DIM),  # the first data rank has no tokens
        lanes=options.get("lanes", "replicated"),
        losses="sum",
    )
    report.raise_if(1e-11)


def test_it_moves_and_counts_what_a_folded_moe_does() -> None:
    """The same weights and routing in both layers: equal outputs, equal counters, equal gradients."""
    layout = foldpar.solve_layout(4, tp=2, ep=4)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(7, DIM, generator=draw, dtype=torch.float64)
    ids = torch.rand(7, EXPERTS, generator=draw).topk(TOP_K).indices
    weights = torch.rand(7, TOP_K, generator=draw, dtype=torch.float64)
    gate_up = torch.randn(EXPERTS, 2 * HIDDEN, DIM, generator=draw, dtype=torch.float64)
    down = torch.randn(EXPERTS, DIM, HIDDEN, generator=draw, dtype=torch.float64)

    def rank() -> bool:
        with foldpar.create_groups(layout) as groups:
            counters = foldpar.LayerCounters(), foldpar.LayerCounters()
            own = foldpar.split_rows

            def router(rows: Tensor) -> foldpar.Routing:
                mine = own(ids, groups.tp, backward="zero_pad"), own(weights, groups.tp, backward="zero_pad")
                return foldpar.Routing(*mine)

            moe = foldpar.FoldedMoE.from_dense(router, gate_up, down, groups, counters=counters[0])
            folded = FoldedExperts.from_dense(gate_up, down, groups, counters=counters[1])
            one, other = moe(x), folded(x, ids, weights)
            one.square().sum().backward()
            other.square().sum().backward()
            assert torch.equal(one, other)
            assert torch.equal(local_tensor(moe.experts.gate_up_proj.grad), local_tensor(folded.gate_up_proj.grad))
            assert counters[0].read() == counters[1].read()
            return counters[0].read().assignments > 0

    assert all(run_ranks(rank, 4, backend="threads"))


def test_a_folded_moe_takes_folded_experts_too() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        grouped = foldpar.GroupedExperts(EXPERTS, DIM, HIDDEN, groups, seed=1)
        folded = FoldedExperts(EXPERTS, DIM, HIDDEN, groups, seed=1)
        router = foldpar.TopKRouter(DIM, EXPERTS, TOP_K)
        x = torch.randn(5, DIM)
        one, other = (foldpar.FoldedMoE(router, experts, groups)(x) for experts in (grouped, folded))
        assert torch.equal(one, other)


def test_it_says_what_it_holds() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        text = repr(FoldedExperts(EXPERTS, DIM, HIDDEN, groups, partition="assignments"))
    assert text == (
        "FoldedExperts(experts 0..3 of 4, dim=8, hidden 6 of 6, activation='swiglu', bias=False, lanes='replicated', "
        "partition='assignments')"
    )


@pytest.mark.parametrize(
    ("x", "ids", "weights", "text"),
    [
        ((5, DIM + 1), (5, 2), (5, 2), r"FoldedExperts takes \[tokens, dim = 8\], and got \[5, 9\]"),
        ((1, 5, DIM), (5, 2), (5, 2), r"and got \[1, 5, 8\]"),
        (
            (5, DIM),
            (5, 2),
            (5, 3),
            r"must both be \[tokens, top_k\] for the 5 token\(s\) of hidden_states, and are \[5, 2",
        ),
        ((5, DIM), (4, 2), (4, 2), r"and are \[4, 2\] and \[4, 2\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    x: tuple[int, ...], ids: tuple[int, ...], weights: tuple[int, ...], text: str
) -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        experts = FoldedExperts(EXPERTS, DIM, HIDDEN, groups)
        with pytest.raises(ShapeError, match=text):
            experts(torch.zeros(x), torch.zeros(ids, dtype=torch.int64), torch.zeros(weights))
        with pytest.raises(ShapeError, match=r"The input is torch.float64 and the experts are torch.float32"):
            experts(torch.zeros(5, DIM).double(), torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2))


# -- Activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", ClampedSwiGLU(1.3, 0.8)], ids=name_of)
def test_the_gradient_of_a_gated_activation_is_autograds(activation: activations.Activation, interleaved: bool) -> None:
    gate_up = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_gradient_is_autograds(gate_up, activation, interleaved)


def test_the_clamped_activation_is_the_formula() -> None:
    gate, up = torch.tensor([0.5, 9.0, -9.0, 1.0]), torch.tensor([2.0, 1.0, 1.0, -8.0])
    value = activations.forward(torch.stack([gate, up], -1).flatten()[None], None, ClampedSwiGLU(), interleaved=True)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    torch.testing.assert_close(value[0], (up + 1) * gate * torch.sigmoid(1.702 * gate))


def test_an_unknown_activation_is_refused() -> None:
    text = r"activation is 'swish'; choose one of 'swiglu', .* or a ClampedSwiGLU\."
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups, pytest.raises(ValueError, match=text):
        FoldedExperts(EXPERTS, DIM, HIDDEN, groups, activation="swish")


# -- Storages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_one_seed_draws_the_same_experts_in_every_storage(transposed: bool, interleaved: bool) -> None:
    layout = foldpar.solve_layout(4, ep=2, etp=2)
    storage = ExpertStorage(transposed, interleaved)
    x, weights = torch.randn(3, DIM), torch.rand(3, TOP_K)
    ids = torch.tensor([[0, 3], [1, 2], [3, 1]])

    def rank(storage: ExpertStorage) -> Tensor:
        with foldpar.create_groups(layout) as groups:
            experts = FoldedExperts(EXPERTS, DIM, HIDDEN, groups, storage=storage, bias=True, seed=5)
            return experts(x, ids, weights).detach()

    wanted = run_ranks(rank, 4, ExpertStorage(), backend="threads")
    torch.testing.assert_close(run_ranks(rank, 4, storage, backend="threads"), wanted)


def test_weights_of_another_storage_are_refused() -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        experts = ConventionExperts(replace(PLAIN, storage=ExpertStorage(transposed=True)))
        with pytest.raises(
            ShapeError, match=r"means num_experts = 4, dim = 6, hidden_dim = 8; then gate_up_proj must be"
        ):
            FoldedExperts.from_dense(experts.gate_up_proj, experts.down_proj, groups)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", ClampedSwiGLU()], ids=name_of)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_storage_computes_the_same_on_gpus(
    transposed: bool, interleaved: bool, activation: activations.Activation, bias: bool
) -> None:
    """In bf16 with torch's grouped products, beside float64 on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    draw = torch.Generator().manual_seed(0)
    dim, hidden, tokens = 64, 32, 300
    x = torch.randn(tokens, dim, generator=draw)
    ids = torch.rand(tokens, EXPERTS, generator=draw).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=draw)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        options = {"activation": activation, "bias": bias, "storage": ExpertStorage(transposed, interleaved), "seed": 3}
        experts = FoldedExperts(EXPERTS, dim, hidden, groups, **options)
        results = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
            mine = experts.to(device, dtype)
            rows = x.to(device, dtype).requires_grad_()
            given = weights.clone().to(device).requires_grad_()
            mine.zero_grad()
            y = mine(rows, ids.to(device), given)
            y.square().sum().backward()
            found = {name: parameter.grad for name, parameter in mine.named_parameters()}
            found |= {"y": y.detach(), "rows": rows.grad, "weights": given.grad}
            results.append({name: each.detach().clone().double().cpu() for name, each in found.items()})
    wanted, got = results
    for name, want in wanted.items():
        assert (got[name] - want).norm() < 2e-2 * want.norm(), name
