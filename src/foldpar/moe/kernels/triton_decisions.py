"""Triton kernels for what a router decides, each with a plain torch twin in ``rules``. A row is one token's.

Nothing is atomic, and rows do not know of each other: equal logits give equal decisions in any batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldpar.moe.kernels.rules import Decision, Rule
from foldpar.moe.kernels.sizes import ceil_div, power_of_2
from foldpar.moe.kernels.triton_launches import Kernel

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _scores(raw, at, inside, SOFTMAX: tl.constexpr, OVER_ALL: tl.constexpr):
    """Logits and scores in float32; of no expert, minus infinity and zero."""
    logits = tl.load(raw + at, mask=inside, other=float("-inf")).to(tl.float32)
    scores = logits
    if OVER_ALL:
        if SOFTMAX:
            powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
            scores = powers / tl.sum(powers, axis=1)[:, None]
        else:
            scores = tl.sigmoid(logits)
    return logits, scores


@triton.jit
def _weights(chosen, there, OVER_ALL: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Of the chosen scores: the weights before they are scaled, and what they were divided by."""
    total = tl.sum(tl.where(there, chosen, 0.0), axis=1) + _TINY
    weights = chosen
    if not OVER_ALL:
        powers = tl.exp(chosen - tl.max(tl.where(there, chosen, float("-inf")), axis=1)[:, None])
        weights = powers / tl.sum(tl.where(there, powers, 0.0), axis=1)[:, None]
    elif RENORMALIZE:
        weights = chosen / total[:, None]
    return weights, total


@Kernel
@triton.jit
def _decide_kernel(
    raw, bias, logits_out, scores_out, ids_out, weights_out, rows, experts, factor,
    SOFTMAX: tl.constexpr, OVER_ALL: tl.constexpr, RENORMALIZE: tl.constexpr, BIASED: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EP)
    inside = (row[:, None] < rows) & (expert[None, :] < experts)
    at = row.to(tl.int64)[:, None] * experts + expert[None, :]
    logits, scores = _scores(raw, at, inside, SOFTMAX, OVER_ALL)
    tl.store(logits_out + at, logits, mask=inside)
    if OVER_ALL:
        tl.store(scores_out + at, scores, mask=inside)
    key = scores
    if BIASED:
        key += tl.load(bias + expert, mask=expert < experts, other=0.0).to(tl.float32)[None, :]
    key = tl.where(key != key, float("inf"), key)
    open = inside
    choice = tl.arange(0, KP)
    ids = tl.zeros([ROWS, KP], dtype=tl.int32)
    chosen = tl.zeros([ROWS, KP], dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.max(tl.where(open, key, float("-inf")), axis=1)
        place = tl.min(tl.where(open & (key == best[:, None]), expert[None, :], EP), axis=1)
        hit = expert[None, :] == place[:, None]
        score = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        ids = tl.where(choice[None, :] == k, place[:, None], ids)
        chosen = tl.where(choice[None, :] == k, score[:, None], chosen)
        open = open & (hit == 0)
    there = choice[None, :] < K
    weights, _ = _weights(chosen, there, OVER_ALL, RENORMALIZE)
    slot = row.to(tl.int64)[:, None] * K + choice[None, :]
    there = there & (row[:, None] < rows)
    tl.store(ids_out + slot, ids.to(tl.int64), mask=there)
    tl.store(weights_out + slot, weights * factor, mask=there)


@Kernel
@triton.jit
def _gradient_kernel(
    raw, ids, of_logits, of_scores, of_weights, grad, rows, experts, factor,
    SOFTMAX: tl.constexpr, OVER_ALL: tl.constexpr, RENORMALIZE: tl.constexpr, OF_LOGITS: tl.constexpr,
    OF_SCORES: tl.constexpr, OF_WEIGHTS: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EP)
    inside = (row[:, None] < rows) & (expert[None, :] < experts)
    at = row.to(tl.int64)[:, None] * experts + expert[None, :]
    _, scores = _scores(raw, at, inside, SOFTMAX, OVER_ALL)
    total = tl.zeros([ROWS, EP], dtype=tl.float32)
    if OF_SCORES:
        total += tl.load(of_scores + at, mask=inside, other=0.0).to(tl.float32)
    if OF_WEIGHTS:
        choice = tl.arange(0, KP)
        there = (row[:, None] < rows) & (choice[None, :] < K)
        slot = row.to(tl.int64)[:, None] * K + choice[None, :]
        arriving = tl.load(of_weights + slot, mask=there, other=0.0).to(tl.float32) * factor
        chosen = tl.zeros([ROWS, KP], dtype=tl.float32)
        for k in tl.static_range(K):
            place = tl.load(ids + row.to(tl.int64) * K + k, mask=row < rows, other=0).to(tl.int32)
            score = tl.sum(tl.where(expert[None, :] == place[:, None], scores, 0.0), axis=1)
            chosen = tl.where(choice[None, :] == k, score[:, None], chosen)
        weights, divisor = _weights(chosen, choice[None, :] < K, OVER_ALL, RENORMALIZE)
        mean = tl.sum(tl.where(there, arriving * weights, 0.0), axis=1)[:, None]
        of_chosen = arriving
        if not OVER_ALL:
            of_chosen = weights * (arriving - mean)
        elif RENORMALIZE:
            of_chosen = (arriving - mean) / divisor[:, None]
        for k in tl.static_range(K):
            place = tl.load(ids + row.to(tl.int64) * K + k, mask=row < rows, other=0).to(tl.int32)
            mine = tl.sum(tl.where(choice[None, :] == k, of_chosen, 0.0), axis=1)
            total += tl.where(expert[None, :] == place[:, None], mine[:, None], 0.0)
    if OVER_ALL:
        if SOFTMAX:
            total = scores * (total - tl.sum(tl.where(inside, scores * total, 0.0), axis=1)[:, None])
        else:
            total = total * scores * (1 - scores)
    if OF_LOGITS:
        total += tl.load(of_logits + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + at, total.to(grad.dtype.element_ty), mask=inside)


def decide(logits: Tensor, bias: Tensor | None, rule: Rule) -> Decision:
    """What the logits of ``[tokens, num_experts]`` decide. Twin: ``rules.decide_in_steps``."""
    logits, (rows, experts) = logits.contiguous(), logits.shape
    wide = logits.new_empty((rows, experts), dtype=torch.float32)
    scores = torch.empty_like(wide) if rule.over_all else None
    ids = logits.new_empty((rows, rule.top_k), dtype=torch.int64)
    weights = logits.new_empty((rows, rule.top_k), dtype=torch.float32)
    if rows:
        grid, options = _cut(rows, experts, rule)
        _decide_kernel[grid](
            logits, bias, wide, scores, ids, weights, rows, experts, float(rule.scaling_factor),
            BIASED=bias is not None, **options,
        )  # fmt: skip
    return Decision(wide, scores, ids, weights)


def gradient(
    logits: Tensor,
    ids: Tensor,
    of_logits: Tensor | None,
    of_scores: Tensor | None,
    of_weights: Tensor | None,
    rule: Rule,
) -> Tensor:
    """Of the logits, from the gradients of what they decided. Twin: ``rules.gradient``."""
    logits, (rows, experts) = logits.contiguous(), logits.shape
    grad = torch.empty_like(logits)
    given = [None if each is None else each.contiguous() for each in (of_logits, of_scores, of_weights)]
    if rows:
        grid, options = _cut(rows, experts, rule)
        _gradient_kernel[grid](
            logits, ids, *given, grad, rows, experts, float(rule.scaling_factor), OF_LOGITS=given[0] is not None,
            OF_SCORES=given[1] is not None, OF_WEIGHTS=given[2] is not None, **options,
        )  # fmt: skip
    return grad


def _cut(rows: int, experts: int, rule: Rule) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and what the kernels are made for."""
    width = power_of_2(experts)
    at_once = max(1, 1024 // width)
    return (ceil_div(rows, at_once),), {
        "SOFTMAX": rule.score == "softmax", "OVER_ALL": rule.over_all, "RENORMALIZE": rule.renormalize,
        "K": rule.top_k, "KP": power_of_2(rule.top_k), "EP": width, "ROWS": at_once, "num_warps": 4,
    }  # fmt: skip
