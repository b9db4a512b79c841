"""What general tools do to a folded model: exact, or refused before anything changes; never silently wrong.

``TOOLS.md`` has the table: its cells are what these tests find, and ``python tests/laws/test_tools.py`` writes it anew.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import tempfile
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hf_models import tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.utils import parametrize, prune
from torch.optim import swa_utils
from toys import gathered

import foldpar
from foldpar.comm import living_groups, local_tensor
from foldpar.testing import run_ranks

PAGE = Path(__file__).parents[2] / "TOOLS.md"
WHOLE = StateDictOptions(full_state_dict=True)
EXPERT = "model.layers.0.mlp.experts.gate_up_proj"


@dataclass(frozen=True)
class Layout:
    tp: int
    ep: int
    etp: int = 1
    order: str = "tp-lane-major"
    stage: int = 0
    world: int = 4

    def __str__(self) -> str:
        etp = f" etp {self.etp}" if self.etp > 1 else ""
        order = ", consecutive" if self.order == "consecutive" else ""
        return f"tp {self.tp} ep {self.ep}{etp}, stage {self.stage}{order}"


HALF = Layout(1, 2, world=2)
"""What the first column says of four ranks holds of two."""
COLUMNS = [Layout(1, 4), Layout(2, 2, stage=3), Layout(2, 4), Layout(2, 2, etp=2), Layout(1, 2, stage=3)]
ALL = [
    Layout(tp, ep, order=order, stage=stage)
    for tp in (1, 2)
    for ep in (2, 4)
    for order in ("tp-lane-major", "consecutive")
    for stage in range(4)
]


@dataclass
class Folded:
    """A folded model, and the tensors of the whole one by name."""

    model: nn.Module
    groups: foldpar.FoldedGroups
    whole: dict[str, Tensor]
    folder: str
    before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def experts(self) -> Any:
        return self.model.model.layers[0].mlp.experts

    def tokens(self) -> Tensor:
        draw = torch.Generator().manual_seed(self.groups.dp_cp.index)
        return torch.randint(32, (2, 8), generator=draw)

    def backward(self, model: nn.Module | None = None) -> None:
        model = model or self.model
        model.zero_grad()
        model(input_ids=self.tokens(), labels=self.tokens()).loss.backward()
        foldpar.reduce_gradients(model, self.groups)

    def gathered(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        return {name: gathered(parameter) for name, parameter in (model or self.model).named_parameters()}

    def holds(self, factor: float = 1.0, model: nn.Module | None = None) -> bool:
        """Whether the model is the whole one, times a factor."""
        found = self.gathered(model)
        return all(torch.allclose(found[name], self.whole[name] * factor, rtol=1e-12) for name in found)

    def scale(self, factor: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                local_tensor(parameter).mul_(factor)

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        self.backward()
        optimizer = torch.optim.AdamW(foldpar.parameter_groups(self.model), lr=0.1, **options)
        optimizer.step()
        return optimizer


def same(one: dict[str, Tensor], other: dict[str, Tensor], factor: float = 1.0) -> bool:
    return all(torch.equal(gathered(one[name]), other[name] * factor) for name in other)


# ---------------------------------------------------------------------------------------------------------------------
# The tools: what a user would write, and whether it came out as in one process.

Use = Callable[[Folded], bool]
TOOLS: dict[str, tuple[Use, str]] = {}
SLOW = {"`torch.compile`"}


def tool(name: str, instead: str = "") -> Callable[[Use], Use]:
    """``instead``: what to call where it is refused."""

    def register(use: Use) -> Use:
        TOOLS[name] = (use, instead)
        return use

    return register


@tool(
    "`DistributedDataParallel`, so `Accelerator.prepare` and `Trainer`", "`reduce_gradients`, or `shard_model(stage=1)`"
)
def _(of: Folded) -> bool:
    nn.parallel.DistributedDataParallel(of.model)
    return of.holds()


@tool("`fully_shard` by hand, over all ranks", "`shard_model`")
def _(of: Folded) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(of.model.model.layers[0], mesh=mesh)
    of.backward()
    return False


@tool("`fully_shard` by hand, of attention alone", "`shard_model`")
def _(of: Folded) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(of.model.model.layers[0].self_attn, mesh=mesh)
    of.backward()
    return False


@tool("`dcp.save` of `state_dict()`, loaded whole")
def _(of: Folded) -> bool:
    dcp.save(of.model.state_dict(), checkpoint_id=f"{of.folder}/dcp")
    shapes = {name: tensor.shape for name, tensor in of.model.state_dict().items()}
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    dcp.load(found, checkpoint_id=f"{of.folder}/dcp")
    return same(found, of.whole)


@tool("`dcp.load` into `state_dict()`")
def _(of: Folded) -> bool:
    dcp.save(of.model.state_dict(), checkpoint_id=f"{of.folder}/dcp")
    of.scale(0.0)
    state = of.model.state_dict()
    dcp.load(state, checkpoint_id=f"{of.folder}/dcp")
    of.model.load_state_dict(state)
    return of.holds()


@tool("`get_model_state_dict`, full")
def _(of: Folded) -> bool:
    return same(get_model_state_dict(of.model, options=WHOLE), of.whole)


@tool("`get_model_state_dict`, sharded")
def _(of: Folded) -> bool:
    return same(get_model_state_dict(of.model), of.whole)


@tool("`set_model_state_dict`, full", "`model.load_state_dict(whole)`")
def _(of: Folded) -> bool:
    set_model_state_dict(of.model, {name: tensor * 2 for name, tensor in of.whole.items()}, options=WHOLE)
    return of.holds(2)


@tool("`set_model_state_dict`, full, from rank 0", "`model.load_state_dict(whole)` on every rank")
def _(of: Folded) -> bool:
    given = {name: tensor * 2 for name, tensor in of.whole.items()} if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(of.model, given, options=options)
    return of.holds(2)


@tool("`get_optimizer_state_dict`, full")
def _(of: Folded) -> bool:
    optimizer = of.optimizer()
    found = get_optimizer_state_dict(of.model, optimizer, options=WHOLE)["state"][EXPERT]["exp_avg"]
    mine = gathered(optimizer.state[dict(of.model.named_parameters())[EXPERT]]["exp_avg"])
    return torch.equal(gathered(found), mine) and mine.shape == of.whole[EXPERT].shape


@tool("`get_state_dict`, `dcp`, `set_state_dict`, of model and optimizer")
def _(of: Folded) -> bool:
    optimizer = of.optimizer()
    states = optimizer.state[dict(of.model.named_parameters())[EXPERT]]
    weights, average = of.gathered(), gathered(states["exp_avg"]).clone()
    parts = dict(zip(("model", "optimizer"), get_state_dict(of.model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=f"{of.folder}/both")
    of.scale(0.0)
    for state in optimizer.state.values():
        local_tensor(state["exp_avg"]).zero_()
    parts = dict(zip(("model", "optimizer"), get_state_dict(of.model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=f"{of.folder}/both")
    set_state_dict(of.model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    states = optimizer.state[dict(of.model.named_parameters())[EXPERT]]
    return same(of.gathered(), weights) and torch.equal(gathered(states["exp_avg"]), average)


@tool("`save_pretrained`", "`foldpar.hf.export`")
def _(of: Folded) -> bool:
    of.model.save_pretrained(of.folder)
    return False


@tool("`torch.save(state_dict())` on every rank, loaded there", "`torch.load(..., weights_only=False)`")
def _(of: Folded) -> bool:
    file = io.BytesIO()
    torch.save(of.model.state_dict(), file)
    of.scale(0.0)
    file.seek(0)
    of.model.load_state_dict(torch.load(file))
    return of.holds()


@tool("`load_state_dict` of a whole model's")
def _(of: Folded) -> bool:
    of.model.load_state_dict({name: tensor * 2 for name, tensor in of.whole.items()})
    return of.holds(2)


@tool("`load_state_dict(..., assign=True)` of a whole model's", "`assign=False`")
def _(of: Folded) -> bool:
    of.model.load_state_dict({name: tensor * 2 for name, tensor in of.whole.items()}, assign=True)
    of.backward()
    return of.holds(2)


@tool("torch's `clip_grad_norm_`", "`foldpar.clip_grad_norm_`")
def _(of: Folded) -> bool:
    of.backward()
    want = float(foldpar.get_total_norm(of.model, of.groups))
    found = nn.utils.clip_grad_norm_(of.model.parameters(), 1.0)
    return abs(float(gathered(found)) / want - 1) < 1e-12


def clipped(of: Folded, clip: Callable[[], object], want: Callable[[Tensor], Tensor]) -> bool:
    """Gradients are what ``want`` makes of those before."""
    of.backward()
    before = {name: gathered(parameter.grad).clone() for name, parameter in of.model.named_parameters()}
    clip()
    found = {name: gathered(parameter.grad) for name, parameter in of.model.named_parameters()}
    return all(torch.allclose(found[name], want(before[name]), rtol=1e-9) for name in found)


@tool("torch's `clip_grads_with_norm_`", "`foldpar.clip_grad_norm_`")
def _(of: Folded) -> bool:
    return clipped(
        of,
        lambda: nn.utils.clip_grads_with_norm_(of.model.parameters(), 0.5, torch.tensor(2.0)),
        lambda gradient: gradient * 0.25,
    )


@tool("torch's `clip_grad_value_`", "`clip_grad_value_(..., foreach=False)`")
def _(of: Folded) -> bool:
    return clipped(
        of,
        lambda: nn.utils.clip_grad_value_(of.model.parameters(), 1e-4),
        lambda gradient: gradient.clamp(-1e-4, 1e-4),
    )


@tool("torch's `clip_grad_value_(..., foreach=False)`")
def _(of: Folded) -> bool:
    return clipped(
        of,
        lambda: nn.utils.clip_grad_value_(of.model.parameters(), 1e-4, foreach=False),
        lambda gradient: gradient.clamp(-1e-4, 1e-4),
    )


@tool("torch's `get_total_norm` of all gradients", "`foldpar.get_total_norm`")
def _(of: Folded) -> bool:
    of.backward()
    found = gathered(nn.utils.get_total_norm(parameter.grad for parameter in of.model.parameters()))
    want = torch.cat([gathered(parameter.grad).flatten() for parameter in of.model.parameters()]).norm()
    return bool((found / want - 1).abs() < 1e-12)


@tool("torch's `get_total_norm` of experts")
def _(of: Folded) -> bool:
    of.backward()
    gradients = [parameter.grad for parameter in of.experts.parameters()]
    found = gathered(nn.utils.get_total_norm(gradients))
    want = torch.cat([gathered(gradient).flatten() for gradient in gradients]).norm()
    return bool((found / want - 1).abs() < 1e-12)


@tool("`parameters_to_vector`", "`model.state_dict()`")
def _(of: Folded) -> bool:
    vector = nn.utils.parameters_to_vector(of.model.parameters())
    want = nn.utils.parameters_to_vector(of.whole[name] for name, _ in of.model.named_parameters())
    return torch.equal(gathered(vector), want)


@tool("`AveragedModel`", "average before `shard_model`, or a second model that is built and sharded alike")
def _(of: Folded) -> bool:
    average = swa_utils.AveragedModel(of.model)
    average.update_parameters(of.model)
    of.scale(3.0)
    average.update_parameters(of.model)
    return of.holds(2.0, average.module)


@tool("`AveragedModel(avg_fn=...)`", "as above")
def _(of: Folded) -> bool:
    average = swa_utils.AveragedModel(of.model, avg_fn=swa_utils.get_ema_avg_fn(0.5))
    average.update_parameters(of.model)
    of.scale(3.0)
    average.update_parameters(of.model)
    return of.holds(2.0, average.module)


@tool("`AveragedModel(multi_avg_fn=...)`", "`avg_fn=`; sharded, as above")
def _(of: Folded) -> bool:
    average = swa_utils.AveragedModel(of.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(of.model)
    of.scale(3.0)
    average.update_parameters(of.model)
    return of.holds(2.0, average.module)


@tool("`copy.deepcopy`", "as above")
def _(of: Folded) -> bool:
    copied = copy.deepcopy(of.model)
    of.backward(copied)
    of.backward()
    pairs = zip(of.model.parameters(), copied.parameters(), strict=True)
    return all(torch.equal(local_tensor(one.grad), local_tensor(other.grad)) for one, other in pairs)


@tool("`.to(dtype)`, `.half()`")
def _(of: Folded) -> bool:
    of.model.half()
    found = of.gathered()
    halved = all(torch.equal(found[name], of.whole[name].half()) for name in found)
    of.model.to(torch.float32)
    of.backward()
    foldpar.clip_grad_norm_(of.model, 1.0, of.groups)
    return halved and of.experts.down_proj.grad.dtype is torch.float32


@tool("`nn.init`")
def _(of: Folded) -> bool:
    def fill(tensors: dict[str, Tensor]) -> None:
        torch.manual_seed(3)
        for place, name in enumerate(of.whole):
            if place % 2:
                nn.init.normal_(tensors[name])
            else:
                nn.init.trunc_normal_(tensors[name], std=0.02)

    fill(dict(of.model.named_parameters()))
    fill(of.whole)
    return of.holds()


@tool("`resize_token_embeddings`", "resize before `fold_model`")
def _(of: Folded) -> bool:
    of.model.resize_token_embeddings(40, mean_resizing=False)
    found = gathered(of.model.get_input_embeddings().weight)
    of.backward()
    return torch.equal(found[:32], of.whole["model.embed_tokens.weight"]) and found.shape[0] == 40


@tool("`parameter.data = tensor`, `vector_to_parameters`", "`load_state_dict`, `parameter.copy_(dtensor)`")
def _(of: Folded) -> bool:
    for name, parameter in of.model.named_parameters():
        parameter.data = of.whole[name] * 2
    of.backward()
    return of.holds(2)


@tool("`parameter.data = other.data`, of DTensors", "`parameter.copy_(dtensor)`")
def _(of: Folded) -> bool:
    doubled = [parameter.detach() * 2 for parameter in of.model.parameters()]
    for parameter, other in zip(of.model.parameters(), doubled, strict=True):
        parameter.data = other.data
    of.backward()
    return of.holds(2)


@tool("`parameter.copy_(dtensor)`")
def _(of: Folded) -> bool:
    doubled = [parameter.detach() * 2 for parameter in of.model.parameters()]
    with torch.no_grad():
        for parameter, other in zip(of.model.parameters(), doubled, strict=True):
            parameter.copy_(other)
    return of.holds(2)


@tool("`broadcast`, `all_reduce` of parameters or gradients by hand", "`reduce_gradients`")
def _(of: Folded) -> bool:
    for parameter in of.model.parameters():
        dist.broadcast(parameter.data, 0)
    return of.holds()


@tool("`ZeroRedundancyOptimizer`", "`shard_model(stage=1)`")
def _(of: Folded) -> bool:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of what it imports

    of.backward()
    ZeroRedundancyOptimizer(of.model.parameters(), torch.optim.SGD, lr=0.1).step()
    return False


@tool("`FullyShardedDataParallel` (FSDP1)", "`shard_model`")
def _(of: Folded) -> bool:
    FullyShardedDataParallel(of.model, device_id=torch.device("cpu"))
    return False


@tool("`safetensors.torch.save_file`, `save_model`", "`foldpar.hf.export`")
def _(of: Folded) -> bool:
    save_file(of.model.state_dict(), f"{of.folder}.{of.groups.rank}.safetensors")
    return False


@tool("`tie_weights`")
def _(of: Folded) -> bool:
    of.model.tie_weights()
    return of.holds()


@tool("`torch.nn.utils.prune`", "prune, and `prune.remove`, before `fold_model`")
def _(of: Folded) -> bool:
    alone = nn.Module()
    alone.weight = nn.Parameter(of.whole[EXPERT].clone())
    prune.l1_unstructured(alone, "weight", 0.5)
    prune.l1_unstructured(of.experts, "gate_up_proj", 0.5)
    of.backward()
    return torch.equal(gathered(of.experts.gate_up_proj), alone.weight)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@tool("`parametrize` of experts", "a model that is not sharded")
def _(of: Folded) -> bool:
    own = local_tensor(of.experts.gate_up_proj.detach())
    own.mul_(2)
    of.backward()
    own.div_(2)
    want = gathered(of.experts.gate_up_proj.grad)
    parametrize.register_parametrization(of.experts, "gate_up_proj", Twice())
    of.backward()
    found = gathered(of.experts.parametrizations.gate_up_proj.original.grad)
    return torch.allclose(found, want * 2, rtol=1e-12)


@tool("pickling a model", "`state_dict()`, or the layout and a checkpoint")
def _(of: Folded) -> bool:
    pickle.dumps(of.model)
    return False


@tool("`torch.func.functional_call`", "a model that is not sharded")
def _(of: Folded) -> bool:
    want = of.model(input_ids=of.tokens()).logits
    given = {name: parameter.detach().clone() for name, parameter in of.model.named_parameters()}
    of.scale(0.0)
    return torch.equal(
        gathered(torch.func.functional_call(of.model, given, (), {"input_ids": of.tokens()}).logits), want
    )


@tool("`functional_call` with a whole model's tensors", "tensors like those of `named_parameters()`")
def _(of: Folded) -> bool:
    want = of.model(input_ids=of.tokens()).logits
    return torch.equal(torch.func.functional_call(of.model, of.whole, (), {"input_ids": of.tokens()}).logits, want)


@tool("`torch.compile`")
def _(of: Folded) -> bool:
    of.backward()
    want = {name: gathered(parameter.grad) for name, parameter in of.model.named_parameters()}
    compiled = torch.compile(of.model, backend="aot_eager")
    compiled.zero_grad()
    compiled(input_ids=of.tokens(), labels=of.tokens()).loss.backward()
    foldpar.reduce_gradients(of.model, of.groups)
    found = {name: gathered(parameter.grad) for name, parameter in of.model.named_parameters()}
    torch._dynamo.reset()
    return all(torch.allclose(found[name], want[name], rtol=1e-6, atol=1e-12) for name in want)


@tool("torch's `GradScaler`", "`foldpar.GradScaler`")
def _(of: Folded) -> bool:
    return scaled(of, torch.amp.GradScaler("cpu", init_scale=1024.0))


@tool("`ShardedGradScaler`", "`foldpar.GradScaler`")
def _(of: Folded) -> bool:
    return scaled(of, ShardedGradScaler("cpu", init_scale=1024.0))


@tool("`foldpar.GradScaler`")
def _(of: Folded) -> bool:
    return scaled(of, foldpar.GradScaler("cpu", groups=of.groups, init_scale=1024.0))


def scaled(of: Folded, scaler: Any) -> bool:
    """An overflow in one expert's gradient on one rank, behind the reduction; all ranks skip the step."""
    optimizer = torch.optim.SGD(foldpar.parameter_groups(of.model), lr=0.1)
    scaler.scale(of.model(input_ids=of.tokens(), labels=of.tokens()).loss).backward()
    foldpar.reduce_gradients(of.model, of.groups)
    if of.groups.rank == 1:
        local_tensor(of.experts.down_proj.grad).fill_(torch.inf)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() == 512.0 and of.holds()


@tool("`torch.optim.AdamW(model.parameters())`")
def _(of: Folded) -> bool:
    return stepped(of, list(of.model.parameters()))


@tool("`torch.optim.AdamW(model.parameters(), foreach=True)`", "`parameter_groups(model)`")
def _(of: Folded) -> bool:
    return stepped(of, list(of.model.parameters()), foreach=True)


@tool("`torch.optim.AdamW(foldpar.parameter_groups(model), fused=True)`")
def _(of: Folded) -> bool:
    return stepped(of, foldpar.parameter_groups(of.model), fused=True)


@tool("`torch.optim.SGD(..., fused=True)`", "`fused=False`")
def _(of: Folded) -> bool:
    return stepped(of, foldpar.parameter_groups(of.model), torch.optim.SGD, fused=True)


@tool("`torch.optim.LBFGS`", "an optimizer that takes parameters one by one")
def _(of: Folded) -> bool:
    of.backward()
    before = of.gathered()
    optimizer = torch.optim.LBFGS(of.model.parameters(), lr=0.1, max_iter=1)

    def closure() -> Tensor:
        of.backward()
        return torch.zeros(())

    optimizer.step(closure)
    return all(torch.equal(of.gathered()[name], tensor) for name, tensor in before.items())


@tool("`torch.autograd.grad`, its results put into `.grad`", "`backward()`")
def _(of: Folded) -> bool:
    of.backward()
    want = {name: gathered(parameter.grad).clone() for name, parameter in of.model.named_parameters()}
    of.model.zero_grad()
    loss = of.model(input_ids=of.tokens(), labels=of.tokens()).loss
    parameters = dict(of.model.named_parameters())
    for parameter, gradient in zip(parameters.values(), torch.autograd.grad(loss, parameters.values()), strict=True):
        parameter.grad = gradient
    foldpar.reduce_gradients(of.model, of.groups)
    return all(torch.allclose(gathered(parameters[name].grad), want[name], rtol=1e-12) for name in want)


@tool("deleting a layer", "delete it before `shard_model`")
def _(of: Folded) -> bool:
    layers = of.model.model.layers
    whole = tiny_model("qwen3_moe", dtype=torch.float64)
    del layers[1], whole.model.layers[1]
    of.backward()
    whole.zero_grad()
    for index in range(of.groups.dp_cp.size):
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(index))
        (whole(input_ids=tokens, labels=tokens).loss / of.groups.dp_cp.size).backward()
    found = {name: gathered(parameter.grad) for name, parameter in of.model.named_parameters()}
    return all(torch.allclose(found[name], each.grad, rtol=1e-9, atol=1e-12) for name, each in whole.named_parameters())


@tool("`torch.autograd.graph.save_on_cpu`")
def _(of: Folded) -> bool:
    return unchanged(of, torch.autograd.graph.save_on_cpu())


@tool("`torch.profiler`")
def _(of: Folded) -> bool:
    return unchanged(of, torch.profiler.profile(record_shapes=True, profile_memory=True))


def unchanged(of: Folded, around: AbstractContextManager[object]) -> bool:
    """Gradients are those of a step without it."""
    of.backward()
    want = {name: gathered(parameter.grad).clone() for name, parameter in of.model.named_parameters()}
    with around:
        of.backward()
    found = {name: gathered(parameter.grad) for name, parameter in of.model.named_parameters()}
    return all(torch.allclose(found[name], want[name], rtol=1e-12) for name in want)


@tool("an average by `torch._foreach_lerp_`", "`average.lerp_(parameter, weight)`, one by one")
def _(of: Folded) -> bool:
    average = [parameter.detach() * 3 for parameter in of.model.parameters()]
    torch._foreach_lerp_(average, [parameter.detach() for parameter in of.model.parameters()], 0.5)
    names = [name for name, _ in of.model.named_parameters()]
    return all(torch.allclose(gathered(each), of.whole[name] * 2) for name, each in zip(names, average, strict=True))


def stepped(of: Folded, parameters: Any, kind: type[Any] = torch.optim.AdamW, **options: Any) -> bool:
    """One step equals that of single tensors."""
    of.backward()
    want = {}
    for name, parameter in of.model.named_parameters():
        alone = nn.Parameter(of.whole[name].clone())
        alone.grad = gathered(parameter.grad)
        kind([alone], lr=0.1).step()
        want[name] = alone.detach()
    kind(parameters, lr=0.1, **options).step()
    found = of.gathered()
    return all(torch.allclose(found[name], want[name], rtol=1e-12) for name in found)


# ---------------------------------------------------------------------------------------------------------------------


def outcomes(layout: Layout, folder: str, names: list[str]) -> dict[str, str]:
    """On one rank: of each tool ``exact``, ``refused: why`` or ``WRONG``."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {}
    of_layout = foldpar.solve_layout(layout.world, tp=layout.tp, ep=layout.ep, etp=layout.etp, order=layout.order)
    apart = dist.new_group()
    with foldpar.create_groups(of_layout) as groups:
        original = tiny_model("qwen3_moe", dtype=torch.float64)
        for place, name in enumerate(names):
            model = copy.deepcopy(original)
            whole = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
            foldpar.fold_model(model, groups)
            if layout.stage:
                foldpar.shard_model(model, groups, stage=layout.stage)
            of = Folded(model, groups, whole, f"{folder}/{place}")
            try:
                found[name] = "exact" if TOOLS[name][0](of) else "WRONG"
            except Exception as error:
                found[name] = f"refused: {type(error).__name__}: {error}"
            check_in_step(name, apart)
    return found


def check_in_step(name: str, apart: dist.ProcessGroup) -> None:
    """Refused or not, a tool leaves every rank at the same collective of each group; asked over a group ``apart``."""
    mine = {
        (said, tuple(dist.get_process_group_ranks(group))): group._get_sequence_number_for_group()
        for group, said in {dist.group.WORLD: "world", **living_groups()}.items()
        if group is not None and group is not apart
    }
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine, group=apart)
    for key in {key for taken in of_ranks for key in taken}:
        taken = [of_rank.get(key) for rank, of_rank in enumerate(of_ranks) if rank in key[1]]
        assert len(set(taken)) == 1, f"after {name}, collectives over {key}: {taken}"


def outcomes_of_ranks(layout: Layout, folder: str, names: Collection[str] = TOOLS) -> dict[str, str]:
    """Of each tool; the same on every rank, and nothing but exact or refused."""
    ranks = run_ranks(outcomes, layout.world, layout, folder, list(names), timeout=300.0)
    found = {}
    for name in names:
        kinds = {rank[name].partition(":")[0] for rank in ranks}
        assert len(kinds) == 1 and kinds <= {"exact", "refused"}, (name, [rank[name][:300] for rank in ranks])
        found[name] = kinds.pop()
        assert found[name] == "exact" or TOOLS[name][1], (name, ranks[0][name][:300])
    return found


def table(columns: dict[str, dict[str, str]]) -> str:
    lines = [f"| tool | {' | '.join(columns)} | where refused, use |", "|---" * (len(columns) + 2) + "|"]
    for name, (_, instead) in TOOLS.items():
        cells = [columns[column][name] for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {instead if 'refused' in cells else ''} |")
    return "\n".join(lines) + "\n"


def column_of(layout: Layout) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    place = rows[0].index(str(layout))
    return {row[0]: row[place] for row in rows[1:]}


def check_column(found: dict[str, str], layout: Layout) -> None:
    """Torch before 2.13, with which the table is written, refuses more."""
    want = column_of(layout)
    assert want.keys() == TOOLS.keys()
    older = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    for name in found:
        assert found[name] == want[name] or (older and found[name] == "refused"), name


def test_the_table_of_tools_is_true(tmp_path: Path) -> None:
    check_column(outcomes_of_ranks(HALF, str(tmp_path), TOOLS.keys() - SLOW), COLUMNS[0])


@pytest.mark.long
@pytest.mark.parametrize("layout", COLUMNS, ids=str)
def test_every_column_is_true(layout: Layout, tmp_path: Path) -> None:
    check_column(outcomes_of_ranks(layout, str(tmp_path)), layout)


@pytest.mark.long
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_no_tool_is_silently_wrong_in_any_layout(layout: Layout, tmp_path: Path) -> None:
    outcomes_of_ranks(layout, str(tmp_path))


if __name__ == "__main__":
    head = PAGE.read_text().partition("| tool |")[0] if PAGE.exists() else ""
    with tempfile.TemporaryDirectory() as folder:
        found = {str(layout): outcomes_of_ranks(layout, f"{folder}/{place}") for place, layout in enumerate(COLUMNS)}
    PAGE.write_text(head + table(found))
