"""The suite ``onesided``: rows that travel one-sided, between processes on GPUs, against rows that travel in messages.

Where ranks share a GPU, the memory is as shared as between GPUs.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from typing import Any

import default_ways
import torch
import torch.distributed as dist
from run import Runner
from torch import Tensor

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.comm.peers import check_room
from foldpar.moe.experts import GroupedExperts
from foldpar.moe.lanes import LaneState
from foldpar.moe.routing.router import Routing
from foldpar.moe.transport.journey import Journey
from foldpar.moe.transport.one_sided import OneSided


@dataclass(frozen=True)
class Case:
    """``tokens`` has one number per data rank (replicated lanes), or one per rank (sharded lanes)."""

    tokens: tuple[int, ...]
    tp: int = 1
    ep: int = 1
    etp: int = 1
    bias: bool = False
    slack: float | None = None
    order: str = "tp-lane-major"
    lanes: str = "replicated"
    partition: str = "tokens"
    dim: int = 64
    hidden: int = 32
    experts: int = 8
    top_k: int = 2
    kind: str = "random"
    dtype: torch.dtype = torch.float32


def cases(world: int) -> list[Case]:
    layouts = [(1, world), (2, world), (world, world), (2, max(1, world // 2)), (2, 1)] if world > 1 else [(1, 1)]
    found = []
    for tp, ep in dict.fromkeys(layouts):
        data_ranks = world // tp
        even = Case(tuple([24] * data_ranks), tp, ep)
        ragged = replace(even, tokens=tuple(7 * rank + 1 for rank in range(data_ranks)))
        empty = replace(even, tokens=(0,) + (9,) * (data_ranks - 1))
        found += [even, ragged, empty, replace(even, order="consecutive"), replace(even, kind="one expert")]
        found += [
            replace(even, kind="masked"),
            replace(even, partition="assignments"),
            replace(ragged, top_k=3, dim=96),
        ]
        found += [replace(even, lanes="sharded", tokens=tuple(5 * rank for rank in range(world)))]
        found += [replace(even, bias=True), replace(ragged, slack=float(ep))]
    if world > 1:  # slices of an expert
        sliced = replace(found[0], ep=world // 2, etp=2)
        found += [sliced, replace(sliced, kind="masked", bias=True), replace(sliced, tp=2, tokens=(5,) * (world // 2))]
    return found + [replace(case, dtype=torch.bfloat16, dim=256, hidden=128) for case in found]


def drawn(world: int, number: int) -> Case:
    chance = random.Random(number)
    tp, ep = chance.choice([(1, world), (world, world), (min(2, world), world)])
    etp = chance.choice([1, 1, world])
    lanes = chance.choice(["replicated", "sharded"])
    return Case(
        tuple(chance.choice([0, 1, 5, 33, 100]) for _ in range(world if lanes == "sharded" else world // tp)),
        tp,
        ep // etp,
        etp,
        bias=chance.random() < 0.2,
        slack=chance.choice([None, None, float(world)]),
        order=chance.choice(["tp-lane-major", "consecutive"]),
        lanes=lanes,
        partition=chance.choice(["tokens", "assignments"]) if lanes == "replicated" else "tokens",
        dim=8 * chance.randint(1, 40),
        hidden=8 * etp * chance.randint(1, 20),
        experts=world * chance.randint(1, 9),
        top_k=chance.randint(1, min(4, world)),
        kind=chance.choice(["random", "masked", "one expert"]),
        dtype=chance.choice([torch.float32, torch.bfloat16]),
    )


def inputs(case: Case, groups: foldpar.FoldedGroups, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    owner = groups.rank if case.lanes == "sharded" else groups.dp_cp.index
    tokens, generator = case.tokens[owner], torch.Generator().manual_seed(owner)
    x, grad = (torch.randn(tokens, case.dim, generator=generator).to(case.dtype).to(device, dtype) for _ in range(2))
    scores = torch.randn(tokens, case.experts, generator=generator)
    favourite = 100.0 * torch.eye(case.experts)[0] if case.kind == "one expert" else 0.0
    ids = (scores + favourite).topk(case.top_k).indices
    weights = scores.softmax(-1).gather(1, ids)
    mask = (torch.rand(tokens, case.top_k, generator=generator) < 0.6).to(device) if case.kind == "masked" else None
    return x.requires_grad_(), weights.to(device).requires_grad_(), ids.to(device), mask, grad


class Layer:
    """Experts of one case, and the journey of their rows."""

    def __init__(self, case: Case, groups: foldpar.FoldedGroups, device: str, dtype: torch.dtype, way: Any) -> None:
        self.experts = GroupedExperts(
            case.experts, case.dim, case.hidden, groups, bias=case.bias, seed=1, dtype=case.dtype
        )
        self.experts.to(device, dtype)
        self.state = LaneState(groups, case.lanes, partition=case.partition)
        self.journey = Journey(self.state, self.experts, one_sided=way)
        self.ends = self.journey.ends
        self.given = inputs(case, groups, device, dtype)

    def step(self) -> list[Tensor]:
        x, weights, ids, mask, grad = self.given
        routing = Routing(
            self.state.own(ids), self.ends.own(weights), mask=None if mask is None else self.state.own(mask)
        )
        y = self.journey(self.experts, self.ends.own(x), routing, tokens=x.shape[0])
        wanted = [x, weights, *self.experts.parameters()]
        return [y.detach(), *(local_tensor(each) for each in torch.autograd.grad(y, wanted, grad))]


def run_case(case: Case, groups: foldpar.FoldedGroups) -> float:
    """The largest relative difference of an output or a gradient from the reference, of any rank."""
    got = Layer(case, groups, "cuda", case.dtype, OneSided(slack=case.slack))
    want = Layer(case, groups, "cpu", torch.float64, None).step()  # over Gloo
    first, second = got.step(), got.step()
    assert "one-sided: up to" in str(got.journey.explain(case.dtype, first[0].device, case.top_k))
    check_room(groups)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)), "not repeatable"
    worst = 0.0
    for one, other in zip(first, want, strict=True):
        norm = float(other.double().norm())
        worst = max(worst, float((one.double().cpu() - other.double().cpu()).norm()) / (norm or 1.0))
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, worst)
    return max(results)


def more_tokens_than_the_bound_go_in_messages() -> None:
    """On one rank, in every other step; and memory grows where there is to be some."""
    world = dist.get_world_size()
    with foldpar.create_groups(foldpar.solve_layout(world, ep=world)) as groups:
        for step in range(6):
            tokens = tuple(8 + (40 if step % 2 and rank == world - 1 else rank) for rank in range(world))
            case = Case(tokens, ep=world, dim=8192 * (1 + step // 2))
            found = [Layer(case, groups, "cuda", case.dtype, way).step() for way in (OneSided(16), OneSided(), False)]
            for one, other, third in zip(*found, strict=True):
                torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(other, third, rtol=1e-4, atol=1e-4)
        dist.barrier()


def no_room_is_told() -> None:
    world = dist.get_world_size()
    with foldpar.create_groups(foldpar.solve_layout(world, ep=world)) as groups:
        case = Case((40,) * world, ep=world, kind="one expert", top_k=1, experts=world)
        Layer(case, groups, "cuda", case.dtype, OneSided(40, slack=1.0)).step()
        told = ""
        try:
            check_room(groups)
        except foldpar.ShapeError as error:
            told = str(error)
        assert (f"were sent {40 * world} rows and have room for 41" in told) == (world > 1), told
        check_room(groups)
        dist.barrier()


def the_host_waits_for_nothing() -> None:
    """And a graph replays the whole step, for other rows and another routing."""
    world = dist.get_world_size()
    with foldpar.create_groups(foldpar.solve_layout(world, ep=world)) as groups:
        case = Case((32,) * world, ep=world, dim=128, hidden=64, dtype=torch.bfloat16)
        layer = Layer(case, groups, "cuda", case.dtype, OneSided(32, slack=world))
        layer.step()
        check_room(groups)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        layer.step()
        torch.cuda.set_sync_debug_mode("default")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                layer.step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = layer.step()
        x, weights, ids, _, _ = layer.given
        with torch.no_grad():
            x.copy_(torch.randn(x.shape).to(x))
            weights.copy_(torch.rand(weights.shape))
            ids.copy_(torch.randint(case.experts, ids.shape))
        torch.cuda.synchronize()
        dist.barrier()
        graph.replay()
        torch.cuda.synchronize()
        want = layer.step()
        assert all(torch.equal(one, other) for one, other in zip(replayed, want, strict=True))
        torch.cuda.synchronize()
        dist.barrier()


def main(runner: Runner) -> None:
    start = time.monotonic()
    by_layout: dict[foldpar.FoldedLayout, list[Case]] = {}
    for case in cases(runner.world) + [drawn(runner.world, number) for number in range(runner.shapes)]:
        layout = foldpar.solve_layout(runner.world, tp=case.tp, ep=case.ep, etp=case.etp, order=case.order)
        by_layout.setdefault(layout, []).append(case)
    for layout, of_it in by_layout.items():
        with foldpar.create_groups(layout) as groups:
            for case in of_it:
                error = run_case(case, groups)
                runner.say(
                    error < (1e-5 if case.dtype == torch.float32 else 3e-2),
                    f"{error:.1e}",
                    case,
                    f"{time.monotonic() - start:.1f} s",
                )
            torch.cuda.synchronize()
            dist.barrier()
    specials = [no_room_is_told, the_host_waits_for_nothing]
    for special in specials + ([more_tokens_than_the_bound_go_in_messages] if runner.gpus >= runner.world else []):
        special()
        runner.say(True, special.__name__)
    default_ways.main(runner)
    left = torch.cuda.memory_allocated() / 2**20
    runner.say(left < 256, f"{left:.0f} MiB are still allocated")
