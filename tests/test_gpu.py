"""What needs GPUs: the same parity suite over NCCL, and the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ROOT = Path(__file__).parent.parent


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "script", [["tests/gpu_parity.py"], ["examples/train_folded_lm.py", "--device", "cuda"]], ids=str
)
def test_on_gpus(script: list[str], world: int) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices, and this machine has {GPUS}")
    folds = ["--tp", "2", "--ep", str(world)] if "train" in script[0] else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    subprocess.run([*command, *script, *folds], cwd=ROOT, check=True, timeout=500)
