"""The journey as operators that a compiler takes whole, and why some layers are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from foldpar.moe.experts import ExpertProduct, ExpertShare
from foldpar.moe.kernels.grouped import in_autocast_dtype
from foldpar.moe.lane_checks import LaneChecks
from foldpar.moe.lane_ends import LaneEnds
from foldpar.moe.operators import Operator
from foldpar.moe.routing.router import Routing
from foldpar.moe.transport.at_home import AtHome, are_at_home
from foldpar.moe.transport.journey import Journey

__all__ = ["WholeJourney", "uncompiled", "why_uncompiled"]

_Result = TypeVar("_Result")

FOREIGN = (
    "its experts are none of foldpar's, so their parameters and what they do would be hidden in an operator: use "
    "GroupedExperts"
)
OVERRIDDEN = "its experts override how they are computed, which an operator would not see"
HOOKED = "hooks hang on the call of its experts (those of shard_model, for example), which an operator would not make"
COUNTED = "its counters count on the host: leave counters away"
BALANCED = "its decisions are counted for a correction bias, which a recomputation must not repeat"
LIMITED = "its capacity is limited by what the lanes tell each other: leave capacity away"
TRANSFORMED = "torch.func transforms it (jvp, for example), and an operator would drop tangents: see what eager says"
RANDOM = "its router draws random numbers in a region of its own: leave jitter away"


class WholeJourney:
    """What a :class:`Journey` does, as two operators: lanes take their rows, and rows go to experts and back.

    In between a router decides, which is traced as any module. Nothing here holds the layer. The checks of its first
    step run inside the second operator.

    Args:
        journey, product: what the layer does with rows.
        checks, layer: what compares, and what it asks for its parameters.
        what, names: what enters the layer, and the names of its tensors.
    """

    def __init__(
        self,
        journey: Journey,
        product: ExpertProduct,
        checks: LaneChecks,
        layer: nn.Module,
        what: str,
        names: tuple[str, ...],
    ) -> None:
        self._journey, trust = journey, _Trust(checks, ref(layer), what, names)
        self._own = Operator(partial(_own_rows, journey.ends))
        self._carry = Operator(partial(_carried, journey, product, trust))
        self._at_home = AtHome(product, trust.at_home)

    def own(self, x: Tensor) -> Tensor:
        """The rows of ``[tokens, ...]`` that this lane routes, as :class:`LaneEnds` has it."""
        state = self._journey.state
        if state.lanes == "sharded" or state.partition == "assignments" or state.groups.tp.size == 1:
            return x
        return self._own((x,), rows=state.even_share(x.shape[0]))

    def __call__(
        self, experts: ExpertShare, rows: Tensor, routing: Routing, *entered: Tensor | None, tokens: int
    ) -> Tensor:
        """As the journey, with the experts' weights as they are now. ``entered`` are the tensors behind ``names``.

        Backward:
            That of the journey.
        """
        rows = in_autocast_dtype(rows)
        weights = [None if weight is None else in_autocast_dtype(weight) for weight in experts.local_weights()]
        if self._journey.one_sided is None and are_at_home(self._journey.state, experts.num_experts, weights, routing):
            gate_up, down = weights[:2]
            assert gate_up is not None and down is not None
            return self._at_home(rows, routing, experts.storage.for_product(gate_up), experts.storage.for_product(down))
        told = (None if tensor is None else tensor.detach() for tensor in entered)
        given = (rows, routing.weights, routing.ids, routing.mask, *weights, *told)
        return self._carry(given, rows=tokens)


def _own_rows(ends: LaneEnds, tensors: Sequence[Tensor | None], rows: int) -> Tensor:
    (x,) = tensors
    assert x is not None
    return ends.own(x)


@dataclass(frozen=True, slots=True)
class _Trust:
    """What a layer takes on trust, for the checks of its first step."""

    checks: LaneChecks
    layer: ref[nn.Module]
    what: str
    names: tuple[str, ...]

    def compare(self, routing: Routing, entered: Sequence[Tensor | None]) -> None:
        layer, first = self.layer(), entered[0]
        assert first is not None
        if layer is not None and self.checks.due(first):
            self.checks.entering(layer, self.what, dict(zip(self.names, entered, strict=True)))
            self.checks.routing(routing)

    def at_home(self, rows: Tensor, routing: Routing) -> None:
        """Where no other rank is met."""
        if self.checks.due(rows):
            self.checks.routing(routing)


def _carried(
    journey: Journey, product: ExpertProduct, trust: _Trust, tensors: Sequence[Tensor | None], tokens: int
) -> Tensor:
    (rows, weights, ids, mask), parameters, entered = tensors[:4], tensors[4:8], tensors[8:]
    assert rows is not None and weights is not None and ids is not None
    routing = Routing(ids, weights, mask=mask)
    trust.compare(routing, entered)
    compute: Callable[..., Tensor] = partial(product, tuple(parameters))
    y = journey(compute, rows, routing, tokens=tokens)
    trust.checks.leaving(y)
    return y


def why_uncompiled(journey: Journey, experts: object) -> str | None:
    """Why the journey to these experts cannot be an operator; ``None`` where it can."""
    if torch._C._functorch.get_dynamic_layer_stack_depth() > 0:
        return TRANSFORMED
    if not isinstance(experts, ExpertShare):
        return FOREIGN
    if type(experts).computes_its_own_way():
        return OVERRIDDEN
    if experts.takes_rows and _is_hooked(experts):
        return HOOKED
    return None if journey.counters is None else COUNTED


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def uncompiled(why: str, method: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call it as it is, between the graphs of what is around it; with ``fullgraph=True`` that is an error, and says
    why.
    """
    result: _Result = _UNCOMPILED[why](method, *arguments)
    return result


def _call(method: Callable[..., _Result], *arguments: Any) -> _Result:
    return method(*arguments)


_UNCOMPILED: dict[str, Callable[..., Any]] = {
    why: torch.compiler.disable(_call, reason=f"The routed part of a folded layer is not compiled: {why}.")
    for why in (FOREIGN, OVERRIDDEN, HOOKED, COUNTED, BALANCED, LIMITED, RANDOM, TRANSFORMED)
}
