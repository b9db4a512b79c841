"""What a folded layer takes on trust, compared between ranks: in its first step, or in every one.

    enter     the lanes of a TP group hold the same tokens: shapes first, then a digest
    routing   weights are finite, and lanes that route the same tokens decide alike
    backward  the gradient that arrives is in the state that ``lane_grads`` declares

A check talks only to ranks that the same forward or backward meets anyway, so it hangs nothing that would not hang
without it, and ends with an agreement among them, so that all raise together instead of waiting for the one that did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from foldpar.comm import (
    AxisGroup,
    FoldedGroups,
    When,
    all_gather,
    all_reduce_,
    can_compare,
    compare_settings,
    differences,
    local_tensor,
)
from foldpar.errors import FoldingError, ReplicaError, ShapeError
from foldpar.layout import FoldedLayout
from foldpar.moe.lanes import LaneState
from foldpar.moe.recomputation import unseen_by_modes
from foldpar.moe.routing.router import Routing
from foldpar.parameters import parameter_settings
from foldpar.wording import below

__all__ = ["LaneChecks", "ModelChecks", "check_lane_gradient", "rounds"]

_ELSEWHERE = {
    "tokens": "The lanes of another TP group that this step meets hold different tokens; see its ranks.",
    "weights": "Routing weights are not finite: on another rank that this step meets; see its error.",
    "routing": "The routing differs between the lanes of another TP group that this step meets; see its ranks.",
    "gradient": "The gradient that arrived at the lanes of another TP group is not in the declared state; see its "
    "ranks.",
}
_MOST_OUTPUTS = 32
"""How many outputs of a model are looked at: a number that all ranks know, whatever their models return."""
_MOST_IN_FLIGHT = 64
"""Forwards of a model whose backward is awaited; of more, the first ones are not compared, and not kept alive."""
_TOKENS = (
    "Replicated lanes share the work on one batch, so all lanes of a TP group must hold the same tokens; with others "
    "every row comes out wrong. Usually a sampler or a seed depends on the global rank: give the sampler "
    "num_replicas=groups.dp.size and rank=groups.dp.index, and seed dropout and data by groups.dp_cp.index. Where "
    "every lane does bring its own tokens, say lanes='sharded'."
)


@dataclass(frozen=True, slots=True)
class Meeting:
    """The ranks that a forward brings together, as the groups over which a word reaches all of them.

    >>> from foldpar import create_groups, solve_layout
    >>> Meeting.of(create_groups(solve_layout(1))).groups
    ()
    """

    groups: tuple[AxisGroup, ...]

    @classmethod
    def of(cls, groups: FoldedGroups, *, lanes: bool = True, experts: bool = True) -> Meeting:
        """Of a layer whose lanes and experts meet in forward, or of a part that only one of them takes part in."""
        met = [group for group, meets in ((groups.tp, lanes), (groups.ep_etp, experts)) if meets and group.size > 1]
        return cls(tuple(met) * (rounds(groups.layout) if len(met) == 2 else 1))

    def raise_together(self, found: tuple[str, FoldingError] | None, device: torch.device) -> None:
        """Raise on every rank of the meeting if one of them found something: its own error, or where to look."""
        kinds = list(_ELSEWHERE)
        word = torch.tensor(0 if found is None else kinds.index(found[0]) + 1, device=device, dtype=torch.int32)
        for group in self.groups:
            all_reduce_(word, group, "max")
        if found is not None:
            raise found[1]
        if self.groups and (kind := int(word)):
            text = _ELSEWHERE[kinds[kind - 1]]
            raise ShapeError(text) if kinds[kind - 1] == "weights" else ReplicaError(text)


def rounds(layout: FoldedLayout) -> int:
    """After how many rounds of "tell your lanes, then your experts' group" everybody whom a forward links has heard.

    One where the two kinds of groups nest, as in nearly all layouts; else every round reaches a new experts' group.
    """
    experts = layout.ep * layout.etp
    span = layout.dp * layout.cp if layout.order == "tp-lane-major" else layout.tp
    nested = span % experts == 0 or experts % span == 0
    return 1 if nested else layout.edp


class LaneChecks:
    """The checks of one layer."""

    def __init__(self, state: LaneState, check: bool | None) -> None:
        self.state, self.when = state, When(check)
        self.meeting = Meeting.of(state.groups, lanes=state.lanes == "replicated")

    def due(self, x: Tensor) -> bool:
        """Whether this forward is checked. The first with gradients is, and the first without."""
        return self.when.due(_forward(), x)

    def entering(self, layer: nn.Module, what: str, fields: Mapping[str, Tensor | None]) -> None:
        """Raise unless the layer and its input fit together on all ranks that this forward links, and the lanes of
        every TP group bring the same tokens, and what goes with them.

        Raises:
            ReplicaError: names the ranks and the shapes, or the first entries, that differ.
        """
        x = next(each for each in fields.values() if each is not None)
        with unseen_by_modes(), torch.no_grad():
            settings = {**_settings_of_input(x), **parameter_settings(layer.named_parameters())}
            compare_settings("a layer and its input", settings, self.meeting.groups, x.device)
        if self.state.lanes == "sharded" or self.state.groups.tp.size == 1:
            return
        given = {name: each for name, each in fields.items() if each is not None}
        with unseen_by_modes(), torch.no_grad():
            found = _different_tokens(what, given, self.state.groups.tp)
            self.meeting.raise_together(found, next(iter(given.values())).device)

    def routing(self, routing: Routing) -> None:
        """Raise unless the routing can be used, and is the same on lanes that route the same tokens.

        Raises:
            ShapeError: names this rank and how many of its weights are not finite. ReplicaError: names the rank, the
                field and the first entries that differ, and what usually makes them differ.
        """
        with unseen_by_modes(), torch.no_grad():
            settings = {
                "top_k": str(routing.ids.shape[1]),
                "expert ids": str(routing.ids.dtype).removeprefix("torch."),
                "routing weights": _state(routing.weights),
            }
            compare_settings("their routing", settings, self.meeting.groups, routing.weights.device)
            found = _not_finite(routing.weights, self.state.groups.rank)
            different = None if self.state.own_tokens else _different_routing(routing, self.state.groups.tp)
            self.meeting.raise_together(found or different, routing.weights.device)
        self.when.done(_forward())

    def leaving(self, y: Tensor) -> None:
        """Let the backward of the layer's output compare the gradient that arrives there."""
        declared = self.state.lane_grads
        if self.state.lanes == "sharded" or declared == "post-hoc" or self.state.groups.tp.size == 1:
            return
        if y.requires_grad and self.when.due("backward", y):
            y.register_hook(lambda grad: self._arrived(grad, declared))

    def _arrived(self, grad: Tensor, declared: Literal["replicated", "partial"]) -> None:
        if self.when.due("backward", grad):
            check_lane_gradient(grad, self.state.groups.tp, self.meeting, declared, "this layer")
            self.when.done("backward")


class ModelChecks:
    """The checks of a whole folded model: the lanes get the same inputs, and send back the same gradients.

    What enters its layers cannot show the first: an embedding that is cut over the lanes mixes their tokens, so that
    all lanes hold the same wrong rows. Nothing is done while the model is traced; then its layers check what they can.
    """

    def __init__(self, groups: FoldedGroups, check: bool | None, *, experts: bool) -> None:
        self.groups, self.when = groups, When(check)
        self.meeting = Meeting.of(groups, experts=experts)
        self._awaited: dict[int, RemovableHandle] = {}
        self._forwards = count()

    def watch(self, model: nn.Module) -> None:
        """From now on, as long as there is something to check."""
        if self.groups.tp.size > 1 and self.when.check is not False:
            self._hooks: list[RemovableHandle] = [
                model.register_forward_pre_hook(self._entering, with_kwargs=True),
                model.register_forward_hook(self._leaving),
            ]

    def _entering(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        named = chain(((f"argument {place}", each) for place, each in enumerate(arguments)), keywords.items())
        fields = {name: local_tensor(each).detach() for name, each in named if isinstance(each, Tensor)}
        device = next((each.device for each in fields.values()), torch.device("cpu"))
        if fields and self.when.is_open(_forward()) and all(map(can_compare, fields.values())):
            with unseen_by_modes(), torch.no_grad():
                settings = parameter_settings(model.named_parameters())
                compare_settings("the parameters of the model", settings, self.meeting.groups, device)
                found = _different_tokens(f"What {type(model).__name__} was called with", fields, self.groups.tp)
                self.meeting.raise_together(found, device)
            self.when.done(_forward())

    def _leaving(self, model: nn.Module, arguments: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        if self.when.is_open("backward"):
            tensors = [each for each in _tensors(output) if each.requires_grad and can_compare(each)][:_MOST_OUTPUTS]
            if tensors:  # a gradient may arrive at each of them: the loss, and the logits that a term of one's own uses
                shapes = [(local_tensor(each).shape, each.dtype) for each in tensors]
                most = 1 if self.when.check is None else _MOST_IN_FLIGHT  # one backward is compared, or all
                self._let_go([*self._awaited][: max(0, len(self._awaited) - most + 1)])
                awaited = next(self._forwards)
                self._awaited[awaited] = register_multi_grad_hook(tensors, partial(self._arrived, awaited, shapes))
        elif not self.when.is_open(_forward()):
            for hook in self._hooks:
                hook.remove()

    def _let_go(self, awaited: Iterable[int]) -> None:
        """Of forwards whose backward is awaited: the hook of several tensors holds their graph, and the graph it."""
        for each in awaited:
            self._awaited.pop(each).remove()

    def _arrived(
        self, awaited: int, shapes: Sequence[tuple[torch.Size, torch.dtype]], grads: Sequence[Tensor | None]
    ) -> None:
        """Compare the gradients of all outputs, when the last of them has arrived, and before layers below have it."""
        self._let_go(self._awaited.keys() & {awaited})
        first = next((grad for grad in grads if grad is not None), None)
        if first is None or not self.when.due("backward", first):
            return
        device = first.device
        reached = torch.zeros(_MOST_OUTPUTS, dtype=torch.int32, device=device)
        reached[: len(grads)] = torch.tensor([grad is not None for grad in grads], dtype=torch.int32, device=device)
        for group in self.meeting.groups:  # so that all go through the same rounds
            all_reduce_(reached, group, "max")
        for place in reached.nonzero().flatten().tolist():
            grad = grads[place] if place < len(grads) else torch.zeros(0, device=device)
            if grad is None:  # it arrived on other lanes only
                grad = torch.zeros(shapes[place][0], dtype=shapes[place][1], device=device)
            check_lane_gradient(local_tensor(grad), self.groups.tp, self.meeting, "replicated", "the model's output")
        self.when.done("backward")


def check_lane_gradient(
    grad: Tensor, tp: AxisGroup, meeting: Meeting, declared: Literal["replicated", "partial"], where: str
) -> None:
    """Raise on every rank of the meeting if an arriving gradient is not in the state that was declared.

    A replicated gradient is equal on all lanes, within the rounding of its dtype (``sqrt(eps)`` of its largest
    entry). A partial one differs; a non-zero gradient that is equal on all lanes would be counted ``tp`` times.

    Raises:
        ReplicaError: names the lanes, the difference found and the remedy.
    """
    grad = grad.detach()
    with unseen_by_modes(), torch.no_grad():
        if texts := differences({"": grad}, tp, only_shapes=True):
            error = ReplicaError(
                f"The gradient that arrived at {where} has another shape on other lanes:{below(texts)}"
            )
            meeting.raise_together(("gradient", error), grad.device)
        largest, spread = _spread(grad, tp)
        tolerance = torch.finfo(grad.dtype).eps ** 0.5 * largest
        wrong = spread > tolerance if declared == "replicated" else largest > 0 and spread <= tolerance
        text = _replicated_text if declared == "replicated" else _partial_text
        found = ("gradient", ReplicaError(text(where, tp, spread, largest))) if wrong else None
        meeting.raise_together(found, grad.device)


# ---------------------------------------------------------------------------------------------------------------------
# What is found on one TP group: a kind and an error, the same on all its lanes where it concerns all.

_Found = tuple[str, FoldingError] | None


def _settings_of_input(x: Tensor) -> dict[str, str]:
    autocast = torch.is_autocast_enabled(x.device.type)
    return {
        "input": _state(x),
        "width of the input": str(x.shape[-1]),
        "autocast": str(torch.get_autocast_dtype(x.device.type)) if autocast else "off",
    }


def _state(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{'' if tensor.requires_grad else ', without a gradient'}"


def _different_tokens(what: str, fields: Mapping[str, Tensor], tp: AxisGroup) -> _Found:
    texts = differences(fields, tp, rounding=True)
    if not texts:
        return None
    return "tokens", ReplicaError(f"{what} differs between the lanes {tp.ranks}:{below(texts)}\n{_TOKENS}")


def _not_finite(weights: Tensor, rank: int) -> _Found:
    bad = int((~weights.isfinite()).sum())
    if not bad:
        return None
    return "weights", ShapeError(
        f"Routing weights are not finite: {bad} of {weights.numel()} on this rank ({rank}). Look at the router's input "
        f"and logits; a softmax over logits that are all -inf gives NaN."
    )


def _different_routing(routing: Routing, tp: AxisGroup) -> _Found:
    fields = {"ids": routing.ids, "weights": routing.weights}
    if routing.mask is not None:
        fields["mask"] = routing.mask
    texts = differences(fields, tp)
    if not texts:
        return None
    return "routing", ReplicaError(
        f"The routing of tokens that all lanes hold differs over tp:{below(texts)}\npartition='assignments' needs the "
        f"same bits on all lanes, or assignments are lost and counted twice. Lanes differ if their routers do "
        f"(check_replicas), if their inputs do, or if a router draws random numbers after lanes were seeded "
        f"differently."
    )


def _spread(grad: Tensor, tp: AxisGroup) -> tuple[float, float]:
    """The largest entry, and the largest difference between lanes, of a tensor of one shape on all of them."""
    largest = spread = 0.0
    for part in grad.contiguous().view(-1).split(2**22) if grad.numel() else ():
        lanes = all_gather(part, tp).double()
        largest = max(largest, float(lanes.abs().max()))
        spread = max(spread, float((lanes.amax(0) - lanes.amin(0)).max()))
    return largest, spread


def _replicated_text(where: str, tp: AxisGroup, spread: float, largest: float) -> str:
    return (
        f"The gradient that arrived at {where} differs between the lanes {tp.ranks} by up to {spread:.3g} (largest "
        f"entry {largest:.3g}), but it is taken to be equal on all of them (lane_grads='replicated'). Some consumer "
        f"above works on different heads, columns or tokens per lane. Convert where it starts: "
        f"foldpar.copy_to_group(x, groups.tp) before a hand-written column-sharded layer, or "
        f"foldpar.split_rows(x, groups.tp, backward='all_gather') before a loss over the lane's own tokens. Where "
        f"nothing TP-sharded lies below, FoldedMoE(..., lane_grads='partial') is the other lawful way."
    )


def _partial_text(where: str, tp: AxisGroup, spread: float, largest: float) -> str:
    return (
        f"The gradient that arrived at {where} is equal on the lanes {tp.ranks} (within {spread:.3g}, largest entry "
        f"{largest:.3g}), but lane_grads='partial' says that the lanes' gradients add up to it, so it would be counted "
        f"{tp.size} times. Use lane_grads='replicated', or drop the conversion above this layer. If every lane did "
        f"divide its loss by {tp.size}, this is what you meant: say check=False."
    )


# ---------------------------------------------------------------------------------------------------------------------


def _forward() -> str:
    """Which kind of forward this is."""
    return "forward with gradients" if torch.is_grad_enabled() else "forward"


def _tensors(output: object) -> Iterator[Tensor]:
    """Those of an output and, if it has several parts, of its parts."""
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    return (part for part in parts if isinstance(part, Tensor))
