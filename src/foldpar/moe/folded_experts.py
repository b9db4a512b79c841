"""``FoldedExperts``: the routed experts of a layer whose routing is somebody else's.

    hidden_states, top_k_index, top_k_weights -> own rows -> plan -> dispatch -> experts -> combine -> exit -> y

It is what :class:`foldpar.FoldedMoE` does after its router, and both share ``Journey``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foldpar.arguments import expect
from foldpar.comm import FoldedGroups
from foldpar.errors import ShapeError
from foldpar.moe.counters import LayerCounters
from foldpar.moe.experts import ExpertShare
from foldpar.moe.kernels.grouped import in_autocast_dtype
from foldpar.moe.lane_checks import LaneChecks
from foldpar.moe.lanes import Lanes, LaneState
from foldpar.moe.recomputation import in_backward, unseen_by_modes
from foldpar.moe.routing.router import Routing, without_tokens
from foldpar.moe.transport.journey import Journey
from foldpar.moe.transport.messages import Partition
from foldpar.moe.transport.one_sided import OneSided, Sharing, as_expected
from foldpar.moe.transport.whole import BALANCED, WholeJourney, uncompiled, why_uncompiled
from foldpar.parameters import computes_in_own_dtype

__all__ = ["FoldedExperts", "check_device_and_dtype", "rows_for"]

_WHAT_ENTERS = "What enters the experts"


class FoldedExperts(ExpertShare):
    """This rank's share of a layer's experts, called with all tokens and their routing, as Hugging Face calls experts.

    A block that computes its own routing keeps its forward, its router and its shared experts, and holds this in place
    of its experts; :func:`foldpar.fold_model` does that. Parameters, arguments and ``from_dense`` are those of
    :class:`foldpar.GroupedExperts`. Call it on every rank of the stage, also with zero tokens: every forward is a
    meeting of the expert group.

    Args:
        lanes: ``"replicated"``: the lanes of a TP group bring the same tokens and the same routing, and share the work.
            ``"sharded"``: every lane brings its own tokens.
        partition: how replicated lanes share the work: by ``"tokens"``, a contiguous slice each, or by
            ``"assignments"``, evenly per expert, for which all lanes must have routed alike, bit by bit.
        counters: where to count what this layer moves, a :class:`LayerCounters`.
        one_sided: how rows travel through memory that GPUs share, as in :class:`foldpar.FoldedMoE`.
        check: when to compare what is taken on trust, as in :class:`foldpar.FoldedMoE`.
        call: ``(folded, *arguments) -> output``, for blocks that call their experts in another way: what this module is
            called with goes there, and ``folded`` is :meth:`routed`.

    Backward:
        On replicated lanes the gradient that arrives must be equal on all lanes, and so are those of
        ``hidden_states`` and ``top_k_weights``: a router in front of it sees all tokens on every lane, and its family
        is ``ROUTER_ALL_TOKENS``. On sharded lanes a lane gets the gradients of its own tokens.

    Raises:
        ShapeError: as :class:`foldpar.GroupedExperts`; in forward, tensors that do not fit each other or the experts.
        ValueError: arguments that contradict each other.

    Source: as :class:`foldpar.FoldedMoE`.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        groups: FoldedGroups,
        *,
        lanes: Lanes = "replicated",
        partition: Partition = "tokens",
        counters: LayerCounters | None = None,
        one_sided: Sharing = None,
        check: bool | None = None,
        call: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> None:
        expect("FoldedExperts", one_sided=(as_expected(one_sided), (OneSided, type(None))))
        super().__init__(num_experts, dim, hidden_dim, groups, **options)
        self.call = call
        self.without_data = False
        """All tokens are padding; set by :func:`foldpar.lockstep`."""
        self.decisions: Tensor | None = None
        """Assignments per expert in training since the last :func:`foldpar.update_correction_bias`, int64."""
        self.counts_decisions = False
        """Count them; set by :func:`foldpar.fold_model` where a block has a correction bias."""
        self.lane_state = LaneState(groups, lanes, partition=partition)
        self.checks = LaneChecks(self.lane_state, check)
        self.journey = Journey(self.lane_state, self, counters=counters, one_sided=one_sided)
        self._whole = WholeJourney(
            self.journey, self.product, self.checks, self, _WHAT_ENTERS, ("hidden_states", "top_k_weights")
        )

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """:meth:`routed`, called directly or by way of ``call``."""
        if self.call is None:
            routed: Tensor = self.routed(*arguments, **keywords)
            return routed
        return self.call(self.routed, *arguments, **keywords)

    def routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, dim]`` to ``[tokens, dim]``: the weighted sum of each token's experts.

        ``top_k_index`` is ``[tokens, top_k]``, global expert ids, and ``top_k_weights`` goes with it.
        """
        self._check_inputs(hidden_states, top_k_index, top_k_weights)
        if not torch.compiler.is_compiling():
            return self._in_steps(hidden_states, top_k_index, top_k_weights)
        why = BALANCED if self.counts_decisions else why_uncompiled(self.journey, self)
        if why is not None:
            return uncompiled(why, self._in_steps, hidden_states, top_k_index, top_k_weights)
        own = self._whole.own
        routing = self._routing(own(top_k_index), own(_wide(top_k_weights, hidden_states)))
        y = self._whole(self, own(hidden_states), routing, hidden_states, top_k_weights, tokens=hidden_states.shape[0])
        return y.to(hidden_states.dtype)

    def _in_steps(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        checked = self.checks.due(hidden_states)
        if checked:
            self.checks.entering(self, _WHAT_ENTERS, {"hidden_states": hidden_states, "top_k_weights": top_k_weights})
        rows, ids = self.journey.ends.own(hidden_states), self.lane_state.own(top_k_index)
        routing = self._routing(ids, self.journey.ends.own(_wide(top_k_weights, hidden_states)))
        if checked:
            self.checks.routing(routing)
        if self.counts_decisions and self.training and not in_backward():
            self._count(routing)
        y = self.journey(self.compute, rows, routing, tokens=hidden_states.shape[0])
        self.checks.leaving(y)
        return y.to(hidden_states.dtype)

    def _routing(self, ids: Tensor, weights: Tensor) -> Routing:
        return without_tokens(Routing(ids, weights)) if self.without_data else Routing(ids, weights)

    def _count(self, routing: Routing) -> None:
        ids = routing.ids.detach().long()
        ones = torch.ones_like(ids) if routing.mask is None else routing.mask.long()
        with unseen_by_modes():
            if self.decisions is None or self.decisions.device != ids.device:
                with torch.inference_mode(False):  # a tensor of inference could not be counted on in training
                    self.decisions = torch.zeros(self.num_experts, dtype=torch.int64, device=ids.device)
            self.decisions.scatter_add_(0, ids.clamp(0, self.num_experts - 1).flatten(), ones.flatten())

    @property
    def counters(self) -> LayerCounters | None:
        """Where this layer counts what it moves."""
        return self.journey.counters

    def explain(self) -> str:
        """What happens to rows on this rank, and why."""
        lines = self.journey.explain(*rows_for(self), top_k=1)
        return "\n".join([f"FoldedExperts on rank {self.groups.rank}", self.journey.ends.why, *lines])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lanes={self.lane_state.lanes!r}, partition={self.lane_state.partition!r}"

    def _check_inputs(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        expect(
            "FoldedExperts",
            hidden_states=(hidden_states, Tensor),
            top_k_index=(top_k_index, Tensor),
            top_k_weights=(top_k_weights, Tensor),
        )
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.dim:
            raise ShapeError(f"FoldedExperts takes [tokens, dim = {self.dim}], and got {list(hidden_states.shape)}.")
        if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != hidden_states.shape[:1]:
            raise ShapeError(
                f"top_k_index and top_k_weights must both be [tokens, top_k] for the {hidden_states.shape[0]} token(s) "
                f"of hidden_states, and are {list(top_k_index.shape)} and {list(top_k_weights.shape)}."
            )
        check_device_and_dtype(hidden_states, self)


def _wide(weights: Tensor, rows: Tensor) -> Tensor:
    """Weights of a narrower dtype than the rows lose digits where parts of their gradient are added up."""
    return weights.to(torch.promote_types(weights.dtype, rows.dtype))


def rows_for(experts: object) -> tuple[torch.dtype | None, torch.device]:
    """The dtype and the device of rows that the experts take here and now; ``None`` where the dtype cannot be told."""
    weight = _some_parameter(experts)
    if weight is None or not isinstance(experts, nn.Module):
        return None, torch.device("cpu")
    if not computes_in_own_dtype(experts, weight):
        return None, weight.device
    return in_autocast_dtype(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype, weight.device


def _some_parameter(experts: object) -> nn.Parameter | None:
    """The first one; a look into the whole module takes ten times as long, in every forward."""
    if not isinstance(experts, nn.Module):
        return None
    own = next((each for each in experts._parameters.values() if each is not None), None)
    return next(experts.parameters(), None) if own is None else own


def check_device_and_dtype(x: Tensor, experts: object) -> None:
    """Raise a ``ShapeError`` where the input does not go with the experts' parameters."""
    weight = _some_parameter(experts)
    if weight is None or (x.device == weight.device and x.dtype == weight.dtype):
        return
    if not isinstance(experts, nn.Module) or not computes_in_own_dtype(experts, weight):
        return
    if x.device != weight.device:
        raise ShapeError(f"The input is on {x.device} and the experts on {weight.device}; put them on one device.")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ShapeError(
            f"The input is {x.dtype} and the experts are {weight.dtype}; convert one, or use torch.autocast."
        )
