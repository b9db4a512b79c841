"""Steps of ``examples/finetune_hf.py`` with every stage of sharding and with transformers' own parallelism, in turns.

    torchrun --nproc-per-node 2 benchmarks/finetune.py
    torchrun --nproc-per-node 2 benchmarks/finetune.py --tp 2 --runs foldpar:0 foldpar:3 transformers:0
    torchrun --nproc-per-node 2 benchmarks/finetune.py --device cpu --preset tiny --length 64     # a rehearsal
    torchrun --nproc-per-node 2 benchmarks/finetune.py --runs foldpar:3 --trace build/traces      # where time goes

A run is ``engine:stage``; with a stage above 0 the weights are float32 and computing is bfloat16, of transformers too.
All runs start from the same weights and see the same random tokens. Prints the median of the steps in tokens/s and the
peak memory of the rank that needed the most, and appends a row for each to ``--csv``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from one_gpu import append, circumstances
from step_trace import tell_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

import foldpar

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune_hf

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--runs", nargs="+", default=["transformers:3", "foldpar:3", "foldpar:2", "foldpar:1"])
parser.add_argument("--turns", type=int, default=2, help="how often all runs come, every other time backwards")
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--ep", type=int, default=2)
parser.add_argument("--preset", default="1b", choices=list(finetune_hf.PRESETS))
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--global-batch", type=int, default=32)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--steps", type=int, default=8, help="of each run; the first two are not counted")
parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
parser.add_argument("--trace", type=Path, help="a folder for traces of one step; told instead of timed")
parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results.csv")
parser.add_argument("--commit", help="where the code lies without its history")
WARM_UP = 2


@contextmanager
def tracing(file: Path) -> Iterator[None]:
    """Trace from the end of one optimizer's step to the end of the next, of this rank."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, schedule=schedule(wait=WARM_UP, warmup=1, active=1)) as profiler:
        hook = register_optimizer_step_post_hook(lambda *_: profiler.step())
        try:
            yield
        finally:
            hook.remove()
    profiler.export_chrome_trace(str(file))


def run(options: argparse.Namespace, name: str, folder: Path, device: torch.device) -> tuple[list[float], list[float]]:
    """Losses, and seconds of every step, of the rank that took longest."""
    options = copy.copy(options)
    options.engine, stage = name.split(":")
    options.shard_stage = int(stage)
    layout = foldpar.solve_layout(dist.get_world_size(), tp=options.tp, ep=options.ep)
    generator = torch.Generator().manual_seed(0)
    vocabulary = finetune_hf.PRESETS[options.preset]["vocab_size"]
    windows = torch.randint(vocabulary, (options.steps * options.global_batch, options.length + 1), generator=generator)
    with foldpar.create_groups(layout) as groups:
        engine = finetune_hf.ENGINES[options.engine](options, groups, device)
        model = engine.load(folder)
        if options.trace and dist.get_rank() == 0:
            options.trace.mkdir(parents=True, exist_ok=True)
            file = options.trace / f"{name.replace(':', '-')}.json"
            with tracing(file):
                losses, seconds = finetune_hf.train(model, windows, engine, options)
            print(f"== {name}", flush=True)
            tell_file(file)
        else:
            losses, seconds = finetune_hf.train(model, windows, engine, options)
        slowest = torch.tensor(seconds, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return losses, slowest.tolist()


def main() -> None:
    options = parser.parse_args()
    options.model, options.seed, options.rate, options.clip = None, 0, None, 1.0
    options.dtype = "bfloat16"
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    device = torch.device(options.device, dist.get_rank() if options.device == "cuda" else None)
    if options.device == "cuda":
        torch.cuda.set_device(device)
    first, around = dist.get_rank() == 0, circumstances(options.device, options.commit)
    times: dict[str, list[float]] = {name: [] for name in options.runs}
    peaks, last_losses = dict.fromkeys(options.runs, 0.0), dict[str, float]()
    with tempfile.TemporaryDirectory() as own_folder:
        shared = [own_folder]
        dist.broadcast_object_list(shared, src=0)
        options.shard_stage = 0
        with foldpar.create_groups(foldpar.solve_layout(dist.get_world_size())) as groups:
            folder = finetune_hf.start_folder(options, groups, device, shared[0])
        dist.barrier()
        for turn in range(options.turns):
            for name in options.runs if turn % 2 == 0 else reversed(options.runs):
                if options.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                losses, seconds = run(options, name, folder, device)
                gc.collect()
                times[name] += [1e3 * each for each in seconds[WARM_UP:]]
                peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0)
                peak = peak.to(device)
                dist.all_reduce(peak, op=dist.ReduceOp.MAX)
                peaks[name], last_losses[name] = max(peaks[name], float(peak)), losses[-1]
                if first:
                    print(
                        f"turn {turn} {name}: {[round(1e3 * each) for each in seconds]} ms, {losses[-1]:.4f}",
                        flush=True,
                    )
        dist.barrier()
    tokens = options.global_batch * options.length
    config = finetune_hf.PRESETS[options.preset]
    if first and not options.trace:
        print(f"{dist.get_world_size()} GPUs, tp{options.tp}/ep{options.ep}, {options.preset}, {tokens} tokens a step")
        print("| run | tokens/s | ms (fastest..slowest) | peak GiB | last loss |\n|---|---|---|---|---|")
        for name, found in times.items():
            ms = statistics.median(found)
            spread = f"{min(found):.0f}..{max(found):.0f}"
            speed = f"{1e3 * tokens / ms:,.0f} | {ms:.0f} ({spread})"
            print(f"| {name} | {speed} | {peaks[name]:.1f} | {last_losses[name]:.4f} |")
            row = {
                "shape": f"finetune-{options.preset}-tp{options.tp}-ep{options.ep}", "dim": config["hidden_size"],
                "hidden": config["moe_intermediate_size"], "experts": config["num_experts"],
                "top_k": config["num_experts_per_tok"], "tokens": tokens, "entry": name, "ms": round(ms, 1),
                "fastest": round(min(found), 1), "slowest": round(max(found), 1), "peak_gib": round(peaks[name], 2),
                "tflops": "",
            }  # fmt: skip
            append(options.csv, around | row)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
