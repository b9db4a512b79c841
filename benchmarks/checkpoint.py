"""What the checks of a checkpoint cost: digests of copies at a save, sums at a load; medians of one rank.

Seconds of the process's cores, and of the clock. The last load has its sums made in a thread beside it, which only
shows what overlapping them could save: what it finds comes too late, when tensors are loaded.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import foldpar
from foldpar.checkpoint.files import read_manifest, wrong_sums
from foldpar.comm import digest_of_bits


def seconds(work: Callable[[], object], times: int = 3) -> tuple[float, float]:
    """Of the process's cores, and of the clock."""
    found = []
    for _ in range(times):
        start = time.process_time(), time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        found.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cores, clock = zip(*found, strict=True)
    return statistics.median(cores), statistics.median(clock)


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

    def load_with_sums_beside() -> None:
        manifest = read_manifest(path)
        with ThreadPoolExecutor(1) as pool:
            wrong = pool.submit(wrong_sums, path, manifest, list(manifest.files))
            foldpar.load_checkpoint(path, model, optimizer, groups, verify=False)
            assert not wrong.result()

    tensors = [each.detach() for each in model.parameters()]
    tensors += [state for each in optimizer.state.values() for state in each.values()]
    took = {
        "save": seconds(save),
        "digests of all tensors": seconds(lambda: torch.stack([digest_of_bits(each).cpu() for each in tensors])),
        "load, not verified": seconds(lambda: foldpar.load_checkpoint(path, model, optimizer, groups, verify=False)),
        "load, verified": seconds(lambda: foldpar.load_checkpoint(path, model, optimizer, groups, verify=True)),
        "load, sums beside": seconds(load_with_sums_beside),
        "SHA-256 alone": seconds(lambda: [hashlib.sha256(file.read_bytes()) for file in path.iterdir()]),
    }
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{size / 1e9:.2f} GB on {device}, torch {torch.__version__}")
    for what, (cores, clock) in took.items():
        print(f"{what:24} {cores:7.3f} s of cores {clock:7.3f} s  {size / clock / 1e9:6.2f} GB/s")


if __name__ == "__main__":
    main()
