"""Train a Hugging Face model folded and in one process, and compare everything that training touches."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from hf_models import VOCAB, tiny_model
from torch import Tensor, nn

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.models.fold import fold_model
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

BATCH, LENGTH = 2, 6


@dataclass(frozen=True)
class Case:
    """One family on one layout."""

    family: str
    world: int = 4
    tp: int = 2
    ep: int = 4
    etp: int = 1
    order: str = "tp-lane-major"
    partition: str = "tokens"
    steps: int = 3
    rate: float = 0.05
    overrides: dict[str, Any] = field(default_factory=dict)
    attention: str = "eager"
    dtype: torch.dtype = torch.float64
    backend: str = "threads"
    checkpointing: bool | None = None
    """``use_reentrant`` of gradient checkpointing, or none."""
    unplanned: str | None = None
    """Modules that the model's tensor-parallel plan leaves out, by a part of their names."""
    check: bool | None = None
    random: bool = False
    """Let routers draw random numbers as in training; on spawned ranks, whose generators are their own."""

    def __str__(self) -> str:
        return f"{self.family}-{self.world}-tp{self.tp}-ep{self.ep}-etp{self.etp}-{self.order}-{self.partition}"

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.dtype == torch.float64 else 1e-5

    @property
    def layout(self) -> foldpar.FoldedLayout:
        return foldpar.solve_layout(self.world, tp=self.tp, ep=self.ep, etp=self.etp, order=self.order)


@dataclass
class Trace:
    """What one run left: a list entry per step and data rank, and gradients per step by name."""

    outputs: list[list[dict[str, Tensor]]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


def batch_of(data_rank: int, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 * data_rank + step)
    return torch.randint(3, VOCAB, (BATCH, LENGTH), generator=draw)


def outputs_of(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what else the model gives: logits, router logits, auxiliary loss."""
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    found = {"loss": out.loss, "logits": out.logits}
    if getattr(out, "aux_loss", None) is not None:
        found["aux_loss"] = out.aux_loss
    for layer, logits in enumerate(getattr(out, "router_logits", None) or ()):
        found[f"router_logits.{layer}"] = logits
    return out.loss, {name: value.detach().clone() for name, value in found.items()}


def train_reference(model: nn.Module, case: Case) -> Trace:
    trace = Trace()
    data_ranks = case.layout.dp
    for step in range(case.steps):
        model.zero_grad()
        seen = []
        for data_rank in range(data_ranks):
            torch.manual_seed(data_rank)
            loss, outputs = outputs_of(model, batch_of(data_rank, step))
            (loss / data_ranks).backward()
            seen.append(outputs)
        trace.outputs.append(seen)
        trace.gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        )
        _sgd(model, case.rate)
    return trace


def train_folded(model: nn.Module, case: Case, reference: Trace) -> dict[str, tuple[float, float]]:
    """On one rank: squared differences and squared norms by tensor."""
    with foldpar.create_groups(case.layout) as groups:
        fold_model(model, groups, partition=case.partition, check=case.check)
        found: dict[str, tuple[float, float]] = {}
        shares = Shares(model, groups)
        for step in range(case.steps):
            model.zero_grad()
            torch.manual_seed(groups.dp.index)  # the lanes of a TP group alike
            loss, outputs = outputs_of(model, batch_of(groups.dp.index, step))
            loss.backward()
            foldpar.reduce_gradients(model, groups)
            wanted = reference.outputs[step][groups.dp.index]
            assert outputs.keys() == wanted.keys()
            for name, value in outputs.items():
                _note(found, f"{name} at step {step}", value, wanted[name])
            seen = set()
            for name, parameter in model.named_parameters():
                if name not in reference.gradients[step]:
                    assert parameter.grad is None or not local_tensor(parameter.grad).any(), name
                    continue
                seen.add(name)
                want = shares.share_of(name, reference.gradients[step][name])
                _note(found, f"gradient of {name} at step {step}", shares.local(name, parameter.grad), want)
            assert seen == set(reference.gradients[step])
            _sgd(model, case.rate)
        return found


def model_of(case: Case) -> nn.Module:
    model = tiny_model(case.family, dtype=case.dtype, **case.overrides)
    model.set_attn_implementation(case.attention)
    if case.checkpointing is not None:
        new_name = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.2x
        (new_name or model.gradient_checkpointing_enable)({"use_reentrant": case.checkpointing})
    if case.unplanned is not None:
        model._tp_plan = {name: style for name, style in model._tp_plan.items() if case.unplanned not in name}
    return model.train(case.random or case.family != "phimoe")  # whose router draws random numbers in training


def worst(case: Case) -> tuple[float, str]:
    """The largest relative L2 difference of any tensor, over all ranks' shares, and its name."""
    model = model_of(case)
    with float64_stays():
        reference = train_reference(copy.deepcopy(model), case)
        # Thread ranks copy one model; spawned ranks make theirs, since a pickled one records no router logits.
        given = model if case.backend == "threads" else None
        results = run_ranks(_on_a_rank, case.world, given, case, reference, backend=case.backend, timeout=240)
    relative = {}
    for name in results[0]:
        difference, norm = (math.sqrt(sum(result[name][part] for result in results)) for part in range(2))
        relative[name] = difference / norm if norm else difference
    name = max(relative, key=lambda key: (math.isnan(relative[key]), relative[key]))
    return relative[name], name


def _on_a_rank(model: nn.Module | None, case: Case, reference: Trace) -> dict[str, tuple[float, float]]:
    if model is not None:
        return train_folded(copy.deepcopy(model), case, reference)
    with float64_stays():
        return train_folded(model_of(case), case, reference)


@contextmanager
def float64_stays() -> Iterator[None]:
    """Let ``x.float()``, ``x.to(torch.float32)`` and ``x.type(torch.float32)`` keep a float64 tensor, as models in
    float64 would have it.

    Rotary embeddings and norms of some families compute in float32 whatever they are given, and where they add up
    gradients of tokens or heads, adding in another order changes the last digits.
    """
    narrow, convert, convert_type = torch.Tensor.float, torch.Tensor.to, torch.Tensor.type

    def keep(self: Tensor, *args: Any, **options: Any) -> Tensor:
        return self if self.dtype == torch.float64 else narrow(self, *args, **options)

    def keep_to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        narrows = self.dtype == torch.float64 and torch.float32 in (*args[:1], options.get("dtype"))
        return self if narrows else convert(self, *args, **options)

    def keep_type(self: Tensor, *args: Any, **options: Any) -> Any:
        narrows = self.dtype == torch.float64 and args[:1] == (torch.float32,)
        return self if narrows else convert_type(self, *args, **options)

    with (
        mock.patch.object(torch.Tensor, "float", keep),
        mock.patch.object(torch.Tensor, "to", keep_to),
        mock.patch.object(torch.Tensor, "type", keep_type),
    ):
        yield


def _sgd(model: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                local_tensor(parameter).sub_(local_tensor(parameter.grad), alpha=rate)


def _note(found: dict[str, tuple[float, float]], name: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} is not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: {got.dtype} is not {want.dtype}"
    found[name] = tuple(float(part.double().square().sum()) for part in (got - want, want))
