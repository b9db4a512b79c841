"""Tensor parallelism of the dense part of a model: the steps of a ``DensePlan``, executed.

Linear layers are torch's own (``parallelize_module``). Embeddings are cut by rows here, since torch's way gives them
gradients of the whole vocabulary, and what goes straight to the lane's heads gets its gradient summed.

Those modules change their class in place (``__class__``), as FSDP2's do. A new module beside or around them would lose
hooks, be missed by whoever refers to the old one (a tied head, a list of layers), or change names in ``state_dict``;
with a ``forward`` set on the instance, its type would not say what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from foldpar.comm import AxisGroup, FoldedGroups, all_reduce, copy_to_group, local_parts
from foldpar.families import DENSE_SHARDED
from foldpar.models.dense_plan import HEAD_COUNTS, DensePlan, DenseStep
from foldpar.parameters import mark_parameters

__all__ = ["OneHeadLinear", "VocabularyParallelEmbedding", "shard_dense"]


def shard_dense(model: nn.Module, plan: DensePlan, groups: FoldedGroups) -> None:
    """Shard in place; without communication, since every rank cuts its part out of what it holds."""
    if not plan.steps:
        return
    mesh = groups.mesh("dense")["tp"]
    shared: dict[int, nn.Parameter] = {}
    for step in plan.steps.values():
        _take(model, step, mesh, groups.tp, shared)
    for name in plan.by_heads:
        _count_own_heads(model.get_submodule(name), plan.steps.get(f"{name}.k_proj"), groups.tp.size)


def _count_own_heads(attention: nn.Module, keys: DenseStep | None, lanes: int) -> None:
    """Attributes that count heads: of the lane now; and how many heads share a key, where lanes share keys."""
    for attribute in HEAD_COUNTS:
        count = getattr(attention, attribute, None)
        if isinstance(count, int):
            setattr(attention, attribute, max(1, count // lanes))
    if keys is not None and keys.kind == "one_head":
        module: Any = attention
        heads_of_keys = module.k_proj.out_features // keys.width
        module.num_key_value_groups = module.num_key_value_groups * heads_of_keys // lanes


def _take(model: nn.Module, step: DenseStep, mesh: DeviceMesh, tp: AxisGroup, shared: dict[int, nn.Parameter]) -> None:
    parent_name, _, child = step.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if step.kind == "slice":
        whole = getattr(parent, child)
        own = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(parent, child, shared.setdefault(id(whole), nn.Parameter(own, requires_grad=whole.requires_grad)))
        mark_parameters(parent, DENSE_SHARDED, names=(child,))
        _read_own_part(parent, child)
        return
    module = getattr(parent, child)
    if step.kind == "rope":
        module.register_forward_hook(partial(_sum_gradient_of_last, tp, step.width))
        return
    if step.kind == "one_head":
        OneHeadLinear.use(module, step.width, tp)
        return
    before = dict(module.named_parameters(remove_duplicate=False))
    if step.kind == "vocabulary":
        VocabularyParallelEmbedding.cut(module, mesh, tp)
    else:
        styles: dict[str, ParallelStyle] = {
            "columns": ColwiseParallel(),
            "columns_gathered": ColwiseParallel(output_layouts=Replicate()),
            "rows": RowwiseParallel(),
            "rows_split": RowwiseParallel(input_layouts=Replicate()),
        }
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        parallelize_module(module, mesh, styles[step.kind], src_data_rank=None)
        for name in frozen:
            module.get_parameter(name).requires_grad_(False)
        if step.kind == "columns_gathered":
            module.register_forward_hook(_arrived)
    for name, whole in before.items():  # a parameter with two names stays one
        setattr(module, name, shared.setdefault(id(whole), module.get_parameter(name)))


def _read_own_part(module: nn.Module, name: str) -> None:
    """Let the module's forward, which knows nothing of DTensors, read this lane's part of its parameter."""

    def begin(module: nn.Module, arguments: object) -> None:
        vars(module)[name] = local_parts(module._parameters[name])[0]

    def end(module: nn.Module, arguments: object, output: object) -> None:
        vars(module).pop(name, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)


def _sum_gradient_of_last(tp: AxisGroup, width: int, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
    """Identity; the gradient of the last columns, which each lane's heads use on their own, is summed."""
    upper, last = output.split([output.shape[-1] - width, width], dim=-1)
    return torch.cat([upper, copy_to_group(last.contiguous(), tp)], dim=-1)


def _arrived(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
    """Wait for a gathered output that perhaps nobody reads, such as the logits of a prompt that has ended.

    With gradients, hand it on as a tensor of its own: DTensor's is a view, and FSDP2 warns of models that return one.
    """
    if torch.is_grad_enabled():
        return cast(Tensor, cast(Any, _OfItsOwn).apply(output))
    wait: Callable[[], Tensor] | None = getattr(output, "wait", None)
    return output if wait is None else wait()


class _OfItsOwn(Function):
    """Identity, without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class VocabularyParallelEmbedding(nn.Embedding):
    """An embedding whose rows, the vocabulary, are cut over the lanes: ``[...]`` ids to ``[..., dim]`` on every lane.

    The weight is a DTensor, sharded on dimension 0.

    Backward:
        The arriving gradient must be equal on all lanes; each lane's rows get theirs, without communication.

    Source: Shoeybi et al. 2019, section 3.
    """

    tp: AxisGroup

    @classmethod
    def cut(cls, embedding: nn.Embedding, mesh: DeviceMesh, tp: AxisGroup) -> None:
        """Turn an embedding into this, in place, so that it keeps its hooks and whoever refers to it."""
        whole = embedding.weight
        weight = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
        embedding.weight = nn.Parameter(weight, requires_grad=whole.requires_grad)
        embedding.__class__ = cls
        embedding.tp = tp  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        own = input - self.tp.index * weight.shape[0]
        here = (own >= 0) & (own < weight.shape[0])
        rows = F.embedding(torch.where(here, own, 0), weight)
        return all_reduce(rows.masked_fill(~here[..., None], 0), self.tp, backward="identity")


class OneHeadLinear(nn.Linear):
    """A projection to fewer heads than there are lanes: every lane holds all of it and computes the head it uses.

    ``[..., in_features]`` on every lane to ``[..., width]``; with 2 heads and 4 lanes, lanes 0 and 1 use the first.

    Backward:
        The gradient of the input is summed over the lanes. That of the weight is the lane's part, zero for other heads:
        its family is ``REPLICATED_PARTIAL``.
    """

    tp: AxisGroup
    own: slice

    @classmethod
    def use(cls, linear: nn.Linear, width: int, tp: AxisGroup) -> None:
        """Turn a linear layer into this, in place."""
        head = tp.index * (linear.out_features // width) // tp.size
        linear.__class__ = cls
        setattr(linear, "tp", tp)  # noqa: B010 - to a type checker it still is an nn.Linear
        setattr(linear, "own", slice(head * width, (head + 1) * width))  # noqa: B010

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[self.own]
        return F.linear(copy_to_group(input, self.tp), self.weight[self.own], bias)
