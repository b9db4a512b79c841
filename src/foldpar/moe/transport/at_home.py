"""The journey of rows that stay, for a compiler: where one rank has all experts whole, all sizes are known before.

    rows, weights, ids -> places -> experts -> y, and what the backward wants
    grad, what it wants -> gradients

Two operators, each from tensors to tensors: nothing is kept behind them, and no autograd runs within.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foldpar.moe.experts import ExpertProduct
from foldpar.moe.kernels import grouped, products
from foldpar.moe.kernels.permutation import copy_rows, place_experts, put_back, runs_on_triton, sum_copies
from foldpar.moe.lanes import LaneState
from foldpar.moe.operators import UNCAPTURED, behind, refuse_twice, stand_in
from foldpar.moe.routing.router import Routing
from foldpar.moe.transport.messages import MOST_LISTED, Arriving, check_all_placed

__all__ = ["AtHome", "are_at_home"]


def are_at_home(state: LaneState, experts: int, parameters: Sequence[Tensor | None], routing: Routing) -> bool:
    """Whether :class:`AtHome` takes them: the lanes share nothing, no assignment is masked, no sizes are wanted."""
    alone = state.groups.tp.size == state.groups.ep_etp.size == 1
    unbiased = all(each is None for each in parameters[2:])
    return alone and routing.mask is None and experts > MOST_LISTED and unbiased


class AtHome:
    """Rows and their routing to all experts of this rank and back, as two operators.

    Args:
        product: what the experts compute; without biases.
        told: called with each routing before anything is computed, with gradients on or off as outside.
    """

    def __init__(self, product: ExpertProduct, told: Callable[[Tensor, Routing], None]) -> None:
        self.handle = stand_in((product, told))

    def __call__(self, rows: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        """``[tokens, dim]`` to the same; the experts' weights as products take them.

        Backward:
            Of the rows, the routing weights and the experts' weights; once differentiable.
        """
        given = (rows, routing.weights, gate_up_proj, down_proj)
        needed = [torch.is_grad_enabled() and each.requires_grad for each in given]
        y: Tensor = torch.ops.foldpar.at_home(given, routing.ids, self.handle, needed)[0]
        return y

    def __deepcopy__(self, memo: object) -> AtHome:
        return self


torch.library.define(
    "foldpar::at_home", "(Tensor[] given, Tensor ids, Tensor handle, bool[] needed) -> Tensor[]", tags=UNCAPTURED
)
torch.library.define(
    "foldpar::at_home_backward",
    "(Tensor grad, Tensor[] given, Tensor[] kept, Tensor handle, bool[] needed) -> Tensor[]",
    tags=UNCAPTURED,
)


@dataclass(frozen=True, slots=True)
class _Computed:
    """Which kernels compute it; found again in the backward from the same tensors."""

    given: Sequence[Tensor]
    tables: Sequence[Tensor]
    product: ExpertProduct

    @property
    def by_own_kernels(self) -> bool:
        rows, _, first, down = self.given
        many = self.tables[0].shape[0]
        return products.takes(rows, first, down, many, self.product.activation, plain=not self.interleaved)

    @property
    def interleaved(self) -> bool:
        return self.product.storage.interleaved

    def copied(self) -> tuple[Tensor, Tensor]:
        """The rows and the weight of every assignment."""
        source, slots, _, _ = self.tables
        return copy_rows(self.given[0], source), self.given[1].flatten().index_select(0, slots)

    def forward(self) -> tuple[Tensor, Tensor]:
        rows, weights, first, down = self.given
        source, slots, copies, ends = self.tables
        if self.by_own_kernels:
            return products.forward(rows, weights, first, down, ends, source, slots, copies)[:2]
        rows, weights = self.copied()
        outputs, gate_up = grouped.forward(
            rows, weights, first, down, None, None,
            groups=grouped.Groups(ends), activation=self.product.activation, interleaved=self.interleaved,
        )  # fmt: skip
        return sum_copies(outputs, copies), gate_up

    def backward(self, grad: Tensor, gate_up: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        rows, weights, first, down = self.given
        source, slots, copies, ends = self.tables
        if self.by_own_kernels:
            tables = (ends, source, slots, copies)
            return products.backward(grad, rows, weights, first, down, *tables, gate_up=gate_up, needed=needed)
        rows, weights = self.copied()
        of_rows, of_weights, of_first, of_down, *_ = grouped.backward(
            copy_rows(grad, source), rows, weights, first, down, None, None, gate_up=gate_up, needed=needed,
            groups=grouped.Groups(ends), activation=self.product.activation, interleaved=self.interleaved,
        )  # fmt: skip
        assert of_weights is not None
        return None if of_rows is None else sum_copies(of_rows, copies), put_back(of_weights, copies), of_first, of_down


@torch.library.impl("foldpar::at_home", "CompositeExplicitAutograd")
def _run(given: Sequence[Tensor], ids: Tensor, handle: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    (product, told), (rows, weights, first, down) = behind(handle), given
    with torch.set_grad_enabled(any(needed)):
        told(rows, Routing(ids, weights))
    with torch.no_grad():
        slots, source, copies, ends, _ = place_experts(ids.long().contiguous(), first.shape[0], ids.numel())
        placed = Arriving(ends[-1:])
        tables = torch.cat([source, slots, copies.flatten(), ends.to(source.dtype)])  # no output may lie in another
        given = (rows.contiguous(), weights.contiguous(), first, down)
        y, gate_up = _Computed(given, (source, slots, copies, ends), product).forward()
        check_all_placed(placed, ids.numel(), first.shape[0])  # now that the device has enough to do
    return [y, tables, gate_up]


def _like_run(given: Sequence[Tensor], ids: Tensor, handle: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    rows, _, first, _ = given
    experts, columns, _ = first.shape
    kind = torch.int32 if runs_on_triton(ids) else torch.int64
    assignments = ids.shape[0] * ids.shape[1]
    tables = ids.new_empty(3 * assignments + experts, dtype=kind)
    return [rows.new_empty(rows.shape), tables, rows.new_empty((assignments, columns))]


@torch.library.impl("foldpar::at_home_backward", "CompositeExplicitAutograd")
def _run_backward(
    grad: Tensor, given: Sequence[Tensor], kept: Sequence[Tensor], handle: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    (rows, weights, first, down), (joined, gate_up) = given, kept
    source, slots, copies, ends = joined.split([*[gate_up.shape[0]] * 3, first.shape[0]])
    tables = (source, slots, copies.view(weights.shape), ends.to(torch.int32))
    # An activation of the model's own is differentiated by autograd, which the dispatcher has switched off below.
    with torch.inference_mode(False), torch.no_grad():
        given = (rows.contiguous(), weights.contiguous(), first, down)
        product, _ = behind(handle)
        grads = _Computed(given, tables, product).backward(grad.contiguous(), gate_up, needed)
    return [
        tensor.new_empty(0) if each is None or not need else each.contiguous()
        for each, tensor, need in zip(grads, given, needed, strict=True)
    ]


def _like_run_backward(
    grad: Tensor, given: Sequence[Tensor], kept: Sequence[Tensor], handle: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape if need else 0) for tensor, need in zip(given, needed, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given, _, handle, ctx.needed = inputs
    ctx.many = len(given)
    ctx.save_for_backward(*given, handle, *output[1:])


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    *given, handle = ctx.saved_tensors[: ctx.many + 1]
    kept = ctx.saved_tensors[ctx.many + 1 :]
    found = torch.ops.foldpar.at_home_backward(grads[0], given, kept, handle, ctx.needed)
    return [each if need else None for each, need in zip(found, ctx.needed, strict=True)], None, None, None


torch.library.register_fake("foldpar::at_home", _like_run)
torch.library.register_fake("foldpar::at_home_backward", _like_run_backward)
torch.library.register_autograd("foldpar::at_home", _backward, setup_context=_save)
torch.library.register_autograd("foldpar::at_home_backward", refuse_twice)
