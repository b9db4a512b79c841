"""``read_model``: the numbers of a model out of a transformers ``config.json``; no weights, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from foldpar.errors import ModelError
from foldpar.planning.documents import read_object
from foldpar.planning.shape import LatentAttention, ModelShape, counted
from foldpar.wording import as_integer

__all__ = ["MODEL_TYPES", "read_model"]


def read_model(source: str | PathLike[str] | Mapping[str, Any]) -> ModelShape:
    """The shape of a model: from a folder with a ``config.json``, from such a file, or from its contents.

    Known are the model types ``deepseek_v2``, ``deepseek_v3``, ``glm4_moe``, ``gpt_oss``, ``mixtral``, ``qwen2_moe``,
    ``qwen3_moe``, and of dense models ``llama``, ``mistral``, ``qwen2``, ``qwen3``. Layers for predicting several
    tokens, which transformers does not load, do not count.

    Example:
        >>> config = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
        ...           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        ...           "num_local_experts": 8, "num_experts_per_tok": 2}
        >>> shape = read_model(config)
        >>> shape.experts, f"{shape.parameters / 1e9:.1f} B"
        (8, '46.7 B')

    Raises:
        ModelError: there is no such file, it is no JSON, its model type is not known, or a number is missing or wrong.
    """
    document, where = (source, "the configuration") if isinstance(source, Mapping) else _loaded(source)
    text = document.get("text_config")
    if isinstance(text, Mapping) and "model_type" in text:
        document = text
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        near = get_close_matches(str(kind), _READERS, 1)
        raise ModelError(
            f"{where}: model_type = {kind!r} is not known to the planner. Known are {', '.join(MODEL_TYPES)}"
            f"{f'; the nearest is {near[0]}' if near else ''}. For another model give its numbers: "
            f"foldpar.planning.ModelShape(hidden=..., layers=..., ...), or --hidden, --layers, --experts, ..."
        )
    return _READERS[kind](_Numbers({**_DEFAULTS.get(kind, {}), **document}, where))


def _loaded(source: str | PathLike[str]) -> tuple[Mapping[str, Any], str]:
    try:
        path = Path(source)
    except TypeError:
        raise ModelError(
            f"A model is a folder with a config.json, such a file, its contents as a mapping, or a ModelShape; and not "
            f"{source!r}."
        ) from None
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist. A model is a folder with a config.json, or that file; to plan for a model of the "
            f"hub, download its config.json alone: hf download NAME config.json."
        )
    return read_object(path, ModelError), str(path)


class _Numbers:
    """The entries of a configuration, with an error that names what is missing."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self.document, self.where = document, where

    def size(self, *names: str) -> int:
        for name in names:
            if self.document.get(name) is not None:
                return self.count(name, least=1)
        raise ModelError(f"{self.where}: a {self.document['model_type']} needs {' or '.join(names)}, which is missing.")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.document.get(name)
        return default if value is None else value

    def count(self, name: str, default: int = 0, *, least: int = 0) -> int:
        """A number that may be missing, or 0."""
        return counted(name, self.get(name, default), self.where, least=least)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; a text such as ``"false"`` is neither."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {name} = {value!r} can be true or false.")
        return value

    def refuse_mlp_bias(self) -> None:
        if self.flag("mlp_bias"):
            raise ModelError(f"{self.where}: dense layers with mlp_bias are not known to the planner.")

    def common(self, **more: Any) -> dict[str, Any]:
        """What all decoders have."""
        return {
            "name": self.document["model_type"],
            "hidden": self.size("hidden_size"),
            "layers": self.size("num_hidden_layers"),
            "heads": self.size("num_attention_heads"),
            "kv_heads": self.get("num_key_value_heads"),
            "head_dim": self.get("head_dim"),
            "vocab": self.size("vocab_size"),
            "tied": self.flag("tie_word_embeddings"),
            # An embedding with a padding token stays whole, see foldpar.plan_fold.
            "embedding_whole": self.document.get("pad_token_id") is not None,
            **more,
        }


def _sparse_steps(config: _Numbers, layers: int) -> tuple[int, ...]:
    """Qwen's dense layers: named ones, and those between the sparse steps."""
    step, named = config.count("decoder_sparse_step", 1), config.get("mlp_only_layers", ())
    if not step or not isinstance(named, (list, tuple)) or any(as_integer(each) is None for each in named):
        raise ModelError(
            f"{config.where}: decoder_sparse_step = {step} is to be a positive integer, and mlp_only_layers = "
            f"{named!r} a list of layers."
        )
    return tuple(layer for layer in range(layers) if layer in named or (layer + 1) % step)


def _mixtral(config: _Numbers) -> ModelShape:
    return ModelShape(
        **config.common(
            experts=config.size("num_local_experts", "num_experts"),
            top_k=config.size("num_experts_per_tok"),
            expert_hidden=config.size("intermediate_size"),
        )
    )


def _qwen_moe(config: _Numbers, **more: Any) -> ModelShape:
    return ModelShape(
        **config.common(
            intermediate=config.get("intermediate_size", 0),
            experts=config.size("num_experts", "num_local_experts"),
            top_k=config.size("num_experts_per_tok"),
            expert_hidden=config.size("moe_intermediate_size"),
            dense_layers=_sparse_steps(config, config.size("num_hidden_layers")),
            **more,
        )
    )


def _qwen2_moe(config: _Numbers) -> ModelShape:
    shared = config.size("shared_expert_intermediate_size")
    return _qwen_moe(config, shared_hidden=shared, shared_gate=True, qkv_bias=config.flag("qkv_bias", True))


def _qwen3_moe(config: _Numbers) -> ModelShape:
    biased = config.flag("attention_bias")
    return _qwen_moe(config, qk_norm=True, qkv_bias=biased, out_bias=biased)


def _leading_dense(config: _Numbers, **more: Any) -> ModelShape:
    """DeepSeek's, with dense layers in front and shared experts as wide as several routed ones."""
    units = config.size("moe_intermediate_size")
    return ModelShape(
        **config.common(
            intermediate=config.get("intermediate_size", 0),
            experts=config.size("n_routed_experts", "num_local_experts", "num_experts"),
            top_k=config.size("num_experts_per_tok"),
            expert_hidden=units,
            shared_hidden=units * config.count("n_shared_experts"),
            shared_name="shared_experts",
            dense_layers=tuple(range(min(config.count("first_k_dense_replace"), config.size("num_hidden_layers")))),
            **more,
        )
    )


def _deepseek(config: _Numbers) -> ModelShape:
    latent = LatentAttention(
        q_rank=config.count("q_lora_rank"),
        kv_rank=config.size("kv_lora_rank"),
        nope=config.size("qk_nope_head_dim"),
        rope=config.size("qk_rope_head_dim"),
        value=config.size("v_head_dim"),
    )
    if config.flag("attention_bias"):
        raise ModelError(f"{config.where}: latent attention with attention_bias is not known to the planner.")
    config.refuse_mlp_bias()
    return _leading_dense(config, latent=latent)


def _glm4_moe(config: _Numbers) -> ModelShape:
    # The class gives queries, keys and values a bias where attention_bias is set, and the output none.
    return _leading_dense(config, qk_norm=config.flag("use_qk_norm"), qkv_bias=config.flag("attention_bias"))


def _gpt_oss(config: _Numbers) -> ModelShape:
    biased = config.flag("attention_bias", True)
    common = config.common(
        experts=config.size("num_local_experts", "num_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert_hidden=config.size("intermediate_size"),
        qkv_bias=biased,
        out_bias=biased,
        sinks=True,
        expert_bias=True,
        router_bias=True,
        transposed=True,
        router_name="router",
    )
    return ModelShape(**common)


def _dense(config: _Numbers, **more: Any) -> ModelShape:
    return ModelShape(**config.common(intermediate=config.size("intermediate_size"), **more))


def _llama(config: _Numbers) -> ModelShape:
    biased = config.flag("attention_bias")
    config.refuse_mlp_bias()
    return _dense(config, qkv_bias=biased, out_bias=biased)


def _qwen3(config: _Numbers) -> ModelShape:
    biased = config.flag("attention_bias")
    return _dense(config, qk_norm=True, qkv_bias=biased, out_bias=biased)


_READERS: dict[str, Callable[[_Numbers], ModelShape]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "mistral": _dense,
    "mixtral": _mixtral,
    "qwen2": lambda config: _dense(config, qkv_bias=True),
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
# What a file leaves out is its class's default in transformers; where null is said, or a default follows from other
# numbers, the readers know.
_DEFAULTS: dict[str, dict[str, int]] = {
    "deepseek_v2": {"n_shared_experts": 2, "q_lora_rank": 1536},
    "deepseek_v3": {"first_k_dense_replace": 3, "n_shared_experts": 1, "q_lora_rank": 1536},
    "glm4_moe": {"num_key_value_heads": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64},
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen2_moe": {"num_key_value_heads": 16},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
}
MODEL_TYPES = tuple(_READERS)
"""The model types that can be read."""
