"""``GradientReducer``: the reduction of ``reduce_gradients``, started while backward still runs.

    backward   gradients of bucket 0 | gradients of bucket 1 | gradients of bucket 2 |
    network                          | sum bucket 0 ....     | sum bucket 1 ....     | sum bucket 2 ....
    finish()                                                                         | the rest, wait, copy back

Ranks may differ in the order in which gradients become ready, and in which parameters get any. So nothing that a rank
waits for depends on either: buckets are cut before the first backward and leave in one order, no hook waits for another
rank, and the communicators carry nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from foldpar.arguments import expect, expect_sizes
from foldpar.comm import FoldedGroups, all_gather, start_all_reduce
from foldpar.errors import FamilyError, ShardingError
from foldpar.gradients.buckets import PackedBucket, Piece, PieceCutter, scale, settle
from foldpar.gradients.reduce import BUCKET_BYTES, check_rooms, parameters_to_reduce
from foldpar.layout import FoldedLayout, Order, solve_layout
from foldpar.parameters import ResolvedParameter, check_before_reduction, compare_in_stage, refuse_reduced, stamp

__all__ = ["GradientReducer"]


class GradientReducer:
    """Reduce gradients by family as :func:`foldpar.reduce_gradients` does, overlapped with backward.

    Gradients are packed into buckets, last layers first. During the last backward of a step a bucket starts to travel
    as soon as all its gradients are complete and the buckets before it have left; :meth:`finish` sends the rest, waits,
    and writes the sums into ``.grad``. Until then no gradient is touched: what travels is a copy, so all gradients are
    held twice for that long.

    Example, with four micro-batches a step::

        reducer = foldpar.GradientReducer(model, groups)
        for step in range(steps):
            with reducer.no_sync():
                for batch in micro_batches[:3]:
                    (loss_of(model, batch) / 4).backward()
            (loss_of(model, micro_batches[3]) / 4).backward()      # buckets leave while this runs
            reducer.finish()                                       # instead of reduce_gradients
            foldpar.clip_grad_norm_(model, 1.0, groups)
            optimizer.step()
            model.zero_grad()
        reducer.close()

    Make it on every rank, once the parameters are those that will be trained: it makes communicators of its own, and
    hooks stay on the parameters until :meth:`close`. It can be used in a ``with`` statement. A parameter that some rank
    leaves out of a step, or that is never used, holds its bucket and those after it back until :meth:`finish`.

    Args:
        model, groups, loss, reduce_dtype, check: as for :func:`foldpar.reduce_gradients`.
        bucket_bytes: a bucket is closed before it would exceed this size.

    Raises:
        FamilyError, GroupsError, ValueError: when it is made, see :func:`foldpar.reduce_gradients`. ReplicaError:
            when it is made: ranks differ in dtypes, in what is frozen, or in these arguments; later: in their replicas.
            ShardingError: the model is sharded. RuntimeError: in backward, see :meth:`no_sync`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: FoldedGroups,
        *,
        loss: Literal["mean", "sum"] = "mean",
        reduce_dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        check: bool | None = None,
    ) -> None:
        expect_sizes("GradientReducer", bucket_bytes=bucket_bytes)
        expect(
            "GradientReducer",
            model=(model, nn.Module),
            groups=(groups, FoldedGroups),
            reduce_dtype=(reduce_dtype, (torch.dtype, type(None))),
        )
        self._model, self._groups, self._check = model, groups, check
        self._cutter = PieceCutter(loss, reduce_dtype, groups)
        parameters = parameters_to_reduce(model, groups)
        _refuse_shards(parameters)
        if check is not False:  # buckets travel in the first backward
            compare_in_stage(
                model, groups, {"loss": loss, "reduce_dtype": str(reduce_dtype), "bucket_bytes": str(bucket_bytes)}
            )
        device = parameters[0].parameter.device if parameters else torch.device("cpu")
        self._given = parameters  # with the groups of the layers, where rows travel
        self._own_groups = _twins(groups, [entry.groups for entry in parameters], device)
        self._parameters = [
            ResolvedParameter(entry.name, entry.parameter, entry.family, self._own_groups[entry.groups.layout])
            for entry in parameters
        ]
        pieces = [(entry, self._cutter.without_gradient(entry)) for entry in self._parameters]
        self._at_home = [entry for entry, piece in pieces if not piece.travels]
        self._dtypes = {entry.name: piece.dtype for entry, piece in pieces}
        self._buckets = _cut([(entry, piece) for entry, piece in pieces if piece.travels], bucket_bytes)
        self._syncs = True
        self._start_over()
        self._hooks = [
            entry.parameter.register_post_accumulate_grad_hook(self._hook(entry, place))
            for place, bucket in enumerate(self._buckets)
            for entry in bucket
        ]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here only accumulate; for all of a step but the last.

        A gradient that grows after its bucket has left raises, in that backward: the sum on its way would lack the
        rest. That happens when a step has two backward passes and the first was not in here, when :meth:`finish` was
        forgotten, or when reentrant checkpointing gives a parameter its gradient in several parts.
        """
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    @torch.no_grad()
    def finish(self) -> None:
        """Make every ``.grad`` the gradient of the step's loss. Call it once a step, on every rank, after backward.

        Ranks may differ in what they computed: one that ran no backward at all takes part with zeros.

        Raises:
            FamilyError: a parameter that requires a gradient was not there, or was frozen, when this was made.
            ReplicaError: parameters differ between replicas, see ``check`` of :func:`foldpar.reduce_gradients`.
            GradientError: these very gradients were reduced before, here or by ``reduce_gradients``; they stay so.
            ShapeError: rows that travelled one-sided found no room; no gradient is touched then, and the next step
                starts anew.
        """
        self._check_parameters()
        while len(self._travelling) < len(self._buckets):
            self._send_next()
        # Buckets that have met over the lanes go on over the data axis, in the same order on all ranks.
        waits = []
        for packed, wait in self._travelling:
            if packed.lane is not None:
                wait()
                wait = start_all_reduce(packed.flat, packed.data)
            waits.append(wait)
        travelled = [packed for packed, _ in self._travelling]
        for wait in waits:
            wait()
        self._start_over()
        check_before_reduction(self._model, self._groups, self._check, {})  # now that every rank has come
        check_rooms(self._given)
        if self._groups.layout.world > 1:
            refuse_reduced((entry.name, entry.parameter) for entry in self._parameters)
        for packed in travelled:
            packed.unpack()
        at_home = [self._cutter.piece(entry) for entry in self._at_home]
        scale([(piece.gradient, piece.factor) for piece in at_home])
        for entry in self._parameters:
            settle(entry.parameter)
        stamp(entry.parameter for entry in self._parameters)

    def close(self) -> None:
        """Take the hooks off and destroy the communicators; call it on every rank. Repeating it does nothing."""
        for hook in self._hooks:
            hook.remove()
        for groups in self._own_groups.values():
            groups.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_over(self) -> None:
        self._travelling: list[tuple[PackedBucket, Callable[[], None]]] = []
        self._incomplete = [{id(entry.parameter) for entry in bucket} for bucket in self._buckets]

    def _hook(self, entry: ResolvedParameter, place: int) -> Callable[[Tensor], None]:
        def gradient_is_complete(parameter: Tensor) -> None:
            if place < len(self._travelling):
                raise RuntimeError(
                    f"The gradient of {entry.name} grew after its bucket had left. Of a step's backward passes, all "
                    f"but the last belong in 'with reducer.no_sync():', and reducer.finish() comes after the last. If "
                    f"reentrant checkpointing gives this parameter its gradient in parts, use "
                    f"checkpoint(..., use_reentrant=False)."
                )
            # A DTensor gradient that has to be placed anew needs communication, for which there is time in finish().
            if self._syncs and self._cutter.is_placed(entry):
                self._incomplete[place].discard(id(parameter))
                while len(self._travelling) < len(self._buckets) and not self._incomplete[len(self._travelling)]:
                    self._send_next()

        return gradient_is_complete

    @torch.no_grad()
    def _send_next(self) -> None:
        # Ranks with a gradient and ranks without one need one dtype, so it is that of the beginning.
        packed = PackedBucket(
            [
                replace(self._cutter.piece(entry), dtype=self._dtypes[entry.name])
                for entry in self._buckets[len(self._travelling)]
            ]
        )
        if packed.lane is not None:
            self._travelling.append((packed, start_all_reduce(packed.over_lanes, packed.lane)))
        else:
            self._travelling.append((packed, start_all_reduce(packed.flat, packed.data)))

    def _check_parameters(self) -> None:
        known = {id(entry.parameter) for entry in self._parameters}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise FamilyError(
                    f"{name} requires a gradient, but it was frozen or another tensor when this GradientReducer was "
                    f"made, so its gradient would not be reduced. Close the reducer and make a new one after changing "
                    f"which parameters are trained."
                )


def _refuse_shards(parameters: list[ResolvedParameter]) -> None:
    shards = [entry.name for entry in parameters if entry.sharded]
    if shards:
        raise ShardingError(
            f"{shards[0]} and {len(shards) - 1} other parameter(s) were sharded by shard_model, and FSDP2 sums their "
            f"gradients while backward runs: a GradientReducer would sum them again. Call reduce_gradients after "
            f"backward, which does what remains, and accumulate(model) for micro-batches."
        )


def _cut(pieces: list[tuple[ResolvedParameter, Piece]], bucket_bytes: int) -> list[list[ResolvedParameter]]:
    """Buckets in the order in which they leave: by the parameter that is expected last, the first one of the model.

    Pieces with and without a lane reduction never share a bucket, so that the latter are done in one sum, and so that
    lanes whose shards are uneven still cut those alike that they exchange.
    """
    buckets: list[list[ResolvedParameter]] = []
    growing: dict[object, list[ResolvedParameter]] = {}
    filled: dict[object, int] = {}
    for entry, piece in reversed(pieces):
        kind = (piece.kind, piece.lane is None)
        size = piece.values.numel() * piece.dtype.itemsize
        if kind not in growing or filled[kind] + size > bucket_bytes:
            growing[kind], filled[kind] = [], 0
            buckets.append(growing[kind])
        growing[kind].append(entry)
        filled[kind] += size
    place_of = {entry.name: place for place, (entry, _) in enumerate(pieces)}
    return sorted(buckets, key=lambda bucket: place_of[bucket[-1].name], reverse=True)


def _twins(groups: FoldedGroups, used: list[FoldedGroups], device: torch.device) -> dict[FoldedLayout, FoldedGroups]:
    """For every layout of the model, groups with communicators that nothing else uses."""
    given = groups.layout
    layouts = {other.layout for other in used if other.layout != given}
    folds = sorted((layout.ep, layout.etp, layout.cp, layout.order == "consecutive") for layout in layouts)
    if groups.pp.size > 1:  # stages may hold different layers, but all ranks of the world make the same groups
        count = max(all_gather(torch.tensor(len(folds), device=device), groups.pp).tolist())
        padded = torch.tensor([*folds, *[(0, 0, 0, 0)] * (count - len(folds))], device=device).view(count, 4)
        of_stages = all_gather(padded, groups.pp).view(-1, 4).tolist()
        folds = sorted({(ep, etp, cp, bool(consecutive)) for ep, etp, cp, consecutive in of_stages if ep})
    twins = {given: groups.twin()}
    for ep, etp, cp, consecutive in folds:
        order: Order = "consecutive" if consecutive else "tp-lane-major"
        layout = solve_layout(given.world, tp=given.tp, pp=given.pp, ep=ep, etp=etp, cp=cp, order=order)
        twins[layout] = groups.twin(layout)
    return twins
