"""``Trainer`` with foldpar's exchange of rows beside transformers' own, in turns, on the GPUs of this machine.

    PYTHONPATH=src python benchmarks/trainer_hf.py
    PYTHONPATH=src python benchmarks/trainer_hf.py --gpus 2 --tp 2 --ep 2 --turns 3

Each turn runs ``examples/trainer_hf.py`` once for every implementation, under ``torchrun``: bfloat16, the preset of a
billion parameters, FSDP2 over the data ranks, and over ``efsdp`` for experts. One row for each: medians of the tokens
per second, the peak memory of the rank that needed the most, the last loss. It ends with an error if losses differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "trainer_hf.py"

parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--gpus", type=int, default=2)
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--ep", type=int, default=2)
parser.add_argument("--preset", default="1b")
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--batch", type=int, default=8, help="sequences per micro-batch and data rank")
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--turns", type=int, default=2)
parser.add_argument("--implementations", nargs="+", default=["all_to_all", "foldpar"])
parser.add_argument("--float32", action="store_true", help="compute in float32, as on the CPU")


def run(options: argparse.Namespace, implementation: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    command += [str(EXAMPLE), "--implementation", implementation]
    for name in ("tp", "ep", "preset", "length", "batch", "accumulate", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    command += [] if options.float32 else ["--bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def main() -> None:
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.implementations}
    for turn in range(options.turns):
        for name in options.implementations if turn % 2 == 0 else reversed(options.implementations):
            found[name].append(run(options, name))
    print(f"{options.gpus} GPUs, tp{options.tp}/ep{options.ep}, {options.preset}, length {options.length}")
    print("| implementation | tokens/s | peak GB | last loss |\n|---|---|---|---|")
    for name, runs in found.items():
        speed = statistics.median(each["tokens_per_second"] for each in runs)
        memory = max(each["peak_bytes"] for each in runs) / 1e9
        print(f"| {name} | {speed:,.0f} | {memory:.1f} | {runs[0]['losses'][-1]:.4f} |")
    losses = [runs[0]["losses"] for runs in found.values()]
    tolerance = 1e-3 if options.float32 else 5e-2
    for other in losses[1:]:
        apart = max(abs(one - two) / abs(one) for one, two in zip(losses[0], other, strict=True))
        if apart > tolerance:
            raise SystemExit(f"Losses differ by up to {apart:.1e}, more than {tolerance:.0e}: not the same run.")


if __name__ == "__main__":
    main()
