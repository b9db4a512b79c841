"""Every method of peft on a folded model: the gradients of one process, or a refusal; before folding and after it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from draws import seeded
from peft_cases import base, gradient_differences, loss_of, peft
from torch import Tensor, nn

import foldpar
from foldpar.testing import run_ranks
from foldpar.testing.outcomes import RanksFailed

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers for an old name
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # what one had better choose
]

FAMILY = "qwen2_moe"
LANES, NO_LANES = foldpar.solve_layout(4, tp=2, ep=2), foldpar.solve_layout(4, ep=2, etp=2)


def lora(*modules: str, **options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(r=2, target_modules=list(modules), **options)


def method(name: str, *modules: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, f"{name}Config")(target_modules=list(modules or ("q_proj", "o_proj")), **options)


@dataclass(frozen=True)
class Method:
    """What peft puts on a model, and what becomes of it."""

    make: Callable[[], Any]
    with_lanes: str = ""
    """What is said where ``tp`` cuts what is adapted; nothing where it is exact."""
    before: str = ""
    """What is said where it is put on before folding; nothing where it is exact."""


CUT, COPY, NO_FAMILY = "of which every lane has a part", "modules_to_save", "no family"

METHODS = {
    "all linear layers": Method(lambda: peft.LoraConfig(r=2, target_modules="all-linear")),
    "all biases": Method(lora("q_proj", "k_proj", bias="all")),
    "biases of adapted layers": Method(lora("q_proj", "k_proj", bias="lora_only")),
    "ranks by pattern": Method(lora("q_proj", "o_proj", rank_pattern={"o_proj": 4}, alpha_pattern={"q_proj": 3})),
    "some layers": Method(lora("q_proj", layers_to_transform=[0])),
    "orthogonal": Method(lora("q_proj", "o_proj", init_lora_weights="orthogonal")),
    "rank-stabilised, with a bias": Method(lora("q_proj", "o_proj", use_rslora=True, lora_bias=True)),
    "experts alone": Method(lora(target_parameters=["experts.down_proj"])),
    "experts, rank-stabilised": Method(lora(target_parameters=["experts.gate_up_proj"], use_rslora=True)),
    "norms": Method(method("LNTuning", "input_layernorm", "norm")),
    "a head as a copy": Method(lora("q_proj", modules_to_save=["lm_head"]), before=COPY),
    "embeddings as copies": Method(lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]), before=COPY),
    "routers as copies": Method(lora("q_proj", modules_to_save=["gate"]), before=COPY),
    "experts as copies": Method(lora("q_proj", modules_to_save=["experts"]), before=COPY),
    "blocks as copies": Method(lora("q_proj", modules_to_save=["mlp"]), before=COPY),
    "a projection as a copy": Method(lora("gate_proj", modules_to_save=["o_proj"]), before=COPY),
    "(IA)3": Method(method("IA3", "k_proj", "down_proj", feedforward_modules=["down_proj"]), CUT),
    "AdaLoRA": Method(method("AdaLora", init_r=4, target_r=2, total_step=100), CUT),
    "LoHa": Method(method("LoHa", r=2), CUT),
    "LoKr": Method(method("LoKr", r=2), CUT),
    "OFT": Method(method("OFT", oft_block_size=4, r=0), CUT),
    "BOFT": Method(method("BOFT", boft_block_size=4), CUT),
    "VeRA": Method(method("Vera", "q_proj", r=4), CUT),
    "FourierFT": Method(method("FourierFT", n_frequency=8), CUT),
    "HRA": Method(method("HRA", r=2), CUT),
    "RandLoRA": Method(method("RandLora", "q_proj", r=2), CUT),
    "SHiRA": Method(method("Shira", r=2), CUT),
    "MiSS": Method(method("Miss", r=2), CUT),
    "C3A": Method(method("C3A", block_size=4), CUT),
    "VB-LoRA": Method(method("VBLoRA", r=2, num_vectors=8, vector_length=4, topk=2), CUT),
    "prompt tuning": Method(
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), NO_FAMILY
    ),
    "P-tuning": Method(
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8), NO_FAMILY
    ),
    # Every lane has some of the heads, and the prefix all of them; part of an embedding has no rows by number.
    "prefix tuning": Method(
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "Sizes of tensors must match"
    ),
    "some tokens": Method(
        lambda: peft.TrainableTokensConfig(token_indices=[1, 2, 3], target_modules=["embed_tokens"]),
        f"{CUT}|mixed torch.Tensor and DTensor",
    ),
}  # fmt: skip
SHORT = ("all biases", "a head as a copy", "LoKr", "prompt tuning")


def adapted(model: nn.Module, method: Method) -> nn.Module:
    with seeded(5):  # some methods draw what is not trained
        found: nn.Module = peft.get_peft_model(model, method.make())
    return found


def drawn(model: nn.Module) -> dict[str, Tensor]:
    """Values by the names of parameters: what starts at zero would hide mistakes."""
    found = {}
    for name, each in model.named_parameters():
        if each.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            found[name] = torch.randn(each.shape, generator=generator, dtype=each.dtype) / 4 + 1
    return found


def difference(method: Method, layout: foldpar.FoldedLayout, first: str) -> dict[str, float]:
    """Of each trained parameter's gradient from that of one process, the largest of all ranks."""
    whole = adapted(copy.deepcopy(base(FAMILY)), method)
    values = drawn(whole)
    whole.load_state_dict(values, strict=False)
    for data_rank in range(layout.dp):
        (loss_of(whole, data_rank) / layout.dp).backward()
    gradients = {name: each.grad for name, each in whole.named_parameters()}
    wanted = {name: each for name, each in gradients.items() if each is not None and each.any()}
    assert wanted

    def rank() -> dict[str, float]:
        with foldpar.create_groups(layout) as groups:
            model = copy.deepcopy(base(FAMILY))
            if first == "peft":
                model = adapted(model, method)
            foldpar.fold_model(model, groups)
            if first == "fold":
                model = adapted(model, method)
            model.load_state_dict(values, strict=False)
            loss_of(model, groups.dp.index).backward()
            foldpar.reduce_gradients(model, groups)
            trained = {name for name, each in model.named_parameters() if each.requires_grad}
            assert trained == values.keys()
            found = gradient_differences(model, groups, wanted)
            assert found.keys() == wanted.keys()
            return found

    ranks = run_ranks(rank, layout.world, backend="threads")
    return {name: max(found[name] for found in ranks) for name in ranks[0]}


def cases() -> list[Any]:
    found = []
    for name in METHODS:
        for first in ("fold", "peft"):
            for layout in (LANES, NO_LANES):
                marks = [] if name in SHORT and first == "fold" else [pytest.mark.long]
                found.append(pytest.param(name, first, layout, marks=marks, id=f"{name}-tp{layout.tp}-{first} first"))
    return found


@pytest.mark.parametrize(("name", "first", "layout"), cases())
def test_a_method_of_peft_is_exact_or_refused(name: str, first: str, layout: foldpar.FoldedLayout) -> None:
    method = METHODS[name]
    said = (method.before if first == "peft" else "") or (method.with_lanes if layout.tp > 1 else "")
    if said:
        with pytest.raises(RanksFailed, match=said):
            difference(method, layout, first)
        return
    found = difference(method, layout, first)
    assert found and max(found.values()) < 1e-9, max(found, key=found.__getitem__)
