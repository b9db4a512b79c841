"""DeepSeek's blocks, with ungated shared experts, and those that took them over."""

from __future__ import annotations

from foldpar.models.known.adapter import MoEAdapter
from foldpar.models.known.plans import LATENT_ATTENTION, LATENTS, feed_forward

ADAPTERS = (
    MoEAdapter(("DeepseekV2Moe", "DeepseekV3MoE", "Glm4MoeLiteMoE"), tp_plan=LATENT_ATTENTION, whole=LATENTS),
    # Which keys are attended to, their indexer says from whole rows, on every lane alike.
    MoEAdapter(("DeepseekV32MoE", "GlmMoeDsaMoE"), tp_plan=LATENT_ATTENTION, whole=(*LATENTS, "indexer"), partial=()),
    MoEAdapter(("DeepseekV4SparseMoeBlock", "KimiLinearMoE")),
    MoEAdapter(
        ("Glm4MoeMoE", "Dots1MoE", "SolarOpenMoE", "ExaoneMoeSparseMoEBlock"),
        tp_plan=feed_forward("mlp.shared_experts"),
    ),
)
