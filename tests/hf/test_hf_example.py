"""``examples/finetune_hf.py`` is one run, whatever it runs on: the same losses in one process and on ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_hf.py"


def run(folder: Path, *arguments: str, ranks: int = 1) -> dict[str, Any]:
    """What the example's last line says."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--steps", "4", "--device", "cpu", "--dtype", "float64", "--length", "32", "--json", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(EXAMPLE), *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def refusal(folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    return done.stderr.splitlines()[-1]


@pytest.mark.long
def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "--save there exists already, and nothing is written over" in refusal(tmp_path, "--save", "there")
    text = refusal(tmp_path, "--tp", "2")
    assert "tp" in text and "global-batch" not in text
    assert "This is one process; start several: torchrun --nproc-per-node N" in text


@pytest.mark.long
def test_people_get_a_summary(tmp_path: Path) -> None:
    options = ["--steps", "2", "--device", "cpu", "--length", "32", "--save", "saved"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("foldpar on world=1 tp=1") and "held-out loss" in lines[1] and "tokens/s" in lines[2]
    assert lines[3:] == [
        f"the loss curve is {tmp_path / 'finetune_hf.png'}",
        f"the trained model is {tmp_path / 'saved'}",
    ]


@pytest.mark.long
def test_one_process_and_four_ranks_agree(tmp_path: Path) -> None:
    alone = run(tmp_path)
    assert alone["loss_after"] < alone["loss_before"] - 0.2
    assert alone["tokens_per_second"] > 0 and alone["peak_memory_bytes"] > 0
    assert (tmp_path / "finetune_hf.png").read_bytes().startswith(b"\x89PNG")
    for arguments in (
        ("--tp", "2", "--ep", "4"),
        ("--tp", "2", "--ep", "2", "--etp", "2", "--shard-stage", "3", "--save", "saved"),
    ):
        folded = run(tmp_path, *arguments, "--plot", "", ranks=4)
        for name in ("losses", "loss_before", "loss_after"):
            assert folded[name] == pytest.approx(alone[name], abs=1e-6), (arguments, name)
    # What was saved is where the run ended: its own tokenizer, and no worse a start than what was trained.
    again = run(tmp_path, "--model", "saved", "--rate", "0", "--plot", "")
    assert again["loss_before"] == pytest.approx(alone["loss_after"], abs=1e-6)
