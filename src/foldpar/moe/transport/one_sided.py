"""The one-sided journey of rows: ranks read each other's memory, and the host waits for nothing.

    publish rows, ids, weights | barrier | read all ids, place, read rows -> experts
    experts -> publish sums    | barrier | read and add up the sums

It moves what ``messages`` moves: every row once per destination, already summed over that rank's experts
on the way back. But sizes stay on the device, so nothing can be allocated by them: the buffer of rows at the experts
has room for a stated number. What finds no room is not written, and a flag is set that ``check_room`` reads before the
gradients are used. In the backward the two halves change places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from foldpar.comm import FoldedGroups, PeerMemory, known_memory_of, memory_of, why_no_peers
from foldpar.errors import ShapeError

__all__ = [
    "OneSided",
    "OneSidedPlan",
    "OneSidedWay",
    "RowExchange",
    "combine_one_sided",
    "dispatch_one_sided",
]

_ALIGNED = 256


@dataclass(frozen=True, slots=True)
class RowExchange:
    """The shape of an exchange, equal on all ranks: what one rank publishes, and where it lies in its buffer.

    ``max_tokens`` tokens of ``[dim]`` with ``top_k`` experts each may be routed by one rank in one forward. Behind them
    lie the sums that a rank offers: for every rank as many rows as that may have tokens, the exact worst case.
    """

    ranks: int
    max_tokens: int
    dim: int
    top_k: int
    dtype: torch.dtype

    def offsets(self) -> dict[str, int]:
        """Byte offsets of the parts; ``"end"`` is the size of the buffer."""
        tokens, rows = self.max_tokens, self.ranks * self.max_tokens
        sizes = {
            "header": 4,
            "ids": tokens * self.top_k * 4,
            "weights": tokens * self.top_k * 4,
            "rows": tokens * self.dim * self.dtype.itemsize,
            "sums": rows * self.dim * self.dtype.itemsize,
            "weight_sums": rows * self.top_k * 4,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += math.ceil(size / _ALIGNED) * _ALIGNED
        return {**offsets, "end": at}

    def room(self, local_experts: int, slack: float) -> int:
        """How many rows fit at one rank's experts: ``slack`` times the balanced number, or all that can ever come."""
        most = self.ranks * self.max_tokens * min(self.top_k, local_experts)
        return int(min(most, slack * self.max_tokens * self.top_k + 1))


@dataclass(frozen=True, slots=True)
class OneSided:
    """That the rows of a layer may travel one-sided, and how much room there is for them.

    ``max_tokens``: the most tokens that any rank routes in one forward. ``slack``: how many times the balanced number
    of rows a rank's experts have room for.
    """

    max_tokens: int
    slack: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens!r} is not a number of tokens; it is 1 or more.")
        if not self.slack >= 1:
            raise ValueError(f"slack = {self.slack!r} must be 1 or more: 1 is room for perfectly balanced routing.")

    def refusal(self, groups: FoldedGroups) -> str | None:
        """Why no rows travel one-sided in this layout, on whatever devices; ``None`` if they may."""
        if groups.etp.size > 1:
            return f"etp = {groups.etp.size}, and slices of an expert share rows in messages"
        return None

    def way(
        self,
        dtype: torch.dtype | None,
        dim: int,
        top_k: int,
        groups: FoldedGroups,
        num_experts: int,
        *,
        device: torch.device,
        ask: bool,
    ) -> OneSidedWay | str | None:
        """The memory, the exchange and the room for such rows; or why they travel in messages instead.

        The answer follows from what is equal on all ranks of the group, so it is the same on all of them. With ``ask``
        the first time is a meeting of the group. Without, the answer is ``None`` as long as nobody has asked; so it is
        for a dtype that is not known yet.
        """
        if dtype not in (torch.bfloat16, torch.float16, torch.float32, None):
            return f"the rows are {dtype}, and the kernels add up in float32"
        exchange = RowExchange(groups.ep.size, self.max_tokens, dim, top_k, dtype or torch.float32)
        local = num_experts // groups.ep.size
        room = exchange.room(local, self.slack)
        if not torch.is_grad_enabled() and room < exchange.room(local, math.inf):
            return "without gradients nobody reads the flag that tells of missing room"
        if (reason := why_no_peers(device)) is not None:
            return reason
        size = exchange.offsets()["end"]
        memory = memory_of(groups, size, device) if ask else known_memory_of(groups, size, device)
        if memory is None or isinstance(memory, str):
            return memory
        return None if dtype is None else OneSidedWay(memory, exchange, room)


@dataclass(frozen=True, slots=True, eq=False)
class OneSidedWay:
    """The memory that rows pass through, the shape of the exchange, and the room for rows at this rank's experts."""

    memory: PeerMemory
    exchange: RowExchange
    room: int


@dataclass(frozen=True, slots=True, eq=False)
class OneSidedPlan:
    """Where the rows of one forward go; it travels from dispatch to combine. All of it stays on the device.

    Attributes:
        ids: ``[tokens, top_k]``, int32: the experts of this rank's tokens, -1 where an assignment is not active.
        places: ``[ranks * max_tokens, top_k]``: for every slot of every rank its expert-major row here; -1: its expert
            is not here, -2: no room.
        ends: ``[local experts]``, int32: ends of the groups of expert-major rows.
        room: how many expert-major rows there are; those from ``ends[-1]`` on hold nothing.
    """

    memory: PeerMemory
    exchange: RowExchange
    ids: Tensor
    places: Tensor
    ends: Tensor
    room: int


def dispatch_one_sided(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    way: OneSidedWay,
    *,
    num_experts: int,
) -> tuple[Tensor, Tensor, OneSidedPlan]:
    """Bring rows and weights to their experts: ``[tokens, dim]`` to ``[room, dim]``, ``[room]``, and the plan.

    Backward:
        As that of :func:`foldpar.moe.transport.messages.dispatch_weighted`.

    Raises:
        ShapeError: more tokens than the exchange was made for.
    """
    if x.shape[0] > way.exchange.max_tokens:
        raise ShapeError(
            f"This rank routes {x.shape[0]} tokens, but one_sided=OneSided(max_tokens={way.exchange.max_tokens}): the "
            f"buffers of all ranks have room for that many. Give OneSided the most tokens of any rank and forward."
        )
    plan, rows, row_weights = cast(Any, _Dispatch).apply(
        x.contiguous(), weights.contiguous(), ids, mask, way, num_experts
    )
    return rows, row_weights, plan


def combine_one_sided(rows: Tensor, plan: OneSidedPlan) -> Tensor:
    """Bring weighted expert outputs back and sum them: ``[room, dim]`` to ``[tokens, dim]``.

    Backward:
        The gradient of a token to each of its expert-major rows.
    """
    return cast(Tensor, cast(Any, _Combine).apply(rows.to(plan.exchange.dtype), plan))


class _Dispatch(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        way: OneSidedWay,
        num_experts: int,
    ) -> tuple[OneSidedPlan, Tensor, Tensor]:
        from foldpar.moe.kernels import triton_peers as peer_kernels

        memory, exchange, room = way.memory, way.exchange, way.room
        at, local = exchange.offsets(), num_experts // exchange.ranks
        memory.begin("rows")
        own = (
            memory.own[:4].view(torch.int32),
            memory.own[at["rows"] : at["sums"]].view(exchange.dtype),
            memory.own[at["weights"] : at["rows"]].view(torch.float32),
            memory.own[at["ids"] : at["weights"]].view(torch.int32),
        )
        mask = None if mask is None else mask.contiguous()
        kept = peer_kernels.publish_routed(x, weights, ids.contiguous(), mask, own, memory.flags, num_experts)
        memory.barrier()
        places, ends = peer_kernels.place_rows(
            memory.addresses, at["ids"], exchange.max_tokens, exchange.top_k, memory.group.index * local, local, room,
            memory.flags,
        )  # fmt: skip
        rows, row_weights = x.new_empty((room, exchange.dim)), x.new_empty(room, dtype=torch.float32)
        peer_kernels.read_rows(memory.addresses, at["rows"], at["weights"], places, rows, row_weights)
        ctx.plan, ctx.local = OneSidedPlan(memory, exchange, kept, places, ends, room), local
        ctx.dtype_of_weights = weights.dtype
        return ctx.plan, rows, row_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_weights = _bring_back(grad_rows, grad_weights, ctx.plan)
        return grad, grad_weights.to(ctx.dtype_of_weights), *[None] * 4


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: OneSidedPlan) -> Tensor:
        ctx.plan = plan
        return _bring_back(rows, None, plan)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from foldpar.moe.kernels import triton_peers as peer_kernels

        plan: OneSidedPlan = ctx.plan
        memory, at = plan.memory, plan.exchange.offsets()
        memory.begin("rows")
        peer_kernels.publish(grad.contiguous(), memory.own[at["rows"] : at["sums"]].view(plan.exchange.dtype))
        memory.barrier()
        rows = grad.new_empty((plan.room, plan.exchange.dim))
        peer_kernels.read_rows(memory.addresses, at["rows"], None, plan.places, rows, None)
        return rows, None


def _bring_back(rows: Tensor, weights: Tensor | None, plan: OneSidedPlan) -> tuple[Tensor, Any]:
    from foldpar.moe.kernels import triton_peers as peer_kernels

    memory, exchange, at = plan.memory, plan.exchange, plan.exchange.offsets()
    memory.begin("sums")
    sums = memory.own[at["sums"] : at["weight_sums"]].view(exchange.dtype)
    weight_sums = memory.own[at["weight_sums"] : at["end"]].view(torch.float32)
    peer_kernels.offer_sums(rows.contiguous(), weights, plan.places, sums, weight_sums)
    memory.barrier()
    tokens, top_k = plan.ids.shape
    out = rows.new_empty((tokens, exchange.dim))
    out_weights = None if weights is None else rows.new_empty((tokens, top_k), dtype=torch.float32)
    peer_kernels.take_sums(
        memory.addresses, at["sums"], at["weight_sums"], plan.ids, memory.group.index * exchange.max_tokens,
        plan.ends.shape[0], out, out_weights,
    )  # fmt: skip
    return out, out_weights
