"""One MoE layer, forward and backward: foldpar's variants, peers, and the floor, on the same GPUs in the same run.

    python benchmarks/moe_layer.py --gpus 4 --tp 2 --ep 4 --ways messages one-sided graph
    python benchmarks/moe_layer.py --gpus 4 --device cpu --shapes tiny            # a rehearsal
    python benchmarks/moe_layer.py --gpus 4 --peer "titan=torchrun --nproc-per-node 4 titan_layer.py"

Every entry runs in processes of its own, in the order A B C C B A; each figure is the median over the iterations of
both turns, of the slowest rank, with its spread. A peer is any command that takes ``--tp --ep --tokens --dim --hidden
--experts --topk`` (tokens of one TP group) and prints one line of JSON with ``fwdbwd_ms`` and ``peak_gib``. foldpar's
values and expert gradients are checked against a plain expert loop before anything is timed.

Rows travel in messages or one-sided (``--ways``); ``graph`` is one-sided, captured in a CUDA graph and replayed. Peak
memory is that of torch's allocator and what GPUs share.

The floor is serial: the GEMM at the rate of a large product measured here, plus each row's bytes once per destination
rank at the rate of a large all-to-all measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import foldpar
from foldpar.comm.dtensors import local_tensor
from foldpar.comm.peers import PeerMemories, check_room


@dataclass(frozen=True)
class Shape:
    dim: int
    hidden: int
    experts: int
    top_k: int


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
    "deepseek": Shape(7168, 2048, 256, 8),
    "tiny": Shape(64, 32, 8, 2),
}
ITERATIONS, WARM_UP = 20, 5


# ---------------------------------------------------------------------------------------------------------------------
# In the ranks.


def expert_weights(shape: Shape, expert: int, like: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(like["device"]).manual_seed(1 + expert)
    gate_up = torch.randn(2 * shape.hidden, shape.dim, generator=generator, **like) * shape.dim**-0.5
    return gate_up, torch.randn(shape.dim, shape.hidden, generator=generator, **like) * shape.hidden**-0.5


class SkewedRouter(foldpar.TopKRouter):
    """Adds Zipf's law to the logits, so that a few experts get most tokens."""

    def forward(self, x: Tensor) -> foldpar.Routing:
        popularity = -torch.arange(1, self.num_experts + 1, device=x.device).log()
        scores = (F.linear(x, self.weight).float() + popularity).softmax(-1)
        weights, ids = scores.topk(self.top_k, dim=-1)
        return foldpar.Routing(ids, weights / weights.sum(-1, keepdim=True))


def build_layer(
    shape: Shape,
    groups: foldpar.FoldedGroups,
    lanes: str,
    routing: str,
    like: dict[str, Any],
    one_sided: foldpar.OneSided | bool | None,
) -> nn.Module:
    experts = foldpar.GroupedExperts(shape.experts, shape.dim, shape.hidden, groups, device="meta", dtype=like["dtype"])
    mine = range(experts.first_expert, experts.first_expert + experts.local_experts)
    units = slice(groups.etp.index * experts.local_hidden, (groups.etp.index + 1) * experts.local_hidden)
    experts.to_empty(device=like["device"])
    with torch.no_grad():
        own_gate_up, own_down = local_tensor(experts.gate_up_proj), local_tensor(experts.down_proj)
        for local, expert in enumerate(mine):
            gate_up, down = expert_weights(shape, expert, like)
            gate, up = gate_up.chunk(2)
            own_gate_up[local] = torch.cat([gate[units], up[units]]).view(own_gate_up[local].shape)
            own_down[local] = down[:, units]
    torch.manual_seed(0)
    kind = SkewedRouter if routing == "zipf" else foldpar.TopKRouter
    router = kind(shape.dim, shape.experts, shape.top_k, **like)
    return foldpar.FoldedMoE(router, experts, groups, lanes=lanes, one_sided=one_sided)


def own_input(tokens: int, shape: Shape, groups: foldpar.FoldedGroups, lanes: str, like: dict[str, Any]) -> Tensor:
    """``tokens`` unique ones per rank: replicated lanes hold those of all lanes of their TP group."""
    seed = 100 + (groups.dp_cp.index if lanes == "replicated" else groups.rank)
    rows = tokens * (groups.tp.size if lanes == "replicated" else 1)
    generator = torch.Generator(like["device"]).manual_seed(seed)
    return torch.randn(rows, shape.dim, generator=generator, **like)


def check(layer: Any, shape: Shape, groups: foldpar.FoldedGroups, lanes: str, like: dict[str, Any]) -> float:
    """Largest relative L2 difference to a float32 expert loop: output and own experts' gradients."""
    x = own_input(64, shape, groups, lanes, like)
    grad = torch.randn_like(x) if lanes == "sharded" else torch.ones_like(x).cumsum(0).sin()
    y = layer(x)
    got = torch.autograd.grad(y, [layer.experts.gate_up_proj, layer.experts.down_proj], grad)
    with torch.no_grad():
        routing = layer.router(x)
    exact = x.detach().float()
    want_y = torch.zeros_like(exact)
    own: list[list[Tensor]] = [[], []]
    experts = layer.experts
    for expert in range(shape.experts):
        gate_up, down = (weight.float().requires_grad_() for weight in expert_weights(shape, expert, like))
        weight = torch.where(routing.ids == expert, routing.weights, 0).sum(-1)
        gate, up = (exact @ gate_up.T).chunk(2, -1)
        part = (F.silu(gate) * up) @ down.T * weight[:, None]
        gradients = torch.autograd.grad(part, [gate_up, down], grad.float())
        want_y = want_y + part.detach()
        local = expert - experts.first_expert
        for place, gradient in enumerate(gradients):
            total = gradient / (groups.tp.size if lanes == "replicated" else 1)
            dist.all_reduce(total)  # over all owners of tokens: one edp group holds them all here
            if 0 <= local < experts.local_experts:
                own[place].append(total)
    own_gradients = [local_tensor(gradient).view(len(own[0]), -1) for gradient in got]
    wanted = [torch.stack(gradients).view(len(gradients), -1) for gradients in own]
    pairs = [(y.detach(), want_y), *zip(own_gradients, wanted, strict=True)]
    # Not the input gradient: it also flows through the router, which the loop holds constant.
    with torch.no_grad():
        relative = [float((one.float() - other).norm() / other.norm()) for one, other in pairs]
    return max(relative)


def timed(step: Any, device: str) -> list[float]:
    import time

    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(ITERATIONS):
        dist.barrier()
        if device == "cpu":
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        step()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    slowest = torch.tensor(times, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def captured(step: Any) -> Any:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def host_synchronisations(step: Any) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measured_rates(device: str, groups: foldpar.FoldedGroups) -> tuple[float, float]:
    """Matrix rate in FLOP/ms and link rate in bytes/ms, each of one large operation."""
    size, length = (8192, 2**26) if device == "cuda" else (256, 2**16)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(timed(lambda: a @ b, device))
    x = torch.zeros(length * groups.ep.size, device=device, dtype=torch.bfloat16)
    exchange = statistics.median(timed(lambda: dist.all_to_all_single(torch.empty_like(x), x), device))
    world = dist.get_world_size()
    return 2 * size**3 / product, x.numel() * 2 * (world - 1) / world / exchange


def rank_main(options: argparse.Namespace) -> None:
    device = options.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    like = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    layout = foldpar.solve_layout(int(os.environ["WORLD_SIZE"]), tp=options.tp, ep=options.ep, etp=options.etp)
    with foldpar.create_groups(layout, backend="nccl" if device == "cuda" else "gloo") as groups:
        flops, link = measured_rates(device, groups)
        for name in options.shapes:
            shape = SHAPES[name]
            for routing in options.routing:
                for lanes, way, tokens in itertools.product(options.lanes, options.ways, options.tokens):
                    one_sided = False if way == "messages" else foldpar.OneSided(slack=options.slack)
                    layer: Any = build_layer(shape, groups, lanes, routing, like, one_sided)
                    error = check(layer, shape, groups, lanes, like) if layout.edp * layout.etp == 1 else None
                    report = measure(layer, shape, tokens, groups, lanes, like, (flops, link), way == "graph")
                    report |= {
                        "shape": name,
                        "tokens": tokens,
                        "entry": f"foldpar {lanes} {way} {routing}",
                        "error": error,
                    }
                    if groups.rank == 0:
                        print(json.dumps(report), flush=True)
                    check_room(groups)
                    groups.keep(PeerMemories).found.clear()
                    del layer


def measure(
    layer: Any,
    shape: Shape,
    tokens: int,
    groups: foldpar.FoldedGroups,
    lanes: str,
    like: dict[str, Any],
    rates: tuple[float, float],
    replay: bool,
) -> dict[str, Any]:
    x = own_input(tokens, shape, groups, lanes, like).requires_grad_()
    grad, wanted = torch.randn_like(x), [x, *layer.parameters()]

    def step() -> None:
        torch.autograd.grad(layer(x), wanted, grad)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    forward_ms = timed(forward, like["device"])
    gpu = like["device"] == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times = timed(captured(step) if replay else step, like["device"])
    shared = sum(memory.own.numel() for each in groups.keep(PeerMemories).found.values() for memory in each.made)
    peak = (torch.cuda.max_memory_allocated() + shared) / 2**30 if gpu else float("nan")
    with torch.no_grad():
        own = x.detach()[:tokens] if lanes == "replicated" else x.detach()
        routing = layer.router(own)
    plan = foldpar.plan_dispatch(routing.ids, groups, num_experts=shape.experts, mask=routing.mask)
    away = sum(plan.send_rows) - plan.send_rows[plan.ep.index]
    size = x.element_size()
    wire = 4 * away * shape.dim * size
    if lanes == "replicated":
        wire += 2 * tokens * (groups.tp.size - 1) * shape.dim * size
    work = 3 * 3 * 2 * plan.assignments * shape.dim * shape.hidden / groups.etp.size
    floor = torch.tensor([work / rates[0] + 4 * away * shape.dim * size / rates[1]], device=x.device)
    dist.all_reduce(floor, op=dist.ReduceOp.MAX)
    return {
        "fwd_ms": statistics.median(forward_ms),
        "times": times,
        "peak_gib": peak,
        "floor_ms": float(floor),
        "wire_mib": wire / 2**20,
        "syncs": host_synchronisations(step) if gpu else None,
        "tflops": rates[0] / 1e9,
        "link_gbs": rates[1] / 1e6,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Outside: one entry after the other, and the table.


def run_entry(command: list[str], label: str | None) -> list[dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    lines = [line for line in told if "times" in line or "fwdbwd_ms" in line]
    if done.returncode or not lines:
        print(f"{label or 'foldpar'} failed with {done.returncode}:\n{done.stderr[-1500:]}", file=sys.stderr)
    for line in lines:  # as they come: a long run that is cut off has told what it knew
        print(label or "foldpar", json.dumps(line), file=sys.stderr, flush=True)
    return lines


def peer_command(peer: str, shape: Shape, tokens: int, options: argparse.Namespace) -> list[str]:
    sizes = {
        "tp": options.tp, "ep": options.ep, "tokens": tokens * options.tp, "dim": shape.dim,
        "hidden": shape.hidden, "experts": shape.experts, "topk": shape.top_k,
    }  # fmt: skip
    return [*shlex.split(peer), *(word for name, size in sizes.items() for word in (f"--{name}", str(size)))]


def drive(options: argparse.Namespace) -> None:
    own = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}", __file__]
    own += ["--rank", *sys.argv[1:]]
    peers = dict(peer.split("=", 1) for peer in options.peer)
    gathered: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for turn in ([None, *peers], [*reversed(peers), None])[: options.turns]:
        for label in turn:
            if label is None:
                for line in run_entry(own, None):
                    gathered.setdefault((line["shape"], line["tokens"], line["entry"]), []).append(line)
                continue
            for name in options.shapes:
                for tokens in options.tokens:
                    for line in run_entry(peer_command(peers[label], SHAPES[name], tokens, options), label):
                        gathered.setdefault((name, tokens, label), []).append(line)
    rows = [summary(key, lines) for key, lines in sorted(gathered.items())]
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    if options.png:
        plot(rows, options.png)


def summary(key: tuple[str, int, str], lines: list[dict[str, Any]]) -> dict[str, Any]:
    times = [time for line in lines for time in line.get("times", [line.get("fwdbwd_ms")])]
    return {
        **{name: value for name, value in lines[0].items() if name != "times"},
        "shape": key[0], "tokens": key[1], "entry": key[2],
        "ms": statistics.median(times), "spread": (min(times), max(times)),
        "peak_gib": max(line["peak_gib"] for line in lines),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "shape     tokens  entry                                 fwd     fwd+bwd ms (min..max)     "
        "x floor  x best   GiB   MiB sent  syncs  error"
    ]
    for row in rows:
        same = [other for other in rows if (other["shape"], other["tokens"]) == (row["shape"], row["tokens"])]
        floor = next((other["floor_ms"] for other in same if "floor_ms" in other), float("nan"))
        best = min(other["ms"] for other in same)
        low, high = row["spread"]
        error = "" if row.get("error") is None else f"{row['error']:.1e}"
        lines.append(
            f"{row['shape']:<9} {row['tokens']:<7} {row['entry']:<36} {row.get('fwd_ms', 0):>7.2f} {row['ms']:>8.2f} "
            f"({low:.2f}..{high:.2f})".ljust(88)
            + f"{row['ms'] / floor:>6.2f}  {row['ms'] / best:>6.2f} "
            f"{row['peak_gib']:>6.2f} {row.get('wire_mib') or 0:>8.0f}  {row.get('syncs') or '':>5}  {error}"
        )
    rates = next((row for row in rows if "tflops" in row), None)
    if rates:
        lines.append(
            f"measured here: {rates['tflops']:.0f} TFLOP/s, all-to-all {rates['link_gbs']:.0f} GB/s out per rank"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted({(row["shape"], row["tokens"]) for row in rows})
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4 * len(cases), 4), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        chosen = [row for row in rows if (row["shape"], row["tokens"]) == case]
        axis.barh([row["entry"] for row in chosen], [row["ms"] for row in chosen])
        floor = next((row["floor_ms"] for row in chosen if "floor_ms" in row), None)
        if floor:
            axis.axvline(floor, linestyle="--", color="black", label="floor")
        axis.set(title=f"{case[0]}, {case[1]} tokens per rank", xlabel="forward + backward, ms")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", type=int, default=4, help="processes to start")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ep", type=int, default=4)
    parser.add_argument("--etp", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["qwen3", "mixtral"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 1024], help="unique tokens per rank")
    parser.add_argument("--lanes", nargs="+", default=["replicated", "sharded"], choices=["replicated", "sharded"])
    parser.add_argument(
        "--ways", nargs="+", default=["messages"], choices=["messages", "one-sided", "graph"], help="how rows travel"
    )
    parser.add_argument("--slack", type=float, help="room for one-sided rows, times the balanced number; else for all")
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=["uniform", "zipf"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--turns", type=int, default=2, choices=[1, 2])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    options = parser.parse_args()
    if options.rank:
        rank_main(options)
    else:
        drive(options)


if __name__ == "__main__":
    main()
