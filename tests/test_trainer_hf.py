"""``Trainer`` of transformers with foldpar's exchange inside: the run that it is with transformers' own all-to-all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from foldpar.testing import run_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "trainer_hf.py"
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
        folder, preset="tiny", tp=1, ep=2, steps=2, stop=0, resume=False, batch=1, accumulate=2, length=32,
        clip=0.5, checkpointing=False, bfloat16=False,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_losses_are_those_of_all_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    for found, theirs in run_ranks(on_a_rank, 2, str(tmp_path), timeout=200):
        check(found, theirs, 2)


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
def test_four_ranks_under_torchrun_and_resumed(tmp_path: Path) -> None:
    found, theirs = (run(tmp_path, "--implementation", each, "--steps", "6") for each in IMPLEMENTATIONS)
    check(found, theirs, 6)
    assert found["losses"][-1] < found["losses"][0]
    assert min(found["norms"]) > 0.5  # so that clipping changes every step
    began = run(tmp_path, "--steps", "6", "--stop", "3", "--output", "kept")
    assert began["losses"] == pytest.approx(found["losses"][:3], rel=1e-5)
    resumed = run(tmp_path, "--steps", "6", "--resume", "--output", "kept")
    check(resumed, found, 6)


@pytest.mark.long
def test_recomputed_activations(tmp_path: Path) -> None:
    found, theirs = (run(tmp_path, "--steps", "2", *options) for options in ([], ["--checkpointing"]))
    check(found, theirs, 2)
