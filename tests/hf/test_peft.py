"""LoRA of peft on folded models: raw gradients and norms are those of one process, wherever adapters sit."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from boxes import cut
from pages import DOCS, blocks
from peft_cases import (
    DENSE,
    EXPERTS,
    SHARED,
    Case,
    adapted,
    adapters,
    base,
    batch,
    differences,
    folded,
    loss_of,
    one_process,
    whole,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import foldpar
import foldpar.hf
import foldpar.models.adapted
import foldpar.parameters
from foldpar.testing import run_ranks

peft = pytest.importorskip("peft", reason="adapters are tested with peft, which is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers for an old name
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
]


def check(case: Case) -> None:
    values, want = one_process(case)
    for found in run_ranks(differences, case.world, case, values, want, backend="threads"):
        worst = max(found, key=found.__getitem__)
        assert found[worst] < 1e-10, f"{case}: {worst} is off by {found[worst]:.1e}"


FEW = {"modules": ("q_proj", "o_proj"), "parameters": tuple(EXPERTS)}
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize(
    "case",
    [
        Case(etp=2, options={"use_rslora": True}),
        Case(first="peft", ep=2, stage=3),
        pytest.param(Case(), marks=pytest.mark.long),
        pytest.param(Case(first="peft", ep=4), marks=pytest.mark.long),
        pytest.param(Case(etp=2, first="peft"), marks=pytest.mark.long),
        pytest.param(Case(tp=1, ep=4), marks=pytest.mark.long),
        pytest.param(Case(ep=1, stage=2), marks=pytest.mark.long),
        pytest.param(Case(ep=2, stage=3), marks=pytest.mark.long),
        pytest.param(Case(tp=1, ep=2, stage=3, first="peft"), marks=pytest.mark.long),
        pytest.param(Case(tp=1, ep=2, etp=2, stage=3), marks=pytest.mark.long),
        pytest.param(Case(tp=1, ep=2, options={"use_dora": True}, parameters=()), marks=pytest.mark.long),
        pytest.param(Case("deepseek_v3", modules=LATENT, parameters=tuple(EXPERTS)), marks=pytest.mark.long),
        pytest.param(Case("gpt_oss", etp=2, **FEW), marks=pytest.mark.long),
        pytest.param(Case("gpt_oss", tp=4, first="peft", **FEW), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_gradients_are_those_of_one_process(case: Case) -> None:
    check(case)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldpar.models.adapted, "REPLICATED_PARTIAL", foldpar.families.REPLICATED)
    with pytest.raises(AssertionError, match=r"experts.*is off by"):
        check(Case(parameters=tuple(EXPERTS), modules=("q_proj",)))


# -- What is frozen costs nothing -------------------------------------------------------------------------------------


class Sums(TorchDispatchMode):
    """Bytes that are summed over ranks inside; what is gathered or exchanged is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "reduce" in func.__name__:
            tensors = (each for each in tree_leaves(args) if isinstance(each, Tensor))
            self.sent += max(each.numel() * each.element_size() for each in tensors)
        return func(*args, **(kwargs or {}))


def costs(case: Case, values: dict[str, Tensor], frozen: bool) -> dict[str, int]:
    """On one rank, after a step: bytes that were summed, and numbers of what is kept."""
    with foldpar.create_groups(case.layout) as groups:
        model = folded(case, groups, values)
        if not frozen:
            model.requires_grad_()
        optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=1e-3)
        loss = loss_of(model, groups.dp.index)
        with Sums() as sums:
            loss.backward()
            foldpar.reduce_gradients(model, groups)
        optimizer.step()
        own = {name: local(each).numel() for name, each in model.named_parameters()}
        return {
            "summed": sums.sent,
            "adapters": 8 * sum(size for name, size in own.items() if "lora_" in name),
            "all": 8 * sum(own.values()),
            "gradients": 8 * sum(local(each.grad).numel() for each in model.parameters() if each.grad is not None),
            "states": 8 * sum(each["exp_avg"].numel() for each in map(locals_of, optimizer.state.values())),
        }


def locals_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(each) for name, each in state.items()}


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_frozen_has_no_gradients_no_states_and_no_traffic(stage: int) -> None:
    case = Case(world=2, tp=1, ep=2, stage=stage)
    values, _ = one_process(case)
    adapters_alone, everything = (run_ranks(costs, 2, case, values, frozen) for frozen in (True, False))
    for found, all_trained in zip(adapters_alone, everything, strict=True):
        assert found["gradients"] == found["states"] == found["adapters"] < found["all"]
        assert all_trained["gradients"] == all_trained["states"] == all_trained["all"] == found["all"]
        whole = found["adapters"] * (2 if stage else 1)  # a reduce-scatter is given whole gradients
        assert 0.9 * whole < found["summed"] < 1.1 * whole < all_trained["summed"] / 1.5


# -- Into the weights, and into files ---------------------------------------------------------------------------------

MERGED = Case(etp=2, modules=(*DENSE[:4], *SHARED))


def merged_and_written(case: Case, values: dict[str, Tensor], loss: Tensor, folder: str) -> None:
    with foldpar.create_groups(case.layout) as groups:
        model = folded(case, groups, values)
        foldpar.parameter_families(model, groups)
        before = {name: local(each).clone() for name, each in model.named_parameters()}
        model.merge_adapter(safe_merge=True)
        changed = {name for name, each in model.named_parameters() if not torch.equal(local(each), before[name])}
        nothing_here = {name for name, each in before.items() if "base_layer" in name and not each.numel()}
        assert len(changed | nothing_here) == len(values) / 2
        model.unmerge_adapter()
        for name, each in model.named_parameters():
            torch.testing.assert_close(local(each), before[name], rtol=0, atol=1e-12)
        foldpar.save_checkpoint(f"{folder}/checkpoint", model, None, groups)
        state = torch_state(model)
        if groups.rank == 0:
            model.save_pretrained(f"{folder}/adapter", state_dict=state)
        left = model.merge_and_unload()
        foldpar.hf.export(left, f"{folder}/merged", groups)
        torch.testing.assert_close(loss_of(left, 0).detach(), loss, rtol=0, atol=1e-6)  # norms are in float32


def torch_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(each) for name, each in model.state_dict().items() if "lora_" in name}


def local(tensor: Tensor) -> Tensor:
    return foldpar.comm.local_tensor(tensor).detach()


@pytest.mark.parametrize(
    "case",
    [
        MERGED,
        pytest.param(replace(MERGED, etp=1, first="peft", stage=3), marks=pytest.mark.long),
        pytest.param(replace(MERGED, tp=1, etp=1, stage=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_merged_and_written_adapters_are_those_of_one_process(case: Case, tmp_path: Path) -> None:
    values, _ = one_process(case)
    one = adapted(copy.deepcopy(base(case.family)), case)
    one.load_state_dict(values, strict=False)
    loss = loss_of(one, 0).detach()
    run_ranks(merged_and_written, case.world, case, values, loss, str(tmp_path), backend="threads")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base(case.family)), str(tmp_path / "adapter"))
    for name, each in adapters(again).items():
        torch.testing.assert_close(each, values[name], rtol=0, atol=0)
    other = replace(MERGED, world=2, tp=1, ep=2, etp=1, first="peft")
    run_ranks(check_loaded, 2, other, values, str(tmp_path / "checkpoint"), backend="threads")
    merged = type(base(case.family)).from_pretrained(tmp_path / "merged", dtype=torch.float64).state_dict()
    for name, want in one.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], want, rtol=0, atol=1e-12)


def check_loaded(case: Case, values: dict[str, Tensor], checkpoint: str) -> None:
    with foldpar.create_groups(case.layout) as groups:
        model = folded(case, groups, {name: torch.zeros_like(each) for name, each in values.items()})
        foldpar.load_checkpoint(checkpoint, model, None, groups)
        for placement in foldpar.parameters.parameter_placements(model, groups):
            if placement.name in values:
                want = cut(values[placement.name], placement.share)
                torch.testing.assert_close(placement.local(placement.parameter.detach()), want, rtol=0, atol=0)


# -- Refused ----------------------------------------------------------------------------------------------------------


def refused(adapt: str, *, tp: int = 2, ep: int = 2) -> str:
    """The error of the first forward, which is the same on all ranks."""

    def rank() -> str:
        with foldpar.create_groups(foldpar.solve_layout(2, tp=tp, ep=ep)) as groups:
            model = copy.deepcopy(base("qwen2_moe"))
            foldpar.fold_model(model, groups)
            model = ADAPT[adapt](model)
            with pytest.raises(foldpar.FoldingError) as error:
                loss_of(model, 0)
            return str(error.value)

    texts = run_ranks(rank, 2, backend="threads")
    assert texts[0] == texts[1]
    return texts[0]


def with_config(config: Any) -> Any:
    return lambda model: peft.get_peft_model(model, config)


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight


def parametrized(place: str) -> Any:
    def put(model: nn.Module) -> nn.Module:
        owner, _, name = place.rpartition(".")
        torch.nn.utils.parametrize.register_parametrization(model.get_submodule(owner), name, Scaled())
        return model

    return put


ADAPT = {
    "dora": with_config(peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)),
    "lora": with_config(peft.LoraConfig(r=2, target_modules=["q_proj"])),
    "of the router": with_config(peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])),
    "ia3": with_config(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "parameter": with_config(peft.LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"])),
    "of experts": parametrized("model.layers.0.mlp.experts.down_proj"),
    "of a projection": parametrized("model.layers.0.self_attn.q_proj.weight"),
    "new module": lambda model: (model.register_module("extra", nn.Linear(2, 2)), model)[1],
}


@pytest.mark.parametrize(
    ("adapt", "text"),
    [
        ("ia3", r"q_proj is a peft\..*around a layer of which every lane has a part \(tp = 2\).*LoRA and rsLoRA"),
        ("parameter", "as a parameter .*Name linear layers in target_modules instead"),
        ("of experts", "scale is inside the experts .* and none of their own parameters"),
        ("of a projection", "1 parameter has no family: .*q_proj.parametrizations.weight.0.scale"),
        ("new module", "2 parameters have no family: extra.weight"),
    ],
)
def test_what_could_be_wrong_is_refused_before_the_first_forward(adapt: str, text: str) -> None:
    assert re.search(text, refused(adapt), re.DOTALL)


def late(stage: int, adapt: str) -> str:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        model = copy.deepcopy(base("qwen2_moe"))
        foldpar.fold_model(model, groups)
        foldpar.shard_model(model, groups, stage=stage)
        with pytest.raises(foldpar.ModelError) as error:
            loss_of(ADAPT[adapt](model), groups.dp.index)
        return str(error.value)


@pytest.mark.parametrize(("stage", "adapt"), [(2, "lora"), (3, "of the router")])
def test_adapters_that_come_after_sharding_are_refused(stage: int, adapt: str) -> None:
    texts = run_ranks(late, 2, stage, adapt, backend="threads")
    assert texts[0] == texts[1]
    assert re.search(rf"came after shard_model, .* Adapt first, then shard: .*stage={stage}\)", texts[0])


def test_dora_is_refused_beside_cut_layers_and_told_apart_elsewhere() -> None:
    """Before folding by foldpar; after it by peft, which takes the norm of a weight that is a DTensor."""

    def rank(tp: int, first: str) -> str:
        with foldpar.create_groups(foldpar.solve_layout(2, tp=tp, ep=2)) as groups:
            model = copy.deepcopy(base("qwen2_moe"))
            try:
                model = model if first == "fold" else ADAPT["dora"](model)
                foldpar.fold_model(model, groups)
                model = ADAPT["dora"](model) if first == "fold" else model
                loss_of(model, 0)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return "trains"

    before, after = (run_ranks(rank, 2, 2, first, backend="threads") for first in ("peft", "fold"))
    assert all(
        re.search(r"ModelError: .*q_proj has the adapter 'default', a variant .*use_dora=False", x) for x in before
    )
    assert before == [before[0]] * 2
    assert all("DTensor" in text or text == before[0] for text in after)
    assert run_ranks(rank, 2, 1, "fold", backend="threads") == ["trains"] * 2


def test_the_program_of_the_migration_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [program] = [block.text for block in blocks("python", DOCS["migration"], "PEFT")]
    monkeypatch.chdir(tmp_path)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        known = {"torch": torch, "groups": groups, "batch": {"input_ids": batch(0), "labels": batch(0)}}
        program = program.replace('AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")', "base")
        exec(compile(program, "migration.md", "exec"), known | {"base": copy.deepcopy(base("qwen3_moe"))})
    model = type(base("qwen3_moe")).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base("qwen3_moe")), str(tmp_path / "adapter"))
    want = again.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-12)
