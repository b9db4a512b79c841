"""A step that was not reduced, reduced twice, or taken by an optimizer of other parameters is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import tiny_model
from toys import fold, gathered, loss_of, plain_model, tokens_of

import foldpar
from foldpar import families
from foldpar.comm.dtensors import local_tensor
from foldpar.errors import FamilyError, GradientError, ShardingError
from foldpar.testing import run_ranks

STAGES = [0, 2, 3]
PLAIN = plain_model()

# A biased linear layer over [batch, length, dim] returns a view, of which torch 2.13 warns where it ends the model.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


def text_of(call: Callable[[], object]) -> str:
    with pytest.raises(GradientError) as refused:
        call()
    return str(refused.value)


def steps(stage: int, tp: int) -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=4 // tp)) as groups:
        model = fold(plain_model(), groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
        for set_to_none in (False, True):  # what stays a tensor is seen to be used
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            before = [local_tensor(each).detach().clone() for each in model.parameters()]
            text = text_of(lambda: foldpar.clip_grad_norm_(model, 1.0, groups))
            assert "clip_grad_norm_: the gradient of embedding.weight is not reduced" in text
            assert "reduce_gradients(model, groups) after the last backward" in text
            assert "SGD.step(): the gradient of " in text_of(optimizer.step)
            after = [local_tensor(each) for each in model.parameters()]
            assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
            foldpar.reduce_gradients(model, groups)
            for again in (False, True):
                text = text_of(lambda: foldpar.reduce_gradients(model, groups))
                assert "was reduced already, and no backward has run since" in text
                if not again:
                    foldpar.clip_grad_norm_(model, 1.0, groups)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, tokens_of(groups.dp_cp.index)).backward()
        foldpar.declare_reduced(model)  # a reduction of its own
        foldpar.clip_grad_norm_(model, 1.0, groups)
        optimizer.step()


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_was_not_reduced_once_is_refused(stage: int) -> None:
    run_ranks(steps, 4, stage, 2)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_was_not_reduced_once_is_refused_without_lanes(stage: int) -> None:
    run_ranks(steps, 4, stage, 1)


def backward_again(stage: int, tp: int) -> None:
    """Nobody zeroes in between: before the optimizer's step, and behind it."""
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=2)) as groups:
        model = fold(plain_model(), groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)

        def step() -> None:
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            foldpar.reduce_gradients(model, groups)

        for stepping in (False, True):
            step()
            if stepping:
                optimizer.step()
            text = text_of(step)
            assert "was reduced already, and something was added to it since" in text
            assert "Call zero_grad before the first backward of a step" in text
            optimizer.zero_grad(set_to_none=False)
            step()
            wanted = [gathered(each.grad).clone() for each in model.parameters()]
            optimizer.zero_grad(set_to_none=False)
            foldpar.reduce_gradients(model, groups)  # a rank without data, or a part without tokens
            assert not any(local_tensor(each.grad).any() for each in model.parameters())
            optimizer.zero_grad(set_to_none=False)
            step()
            found = [gathered(each.grad) for each in model.parameters()]
            assert all(map(torch.equal, found, wanted))
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("stage", "tp"), [(0, 2), (1, 1), (3, 2), *(pytest.param(stage, 1, marks=pytest.mark.long) for stage in (0, 2, 3))]
)
def test_a_backward_onto_a_reduced_gradient_is_refused(stage: int, tp: int) -> None:
    run_ranks(backward_again, 4, stage, tp)


B, R, P, C, S, Z = "backward", "reduce", "penalty", "clip", "step", "zero"
WRONG = {
    (B, R, B, B, R): "was reduced already, and something was added to it since",
    (B, R, S, B, B, R): "was reduced already, and something was added to it since",
    (B, R, C, B, B, B, R): "was reduced already, and something was added to it since",
    (B, R, Z, B, S): "is not reduced",
    (B, R, C, Z, B, C): "clip_grad_norm_: the gradient of embedding.weight is not reduced",
}
RIGHT = [
    (B, R, S, B, Z, B, R, S),
    (B, R, C, S, B, B, Z, B, B, R, C, S),
    (B, R, S, B, B, Z, R, S),
    (B, R, Z, B, B, R),
    (B, R, P, C, S, Z, B, B, R, P, S, Z, B, R, S),
]
"""With zeroing in place: what a backward adds then is told from what it adds to a reduced gradient."""


def penalty(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        (0.01 * parameter.square().sum()).backward()


def orders(stage: int, tp: int) -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=2)) as groups:
        model = fold(PLAIN, groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
        do: dict[str, Callable[[], object]] = {
            B: lambda: loss_of(model, tokens_of(groups.dp_cp.index)).backward(),
            R: lambda: foldpar.reduce_gradients(model, groups),
            P: lambda: penalty(model),
            C: lambda: foldpar.clip_grad_norm_(model, 1.0, groups),
            S: optimizer.step,
            Z: lambda: optimizer.zero_grad(set_to_none=False),
        }
        for order, says in WRONG.items():
            optimizer.zero_grad()
            for act in order[:-1]:
                do[act]()
            assert says in text_of(do[order[-1]]), order
        for order in RIGHT:
            optimizer.zero_grad()
            for act in order:
                do[act]()


@pytest.mark.parametrize(
    ("stage", "tp"), [(0, 2), (3, 1), *(pytest.param(stage, 1, marks=pytest.mark.long) for stage in (0, 1, 2))]
)
def test_backwards_onto_a_reduced_gradient_are_refused_however_many(stage: int, tp: int) -> None:
    run_ranks(orders, 4, stage, tp, backend="threads")


def closures(stage: int) -> None:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        model = fold(PLAIN, groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
        before = [local_tensor(parameter).clone() for parameter in model.parameters()]

        def partial() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, tokens_of(groups.dp_cp.index))
            loss.backward()
            return loss

        def whole() -> torch.Tensor:
            loss = partial()
            foldpar.reduce_gradients(model, groups)
            return loss

        for refused in (lambda: optimizer.step(partial), lambda: optimizer.step(closure=partial)):
            optimizer.zero_grad()
            assert "is not reduced: it is this rank's part of a sum" in text_of(refused)
        assert all(torch.equal(a, local_tensor(b)) for a, b in zip(before, model.parameters(), strict=True))
        optimizer.zero_grad()
        for _ in range(2):
            assert isinstance(optimizer.step(whole), torch.Tensor)
            assert isinstance(optimizer.step(closure=whole), torch.Tensor)


@pytest.mark.parametrize("stage", [0, 3])
def test_gradients_of_a_closure_are_looked_at_before_they_are_taken(stage: int) -> None:
    run_ranks(closures, 2, stage, backend="threads")


def test_zeroing_that_torch_does_not_count_is_refused_with_the_way_to_do_it() -> None:
    def rank() -> None:
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            model = fold(PLAIN, groups)
            foldpar.shard_model(model, groups, stage=3)
            optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), fused=True)
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            foldpar.reduce_gradients(model, groups)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            text = text_of(lambda: foldpar.reduce_gradients(model, groups))
            assert "with foreach=True or fused=True does: use zero_grad()." in text

    run_ranks(rank, 2, backend="threads")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_gradient_with_a_graph_is_refused_as_a_new_sum_hides_what_was_reduced() -> None:
    def rank() -> None:
        with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
            model = fold(PLAIN, groups)
            loss_of(model, tokens_of(groups.dp_cp.index)).backward(create_graph=True)
            text = text_of(lambda: foldpar.reduce_gradients(model, groups))
            assert "embedding.weight carries a graph" in text
            assert "torch.autograd.grad(..., create_graph=True)" in text
            model.zero_grad()

    run_ranks(rank, 2, backend="threads")


def frozen_after_steps(stage: int) -> None:
    """``zero_grad`` leaves zeros in place of gradients, also of a parameter that is frozen then."""
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        model = fold(plain_model(), groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(model), lr=0.1)
        frozen = next(model.parameters())

        def step() -> None:
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            foldpar.reduce_gradients(model, groups)
            foldpar.clip_grad_norm_(model, 1.0, groups)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        step()
        frozen.requires_grad_(False)
        before = local_tensor(frozen).clone()
        step()
        step()
        assert torch.equal(local_tensor(frozen), before)
        frozen.requires_grad_(True)
        loss_of(model, tokens_of(groups.dp_cp.index)).backward()
        frozen.requires_grad_(False)
        foldpar.reduce_gradients(model, groups)
        for refused in (optimizer.step, lambda: foldpar.clip_grad_norm_(model, 1.0, groups)):
            assert "is not reduced" in text_of(refused)


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_frozen_between_steps_is_refused_only_with_a_gradient(stage: int) -> None:
    run_ranks(frozen_after_steps, 2, stage)


def frozen_experts(stage: int) -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2)) as groups:
        model = tiny_model("qwen3_moe", dtype=torch.float64)
        foldpar.fold_model(model, groups)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("self_attn" in name)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        attention = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(attention, lr=0.1)
        for _ in range(2):
            tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(groups.dp_cp.index))
            model(input_ids=tokens, labels=tokens).loss.backward()
            assert "SGD.step(): the gradient of model.layers.0.self_attn." in text_of(optimizer.step)
            foldpar.reduce_gradients(model, groups)
            optimizer.step()
            optimizer.step()  # the same gradients once more: odd, and not wrong
            optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_optimizer_without_experts_looks_at_what_it_has(stage: int) -> None:
    run_ranks(frozen_experts, 4, stage)


def too_early(when: str) -> str:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        model = tiny_model("qwen3_moe", dtype=torch.float64)
        if when == "shard_model":
            foldpar.fold_model(model, groups)
        optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=0.01)
        if when == "fold_model":
            foldpar.fold_model(model, groups)
        foldpar.shard_model(model, groups, stage=3)
        tokens = torch.randint(32, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        foldpar.reduce_gradients(model, groups)
        text = text_of(optimizer.step)
    optimizer.step()  # nothing is watched any more
    return text


@pytest.mark.parametrize("when", ["fold_model", "shard_model"])
def test_an_optimizer_that_was_made_too_early_says_so_in_its_first_step(when: str) -> None:
    for text in run_ranks(too_early, 2, when):
        assert text.startswith("This AdamW holds a parameter of shape [")
        assert "fold_model, shard_model or loading into a model on the meta device has replaced" in text
        assert "Make the optimizer after them, from foldpar.parameter_groups(model)" in text


def test_an_optimizer_that_was_made_before_loading_says_so_too(tmp_path: Path) -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        whole = tiny_model("qwen3_moe")
        foldpar.fold_model(whole, groups)
        foldpar.save_weights(tmp_path, whole, groups)
        with torch.device("meta"):
            empty = tiny_model("qwen3_moe")
        foldpar.fold_model(empty, groups)
        optimizer = torch.optim.SGD(foldpar.parameter_groups(empty), lr=0.1)
        foldpar.load_weights(tmp_path, empty, groups)
        assert "loading into a model on the meta device has replaced" in text_of(optimizer.step)


# -- What enters a folded model later ---------------------------------------------------------------------------------


def late(tp: int) -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=4)) as groups:
        original = tiny_model("qwen3_moe", dtype=torch.float64)
        foldpar.fold_model(original, groups)
        experts = "model.layers.0.mlp.experts"
        for place, owner in {
            "model": "a head", "model.layers.0.self_attn.q_proj": "beside", experts: "inside the experts"
        }.items():  # fmt: skip
            model = copy.deepcopy(original)
            module = model.get_submodule(place)
            module.add_module("late", torch.nn.Linear(3, 2, bias=False, dtype=torch.float64))
            name = f"{place}.late.weight"
            if tp == 1 and place != experts:  # no lanes: every rank has the same
                assert foldpar.parameter_families(model, groups)[name] is families.REPLICATED, owner
                continue
            with pytest.raises(FamilyError) as refused:
                foldpar.reduce_gradients(model, groups)
            assert name in str(refused.value), owner
            assert "mark_parameters(module, families." in str(refused.value)
            foldpar.mark_parameters(module.late, families.REPLICATED_PARTIAL)
            assert foldpar.parameter_families(model, groups)[name] is families.REPLICATED_PARTIAL
        model = copy.deepcopy(original)
        model.soft_prompt = torch.nn.Parameter(torch.zeros(4, 16, dtype=torch.float64))
        if tp > 1:
            with pytest.raises(FamilyError, match="1 parameter has no family: soft_prompt"):
                foldpar.parameter_families(model, groups)
        for wrong in (families.REPLICATED, families.REPLICATED_PARTIAL):
            model = copy.deepcopy(original)
            foldpar.mark_parameters(model.get_submodule(experts), wrong)
            with pytest.raises(FamilyError, match=r"lies on the mesh of the experts, but its family 'replicated"):
                foldpar.reduce_gradients(model, groups)


@pytest.mark.long
@pytest.mark.parametrize("tp", [1, 2])
def test_what_enters_later_inside_or_beside_distributed_layers_needs_a_word(tp: int) -> None:
    run_ranks(late, 4, tp)


def test_a_normalisation_that_is_shared_by_all_experts_is_a_sum_over_all_ranks() -> None:
    """What the error about parameters inside experts advises: each rank's experts see other rows."""

    class Scaled(foldpar.GroupedExperts):
        def forward(self, rows: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
            return super().forward(rows * self.gain, *args, **options)

    plain = plain_model(blocks=1)
    gain = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)

    def reference() -> torch.Tensor:
        own = gain.clone().requires_grad_()
        model = copy.deepcopy(plain)
        moe = model.blocks[0].moe
        # An expert whose input is scaled is one whose first weight is.
        weight = moe.experts.gate_up_proj
        del moe.experts.gate_up_proj
        moe.experts.gate_up_proj = weight.detach() * own
        torch.stack([loss_of(model, tokens_of(rank)) for rank in range(2)]).mean().backward()
        return own.grad

    want = reference()

    def rank() -> float:
        with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2)) as groups:
            model = fold(plain, groups)
            moe = model.blocks[0].moe
            moe.experts.__class__ = Scaled
            moe.experts.gain = torch.nn.Parameter(gain.clone())
            foldpar.mark_parameters(moe.experts, families.REPLICATED_PARTIAL, names=("gain",))
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            foldpar.reduce_gradients(model, groups)
            return float((moe.experts.gain.grad - want).norm() / want.norm())

    assert max(run_ranks(rank, 4, backend="threads")) < 1e-12


# -- Every way in which a parameter can enter late ---------------------------------------------------------------------


Enter = Callable[[torch.nn.Module], None]


class Factors(torch.nn.Module):
    """Low-rank factors added to a weight, as adapters do it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.full((2, columns), 0.1, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.full((rows, 2), 0.1, dtype=torch.float64))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


class Beside(torch.nn.Module):
    """A projection with low-rank factors beside it."""

    def __init__(self, base: torch.nn.Linear, rows: int) -> None:
        super().__init__()
        self.base, self.factors = base, Factors(rows, base.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + (x @ self.factors.a.T @ self.factors.b.T)[..., : y.shape[-1]]


def beside_a_projection(model: torch.nn.Module) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = Beside(attention.q_proj, attention.q_proj.out_features)


def beside_the_experts(model: torch.nn.Module) -> None:
    """One expert's factors, named by what the rank's own tensor looks like."""
    experts = model.model.layers[0].mlp.experts
    experts.factors = Factors(local_tensor(experts.down_proj).shape[0] * 2, 3)
    experts.register_forward_hook(lambda module, args, out: out * (1 + module.factors.b.sum() * module.factors.a.sum()))


def parametrized_experts(model: torch.nn.Module) -> None:
    rows, columns = local_tensor(model.model.layers[0].mlp.experts.down_proj).shape[-2:]
    torch.nn.utils.parametrize.register_parametrization(
        model.model.layers[0].mlp.experts, "down_proj", Factors(rows, columns), unsafe=True
    )


def parametrized_norm(model: torch.nn.Module) -> None:
    torch.nn.utils.parametrize.register_parametrization(model.model.norm, "weight", Gain(16))


class Gain(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


def a_norm(model: torch.nn.Module) -> None:
    model.model.norm = torch.nn.Sequential(model.model.norm, Gain(16))


def a_norm_of_queries(model: torch.nn.Module) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_norm = torch.nn.Sequential(attention.q_norm, Gain(8))


def a_head(model: torch.nn.Module) -> None:
    model.lm_head = torch.nn.Sequential(Gain(16), model.lm_head)


def soft_prompts(model: torch.nn.Module) -> None:
    model.prompt = torch.nn.Parameter(torch.full((16,), 0.1, dtype=torch.float64))
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + model.prompt)


def unfreezing(model: torch.nn.Module) -> None:
    model.model.layers[0].self_attn.q_norm.requires_grad_(True)


LATE = (
    beside_a_projection,
    beside_the_experts,
    parametrized_experts,
    parametrized_norm,
    a_norm,
    a_norm_of_queries,
    a_head,
    soft_prompts,
    unfreezing,
)


def late_model(enter: Enter, after: Callable[[torch.nn.Module], object]) -> torch.nn.Module:
    model = tiny_model("qwen3_moe", dtype=torch.float64)
    model.model.layers[0].self_attn.q_norm.requires_grad_(False)
    after(model)
    enter(model)
    return model


def batch_of(data_rank: int) -> torch.Tensor:
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(data_rank))


def wanted_of(enter: Enter, data_ranks: int) -> dict[str, torch.Tensor]:
    model = late_model(enter, lambda model: None)
    for data_rank in range(data_ranks):
        tokens = batch_of(data_rank)
        (model(input_ids=tokens, labels=tokens).loss / data_ranks).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def entering(tp: int, ep: int, stage: int, wanted: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """By way of entering: what came of it."""
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=ep)) as groups:
        return {enter.__name__: entered(enter, groups, stage, wanted[enter.__name__]) for enter in LATE}


def entered(enter: Enter, groups: foldpar.FoldedGroups, stage: int, want: dict[str, torch.Tensor]) -> str:
    try:
        model = late_model(enter, lambda model: foldpar.fold_model(model, groups))
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        tokens = batch_of(groups.dp.index)
        model(input_ids=tokens, labels=tokens).loss.backward()
        foldpar.reduce_gradients(model, groups)
    except (FamilyError, ShardingError, RuntimeError) as error:
        says = ("families.", "Experts are sharded over edp", "mixed torch.Tensor and DTensor")
        return "refused" if any(each in str(error) for each in says) else f"not a good answer: {error}"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            got = gathered(parameter.grad)
            error = float((got - want[name]).norm() / want[name].norm()) if got.shape == want[name].shape else 1.0
            if error > 1e-6:  # the loss of transformers is float32
                return f"wrong: {name}: {error}"
    return "exact"


def entering_is_exact_or_refused(tp: int, ep: int, stage: int) -> None:
    wanted = {enter.__name__: wanted_of(enter, 4 // tp) for enter in LATE}
    for found in run_ranks(entering, 4, tp, ep, stage, wanted):
        # What lies inside the experts, or beside their shares, is nobody's guess.
        assert found.pop("beside_the_experts") != "exact"
        assert found.pop("parametrized_experts") != "exact"
        assert found.pop("unfreezing") == "exact"
        assert set(found.values()) <= ({"exact"} if tp == 1 else {"exact", "refused"}), found


@pytest.mark.parametrize(("tp", "ep", "stage"), [(1, 4, 0), (2, 2, 3)])
def test_what_enters_late_is_exact_or_refused(tp: int, ep: int, stage: int) -> None:
    entering_is_exact_or_refused(tp, ep, stage)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("tp", "ep"), [(tp, ep) for tp in (1, 2) for ep in (1, 2, 4)])
def test_what_enters_late_is_exact_or_refused_everywhere(tp: int, ep: int, stage: int) -> None:
    entering_is_exact_or_refused(tp, ep, stage)
