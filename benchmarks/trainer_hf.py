"""``Trainer`` with foldpar's exchange of rows beside transformers' own, in turns, in one process a GPU.

    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/trainer_hf.py
    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/trainer_hf.py --tp 2 --turns 3
    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/trainer_hf.py --profile 25

Each turn runs the training of ``examples/trainer_hf.py`` once for every entry: bfloat16, the preset of a billion
parameters, FSDP2 over the data ranks, and over ``efsdp`` for experts. The entry ``fsdp`` has whole experts on every
rank (``ep_size = 1``, transformers' ``grouped_mm``), all others spread them. One row for each: medians of the tokens
per second, the peak memory of the rank that needed the most, the last loss. It ends with an error if losses differ.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from trainer_hf import job_in_a_folder, start_folder, trained

ENTRIES: dict[str, dict[str, Any]] = {
    "fsdp": {"implementation": "all_to_all", "ep": 1, "messages": False},
    "all_to_all": {"implementation": "all_to_all", "messages": False},
    "foldpar": {"implementation": "foldpar", "messages": True},
    "one-sided": {"implementation": "foldpar", "messages": False},
}

parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--ep", type=int, default=2)
parser.add_argument("--preset", default="1b")
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--batch", type=int, default=8, help="sequences per micro-batch and data rank")
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--clip", type=float, default=1.0)
parser.add_argument("--turns", type=int, default=2)
parser.add_argument("--entries", nargs="+", default=["all_to_all", "foldpar"], choices=list(ENTRIES))
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--float32", dest="bfloat16", action="store_false", help="compute in float32, as on the CPU")
parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="instead of turns: where the time goes")


class Profile(TrainerCallback):
    """Of the third step on."""

    def __init__(self) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=kinds)

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 2:
            self.profiler.start()

    def on_train_end(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
        self.profiler.stop()

    def tables(self, rows: int) -> str:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        averages = self.profiler.key_averages()
        return "\n".join(
            averages.table(sort_by=f"self_{kind}_time_total", row_limit=rows, max_name_column_width=70)
            for kind in dict.fromkeys((device, "cpu"))
        )


def run(options: argparse.Namespace, entry: str, folder: str, callbacks: tuple[Any, ...] = ()) -> dict[str, Any]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = trained(argparse.Namespace(**{**vars(options), **ENTRIES[entry]}), folder, f"{folder}/output", callbacks)
    for state in (AcceleratorState, GradientState, PartialState):  # of a process with one Trainer
        state._shared_state.clear()
    say(entry, result)
    return result


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def compare(options: argparse.Namespace, folder: str) -> None:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.entries}
    for turn in range(options.turns):
        for name in options.entries if turn % 2 == 0 else reversed(options.entries):
            found[name].append(run(options, name, folder))
    say(f"{os.environ['WORLD_SIZE']} ranks, tp{options.tp}/ep{options.ep}, {options.preset}, length {options.length}")
    say("| entry | tokens/s | all turns | peak GB | last loss |\n|---|---|---|---|---|")
    for name, runs in found.items():
        speeds = [each["tokens_per_second"] for each in runs]
        memory = max(each["peak_bytes"] for each in runs) / 1e9
        every = ", ".join(f"{speed:,.0f}" for speed in speeds)
        say(f"| {name} | {statistics.median(speeds):,.0f} | {every} | {memory:.1f} | {runs[0]['losses'][-1]:.4f} |")
    losses = [runs[0]["losses"] for runs in found.values()]
    tolerance = 5e-2 if options.bfloat16 else 1e-3
    for other in losses[1:]:
        apart = max(abs(one - two) / abs(one) for one, two in zip(losses[0], other, strict=True))
        if apart > tolerance:
            raise SystemExit(f"Losses differ by up to {apart:.1e}, more than {tolerance:.0e}: not the same run.")


def main() -> None:
    options = parser.parse_args()
    with job_in_a_folder() as shared:
        folder = start_folder(options, shared)
        if options.profile:
            for name in options.entries:
                profiled = Profile()
                run(options, name, folder, (profiled,))
                say(name, profiled.tables(options.profile))
        else:
            compare(options, folder)


if __name__ == "__main__":
    main()
