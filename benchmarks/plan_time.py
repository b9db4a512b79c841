"""Milliseconds that ``foldpar plan`` predicts beside those of real steps, over every fold of one or two GPUs.

    foldpar calibrate node.json                                    # under torchrun for two GPUs
    PYTHONPATH=src:tests/support python benchmarks/plan_time.py --machine node.json
    PYTHONPATH=src:tests/support torchrun --nproc-per-node 2 benchmarks/plan_time.py --machine node.json

For each model and number of tokens one table: every fold, stage and way of rows on the same global batch, predicted and
measured, with the parts of the prediction; on one GPU, which has one fold, recomputation and micro-batches. Measured is
the median of the timed steps, on the slowest rank; with ``--turns``, in which every model is built again, the median of
their medians, and the fastest and slowest step of all of them: what differs between two models that are alike is not
seen in the steps of one. Behind it what the plan is asked for: whether the best one is among
the two predicted to be best, what it costs to follow the prediction (regret), Kendall's tau, the mean error. ``--json``
keeps everything; ``--profile`` also the kernels of one step. ``--again FILE`` predicts anew what such a file measured,
without GPUs. ``--cpu`` rehearses with small sizes over Gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from plan_memory_cases import Case, Training

import foldpar
from foldpar.planning import Machine, Workload, read_machine, read_model
from foldpar.planning.timing import TimeModel

COMMON = {"vocab_size": 32768, "num_key_value_heads": 4, "head_dim": 128, "pad_token_id": None}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b, 4 layers": ("qwen3_moe", {
        **COMMON, "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "intermediate_size": 2048,
    }),
    "mixtral, 4 layers": ("mixtral", {
        **COMMON, "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 7168,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    }),
    "qwen2-moe, 6 layers": ("qwen2_moe", {
        **COMMON, "hidden_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16, "moe_intermediate_size": 1408,
        "num_experts": 64, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632, "intermediate_size": 5632,
    }),
}  # fmt: skip
BATCHES = ((2048, 4), (4096, 8))
"""Tokens of a sequence, and sequences of a step, all ranks together."""
FOLDS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"ep": 2}, {"etp": 2}, {"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}],
}
"""Of two ranks all that there are without context and pipeline parallelism; both orders are one."""


def cases(world: int, model: str, tokens: int, batch: int) -> Iterator[Case]:
    """All that shard_model takes, in bfloat16; on one rank all recomputations, in one, two and four micro-batches."""
    name, config = MODELS[model]
    for degrees in FOLDS[world]:
        layout = foldpar.solve_layout(world, **degrees)
        for stage in (0, 2, 3) if layout.dp * layout.edp > 1 else (0,):
            for transport in ("messages", "one-sided") if layout.ep > 1 else ("messages",):
                for recompute in ("none",) if world > 1 else ("none", "experts", "full"):
                    for parts in (1,) if world > 1 else (1, 2, 4):
                        micro = batch // layout.dp // parts
                        yield Case(
                            name, config, world, degrees, stage, recompute, "bfloat16", micro, parts, tokens, transport
                        )


def built_as(case: Case) -> tuple[Any, ...]:
    """Cases for which this is equal can share a model."""
    return case.model, tuple(case.degrees.items()), case.stage, case.recompute, case.transport


def measure(training: Training, device: str, steps: int, profile: bool) -> dict[str, Any]:
    """Milliseconds and peak bytes of a step, the slowest rank's; with ``profile``, its phases and kernels."""
    for _ in range(2):
        training.step()
    whole, peak = [], 0
    for _ in range(steps):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        whole.append(_milliseconds(training, device)["total"])
        peak = max(peak, torch.cuda.max_memory_allocated() if device == "cuda" else 0)
    found = torch.tensor([_median(whole), float(peak)], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    row = {
        "measured_ms": found[0].item(), "fastest": min(whole), "slowest": max(whole), "measured_bytes": found[1].item(),
    }  # fmt: skip
    if profile:
        launched = [_milliseconds(training, device) for _ in range(3)]  # phases as the host leaves them
        waited = [_milliseconds(training, device, each=True) for _ in range(3)]
        for name, steps_of in (("host_ms", launched), ("phase_ms", waited)):
            row[name] = {phase: _median([each[phase] for each in steps_of]) for phase in steps_of[0]}
        row["kernels"] = _kernels(training) if device == "cuda" else {}
    return row


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _milliseconds(training: Training, device: str, *, each: bool = False) -> dict[str, float]:
    """Of every phase until the host goes on, or with ``each`` until the device is done; and of all of it."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    times, began = {}, time.perf_counter()
    last = began

    def after(phase: str) -> None:
        nonlocal last
        if each:
            wait()
        now = time.perf_counter()
        times[phase], last = 1e3 * (now - last), now

    training.step(after)
    wait()
    return {**times, "total": 1e3 * (time.perf_counter() - began)}


def _kernels(training: Training) -> dict[str, list[float]]:
    """Milliseconds of the longest kernels of a step, and how often they ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        training.step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key: [event.self_device_time_total / 1e3, event.count] for event in events[:50]}


def together(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """Put a row into its table, beside what earlier turns measured of the same case; what they say together."""
    for earlier in rows:
        if earlier["case"] == row["case"]:
            earlier["turns"].append(row["measured_ms"])
            earlier["measured_ms"] = _median(earlier["turns"])
            for name, pick in (("fastest", min), ("slowest", max), ("measured_bytes", max)):
                earlier[name] = pick(earlier[name], row[name])
            return earlier
    row["turns"] = [row["measured_ms"]]
    rows.append(row)
    return row


def predicted(case: Case, machine: Machine) -> dict[str, float]:
    """Milliseconds of all parts."""
    import transformers

    shape = read_model(transformers.AutoConfig.for_model(case.model, **case.config).to_dict())
    batch = case.micro * case.micro_batches * case.layout.dp
    work = Workload(tokens=case.tokens, batch=batch, precision=case.precision)  # type: ignore[arg-type]
    seconds = TimeModel(shape, work, machine).of(
        case.layout, stage=case.stage, recompute=case.recompute, transport=case.transport, micro=case.micro,
    )  # type: ignore[arg-type]  # fmt: skip
    return seconds.to_dict()


def kendall(rows: list[dict[str, Any]], *, apart: bool) -> float:
    """Concordant less discordant pairs, as a part of all; or of those whose steps are apart, all of one shorter."""
    signs = [
        (one["predicted"]["total"] - other["predicted"]["total"]) * (one["measured_ms"] - other["measured_ms"])
        for one, other in combinations(rows, 2)
        if not apart or one["slowest"] < other["fastest"] or other["slowest"] < one["fastest"]
    ]
    return (sum(sign > 0 for sign in signs) - sum(sign < 0 for sign in signs)) / max(1, len(signs))


def summary(rows: list[dict[str, Any]]) -> str:
    """What a plan is asked for, of the rows of one model and batch."""
    by_plan = sorted(rows, key=lambda row: row["predicted"]["total"])
    best = min(rows, key=lambda row: row["measured_ms"])
    regret = by_plan[0]["measured_ms"] / best["measured_ms"] - 1
    tau, apart = kendall(rows, apart=False), kendall(rows, apart=True)
    error = sum(abs(row["predicted"]["total"] / row["measured_ms"] - 1) for row in rows) / len(rows)
    of_bytes = [abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows if row["measured_bytes"]]
    within = f"; bytes within 5 %: {sum(each < 0.05 for each in of_bytes)} of {len(of_bytes)}" if of_bytes else ""
    return (
        f"{len(rows)} rows: the best is number {by_plan.index(best) + 1} of the plan, regret {regret:.1%}, tau "
        f"{tau:.2f} ({apart:.2f} of pairs whose steps are apart), mean error {error:.1%}{within}"
    )


def line(row: dict[str, Any]) -> str:
    """One row of a table: measured, predicted, and the parts of a tenth of a millisecond or more."""
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in row["predicted"].items() if name != "total" and ms >= 0.1)
    told, ms = row["predicted"]["total"], row["measured_ms"]
    return (
        f"{row['case']}: {ms:.1f} ms, predicted {told:.1f} ({told / ms:.2f}: {parts}); "
        f"{row['measured_bytes'] / 1e9:.2f} GB, predicted {row['predicted_bytes'] / 1e9:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--machine", default="h100", help="what foldpar calibrate wrote, or a name")
    parser.add_argument("--json", metavar="FILE", help="keep everything")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a case")
    parser.add_argument("--turns", type=int, default=1, help="how often every model is built and measured")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after so long")
    parser.add_argument("--again", metavar="FILE", help="predict what this JSON measured, and measure nothing")
    parser.add_argument("--profile", action="store_true", help="the kernels of one step, into the JSON")
    parser.add_argument("--cpu", action="store_true", help="small sizes over Gloo")
    options = parser.parse_args()
    began, device = time.monotonic(), "cpu" if options.cpu else "cuda"
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    machine = read_machine(options.machine)
    if options.again:
        again(options.again, machine)
        return
    batches = BATCHES
    if options.cpu:
        batches = ((16, 4), (32, 4))
        for _, config in MODELS.values():
            widths = {name: 64 for name in config if name.endswith("intermediate_size")}
            counts = {name: 8 for name in config if name.endswith("_experts")}
            config.update(
                widths | counts | {"hidden_size": 64, "vocab_size": 64, "num_hidden_layers": 1, "head_dim": 4}
            )
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    kept: dict[tuple[tuple[str, int], ...], foldpar.FoldedGroups] = {}
    tables: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for model in options.models * options.turns:
        alike: dict[tuple[Any, ...], list[tuple[int, int, Case]]] = defaultdict(list)
        for tokens, batch in batches:
            for case in cases(world, model, tokens, batch):
                alike[built_as(case)].append((tokens, batch, case))
        for of_one_model in alike.values():
            if _any(time.monotonic() - began > options.seconds, device):
                continue
            case = of_one_model[0][2]
            key = tuple(case.degrees.items())
            groups = kept[key] = kept.get(key) or foldpar.create_groups(case.layout, separate=("dp_cp", "edp"))
            training = case.training(groups, device)
            for tokens, batch, case in of_one_model:
                training = replace(training, ids=case.ids(device), micro_batches=case.micro_batches)
                row = {"model": model, "case": str(case)}
                row |= measure(training, device, options.steps, options.profile)
                memory = case.predicted(device)
                row |= {"predicted": predicted(case, machine), "predicted_bytes": memory.peak, "memory": asdict(memory)}
                row |= {"arguments": asdict(case), "seconds": time.monotonic() - began}
                row = together(tables[model, tokens, batch], row)
                if rank == 0:
                    print(line(row), flush=True)
                    if options.json:
                        _write(options.json, machine, tables)
            del training
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    if rank == 0:
        print(summaries(tables))
    for groups in reversed(kept.values()):
        groups.destroy()


def summaries(tables: dict[tuple[str, int, int], list[dict[str, Any]]]) -> str:
    """One line for each table."""
    return "\n".join(
        f"{model}, {batch} x {tokens} tokens: {summary(rows)}" for (model, tokens, batch), rows in tables.items()
    )


def again(file: str, machine: Machine) -> None:
    """Print the tables of a file with predictions of today."""
    with open(file, encoding="utf-8") as opened:
        measured = json.load(opened)["rows"]
    tables: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in measured:
        case = Case(**row["arguments"])
        row |= {"predicted": predicted(case, machine), "predicted_bytes": case.predicted("cuda").peak}
        tables[row["model"], case.tokens, case.micro * case.micro_batches * case.layout.dp].append(row)
        print(line(row))
    print(summaries(tables))


def _any(late: bool, device: str) -> bool:
    """Whether any rank is late: the same on all."""
    told = torch.tensor([float(late)], device=device)
    if dist.is_initialized():
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())


def _write(file: str, machine: Machine, tables: dict[tuple[str, int, int], list[dict[str, Any]]]) -> None:
    rows = [row for table in tables.values() for row in table]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"gpu": card, "torch": torch.__version__}
    with open(file, "w", encoding="utf-8") as opened:
        json.dump({**versions, "machine": machine.to_dict(), "rows": rows}, opened)


if __name__ == "__main__":
    main()
