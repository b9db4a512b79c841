"""Layers that are told nothing about one-sided rows: one-sided where ranks can, in messages where not, and said.

Each case makes groups of its own, since whether ranks can read each other's memory is asked once for some groups.
Results are compared with those of a layer that is told to send messages, beside it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from draws import seeded
from run import Runner
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.comm.peers import PeerMemory, check_room

DIM, EXPERTS = 64, 8
SYMMETRIC = "torch.distributed._symmetric_memory"


class OwnExperts(nn.Module):
    """Experts of another kind."""

    num_experts, dim = EXPERTS, DIM

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((DIM,), 1.5))

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        return rows * self.gain


def layer(groups: foldpar.FoldedGroups, *, foreign: bool = False, **options: Any) -> foldpar.FoldedMoE:
    with seeded(0):
        router = foldpar.TopKRouter(DIM, EXPERTS, 2)
    experts: Any = OwnExperts() if foreign else foldpar.GroupedExperts(EXPERTS, DIM, 32, groups, seed=0)
    return foldpar.FoldedMoE(router, experts, groups, **options).cuda()


def tokens_of(groups: foldpar.FoldedGroups, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The lanes of a TP group hold the same."""
    draw = torch.Generator().manual_seed(count + 1000 * groups.dp_cp.index)
    return torch.randn(count, DIM, generator=draw).to("cuda", dtype).requires_grad_()


def results(call: Callable[[Tensor], Tensor], moe: nn.Module, x: Tensor) -> list[Tensor]:
    y = call(x)
    return [y.detach(), *map(local_tensor, torch.autograd.grad(y.square().sum(), [x, *moe.parameters()]))]


def equal(found: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def told(moe: foldpar.FoldedMoE) -> str:
    return " ".join(moe.explain().split())


@contextmanager
def some_groups(tp: int = 1) -> Iterator[foldpar.FoldedGroups]:
    world = dist.get_world_size()
    with foldpar.create_groups(foldpar.solve_layout(world, tp=tp, ep=world)) as groups:
        yield groups
        torch.cuda.synchronize()
        dist.barrier()


# -- One-sided ---------------------------------------------------------------------------------------------------------


def values_and_gradients(tp: int, shape: str) -> None:
    """Of a layer as it is, recomputed (by a policy that keeps everything too), compiled, and of its copy."""
    with some_groups(tp) as groups:
        moe, other, x = layer(groups), layer(groups, one_sided=False), tokens_of(groups, 20 + groups.dp_cp.index)
        assert "one-sided where ranks can read each other's memory: up to" in told(moe), told(moe)
        assert "in messages: one_sided = False" in told(other), told(other)
        call: Callable[[Tensor], Tensor] = moe
        if shape == "recomputed":
            call = partial(checkpoint, moe, use_reentrant=False)
        if shape == "kept by a policy":
            kept = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_SAVE)
            call = partial(checkpoint, moe, use_reentrant=False, context_fn=kept)
        if shape == "compiled":
            call = torch.compile(moe, backend="aot_eager", fullgraph=True)
        if shape == "copied":
            moe = call = copy.deepcopy(moe)
        for _ in range(2):
            equal(results(call, moe, x), results(other, other, x))
        assert "one-sided: up to" in told(moe) and "MiB of a rank are shared" in told(moe), told(moe)
        check_room(groups)


def first_without_gradients() -> None:
    """Memory that is made in inference mode is used in training, and its flags are read."""
    with some_groups() as groups:
        moe, other = layer(groups), layer(groups, one_sided=False)
        x = tokens_of(groups, 9)
        with torch.inference_mode():
            y = moe(x)
        with torch.no_grad():
            equal([moe(x)], [y])
        equal(results(moe, moe, x), results(other, other, x))
        check_room(groups)


def gradients_on_one_rank() -> None:
    """A forward is the same meeting with and without them."""
    with some_groups() as groups:
        moe, other, x = layer(groups, check=False), layer(groups, one_sided=False, check=False), tokens_of(groups, 9)
        with torch.set_grad_enabled(groups.rank == 0):
            y = moe(x)
        with torch.no_grad():
            equal([y.detach()], [other(x)])


def other_numbers_of_tokens() -> None:
    """As in ``generate``: prompts of some length, then a token or none at a time; and memory grows within its bound."""
    with some_groups() as groups, torch.no_grad():
        moe, other = layer(groups), layer(groups, one_sided=False)
        for step, count in enumerate((40 + 7 * groups.rank, 1, groups.rank, 0, 3, 9000 * groups.rank, 2, 20000)):
            x = tokens_of(groups, count)
            equal([moe(x)], [other(x)])
            assert step < 7 or "one-sided" in told(moe)


def layers_of_several_widths() -> None:
    with some_groups() as groups:
        for _ in range(2):
            for dim in (DIM, 512, 8, DIM):
                found = []
                for options in ({}, {"one_sided": False}):
                    with seeded(0):
                        router = foldpar.TopKRouter(dim, EXPERTS, 2)
                    experts = foldpar.GroupedExperts(EXPERTS, dim, 32, groups, seed=0)
                    moe = foldpar.FoldedMoE(router, experts, groups, **options).cuda()
                    x = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim)).cuda().requires_grad_()
                    found.append(results(moe, moe, x))
                equal(*found)


def streams_take_turns() -> None:
    """Two forwards on two streams that know nothing of each other, through one memory."""
    with some_groups() as groups:
        moe = layer(groups, check=False)
        batches = [tokens_of(groups, count) for count in (4096, 4095)]
        want = [moe(x).detach() for x in batches]
        streams = [torch.cuda.Stream() for _ in batches]
        for _ in range(10):
            torch.cuda.synchronize()
            found = []
            for stream, x in zip(streams, batches, strict=True):
                with torch.cuda.stream(stream):
                    found.append(moe(x).detach())
            torch.cuda.synchronize()
            assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))


def groups_made_again() -> None:
    for count in (5, 300):
        values_and_gradients(1, "plain")
        with some_groups() as groups:
            moe, other, x = layer(groups), layer(groups, one_sided=False), tokens_of(groups, count)
            equal(results(moe, moe, x), results(other, other, x))


def a_folded_hub_model(tp: int) -> None:
    """Loss, gradients and ``generate``, told nothing and told to send messages."""
    from hf_models import tiny_model

    world = dist.get_world_size()
    with foldpar.create_groups(foldpar.solve_layout(world, tp=tp, ep=world)) as groups:
        found: list[list[Tensor]] = []
        for options in ({}, {"one_sided": False}):
            model = tiny_model("qwen3_moe", dtype=torch.float32, num_experts=2 * world, output_router_logits=False)
            foldpar.fold_model(model, groups, **options)
            model.cuda().train()
            ids = torch.randint(8, (2, 6 + groups.dp.index), generator=torch.Generator().manual_seed(groups.dp.index))
            loss = model(input_ids=ids.cuda(), labels=ids.cuda()).loss
            loss.backward()
            foldpar.reduce_gradients(model, groups)
            gradients = [local_tensor(each.grad) for each in model.parameters() if each.grad is not None]
            experts = next(each for each in model.modules() if isinstance(each, foldpar.FoldedExperts))
            assert ("one-sided: up to" in experts.explain()) == (not options), experts.explain()
            model.eval()
            new = model.generate(
                ids.cuda(), max_new_tokens=4 + groups.dp.index, do_sample=False, synced_gpus=True, pad_token_id=0
            )
            found.append([loss.detach(), *gradients, new])
        equal(*found)
        torch.cuda.synchronize()
        dist.barrier()


# -- In messages -------------------------------------------------------------------------------------------------------


def falls_back(says: str, change: Any, **options: Any) -> None:
    """With one thing in the way, on the last rank alone or on all, every rank sends messages and says why."""
    with some_groups() as groups, change(groups.rank == groups.layout.world - 1):
        moe = layer(groups, **options)
        other = layer(groups, one_sided=False, foreign=options.get("foreign", False))
        x = tokens_of(groups, 12)
        for _ in range(2):
            equal(results(moe, moe, x), results(other, other, x))
        assert f"in messages: {says}" in told(moe), told(moe)


def counted_on_one_rank() -> None:
    """A rank that counts sends messages, so all do; nobody waits for somebody who does not come."""
    with some_groups() as groups:
        counters = foldpar.LayerCounters() if groups.rank == 0 else None
        moe, other, x = layer(groups, counters=counters), layer(groups, one_sided=False), tokens_of(groups, 12)
        for _ in range(2):
            equal(results(moe, moe, x), results(other, other, x))
        assert counters is None or counters.read().forwards == 2
        assert groups.rank != 0 or "in messages: counters read the sizes on the host" in told(moe)


def in_float64() -> None:
    with some_groups() as groups:
        found = []
        for options in ({}, {"one_sided": False}):
            moe = layer(groups, **options).double()
            found.append(results(moe, moe, tokens_of(groups, 12, torch.float64)))
            assert options or "in messages: the rows are torch.float64" in told(moe), told(moe)
        equal(*found)


@contextmanager
def without_memory(last: bool) -> Iterator[None]:
    def empty(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA driver error: out of memory")

    with mock.patch(f"{SYMMETRIC}.empty", empty) if last else nullcontext():
        yield


@contextmanager
def without_rendezvous(last: bool) -> Iterator[None]:
    def rendezvous(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDASymmetricMemoryAllocator::rendezvous: cannot\nat length")

    with mock.patch(f"{SYMMETRIC}.rendezvous", rendezvous):
        yield


@contextmanager
def reading_something_else(last: bool) -> Iterator[None]:
    found = PeerMemory.is_shared
    with mock.patch.object(PeerMemory, "is_shared", lambda self: found(self) and not last):
        yield


@contextmanager
def another_backend(last: bool) -> Iterator[None]:
    with mock.patch(f"{SYMMETRIC}.get_backend", return_value="NVSHMEM") if last else nullcontext():
        yield


def environment(name: str, value: str, everywhere: bool = False) -> Any:
    def change(last: bool) -> Any:
        return mock.patch.dict(os.environ, {name: value} if last or everywhere else {})

    return change


def main(runner: Runner) -> None:
    world, last = runner.world, runner.world - 1
    ranks = tuple(range(world))
    if world == 1:
        runner.leave_out("layers that are told nothing: one rank has nothing to exchange")
        return
    for tp in (1, 2):
        for shape in ("plain", "recomputed", "kept by a policy", "compiled", "copied"):
            runner.check(f"told nothing, tp {tp}, {shape}", partial(values_and_gradients, tp, shape))
    cases: list[Callable[[], None]] = [
        first_without_gradients,
        gradients_on_one_rank,
        other_numbers_of_tokens,
        layers_of_several_widths,
        streams_take_turns,
        groups_made_again,
        counted_on_one_rank,
        in_float64,
    ]
    for case in cases:
        runner.check(case.__name__, case)
    if find_spec("transformers") is None:
        runner.leave_out("a folded hub model: transformers is not installed")
    else:
        tp = 2 if runner.gpus >= world else 1  # what lies over tp has to be where Gloo is
        runner.check("a folded hub model", partial(a_folded_hub_model, tp))
    in_the_way: list[tuple[str, Any, dict[str, Any]]] = [
        ("OwnExperts may answer in a wider dtype than it is asked in", nullcontext, {"foreign": True}),
        (f"rank {last} has no", without_memory, {}),
        ("memory could not be shared: CUDASymmetricMemoryAllocator::rendezvous: cannot", without_rendezvous, {}),
        (f"memory could not be shared: rank {last} reads something else", reading_something_else, {}),
        ("torch's symmetric memory is that of NVSHMEM and not of CUDA", another_backend, {}),
        (f"the ranks {ranks} see different GPUs", environment("CUDA_VISIBLE_DEVICES", "5"), {}),
    ]
    if runner.gpus < world:
        overlapping = environment("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0", everywhere=True)
        in_the_way.append((f"of the ranks {ranks} some share a GPU", overlapping, {}))
    for says, change, options in in_the_way:
        runner.check(f"in messages: {says}", partial(falls_back, says, change, **options))
