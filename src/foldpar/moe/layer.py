"""``FoldedMoE``: a Mixture-of-Experts layer on the ranks of a folded layout.

    x -> own rows -> route -> plan -> dispatch -> experts -> combine -> exit -> y      (+ shared experts on x)

The two ends of the layer are a conjugate pair, chosen once from what the lanes hold and from what gradient arrives
(:func:`~foldpar.moe.lane_ends.lane_ends`); everything between them is the same for every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from foldpar.arguments import expect
from foldpar.comm import FoldedGroups, even_row_counts
from foldpar.errors import ArgumentError, GroupsError, ShapeError
from foldpar.families import (
    ParameterFamily,
    Reduction,
)
from foldpar.moe.counters import LayerCounters
from foldpar.moe.experts import ExpertShare, GroupedExperts
from foldpar.moe.folded_experts import check_device_and_dtype, rows_for
from foldpar.moe.kernels.activations import Activation
from foldpar.moe.lane_checks import LaneChecks
from foldpar.moe.lanes import LaneGradients, Lanes, LaneState
from foldpar.moe.routing.capacity import Capacity, limit_capacity
from foldpar.moe.routing.randomness import random_region
from foldpar.moe.routing.router import Router, Routing, check_routing, takes_padding, without_tokens
from foldpar.moe.transport.journey import Experts, Journey
from foldpar.moe.transport.messages import Partition
from foldpar.moe.transport.one_sided import OneSided, Sharing, as_expected
from foldpar.moe.transport.whole import LIMITED, RANDOM, WholeJourney, uncompiled, why_uncompiled
from foldpar.parameters import families_seen_from, mark_children
from foldpar.wording import not_dividing, some

_WHAT_ENTERS = "What enters a FoldedMoE"


class FoldedMoE(nn.Module):
    """A Mixture-of-Experts layer whose experts fold over the ranks of the dense layers.

    Takes and returns ``[..., dim]``. Any model code can hold it in place of its dense feed-forward layer; call it on
    every rank of the stage, also with zero tokens.

    Args:
        router: a :class:`Router`; called with the rows that this lane routes.
        experts: this rank's experts, usually :class:`GroupedExperts` on the same ``groups``.
        groups: from :func:`create_groups`.
        shared: shared experts, called with the layer's input on every lane and added to its output.
        lanes: ``"replicated"``: the lanes of a TP group hold the same tokens and share the work. ``"sharded"``: every
            lane brings its own tokens (sequence parallelism), in any number.
        lane_grads: for replicated lanes, the state of the gradient that arrives at the output and leaves at the input.
            ``"replicated"``: equal on all lanes. ``"partial"``: the lanes' gradients add up to it; possible only
            where nothing TP-sharded lies below, since a partial gradient cannot pass such a layer. ``"post-hoc"``:
            the lanes' gradients average to it, as those do that are equal on all lanes; the exit sums them, and the
            surplus factor ``tp`` is divided out of parameter gradients later. For hosts that work like this; exact
            only with nothing TP-sharded below or inside, and :func:`foldpar.reduce_gradients` refuses the rest.
        partition: how replicated lanes share the work. ``"tokens"``: each routes a slice of the tokens.
            ``"assignments"``: each routes all tokens and takes every ``tp``-th assignment of each expert; the router
            must then decide alike on all lanes.
        capacity: drop assignments that exceed the experts' :class:`Capacity`; ``None`` drops none.
        counters: where to count what this layer moves, a :class:`LayerCounters`.
        one_sided: how rows travel through memory that GPUs share, see :class:`OneSided`. ``None``: as ``OneSided()``
            has it, where ranks can read each other's memory, and in messages elsewhere; ``False``: in messages.
        check: when to compare what this layer takes on trust: ranks fit together (dtypes, frozen parameters, top_k),
            replicated lanes hold the same tokens, routing weights are finite, lanes that route the same tokens decide
            alike, and arriving gradients are what ``lane_grads`` says (where that can be seen: not for
            ``"post-hoc"``). It costs collectives and host synchronisations.
            ``None``: in the first forward with gradients, the first without, and the first backward; nothing
            afterwards. ``True``: always. ``False``: never.

    Backward:
        Exact where each gradient arises: router, experts, the input, and the TP-sharded layers below. Parameters get
        the family that follows from these arguments, which :func:`foldpar.reduce_gradients` reads.

    Raises:
        ShapeError: ``ep`` does not divide the experts, or, in forward, a wrong width, device or dtype.
        GroupsError: the experts were made for another layout. ValueError: arguments that contradict each other.

    Source: parallel folding: MoE Parallel Folding (Liu et al. 2025); the conjugate ends: Megatron's ``f`` and ``g``
    (Shoeybi et al. 2019), here over rows.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        groups: FoldedGroups,
        *,
        shared: nn.Module | None = None,
        lanes: Lanes = "replicated",
        lane_grads: LaneGradients = "replicated",
        partition: Partition = "tokens",
        capacity: Capacity | None = None,
        counters: LayerCounters | None = None,
        one_sided: Sharing = None,
        check: bool | None = None,
    ) -> None:
        super().__init__()
        expect(
            "FoldedMoE",
            groups=(groups, FoldedGroups),
            shared=(shared, (nn.Module, type(None))),
            capacity=(capacity, (Capacity, type(None))),
            counters=(counters, (LayerCounters, type(None))),
            one_sided=(as_expected(one_sided), (OneSided, type(None))),
        )
        _check_parts(router, experts)
        made_for = getattr(experts, "groups", groups)
        if made_for is not groups:
            raise GroupsError(
                f"The experts were made for other groups than this layer's: {made_for!r} and {groups!r}. Build both "
                f"with the groups of one create_groups call."
            )
        uneven = not_dividing("ep", groups.ep.size, "num_experts", experts.num_experts)
        if uneven is not None:
            raise ShapeError(uneven)
        routed = getattr(router, "num_experts", experts.num_experts)
        if routed != experts.num_experts:
            raise ShapeError(f"The router knows {routed} experts, but there are {experts.num_experts}.")
        self.groups = groups
        self.lane_state = LaneState(groups, lanes, lane_grads, partition)
        self.checks = LaneChecks(self.lane_state, check)
        self.capacity = capacity
        self.without_data = False
        """All tokens are padding; set by :func:`foldpar.lockstep`."""
        self.journey = Journey(self.lane_state, experts, counters=counters, one_sided=one_sided)
        self._whole = None
        if isinstance(experts, ExpertShare):
            entering = ("x", "ids", "padding")
            self._whole = WholeJourney(self.journey, experts.product, self.checks, self, _WHAT_ENTERS, entering)
        self.router, self.experts, self.shared = router, experts, shared
        families = self.lane_state.families
        mark_children(self, {"router": families.router, "experts": families.experts, "shared": families.shared})
        if lane_grads == "post-hoc" and isinstance(experts, ExpertShare):  # else they are marked as they should be
            experts.mark(families.experts, families.bias)

    @classmethod
    def from_dense(
        cls,
        router: Router,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        groups: FoldedGroups,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: Activation = "swiglu",
        **options: Any,
    ) -> FoldedMoE:
        """Fold a layer that holds all its experts: this rank's shares are taken, nothing else is copied.

        The weights and biases are those of :meth:`GroupedExperts.from_dense`; ``router`` is used as it is; ``options``
        are the keyword arguments of the class (``shared``, ``lanes``, ...).
        """
        experts = GroupedExperts.from_dense(
            gate_up_proj, down_proj, groups, gate_up_bias=gate_up_bias, down_bias=down_bias, activation=activation
        )
        return cls(router, experts, groups, **options)

    def forward(
        self, x: Tensor, *, ids: Tensor | None = None, padding: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``[..., dim]`` to ``[..., dim]``; with ``return_routing`` also the :class:`Routing` of the rows routed here.

        ``ids``, ``[..., top_k]``: use these experts instead of the router's choice, with its weights for them. So a
        routing is replayed, in this layout or another; ``moe.lane_state.gather(routing.ids)`` records it.
        ``padding``, ``[...]``, bool: true for padding tokens, which reach no expert. Both go to the router as keywords.
        """
        self._check_input(x)
        y, routing = self._routed(x, ids, padding)
        y = y if self.shared is None else y + self.shared(x)
        return (y, routing) if return_routing else y

    def _routed(self, x: Tensor, ids: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Routing]:
        """The routed experts' part of the output, and the routing."""
        expect("FoldedMoE", ids=(ids, (Tensor, type(None))), padding=(padding, (Tensor, type(None))))
        if not torch.compiler.is_compiling():
            return self._in_steps(x, ids, padding)
        why = self._why_uncompiled()
        return self._as_operators(x, ids, padding) if why is None else uncompiled(why, self._in_steps, x, ids, padding)

    def _why_uncompiled(self) -> str | None:
        if self.capacity is not None:
            return LIMITED
        return RANDOM if getattr(self.router, "is_random", False) else why_uncompiled(self.journey, self.experts)

    def _as_operators(self, x: Tensor, ids: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Routing]:
        """What :meth:`_in_steps` does where a compiler traces it."""
        assert self._whole is not None and isinstance(self.experts, ExpertShare)
        tokens = x.reshape(-1, x.shape[-1])
        own = self._whole.own(tokens)
        routing = self._route(own, x, ids, padding, self._whole.own)
        y = self._whole(self.experts, own, routing, x, ids, padding, tokens=tokens.shape[0])
        return y.view(x.shape), routing

    def _in_steps(self, x: Tensor, ids: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Routing]:
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        checked = self.checks.due(tokens)
        if checked:
            self.checks.entering(self, _WHAT_ENTERS, {"x": x, "ids": ids, "padding": padding})
        own = self.journey.ends.own(tokens)
        routing = self._route(own, x, ids, padding, self.lane_state.own)
        if checked:
            self.checks.routing(routing)
        y = self.journey(self._compute, own, routing, tokens=tokens.shape[0])
        self.checks.leaving(y)
        return y if x.dim() == 2 else y.view(x.shape), routing

    def explain(self) -> str:
        """What this layer does on this rank, and why: the path of a row, and how each parameter is reduced.

        The families are those of :func:`foldpar.parameter_families`, as they are now.
        """
        layout, ends = self.groups.layout, self.journey.ends
        lines = [
            f"FoldedMoE on rank {self.groups.rank}: tp={layout.tp} ep={layout.ep} etp={layout.etp} edp={layout.edp}",
            f"  lanes      {ends.why}",
            *(
                f"  {'rows' if place == 0 else '':<10} {line}"
                for place, line in enumerate(
                    self.journey.explain(*rows_for(self.experts), top_k=getattr(self.router, "top_k", 1))
                )
            ),
        ]
        return "\n".join([*lines, *(f"  {part:<10} {told}" for part, told in self._reductions())])

    @property
    def counters(self) -> LayerCounters | None:
        """Where this layer counts what it moves."""
        return self.journey.counters

    def extra_repr(self) -> str:
        state = self.lane_state
        return f"lanes={state.lanes!r}, lane_grads={state.lane_grads!r}, partition={state.partition!r}"

    @property
    def _compute(self) -> Callable[..., Tensor]:
        """What computes rows."""
        return self.experts.of_rows if isinstance(self.experts, ExpertShare) else self.experts

    def _reductions(self) -> list[tuple[str, str]]:
        """How the parameters of each part are reduced over the lanes; by name where a part has several families."""
        names: dict[tuple[str, ParameterFamily | str], list[str]] = {}
        for name, family in families_seen_from(self, self.groups).items():
            part, _, own_name = name.partition(".")
            names.setdefault((part, family), []).append(own_name or part)
        parts = [part for part, _ in names]
        return [
            (part, _told(family, own_names if parts.count(part) > 1 else [], self.groups))
            for (part, family), own_names in names.items()
        ]

    def _route(
        self,
        own: Tensor,
        x: Tensor,
        ids: Tensor | None,
        padding: Tensor | None,
        own_of: Callable[[Tensor], Tensor],
    ) -> Routing:
        """Let the router decide about this lane's rows, in its region of random numbers and within the capacity.

        ``own_of`` gives the rows of what goes with all tokens.
        """
        state, given = self.lane_state, {}
        if ids is not None:
            _goes_with("ids", ids.shape[:-1], x)
            given["ids"] = own_of(ids.reshape(-1, ids.shape[-1]))
        if padding is not None:
            _goes_with("padding", padding.shape, x)
            given["padding"] = own_of(padding.reshape(-1))
        if self.without_data and takes_padding(self.router):  # it counts what it decides
            given["padding"] = torch.ones(own.shape[0], dtype=torch.bool, device=own.device)
        region: AbstractContextManager[None] = nullcontext()
        if getattr(self.router, "is_random", False):
            region = random_region(state.random_region, self.groups.coordinate, device=own.device)
        with region:
            routing = self.router(own, **given)
        check_routing(routing, own.shape[0])
        routing = without_tokens(routing) if self.without_data else routing
        if self.capacity is None:
            return routing
        counts = even_row_counts(x.numel() // x.shape[-1], self.groups.tp.size) if state.lanes == "replicated" else None
        return limit_capacity(routing, state, self.capacity, num_experts=self.experts.num_experts, row_counts=counts)

    def _check_input(self, x: Tensor) -> None:
        expect("FoldedMoE", x=(x, Tensor))
        if x.dim() == 0 or x.shape[-1] != self.experts.dim:
            raise ShapeError(f"FoldedMoE takes [..., dim] with dim = {self.experts.dim}, and got {list(x.shape)}.")
        check_device_and_dtype(x, self.experts)


def _check_parts(router: object, experts: object) -> None:
    """Raise unless one is called with rows and the other computes them."""
    if isinstance(router, ExpertShare):
        raise ArgumentError("FoldedMoE(router, experts, groups): router and experts are swapped.")
    if not callable(router):
        raise ArgumentError(
            f"FoldedMoE: router must be called with rows and return a foldpar.Routing, as foldpar.TopKRouter does; a "
            f"{type(router).__name__} cannot be called."
        )
    missing = [name for name in ("num_experts", "dim") if not hasattr(experts, name)]
    if missing or not callable(experts):
        raise ArgumentError(
            f"FoldedMoE: experts must be foldpar.GroupedExperts, or a module with num_experts and dim that is called "
            f"with (rows, rows_per_expert); a {type(experts).__name__} has no "
            f"{' and no '.join(missing or ['forward'])}."
        )


def _told(family: ParameterFamily | str, names: list[str], groups: FoldedGroups) -> str:
    """A family in words: its name, whose it is, and what is done over the lanes."""
    whose = f" ({some(names, 4)})" if names else ""
    if isinstance(family, str):
        return f"no family{whose}: {family}"
    times = "" if family.factor == 1 else f", times {family.factor}"
    return f"{family.name}{whose}: {_over_lanes(family, groups)}{times}"


def _over_lanes(family: ParameterFamily, groups: FoldedGroups) -> str:
    axis = family.lane_axis
    if family.reduction is Reduction.EXPERT_TP_CANCEL and groups.tp.size > 1:
        return f"divided by tp = {groups.tp.size}"
    if axis is None or family.reduction in (Reduction.SKIP, Reduction.EXPERT_TP_CANCEL):
        return "left as it is"
    if groups.axis(axis).size == 1:
        return f"left as it is, {axis} = 1"
    return f"{family.reduction.name} over {axis}"


def _goes_with(name: str, shape: torch.Size, x: Tensor) -> None:
    if shape != x.shape[:-1]:
        raise ShapeError(
            f"{name} must go with the tokens of the input, {list(x.shape[:-1])} of {list(x.shape)}; they are for "
            f"{list(shape)}."
        )
