"""Blocks whose experts follow the common convention: Mixtral's and Qwen's, and those that resemble them."""

from __future__ import annotations

from foldpar.models.known.adapter import MoEAdapter
from foldpar.models.known.plans import ATTENTION, feed_forward

ADAPTERS = (
    MoEAdapter(("MixtralSparseMoeBlock", "Qwen3MoeSparseMoeBlock", "OlmoeSparseMoeBlock", "FlexOlmoSparseMoeBlock")),
    MoEAdapter(("MiniMaxSparseMoeBlock", "MiniMaxM2SparseMoeBlock", "Lfm2MoeSparseMoeBlock")),
    MoEAdapter("Qwen2MoeSparseMoeBlock", tp_plan=feed_forward("mlp.shared_expert")),
    MoEAdapter(("Qwen3NextSparseMoeBlock", "Qwen3_5MoeSparseMoeBlock")),
    MoEAdapter(("Qwen3VLMoeTextSparseMoeBlock", "Qwen3OmniMoeThinkerTextSparseMoeBlock")),
    MoEAdapter("Ernie4_5_MoeSparseMoeBlock"),
    MoEAdapter(
        ("PhimoeSparseMoeBlock", "GraniteMoeMoE", "GraniteMoeSharedMoE", "GraniteMoeHybridMoE"), tp_plan=ATTENTION
    ),
    MoEAdapter(
        "HunYuanMoEV1Moe",
        tp_plan={**ATTENTION, **feed_forward("mlp.shared_mlp")},
        partial=("query_layernorm", "key_layernorm"),
    ),
)
