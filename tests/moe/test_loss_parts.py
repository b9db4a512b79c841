"""Parts of a loss that are no sum over tokens: the recipes of docs/start.md, against one process."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import tiny_model
from pages import DOCS, blocks
from sharded_parity import shard_of
from torch import Tensor, nn
from toys import fold, loss_of, plain_model, relative, tokens_of

import foldpar
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

MICRO_BATCHES, COEFFICIENT = 2, 0.5

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


def recipe(word: str) -> str:
    """The example of the page with this word in it."""
    (found,) = (block.text for block in blocks("python", DOCS["start"], "Parts of a loss") if word in block.text)
    return found


def batch(data_rank: int, number: int) -> Tensor:
    """Ragged: every micro-batch of every data rank has another length."""
    draw = torch.Generator().manual_seed(10 * data_rank + number)
    return torch.randint(3, 32, (2, 4 + 3 * data_rank + number), generator=draw)


def predicted(tokens: Tensor) -> int:
    """How many tokens the loss of a causal model is a sum over."""
    return tokens.shape[0] * (tokens.shape[1] - 1)


def worst(model: nn.Module, wanted: dict[str, Tensor], shares: Shares) -> float:
    """The largest relative difference of a gradient; shares are those before the model was sharded."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained.keys() == {name for name, gradient in wanted.items() if gradient is not None}
    return max(
        relative(parameter.grad, shard_of(shares.share_of(name, wanted[name]), parameter))
        for name, parameter in trained.items()
    )


def auxiliary_reference(family: str, data_ranks: int) -> dict[str, Tensor]:
    """The mean of all tokens' losses, and of all micro-batches' auxiliary losses."""
    model = tiny_model(family, dtype=torch.float64)
    batches = [batch(rank, number) for rank in range(data_ranks) for number in range(MICRO_BATCHES)]
    everything = sum(map(predicted, batches))
    model.router_aux_loss_coef = 0.0
    for tokens in batches:
        out = model(input_ids=tokens, labels=tokens, num_items_in_batch=everything, use_cache=False)
        (out.loss + COEFFICIENT * out.aux_loss / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def auxiliary(family: str, tp: int, stage: int, wanted: dict[str, Tensor]) -> float:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=tp, ep=4)) as groups:
        model = tiny_model(family, dtype=torch.float64)
        assert model.router_aux_loss_coef == COEFFICIENT
        foldpar.fold_model(model, groups)
        shares = Shares(model, groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        batches = [batch(groups.dp_cp.index, number) for number in range(MICRO_BATCHES)]
        here = torch.tensor(float(sum(map(predicted, batches))))
        everything = foldpar.all_reduce(here, groups.dp_cp, backward="identity")
        names = {"model": model, "groups": groups, "micro_batches": len(batches), "tokens_of_all_ranks": everything}
        for number, tokens in enumerate(batches):
            last = number + 1 == len(batches)
            with foldpar.accumulate(model) if not last else torch.enable_grad():
                given = {**names, "tokens": tokens, "labels": tokens}
                exec(recipe("router_aux_loss_coef"), given)
                given["loss"].backward()
        foldpar.reduce_gradients(model, groups, loss="sum")
        return worst(model, wanted, shares)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_hub_models_auxiliary_loss_counts_once(tp: int, stage: int) -> None:
    wanted = auxiliary_reference("qwen3_moe", 4 // tp)
    assert max(run_ranks(auxiliary, 4, "qwen3_moe", tp, stage, wanted)) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe", "ernie4_5_moe"])
def test_every_familys_auxiliary_loss_counts_once(family: str) -> None:
    wanted = auxiliary_reference(family, 2)
    assert max(run_ranks(auxiliary, 4, family, 2, 0, wanted)) < 1e-10


def penalty(etp: int, stage: int, how: str, wanted: dict[str, Tensor]) -> float:
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2, etp=etp)) as groups:
        model = fold(plain_model(), groups)
        shares = Shares(model, groups)
        if stage:
            foldpar.shard_model(model, groups, stage=stage)
        for number in range(2):  # the penalty goes to gradients that stay tensors too
            loss_of(model, tokens_of(groups.dp_cp.index)).backward()
            foldpar.reduce_gradients(model, groups)
            exec(recipe("square().sum()").replace("square", how), {"model": model})
            foldpar.clip_grad_norm_(model, 1e9, groups)
            if number == 0:
                model.zero_grad(set_to_none=False)
        return worst(model, wanted, shares)


@pytest.mark.parametrize(("etp", "stage", "how"), [(1, 0, "square"), (2, 0, "abs"), (1, 3, "square")])
def test_a_penalty_on_weights_is_added_to_whole_gradients(etp: int, stage: int, how: str) -> None:
    model = copy.deepcopy(plain_model())
    loss = torch.stack([loss_of(model, tokens_of(rank)) for rank in range(2)]).mean()
    norm = torch.square if how == "square" else torch.abs
    (loss + 0.01 * sum(norm(parameter).sum() for parameter in model.parameters())).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert max(run_ranks(penalty, 4, etp, stage, how, wanted)) < 1e-12
