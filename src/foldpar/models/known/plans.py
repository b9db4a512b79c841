"""Tensor-parallel plans for attentions and shared experts that a model's own plan leaves out."""

from __future__ import annotations

ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
"""Separate projections for queries, keys and values, all by heads."""

LATENT_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.q_b_proj": "colwise",
    "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "self_attn.kv_b_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
"""Keys and values from one latent vector (DeepSeek's MLA): what comes after the latents is by heads."""

LATENTS = ("q_a_proj", "q_a_layernorm", "kv_a_layernorm")
"""What lies in front of the projections by heads there."""


def feed_forward(name: str) -> dict[str, str]:
    """A gated dense network of the name, such as shared experts."""
    return {f"{name}.gate_proj": "colwise", f"{name}.up_proj": "colwise", f"{name}.down_proj": "rowwise"}
