"""What the checks of a checkpoint cost: digests of copies at a save, sums at a load; medians of one rank.

OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [folder] [layers] [cpu|cuda]
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import foldpar
from foldpar.checks import digest_of_bits


def seconds(work: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    layers, device = int(sys.argv[2]) if len(sys.argv) > 2 else 16, sys.argv[3] if len(sys.argv) > 3 else "cpu"
    groups = foldpar.create_groups(foldpar.solve_layout(1))
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(layers)]).to(device)
    optimizer = torch.optim.AdamW(foldpar.mark_parameters(model, foldpar.families.REPLICATED).parameters())
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    foldpar.declare_reduced(model)
    optimizer.step()
    path = folder / "c"

    def save() -> None:
        shutil.rmtree(path, ignore_errors=True)
        foldpar.save_checkpoint(path, model, optimizer, groups)

    tensors = [each.detach() for each in model.parameters()]
    tensors += [state for each in optimizer.state.values() for state in each.values()]
    took = {
        "save": seconds(save),
        "digests of all tensors": seconds(lambda: torch.stack([digest_of_bits(each).cpu() for each in tensors])),
        "load, not verified": seconds(lambda: foldpar.load_checkpoint(path, model, optimizer, groups, verify=False)),
        "load, verified": seconds(lambda: foldpar.load_checkpoint(path, model, optimizer, groups, verify=True)),
        "SHA-256 alone": seconds(lambda: [hashlib.sha256(file.read_bytes()) for file in path.iterdir()]),
    }
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{size / 1e9:.2f} GB on {device}, torch {torch.__version__}")
    for what, each in took.items():
        print(f"{what:24} {each:7.3f} s  {size / each / 1e9:6.2f} GB/s")


if __name__ == "__main__":
    main()
