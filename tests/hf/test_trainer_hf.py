"""``Trainer`` of transformers with foldpar's exchange inside: the run that it is with transformers' own all-to-all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import tiny_model
from pages import DOCS, blocks
from transformers import PreTrainedTokenizerFast

import foldpar
from foldpar.testing import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer_hf.py"
IMPLEMENTATIONS = ("foldpar", "all_to_all")


def both(folder: str, **options: Any) -> list[dict[str, Any]]:
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from trainer_hf import start_folder, trained

    found = []
    for implementation in IMPLEMENTATIONS:
        given = Namespace(**options, implementation=implementation)
        found.append(trained(given, start_folder(given, folder), f"{folder}/{implementation}"))
        for state in (AcceleratorState, GradientState, PartialState):  # the pool's ranks live on, in other worlds
            state._shared_state.clear()
    return found


def on_a_rank(folder: str) -> list[dict[str, Any]]:
    return both(
        folder, preset="tiny", tp=1, ep=2, steps=2, batch=1, accumulate=2, length=32,
        clip=0.5, checkpointing=False, bfloat16=False, messages=False,
    )  # fmt: skip


def of_the_page(folder: str) -> tuple[int, float]:
    """The program of the migration page, with what it does not say."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 32, (8, 6), generator=draw)]
    given: dict[str, Any] = {"folder": folder, "output": f"{folder}/output", "data": data}
    exec(blocks("python", DOCS["migration"], "Trainer and TRL")[0].text, given)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    return given["trainer"].state.global_step, given["trainer"].state.log_history[-1]["train_loss"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_program_of_the_page(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", dtype=torch.float32).save_pretrained(tmp_path)
    ((steps, loss), other) = run_ranks(of_the_page, 2, str(tmp_path), timeout=200)
    assert steps == 2 and math.isfinite(loss) and other == (steps, loss)


def with_accelerate() -> float:
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 32, (8, 6), generator=draw)]
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        given: dict[str, Any] = {"model": tiny_model("qwen3_moe"), "groups": groups, "data": data}
        exec(blocks("python", DOCS["migration"], "accelerate")[0].text, given)
        return float(given["model"](**given["batch"]).loss.detach())


def test_the_loop_of_the_page_without_accelerate() -> None:
    assert all(math.isfinite(loss) for loss in run_ranks(with_accelerate, 2, backend="threads"))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_losses_are_those_of_all_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    for found, theirs in run_ranks(on_a_rank, 2, str(tmp_path), timeout=200):
        check(found, theirs, 2)


def with_trl(folder: str) -> list[tuple[list[float], list[float]]]:
    """The second program of the page, with each implementation: losses and norms."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from datasets import Dataset
    from finetune_hf import library_text, train_tokenizer
    from trainer_hf import load, start_folder

    rank, text = os.environ["RANK"], library_text(60_000)
    halves = [{"prompt": text[at : at + 150], "completion": text[at + 150 : at + 250]} for at in range(0, 19_200, 300)]
    lines = Path(folder) / f"{rank}.jsonl"
    lines.write_text("\n".join(map(json.dumps, halves)))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(text, 500), eos_token="<eos>", pad_token="<pad>"
    )
    found = []
    for implementation in IMPLEMENTATIONS:
        options = Namespace(preset="tiny", tp=1, ep=2, implementation=implementation, bfloat16=False, messages=False)
        given: dict[str, Any] = {
            "output": f"{folder}/{implementation}",
            "model": load(start_folder(options, folder), options),
            "data": Dataset.from_json(str(lines), cache_dir=f"{folder}/cache-{rank}"),
            "tokenizer": tokenizer,
        }
        program = blocks("python", DOCS["migration"], "Trainer and TRL")[1].text
        more = (
            "max_grad_norm=0.5, use_cpu=True, bf16=False, logging_steps=1, gradient_accumulation_steps=2, max_length=96"
        )
        exec(program.replace("max_steps=2", f"max_steps=2, {more}"), given)
        logged = [each for each in given["trainer"].state.log_history if "grad_norm" in each]
        found.append(([float(each["loss"]) for each in logged], [float(each["grad_norm"]) for each in logged]))
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
    return found


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_as_with_all_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="SFTTrainer is tested with trl, which is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    for (losses, norms), theirs in run_ranks(with_trl, 4, str(tmp_path), timeout=300):
        assert len(losses) == 2 and min(norms) > 0.5  # so that clipping changes every step
        assert (losses, norms) == (pytest.approx(theirs[0], rel=1e-4), pytest.approx(theirs[1], rel=1e-4))


def check(found: dict[str, Any], theirs: dict[str, Any], steps: int) -> None:
    for what in ("losses", "norms"):
        assert len(found[what]) == len(theirs[what]) == steps
        assert found[what] == pytest.approx(theirs[what], rel=1e-4), what


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the example's last line says, on 4 ranks: two that share experts, and as many replicas of each (efsdp)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*launcher, str(EXAMPLE), "--ep", "2", "--clip", "0.5", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_four_ranks_under_torchrun(tmp_path: Path) -> None:
    found, theirs = (run(tmp_path, "--implementation", each, "--steps", "6") for each in IMPLEMENTATIONS)
    check(found, theirs, 6)
    assert found["losses"][-1] < found["losses"][0]
    assert min(found["norms"]) > 0.5  # so that clipping changes every step


@pytest.mark.long
@pytest.mark.timeout(900)
def test_recomputed_activations(tmp_path: Path) -> None:
    found, theirs = (run(tmp_path, "--steps", "2", *options) for options in ([], ["--checkpointing"]))
    check(found, theirs, 2)
