"""``ModelShape``: what a plan has to know of a model, as numbers; and the weights that follow from them.

The names and shapes are those that transformers gives the same model, so that a plan can be compared with
:func:`foldpar.plan_fold` weight by weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod
from typing import Literal

from foldpar.errors import ModelError
from foldpar.layout import FoldedLayout
from foldpar.wording import as_integer

__all__ = ["LatentAttention", "ModelShape", "Part", "Weight", "counted"]

_MOST = {"layers": 10_000, "num_hidden_layers": 10_000, "experts": 2**16, "top_k": 2**16}
"""Bounds of what is walked through one by one."""

Part = Literal["embedding", "attention", "norm", "dense", "shared", "router", "experts", "head"]
"""What a weight belongs to."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Widths of DeepSeek's latent attention (MLA): ranks of the latents, and the parts of a head.

    ``q_rank`` of 0: queries come straight from the hidden state.
    """

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight tensor: its name, its whole shape, and along which dimension ``tp`` (or ``etp``) cuts it.

    A dimension that is not divided stays whole. ``expert`` weights have the experts on dimension 0, which ``ep`` cuts,
    and their ``cut`` is that of ``etp``.
    """

    name: str
    part: Part
    shape: tuple[int, ...]
    cut: int | None = None
    expert: bool = False
    most_lanes: int | None = None
    """With more lanes than these heads, every lane holds the weight whole and uses one head."""

    def local_shape(self, layout: FoldedLayout) -> tuple[int, ...]:
        """What a rank of the layout holds, before anything shards it over data."""
        return _local(self, layout.tp, layout.ep, layout.etp)

    @property
    def numel(self) -> int:
        """How many numbers it has in the whole model."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder model as numbers. Read one from a file with :meth:`foldpar.planning.read_model`, or give the numbers.

    Args:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: attention heads.
        kv_heads: heads of keys and values; ``None`` means ``heads``.
        head_dim: width of a head; ``None`` means ``hidden / heads``.
        vocab: size of the vocabulary.
        intermediate: hidden width of the dense feed-forward layers; 0 where there are none.
        experts: routed experts of an MoE layer; 0 for a dense model.
        top_k: experts of a token.
        expert_hidden: hidden width of one routed expert.
        shared_hidden: hidden width of the shared experts together; 0 for none.
        shared_gate: the shared experts are weighted by a gate of their own.
        dense_layers: the numbers of the layers that have no experts.
        tied: the head is the embedding.
        latent: widths of latent attention; ``None`` for the usual one.
        qkv_bias, out_bias: biases of the attention's projections.
        qk_norm: queries and keys are normalised head by head.
        sinks: attention has a learned sink per head, and is computed without a fused kernel.
        expert_bias, router_bias: biases of the experts and of the router.
        transposed: experts are stored ``[experts, in, out]``.
        embedding_whole: the embedding is not cut over the lanes.
        head_whole: nor is the head.
        name: what to call the model.
        router_name, shared_name: what the router and the shared experts are called in their block.

    Example:
        >>> shape = ModelShape(hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128, vocab=151936,
        ...                    experts=128, top_k=8, expert_hidden=768, qk_norm=True)
        >>> f"{shape.parameters / 1e9:.1f} B, {shape.active_parameters / 1e9:.1f} B of them used by a token"
        '30.5 B, 3.4 B of them used by a token'

    Raises:
        ModelError: a number that is none or does not fit the others; the text says which.
    """

    hidden: int
    layers: int
    heads: int
    vocab: int
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate: int = 0
    experts: int = 0
    top_k: int = 0
    expert_hidden: int = 0
    shared_hidden: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    tied: bool = False
    latent: LatentAttention | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    transposed: bool = False
    embedding_whole: bool = False
    head_whole: bool = False
    name: str = "the model"
    router_name: str = "gate"
    shared_name: str = "shared_expert"

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "vocab"):
            self._check_size(name, least=1)
        for name in ("intermediate", "experts", "top_k", "expert_hidden", "shared_hidden"):
            self._check_size(name, least=0)
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            if self.latent is None and self.hidden % self.heads:
                raise ModelError(
                    f"{self.name}: heads = {self.heads} does not divide hidden = {self.hidden}; say head_dim too."
                )
            object.__setattr__(self, "head_dim", max(1, self.hidden // self.heads))
        self._check_size("kv_heads", least=1)
        self._check_size("head_dim", least=1)
        self._check_together()

    def _check_size(self, name: str, *, least: int) -> None:
        object.__setattr__(self, name, counted(name, getattr(self, name), self.name, least=least))

    def _check_together(self) -> None:
        if self.heads % self.key_value_heads:
            raise ModelError(f"{self.name}: kv_heads = {self.kv_heads} does not divide heads = {self.heads}.")
        if not isinstance(self.dense_layers, tuple):
            raise ModelError(
                f"{self.name}: dense_layers = {self.dense_layers!r} is not a tuple of the layers' numbers, such as "
                f"(0, 1, 2)."
            )
        if self.latent is not None and not isinstance(self.latent, LatentAttention):
            raise ModelError(f"{self.name}: latent = {self.latent!r} is neither None nor a LatentAttention.")
        for name in (each.name for each in fields(self) if each.type == "bool"):
            if not isinstance(getattr(self, name), bool):
                raise ModelError(f"{self.name}: {name} = {getattr(self, name)!r} is neither True nor False.")
        layers = [as_integer(layer) for layer in self.dense_layers]
        if any(layer is None or not 0 <= layer < self.layers for layer in layers):
            raise ModelError(
                f"{self.name}: dense_layers = {self.dense_layers!r} are not all layers 0 to {self.layers - 1}."
            )
        latent = () if self.latent is None else fields(self.latent)
        for name in (each.name for each in latent):
            counted(f"latent.{name}", getattr(self.latent, name), self.name, least=int(name != "q_rank"))
        if self.experts == 0 and (self.top_k or self.expert_hidden or self.shared_hidden):
            raise ModelError(
                f"{self.name}: top_k = {self.top_k}, expert_hidden = {self.expert_hidden} and shared_hidden = "
                f"{self.shared_hidden} are of experts, and experts = 0. Say experts too, or none of them."
            )
        if self.experts:
            self._check_size("top_k", least=1)
            self._check_size("expert_hidden", least=1)
            if self.top_k > self.experts:
                raise ModelError(f"{self.name}: top_k = {self.top_k} is more than experts = {self.experts}.")
        if len(self.moe_layers) < self.layers and not self.intermediate:
            what = "experts = 0" if not self.experts else f"{len(self.dense_layers)} dense layer(s)"
            raise ModelError(f"{self.name}: {what}, so intermediate, the width of a dense layer, must be positive.")

    @property
    def key_value_heads(self) -> int:
        """``kv_heads``, an int."""
        assert self.kv_heads is not None
        return self.kv_heads

    @property
    def head_width(self) -> int:
        """``head_dim``, an int."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts."""
        return tuple(layer for layer in range(self.layers) if self.is_moe(layer))

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts > 0 and layer not in self.dense_layers

    @property
    def query_width(self) -> int:
        """Columns of all queries together."""
        if self.latent is not None:
            return self.heads * (self.latent.nope + self.latent.rope)
        return self.heads * self.head_width

    @property
    def value_width(self) -> int:
        """Columns of all values together, as the output projection reads them."""
        return self.heads * (self.latent.value if self.latent is not None else self.head_width)

    @property
    def key_value_width(self) -> int:
        """Columns of all keys together, and of all values."""
        return self.key_value_heads * self.head_width

    def weights(self) -> Iterator[Weight]:
        """Every weight of the model, each once."""
        yield from self.outer_weights(first=True, last=True)
        for layer in range(self.layers):
            for weight in self.layer_weights(self.is_moe(layer)):
                yield _renamed(weight, f"model.layers.{layer}.{weight.name}")

    def outer_weights(self, *, first: bool, last: bool) -> Iterator[Weight]:
        """Those outside the layers, of the first and the last pipeline stage; tied ones are held by both."""
        whole = self.embedding_whole or self.head_whole
        if first:
            cut = None if self.embedding_whole or (self.tied and whole) else 0
            yield Weight("model.embed_tokens.weight", "embedding", (self.vocab, self.hidden), cut)
        if last:
            yield Weight("model.norm.weight", "norm", (self.hidden,))
            if not (self.tied and first):
                cut = None if self.head_whole or (self.tied and whole) else 0
                yield Weight("lm_head.weight", "head", (self.vocab, self.hidden), cut)

    def layer_weights(self, moe: bool) -> tuple[Weight, ...]:
        """Those of one layer, with experts or without; names are those inside the layer."""
        return _layer_weights(self, moe)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        dense = len(self.dense_layers) if self.experts else self.layers
        each = {moe: sum(weight.numel for weight in self.layer_weights(moe)) for moe in {False, self.experts > 0}}
        outer = sum(weight.numel for weight in self.outer_weights(first=True, last=True))
        return outer + dense * each[False] + (self.layers - dense) * each.get(True, 0)

    @property
    def active_parameters(self) -> int:
        """How many of them one token is multiplied with; the embedding, which is looked up, counts too."""
        experts = (
            len(self.moe_layers) * sum(w.numel for w in self.layer_weights(True) if w.expert) if self.experts else 0
        )
        return self.parameters - experts + (experts * self.top_k // self.experts if self.experts else 0)

    def to_dict(self) -> dict[str, object]:
        """The numbers as plain data."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.latent is not None:
            found["latent"] = {each.name: getattr(self.latent, each.name) for each in fields(self.latent)}
        return found


def counted(name: str, value: object, where: str, *, least: int) -> int:
    """A size of a model as an int, or an error: products of several have to be numbers that floats hold."""
    size, most = as_integer(value), _MOST.get(name, 2**32)
    if size is None or size < least:
        wanted = "a positive integer" if least else "0 or a positive integer"
        raise ModelError(f"{where}: {name} = {value!r} is not {wanted}.")
    if size > most:
        raise ModelError(f"{where}: {name} = {size} is more than a plan counts with, which is {most:,}.")
    return size


def _renamed(weight: Weight, name: str) -> Weight:
    return replace(weight, name=name)


@lru_cache(maxsize=64)
def _layer_weights(shape: ModelShape, moe: bool) -> tuple[Weight, ...]:
    hidden = shape.hidden
    found = [Weight(f"{each}.weight", "norm", (hidden,)) for each in ("input_layernorm", "post_attention_layernorm")]
    found += _latent_attention(shape, shape.latent) if shape.latent is not None else _attention(shape)
    if not moe:
        return (*found, *_feed_forward("mlp", "dense", hidden, shape.intermediate))
    experts, units = shape.experts, shape.expert_hidden
    up, down = (experts, 2 * units, hidden), (experts, hidden, units)
    if shape.transposed:
        up, down = (experts, hidden, 2 * units), (experts, units, hidden)
    found.append(Weight("mlp.experts.gate_up_proj", "experts", up, 2 if shape.transposed else 1, True))
    found.append(Weight("mlp.experts.down_proj", "experts", down, 1 if shape.transposed else 2, True))
    if shape.expert_bias:
        found.append(Weight("mlp.experts.gate_up_proj_bias", "experts", (experts, 2 * units), 1, True))
        found.append(Weight("mlp.experts.down_proj_bias", "experts", (experts, hidden), None, True))
    found.append(Weight(f"mlp.{shape.router_name}.weight", "router", (experts, hidden)))
    if shape.router_bias:
        found.append(Weight(f"mlp.{shape.router_name}.bias", "router", (experts,)))
    if shape.shared_hidden:
        found += _feed_forward(f"mlp.{shape.shared_name}", "shared", hidden, shape.shared_hidden)
        if shape.shared_gate:
            found.append(Weight(f"mlp.{shape.shared_name}_gate.weight", "shared", (1, hidden)))
    return tuple(found)


def _feed_forward(name: str, part: Part, hidden: int, units: int) -> list[Weight]:
    return [
        Weight(f"{name}.gate_proj.weight", part, (units, hidden), 0),
        Weight(f"{name}.up_proj.weight", part, (units, hidden), 0),
        Weight(f"{name}.down_proj.weight", part, (hidden, units), 1),
    ]


def _attention(shape: ModelShape) -> list[Weight]:
    hidden, queries, keys = shape.hidden, shape.query_width, shape.key_value_width
    found = [Weight("self_attn.sinks", "attention", (shape.heads,), 0)] if shape.sinks else []
    for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        most = None if name == "q_proj" else shape.key_value_heads
        found.append(Weight(f"self_attn.{name}.weight", "attention", (width, hidden), 0, most_lanes=most))
        if shape.qkv_bias:
            found.append(Weight(f"self_attn.{name}.bias", "attention", (width,), 0, most_lanes=most))
    found.append(Weight("self_attn.o_proj.weight", "attention", (hidden, queries), 1))
    if shape.out_bias:
        found.append(Weight("self_attn.o_proj.bias", "attention", (hidden,)))
    if shape.qk_norm:
        found += [Weight(f"self_attn.{name}.weight", "norm", (shape.head_width,)) for name in ("q_norm", "k_norm")]
    return found


def _latent_attention(shape: ModelShape, latent: LatentAttention) -> list[Weight]:
    hidden, queries = shape.hidden, shape.query_width
    if latent.q_rank:
        found = [
            Weight("self_attn.q_a_proj.weight", "attention", (latent.q_rank, hidden)),
            Weight("self_attn.q_a_layernorm.weight", "norm", (latent.q_rank,)),
            Weight("self_attn.q_b_proj.weight", "attention", (queries, latent.q_rank), 0),
        ]
    else:
        found = [Weight("self_attn.q_proj.weight", "attention", (queries, hidden), 0)]
    keys = shape.heads * (latent.nope + latent.value)
    return [
        *found,
        Weight("self_attn.kv_a_proj_with_mqa.weight", "attention", (latent.kv_rank + latent.rope, hidden)),
        Weight("self_attn.kv_a_layernorm.weight", "norm", (latent.kv_rank,)),
        Weight("self_attn.kv_b_proj.weight", "attention", (keys, latent.kv_rank), 0),
        Weight("self_attn.o_proj.weight", "attention", (hidden, shape.value_width), 1),
    ]


def _local(weight: Weight, tp: int, ep: int, etp: int) -> tuple[int, ...]:
    shape = list(weight.shape)
    if weight.expert:
        shape[0] //= ep
    lanes = etp if weight.expert else tp
    shared = weight.most_lanes is not None and lanes > weight.most_lanes
    if weight.cut is not None and shape[weight.cut] % lanes == 0 and not shared:
        shape[weight.cut] //= lanes
    return tuple(shape)
