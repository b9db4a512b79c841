"""The one-sided journey of rows: ranks read each other's memory, and the host need not wait for sizes.

    publish rows, ids, weights | barrier | read all ids, place, read rows -> experts
    experts -> publish sums    | barrier | read and add up the sums

It moves what ``messages`` moves: every row once per destination, already summed over that rank's experts
on the way back; slices of an expert (ETP) are destinations of their own. In the backward the two halves change places.

**Who decides.** Whether ranks can read each other's memory, they agree on once, before the first forward. Before each
forward the hosts of the group tell each other how many tokens they route, through a word of memory they share
(:class:`~foldpar.comm.host_meeting.HostMeeting`), and all take the largest; a rank that has to send messages tells a
number that is larger than all others. Whatever follows is a function of that number and of what is equal on all ranks,
so all of them go the same way, make new memory in the same forward, or send messages: more tokens than the bound allows
are no error. No device is asked.

**Room.** How many rows come to a rank's experts, only the device knows. Where those that can come beyond the balanced
number are few (:data:`UNASKED` bytes), there is room for all. Else the host asks the device, once a forward; or the
user has said how much room there is (``slack``), and then what finds none is not written, and a flag is set that
``check_room`` reads before the gradients are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import Function

from foldpar.comm import FoldedGroups, PeerMemory, memories_of, once_differentiable, why_no_peers
from foldpar.errors import ShapeError
from foldpar.moe.kernels.permutation import Places
from foldpar.moe.recomputation import unseen_by_modes
from foldpar.moe.transport.messages import MOST_LISTED

__all__ = [
    "OneSided",
    "OneSidedPlan",
    "OneSidedWay",
    "RowExchange",
    "Sharing",
    "as_expected",
    "combine_one_sided",
    "dispatch_one_sided",
]

_ALIGNED = 256

UNASKED = 2**27
"""Bytes of rows that may not come for which there is room without being asked; experts need about four times that."""


_SUMMED = (torch.bfloat16, torch.float16, torch.float32, None)

_IN_MESSAGES = 2**40 - 1
"""More tokens than any rank has."""


@dataclass(frozen=True, slots=True)
class RowExchange:
    """The shape of an exchange, equal on all ranks: what one rank publishes, and where it lies in its memory.

    No rank routes more than ``max_tokens`` tokens of ``[dim]`` with ``top_k`` experts each in this forward. In the
    other half lie the sums that a rank offers: for every rank as many rows as that may have tokens.
    """

    ranks: int
    max_tokens: int
    dim: int
    top_k: int
    dtype: torch.dtype

    @property
    def slots(self) -> int:
        """How many different rows can come to a rank."""
        return self.ranks * self.max_tokens

    def halves(self) -> tuple[int, int]:
        """The bytes of what is published, and of the sums."""
        at = _offsets(self, 0)
        return at["rows_end"], at["end"]

    def offsets(self, sums_at: int) -> dict[str, int]:
        """Byte offsets of the parts in a memory whose second half begins at ``sums_at``."""
        return _offsets(self, sums_at)

    def most(self, local_experts: int) -> int:
        """How many expert-major rows can come to a rank."""
        return self.slots * min(self.top_k, local_experts)


@lru_cache(maxsize=64)
def _offsets(exchange: RowExchange, sums_at: int) -> dict[str, int]:
    row, choices = exchange.dim * exchange.dtype.itemsize, exchange.top_k * 4
    tokens, slots = exchange.max_tokens, exchange.slots
    first = _laid({"header": 4, "ids": tokens * choices, "weights": tokens * choices, "rows": tokens * row}, 0)
    second = _laid({"sums": slots * row, "weight_sums": slots * choices}, sums_at)
    return {**first, "rows_end": first["end"], **second}


def _laid(sizes: dict[str, int], at: int) -> dict[str, int]:
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = at
        at += -(-size // _ALIGNED) * _ALIGNED
    return {**offsets, "end": at}


@dataclass(frozen=True, slots=True)
class OneSided:
    """That the rows of a layer may travel one-sided: through memory that GPUs share.

    Args:
        max_tokens: the most tokens of a rank and forward that do, for which memory is made at once. More tokens on any
            rank, and all ranks send messages in that forward. ``None``: memory grows with what comes.
        slack: how many times the balanced number of rows a rank's experts have room for, ``math.inf`` for all that
            can come; the host then never waits, and rows that find no room are left out, of which ``reduce_gradients``
            tells by raising. ``None``: there is room for all rows, always; where more than 128 MiB of them may not
            come, the host waits once a forward to learn how many did.
        most_bytes: the most memory that a rank shares, for all layers of the same groups together, up to whole MiB.
            Tokens that would need more travel in messages. Memory that grew stays, and doubles where the bound allows
            it; with ``max_tokens`` it is made once.
    """

    max_tokens: int | None = None
    slack: float | None = None
    most_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name in ("max_tokens", "most_bytes"):
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                what = "tokens" if name == "max_tokens" else "bytes"
                raise ValueError(f"{name} = {value!r} is not a number of {what}; it is 1 or more.")
        if self.slack is not None and not self.slack >= 1:
            raise ValueError(f"slack = {self.slack!r} must be 1 or more: 1 is room for perfectly balanced routing.")

    def refusal(self, dtype: torch.dtype | None, device: torch.device) -> str | None:
        """Why no such rows travel one-sided, whatever the other ranks have; ``None`` if they may."""
        if dtype not in _SUMMED:
            return f"the rows are {dtype}, and the kernels add up in float32"
        return why_no_peers(device)

    def most_tokens(self, ranks: int, dim: int, top_k: int, dtype: torch.dtype) -> int:
        """How many tokens a rank may route within the bound."""
        few, many = (sum(RowExchange(ranks, tokens, dim, top_k, dtype).halves()) for tokens in (0, 1024))
        within = max(0, (self.most_bytes - few - 5 * _ALIGNED) * 1024 // (many - few))
        return within if self.max_tokens is None else min(within, self.max_tokens)

    def way(
        self,
        tokens: int,
        dtype: torch.dtype,
        dim: int,
        top_k: int,
        groups: FoldedGroups,
        num_experts: int,
        device: torch.device,
        *,
        needs_sizes: bool,
        in_messages: str | None = None,
    ) -> OneSidedWay | str:
        """The memory, the exchange and the room for the rows of a forward; or why they travel in messages instead.

        ``tokens`` are those that this rank routes; the hosts of the group meet, and the answer is the same on all of
        them. ``needs_sizes``: no row may hold nothing, so the host has to learn how many there are. ``in_messages``:
        why this rank has to send messages, so that all of them do.
        """
        if dtype not in _SUMMED or device.type != "cuda":  # the same on all ranks, and whether GPUs can is agreed on
            reason = self.refusal(dtype, device)
            if reason is not None:
                return in_messages or reason
        memories = memories_of(groups, device, ask=False)
        if memories is None:
            with unseen_by_modes():
                memories = memories_of(groups, device, ask=True)
            assert memories is not None
        if memories.hosts is None:
            return in_messages or memories.reason or ""
        largest = memories.hosts.largest(tokens if in_messages is None else _IN_MESSAGES)
        if largest == _IN_MESSAGES:
            return in_messages or "another rank has to send messages"
        ranks = groups.ep_etp.size
        if largest > (most := self.most_tokens(ranks, dim, top_k, dtype)):
            return f"a rank routes {largest} tokens, and there is to be memory for {most}"
        exchange = RowExchange(ranks, max(largest, 1), dim, top_k, dtype)
        reserved = exchange if self.max_tokens is None else replace(exchange, max_tokens=max(most, 1))
        memory: PeerMemory | str | None = memories.fitting(reserved.halves())
        if memory is None:
            with unseen_by_modes():
                memory = memories.holding(reserved.halves(), self.most_bytes)
        if isinstance(memory, str):
            return memory
        room = None if needs_sizes else self._room(exchange, groups, num_experts // groups.ep.size)
        if room is None and _capturing():
            raise ShapeError(
                "A CUDA graph is being captured of a layer whose experts need to know how many rows came: biases, or "
                "experts of another kind than GroupedExperts."
            )
        return OneSidedWay(memory, exchange, room)

    def _room(self, exchange: RowExchange, groups: FoldedGroups, local: int) -> int | None:
        """For how many expert-major rows; ``None``: for as many as come."""
        most, balanced = exchange.most(local), exchange.max_tokens * exchange.top_k * groups.etp.size
        capturing = _capturing()
        if self.slack is not None:
            room = min(most, int(min(most, self.slack * balanced)) + 1)
            # Without gradients nobody reads the flag that tells of missing room.
            return room if room == most or torch.is_grad_enabled() or capturing else None
        unsure = (most - balanced) * exchange.dim * exchange.dtype.itemsize
        return most if capturing or (unsure <= UNASKED and not _are_large(local, most)) else None

    def waits_beyond(self, groups: FoldedGroups, dim: int, top_k: int, local: int, dtype: torch.dtype) -> int | None:
        """From how many tokens of a rank on the host waits for how many rows came, whatever the experts; ``None``: it
        does not.
        """
        unsure = groups.ep_etp.size * min(top_k, local) - groups.etp.size * top_k
        if self.slack is not None or unsure <= 0:
            return None
        return UNASKED // (unsure * dim * dtype.itemsize)


Sharing: TypeAlias = OneSided | Literal[False] | None
"""What a layer is told about one-sided rows: how, not at all, or nothing."""


def as_expected(one_sided: Sharing) -> OneSided | None:
    """For ``foldpar.arguments.expect``, which takes a value of a kind."""
    return None if one_sided is False else one_sided


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _are_large(local: int, room: int) -> bool:
    """Whether the products of these experts are so few and large that plain ones, for which the host has to wait, pay.

    Mixtral-8x7B on an H200, 8,192 rows an expert: 24.7 ms of plain products, 26.3 of grouped ones.
    """
    return local <= MOST_LISTED and room >= 8192 * local


@dataclass(frozen=True, slots=True, eq=False)
class OneSidedWay:
    """The memory that rows pass through, the shape of the exchange, and the room for rows at this rank's experts.

    ``room`` is ``None`` where it is made for as many as come, for which the host waits.
    """

    memory: PeerMemory
    exchange: RowExchange
    room: int | None


@dataclass(frozen=True, slots=True, eq=False)
class OneSidedPlan:
    """Where the rows of one forward go; it travels from dispatch to combine. All tables stay on the device.

    Attributes:
        ids: ``[tokens, top_k]``, int32: the experts of this rank's tokens, -1 where an assignment is not active.
        places: ``[slots, top_k]``, slots by rank and token: for every assignment its expert-major row here; -1: its
            expert is not here, -2: no room.
        ends: ``[local experts]``, int32: ends of the groups of expert-major rows.
        sizes: of the groups, where the host waited for them.
        room: how many expert-major rows there are; those from ``ends[-1]`` on hold nothing.
        apart: where rows arrive once for all their copies, ``[slots, dim]``, and their weights ``[slots, top_k]``: how
            they are read there. ``None``: they arrive by expert, ``[room, dim]`` and ``[room]``.
        etp: how many slices an expert has.
    """

    memory: PeerMemory
    exchange: RowExchange
    ids: Tensor
    places: Tensor
    ends: Tensor
    sizes: tuple[int, ...] | None
    room: int
    apart: Places | None
    etp: int

    @property
    def arriving(self) -> int:
        """How many rows arrive."""
        return self.room if self.apart is None else self.exchange.slots


def dispatch_one_sided(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    way: OneSidedWay,
    *,
    num_experts: int,
    etp: int = 1,
    reads_places: bool = False,
) -> tuple[Tensor, Tensor, OneSidedPlan]:
    """Bring rows and weights to their experts: ``[tokens, dim]`` to ``[room, dim]``, ``[room]``, and the plan.

    The ranks of the memory are ``etp`` slices of one part of the experts after those of another. With ``reads_places``
    rows arrive once, ``[slots, dim]``, where their copies would take more memory, and weights ``[slots, top_k]``; then
    ``plan.apart`` says how they are read.

    Backward:
        As that of :func:`foldpar.moe.transport.messages.dispatch_weighted`. With ``etp > 1`` every slice gives its
        summand.

    Raises:
        ShapeError: an active id is illegal, on every rank, where the host waits for sizes anyway; else a flag is set.
    """
    plan, rows, row_weights = cast(Any, _Dispatch).apply(
        x.contiguous(), weights.contiguous(), ids, mask, way, num_experts, etp, reads_places
    )
    return rows, row_weights, plan


def combine_one_sided(rows: Tensor, plan: OneSidedPlan) -> Tensor:
    """Bring weighted expert outputs back and sum them: ``[plan.arriving, dim]`` to ``[tokens, dim]``.

    Where rows arrived once for all their copies, ``rows`` are sums over the copies.

    Backward:
        The gradient of a token to each of its rows.
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
        etp: int,
        reads_places: bool,
    ) -> tuple[OneSidedPlan, Tensor, Tensor]:
        from foldpar.moe.kernels import triton_peers as peer_kernels

        memory, exchange = way.memory, way.exchange
        at, local = exchange.offsets(memory.halves[0]), num_experts * etp // exchange.ranks
        memory.begin("rows")
        own = (
            memory.own[:4].view(torch.int32),
            memory.own[at["rows"] : at["rows_end"]].view(exchange.dtype),
            memory.own[at["weights"] : at["rows"]].view(torch.float32),
            memory.own[at["ids"] : at["weights"]].view(torch.int32),
        )
        mask = None if mask is None else mask.contiguous()
        kept = peer_kernels.publish_routed(x, weights, ids.contiguous(), mask, own, num_experts)
        memory.barrier()
        room, sizes = exchange.most(local) if way.room is None else way.room, None
        places, ends = peer_kernels.place_rows(
            memory.addresses, at["ids"], exchange.max_tokens, exchange.top_k, memory.group.index // etp * local, local,
            room, memory.flags,
        )  # fmt: skip
        if way.room is None:
            room, sizes = _learned(ends, memory, num_experts)
        if reads_places and room > exchange.slots:
            even = -(-room // 4) * 4  # 16 bytes
            tables = ids.new_zeros((2, even), dtype=torch.int32)  # behind the last row too it is one that can be read
            apart = Places(source=tables[0, :room], slots=tables[1, :room], copies=places, ends=ends)
            arriving, weights_of = exchange.slots, places.shape
        else:
            apart, arriving, weights_of = None, room, torch.Size([room])
        rows = x.new_empty((arriving, exchange.dim))
        row_weights = x.new_empty(weights_of, dtype=torch.float32)
        peer_kernels.read_rows(memory.addresses, at["rows"], at["weights"], places, rows, row_weights, apart)
        ctx.plan = OneSidedPlan(memory, exchange, kept, places, ends, sizes, room, apart, etp)
        ctx.dtype_of_weights = weights.dtype
        return ctx.plan, rows, row_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_weights = _bring_back(grad_rows, grad_weights, ctx.plan)
        return grad, grad_weights.to(ctx.dtype_of_weights), *[None] * 6


def _learned(ends: Tensor, memory: PeerMemory, num_experts: int) -> tuple[int, tuple[int, ...] | None]:
    """How many rows came, and to each of few experts: the one time that the host waits."""
    *last, illegal = torch.cat([ends if len(ends) <= MOST_LISTED else ends[-1:], memory.flags[2:]]).tolist()
    if illegal:
        memory.flags.zero_()
        raise ShapeError(
            f"An expert id was outside [0, {num_experts}) on a rank of {memory.group.ranks}. Mask assignments that "
            f"should not travel instead of giving them an id out of range."
        )
    sizes = tuple(end - start for start, end in zip([0, *last], last, strict=False))
    return last[-1], sizes if len(ends) <= MOST_LISTED else None


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
        memory, at = plan.memory, plan.exchange.offsets(plan.memory.halves[0])
        memory.begin("rows")
        peer_kernels.publish(grad.contiguous(), memory.own[at["rows"] : at["rows_end"]].view(plan.exchange.dtype))
        memory.barrier()
        rows = grad.new_empty((plan.arriving, plan.exchange.dim))
        peer_kernels.read_rows(memory.addresses, at["rows"], None, plan.places, rows, None, plan.apart)
        return rows, None


def _bring_back(rows: Tensor, weights: Tensor | None, plan: OneSidedPlan) -> tuple[Tensor, Any]:
    from foldpar.moe.kernels import triton_peers as peer_kernels

    memory, exchange = plan.memory, plan.exchange
    at = exchange.offsets(memory.halves[0])
    memory.begin("sums")
    sums = memory.own[at["sums"] : at["weight_sums"]].view(exchange.dtype)
    weight_sums = memory.own[at["weight_sums"] : at["end"]].view(torch.float32)
    together = plan.apart is not None
    peer_kernels.offer_sums(rows.contiguous(), weights, plan.places, sums, weight_sums, together=together)
    memory.barrier()
    tokens, top_k = plan.ids.shape
    out = rows.new_empty((tokens, exchange.dim))
    out_weights = None if weights is None else rows.new_empty((tokens, top_k), dtype=torch.float32)
    peer_kernels.take_sums(
        memory.addresses, at["sums"], at["weight_sums"], plan.ids, memory.group.index * exchange.max_tokens,
        plan.ends.shape[0], plan.etp, out, out_weights,
    )  # fmt: skip
    return out, out_weights
