"""A training step whose bytes are counted, and what a plan says of the same step; on CPU ranks or on GPUs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

import foldpar
from foldpar.comm import memories_of
from foldpar.planning import Memory, Workload, read_model
from foldpar.planning.memory import MemoryModel

_BUILDING = threading.Lock()
"""Ranks that are threads draw from one generator of random numbers."""


@dataclass(frozen=True)
class Case:
    """A model, a fold, a stage, a recomputation and a batch."""

    model: str
    config: dict[str, Any] = field(hash=False)
    world: int = 1
    degrees: dict[str, int] = field(default_factory=dict, hash=False)
    stage: int = 0
    recompute: str = "none"
    precision: str = "float32"
    micro: int = 4
    micro_batches: int = 1
    tokens: int = 256
    transport: str = "messages"

    def __str__(self) -> str:
        degrees = "".join(f" {name}{size}" for name, size in self.degrees.items())
        return (
            f"{self.model} {self.precision} world {self.world}{degrees} stage {self.stage} recompute {self.recompute} "
            f"{self.transport} {self.micro_batches} x {self.micro} x {self.tokens}"
        )

    @property
    def layout(self) -> foldpar.FoldedLayout:
        return foldpar.solve_layout(self.world, **self.degrees)

    def build(self, device: str) -> nn.Module:
        """The model of transformers with random weights, in the dtype that it is stored in."""
        import transformers

        config = transformers.AutoConfig.for_model(self.model, **self.config)
        config._attn_implementation = "sdpa"
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        with _BUILDING, torch.device(device):
            torch.manual_seed(0)
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()

    def predicted(self, device: str) -> Memory:
        """What the planner says."""
        import transformers

        shape = read_model(transformers.AutoConfig.for_model(self.model, **self.config).to_dict())
        batch = self.micro * self.micro_batches * self.layout.dp
        work = Workload(tokens=self.tokens, batch=batch, precision=self.precision)  # type: ignore[arg-type]
        return MemoryModel(shape, work, device).of(
            self.layout, stage=self.stage, recompute=self.recompute, transport=self.transport, micro=self.micro,
        )  # type: ignore[arg-type]  # fmt: skip

    def training(self, groups: foldpar.FoldedGroups, device: str) -> Training:
        """The model as a program would have it, folded and sharded, with its optimizer and a batch."""
        model = self.build(device)
        one_sided = foldpar.OneSided() if self.transport == "one-sided" else False
        foldpar.fold_model(model, groups, one_sided=one_sided, check=False)
        route_evenly(model, groups.dp.index)
        if self.recompute == "full":
            model.gradient_checkpointing_enable()
        if self.recompute == "experts":
            for layer in model.model.layers:
                layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=False)
        if self.stage:
            mixed = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
            precision = mixed if self.precision == "mixed" else None
            foldpar.shard_model(model, groups, stage=self.stage, mixed_precision=precision)
        optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=1e-4)
        return Training(model, groups, optimizer, self.ids(device), self.micro_batches)

    def ids(self, device: str) -> Tensor:
        """Of the tokens of a micro-batch."""
        ids = torch.arange(self.micro * self.tokens, device=device).view(self.micro, -1)
        return ids % int(self.config["vocab_size"])

    def measured(
        self,
        groups: foldpar.FoldedGroups,
        device: str,
        peak_of: Callable[[Callable[[], None]], int],
    ) -> int:
        """The peak of the second step, as ``peak_of`` counts it; beside it what is held before, on CPUs, and on GPUs
        what ranks share."""
        training = self.training(groups, device)
        training.step()
        gc.collect()
        model, optimizer = training.model, training.optimizer
        held = 0 if device == "cuda" else bytes_of(model.parameters()) + bytes_of(
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )  # fmt: skip
        return held + peak_of(training.step) + shared_bytes(groups, device)


@dataclass(frozen=True)
class Training:
    """A model in training, and one step of it in phases."""

    model: nn.Module
    groups: foldpar.FoldedGroups
    optimizer: torch.optim.Optimizer
    ids: Tensor
    micro_batches: int

    def step(self, after: Callable[[str], None] = lambda phase: None) -> None:
        """One step; ``after`` is called with the name of each phase that has ended on the host."""
        with foldpar.accumulate(self.model):
            for _ in range(self.micro_batches - 1):
                self._forward().backward()
        after("earlier")
        loss = self._forward()
        after("forward")
        loss.backward()
        after("backward")
        foldpar.reduce_gradients(self.model, self.groups)
        after("reduce")
        self.optimizer.step()
        self.optimizer.zero_grad()
        after("optimizer")

    def _forward(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss


def shared_bytes(groups: foldpar.FoldedGroups, device: str) -> int:
    """Of memory that the ranks of EP x ETP share, which torch's allocator does not count."""
    found = memories_of(groups, torch.device(device, 0 if device == "cpu" else torch.cuda.current_device()), ask=False)
    return found.shared if found is not None and groups.ep_etp.size > 1 else 0


def bytes_of(tensors: Any) -> int:
    """Of their storages, each once."""
    local = [getattr(each, "_local_tensor", each) for each in tensors]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in local}.values())


def route_evenly(model: nn.Module, seed: int) -> None:
    """Replace what routers choose by independent experts, as the formulas assume; lanes draw alike."""
    generators: dict[torch.device, torch.Generator] = {}

    def choose(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, weights, index = output
        generator = generators.setdefault(index.device, torch.Generator(index.device).manual_seed(seed))
        scores = torch.rand(index.shape[0], logits.shape[-1], generator=generator, device=index.device)
        return logits, weights, scores.topk(index.shape[-1]).indices

    for module in model.modules():
        if type(module).__name__ in ("Qwen3MoeTopKRouter", "Qwen2MoeTopKRouter", "MixtralTopKRouter"):
            module.register_forward_hook(choose)  # type: ignore[arg-type]
