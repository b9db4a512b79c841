"""The experts' feed-forward network at real shapes: Hopper's own kernels against a float32 loop over experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from dense import dense_experts, feed_forward
from torch import Tensor
from torch.nn import functional as F

from foldpar.moe import Places, grouped_feed_forward
from foldpar.moe.kernels import products
from foldpar.moe.kernels.permutation import place_experts


@dataclass(frozen=True)
class Case:
    """``gathered``: the rows lie by token; else they lie by expert, and rows that hold nothing come behind."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    kind: str = "random"
    gathered: bool = True


QWEN = Case(2048, 2048, 768, 128, 8)
CASES = [
    QWEN,
    replace(QWEN, tokens=8192),
    replace(QWEN, tokens=555),
    Case(4096, 4096, 256, 64, 16),
    Case(3000, 4096, 512, 32, 8),
    Case(1111, 1048, 328, 16, 3),  # whole 16 bytes, no multiple of any tile
    Case(4444, 1048, 328, 16, 3),  # the same, and groups are long
    *(replace(QWEN, kind=kind) for kind in ("masked", "one expert", "half of the experts")),
    replace(QWEN, dtype=torch.float16),
]
JUNK = 7


def ids_of(case: Case) -> Tensor:
    """``[tokens, top_k]``, ``-1`` for assignments that go nowhere."""
    generator = torch.Generator().manual_seed(case.tokens)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.kind == "one expert":
        scores[:, 3] += 1
    if case.kind == "half of the experts":
        scores[:, ::2] -= 1
    ids = scores.topk(case.top_k).indices
    if case.kind == "masked":
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
        ids[5] = -1
    return ids.to("cuda", torch.int32)


def run(case: Case) -> None:
    ids = ids_of(case)
    generator = torch.Generator("cuda").manual_seed(1)
    draw = partial(torch.randn, generator=generator, device="cuda")
    x, dy = (draw(case.tokens, case.dim).to(case.dtype) for _ in range(2))
    gate_up = (draw(case.experts, 2 * case.hidden, case.dim) * case.dim**-0.5).to(case.dtype)
    down = (draw(case.experts, case.dim, case.hidden) * case.hidden**-0.5).to(case.dtype)
    weights = torch.rand(ids.shape, generator=generator, device="cuda")
    assignments = int((ids >= 0).sum())
    slots, source, copies, ends, _ = place_experts(ids, case.experts, assignments)
    given = [each.requires_grad_() for each in (x, weights, gate_up, down)]
    assert products.takes(x, gate_up, down, assignments, "swiglu", plain=True), "the kernels do not take this case"

    def forward() -> Tensor:
        if case.gathered:
            places = Places(source, slots, copies, ends)
            return grouped_feed_forward(x, gate_up, down, ends, "swiglu", weights=weights, places=places)
        picked = weights.flatten()[slots.long()]
        junk = x.new_full((JUNK, case.dim), float("nan"))
        rows = torch.cat([x[source.long()], junk])
        out = grouped_feed_forward(rows, gate_up, down, ends, "swiglu", weights=F.pad(picked, (0, JUNK)))
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, source, out[:assignments].float()).to(case.dtype)

    def step() -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, given, dy)]

    got, again = step(), step()
    if case.gathered:  # index_add repeats nothing
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True)), "runs differ"
        before = torch.cuda.memory_allocated()
        y = forward()
        kept = torch.cuda.memory_allocated() - before
        allowed = 1.05 * (assignments * 2 * case.hidden + y.numel()) * x.element_size() + 16 * assignments + 2**20
        assert kept < allowed, f"{kept / 2**20:.0f} MiB are kept"
    exact = [each.detach().float().requires_grad_() for each in given]
    exact_x, exact_weights, *stacks = exact
    wanted_y = dense_experts(exact_x, ids, exact_weights, feed_forward(*stacks))
    wanted = [wanted_y.detach(), *torch.autograd.grad(wanted_y, exact, dy.float())]
    for name, one, other in zip(("y", "x", "weights", "gate_up", "down"), got, wanted, strict=True):
        parts = len(other) if other.dim() == 3 else 1  # each expert by itself
        gap = (one.float() - other).view(parts, -1).norm(dim=1)
        size = other.view(parts, -1).norm(dim=1)
        assert bool((gap <= 1.5e-2 * size).all()), f"{name}: {float((gap / size.clamp(min=1e-9)).max()):.1e}"


def main(runner: Any) -> None:
    every = CASES + [replace(case, gathered=False) for case in CASES]
    for case in every if runner.device == "cuda" else ():
        runner.check(case, partial(run, case))
