"""``torch.compile`` takes a folded layer whole: one graph for every routing, and the numbers of eager."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foldpar
from foldpar.comm.dtensors import is_dtensor, local_tensor
from foldpar.errors import GradientError
from foldpar.moe import operators
from foldpar.moe.kernels.permutation import place_experts
from foldpar.moe.operators import Operator
from foldpar.moe.transport import at_home
from foldpar.moe.transport.messages import MOST_LISTED
from foldpar.testing import run_ranks

DIM, EXPERTS, TOP_K = 8, 4, 2
pytestmark = pytest.mark.filterwarnings("ignore")  # the tracer touches things that torch warns of
ONE = foldpar.create_groups(foldpar.solve_layout(1))


@pytest.fixture(autouse=True)
def afresh() -> None:
    torch._dynamo.reset()


def layer(
    groups: foldpar.FoldedGroups,
    *,
    bias: bool = False,
    shared: bool = False,
    experts: int = EXPERTS,
    made: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """``made``: how the experts are made."""
    torch.manual_seed(0)
    routed = foldpar.GroupedExperts(experts, DIM, 12, groups, bias=bias, seed=0, dtype=torch.float64, **(made or {}))
    dense = nn.Linear(DIM, DIM, dtype=torch.float64) if shared else None
    router = foldpar.TopKRouter(DIM, experts, TOP_K, correction_bias=True, dtype=torch.float64)
    return foldpar.FoldedMoE(router, routed, groups, shared=dense, **options)


def numbers(model: Callable[..., Tensor], parameters: list[Tensor], x: Tensor, **given: Tensor) -> list[Tensor]:
    """The output, the gradient of the input and those of all parameters, for a loss with a weight for each output."""
    x = x.clone().requires_grad_()
    y = model(x, **given)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *parameters])]


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    for one, other in zip(got, want, strict=True):
        assert not is_dtensor(one) or one.placements == other.placements
    return max(float((local_tensor(a) - local_tensor(b)).abs().max()) for a, b in zip(got, want, strict=True))


def batch(number: int, groups: foldpar.FoldedGroups, sharded: bool = False) -> Tensor:
    owner = groups.rank if sharded else groups.dp_cp.index
    return torch.randn(3, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * number + owner))


def compared(layout: dict[str, int], backend: str = "aot_eager", **options: Any) -> float:
    """One graph, compiled once, for three routings; the largest difference from eager."""
    warnings.simplefilter("ignore")
    with foldpar.create_groups(foldpar.solve_layout(**layout)) as groups:
        moe = layer(groups, **options)
        before = set(operators._KEPT)
        compiled, parameters = torch.compile(moe, backend=backend, fullgraph=True), list(moe.parameters())
        worst, counts = 0.0, []
        for number in range(3):
            x = batch(number, groups, options.get("lanes") == "sharded")
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                got = numbers(compiled, parameters, x)
            counts.append(moe.router.assignments_per_expert.tolist())
            worst = max(worst, difference(got, numbers(moe, parameters, x)))
            with torch.no_grad():
                moe.router.assignments_per_expert.zero_()
        assert len({tuple(each) for each in counts}) > 1  # the routings do differ
        assert not set(operators._KEPT) - before  # what was kept for backwards is gone
        return worst


def test_on_one_rank_it_is_one_graph_with_the_numbers_of_eager() -> None:
    """Several ranks: tests/laws/test_interplay.py, and below."""
    assert compared({"world": 1}, bias=True, shared=True) < 1e-12


TWO = [
    ({"tp": 2, "ep": 2}, {"shared": True}),
    ({"tp": 2, "ep": 2}, {"partition": "assignments"}),
    ({"tp": 2, "ep": 2}, {"lanes": "sharded"}),
    ({"tp": 2, "ep": 2}, {"lane_grads": "partial", "check": False}),  # both lanes send the same
    ({"tp": 2, "etp": 2}, {"bias": True}),
    ({"ep": 2}, {"bias": True}),
    ({"ep": 2, "order": "consecutive"}, {}),
]


def all_compared(cases: list[Any], backend: str) -> float:
    torch.compiler.reset()  # no more than so many graphs of one forward, and ranks live on between calls
    return max(compared({"world": 2, **degrees}, backend, **options) for degrees, options in cases)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_every_way_to_share_the_work(backend: str) -> None:
    assert max(run_ranks(all_compared, 2, TWO, backend, timeout=900.0)) < 1e-12


# -- Where one rank has all experts whole ------------------------------------------------------------------------------

MANY = MOST_LISTED + 4


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many assignments each run of the operator placed."""
    found: list[int] = []

    def noted(ids: Tensor, experts: int, assignments: int) -> Any:
        found.append(assignments)
        return place_experts(ids, experts, assignments)

    monkeypatch.setattr(at_home, "place_experts", noted)
    return found


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "made",
    [
        {},
        {"storage": foldpar.ExpertStorage(transposed=True, interleaved=True)},
        {"activation": "gelu"},
        {"activation": foldpar.ClampedSwiGLU()},
        {"activation": foldpar.OwnActivation(torch.tanh, "gate")},
    ],
    ids=str,
)
def test_at_home_nothing_is_kept_behind_an_operator(made: dict[str, Any], backend: str, taken: list[int]) -> None:
    assert compared({"world": 1}, backend, experts=MANY, made=made) < 1e-12
    assert taken == [15 * TOP_K] * 3


@pytest.mark.parametrize("frozen", ["experts.gate_up_proj", "experts.down_proj", "router.weight"])
def test_at_home_what_is_frozen_gets_no_gradient(frozen: str, taken: list[int]) -> None:
    moe = layer(ONE, experts=MANY)
    moe.get_parameter(frozen).requires_grad_(False)
    parameters = [each for each in moe.parameters() if each.requires_grad]
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    assert difference(numbers(compiled, parameters, batch(0, ONE)), numbers(moe, parameters, batch(0, ONE))) < 1e-12
    compiled(batch(0, ONE)).sum().backward()
    assert [name for name, each in moe.named_parameters() if each.grad is None] == [frozen]
    assert len(taken) == 2


def test_at_home_ids_out_of_range_are_refused(taken: list[int]) -> None:
    moe = layer(ONE, experts=MANY)
    compiled, ids = torch.compile(moe, backend="aot_eager", fullgraph=True), torch.zeros(3, 5, TOP_K, dtype=torch.int64)
    compiled(batch(0, ONE), ids=ids)
    ids[0, 0, 0] = MANY
    with pytest.raises(foldpar.ShapeError, match=rf"Expert ids outside \[0, {MANY}\) on the rank"):
        compiled(batch(0, ONE), ids=ids)
    assert len(taken) == 2


def test_at_home_no_tokens_are_no_rows(taken: list[int]) -> None:
    moe = layer(ONE, experts=MANY)
    compiled, parameters = torch.compile(moe, backend="aot_eager", fullgraph=True), list(moe.parameters())
    x = torch.randn(0, DIM, dtype=torch.float64)
    got = numbers(compiled, parameters, x)
    assert not any(each.any() for each in got)
    assert [each.shape for each in got[1:]] == [x.shape, *(each.shape for each in parameters)]
    assert taken == [0]


def test_at_home_the_operators_are_what_they_are_registered_as() -> None:
    """Their fakes, and that no output lies in another tensor."""
    moe = layer(ONE, experts=MANY)
    rows = batch(0, ONE).view(-1, DIM)
    routing, handle = moe.router(rows), moe._whole._at_home.handle
    given = [each.detach().requires_grad_() for each in (rows, routing.weights, *moe.experts.local_weights()[:2])]
    _, *kept = torch.ops.foldpar.at_home(given, routing.ids, handle, [True] * 4)
    torch.library.opcheck(torch.ops.foldpar.at_home.default, (given, routing.ids, handle, [True] * 4))
    back = (torch.randn_like(rows), [each.detach() for each in given], [each.detach() for each in kept], handle)
    for needed in ([True] * 4, [True, False, True, False]):
        torch.library.opcheck(torch.ops.foldpar.at_home_backward.default, (*back, needed))


# -- What goes with the tokens -----------------------------------------------------------------------------------------


def test_given_experts_and_padding_are_those_of_eager() -> None:
    moe = layer(ONE)
    compiled, parameters = torch.compile(moe, backend="aot_eager", fullgraph=True), list(moe.parameters())
    for number in range(2):
        ids = torch.randint(0, EXPERTS, (3, 5, TOP_K), generator=torch.Generator().manual_seed(number))
        padding = torch.rand(3, 5, generator=torch.Generator().manual_seed(number)) < 0.3
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = numbers(compiled, parameters, batch(number, ONE), ids=ids, padding=padding)
        want = numbers(moe, parameters, batch(number, ONE), ids=ids, padding=padding)
        assert difference(got, want) < 1e-12


@pytest.mark.parametrize("power", [1, 2])  # of the loss: with 1, what arrives depends on nothing
@pytest.mark.parametrize("of", ["x", "experts.down_proj", "router.weight", "everything"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_is_not_differentiated_without_the_experts(compiled: bool, of: str, power: int) -> None:
    moe, x = layer(ONE), batch(0, ONE).requires_grad_()
    run = torch.compile(moe, backend="eager", fullgraph=True) if compiled else moe
    (gradient,) = torch.autograd.grad((run(x) ** power).sum(), x, create_graph=True)
    inputs = None if of == "everything" else x if of == "x" else moe.get_parameter(of)
    with pytest.raises(GradientError, match=r"can be\s+differentiated once"):
        gradient.square().sum().backward(inputs=inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "vjp", "grad"])
def test_what_is_transformed_is_refused_compiled_as_in_eager(transform: str, backend: str) -> None:
    """An operator has no rule for tangents, and they would be lost: zero where there is a derivative."""
    moe, x = layer(ONE).eval(), batch(0, ONE)
    moe(x)
    transforms: dict[str, Callable[[Tensor], object]] = {
        "jvp": lambda x: torch.func.jvp(moe, (x,), (x,)),
        "jacfwd": lambda x: torch.func.jacfwd(moe)(x),
        "vjp": lambda x: torch.func.vjp(moe, x)[1](x),
        "grad": lambda x: torch.func.grad(lambda x: moe(x).sum())(x),
    }
    run = transforms[transform]
    with pytest.raises(RuntimeError, match=r"an operator would drop tangents"):
        torch.compile(run, backend=backend, fullgraph=True)(x)
    for refused in (run, torch.compile(run, backend=backend)):
        with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
            refused(x)


def test_a_rank_without_data_runs_a_stand_in_whole() -> None:
    moe = layer(ONE)
    compiled, parameters = torch.compile(moe, backend="aot_eager", fullgraph=True), list(moe.parameters())
    with foldpar.lockstep(moe, None, like=batch(0, ONE)) as (x, _):
        got = numbers(compiled, parameters, x)
    assert not moe.router.assignments_per_expert.any()
    assert not any(each.any() for each in got)


def test_another_number_of_tokens_is_one_more_graph_for_all_numbers() -> None:
    moe = layer(ONE)
    compiled, parameters = torch.compile(moe, backend="aot_eager", fullgraph=True), list(moe.parameters())
    for number, tokens in enumerate((5, 7, 3, 11)):
        x = torch.randn(tokens, DIM, dtype=torch.float64)
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            got = numbers(compiled, parameters, x)
        assert difference(got, numbers(moe, parameters, x)) < 1e-12


def test_under_autocast_products_are_those_of_eager() -> None:
    moe = layer(ONE).float()
    compiled, parameters = torch.compile(moe, backend="aot_eager", fullgraph=True), list(moe.parameters())
    x = batch(0, ONE).float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = numbers(compiled, parameters, x), numbers(moe, parameters, x)
    assert got[0].dtype == want[0].dtype
    assert difference(got, want) == 0
    assert difference(want, numbers(moe, parameters, x)) > 0  # which are not those of float32


@pytest.mark.long
def test_layers_that_are_alike_share_what_was_compiled() -> None:
    """As blocks do that are compiled one by one."""
    layers = [layer(ONE), layer(ONE), copy.deepcopy(layer(ONE))]
    for parameter in layers[1].parameters():
        torch.nn.init.normal_(parameter)
    for place, moe in enumerate(layers):
        parameters = list(moe.parameters())
        want = numbers(moe, parameters, batch(place, ONE))
        moe.compile(backend="aot_eager", fullgraph=True)
        with torch.compiler.set_stance("fail_on_recompile" if place else "default"):
            assert difference(numbers(moe, parameters, batch(place, ONE)), want) < 1e-12


@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_recomputed_forward_has_the_gradients_of_eager_and_counts_once(inside: bool) -> None:
    moe = layer(ONE)
    before, parameters = set(operators._KEPT), list(moe.parameters())

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(moe, x * 2, use_reentrant=False)

    if inside:
        run: Callable[[Tensor], Tensor] = torch.compile(recomputed, backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
        run = partial(lambda x: checkpoint(compiled, x * 2, use_reentrant=False))
    got = numbers(run, parameters, batch(0, ONE))
    assert moe.router.assignments_per_expert.sum() == 15 * TOP_K
    assert difference(got, numbers(lambda x: moe(x * 2), parameters, batch(0, ONE))) < 1e-12
    assert not set(operators._KEPT) - before


# -- The first step ----------------------------------------------------------------------------------------------------


def test_the_first_step_of_a_compiled_layer_is_checked() -> None:
    moe = layer(ONE)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    x = batch(0, ONE)
    with pytest.raises(foldpar.ShapeError, match=r"Routing weights are not finite: 30 of 30 on this rank \(0\)"):
        compiled(x * torch.inf)
    compiled(x)
    compiled(x * torch.inf)  # no longer


def said(kind: str) -> str:
    warnings.simplefilter("ignore")
    with foldpar.create_groups(foldpar.solve_layout(2, tp=2, ep=2)) as groups:
        moe = layer(groups, lane_grads="partial" if kind == "partial" else "replicated")
        compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
        x = (batch(0, groups) + (groups.rank if kind == "tokens" else 0)).requires_grad_()
        try:
            (compiled(x).sum() * (1 + groups.rank if kind == "replicated" else 1)).backward()
        except foldpar.ReplicaError as error:
            return str(error)
        return "nothing"


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("tokens", "What enters a FoldedMoE differs between the lanes (0, 1)"),
        ("replicated", "The gradient that arrived at this layer differs between the lanes (0, 1)"),
        ("partial", "The gradient that arrived at this layer is equal on the lanes (0, 1)"),
        ("right", "nothing"),
    ],
)
def test_the_lanes_of_a_compiled_layer_are_compared(kind: str, text: str) -> None:
    for told in run_ranks(said, 2, kind, timeout=240.0):
        assert told.startswith(text)


# -- What stays as it is, and says why ---------------------------------------------------------------------------------


class OwnExperts(nn.Module):
    num_experts, dim = EXPERTS, DIM

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        return rows * 2


class Scaled(foldpar.GroupedExperts):
    def forward(self, rows: Tensor, *given: Any) -> Tensor:
        return super().forward(rows * 2, *given)


def changed(kind: str) -> foldpar.FoldedMoE:
    options: dict[str, dict[str, Any]] = {
        "counters": {"counters": foldpar.LayerCounters()},
        "capacity": {"capacity": foldpar.Capacity(1.0)},
    }
    moe = layer(ONE, **options.get(kind, {}))
    if kind == "foreign":
        moe = foldpar.FoldedMoE(moe.router, OwnExperts(), ONE)
    if kind == "overridden":
        moe.experts.__class__ = Scaled
    if kind == "hooked":
        moe.experts.register_forward_hook(lambda module, given, out: out * 2)
    if kind == "random":
        moe.router.jitter = 0.1
    return moe


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("foreign", "its experts are none of foldpar's"),
        ("overridden", "its experts override how they are computed"),
        ("hooked", "hooks hang on the call of its experts"),
        ("counters", "its counters count on the host: leave counters away"),
        ("capacity", "its capacity is limited by what the lanes tell each other: leave capacity away"),
        ("random", "its router draws random numbers in a region of its own: leave jitter away"),
    ],
)
def test_what_an_operator_would_hide_breaks_the_graph_and_says_why(kind: str, why: str) -> None:
    moe, x = changed(kind), batch(0, ONE)
    with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
        torch.compile(moe, backend="aot_eager", fullgraph=True)(x)
    assert f"The routed part of a folded layer is not compiled: {why}" in str(raised.value)
    torch._dynamo.reset()
    torch.manual_seed(0)
    y = torch.compile(moe, backend="aot_eager")(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, moe(x), rtol=0, atol=1e-12)


def traced_hooks(stage: int) -> list[str]:
    """Of a sharded model, in a compiled step: which hooks were looked into."""
    warnings.simplefilter("ignore")
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        model = nn.Sequential(layer(groups))
        foldpar.shard_model(model, groups, stage=stage)
        torch.compile(model, backend="eager")(batch(0, groups)).sum().backward()
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    functions = [getattr(hook, "_torchdynamo_orig_callable", hook) for hook in hooks]
    ours = [each for each in functions if str(getattr(each, "__module__", "")).startswith("foldpar")]
    assert len(ours) == 3
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    return [each.__name__ for each in ours if entries(each.__code__)]


def test_hooks_on_a_sharded_model_are_not_looked_into() -> None:
    """They look at tables of FSDP2's that change while a compiler goes through them, on one rank and not on others."""
    assert run_ranks(traced_hooks, 2, 3) == [[], []]


# -- Operators ---------------------------------------------------------------------------------------------------------


def positive_rows(tensors: Any, rows: int) -> Tensor:
    """Its sizes follow the data."""
    x, weight, bias = tensors
    there = (x.sum(-1) > 0).nonzero().flatten()
    return torch.zeros_like(x).index_put((there,), x[there] @ weight if bias is None else x[there] @ weight + bias)


def drawn() -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 3), (3, 3), (3,))]


@pytest.mark.parametrize("bias", [False, True])
def test_an_operator_has_the_backward_of_its_function(bias: bool) -> None:
    operator, given = Operator(positive_rows), drawn()
    given = given if bias else [*given[:2], None]
    wanted = [each for each in given if each is not None]
    want = torch.autograd.grad(positive_rows(given, 6).square().sum(), wanted)
    got = torch.autograd.grad(operator(given, rows=6).square().sum(), wanted)
    assert difference(list(got), list(want)) == 0
    wanted[0].requires_grad_(False)
    got = torch.autograd.grad(operator(given, rows=6).square().sum(), wanted[1:])
    assert difference(list(got), list(want[1:])) == 0


def test_what_is_kept_for_a_backward_lives_as_long_as_its_graph() -> None:
    operator, (x, weight, _) = Operator(positive_rows), drawn()
    before = set(operators._KEPT)
    y = operator((x, weight, None), rows=6)
    assert len(set(operators._KEPT) - before) == 1
    once = torch.autograd.grad(y.sum(), [x, weight], retain_graph=True)
    twice = torch.autograd.grad(y.sum(), [x, weight])
    assert all(map(torch.equal, once, twice))
    assert not set(operators._KEPT) - before
    y = operator((x, weight, None), rows=6)
    del y  # no backward will come
    with torch.no_grad():
        operator((x, weight, None), rows=6)
    assert not set(operators._KEPT) - before


def test_a_token_that_was_copied_is_told() -> None:
    operator, (x, weight, _) = Operator(positive_rows), drawn()
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda tensor: tensor):
        y = operator((x, weight, None), rows=6)
    with pytest.raises(GradientError, match="kept for this backward is gone: a tensor that stands for it was copied"):
        y.sum().backward()


def test_an_operator_of_a_layer_that_is_gone_is_gone() -> None:
    before = set(operators._KEPT)
    moe = layer(ONE)
    own = set(operators._KEPT) - before
    assert len(own) == 3
    del moe
    gc.collect()
    assert not own & set(operators._KEPT)


@pytest.mark.parametrize("experts", [EXPERTS, MANY])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_backward_comes_through_a_layer_that_is_gone(experts: int, recomputed: bool) -> None:
    def gradient() -> Tensor:
        moe, x = layer(ONE, experts=experts), batch(0, ONE).requires_grad_()
        run = (lambda x: checkpoint(moe, x, use_reentrant=False)) if recomputed else moe
        y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
        if gone:
            del moe, run
            torch._dynamo.reset()
            gc.collect()
        return torch.autograd.grad(y.square().sum(), x)[0]

    gone = False
    want = gradient()
    gone = True
    assert torch.equal(gradient(), want)
