"""Hugging Face's files into folded models and out of them again: every value, on every rank, in every family."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, VOCAB, tiny_model
from live_bytes import LiveBytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.errors import CheckpointError, ModelError
from foldpar.hf import ExportReport, ImportReport, export, import_
from foldpar.models.fold import fold_model
from foldpar.sharding.shard import shard_model
from foldpar.testing import run_ranks
from foldpar.testing.shares import Shares

TP2_EP4 = {"tp": 2, "ep": 4}
WITH_ETP = {"tp": 2, "ep": 2, "etp": 2}
# How their files store experts: per expert under two naming schemes, with a buffer, and fused with biases.
STORES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
TOKENS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))


def meta_model(family: str, **overrides: Any) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[family].make(**overrides).to(torch.float64).eval()


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def on_ranks(layout: dict[str, Any], work: Callable[[foldpar.FoldedGroups], Any], world: int = 4) -> list[Any]:
    def run() -> Any:
        with foldpar.create_groups(foldpar.solve_layout(world, **layout)) as groups:
            return work(groups)

    return run_ranks(run, world, backend="threads", timeout=60)


def saved(folder: Path, family: str, **options: Any) -> nn.Module:
    model = tiny_model(family).eval()
    model.save_pretrained(folder, **options)
    return model


def names_and_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    return found


def check_round_trip(family: str, layout: dict[str, Any], tmp_path: Path) -> None:
    """save_pretrained -> import_ on the meta device -> same logits -> export -> from_pretrained -> same logits."""
    original = saved(tmp_path / "hub", family, max_shard_size="20KB")
    wanted = logits_of(original)

    def work(groups: foldpar.FoldedGroups) -> tuple[float, ImportReport, ExportReport]:
        model = meta_model(family)
        fold_model(model, groups)
        read = import_(model, tmp_path / "hub", groups)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert local_tensor(tensor).device.type == "cpu", name
            assert tensor.dtype == torch.float64 or not tensor.is_floating_point(), name
        own = [local_tensor(tensor) for tensor in model.state_dict().values()]
        assert read.bytes_read == sum(tensor.numel() * tensor.element_size() for tensor in own) < read.bytes_stored
        values = original.state_dict()
        shares = Shares(model, groups)
        for name, parameter in model.named_parameters():
            mine = shares.share_of(name, values[name])
            assert torch.equal(local_tensor(parameter).reshape(mine.shape), mine), name
        for name in values.keys() - dict(model.named_parameters()).keys():
            assert torch.equal(model.state_dict()[name], values[name]), name
        difference = float((logits_of(model) - wanted).abs().max())
        written = export(model, tmp_path / "out", groups, max_shard_bytes=20_000, buffer_bytes=1_000)
        return difference, read, written

    results = on_ranks(layout, work)
    # Llama 4's rotary frequencies are complex64 in any case, and Nemotron-H scans in float32.
    assert max(difference for difference, _, _ in results) < (1e-6 if family in ("llama4", "nemotron_h") else 1e-12)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors.index.json"}
    assert not list((tmp_path / "out").glob("*.incomplete"))
    assert names_and_shapes(tmp_path / "out") == names_and_shapes(tmp_path / "hub")

    options = {"dtype": torch.float64, "experts_implementation": "eager", "attn_implementation": "eager"}
    loaded, info = type(original).from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    values = original.state_dict()
    assert loaded.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in loaded.state_dict().items())
    assert torch.allclose(logits_of(loaded.eval()), wanted, atol=1e-6)


@pytest.mark.parametrize("family", STORES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    check_round_trip(family, TP2_EP4, tmp_path)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_round_trip_with_expert_slices(family: str, tmp_path: Path) -> None:
    check_round_trip(family, WITH_ETP, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("layout", [TP2_EP4, WITH_ETP, {**TP2_EP4, "order": "consecutive"}], ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "jetmoe"])
def test_round_trip_of_every_family(family: str, layout: dict[str, Any], tmp_path: Path) -> None:
    check_round_trip(family, layout, tmp_path)


def test_the_exported_folder_loads_by_its_config_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = saved(tmp_path / "hub", "qwen3_moe")

    def work(groups: foldpar.FoldedGroups) -> None:
        model = meta_model("qwen3_moe")
        fold_model(model, groups)
        import_(model, tmp_path / "hub", groups)
        export(model, tmp_path / "out", groups)

    on_ranks(TP2_EP4, work)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    assert type(loaded) is type(original)
    assert loaded.dtype == torch.float64
    assert torch.allclose(logits_of(loaded), logits_of(original), atol=1e-6)


def test_a_model_with_values_is_overwritten_in_its_dtype(tmp_path: Path) -> None:
    original = saved(tmp_path / "hub", "mixtral")

    def work(groups: foldpar.FoldedGroups) -> None:
        model = tiny_model("mixtral", seed=7, dtype=torch.float32)
        fold_model(model, groups)
        before = list(model.parameters())
        import_(model, tmp_path / "hub", groups)
        assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
        shares = Shares(model, groups)
        for name, parameter in model.named_parameters():
            mine = shares.share_of(name, original.state_dict()[name])
            assert torch.equal(local_tensor(parameter), mine.float()), name

    on_ranks(TP2_EP4, work)


@pytest.mark.parametrize("meta", [True, False])
def test_sharded_models_read_and_write_their_shards(meta: bool, tmp_path: Path) -> None:
    original = saved(tmp_path / "hub", "qwen3_moe")
    run_ranks(_sharded_round_trip, 4, str(tmp_path), meta, timeout=120)
    values = load_file(tmp_path / "out" / "model.safetensors")
    wanted = load_file(tmp_path / "hub" / "model.safetensors")
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(original).__name__]


def _sharded_round_trip(folder: str, meta: bool) -> None:
    with foldpar.create_groups(foldpar.solve_layout(4, ep=2)) as groups:
        model = meta_model("qwen3_moe") if meta else tiny_model("qwen3_moe", seed=7).eval()
        fold_model(model, groups)
        shard_model(model, groups, stage=3)
        report = import_(model, Path(folder) / "hub", groups)
        assert report.bytes_read < 0.35 * report.bytes_stored
        with torch.no_grad():
            reference = tiny_model("qwen3_moe").eval()
            assert torch.allclose(logits_of(model), logits_of(reference), atol=1e-12)
        export(model, Path(folder) / "out", groups)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    original = tiny_model("qwen3_moe", tie_word_embeddings=True).eval()
    original.save_pretrained(tmp_path / "hub")
    assert "lm_head.weight" not in load_file(tmp_path / "hub" / "model.safetensors")

    def work(groups: foldpar.FoldedGroups) -> None:
        model = meta_model("qwen3_moe", tie_word_embeddings=True)
        fold_model(model, groups)
        import_(model, tmp_path / "hub", groups)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.allclose(logits_of(model), logits_of(original), atol=1e-12)
        export(model, tmp_path / "out", groups)

    on_ranks(TP2_EP4, work)
    assert names_and_shapes(tmp_path / "out") == names_and_shapes(tmp_path / "hub")


def test_marks_and_frozen_parameters_survive(tmp_path: Path) -> None:
    saved(tmp_path / "hub", "gpt_oss")

    def work(groups: foldpar.FoldedGroups) -> None:
        model = meta_model("gpt_oss")
        model.model.embed_tokens.weight.requires_grad_(False)
        fold_model(model, groups)
        foldpar.mark_parameters(model.model.norm.weight, foldpar.families.REPLICATED_PARTIAL)
        before = foldpar.parameter_families(model, groups)
        import_(model, tmp_path / "hub", groups)
        assert foldpar.parameter_families(model, groups) == before
        assert before["model.norm.weight"] is foldpar.families.REPLICATED_PARTIAL
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == ["model.embed_tokens.weight"]

    on_ranks(TP2_EP4, work)


def test_pipeline_stages_read_and_write_their_parts(tmp_path: Path) -> None:
    def work(groups: foldpar.FoldedGroups) -> None:
        def stage_model(value: float) -> nn.Module:
            stage = nn.ModuleDict({f"layer{groups.pp.index}": nn.Linear(3, 2)})
            foldpar.mark_parameters(stage, foldpar.families.REPLICATED)
            nn.init.constant_(stage[f"layer{groups.pp.index}"].weight, value)
            return stage

        written = export(stage_model(1.0 + groups.pp.index), tmp_path, groups)
        assert written.tensors == 4
        other = stage_model(0.0)
        assert import_(other, tmp_path, groups).unused == ()
        assert torch.equal(other[f"layer{groups.pp.index}"].weight, torch.full((2, 3), 1.0 + groups.pp.index))

    on_ranks({"pp": 2}, work)
    assert load_file(tmp_path / "model.safetensors")["layer1.weight"].unique().tolist() == [2.0]


def test_bits_survive(tmp_path: Path) -> None:
    """Negative zeros, NaNs with a payload and subnormal numbers."""
    bits = torch.tensor([-(2**63), 0x7FF8000000000123, 1, -1], dtype=torch.int64)

    def work(groups: foldpar.FoldedGroups) -> None:
        model = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        foldpar.mark_parameters(model, foldpar.families.REPLICATED)
        with torch.no_grad():
            model.weight.view(torch.int64).copy_(bits.view(2, 2))
        export(model, tmp_path / "out", groups)
        other = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        foldpar.mark_parameters(other, foldpar.families.REPLICATED)
        import_(other, tmp_path / "out", groups)
        assert torch.equal(other.weight.detach().view(torch.int64).flatten(), bits)

    on_ranks({"tp": 2}, work, world=2)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"].view(torch.int64).flatten(), bits)


# ---------------------------------------------------------------------------------------------------------------------
# Memory.

BIG = {
    "hidden_size": 64,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
}


def test_a_rank_holds_its_share_and_one_tensor_at_most(tmp_path: Path) -> None:
    """Counted: every storage that torch makes in between, files mapped into memory aside."""
    original = FAMILIES["qwen3_moe"].make(**BIG).to(torch.float64)
    original.save_pretrained(tmp_path / "hub", max_shard_size="1MB")
    largest = max(parameter.numel() * 8 for parameter in original.parameters())
    whole = sum(parameter.numel() * 8 for parameter in original.parameters())
    run_ranks(_measured, 4, str(tmp_path), largest, whole, timeout=120)
    assert names_and_shapes(tmp_path / "out") == names_and_shapes(tmp_path / "hub")


def _measured(folder: str, largest: int, whole: int) -> None:
    buffer_bytes = 50_000
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=4)) as groups:
        model = meta_model("qwen3_moe", **BIG)
        fold_model(model, groups)
        with LiveBytes() as counted:
            import_(model, Path(folder) / "hub", groups)
        own = sum(local_tensor(each).numel() * 8 for each in (*model.parameters(), *model.buffers()))
        assert own < 0.3 * whole
        assert own <= counted.peak < own + largest / 4, (own, counted.peak, largest)
        with LiveBytes() as counted:
            export(model, Path(folder) / "out", groups, max_shard_bytes=2_000_000, buffer_bytes=buffer_bytes)
        assert buffer_bytes <= counted.peak < 2.5 * buffer_bytes < own, counted.peak


# ---------------------------------------------------------------------------------------------------------------------
# Errors: one for all ranks, and nothing touched.


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    values = load_file(folder / "model.safetensors")
    edit(values)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def failures_of(folder: Path, family: str = "qwen3_moe", *, meta: bool = False, **options: Any) -> list[str]:
    """What every rank raised, after seeing that its model is as it was."""

    def work(groups: foldpar.FoldedGroups) -> str:
        model = meta_model(family) if meta else tiny_model(family, seed=7)
        fold_model(model, groups)
        before = {name: local_tensor(tensor).clone() for name, tensor in model.named_parameters()}
        with pytest.raises(CheckpointError) as caught:
            import_(model, folder, groups, **options)
        for name, tensor in model.named_parameters():
            assert tensor.is_meta if meta else torch.equal(local_tensor(tensor), before[name])
        return str(caught.value)

    return on_ranks(TP2_EP4, work)


def test_one_error_names_all_that_does_not_fit(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe")

    def edit(values: dict[str, Tensor]) -> None:
        del values["model.layers.0.mlp.experts.2.up_proj.weight"]
        del values["model.norm.weight"]
        values["model.layers.1.mlp.gate.weight"] = torch.zeros(5, 16)
        values["extra.weight"] = torch.zeros(1)

    edited(tmp_path, edit)
    texts = failures_of(tmp_path)
    assert len(set(texts)) == 1
    for expected in (
        r"does not fit the model\. Nothing was loaded\.",
        r"model\.layers\.0\.mlp\.experts\.gate_up_proj: .*gate_proj\.weight and 6 more do not go together: their shapes"
        r" are \[4, 16\], \[3, 16\]",
        r"model\.norm\.weight is missing in the files",
        r"model\.layers\.1\.mlp\.gate\.weight is \[4, 16\] in the model and \[5, 16\] in the files",
        r"extra\.weight is in the files and not in the model",
        r"strict=False leaves superfluous tensors out",
    ):
        assert re.search(expected, texts[0]), f"{expected}\n{texts[0]}"


def test_a_whole_expert_that_is_missing(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v3")

    def edit(values: dict[str, Tensor]) -> None:
        for name in ("gate", "up", "down"):
            del values[f"model.layers.1.mlp.experts.3.{name}_proj.weight"]

    edited(tmp_path, edit)
    (text,) = set(failures_of(tmp_path, "deepseek_v3"))
    assert re.search(
        r"experts\.down_proj is \[4, 16, 8\] in the model and \[3, 16, 8\] in the files \(.* and 2 more\)", text
    )


def test_a_lenient_import_says_what_it_left(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe")

    def edit(values: dict[str, Tensor]) -> None:
        values["extra.weight"] = torch.zeros(1)
        del values["model.norm.weight"]

    edited(tmp_path, edit)

    def work(groups: foldpar.FoldedGroups) -> None:
        model = tiny_model("qwen3_moe", seed=7)
        fold_model(model, groups)
        kept = model.model.norm.weight.detach().clone()
        report = import_(model, tmp_path, groups, strict=False)
        assert report.unused == ("extra.weight",) and report.missing == ("model.norm.weight",)
        assert "1 unused: extra.weight; 1 missing: model.norm.weight" in str(report)
        assert torch.equal(model.model.norm.weight, kept)

    on_ranks(TP2_EP4, work)
    (text,) = set(failures_of(tmp_path, meta=True, strict=False))
    assert "model.norm.weight is missing in the files and has no values yet, being on the meta device" in text


def test_folders_that_hold_no_weights(tmp_path: Path) -> None:
    (text,) = set(failures_of(tmp_path / "nowhere"))
    assert re.search(r"holds neither model\.safetensors nor .*; it does not exist\..*snapshot_download", text)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (text,) = set(failures_of(tmp_path))
    assert "it holds pytorch_model.bin" in text and "save_pretrained" in text


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    (text,) = set(failures_of(tmp_path))
    assert re.search(r"are quantised \(fp8\).*Dequantise them first", text)


def test_damaged_and_incomplete_folders(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", max_shard_size="20KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    data = victim.read_bytes()
    victim.write_bytes(data[:-5])
    (text,) = set(failures_of(tmp_path))
    assert re.search(rf"{victim.name} is damaged, or no safetensors file", text)
    victim.unlink()
    (text,) = set(failures_of(tmp_path))
    assert re.search(rf"names {victim.name}, which is not there", text)


def test_an_export_does_not_mix_with_what_is_there(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def work(groups: foldpar.FoldedGroups) -> None:
        model = tiny_model("qwen3_moe")
        fold_model(model, groups)
        with pytest.raises(CheckpointError, match=r"holds weights already, model\.safetensors.*Nothing was written"):
            export(model, tmp_path, groups)

    on_ranks(TP2_EP4, work)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_of_nothing(tmp_path: Path) -> None:
    def work(groups: foldpar.FoldedGroups) -> None:
        model = meta_model("qwen3_moe")
        fold_model(model, groups)
        with pytest.raises(CheckpointError, match=r"is on the meta device and has no values to export"):
            export(model, tmp_path / "out", groups)

    on_ranks(TP2_EP4, work)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fails_is_an_error_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foldpar.hf import weight_files

    def full(path: Path, data: Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "append", full)

    def work(groups: foldpar.FoldedGroups) -> None:
        model = tiny_model("qwen3_moe")
        fold_model(model, groups)
        with pytest.raises(CheckpointError, match=r"No space left on device"):
            export(model, tmp_path / "out", groups)

    on_ranks(TP2_EP4, work)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["begin_file", "replace", "save_pretrained"])
def test_a_disk_that_is_full_at_any_moment_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    from foldpar.hf import weight_files

    (tmp_path / "tokenizer.json").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    calls: list[Any] = []

    def full(*given: Any, **_: Any) -> None:
        calls.append(given)
        if broken != "replace" or len(calls) > 1:
            raise OSError(28, "No space left on device")
        Path(given[0]).rename(given[1])

    def work(groups: foldpar.FoldedGroups) -> None:
        model = tiny_model("qwen3_moe")
        fold_model(model, groups)
        if broken == "save_pretrained":
            model.config.save_pretrained = full
        with pytest.raises(CheckpointError, match=r"writing in .*No space left on device.*free space and save again"):
            export(model, tmp_path, groups, max_shard_bytes=20_000)

    with monkeypatch.context() as patch:
        if broken != "save_pretrained":
            patch.setattr(weight_files if broken == "begin_file" else os, broken, full)
        on_ranks(TP2_EP4, work)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "config.json"}
    assert broken == "replace" or (tmp_path / "config.json").read_text() == "{}"


def test_a_parameter_without_an_owner_is_found_before_writing(tmp_path: Path) -> None:
    """A tensor marked as cut over tp, of which the second lane says that it has the first half too."""

    class Half(nn.Module):
        def __init__(self, groups: foldpar.FoldedGroups) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3))
            self.groups = groups

        def parameter_shares(self) -> dict[str, Any]:
            from foldpar.parameters.boxes import Share

            return {"weight": Share.whole((6, 3)).cut(0, 3, self.groups.tp.index)}

    def work(groups: foldpar.FoldedGroups) -> None:
        model = foldpar.mark_parameters(Half(groups), foldpar.families.DENSE_SHARDED)
        with pytest.raises(CheckpointError, match=r"Of the 18 elements of weight, the ranks hold 12.*Nothing"):
            export(model, tmp_path / "out", groups)

    on_ranks({"tp": 2}, work, world=2)
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_moves_more_than_boxes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foldpar.hf import names as hf_names

    saved(tmp_path, "qwen3_moe")
    monkeypatch.setattr(hf_names, "_OPERATIONS", {"MergeModulelist": hf_names._OPERATIONS["MergeModulelist"]})

    def work(groups: foldpar.FoldedGroups) -> None:
        model = meta_model("qwen3_moe")
        fold_model(model, groups)
        with pytest.raises(ModelError, match=r"by transformers' Concatenate\(dim=1\), which is not known here"):
            import_(model, tmp_path, groups)

    on_ranks({}, work, world=1)


# -- What the model's class keeps in float32, and adapters ------------------------------------------------------------


@pytest.mark.parametrize("on_meta", [True, False])
def test_a_balancing_bias_keeps_the_float32_that_its_class_demands(tmp_path: Path, on_meta: bool) -> None:
    """In bfloat16, 64 values near 7 become a handful, and tokens go to other experts."""
    original = tiny_model("deepseek_v3", dtype=torch.float32)
    name, bias = next(each for each in original.named_buffers() if "e_score_correction_bias" in each[0])
    bias.copy_(6.82 + 0.24 * torch.rand(bias.shape))
    original.save_pretrained(tmp_path / "hub")

    def work(groups: foldpar.FoldedGroups) -> None:
        model = meta_model("deepseek_v3") if on_meta else tiny_model("deepseek_v3", seed=3)
        model = model.to(torch.bfloat16)
        fold_model(model, groups)
        import_(model, tmp_path / "hub", groups)
        got = dict(model.named_buffers())[name]
        assert got.dtype is torch.float32 and torch.equal(got, bias)
        wide = {each.rpartition(".mlp.")[2] for each, kept in model.named_parameters() if kept.dtype != torch.bfloat16}
        assert wide <= {"gate.weight"}  # which the class of transformers 5.24 demands, too
        export(model, tmp_path / "out", groups)

    on_ranks(TP2_EP4, work)
    stored = type(original).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(dict(stored.named_buffers())[name], bias)


class Adapted(torch.nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer, self.merged_adapters = base_layer, []


class Wrapped(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model


def test_a_model_with_adapters_is_not_exported_under_names_that_nobody_knows(tmp_path: Path) -> None:
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        model = tiny_model("mixtral", dtype=torch.float32)
        fold_model(model, groups)
        with pytest.raises(CheckpointError, match=r"Wrapped wraps the model inner, .*: export\(model\.inner"):
            export(Wrapped(model), tmp_path / "out", groups)
        attention = model.model.layers[0].self_attn
        attention.q_proj = Adapted(attention.q_proj)
        for adapted in (model, Wrapped(model)):
            with pytest.raises(CheckpointError, match=r"self_attn\.q_proj has an adapter .*merge_and_unload\(\)"):
                export(adapted, tmp_path / "out", groups)
    assert not (tmp_path / "out").exists()
