"""What the configurations of other libraries say about a layout, in foldpar's words.

Each reader takes a configuration as it is and returns a :class:`Reading`: values for the fields of ``FoldingConfig``,
who said each, and what was left unread and why. What would change the layout or the numbers and has no counterpart
here is an error, never dropped. The keys are those of DeepSpeed 0.19.8, Megatron-Core 0.16.1, transformers 5.23 and
TorchTitan 0.3.0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

from foldpar.errors import LayoutError
from foldpar.wording import as_integer, listed

__all__ = [
    "DERIVED",
    "MODEL_TYPES_OF_PRESET",
    "SECTIONS",
    "Reading",
    "check_keys",
    "near_a_section",
    "raise_faults",
    "read_deepspeed",
    "read_megatron",
    "read_torchtitan",
    "read_transformers",
]

# DeepSpeed's AutoEP presets, and the model types that each is for (the outer types of multimodal models included).
MODEL_TYPES_OF_PRESET: dict[str, tuple[str, ...]] = {
    "deepseek_v2": ("deepseek_v2",),
    "deepseek_v3": ("deepseek_v3",),
    "minimax_m3": ("minimax_m3_vl_text", "minimax_m3_vl"),
    "mixtral": ("mixtral",),
    "qwen3_5_moe": ("qwen3_5_moe_text", "qwen3_5_moe"),
    "qwen3_moe": ("qwen3_moe", "qwen2_moe"),
}
# AutoTP's presets are sharding patterns that several model types share; those of dense models say nothing to foldpar.
_DENSE_PRESETS = ("bloom", "chatglm", "llama", "phi3", "qwen2")

# Degrees that are what remains: words for dp, and words for edp.
DERIVED: dict[str, str] = {
    **dict.fromkeys(("dp", "dp_size", "data_parallel_size", "fsdp", "fsdp_size", "dp_shard"), "dp"),
    **dict.fromkeys(("edp", "edp_size", "efsdp", "efsdp_size", "expert_data_parallel_size"), "edp"),
}


@dataclass(slots=True)
class Reading:
    """What one configuration says: ``values`` by field, ``origins`` (who said it), ``not_used`` and ``faults``."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    not_used: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def say(self, name: str, value: object, origin: str) -> None:
        """Set a field, and who said it."""
        self.values[name], self.origins[name] = value, origin

    def size(self, key: str, value: object, *, default: int = 1, least: int = 1) -> int:
        """``value`` as a size; a fault, and the default, where it is none."""
        size = as_integer(value)
        if size is not None and size >= least:
            return size
        kind = "" if type(value) is int else f", of type {type(value).__name__},"
        hint = " A trainer fills 'auto' in later; a layout is decided before, so say the number." * (value == "auto")
        self.faults.append(f"{key} = {value!r}{kind} is not an integer from {least} on.{hint}")
        return default

    def flag(self, key: str, value: object) -> bool:
        """``value`` as a boolean; a fault, and false, where it is none."""
        if not isinstance(value, bool):
            self.faults.append(f"{key} = {value!r} can be true or false.")
        return value is True


def _other_sizes(source: object, ending: str, known: Collection[str]) -> dict[str, object]:
    """Sizes that an object of another version has beside those that are read, where they are not 1."""
    others = {key: value for key, value in getattr(source, "__dict__", {}).items() if key.endswith(ending)}
    return {key: value for key, value in others.items() if key not in known and value not in (None, 1)}


def raise_faults(faults: Collection[str], what: str) -> None:
    """Raise one error with all that is wrong; nothing where nothing is.

    Raises:
        LayoutError: there are faults.
    """
    if len(faults) == 1:
        raise LayoutError(next(iter(faults)))
    if faults:
        lines = [f"  {number}. {fault}" for number, fault in enumerate(faults, 1)]
        raise LayoutError("\n".join([f"{what} has {len(faults)} faults:", *lines]))


def check_keys(
    where: str,
    given: Mapping[str, object],
    known: Collection[str],
    reading: Reading,
    *,
    words: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Each unknown key is a fault that names the nearest known one, or why there is none; ``words``: others' for it."""
    for key in given:
        if key in known:
            continue
        if key in DERIVED:
            name = DERIVED[key]
            reading.faults.append(
                f"{key!r} in {where} cannot be given: {name} is derived. tp * cp * dp == ep * etp * edp == stage_size "
                f"cannot be broken only because dp and edp are what remains. Leave it out; layout(world).{name} "
                f"says what it is."
            )
            continue
        near = [words[key]] if key in words else get_close_matches(str(key), known, 1, 0.6)
        advice = f"did you mean {near[0]!r}? " if near else ""
        reading.faults.append(f"{key!r} in {where} is unknown: {advice}It can be {listed(sorted(known))}.")


# DeepSpeed: two sections, "tensor_parallel" (AutoTP) and "expert_parallel" (AutoEP), among many others.

SECTIONS = ("foldpar", "tensor_parallel", "expert_parallel")
_OWN_PLAN = "the dense layers are sharded by the model's own tensor-parallel plan"
_TENSOR_KEYS: dict[str, str | None] = {  # key -> why it is not used; None: it is
    "autotp_size": None,
    "preset_model": None,
    "tp": None,
    "tensor_parallel": None,
    "dtype": "the model's dtype is the model's",
    "tp_overlap_comm": "how DeepSpeed communicates",
    "vocab_parallel_lm_head": _OWN_PLAN,
    "vocab_parallel_ce_backend": _OWN_PLAN,
    "partition_config": _OWN_PLAN,
    "injection_policy_tuple": _OWN_PLAN,
    "keep_module_on_host": "for inference",
    "kernel_inject": "for inference",
    "replace_with_kernel_inject": "for inference",
}
_NESTED_KEYS = ("tp_size", "tp_grain_size", "mpu", "tp_group")
_KERNELS = "how DeepSpeed computes and communicates; foldpar's kernels and collectives are its own"
_ADAPTERS = "fold_model finds the experts by its adapters"
_EXPERT_KEYS: dict[str, str | None] = {
    **dict.fromkeys(("enabled", "autoep_size", "expert_tensor_parallel_size", "preset_model")),
    "validate_folding_routing": "foldpar's check of lanes is FoldedMoE(..., check=True)",
    **dict.fromkeys(("use_grouped_mm", "disable_triton_grouped_mm", "combine_impl", "row_weighting_impl"), _KERNELS),
    **dict.fromkeys(("gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin"), _KERNELS),
    **dict.fromkeys(("comm_max_tokens_per_rank", "async_split_plan"), _KERNELS),
    **dict.fromkeys(("moe_layer_pattern", "expert_pattern", "router_pattern", "expert_w1", "expert_w2"), _ADAPTERS),
    **dict.fromkeys(("expert_w3", "num_experts_attr", "top_k_attr", "has_shared_experts"), _ADAPTERS),
    **dict.fromkeys(("shared_experts_pattern", "shared_experts_gate_pattern"), _ADAPTERS),
}
_CHANGES_THE_MODEL: dict[str, object] = {  # key -> its default, which changes nothing
    "route_norm": None,
    "route_scale": 1.0,
    "score_apply": "auto",
    "score_func": "auto",
    "top_k": "auto",
    "routed_scaling_factor": "auto",
    "num_expert_groups": None,
    "num_limited_groups": None,
    "expert_activation": None,
    "load_balance_coeff": None,
}
_OTHER_SECTIONS = {
    "zero_optimization": "see shard_model(model, groups, stage=...)",
    "gradient_clipping": "see clip_grad_norm_(model, max_norm, groups)",
    "pipeline": "pp is not in a DeepSpeed configuration: say it in a section 'foldpar'",
    "checkpoint": "see save_checkpoint and load_checkpoint",
}


def read_deepspeed(document: Mapping[str, object]) -> Reading:
    """A DeepSpeed configuration: ``tensor_parallel`` and ``expert_parallel``; other sections are listed, not read."""
    reading = Reading()
    tensor, expert = (_section(name, document, reading) for name in SECTIONS[1:])
    reading.say("order", "consecutive", "DeepSpeed's rank tables")
    tp = _read_tensor_parallel(tensor, reading)
    ep = _read_expert_parallel(expert, reading)
    _read_preset(tensor, expert, reading)
    _read_sequence_parallel(document, tp, reading)
    before = "use_data_before_expert_parallelism"
    if reading.flag(before, document.get(before, False)) and ep > 1:
        reading.faults.append(
            f"{before} = true would spread an expert group over data-parallel ranks that are not neighbours, an order "
            f"that foldpar does not have. Leave it false."
        )
    for name in document:
        if name in (*SECTIONS, "sequence_parallel_size", before):
            continue
        near = near_a_section(str(name))
        if near is not None:
            reading.faults.append(f"There is a section {name!r}: did you mean {near!r}?")
        else:
            where = f"; {_OTHER_SECTIONS[name]}" if name in _OTHER_SECTIONS else ""
            reading.not_used.append(f"{name}: not foldpar's{where}")
    return reading


def near_a_section(name: str) -> str | None:
    """The section that ``name`` is a misspelling of."""
    return next(iter(get_close_matches(name, SECTIONS, 1, 0.85)), None)


def _section(name: str, document: Mapping[str, object], reading: Reading) -> Mapping[str, object]:
    section = document.get(name, {})
    if isinstance(section, Mapping):
        return section
    reading.faults.append(f"The section {name!r} is {section!r}; it must be an object of keys and values.")
    return {}


def _read_tensor_parallel(section: Mapping[str, object], reading: Reading) -> int:
    where = "tensor_parallel"
    check_keys(where, section, _TENSOR_KEYS, reading)
    tp = 1
    if "autotp_size" in section:  # 0 is its "off"
        tp = reading.size(f"{where}.autotp_size", section["autotp_size"], least=0) or 1
        reading.say("tp", tp, f"{where}.autotp_size")
    for key in ("tp", "tensor_parallel"):
        nested = _section(key, section, reading)
        check_keys(f"{where}.{key}", nested, _NESTED_KEYS, reading)
        inner = reading.size(f"{where}.{key}.tp_size", nested.get("tp_size", 1))
        if inner not in (1, tp):
            reading.faults.append(
                f"{where}.{key}.tp_size = {inner} contradicts {where}.autotp_size = {section.get('autotp_size', 0)}: "
                f"leave it out, or say {tp}."
            )
    _list_not_used(where, section, _TENSOR_KEYS, reading)
    return tp


def _read_expert_parallel(section: Mapping[str, object], reading: Reading) -> int:
    where = "expert_parallel"
    check_keys(where, section, {**_EXPERT_KEYS, **_CHANGES_THE_MODEL}, reading)
    enabled = reading.flag(f"{where}.enabled", section.get("enabled", False))
    ep = 1
    for key, name in (("autoep_size", "ep"), ("expert_tensor_parallel_size", "etp")):
        size = reading.size(f"{where}.{key}", section.get(key, 1))
        if enabled and key in section:
            reading.say(name, size, f"{where}.{key}")
            ep = size if name == "ep" else ep
        elif size > 1 and "enabled" not in section:
            reading.faults.append(
                f"{where}.{key} = {size}, but {where}.enabled is missing, and DeepSpeed's default is false: say true "
                f"to fold the experts, or false to leave them whole."
            )
        elif size > 1:
            reading.not_used.append(f"{where}.{key} = {size}: {where}.enabled is false, so {name} = 1")
    for key, default in _CHANGES_THE_MODEL.items():
        if enabled and section.get(key, default) != default:
            reading.faults.append(
                f"{where}.{key} = {section[key]!r} would change what the layer computes. foldpar keeps the model's own "
                f"router and activation: set it in the model's configuration, and leave {default!r} here."
            )
    _list_not_used(where, section, _EXPERT_KEYS, reading)
    return ep


def _list_not_used(
    where: str, section: Mapping[str, object], reasons: Mapping[str, str | None], reading: Reading
) -> None:
    reading.not_used += [f"{where}.{key}: {reasons[key]}" for key in section if reasons.get(key)]


def _read_preset(tensor: Mapping[str, object], expert: Mapping[str, object], reading: Reading) -> None:
    of_tensor, of_expert = tensor.get("preset_model"), expert.get("preset_model")
    known = listed(sorted(MODEL_TYPES_OF_PRESET))
    if of_expert is not None and of_expert not in (*MODEL_TYPES_OF_PRESET,):
        reading.faults.append(f"expert_parallel.preset_model = {of_expert!r} is unknown: it can be {known}.")
    known_dense = sorted((*_DENSE_PRESETS, "deepseek_v2", "mixtral"))
    if of_tensor is not None and of_tensor not in known_dense:
        reading.faults.append(
            f"tensor_parallel.preset_model = {of_tensor!r} is unknown: it can be {listed(known_dense)}."
        )
    if of_tensor is not None and of_expert is not None and of_tensor != of_expert:
        reading.faults.append(
            f"tensor_parallel.preset_model = {of_tensor!r} and expert_parallel.preset_model = {of_expert!r} name two "
            f"models, but both sections are about one. Say the same in both, or leave one out."
        )
    if of_expert is not None:
        reading.say("preset", of_expert, "expert_parallel.preset_model")
    elif of_tensor in (*MODEL_TYPES_OF_PRESET,):
        reading.say("preset", of_tensor, "tensor_parallel.preset_model")
    elif of_tensor is not None:
        reading.not_used.append(f"tensor_parallel.preset_model = {of_tensor!r}: {_OWN_PLAN}")


def _read_sequence_parallel(document: Mapping[str, object], tp: int, reading: Reading) -> None:
    key = "sequence_parallel_size"
    size = reading.size(key, document.get(key, 1))
    if size > 1 and tp > 1:
        reading.faults.append(
            f"{key} = {size} and tensor_parallel.autotp_size = {tp} exclude each other: Ulysses splits sequences over "
            f"ranks that hold whole dense weights. Where the lanes of a TP group shall hold slices of the tokens, say "
            f"lanes = 'sharded' in a section 'foldpar'; where more ranks shall share a sequence, say cp = {size} "
            f"there; and leave {key} 1."
        )
    elif size > 1:
        reading.say("cp", size, key)


# Megatron-Core: one flat configuration, as ModelParallelConfig, argparse's Namespace or a mapping.

_MEGATRON_ORDER = "tp-cp-ep-dp-pp"
_MEGATRON_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_MEGATRON_OTHERS = (
    "sequence_parallel",
    "use_tp_pp_dp_mapping",
    "order",
    "world_size",
    "data_parallel_size",
    "encoder_tensor_model_parallel_size",
    "encoder_pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "hierarchical_context_parallel_sizes",
    "moe_extended_tp",
)
_MEGATRON_NOT_USED = {
    "virtual_pipeline_model_parallel_size": "a pipeline schedule's",
    "hierarchical_context_parallel_sizes": "the attention's; a cp group is one group here",
    "moe_extended_tp": "ignored by Megatron-Core since 0.10; expert_tensor_parallel_size replaces it",
}


def read_megatron(source: object) -> Reading:
    """Megatron-Core's sizes from a mapping or from an object's attributes; a size that is ``None`` is its default."""
    reading = Reading()
    said = _megatron_values(source, reading)
    sizes = {name: reading.size(key, said[key]) for name, key in _MEGATRON_SIZES.items() if key in said}
    for name, size in sizes.items():
        reading.say(name, size, _MEGATRON_SIZES[name])
    tp, pp, cp, ep = (sizes.get(name, 1) for name in ("tp", "pp", "cp", "ep"))
    if "etp" not in sizes:
        sizes["etp"] = tp
        reading.say("etp", tp, "expert_tensor_parallel_size is None, which means tensor_model_parallel_size")
    reading.say("order", "consecutive", "Megatron-Core's rank order")
    _check_megatron_order(said, {**sizes, "tp": tp, "pp": pp, "cp": cp, "ep": ep}, reading)
    if reading.flag("sequence_parallel", said.get("sequence_parallel", False)) and tp > 1:
        reading.say("lanes", "sharded", "sequence_parallel")
    world, dp = (reading.size(key, said[key]) if key in said else None for key in ("world_size", "data_parallel_size"))
    if world is not None and dp is not None and world != pp * cp * tp * dp:
        reading.faults.append(
            f"data_parallel_size = {dp} contradicts world_size = {world}: pp * cp * tp * dp = {pp} * {cp} * {tp} * "
            f"{dp} = {pp * cp * tp * dp}. It is derived: leave it out."
        )
    elif world is not None:
        reading.say("world", world, "world_size")
    elif dp is not None:
        reading.say("world", pp * cp * tp * dp, f"pp * cp * tp * data_parallel_size = {pp} * {cp} * {tp} * {dp}")
    for key in ("encoder_tensor_model_parallel_size", "encoder_pipeline_model_parallel_size"):
        if said.get(key, 0) not in (0, 1):
            reading.faults.append(
                f"{key} = {said[key]!r} gives the encoder ranks of its own; one layout is for one set of ranks. Make "
                f"a configuration for each."
            )
    reading.not_used += [f"{key}: {why}" for key, why in _MEGATRON_NOT_USED.items() if said.get(key)]
    return reading


def _megatron_values(source: object, reading: Reading) -> dict[str, object]:
    """What is said, without what is ``None``; in mappings also with the dashes of command lines."""
    keys = (*_MEGATRON_SIZES.values(), *_MEGATRON_OTHERS)
    if isinstance(source, Mapping):
        given = {str(key).lstrip("-").replace("-", "_"): value for key, value in source.items()}
        for key in given:
            # Megatron has hundreds of other keys, so only what is nearly one of these is a mistake.
            near = [] if key in keys else get_close_matches(key, keys, 1, 0.9)
            if near:
                reading.faults.append(f"{key!r} is unknown: did you mean {near[0]!r}?")
    else:
        given = {key: getattr(source, key) for key in keys if hasattr(source, key)}
    if not reading.faults and not any(key in given for key in _MEGATRON_SIZES.values()):
        reading.faults.append(
            f"This {type(source).__name__} has none of Megatron-Core's sizes: {listed(list(_MEGATRON_SIZES.values()))}."
        )
    return {key: given[key] for key in keys if given.get(key) is not None}


def _check_megatron_order(said: Mapping[str, object], sizes: Mapping[str, int], reading: Reading) -> None:
    """Megatron's order may say anything that puts the axes larger than 1 where ``"consecutive"`` has them."""
    key, order = "order", str(said.get("order", _MEGATRON_ORDER)).lower()
    if reading.flag("use_tp_pp_dp_mapping", said.get("use_tp_pp_dp_mapping", False)):
        key, order = "use_tp_pp_dp_mapping = true, order", "tp-cp-ep-pp-dp"
    axes = [axis for axis in order.split("-") if axis]
    if not set(axes) <= set(_MEGATRON_ORDER.split("-")) or len(set(axes)) < len(axes):
        reading.faults.append(f"order = {order!r} is not made of tp, cp, ep, dp and pp, as {_MEGATRON_ORDER!r} is.")
        return
    for ours, size_of in (
        (("tp", "cp", "dp", "pp"), {"tp": sizes["tp"], "cp": sizes["cp"], "pp": sizes["pp"]}),
        (("tp", "ep", "dp", "pp"), {"tp": sizes["etp"], "ep": sizes["ep"], "pp": sizes["pp"]}),
    ):
        matter = [axis for axis in ours if size_of.get(axis, 2) > 1]  # dp and edp follow from the world: as if larger
        listed = [axis for axis in axes if axis in matter]
        if listed != [axis for axis in matter if axis in listed] or not set(matter) <= {*listed, "dp"}:
            reading.faults.append(
                f"{key} = {order!r} with pp = {sizes['pp']} is not how foldpar numbers ranks: tp comes first, and pp "
                f"last, since a stage is a run of neighbouring ranks. Use {_MEGATRON_ORDER!r}, the default."
            )
            return


# transformers: DistributedConfig, or its to_dict().

_TRANSFORMERS_SIZES = ("tp_size", "pp_size", "dp_replicate_size", "fsdp_size", "ep_size")
_TRANSFORMERS_NOT_USED = {
    "tp_plan": "fold_model takes the model's own plan",
    "ep_plan": "fold_model finds the experts by its adapters",
    "ep_implementation": "foldpar's dispatch is its own",
    "fsdp_plan": "see shard_model(model, groups, stage=...)",
    "fsdp_cpu_offload": "see shard_model(..., offload=...)",
    "fsdp_mixed_precision": "see shard_model(..., mixed_precision=...)",
}
_TRANSFORMERS_KEYS = (
    *_TRANSFORMERS_SIZES,
    *_TRANSFORMERS_NOT_USED,
    "enable_sequence_parallel",
    "enable_expert_parallel",
)


def read_transformers(source: object) -> Reading:
    """transformers' sizes: their product is the world, and both of its meshes count ranks consecutively."""
    reading = Reading()
    if isinstance(source, Mapping):
        given: dict[str, object] = {str(key): value for key, value in source.items()}
        check_keys("DistributedConfig", given, _TRANSFORMERS_KEYS, reading)
    else:
        given = {key: getattr(source, key) for key in _TRANSFORMERS_KEYS if hasattr(source, key)}
        check_keys("DistributedConfig", _other_sizes(source, "_size", _TRANSFORMERS_KEYS), _TRANSFORMERS_SIZES, reading)
        if "tp_size" not in given:
            reading.faults.append(f"This {type(source).__name__} has no tp_size, so it is no DistributedConfig.")
    said = {key: value for key, value in given.items() if value is not None}
    sizes = {key: reading.size(key, said.get(key, 1)) for key in _TRANSFORMERS_SIZES}
    if "tp_size" not in said and "tp_plan" in said:
        reading.faults.append(
            "tp_size is None and tp_plan is set, so transformers takes what the environment's WORLD_SIZE leaves. A "
            "layout does not read the environment: say tp_size."
        )
    if said.get("enable_expert_parallel") is True and "ep_size" not in said:
        sizes["ep_size"] = sizes["tp_size"]  # what the older flag means there
    if reading.flag("enable_sequence_parallel", said.get("enable_sequence_parallel", False)):
        reading.faults.append(
            "enable_sequence_parallel = true does nothing in transformers 5.23. Leave it false; where the lanes of a "
            "TP group shall hold slices of the tokens, say lanes = 'sharded' in a configuration of foldpar's own."
        )
    for name in ("tp", "pp", "ep"):
        reading.say(name, sizes[f"{name}_size"], f"{name}_size")
    reading.say("order", "consecutive", "transformers' meshes")
    pp, replicas, shards, tp = (sizes[key] for key in ("pp_size", "dp_replicate_size", "fsdp_size", "tp_size"))
    if pp * replicas * shards * tp > 1:  # all 1: transformers makes no mesh, and any world will do
        product = f"pp_size * dp_replicate_size * fsdp_size * tp_size = {pp} * {replicas} * {shards} * {tp}"
        reading.say("world", pp * replicas * shards * tp, product)
    for key, why in _TRANSFORMERS_NOT_USED.items():
        if said.get(key, "auto") not in (False, "auto"):
            reading.not_used.append(f"{key}: {why}")
    return reading


# TorchTitan: ParallelismConfig, or a mapping of its fields.

_TORCHTITAN_SIZES = {
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "cp": "context_parallel_degree",
}
_TORCHTITAN_DATA = ("data_parallel_replicate_degree", "data_parallel_shard_degree")
_SCHEDULE = "a pipeline schedule's; torch.distributed.pipelining takes it"
_CP_ATTENTION = "the attention's over cp"
_TORCHTITAN_NOT_USED: dict[str, tuple[object, str]] = {  # key -> its default, and why it is not used
    "fsdp_reshard_after_forward": ("default", "see shard_model(model, groups, stage=...)"),
    "enable_fsdp_symm_mem": (False, "how FSDP2 communicates"),
    "spmd_backend": ("spmd_types", "how TorchTitan annotates its models"),
    "module_fqns_per_model_part": (None, _SCHEDULE),
    "pipeline_parallel_first_stage_less_layers": (1, _SCHEDULE),
    "pipeline_parallel_last_stage_less_layers": (1, _SCHEDULE),
    "pipeline_parallel_layers_per_stage": (None, _SCHEDULE),
    "pipeline_parallel_schedule": ("1F1B", _SCHEDULE),
    "pipeline_parallel_schedule_csv": ("", _SCHEDULE),
    "pipeline_parallel_microbatch_size": (1, _SCHEDULE),
    "context_parallel_load_balancer": ("headtail", _CP_ATTENTION),
    "context_parallel_ptrr_mask_key": (None, _CP_ATTENTION),
}
_TORCHTITAN_KEYS = (
    *_TORCHTITAN_SIZES.values(),
    *_TORCHTITAN_DATA,
    "enable_sequence_parallel",
    *_TORCHTITAN_NOT_USED,
)


def read_torchtitan(source: object) -> Reading:
    """TorchTitan's degrees; what is absent has its default there. Its meshes count ranks consecutively."""
    reading = Reading()
    said = _torchtitan_values(source, reading)
    sizes = {name: reading.size(key, said.get(key, 1)) for name, key in _TORCHTITAN_SIZES.items()}
    for name, size in sizes.items():
        reading.say(name, size, _TORCHTITAN_SIZES[name])
    tp, pp, cp = sizes["tp"], sizes["pp"], sizes["cp"]
    if sizes["ep"] == 1 and tp > 1:
        reading.say("etp", tp, "expert_parallel_degree = 1, where TorchTitan cuts the experts over tensor parallelism")
    reading.say("order", "consecutive", "TorchTitan's meshes")
    if reading.flag("enable_sequence_parallel", said.get("enable_sequence_parallel", True)) and tp > 1:
        reading.say("lanes", "sharded", "enable_sequence_parallel")
    replicas, shards = _TORCHTITAN_DATA
    copies = reading.size(replicas, said.get(replicas, 1))
    if as_integer(said.get(shards, -1)) != -1:  # -1, the default: the ranks that are left
        cut = reading.size(shards, said[shards])
        product = f"pp * cp * tp * {replicas} * {shards} = {pp} * {cp} * {tp} * {copies} * {cut}"
        reading.say("world", pp * cp * tp * copies * cut, product)
    if copies > 1:
        reading.not_used.append(f"{replicas} = {copies}: see shard_model(model, groups, replicas=...)")
    for key, (default, why) in _TORCHTITAN_NOT_USED.items():
        if said.get(key, default) != default:
            reading.not_used.append(f"{key}: {why}")
    return reading


def _torchtitan_values(source: object, reading: Reading) -> dict[str, object]:
    if isinstance(source, Mapping):
        given: dict[str, object] = {str(key): value for key, value in source.items()}
        inner = "parallelism" in given
        if not inner:
            check_keys("ParallelismConfig", given, _TORCHTITAN_KEYS, reading)
    else:
        given = {key: getattr(source, key) for key in _TORCHTITAN_KEYS if hasattr(source, key)}
        sizes = (*_TORCHTITAN_SIZES.values(), *_TORCHTITAN_DATA)
        check_keys("ParallelismConfig", _other_sizes(source, "_degree", _TORCHTITAN_KEYS), sizes, reading)
        inner = hasattr(source, "parallelism")
        if _TORCHTITAN_SIZES["tp"] not in given and not inner:
            reading.faults.append(
                f"This {type(source).__name__} has no {_TORCHTITAN_SIZES['tp']}, so it is no ParallelismConfig."
            )
    if inner:
        reading.faults.append(
            "This is TorchTitan's whole configuration, of which a layout is one part: pass its parallelism."
        )
    return given
