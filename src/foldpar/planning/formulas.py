"""The formulas of a plan, in bytes and FLOPs, each with its source. Numbers in, numbers out: no layouts, no files.

Sizes are of one rank: ``queries``, ``keys`` and ``heads`` are its own after tensor parallelism. ``item`` is the size of
an element in computation, 2 for bfloat16 and 4 for float32. Sums are over a forward and a backward where a name does
not say otherwise. What a layer keeps for its backward is that of the code in transformers, line by line; that of the
experts is :func:`foldpar.moe.kernels.grouped.grouped_feed_forward`'s.
"""

from __future__ import annotations

from math import comb

__all__ = [
    "ADAM_PASSES",
    "ATTENTION_PASSES",
    "MOST_LISTED",
    "NORM_MOVES",
    "ROTATION_MOVES",
    "UNASKED",
    "activation_backward",
    "attention_flops",
    "attention_kept",
    "collective_bytes",
    "distinct_ranks",
    "eager_attention_kept",
    "experts_backward",
    "feed_forward_kept",
    "head_peak",
    "in_flight",
    "latent_attention_kept",
    "matrix_flops",
    "most_rows",
    "norm_kept",
    "one_sided_room",
    "pipeline_bubble",
    "product_seconds",
    "routed_rows",
    "router_kept",
    "rows_kept",
    "shared_bytes",
    "tables_in_messages",
    "tables_one_sided",
]


# -- Rows -------------------------------------------------------------------------------------------------------------


def distinct_ranks(experts: int, top_k: int, ranks: int) -> float:
    """How many of ``ranks`` a token's experts lie on, on average: a row travels once to each of them.

    ``D = R * (1 - C(E - E/R, K) / C(E, K))``: a rank is missed where all K experts are among the other E - E/R.
    ``ranks`` can be those of an EP group, or parts of it such as nodes.

    >>> [round(distinct_ranks(128, 8, ranks), 2) for ranks in (1, 4, 8, 64)]
    [1.0, 3.63, 5.34, 7.78]

    Source: sampling without replacement; assumes that routing is balanced and experts are chosen independently.
    """
    return ranks * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))


def routed_rows(own_tokens: float, top_k: int, etp: int, load: float, ranks: int, local_experts: int) -> float:
    """Expert-major rows of the rank with ``load`` times the balanced number; never more than can arrive there.

    Every etp rank computes its slice for the rows of all of them.
    """
    balanced = own_tokens * top_k * etp
    return min(load * balanced, own_tokens * ranks * etp * min(top_k, local_experts))


def most_rows(ranks: int, tokens: int, top_k: int, local_experts: int) -> int:
    """Expert-major rows that can come to a rank, from ``ranks`` that route so many tokens each."""
    return ranks * tokens * min(top_k, local_experts)


def one_sided_room(
    ranks: int, etp: int, tokens: int, top_k: int, local_experts: int, hidden: int, item: int
) -> int | None:
    """Expert-major rows for which memory is made where rows travel one-sided; ``None``: for as many as come.

    There is room for all where those beyond the balanced number are few bytes. Else the host waits for their number, as
    it does for few large experts, whose plain products are faster.

    Source: :meth:`foldpar.OneSided.way`, without ``slack``; ``UNASKED`` and ``MOST_LISTED`` there.
    """
    most = most_rows(ranks, tokens, top_k, local_experts)
    few_and_large = local_experts <= MOST_LISTED and most >= 8192 * local_experts
    unsure = (most - tokens * top_k * etp) * hidden * item
    return None if unsure > UNASKED or few_and_large else most


UNASKED = 2**27
MOST_LISTED = 8


def shared_bytes(ranks: int, tokens: int, hidden: int, top_k: int, item: int) -> int:
    """Bytes of a rank that ``ranks`` read where rows travel one-sided: one memory for the forwards of all layers.

    In one half its tokens' expert ids, weights and rows, in the other a sum, and gradients of weights, for every token
    of every rank. Parts are whole 256 bytes, halves whole MiB.

    Source: :meth:`foldpar.moe.transport.one_sided.RowExchange.halves`, :mod:`foldpar.comm.peers`.
    """
    row, choices = hidden * item, 4 * top_k
    first = (4, tokens * choices, tokens * choices, tokens * row)
    second = (ranks * tokens * row, ranks * tokens * choices)
    return sum(_whole(sum(_whole(size, 256) for size in half), 2**20) for half in (first, second))


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step


# -- What a forward keeps for its backward, in bytes a token ----------------------------------------------------------


def norm_kept(width: int, item: int, *, wide_weight: bool = False, output: bool = True) -> float:
    """An RMS norm: its input in float32, the normalised input, one number, and the output where a product keeps it.

    ``wide_weight``: the weight is multiplied in float32 (GPT-OSS).
    """
    return width * (4 + (4 if wide_weight else item) + (item if output else 0)) + 4


def attention_kept(queries: int, keys: int, heads: int, item: int, *, qk_norm: bool) -> float:
    """Fused attention: queries, keys, values, the output, a number per head; norms of queries and keys before.

    Source: FlashAttention (Dao et al. 2022), section 3.1: the statistics of the softmax are kept, not the scores.
    """
    norms = norm_kept(queries + keys, item, output=False) - 4 + 4 * (heads + keys * heads // queries) if qk_norm else 0
    return norms + item * 2 * (queries + keys) + 4 * heads


def latent_attention_kept(
    q_rank: int, kv_rank: int, nope: int, rope: int, value: int, heads: int, item: int, *, copies_output: bool
) -> float:
    """Latent attention: the latents with their norms, then heads; values stay inside of the product they came from.

    ``copies_output``: the kernel's output is copied once more for the projection (on CPU).

    Source: DeepSeek-V2 (2024), section 2.1; transformers' ``DeepseekV3Attention``.
    """
    latents = (norm_kept(q_rank, item) if q_rank else 0) + norm_kept(kv_rank, item) + (rope * item if item == 4 else 0)
    per_head = 2 * (nope + rope) + (nope + value) + value * (2 if copies_output else 1)
    return latents + heads * (item * per_head + 4)


def eager_attention_kept(queries: int, heads: int, length: int, item: int) -> float:
    """Attention without a fused kernel: queries, repeated keys and values, and the probabilities of every pair."""
    return item * (4 * queries + heads * (length + 1)) + 8 * heads


def feed_forward_kept(units: int, item: int, *, gated_output: int = 0) -> float:
    """A gated dense network: gate, its activation, up, their product; ``gated_output``: width that a gate scales."""
    return item * (4 * units + gated_output)


def router_kept(experts: int, top_k: int, hidden: int, item: int, *, wide: bool) -> float:
    """The scores in float32, what was chosen of them, and the rows in float32 where the router works in it."""
    return 4 * experts + 20 * top_k + 4 + ((experts + 8 * top_k) + (4 * hidden if item < 4 else 0) if wide else 0)


def rows_kept(rows: float, copies: float, hidden: int, units: int, item: int) -> float:
    """Experts: the first product (gate and up) of each row, and those rows that were copied or have arrived; the
    activation is computed again."""
    return item * (2 * units * rows + hidden * copies)


def tables_in_messages(rows: float, own: float, arriving: float, met: float, ep: int, top_k: int) -> float:
    """Of each expert-major row its slot, its row and its weight; of each sent row its token and back; of each row that
    arrived its copies. The own tokens' expert ids, 8 bytes each, are not kept any more.

    Source: :class:`foldpar.moe.transport.messages.DispatchPlan`.
    """
    return 20 * rows + 8 * own * (ep + met - top_k) + 8 * arriving * top_k


def tables_one_sided(rows: float, own: float, slots: float, top_k: int, *, apart: bool, in_places: bool) -> float:
    """Numbers of 4 bytes: of each slot its copies, and of the own tokens their experts; where rows arrive ``apart``
    from their copies, of each copy its slot and its row; and the weights, of slots or of rows.

    Source: :class:`foldpar.moe.transport.one_sided.OneSidedPlan`.
    """
    weights = top_k * slots if in_places else rows
    return 4 * (top_k * (slots + own) + (2 * rows if apart else 0) + weights)


def experts_backward(
    rows: float,
    arriving: float,
    hidden: int,
    units: int,
    item: int,
    *,
    in_places: bool,
    own_products: bool,
    one_kernel: bool,
) -> tuple[float, float]:
    """What the backward of the experts needs at once beside what is kept, first without the gradients of their weights.

    Beside the gradients that arrive: what the activation's backward holds (:func:`activation_backward`); then the
    gradient of the first product, the activation where torch's products are used, and the gradients of all rows, which
    are summed where rows lie ``in_places``.

    Source: the two ``_FeedForward.backward`` of :mod:`foldpar.moe.kernels.grouped` and ``products``.
    """
    then = ((2 if own_products else 3) * units + hidden) * rows + (hidden * arriving if in_places else 0)
    first = activation_backward(units, item, one_kernel=one_kernel) * rows
    return item * hidden * arriving + first, item * (hidden * arriving + then)


def activation_backward(units: int, item: int, *, one_kernel: bool) -> float:
    """Bytes of a row: its gradient, the activation again, and the gradient of the first product.

    Without the kernel, torch's operations work in float32, in which the first product and the gradient are copied where
    they are not: value, slope, two factors, and the two joined.

    Source: :func:`foldpar.moe.kernels.activations.backward`.
    """
    if one_kernel:
        return 4.0 * units * item
    return float(units * (item + 24 + (12 if item < 4 else 0)))


# -- Peaks ------------------------------------------------------------------------------------------------------------


def head_peak(vocab: int, item: int) -> float:
    """The largest sum of what the loss holds, bytes a token: probabilities, their gradient and that of the logits.

    float32 each, ``12 * vocab``, in the backward of the cross-entropy. (In the forward: logits, in float32, and their
    log-softmax, 10 to 12.)
    """
    return 12.0 * vocab


# -- Passes over memory -----------------------------------------------------------------------------------------------

NORM_MOVES = 108
"""Bytes that an RMS norm moves for each number, forward and backward: transformers' works in float32, 36 and 72."""
ROTATION_MOVES = 30
"""How often the rotation of queries and keys reads or writes a number, forward and backward."""
ADAM_PASSES = 21
"""How often AdamW, over torch's lists of tensors, reads or writes a number of a parameter's size.

Decay 2, first moment 3, second moment 2 and 4, its root 2, correction 2, epsilon 2, the step 4.
"""


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def matrix_flops(rows: float, inner: int, outer: int) -> float:
    """A product: two operations for each element of the weight and each row."""
    return 2.0 * rows * inner * outer


ATTENTION_PASSES = 3.5
"""Forward and backward of fused attention in forwards: the scores are computed again (FlashAttention-2, Dao 2023)."""


def attention_flops(tokens: float, length: int, queries: int, values: int) -> float:
    """Scores and weighted sums of causal attention, forward: half of all pairs of a sequence.

    Source: PaLM (Chowdhery et al. 2022), appendix B, halved for the causal mask.
    """
    return tokens * length * (queries + values)


def product_seconds(flops: float, moved: float, rate: float, bandwidth: float) -> float:
    """A product that needs ``flops`` and moves so many bytes: between the larger and the sum of the two times.

    The exponent 1.4 fits grouped products from 64 to 2,048 rows an expert (benchmarks/NOTES.md and the peers' table).

    Source: the roofline model (Williams et al. 2009), with a rounded corner.
    """
    return float(((flops / rate) ** 1.4 + (moved / bandwidth) ** 1.4) ** (1 / 1.4))


# -- Communication ----------------------------------------------------------------------------------------------------


def collective_bytes(kind: str, size: int, total: float) -> float:
    """Bytes that a rank sends, for ``total`` bytes in the whole result (all-gather, all-reduce) or input.

    Rings: all-gather and reduce-scatter ``(n - 1) / n``, all-reduce twice that.

    Source: Thakur et al. 2005; NCCL's own accounting of bus bandwidth.
    """
    once = total * (size - 1) / size
    return 2 * once if kind == "all_reduce" else once


def pipeline_bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Idle time of a pipeline, as a part of its busy time, with one forward and one backward in turn (1F1B).

    ``chunks``: parts of a stage's layers that take turns, in an interleaved schedule.

    Source: Narayanan et al. 2021, section 2.2: ``(p - 1) / (v m)``.
    """
    return (stages - 1) / (chunks * micro_batches)


def in_flight(behind: int, stages: int, micro_batches: int, chunks: int) -> float:
    """How many micro-batches' activations a pipeline stage keeps, with ``behind`` stages from it to the end.

    Source: Narayanan et al. 2021, section 2.2: interleaving keeps ``1 + (p - 1) / (p v)`` times as many on the first.
    """
    more = (stages - 1) / chunks if chunks > 1 else 0.0
    return min(behind + more, micro_batches)
