"""``MoEAdapter``: what has to be known about a model's MoE block to fold it, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from foldpar.arguments import expect
from foldpar.comm import FoldedGroups
from foldpar.errors import ModelError
from foldpar.models.meta_copy import on_meta
from foldpar.models.recognition import activation_of, check_own_activation
from foldpar.moe import ELEMENTWISE, Activation, ExpertStorage, FoldedExperts, OwnActivation, is_activation

__all__ = ["ExpertWeights", "MoEAdapter"]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """All experts' weights of one block, laid out as an :class:`~foldpar.ExpertStorage` says."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise an ``ArgumentError`` for what is no tensor."""
        bias = (Tensor, type(None))
        expect("ExpertWeights", gate_up=(self.gate_up, Tensor), down=(self.down, Tensor))
        expect("ExpertWeights", gate_up_bias=(self.gate_up_bias, bias), down_bias=(self.down_bias, bias))


@dataclass(frozen=True, slots=True)
class MoEAdapter:
    """How one kind of MoE block is folded; :func:`foldpar.fold_model` and :func:`foldpar.plan_fold` take several.

    The block keeps its forward, its router and its shared experts. Its ``experts`` child, called with
    ``(hidden_states [tokens, dim], top_k_index [tokens, top_k], top_k_weights [tokens, top_k])``, is replaced by a
    :class:`foldpar.FoldedExperts`. A block that follows this convention, with parameters ``gate_up_proj`` and
    ``down_proj`` on that child, needs one line::

        fold_model(model, groups, adapters=(MoEAdapter("MyMoEBlock"),))

    Attributes:
        block: the name of the block's class, or several; subclasses count.
        experts: the child that holds the experts, a dotted path inside the block.
        routers: children of the block that route, those of them that a block has. They see all tokens on every lane.
        storage: how the experts' weights are laid out, and what the first one and the biases are called.
        activation: an activation of :class:`foldpar.GroupedExperts`, or a function of the experts' module. ``None``
            looks at the module's ``act_fn``, or a gate of its own: one that is known by its code becomes foldpar's,
            and any other is kept as it is, a :class:`~foldpar.OwnActivation`.
        weights: ``experts -> ExpertWeights``, where a module stores them under other names or in several tensors. The
            folded parameters are then called as ``storage`` says, ``gate_up_proj`` and ``down_proj``.
        call: ``(folded, *arguments) -> output``: the convention in which the block calls its experts, where that is
            another one; ``folded`` is a function of ``(hidden_states, top_k_index, top_k_weights)``.
        around: ``(block, folded experts) -> module`` in place of the whole block, where its forward cannot stay. It
            keeps the block's children under their names.
        replace: ``(block, groups) -> module`` in place of the whole block, a :class:`foldpar.FoldedMoE` for example.
            Whatever is inside brings its own families; nothing else here applies then.
        tp_plan: tensor-parallel styles beside the model's own plan, and before it: the end of a module's dotted name,
            with ``*`` for a number, to a style. For layers that the model's plan leaves out, such as
            ``{"self_attn.q_proj": "colwise"}``.
        partial: modules or parameters inside an attention that is sharded by heads which work on the lane's own heads,
            by their names there: gains of QK norms, for example. Their gradients are summed over the lanes.
        whole: the same for those whose gradient is whole on every lane, such as a low-rank projection in front of a
            sharded one.
        refused: why a block cannot be folded, for those that cannot.

    Example, stacked weights ``w1, w3 [E, I, H]`` and ``w2 [E, H, I]``, and experts called as ``(x, weights, ids)``::

        MoEAdapter(
            "MyMoE",
            weights=lambda experts: ExpertWeights(torch.cat([experts.w1, experts.w3], 1), experts.w2),
            activation="swiglu",
            call=lambda folded, x, weights, ids: folded(x, ids, weights),
        )
    """

    block: str | tuple[str, ...]
    experts: str = "experts"
    routers: tuple[str, ...] = ("gate", "router")
    storage: ExpertStorage = field(default_factory=ExpertStorage)
    activation: Activation | Callable[[nn.Module], Activation] | None = None
    weights: Callable[[nn.Module], ExpertWeights] | None = None
    call: Callable[..., Tensor] | None = None
    around: Callable[[nn.Module, FoldedExperts], nn.Module] | None = None
    replace: Callable[[nn.Module, FoldedGroups], nn.Module] | None = None
    tp_plan: Mapping[str, str] = field(default_factory=dict)
    partial: tuple[str, ...] = ("q_norm", "k_norm")
    whole: tuple[str, ...] = ()
    refused: str | None = None

    def __post_init__(self) -> None:
        """Raise a ``ModelError`` for what is of another type than its attribute."""
        if not self.block or not _are_names(self.blocks):
            raise ModelError(f"MoEAdapter takes the name of a block's class, or several, and got {self.block!r}.")
        for name in ("routers", "partial", "whole"):
            value = getattr(self, name)
            if isinstance(value, str) or not _are_names(value):
                example = f"({value!r},)" if isinstance(value, str) else "('name', ...)"
                raise ModelError(f"MoEAdapter's {name} is a tuple of names, such as {example}, and not {value!r}.")
        if not isinstance(self.experts, str):
            raise ModelError(f"MoEAdapter's experts is the name of a child, and not {self.experts!r}.")
        if not isinstance(self.storage, ExpertStorage):
            raise ModelError(f"MoEAdapter's storage is an ExpertStorage, and not {self.storage!r}.")
        if not isinstance(self.tp_plan, Mapping) or not _are_names([*self.tp_plan, *self.tp_plan.values()]):
            raise ModelError(
                f"MoEAdapter's tp_plan is a dict of names to styles, such as {{'self_attn.q_proj': 'colwise'}}, and "
                f"not {self.tp_plan!r}."
            )
        for name in ("weights", "call", "around", "replace"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ModelError(f"MoEAdapter's {name} is a function, and not {getattr(self, name)!r}.")

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the classes that it is for."""
        return (self.block,) if isinstance(self.block, str) else self.block

    def weights_of(self, experts: nn.Module, where: str) -> ExpertWeights:
        """The experts' weights, by ``weights`` or by the names of the convention."""
        if self.weights is not None:
            return self._made_weights(self.weights, experts, where)
        parameters = dict(experts.named_parameters(recurse=False))
        names = self.storage.names
        if computed := [name for name in names if is_parametrized(experts, name)]:
            raise ModelError(
                f"{where} computes {' and '.join(computed)} by a parametrization, whose results lie in "
                f"no parameter that folding could cut. Before folding, keep the results: torch.nn.utils.parametrize."
                f"remove_parametrizations(experts, name, leave_parametrized=True); or register it on the folded "
                f"model, where it sees this rank's share."
            )
        if missing := [name for name in names[:2] if name not in parameters]:
            raise ModelError(
                f"{where} ({type(experts).__name__}) has no parameter {' and no '.join(missing)}; its own parameters "
                f"are {', '.join(parameters) or 'none'}. Say in the adapter how to get them: "
                f"MoEAdapter({self.blocks[0]!r}, weights=lambda experts: ExpertWeights(gate_up, down))."
            )
        if unread := [name for name in parameters if name not in names]:
            raise ModelError(
                f"{where} ({type(experts).__name__}) has the parameter(s) {', '.join(unread)} beside gate_up_proj and "
                f"down_proj, and folding it would lose them. For biases of other names, give the adapter "
                f"storage=ExpertStorage(gate_up_bias=..., down_bias=...)."
            )
        return ExpertWeights(*(parameters.get(name) for name in names))  # type: ignore[arg-type]

    def _made_weights(
        self, make: Callable[[nn.Module], ExpertWeights], experts: nn.Module, where: str
    ) -> ExpertWeights:
        try:
            made = make(experts)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"The weights of the adapter for {self.blocks[0]}, called with {where} ({type(experts).__name__}), "
                f"raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, ExpertWeights):
            raise ModelError(
                f"The weights of the adapter for {self.blocks[0]} must return an ExpertWeights for {where}, and "
                f"returned a {type(made).__name__}: ExpertWeights(gate_up, down)."
            )
        return made

    def unused(self, experts: nn.Module) -> list[str]:
        """Parameters of the experts that ``weights`` does not read; none where it hides what it reads (``detach``)."""
        stand_in = on_meta(experts)
        for parameter in stand_in.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
        with torch.enable_grad():
            weights = self.weights_of(stand_in, "the experts")
        made = [weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias]
        given = [each for each in made if each is not None]
        if not all(each.requires_grad for each in given):
            return []
        names, parameters = zip(*stand_in.named_parameters(), strict=True)
        read = torch.autograd.grad(given, parameters, [torch.empty_like(each) for each in given], allow_unused=True)
        return [name for name, gradient in zip(names, read, strict=True) if gradient is None]

    def are_trainable(self, experts: nn.Module, where: str) -> tuple[bool, ...]:
        """Of the folded weights and biases, in the order of their storage's names, which are to be trained.

        Raises:
            ModelError: one is made of tensors that are trained and of frozen ones, or it cannot be told of which.
        """
        stand_in = on_meta(experts)
        parameters = list(stand_in.parameters())
        flags = [each.requires_grad for each in parameters]

        def made(flags: list[bool]) -> list[bool]:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag and parameter.is_floating_point())
            with torch.enable_grad():
                weights = self.weights_of(stand_in, where)
            of_all = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
            return [each is not None and each.requires_grad for each in of_all]

        of_trained, of_frozen = made(flags), made([not flag for flag in flags])
        hidden = [not (one or other) for one, other in zip(of_trained, of_frozen, strict=True)]
        both = any(one and other for one, other in zip(of_trained, of_frozen, strict=True))
        if both or (any(hidden[:2]) and len(set(flags)) > 1):
            raise ModelError(
                f"Some parameters of {where} ({type(experts).__name__}) are frozen and some are not, and the adapter's "
                f"weights makes one of both, or hides what it reads (detach): folded, it is trained or frozen as one. "
                f"Freeze all of them or none before folding, or the folded ones afterwards."
            )
        return tuple(all(flags) if unseen else one for one, unseen in zip(of_trained, hidden, strict=True))

    def activation_of(self, experts: nn.Module, where: str) -> Activation:
        """The experts' activation, given or looked up."""
        interleaved = self.storage.interleaved
        if self.activation is None:
            gated = getattr(experts, "has_gate", True) is not False  # what transformers' interface says
            return activation_of(experts, where, gated=gated, interleaved=interleaved)
        found: object = self.activation
        if callable(found):
            try:
                found = found(experts)
            except Exception as error:
                raise ModelError(
                    f"The activation of the adapter for {self.blocks[0]}, called with {where} "
                    f"({type(experts).__name__}), raised {type(error).__name__}: {error}"
                ) from error
        if not is_activation(found):
            raise ModelError(
                f"The adapter for {self.blocks[0]} gives {where} the activation {found!r}; it is one of "
                f"{', '.join(map(repr, ELEMENTWISE))}, a ClampedSwiGLU, or an OwnActivation."
            )
        if isinstance(found, OwnActivation):
            check_own_activation(found, where, interleaved=interleaved)
        return cast(Activation, found)


def _are_names(values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(isinstance(each, str) for each in values)
