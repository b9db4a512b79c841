"""What launching costs the host: small models of transformers, folded in every way, whose steps are nothing else.

A step of a model so small that its kernels take no time takes as long as launching it. What a layer costs is the
difference between models of more and fewer layers; what a way of folding adds is the difference between two of those.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from foldpar.comm import FoldedGroups, create_groups
from foldpar.gradients import reduce_gradients
from foldpar.layout import solve_layout
from foldpar.models import fold_model
from foldpar.moe import OneSided
from foldpar.parameters import parameter_groups
from foldpar.planning.machine import HostCost
from foldpar.sharding import shard_model

__all__ = ["measure_host"]

TOKENS = 256
WEIGHTS = 11
"""Of a layer of the small model: two norms, four projections, two norms of heads, router, and two of the experts."""


def measure_host(base: HostCost, world: int, device: torch.device, *, quick: bool = False) -> tuple[HostCost, str]:
    """The costs on this machine, and where they come from.

    Without transformers, those of ``base`` are scaled by how long a small operation takes; on one rank, so are those
    of what several ranks do.
    """
    if find_spec("transformers") is None:
        return _scaled(
            base, _launch(device) / REFERENCE_LAUNCH
        ), "measured: small operations; the rest scaled from them"
    with ExitStack() as stack:
        few, steps = (1, 3) if quick else (4, 9)
        return _differences(base, world, device, steps, _Slope(device, few, steps, stack))


def _differences(base: HostCost, world: int, device: torch.device, steps: int, plain: _Slope) -> tuple[HostCost, str]:
    dense = _feed_forward(device, steps)
    layer, outside = plain.of(world, {})
    attention = max(0.0, plain.of(world, {}, dense=True)[0]["layer"] - dense)
    costs = {
        "attention": attention, "dense": dense, "moe": layer["layer"] - attention, "head": outside,
        "parameter": layer["optimizer"] / WEIGHTS, "reduction": layer["reduce"] / WEIGHTS,
    }  # fmt: skip
    if world % 2:
        ratio = max(0.0, layer["layer"]) / (base.attention + base.moe)  # noise can make more layers the faster ones
        return replace(_scaled(base, ratio), **_positive(costs)), "measured: one rank; what ranks add is scaled from it"
    unsharded = layer["layer"]

    def more(degrees: dict[str, int], **options: object) -> float:
        return plain.of(world, degrees, **options)[0]["layer"] - unsharded  # type: ignore[arg-type]

    lanes = (plain.of(world, {"tp": 2}, dense=True)[0]["layer"] - attention - dense) / 2
    shards, whole = plain.of(world, {}, stage=2)[0], more({}, stage=3)
    summed = shards["layer"] - unsharded
    costs |= {
        "messages": more({"ep": 2}), "slices": more({"etp": 2}), "lanes": lanes, "ends": more({"tp": 2}) - lanes,
        "unit": summed / 2, "regather": (whole - summed) / 2, "reduction": shards["reduce"] / WEIGHTS,
        "bucket": (layer["reduce"] - shards["reduce"]) / WEIGHTS,
    }  # fmt: skip
    if device.type == "cuda":
        costs["one_sided"] = more({"ep": 2}, one_sided=True)
    return replace(base, **_positive(costs)), "measured: differences of small models' steps"


def _positive(costs: dict[str, float]) -> dict[str, float]:
    return {name: max(0.0, seconds) for name, seconds in costs.items()}


class _Slope:
    """Seconds that one layer more costs, by phase; and forward and backward of what is outside of layers."""

    def __init__(self, device: torch.device, few: int, steps: int, stack: ExitStack) -> None:
        self.device, self.few, self.steps, self.stack = device, few, steps, stack
        self.groups: dict[tuple[tuple[str, int], ...], FoldedGroups] = {}

    def of(
        self, world: int, degrees: dict[str, int], *, stage: int = 0, dense: bool = False, one_sided: bool = False
    ) -> tuple[dict[str, float], float]:
        """``dense``: what is added are layers without experts."""
        key = tuple(degrees.items())
        if key not in self.groups:
            self.groups[key] = self.stack.enter_context(
                create_groups(
                    solve_layout(world, tp=degrees.get("tp", 1), ep=degrees.get("ep", 1), etp=degrees.get("etp", 1))
                )
            )
        fewer, more = (self._phases(self.groups[key], count, stage, dense, one_sided) for count in (1, 1 + self.few))
        slope = {name: (more[name] - fewer[name]) / self.few for name in more}
        return slope, max(0.0, fewer["layer"] - slope["layer"])

    def _phases(self, groups: FoldedGroups, layers: int, stage: int, dense: bool, one_sided: bool) -> dict[str, float]:
        model = _small(layers, dense, self.device)
        fold_model(model, groups, one_sided=OneSided() if one_sided else False, check=False)
        if stage:
            shard_model(model, groups, stage=stage)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4)
        ids = torch.arange(TOKENS, device=self.device)[None] % 64
        times = defaultdict[str, list[float]](list)
        for _ in range(self.steps + 3):
            _wait(self.device)
            began = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            computed = time.perf_counter()
            reduce_gradients(model, groups)
            reduced = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            ended = time.perf_counter()
            for name, seconds in (
                ("layer", computed - began), ("reduce", reduced - computed), ("optimizer", ended - reduced),
            ):  # fmt: skip
                times[name].append(seconds)
        _wait(self.device)
        del model, optimizer
        gc.collect()
        return {name: _median(found[3:]) for name, found in times.items()}


def _small(layers: int, dense: bool, device: torch.device) -> nn.Module:
    """A Qwen3-MoE model; with ``dense`` the layers behind the first have no experts."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=64, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=list(range(1, layers)) if dense else [], pad_token_id=None,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # equal on all ranks, which may be threads
        for parameter in model.parameters():
            parameter.copy_(torch.sin(torch.arange(parameter.numel(), device=device)).view_as(parameter) / 8)
    return model.train()


def _feed_forward(device: torch.device, steps: int) -> float:
    """Of one gated network, forward and backward."""
    first, second, last = (nn.Linear(64, 64, bias=False, device=device) for _ in range(3))
    x = torch.zeros(TOKENS, 64, device=device, requires_grad=True)

    def run() -> None:
        for _ in range(10):
            last(F.silu(first(x)) * second(x)).sum().backward()

    return _seconds(run, device, steps) / 10


def _launch(device: torch.device) -> float:
    x = torch.zeros(8, device=device)
    return _seconds(lambda: [x.add_(1) for _ in range(100)], device, 11) / 100


REFERENCE_LAUNCH = 5e-6
"""Seconds of one small operation on the host whose costs are shipped (assumed)."""


def _scaled(base: HostCost, ratio: float) -> HostCost:
    return HostCost(**{name: getattr(base, name) * ratio for name in HostCost.__dataclass_fields__})


def _seconds(run: Callable[[], object], device: torch.device, steps: int) -> float:
    times = []
    for _ in range(steps + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return _median(times[1:])


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
