"""Tensor parallelism of the dense part of a model: the steps of a ``DensePlan``, executed.

Linear layers are torch's own (``parallelize_module``). Embeddings are cut by rows here, since torch's way gives them
gradients of the whole vocabulary, and what goes straight to the lane's heads gets its gradient summed.

Those modules change their class in place (``__class__``), as FSDP2's do. A new module beside or around them would lose
hooks, be missed by whoever refers to the old one (a tied head, a list of layers), or change names in ``state_dict``;
with a ``forward`` set on the instance, its type would not say what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from foldpar.comm import (
    AxisGroup,
    FoldedGroups,
    all_gather_rows,
    all_reduce,
    copy_to_group,
    distributed_parameter,
    is_dtensor,
    local_parts,
    local_tensor,
)
from foldpar.errors import ModelError
from foldpar.families import DENSE_SHARDED, REPLICATED_PARTIAL
from foldpar.models.dense_plan import HEAD_COUNTS, DensePlan, DenseStep
from foldpar.models.meta_copy import forward_hooks
from foldpar.parameters import mark_parameters, mark_placement

__all__ = ["LaneCut", "OneHeadLinear", "PartialInputsLinear", "VocabularyParallelEmbedding", "lane_cut", "shard_dense"]

_CUT = "_foldpar_lane_cut"


@dataclass(frozen=True, slots=True)
class LaneCut:
    """What :func:`shard_dense` made of a module: what its input and output are on a lane."""

    step: DenseStep
    tp: AxisGroup
    mesh: DeviceMesh
    inputs: int
    outputs: int

    @property
    def is_inside(self) -> bool:
        """Whether only its inside is cut: it takes and gives what is whole on every lane."""
        return self.step.kind in ("columns_gathered", "rows_split", "vocabulary")

    def fit_pair(self, first: nn.Linear, second: nn.Linear) -> None:
        """Let ``second(first(x))``, two layers beside the module, take and give what the module does.

        A whole weight of which the lane uses its part has gradients that are parts of a sum; a weight made for the
        lane's columns is the lane's own.
        """
        kind, lanes = self.step.kind, self.tp.size
        if kind == "rope":
            second.register_forward_hook(partial(_sum_gradient_of_last, self.tp, self.step.width))
        elif kind == "one_head":
            self._use_part(second, self.step.width)
        elif kind == "columns" and second.out_features == self.outputs:
            self._use_part(second, self.outputs // lanes)
        elif kind == "rows" and first.in_features == self.inputs:
            PartialInputsLinear.use(first, self.tp)
            mark_parameters(first, REPLICATED_PARTIAL)
        elif kind in ("columns", "columns_gathered") and second.out_features * lanes == self.outputs:
            LaneColumnsLinear.use(second, self.tp, gather=kind == "columns_gathered")
            self._is_own(second, 0)
        elif kind in ("rows", "rows_split") and first.in_features * lanes == self.inputs:
            PartialInputsLinear.use(first, self.tp, split=kind == "rows_split")
            self._is_own(first, 1)

    def _use_part(self, linear: nn.Linear, width: int) -> None:
        OneHeadLinear.use(linear, width, self.tp)
        mark_parameters(linear, REPLICATED_PARTIAL)

    def _is_own(self, linear: nn.Linear, dim: int) -> None:
        """A plain tensor here, and a DTensor wherever it could be taken for a whole one."""
        mark_placement(mark_parameters(linear, DENSE_SHARDED), dim)
        linear.register_state_dict_post_hook(partial(_as_dtensors, self.mesh, dim))
        linear.register_load_state_dict_pre_hook(_as_parts)


def _as_dtensors(mesh: DeviceMesh, dim: int, linear: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in linear.named_parameters(recurse=False):
        if is_dtensor(parameter):
            raise ModelError(
                f"{prefix}{name} is a lane's part of an adapter, which shard_model has sharded over data ranks too, so "
                f"state_dict() has no way to show it. foldpar.save_checkpoint saves it; or call get_peft_model before "
                f"fold_model, which leaves adapters whole on every lane."
            )
        if prefix + name in state:
            state[prefix + name] = distributed_parameter(parameter, mesh, (dim,), requires_grad=False)


def _as_parts(linear: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in linear.named_parameters(recurse=False):
        if prefix + name in state and not is_dtensor(parameter):
            state[prefix + name] = local_tensor(state[prefix + name])


def lane_cut(module: nn.Module) -> LaneCut | None:
    """What a module is on a lane, if it is cut over the lanes."""
    cut: LaneCut | None = getattr(module, _CUT, None)
    return cut


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
        setattr(parent, child, _in_place_of(whole, nn.Parameter(own, requires_grad=whole.requires_grad), shared))
        mark_parameters(parent, DENSE_SHARDED, names=(child,))
        _read_own_part(parent, child)
        return
    module = getattr(parent, child)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        outputs, inputs = module.weight.shape
        setattr(module, _CUT, LaneCut(step, tp, mesh, inputs, outputs))
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
        hooks = list(forward_hooks(module))
        parallelize_module(module, mesh, styles[step.kind], src_data_rank=None)
        for name in frozen:
            module.get_parameter(name).requires_grad_(False)
        if step.kind == "columns_gathered":
            module.register_forward_hook(_arrived)
        for hook in hooks:  # behind those that make the output what it was
            forward_hooks(module).move_to_end(hook)
    for name, whole in before.items():
        setattr(module, name, _in_place_of(whole, module.get_parameter(name), shared))


def _in_place_of(whole: nn.Parameter, own: nn.Parameter, shared: dict[int, nn.Parameter]) -> nn.Parameter:
    """A parameter with two names stays one, and keeps what a loop or an optimizer noted on it."""
    kept = shared.setdefault(id(whole), own)
    vars(kept).update(vars(whole))
    return kept


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
        (weight,) = local_parts(self.weight)
        assert weight is not None
        own = input - self.tp.index * weight.shape[0]
        here = (own >= 0) & (own < weight.shape[0])
        known = (input >= 0) & (input < self.num_embeddings)
        # What no lane has, none looks up: torch says so, on every lane.
        rows = F.embedding(own.masked_fill(~here, 0).masked_fill(~known, weight.shape[0]), weight)
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


class PartialInputsLinear(nn.Linear):
    """A layer that takes the lane's own columns, ``[..., in / tp]`` on each, to ``[..., out]`` summed over the lanes.

    A lane holds its columns of the weight, or all of them and uses its own. With ``split``, the input is whole and
    every lane takes its columns.

    Backward:
        The arriving gradient must be equal on all lanes. That of a whole weight is the lane's part, zero for columns of
        others: its family is ``REPLICATED_PARTIAL``. That of a split input is summed over the lanes.
    """

    tp: AxisGroup
    split: bool

    @classmethod
    def use(cls, linear: nn.Linear, tp: AxisGroup, *, split: bool = False) -> None:
        """Turn a linear layer without a bias into this, in place."""
        assert linear.bias is None
        linear.__class__ = cls
        setattr(linear, "tp", tp)  # noqa: B010 - to a type checker it still is an nn.Linear
        setattr(linear, "split", split)  # noqa: B010

    def forward(self, input: Tensor) -> Tensor:
        if self.split:
            input = _own_columns(copy_to_group(input, self.tp), self.tp)
        weight = self.weight
        if weight.shape[1] != input.shape[-1]:
            weight = _own_columns(weight, self.tp)
        return all_reduce(F.linear(input, weight), self.tp, backward="identity")


def _own_columns(x: Tensor, tp: AxisGroup) -> Tensor:
    width = x.shape[-1] // tp.size
    return x[..., tp.index * width : (tp.index + 1) * width]


class LaneColumnsLinear(nn.Linear):
    """A layer of which every lane holds its own columns: ``[..., in]`` on every lane to ``[..., out / tp]``.

    With ``gather``, the columns of all lanes are put together again: ``[..., out]``.

    Backward:
        The gradient of the input is summed over the lanes; gathered columns must get equal gradients on all lanes.
    """

    tp: AxisGroup
    gather: bool

    @classmethod
    def use(cls, linear: nn.Linear, tp: AxisGroup, *, gather: bool) -> None:
        """Turn a linear layer into this, in place."""
        linear.__class__ = cls
        setattr(linear, "tp", tp)  # noqa: B010 - to a type checker it still is an nn.Linear
        setattr(linear, "gather", gather)  # noqa: B010

    def forward(self, input: Tensor) -> Tensor:
        own = super().forward(copy_to_group(input, self.tp))
        if not self.gather:
            return own
        columns = all_gather_rows(own.flatten(0, -2).T.contiguous(), self.tp, backward="slice")
        return columns.T.view(*own.shape[:-1], -1)
