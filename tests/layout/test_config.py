"""FoldingConfig: what configuration files say about a layout, in foldpar's words and in those of other libraries."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import doctest
import io
import json
import pickle
import re
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import DOCS, blocks_of

import foldpar
from foldpar.errors import LayoutError
from foldpar.layout.config import FoldingConfig
from foldpar.layout.layout import AXES, FoldedLayout, solve_layout
from foldpar.testing import layouts

MIGRATION = DOCS["migration"]
LIBRARIES = ["DeepSpeed", "Megatron-Core", "transformers", "TorchTitan"]

LAW = settings(deadline=None, max_examples=60)

# A whole DeepSpeed configuration as its users have it.
DEEPSPEED = {
    "train_batch_size": 32,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {"autotp_size": 2, "preset_model": "mixtral", "tp_overlap_comm": True},
    "expert_parallel": {
        "enabled": True,
        "autoep_size": 4,
        "expert_tensor_parallel_size": 1,
        "preset_model": "mixtral",
        "use_grouped_mm": True,
        "route_norm": None,
    },
}


def deepspeed(tensor: object = (), expert: object = (), **sections: object) -> FoldingConfig:
    """DEEPSPEED with some keys changed; a value of ``...`` removes the key."""
    changed = {
        "tensor_parallel": {**DEEPSPEED["tensor_parallel"], **dict(tensor)},
        "expert_parallel": {**DEEPSPEED["expert_parallel"], **dict(expert)},
    }
    kept = {name: {key: value for key, value in keys.items() if value is not ...} for name, keys in changed.items()}
    return FoldingConfig.from_dict({**DEEPSPEED, **kept, **sections})


def degrees_of(layout: FoldedLayout) -> dict[str, int]:
    return {name: getattr(layout, name) for name in ("tp", "ep", "etp", "pp", "cp")}


@st.composite
def configs(draw: st.DrawFn, **bounds: object) -> tuple[FoldingConfig, FoldedLayout]:
    """A configuration and the layout that it is of."""
    layout = draw(layouts(8, **bounds))
    config = FoldingConfig(
        **degrees_of(layout),
        order=layout.order,
        lanes=draw(st.sampled_from(("replicated", "sharded"))),
        preset=draw(st.sampled_from((None, "mixtral", "qwen3_moe"))),
        world=draw(st.sampled_from((None, layout.world))),
    )
    return config, layout


# Laws.


@LAW
@given(pair=configs())
def test_what_a_configuration_says_comes_back_equal(pair):
    config, layout = pair
    for document in (config.to_dict(), {"foldpar": config.to_dict()}):
        assert FoldingConfig.from_dict(document) == config
        assert FoldingConfig.from_json(json.dumps(document, indent=1)) == config
    assert pickle.loads(pickle.dumps(config)) == config and hash(replace(config)) == hash(config)
    assert config.layout(layout.world) == layout


@LAW
@given(pair=configs(pp=1, cp=1))
def test_deepspeed_sections_come_back_equal(pair):
    config, layout = pair
    config = replace(config, order="consecutive", lanes="replicated", world=None)
    assert FoldingConfig.from_dict(config.to_deepspeed()) == config
    whole = {**config.to_deepspeed(), "fp16": {"enabled": True}, "foldpar": {"world": layout.world}}
    assert FoldingConfig.from_dict(whole) == replace(config, world=layout.world)


@LAW
@given(pair=configs())
def test_megatron_arguments_come_back_equal(pair):
    config, _ = pair
    config = replace(
        config, order="consecutive", preset=None, world=None, lanes=config.lanes if config.tp > 1 else "replicated"
    )
    said = config.to_megatron()
    for source in (said, argparse.Namespace(**said), {f"--{key}".replace("_", "-"): said[key] for key in said}):
        assert FoldingConfig.from_megatron(source) == config


@LAW
@given(pair=configs(tp=1))
def test_with_one_lane_either_order_can_be_written_and_names_the_same_groups(pair):
    config, layout = pair
    back = FoldingConfig.from_megatron(config.to_megatron()).layout(layout.world)
    assert [back.groups(axis) for axis in AXES] == [layout.groups(axis) for axis in AXES]


small = st.integers(1, 6)
FACTS = ("num_experts", "num_heads", "num_kv_heads", "expert_hidden")


@LAW
@given(
    degrees=st.fixed_dictionaries(dict.fromkeys(("tp", "ep", "etp", "pp", "cp"), small)),
    world=st.integers(1, 24),
    facts=st.fixed_dictionaries({}, optional={name: st.integers(1, 12) for name in FACTS}),
)
def test_validate_refuses_what_does_not_divide_and_names_values_that_would(degrees, world, facts):
    tp, ep, etp, pp, cp = (degrees[name] for name in ("tp", "ep", "etp", "pp", "cp"))
    broken = sum(facts.get(name, 0) % degree > 0 for name, degree in zip(FACTS, (ep, tp, tp, etp), strict=True))
    stage = world // pp
    broken += 1 if world % pp else (stage % (tp * cp) > 0) + (stage % (ep * etp) > 0)
    config = FoldingConfig(**degrees)
    if not broken:
        config.validate(world, **facts)
        assert config.layout(world) == solve_layout(world, **degrees)
        return
    with pytest.raises(LayoutError) as caught:
        config.validate(world, **facts)
    text = str(caught.value)
    assert text.count(" does not divide ") == broken
    assert text.startswith(f"This configuration has {broken} faults:\n") == (broken > 1)
    # Advice is given for the other degrees as they are: where nothing else is wrong, each value named is accepted.
    named = re.findall(r"With [^.]*, (\w+) can be ([^.]*)\.", text) if broken == 1 else []
    for name, values in named:
        for value in re.findall(r"\d+", values):
            replace(config, **{name: int(value)}).validate(world, **facts)


# foldpar's own section.


def test_the_default_is_no_folding():
    assert FoldingConfig.from_dict({}) == FoldingConfig() == FoldingConfig.from_json("{}")
    assert FoldingConfig().layout(4) == FoldedLayout(4)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "fold.json"
    path.write_text('{"foldpar": {"tp": 2, "ep": 4, "order": "consecutive"}}')
    for spelled in (path, str(path)):
        assert FoldingConfig.from_json(spelled) == FoldingConfig(tp=2, ep=4, order="consecutive")
    path.write_text('{"tp": 2,\n "ep": 4,}')
    with pytest.raises(LayoutError, match=r"fold\.json is not JSON: .* in line 2, column \d+\. Comments and trailing"):
        FoldingConfig.from_json(path)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"tp": 2, "ep": 0}, r"^ep = 0 is not a positive integer\.$"),
        ({"tp": True}, r"^tp = True, of type bool, is not a positive integer\.$"),
        ({"tp": 2.0}, r"^tp = 2\.0, of type float, is not a positive integer\.$"),
        ({"world": "8"}, r"^world = '8', of type str, is not a positive integer\.$"),
        ({"order": "lane-major"}, r"^order = 'lane-major' is unknown: it can be 'tp-lane-major' or 'consecutive'\.$"),
        ({"lanes": "split"}, r"^lanes = 'split' is unknown: it can be 'replicated' or 'sharded'\.$"),
        ({"preset": ["mixtral"]}, r"^preset = \['mixtral'\] is unknown: it can be 'deepseek_v2', .* or 'qwen3_moe'\.$"),
        ({"tp": 2, "dp": 4}, r"^'dp' in the configuration cannot be given: dp is derived\. tp \* cp \* dp == ep \*"),
        ({"tp": 2, "fsdp_size": 4}, r"^'fsdp_size' in the configuration cannot .* layout\(world\)\.dp says what it is"),
        ({"foldpar": {"efsdp": 2}}, r"^'efsdp' in 'foldpar' cannot be given: edp is derived\."),
        ({"tp": 2, "etpp": 2}, r"^'etpp' in the configuration is unknown: did you mean 'etp'\? It can be 'cp', 'ep', "),
        ({"foldpar": {"tp_size": 2}}, r"^'tp_size' in 'foldpar' is unknown: did you mean 'tp'\?"),
        ({"ep": 2, "sequence_parallel": True}, r"'sequence_parallel' .* did you mean 'lanes'\?"),
        ({"tp": 2, "expert_paralel": {}}, r"^There is a section 'expert_paralel': did you mean 'expert_parallel'\?$"),
        ({"bf16": {}}, r"^There is nothing for foldpar in 'bf16': neither a section 'foldpar', 'tensor_parallel' or "),
        ({"tp": 2, "foldpar": {}}, r"^'tp' stands beside sections, so it would not be read: put it into 'foldpar'\.$"),
        ({"foldpar": 2}, r"^The section 'foldpar' is 2; it must be an object of keys and values\.$"),
        ([1], r"^A configuration is an object of keys and values, not \[1\]\.$"),
    ],
)
def test_mistakes_are_named(document, text):
    with pytest.raises(LayoutError, match=text):
        FoldingConfig.from_dict(document)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(LayoutError, match=r"^This configuration has 2 faults:\n  1\. 'edp' .*\n  2\. 'ttp' .* 'tp'\?"):
        FoldingConfig.from_dict({"tp": 2, "edp": 2, "ttp": 2})
    with pytest.raises(LayoutError, match=r"^This configuration has 2 faults:\n  1\. tp = -1 .*\n  2\. order = 'any'"):
        FoldingConfig(tp=-1, order="any")


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(LayoutError, match=r"^'tp' stands twice in one object, and only the last would count: say it"):
        FoldingConfig.from_json('{"tp": 2, "ep": 4, "tp": 4}')


# A world and a model.


@pytest.mark.parametrize(
    ("config", "arguments", "text"),
    [
        (
            FoldingConfig(ep=3, etp=2),
            {"world": 8},
            r"^ep \* etp = 3 \* 2 = 6 does not divide stage_size = 8, so edp would not be whole\. With etp = 2, ep can "
            r"be 1, 2 or 4\.$",
        ),
        (
            FoldingConfig(tp=3, cp=5, pp=2),
            {"world": 8},
            r"^tp \* cp = 3 \* 5 = 15 does not divide stage_size = 4 \(world / pp = 8 / 2\), so dp would not be "
            r"whole\. Each must divide it: 1, 2 or 4\.$",
        ),
        (
            FoldingConfig(tp=2, pp=3),
            {"world": 8},
            r"^pp = 3 does not divide world = 8, so the stages would not be of one size\. It can be 1, 2 or 4\.$",
        ),
        (
            FoldingConfig(ep=4),
            {"world": 8, "num_experts": 6},
            r"^ep = 4 does not divide num_experts = 6: all ranks of an EP group hold equally many experts\. With etp = "
            r"1 and num_experts = 6, ep can be 1 or 2\.$",
        ),
        (
            FoldingConfig(etp=4),
            {"world": 8, "expert_hidden": 30},
            r"^etp = 4 does not divide expert_hidden = 30: the slices .* With ep = 1 and expert_hidden = 30, etp can "
            r"be 1 or 2\.$",
        ),
        (
            FoldingConfig(tp=4),
            {"world": 8, "num_heads": 16, "num_kv_heads": 2},
            r"^tp = 4 does not divide num_kv_heads = 2: a lane holds whole heads, of keys and values too\. With cp = "
            r"1 and num_heads = 16 and num_kv_heads = 2, tp can be 1 or 2\.$",
        ),
        (FoldingConfig(), {"world": 8, "num_heads": 0}, r"^num_heads = 0 is not a positive integer\.$"),
        (FoldingConfig(), {"world": 0}, r"^world = 0 is not a positive integer\.$"),
        (FoldingConfig(), {}, r"^How many ranks there are is not known: the configuration does not say it, so pass"),
        (
            FoldingConfig(preset="mixtral"),
            {"world": 1, "model_type": "qwen2_moe"},
            r"^preset = 'mixtral' is for model_type 'mixtral', but the model's is 'qwen2_moe': one of them is of "
            r"another run\. The preset of this model is 'qwen3_moe'\.$",
        ),
        (
            FoldingConfig(preset="qwen3_moe"),
            {"world": 1, "model_type": "olmoe"},
            r"'qwen3_moe' or 'qwen2_moe', but .* There is no preset for it: leave it out, and fold_model looks at",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(config, arguments, text):
    with pytest.raises(LayoutError, match=text):
        config.validate(**arguments)


def test_everything_that_does_not_fit_is_one_error():
    config = FoldingConfig(tp=3, ep=5, etp=4, preset="mixtral", world=16)
    with pytest.raises(LayoutError) as caught:
        config.validate(8, num_experts=8, num_heads=8, num_kv_heads=4, expert_hidden=30, model_type="deepseek_v3")
    lines = str(caught.value).splitlines()
    assert lines[0] == "This configuration has 8 faults:"
    starts = ("world = 8, ", "tp * cp", "ep * etp", "ep = 5", "etp = 4", "tp = 3", "tp = 3", "preset = ")
    assert [line[5 : 5 + len(start)] for line, start in zip(lines[1:], starts, strict=True)] == list(starts)


def test_a_preset_is_accepted_for_each_of_its_model_types():
    for model_type in ("qwen3_moe", "qwen2_moe"):
        FoldingConfig(preset="qwen3_moe").validate(1, model_type=model_type)


# DeepSpeed.


def test_deepspeed_sections_are_read_as_they_are():
    config = deepspeed()
    assert config == FoldingConfig(tp=2, ep=4, order="consecutive", preset="mixtral")
    assert config.not_used == (
        "tensor_parallel.tp_overlap_comm: how DeepSpeed communicates",
        "expert_parallel.use_grouped_mm: how DeepSpeed computes and communicates; foldpar's kernels and collectives "
        "are its own",
        "train_batch_size: not foldpar's",
        "bf16: not foldpar's",
        "zero_optimization: not foldpar's; see shard_model(model, groups, stage=...)",
    )
    report = config.report()
    assert "tp = 2 (tensor_parallel.autotp_size)\n" in report and "ep = 4 (expert_parallel.autoep_size)\n" in report
    assert report.endswith("not used\n" + "\n".join(f"  {line}" for line in config.not_used))


def test_deepspeed_ranks_are_where_deepspeed_has_them():
    """World 8, TP2/EP4: the tables that DeepSpeed 0.19.8 derives for a fold."""
    layout = deepspeed().layout(8)
    assert layout.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("dp") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert layout.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.groups("edp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_what_deepspeed_has_no_key_for_stands_in_a_section_of_our_own():
    own = {"pp": 2, "cp": 2, "order": "tp-lane-major", "lanes": "sharded", "tp": 2}
    config = deepspeed(foldpar=own)
    assert config == FoldingConfig(tp=2, ep=4, pp=2, cp=2, order="tp-lane-major", lanes="sharded", preset="mixtral")
    assert "order" not in dict(config.origins)


def test_deepspeed_off_is_off():
    assert deepspeed({"autotp_size": 0}).tp == deepspeed({"autotp_size": ...}).tp == 1
    config = deepspeed({}, {"enabled": False})
    assert (config.tp, config.ep) == (2, 1)
    assert "expert_parallel.autoep_size = 4: expert_parallel.enabled is false, so ep = 1" in config.not_used
    assert deepspeed({}, {"enabled": False, "route_scale": 2.5}).ep == 1, "what is off changes nothing"
    only_ours = FoldingConfig.from_dict({"foldpar": {"tp": 2}, "bf16": {}})
    assert only_ours == FoldingConfig(tp=2) and only_ours.not_used == ("bf16: not foldpar's",)


def test_sequence_parallelism_without_lanes_is_context_parallelism():
    config = deepspeed({"autotp_size": 1}, sequence_parallel_size=4)
    assert (config.tp, config.cp) == (1, 4) and dict(config.origins)["cp"] == "sequence_parallel_size"
    assert config.layout(8).groups("cp") == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_a_preset_that_only_names_a_sharding_pattern_is_not_compared():
    config = deepspeed({"preset_model": "llama"}, {"preset_model": ...})
    assert config.preset is None and any(line.startswith("tensor_parallel.preset_model") for line in config.not_used)
    assert deepspeed({}, {"preset_model": ...}).preset == "mixtral"


@pytest.mark.parametrize(
    ("tensor", "expert", "others", "text"),
    [
        (
            {"auto_tp_size": 2},
            {},
            {},
            r"^'auto_tp_size' in tensor_parallel is unknown: did you mean 'autotp_size'\? It can be 'autotp_size', ",
        ),
        ({}, {"ep_size": 4}, {}, r"^'ep_size' in expert_parallel is unknown: did you mean 'autoep_size'\?"),
        ({}, {"dp": 4}, {}, r"^'dp' in expert_parallel cannot be given: dp is derived\."),
        ({"tp": {"tp_sice": 2}}, {}, {}, r"^'tp_sice' in tensor_parallel\.tp is unknown: did you mean 'tp_size'\?"),
        (
            {"tp": {"tp_size": 4}},
            {},
            {},
            r"^tensor_parallel\.tp\.tp_size = 4 contradicts tensor_parallel\.autotp_size = 2: leave it out, or say 2",
        ),
        (
            {"autotp_size": "auto"},
            {},
            {},
            r"^tensor_parallel\.autotp_size = 'auto', of type str, is not an integer from 0 on\. A trainer fills",
        ),
        ({}, {"autoep_size": 0}, {}, r"^expert_parallel\.autoep_size = 0 is not an integer from 1 on\.$"),
        ({}, {"enabled": "yes"}, {}, r"expert_parallel\.enabled = 'yes' can be true or false\."),
        (
            {},
            {"enabled": ...},
            {},
            r"^expert_parallel\.autoep_size = 4, but expert_parallel\.enabled is missing, and DeepSpeed's default is",
        ),
        (
            {},
            {"route_scale": 2.5},
            {},
            r"^expert_parallel\.route_scale = 2\.5 would change what the layer computes\. .* and leave 1\.0 here\.$",
        ),
        ({}, {"load_balance_coeff": 0.01}, {}, r"^expert_parallel\.load_balance_coeff = 0\.01 would change"),
        (
            {"preset_model": "deepseek_v2"},
            {},
            {},
            r"^tensor_parallel\.preset_model = 'deepseek_v2' and expert_parallel\.preset_model = 'mixtral' name two",
        ),
        ({"preset_model": "lama"}, {"preset_model": ...}, {}, r"^tensor_parallel\.preset_model = 'lama' is unknown: "),
        ({"preset_model": ...}, {"preset_model": []}, {}, r"^expert_parallel\.preset_model = \[\] is unknown: it can"),
        (
            {},
            {},
            {"sequence_parallel_size": 2},
            r"^sequence_parallel_size = 2 and tensor_parallel\.autotp_size = 2 exclude each other: .* say lanes = "
            r"'sharded' in a section 'foldpar'",
        ),
        (
            {},
            {},
            {"use_data_before_expert_parallelism": True},
            r"^use_data_before_expert_parallelism = true would spread an expert group over .* Leave it false\.$",
        ),
        ({}, {}, {"tensor_paralel": {}}, r"^There is a section 'tensor_paralel': did you mean 'tensor_parallel'\?$"),
        ({}, {}, {"expert_parallel": 4}, r"^The section 'expert_parallel' is 4; it must be an object of keys and"),
        (
            {},
            {},
            {"foldpar": {"ep": 2}},
            r"^ep = 2 in 'foldpar' contradicts expert_parallel\.autoep_size, which says 4\. Say it once\.$",
        ),
        ({}, {}, {"foldpar": {"dp": 2}}, r"^'dp' in 'foldpar' cannot be given"),
    ],
)
def test_deepspeed_mistakes_are_named(tensor, expert, others, text):
    with pytest.raises(LayoutError, match=text):
        deepspeed(tensor, expert, **others)


def test_errors_name_the_keys_that_the_user_wrote():
    with pytest.raises(LayoutError, match=r"ep can be 1, 2 or 4\. Here ep is expert_parallel\.autoep_size and etp is "):
        deepspeed({}, {"autoep_size": 3}).validate(4)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            FoldingConfig(tp=2),
            r"^order = 'tp-lane-major' with tp = 2 is not an order of DeepSpeed, whose expert groups",
        ),
        (FoldingConfig(pp=2), r"^pp = 2 has no key .* so only pp = 1 can be written\.$"),
        (FoldingConfig(lanes="sharded"), r"^lanes = 'sharded' has no key .* only lanes = 'replicated' can be written"),
    ],
)
def test_what_deepspeed_cannot_say_is_refused(config, text):
    with pytest.raises(LayoutError, match=text):
        config.to_deepspeed()


# Megatron-Core.


def test_megatron_experts_are_sliced_like_dense_layers_unless_it_is_said():
    sizes = {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 2}
    assert FoldingConfig.from_megatron(sizes).etp == 4
    assert FoldingConfig.from_megatron({**sizes, "expert_tensor_parallel_size": None}).etp == 4
    assert FoldingConfig.from_megatron({**sizes, "expert_tensor_parallel_size": 1}).etp == 1


def test_megatron_arguments_say_the_world():
    arguments = argparse.Namespace(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        data_parallel_size=4,
        sequence_parallel=True,
        virtual_pipeline_model_parallel_size=2,
        hidden_size=4096,
    )
    config = FoldingConfig.from_megatron(arguments)
    assert config == FoldingConfig(tp=2, cp=2, etp=2, order="consecutive", lanes="sharded", world=16)
    assert config.layout().dp == 4
    assert config.not_used == ("virtual_pipeline_model_parallel_size: a pipeline schedule's",)
    with pytest.raises(LayoutError, match=r"^world = 8, but the configuration is for 16 ranks\. dp would be 2, not 4"):
        config.layout(8)


def test_megatron_sequence_parallelism_needs_lanes():
    assert FoldingConfig.from_megatron({"tensor_model_parallel_size": 1, "sequence_parallel": True}).lanes != "sharded"


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "TP-EP-CP-DP-PP", "tp-cp-dp-ep-pp", "cp-tp-ep-dp-pp"])
def test_an_order_that_differs_only_in_axes_of_size_1_is_the_same(order):
    FoldingConfig.from_megatron({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "order": order})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"pipeline_model_parallel_size": 2, "use_tp_pp_dp_mapping": True},
            r"^use_tp_pp_dp_mapping = true, order = 'tp-cp-ep-pp-dp' with pp = 2 is not how foldpar numbers ranks: ",
        ),
        ({"context_parallel_size": 2, "order": "cp-tp-ep-dp-pp"}, r"^order = 'cp-tp-ep-dp-pp' with pp = 1 is not how"),
        ({"order": "tp-dp-pp", "expert_model_parallel_size": 2}, r"^order = 'tp-dp-pp' with pp = 1 is not how foldpar"),
        ({"order": "tp-etp"}, r"^order = 'tp-etp' is not made of tp, cp, ep, dp and pp, as 'tp-cp-ep-dp-pp' is\.$"),
        ({"tensor_model_parallel_sise": 2}, r"^'tensor_model_parallel_sise' is unknown: did you mean 'tensor_model_"),
        ({"expert_model_parallel_size": "4"}, r"^expert_model_parallel_size = '4', of type str, is not an integer"),
        ({"sequence_parallel": 1}, r"^sequence_parallel = 1 can be true or false\.$"),
        (
            {"world_size": 16, "data_parallel_size": 4},
            r"^data_parallel_size = 4 contradicts world_size = 16: pp \* cp \* tp \* dp = 1 \* 1 \* 2 \* 4 = 8\.",
        ),
        ({"encoder_tensor_model_parallel_size": 2}, r"^encoder_tensor_model_parallel_size = 2 gives the encoder ranks"),
    ],
)
def test_megatron_mistakes_are_named(arguments, text):
    with pytest.raises(LayoutError, match=text):
        FoldingConfig.from_megatron({"tensor_model_parallel_size": 2, **arguments})


def test_what_is_no_megatron_configuration_is_refused():
    with pytest.raises(LayoutError, match=r"^This Namespace has none of Megatron-Core's sizes: 'tensor_model_parallel"):
        FoldingConfig.from_megatron(argparse.Namespace(tp=2))


def test_what_megatron_cannot_say_is_refused():
    with pytest.raises(LayoutError, match=r"^order = 'tp-lane-major' with tp = 2 is not an order of Megatron-Core"):
        FoldingConfig(tp=2).to_megatron()


# transformers.


def test_transformers_sizes_say_the_world():
    config = FoldingConfig.from_transformers({"tp_size": 2, "fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 4})
    assert config == FoldingConfig(tp=2, ep=4, order="consecutive", world=8)
    layout = config.layout()
    assert (layout.dp, layout.edp) == (4, 2)
    # Its expert mesh is (pp, dp_replicate, efsdp, ep) over the ranks in order; efsdp * dp_replicate is edp here.
    assert layout.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7)) and layout.groups("edp")[0] == (0, 4)
    with pytest.raises(
        LayoutError,
        match=r"^world = 16, but the configuration is for 8 ranks\. dp would be 8, not 4\. Start 8, or change what it "
        r"says\. Here world is pp_size \* dp_replicate_size \* fsdp_size \* tp_size = 1 \* 2 \* 2 \* 2\.$",
    ):
        config.layout(16)


@LAW
@given(sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_transformers_derives_what_foldpar_derives(sizes):
    names = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size")
    config = FoldingConfig.from_transformers(dict(zip(names, sizes, strict=True)))
    layout = config.layout(prod(sizes))
    assert (layout.tp, layout.pp, layout.dp) == (sizes[0], sizes[3], sizes[1] * sizes[2])


def test_transformers_configuration_objects_are_read():
    distributed = pytest.importorskip("transformers.distributed")
    theirs = distributed.DistributedConfig(tp_size=2, fsdp_size=4, ep_size=4, fsdp_mixed_precision=True)
    config = FoldingConfig.from_transformers(theirs)
    assert config == FoldingConfig.from_transformers(theirs.to_dict())
    assert config.layout().edp == theirs.efsdp_size == 2
    assert config.not_used == ("fsdp_mixed_precision: see shard_model(..., mixed_precision=...)",)


def test_the_older_flag_for_expert_parallelism_means_all_lanes():
    config = FoldingConfig.from_transformers({"tp_size": 4, "enable_expert_parallel": True, "tp_plan": "auto"})
    assert (config.tp, config.ep, config.not_used) == (4, 4, ())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"tp": 2}, r"^'tp' in DistributedConfig is unknown: "),
        ({"efsdp_size": 2}, r"^'efsdp_size' in DistributedConfig cannot be given: edp is derived\."),
        ({"tp_plan": "auto"}, r"^tp_size is None and tp_plan is set, so transformers takes what the environment's"),
        ({"tp_size": 0}, r"^tp_size = 0 is not an integer from 1 on\.$"),
        ({"tp_size": 2, "enable_sequence_parallel": True}, r"^enable_sequence_parallel = true does nothing in"),
        (argparse.Namespace(ep_size=2), r"^This Namespace has no tp_size, so it is no DistributedConfig\.$"),
    ],
)
def test_transformers_mistakes_are_named(given, text):
    with pytest.raises(LayoutError, match=text):
        FoldingConfig.from_transformers(given)


# TorchTitan.


@dataclasses.dataclass
class ParallelismConfig:
    """The degrees of TorchTitan 0.3.0's class of this name, and some of what is beside them, with its defaults."""

    data_parallel_replicate_degree: int = 1
    data_parallel_shard_degree: int = -1
    fsdp_reshard_after_forward: str = "default"
    tensor_parallel_degree: int = 1
    enable_sequence_parallel: bool = True
    spmd_backend: str = "spmd_types"
    pipeline_parallel_degree: int = 1
    pipeline_parallel_schedule: str = "1F1B"
    context_parallel_degree: int = 1
    expert_parallel_degree: int = 1


def test_torchtitan_configurations_are_read_from_objects_and_mappings():
    theirs = ParallelismConfig(tensor_parallel_degree=2, expert_parallel_degree=4, pipeline_parallel_degree=2)
    config = FoldingConfig.from_torchtitan(theirs)
    assert config == FoldingConfig(tp=2, ep=4, pp=2, order="consecutive", lanes="sharded")
    assert config == FoldingConfig.from_torchtitan(dataclasses.asdict(theirs)) and config.not_used == ()
    changed = {"tensor_parallel_degree": 2, "expert_parallel_degree": 4, "pipeline_parallel_degree": 2}
    assert FoldingConfig.from_torchtitan(changed) == config
    # Its sparse mesh is (pp, dp_replicate, efsdp, ep) over the ranks in order.
    assert config.layout(16).groups("ep")[:2] == ((0, 1, 2, 3), (4, 5, 6, 7)) and config.layout(16).edp == 2


def test_torchtitan_leaves_the_world_open_unless_it_says_how_many_shards():
    assert FoldingConfig.from_torchtitan({}).world is None
    assert FoldingConfig.from_torchtitan({"data_parallel_shard_degree": -1}).layout(8).dp == 8
    assert FoldingConfig.from_torchtitan({"data_parallel_shard_degree": 1}).world == 1
    config = FoldingConfig.from_torchtitan(
        {
            "data_parallel_shard_degree": 2,
            "data_parallel_replicate_degree": 2,
            "context_parallel_degree": 2,
            "fsdp_reshard_after_forward": "never",
        }
    )
    assert (config.world, config.layout().dp) == (8, 4)
    assert config.not_used == (
        "data_parallel_replicate_degree = 2: see shard_model(model, groups, replicas=...)",
        "fsdp_reshard_after_forward: see shard_model(model, groups, stage=...)",
    )
    with pytest.raises(LayoutError, match=r"^world = 16, but the configuration is for 8 ranks\."):
        config.layout(16)


def test_torchtitan_cuts_experts_over_tensor_parallelism_where_they_are_not_spread():
    assert FoldingConfig.from_torchtitan({"tensor_parallel_degree": 4}).etp == 4
    assert FoldingConfig.from_torchtitan({"tensor_parallel_degree": 4, "expert_parallel_degree": 2}).etp == 1


def test_torchtitan_sequence_parallelism_needs_lanes_and_may_be_off():
    assert FoldingConfig.from_torchtitan({}).lanes == "replicated"
    off = {"tensor_parallel_degree": 2, "enable_sequence_parallel": False}
    assert FoldingConfig.from_torchtitan(off).lanes == "replicated"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"tensor_parallel_degre": 2}, r"^'tensor_parallel_degre' in ParallelismConfig is unknown: did you mean 'tens"),
        ({"efsdp": 2}, r"^'efsdp' in ParallelismConfig cannot be given: edp is derived\."),
        ({"tensor_parallel_degree": 0}, r"^tensor_parallel_degree = 0 is not an integer from 1 on\.$"),
        ({"data_parallel_shard_degree": 0}, r"^data_parallel_shard_degree = 0 is not an integer from 1 on\.$"),
        ({"data_parallel_shard_degree": "2"}, r"^data_parallel_shard_degree = '2', of type str, is not an integer"),
        ({"data_parallel_replicate_degree": -1}, r"^data_parallel_replicate_degree = -1 is not an integer from 1 on"),
        ({"enable_sequence_parallel": 1}, r"^enable_sequence_parallel = 1 can be true or false\.$"),
        (
            {"parallelism": {}},
            r"^This is TorchTitan's whole configuration, of which a layout is one part: pass its par",
        ),
        (argparse.Namespace(parallelism=ParallelismConfig()), r"^This is TorchTitan's whole configuration"),
        (argparse.Namespace(tp=2), r"^This Namespace has no tensor_parallel_degree, so it is no ParallelismConfig\.$"),
        (None, r"^This NoneType has no tensor_parallel_degree, so it is no ParallelismConfig\.$"),
    ],
)
def test_torchtitan_mistakes_are_named(given, text):
    with pytest.raises(LayoutError, match=text):
        FoldingConfig.from_torchtitan(given)


# The migration page.


def test_the_interactive_examples_of_the_migration_page(monkeypatch):
    monkeypatch.setattr(foldpar, "FoldingConfig", FoldingConfig, raising=False)
    examples = [block for block in blocks_of(MIGRATION) if block.language == "pycon"]
    assert [block.section.partition("From ")[2].partition(",")[0] for block in examples] == LIBRARIES
    text = "\n".join(block.text for block in examples)
    page = doctest.DocTestParser().get_doctest(text, {}, "migration.md", "migration.md", 0)
    report = io.StringIO()
    doctest.DocTestRunner().run(page, out=report.write)
    assert not report.getvalue(), report.getvalue()


def test_the_migration_page_has_a_table_and_a_loop_before_and_after_for_each_library():
    for library in LIBRARIES:
        text = re.split(r"^## ", MIGRATION.partition(f"\n## From {library}")[2], maxsplit=1, flags=re.MULTILINE)[0]
        assert re.search(r"^\|---\|---\|---\|$", text, re.MULTILINE)
        before, after = [block.text for block in blocks_of(text) if block.language == "python"]
        assert "import foldpar" not in before and "import foldpar" in after
        assert re.search(r"^Before:$.*^After\b", text, re.MULTILINE | re.DOTALL)


def test_the_code_of_the_migration_page_uses_names_that_exist():
    programs = [block for block in blocks_of(MIGRATION) if block.language == "python"]
    ours = {
        "FoldingConfig",
        "fold_model",
        "shard_model",
        "save_checkpoint",
        "load_checkpoint",
        "accumulate",
        "families",
        "hf",
        *foldpar.__all__,
    }
    used = {
        node.attr
        for block in programs
        for node in ast.walk(ast.parse(block.text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "foldpar"
    }
    assert used and used <= ours


@pytest.mark.parametrize(
    ("read", "source", "key"),
    [
        (FoldingConfig.from_torchtitan, {"tensor_parallel_degree": 2}, "expert_tensor_parallel_degree"),
        (FoldingConfig.from_transformers, {"tp_size": 2}, "cp_size"),
    ],
)
def test_a_size_that_only_another_version_has_is_dropped_from_no_object(read, source, key):
    assert read(SimpleNamespace(**source, **{key: 1})).tp == 2
    with pytest.raises(LayoutError, match=f"'{key}' in .* is unknown"):
        read(SimpleNamespace(**source, **{key: 2}))
