"""foldpar inside transformers' own parallelism: the same values and gradients as its all-to-all and as one process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fold_parity import batch_of, float64_stays
from hf_models import tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import name_of
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from foldpar import OneSided
from foldpar.comm import FoldedGroups
from foldpar.errors import ArgumentError, GroupsError, ModelError
from foldpar.hf import register_with_transformers
from foldpar.testing import live_groups, run_ranks


@dataclass(frozen=True)
class Case:
    """One family, spread by transformers."""

    family: str
    tp: int = 1
    fsdp: int = 1
    ep: int = 2
    dtype: torch.dtype = torch.float64
    experts: str | None = None
    checkpointing: bool | None = None

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.family}-tp{self.tp}-fsdp{self.fsdp}-ep{self.ep}-{kind}-{self.experts}-{self.checkpointing}"

    @property
    def world(self) -> int:
        return self.tp * self.fsdp

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.dtype == torch.float64 else 1e-5


def load(folder: str, case: Case, implementation: str | None) -> Any:
    """Spread over the ranks, or whole without an implementation."""
    register_with_transformers()
    options: dict[str, Any] = {}
    if implementation is not None:
        options["distributed_config"] = DistributedConfig(
            tp_size=case.tp, fsdp_size=case.fsdp, ep_size=case.ep, ep_implementation=implementation
        )
    # transformers' grouped products take no float64.
    experts = "eager" if implementation != "foldpar" and case.dtype == torch.float64 else case.experts
    if experts is not None:
        options["experts_implementation"] = experts
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=case.dtype, attn_implementation="eager", **options)
    if case.checkpointing is not None:
        new_name = getattr(model, "activation_checkpointing_enable", None)
        (new_name or model.gradient_checkpointing_enable)({"use_reentrant": case.checkpointing})
    return model.train()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def traced(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    gradients = {name: whole(each.grad).clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients}


def on_a_rank(folder: str, case: Case, implementations: tuple[str, ...]) -> list[dict[str, Tensor]]:
    tokens = batch_of(dist.get_rank() // case.tp, 0)
    with float64_stays():
        return [traced(load(folder, case, each), tokens) for each in implementations]


def in_one_process(folder: str, case: Case) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """What each data rank sees, and the mean of their gradients."""
    seen, total = [], {}
    with float64_stays():
        model = load(folder, case, None)
        for data_rank in range(case.fsdp):
            model.zero_grad()
            found = traced(model, batch_of(data_rank, 0))
            seen.append({name: found.pop(name) for name in ("loss", "logits")})
            for name, gradient in found.items():
                total[name] = total.get(name, 0) + gradient / case.fsdp
    return seen, total


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(case: Case, folder: Path) -> None:
    tiny_model(case.family, dtype=case.dtype).save_pretrained(folder)
    seen, wanted = in_one_process(str(folder), case)
    ranks = run_ranks(on_a_rank, case.world, str(folder), case, ("foldpar", "all_to_all"), timeout=120)
    for rank, (found, theirs) in enumerate(ranks):
        here = {**seen[rank // case.tp], **wanted}
        assert found.keys() == theirs.keys() == here.keys()
        for name in here:
            assert found[name].dtype == case.dtype, name
            assert far(found[name], here[name]) < case.tolerance, f"{name} of one process, rank {rank}"
            assert far(found[name], theirs[name]) < case.tolerance, f"{name} of all_to_all, rank {rank}"


def test_values_and_gradients(tmp_path: Path) -> None:
    check(Case("qwen3_moe", tp=2, ep=2), tmp_path)


FIVE = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    "case",
    [
        *(Case(family, **sizes) for family in FIVE for sizes in ({"tp": 2}, {"fsdp": 4}, {"tp": 2, "fsdp": 2})),
        # With efsdp = 1 FSDP2 divides gradients of float64 twice, whoever brings the rows.
        *(Case(family, tp=2, fsdp=2, ep=4, dtype=torch.float32) for family in FIVE),
        *(Case(family, fsdp=2, dtype=torch.float32) for family in FIVE),
        Case("qwen3_moe", tp=2, fsdp=2, checkpointing=True),
        Case("qwen3_moe", tp=2, fsdp=2, checkpointing=False),
        Case("gpt_oss", tp=2, fsdp=2, checkpointing=False),
        Case("gpt_oss", tp=2, fsdp=2, experts="eager"),
        Case("qwen3_moe", tp=2, fsdp=2, experts="foldpar"),
        Case("qwen3_moe", tp=2, fsdp=2, ep=4, experts="batched_mm", dtype=torch.float32),
    ],
    ids=name_of,
)
def test_the_matrix(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


# -- What surrounds it ------------------------------------------------------------------------------------------------


def surroundings(folder: str, saved: str) -> dict[str, Any]:
    before = set(live_groups())
    theirs = load(folder, PAIR, "all_to_all").eval()
    between = set(live_groups())
    model = load(folder, PAIR, "foldpar").eval()
    made, theirs_made = len(set(live_groups()) - between), len(between - before)
    prompt = batch_of(0, 0)
    found = {
        "groups": (made, theirs_made),
        "generated": [each.generate(prompt, max_new_tokens=4, do_sample=False).tolist() for each in (model, theirs)],
        "one token": [each(input_ids=prompt[:1, :1]).logits.detach() for each in (model, theirs)],
    }
    model.save_pretrained(saved)
    return found


def compiled(folder: str) -> list[dict[str, Tensor]]:
    prompt = batch_of(0, 0)
    return [
        traced(torch.compile(load(folder, PAIR, each), backend="eager"), prompt) for each in ("foldpar", "all_to_all")
    ]


PAIR = Case("qwen3_moe", tp=2, ep=2, experts="eager")


def test_what_surrounds_it(tmp_path: Path) -> None:
    """``generate``, fewer tokens than lanes, ``save_pretrained``; no process group is made."""
    folder, saved = str(tmp_path / "given"), str(tmp_path / "saved")
    tiny_model("qwen3_moe").save_pretrained(folder)
    for found in run_ranks(surroundings, 2, folder, saved, timeout=120):
        made, theirs = found["groups"]
        assert made <= theirs
        one, other = found["generated"]
        assert one == other
        assert far(*found["one token"]) < 1e-12
    wanted, got = (load_file(Path(place) / "model.safetensors") for place in (folder, saved))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiled(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    for one, other in run_ranks(compiled, 2, str(tmp_path), timeout=200):
        assert one.keys() == other.keys()
        assert all(far(one[name], other[name]) < 1e-10 for name in one)


def refused() -> list[str]:
    """Groups that are not those of a layout in consecutive order, and what is not there."""
    texts = []
    tp, ep = dist.new_group([0, 1]), dist.new_group([0, 1])
    groups = FoldedGroups.over(tp=tp, ep=ep)
    assert groups.ep.process_group is ep and groups.ep.ranks == (0, 1) and not groups.communicators
    for ask in (
        lambda: groups.dp_cp if groups.layout.dp > 1 else groups.mesh("expert"),
        groups.destroy,
        lambda: groups.ep,
    ):
        try:
            ask()
        except GroupsError as error:
            texts.append(str(error))
    return texts


def test_groups_over_groups_of_somebody_else() -> None:
    for texts in run_ranks(refused, 2, backend="threads"):
        assert len(texts) == 2
        assert "A DeviceMesh needs torch.distributed" in texts[0] and "were destroyed" in texts[1]


def test_room_for_a_part_of_the_rows_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"slack = 2.0, room for a part .* Leave slack away: there is room for all then"
    ):
        register_with_transformers(one_sided=OneSided(slack=2.0))
    register_with_transformers(one_sided=OneSided())
    register_with_transformers(one_sided=OneSided(8, slack=math.inf))
    register_with_transformers()


def test_transformers_without_expert_parallel_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldpar.hf.registration._expert_parallel_of_transformers", lambda: None)
    assert register_with_transformers("alone") == "alone"
    assert "alone" in ALL_EXPERTS_FUNCTIONS and "alone" not in EPImplementationInterface()
    with pytest.raises(ModelError, match=r"which transformers has since 5.23, and this is 5\."):
        register_with_transformers(one_sided=OneSided())
