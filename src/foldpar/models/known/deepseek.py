"""DeepSeek's blocks, with ungated shared experts, and those that took them over."""

from __future__ import annotations

from foldpar.models.known.adapter import MoEAdapter
from foldpar.models.known.plans import LATENT_ATTENTION, LATENTS, feed_forward

ADAPTERS = (
    MoEAdapter(("DeepseekV2Moe", "DeepseekV3MoE"), tp_plan=LATENT_ATTENTION, whole=LATENTS),
    MoEAdapter(
        ("Glm4MoeMoE", "Dots1MoE", "SolarOpenMoE", "ExaoneMoeSparseMoEBlock"),
        tp_plan=feed_forward("mlp.shared_experts"),
    ),
)
