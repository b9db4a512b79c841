"""Routers: from rows to the experts that compute them, with which weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from foldpar.arguments import expect, expect_sizes
from foldpar.errors import ShapeError
from foldpar.moe.kernels.decisions import decide, decides_at_once
from foldpar.moe.kernels.rules import SCORES, Decision, Rule, largest
from foldpar.moe.recomputation import in_backward
from foldpar.moe.routing.selection import GroupLimit, allowed, check_group_limit
from foldpar.wording import as_integer


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What a router decided for ``[tokens, dim]`` rows.

    Attributes:
        ids: ``[tokens, top_k]``, int32 or int64, global expert ids.
        weights: ``[tokens, top_k]``, floating point: what each expert's output is multiplied by, once.
        logits: ``[tokens, num_experts]``, for auxiliary losses; ``None`` where a router has none.
        mask: ``[tokens, top_k]``, bool, ``False`` for dropped or padded assignments; ``None`` where all count.
        scores: ``[tokens, num_experts]``, what the experts were chosen by, before any correction bias or group limit,
            for auxiliary losses; ``None`` means the softmax of the logits.
        padding: ``[tokens]``, bool, ``True`` for padding tokens, whose assignments are ``False`` in ``mask`` and which
            no count and no loss sees; ``None`` where all are tokens.
        padded_slots: int64 scalar, how many empty slots pad the experts up to their capacity, this lane's share; they
            exist only as this number.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor | None = None
    mask: Tensor | None = None
    scores: Tensor | None = None
    padding: Tensor | None = None
    padded_slots: Tensor | None = None


def check_routing(routing: object, rows: int) -> None:
    """Raise unless it is a routing of so many rows.

    Raises:
        ArgumentError: something else. ShapeError: a wrong shape or dtype.
    """
    expect("A router's result", routing=(routing, Routing))
    assert isinstance(routing, Routing)
    expect("A router's result", ids=(routing.ids, Tensor), weights=(routing.weights, Tensor))
    if routing.ids.dim() != 2 or routing.ids.shape[0] != rows:
        raise ShapeError(
            f"A router of {rows} row(s) returns ids [tokens, top_k] = [{rows}, top_k], and these are "
            f"{list(routing.ids.shape)}."
        )
    if not routing.weights.is_floating_point():
        raise ShapeError(
            f"Routing weights must be floating point, and are {routing.weights.dtype}; ids are {routing.ids.dtype}. "
            f"The order is Routing(ids, weights)."
        )
    if routing.weights.shape != routing.ids.shape:
        raise ShapeError(
            f"Routing weights must be [tokens, top_k] = {list(routing.ids.shape)}, and are "
            f"{list(routing.weights.shape)}."
        )
    mask = routing.mask
    if mask is not None and (mask.shape != routing.ids.shape or mask.dtype != torch.bool):
        raise ShapeError(
            f"mask must be bool and shaped like the ids, {list(routing.ids.shape)}; it is {mask.dtype} and "
            f"{list(mask.shape)}."
        )


def without_tokens(routing: Routing) -> Routing:
    """The same with padding only: nothing travels, and no count and no loss sees anything."""
    padding = torch.ones(routing.ids.shape[0], dtype=torch.bool, device=routing.ids.device)
    return replace(routing, mask=torch.zeros_like(routing.ids, dtype=torch.bool), padding=padding)


def takes_padding(router: object) -> bool:
    """Whether a router has the keyword ``padding``."""
    return "padding" in signature(getattr(router, "forward", router)).parameters  # type: ignore[arg-type]


class Router(Protocol):
    """Anything that turns rows ``[tokens, dim]`` into a :class:`Routing`; zero tokens included.

    Three more things that a router may have, and :class:`TopKRouter` has:

    - the keywords ``ids`` and ``padding``: what :class:`FoldedMoE` was called with, for the rows that are routed;
    - ``num_experts``, which the layer compares with its experts;
    - ``is_random``: true where the next forward draws random numbers. The layer then calls it in the right
      :func:`random_region`.
    """

    def __call__(self, x: Tensor, /) -> Routing: ...


class TopKRouter(nn.Module):
    """A linear router with top-k selection: logits, scores, selection, weights, all in float32 or wider.

    Of equal scores the lower expert id wins, on every device, so lanes that see the same rows decide alike.

    ====================  ==================================================================================
    family                arguments
    ====================  ==================================================================================
    Mixtral, Qwen3        the defaults (Mixtral trains with ``jitter``)
    OLMoE, Switch         ``renormalize=False``
    GPT-OSS               ``bias=True, score_over="chosen"``; Granite and JetMoE without the bias
    Llama 4               ``score="sigmoid", renormalize=False``
    DeepSeek-V2           ``renormalize=False, group_limit=GroupLimit(8, 3), scaling_factor=16.0``
    DeepSeek-V3           ``score="sigmoid", correction_bias=True, scaling_factor=2.5,``
                          ``group_limit=GroupLimit(8, 4, "top2_sum"), router_dtype=torch.float32``
    ====================  ==================================================================================

    Args:
        dim, num_experts, top_k: width of a row, experts in all, experts per token.
        score: how logits become scores.
        score_over: ``"all"``: scores of all experts, of which the ``top_k`` largest are kept (softmax, then top-k).
            ``"chosen"``: the ``top_k`` largest logits are kept, and the softmax is taken over these.
        renormalize: whether a token's weights are divided by their sum.
        scaling_factor: multiplies every weight (DeepSeek's ``routed_scaling_factor``).
        bias: whether the logits have a learnt bias.
        correction_bias: keep a buffer ``correction_bias`` that is added to what selects the experts, never to the
            weights, and has no gradient; :func:`update_correction_bias` balances the experts with it. It stays in
            float32 whatever dtype the module is converted to.
        group_limit: choose only among the experts of the best groups.
        jitter: in training, multiply the router's input by uniform numbers from ``1 - jitter`` to ``1 + jitter``. The
            experts see the input as it is. Drawn from torch's default generator; ``FoldedMoE`` calls the router in
            its :func:`random_region`.
        router_dtype: the dtype in which rows and weight are multiplied; ``None`` leaves theirs, and autocast's.

    Raises:
        ShapeError: ``top_k`` is not between 1 and ``num_experts``, or the groups do not fit the experts. ValueError:
            an unknown choice, or choices that contradict each other.

    Source: Shazeer et al. 2017, section 2.1; Mixtral (Jiang et al. 2024), section 2.1; jitter: Switch (Fedus et al.
    2021), section 2.4; sigmoid scores, group limit and correction bias: DeepSeek-V3 (2024), section 2.1.2.
    """

    correction_bias: Tensor | None
    assignments_per_expert: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax",
        score_over: Literal["all", "chosen"] = "all",
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        bias: bool = False,
        correction_bias: bool = False,
        group_limit: GroupLimit | None = None,
        jitter: float = 0.0,
        router_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_sizes("TopKRouter", dim=dim, num_experts=num_experts)
        expect(
            "TopKRouter",
            scaling_factor=(scaling_factor, (float, int)),
            jitter=(jitter, (float, int)),
            group_limit=(group_limit, (GroupLimit, type(None))),
            router_dtype=(router_dtype, (torch.dtype, type(None))),
        )
        if as_integer(top_k) is None or not 1 <= top_k <= num_experts:
            raise ShapeError(f"top_k = {top_k} must be between 1 and num_experts = {num_experts}.")
        if not math.isfinite(scaling_factor):
            raise ValueError(f"scaling_factor = {scaling_factor} must be finite: every weight is multiplied by it.")
        if router_dtype is not None and not router_dtype.is_floating_point:
            raise ShapeError(
                f"router_dtype = {router_dtype} must be a floating-point dtype: logits are computed in it."
            )
        _check_choices(score, score_over, renormalize, jitter)
        if group_limit is not None:
            check_group_limit(group_limit, num_experts, top_k)
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.score, self.score_over = score, score_over
        self.renormalize, self.scaling_factor = renormalize, scaling_factor
        self.group_limit, self.jitter, self.router_dtype = group_limit, jitter, router_dtype
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        like: dict[str, Any] = {"device": device}
        self.register_buffer("correction_bias", torch.zeros(num_experts, **like) if correction_bias else None)
        counts = torch.zeros(num_experts, dtype=torch.int64, **like) if correction_bias else None
        self.register_buffer("assignments_per_expert", counts, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Linear`` does, uniform within ``1 / sqrt(dim)``; zero the correction bias."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.dim**-0.5), self.dim**-0.5)
        for buffer in self.buffers():
            buffer.zero_()

    @property
    def is_random(self) -> bool:
        """Whether the next forward draws random numbers."""
        return self.training and self.jitter > 0

    def forward(self, x: Tensor, *, ids: Tensor | None = None, padding: Tensor | None = None) -> Routing:
        """Route ``[tokens, dim]`` rows; weights, logits and scores are float32, or float64 for float64 rows.

        ``ids``, ``[tokens, top_k]``, are used instead of an own selection, with weights from the scores as always: the
        replay of a recorded routing. ``padding``, ``[tokens]``, bool, is true for padding tokens.
        """
        expect("TopKRouter", x=(x, Tensor))
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"TopKRouter takes rows, [tokens, dim = {self.dim}], and got {list(x.shape)}.")
        if self.is_random:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits, scores, ids, weights = self._decide(self._logits(x), ids)
        mask = None if padding is None else ~self._checked(padding, x.shape[0])[:, None].expand(ids.shape)
        self._count(ids, mask)
        return Routing(ids=ids, weights=weights, logits=logits, mask=mask, scores=scores, padding=padding)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}"

    def _logits(self, x: Tensor) -> Tensor:
        """In the dtype in which rows and weight are multiplied."""
        if self.router_dtype is None:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.router_dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.router_dtype), self.weight.to(self.router_dtype), bias)

    def _decide(self, logits: Tensor, ids: Tensor | None) -> Decision:
        rule = Rule(self.top_k, self.score, self.score_over == "all", self.renormalize, self.scaling_factor)
        if ids is None and self.group_limit is None and decides_at_once(logits, rule):
            return decide(logits, self.correction_bias, rule)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = rule.scores(logits)
        ids = self._select(scores.detach()) if ids is None else self._given(ids, logits.shape[0])
        return Decision(logits, scores if rule.over_all else None, ids, rule.weights(scores, ids))

    def _select(self, scores: Tensor) -> Tensor:
        if self.correction_bias is not None:
            scores = scores + self.correction_bias
        if self.group_limit is not None:
            scores = scores.masked_fill(~allowed(scores, self.group_limit), float("-inf"))
        return largest(scores, self.top_k)

    def _given(self, ids: Tensor, rows: int) -> Tensor:
        if ids.shape != (rows, self.top_k) or ids.dtype not in (torch.int32, torch.int64):
            raise ShapeError(
                f"ids must be int32 or int64, [tokens, top_k] = [{rows}, {self.top_k}]; they are {ids.dtype}, "
                f"{list(ids.shape)}."
            )
        return ids

    def _checked(self, padding: Tensor, rows: int) -> Tensor:
        if padding.shape != (rows,) or padding.dtype != torch.bool:
            raise ShapeError(
                f"padding must be bool, [tokens] = [{rows}], true for padding tokens; it is {padding.dtype}, "
                f"{list(padding.shape)}."
            )
        return padding

    def _count(self, ids: Tensor, mask: Tensor | None) -> None:
        """Count the decisions of training, each once, for :func:`update_correction_bias`."""
        if self.assignments_per_expert is not None and self.training:
            count = _count_in_graph if torch.compiler.is_compiling() else _count_assignments
            count(self.assignments_per_expert, ids, mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.correction_bias is not None and self.correction_bias.dtype != before.dtype:
            # A step of the bias, 0.001, is lost in the rounding of bf16.
            self.correction_bias = before.to(self.correction_bias.device)
        return self


def _count_assignments(counts: Tensor, ids: Tensor, mask: Tensor | None) -> None:
    """Add what was decided to the counts, unless in a recomputation."""
    if not in_backward():
        ones = torch.ones_like(ids, dtype=torch.int64) if mask is None else mask.long()
        counts.scatter_add_(0, ids.clamp(0, counts.shape[0] - 1).long().flatten(), ones.flatten())


# An operator of its own asks at run time whether it is recomputed, and does not break the graph.
_count_in_graph = torch.library.custom_op("foldpar::count_assignments", mutates_args={"counts"})(_count_assignments)


def _check_choices(score: str, score_over: str, renormalize: bool, jitter: float) -> None:
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; choose {' or '.join(map(repr, SCORES))}.")
    if score_over not in ("all", "chosen"):
        raise ValueError(f"score_over is {score_over!r}; choose 'all' or 'chosen'.")
    if score_over == "chosen" and score != "softmax":
        raise ValueError(
            f"score_over='chosen' changes only a softmax: the {score} of a logit does not depend on the others. Leave "
            f"score_over='all'."
        )
    if score_over == "chosen" and not renormalize:
        raise ValueError(
            "score_over='chosen' takes the softmax over the chosen experts, so their weights sum to 1 and "
            "renormalize=False cannot hold. For weights that do not, take score_over='all'."
        )
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter = {jitter} must be at least 0 and below 1: rows are multiplied by 1 +- jitter.")
