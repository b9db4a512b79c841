"""A tiny random model of each family, from its configuration: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from draws import seeded
from torch import nn

VOCAB = 32
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 2,
}


@dataclass(frozen=True)
class Family:
    """The configuration class of a family, and what it wants beside the common sizes."""

    config: str
    options: dict[str, Any]
    model: str | None = None
    """The model's class, where it is not ``AutoModelForCausalLM``'s choice."""
    around: dict[str, Any] | None = None
    """Of a model of several parts: the other options of its configuration, in which this is the ``text_config``."""

    def make(self, **overrides: Any) -> nn.Module:
        """The model with eager attention and experts, in the default dtype and on the default device."""
        options = {**_COMMON, **self.options, **overrides}
        options = {key: value for key, value in options.items() if value != "drop"}
        if self.around is not None:
            options = {**self.around, "text_config": options}
        config = getattr(transformers, self.config)(**options)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part._attn_implementation = "eager"
            part._experts_implementation = "eager"
        if self.model is not None:
            return getattr(transformers, self.model)._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config)


_MOE = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
_LOGITS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
_DEEPSEEK = {
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}

_INDEXER = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
}
_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "d_model": 8,
    "output_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "downsample_hidden_size": 8,
}
_ONE_DENSE = ["dense", "sparse"]
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralConfig", {"intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **_LOGITS}
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {**_MOE, **_LOGITS, "shared_expert_intermediate_size": 8, "intermediate_size": 8, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_MOE, **_LOGITS, "intermediate_size": 8, "norm_topk_prob": True}),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {**_MOE, **_LOGITS, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 8, "intermediate_size": 8},
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeTextConfig",
        {**_MOE, **_LOGITS, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 8},
        model="Qwen3_5MoeForCausalLM",
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        {
            **_LATENT,
            **_DEEPSEEK,
            "topk_method": "greedy",
            "n_group": None,
            "topk_group": None,
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {
            **_LATENT,
            **_DEEPSEEK,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        {
            **_DEEPSEEK,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "olmoe": Family(
        "OlmoeConfig", {**_LOGITS, "intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        {
            **_LOGITS,
            "intermediate_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": Family(
        "Llama4TextConfig",
        {
            **_LOGITS,
            "intermediate_size": 8,
            "intermediate_size_mlp": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layers": [1],
        },
        model="Llama4ForCausalLM",
    ),
    "phimoe": Family(
        "PhimoeConfig", {**_LOGITS, "intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "granitemoe": Family(
        "GraniteMoeConfig", {**_LOGITS, "intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig",
        {
            **_LOGITS,
            "intermediate_size": 8,
            "moe_intermediate_size": 8,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "use_bias": True,
        },
    ),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", {"intermediate_size": 8, "num_experts": 4, "moe_topk": 2}),
    "minimax_m2": Family(
        "MiniMaxM2Config", {**_LOGITS, "intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "dots1": Family(
        "Dots1Config",
        {
            **_DEEPSEEK,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "flex_olmo": Family(
        "FlexOlmoConfig", {**_LOGITS, "intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    ),
    "minimax": Family(
        "MiniMaxConfig",
        {
            **_LOGITS,
            "intermediate_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 4,
        },
    ),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        {**_MOE, "intermediate_size": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig",
        {
            **_LOGITS,
            "intermediate_size": 8,
            "shared_intermediate_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "solar_open": Family("SolarOpenConfig", {**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "exaone_moe": Family(
        "ExaoneMoeConfig",
        {
            **_MOE,
            "intermediate_size": 8,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
        },
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeConfig",
        {**_MOE, **_LOGITS, "intermediate_size": 8, "rope_parameters": _SECTIONS},
        model="Qwen3VLMoeForConditionalGeneration",
        around={"vision_config": _VISION},
    ),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeThinkerConfig",
        {**_MOE, **_LOGITS, "intermediate_size": 8, "rope_parameters": _SECTIONS},
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
        around={"vision_config": _VISION, "audio_config": _AUDIO},
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig", {**_LATENT, **_DEEPSEEK, "n_group": 1, "topk_group": 1, "mlp_layer_types": _ONE_DENSE}
    ),
    "glm_moe_dsa": Family("GlmMoeDsaConfig", {**_LATENT, **_DEEPSEEK, **_INDEXER, "n_group": 1, "topk_group": 1}),
    "deepseek_v32": Family("DeepseekV32Config", {**_LATENT, **_DEEPSEEK, **_INDEXER, "n_group": 2, "topk_group": 1}),
    "deepseek_v4": Family(
        "DeepseekV4Config",
        {
            **_LOGITS,
            **_INDEXER,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "q_lora_rank": 8,
            "o_lora_rank": 8,
            "o_groups": 2,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "sliding_window": 4,
            "partial_rotary_factor": 0.5,
            "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "num_nextn_predict_layers": 0,
        },
    ),
    "kimi_linear": Family(
        "KimiLinearConfig",
        {
            **_LATENT,
            **_DEEPSEEK,
            "q_lora_rank": "drop",
            "num_local_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "linear_head_dim": 4,
            "linear_num_heads": 2,
            "linear_conv_kernel_dim": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": _ONE_DENSE,
        },
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            "intermediate_size": 8,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "num_hidden_layers": "drop",
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 2,
            "conv_kernel": 2,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 8,
            "moe_shared_expert_intermediate_size": 8,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        {
            **_LOGITS,
            "intermediate_size": 8,
            "shared_intermediate_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_chunk_size": 4,
        },
    ),
    "jetmoe": Family("JetMoeConfig", {"intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


BRIEFLY = (
    *("flex_olmo", "minimax", "lfm2_moe", "granitemoeshared", "solar_open", "exaone_moe"),
    *("qwen3_vl_moe", "qwen3_omni_moe", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "granitemoehybrid"),
)
"""Families that resemble another one, and are tested in the long run only."""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> nn.Module:
    """A model with every parameter random and of a size that matters, correction biases and gains included."""
    with seeded(seed):
        model = FAMILIES[family].make(**overrides)
    randomise(model, seed)
    return model.to(dtype)


def randomise(model: nn.Module, seed: int) -> None:
    """Draw parameters anew: initial values such as zero biases, unit gains and tiny weights would hide mistakes."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = parameter.shape[-1] if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=draw) * (0.5 if width == 1 else width**-0.5)
            gain = parameter.dim() == 1 and "norm" in name
            parameter.copy_(1 + 0.3 * noise if gain else noise)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=draw) * 0.1)
            if "tid2eid" in name:  # experts by token, different ones
                buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) * 3 // 2 % 4)
