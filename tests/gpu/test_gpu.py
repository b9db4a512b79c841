"""What needs GPUs: the same parity suite over NCCL, and the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "script", [["tests/gpu/run.py", "parity"], ["examples/train_folded_lm.py", "--device", "cuda"]], ids=str
)
def test_on_gpus(script: list[str], world: int) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices, and this machine has {GPUS}")
    folds = ["--tp", "2", "--ep", str(world)] if "train" in script[0] else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    subprocess.run([*command, *script, *folds], cwd=ROOT, check=True, timeout=500)


@pytest.mark.gpu
def test_the_watchdog_ends_a_process_that_waits_for_a_rank_that_never_comes() -> None:
    if GPUS < 2:
        pytest.skip(f"needs 2 CUDA devices, and this machine has {GPUS}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "tests/gpu/gpu_stuck.py"], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode != 0
    assert "both ranks came to the first one" in done.stdout
    # The watchdog aborts the communicator first, so code after the collective may still run for a moment.
    assert "Watchdog caught collective operation timeout" in done.stderr


@pytest.mark.gpu
def test_a_device_ends_a_process_that_waits_for_rows_that_never_come() -> None:
    if GPUS < 1:
        pytest.skip("needs a CUDA device")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "tests/gpu/gpu_stuck.py", "one-sided"],
        cwd=ROOT, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "both ranks came to the forward" in done.stdout
    assert "CUDASymmetricMemory::barrier" in done.stdout + done.stderr
