"""``calibrate``: measure this machine into the file that ``plan --machine`` takes.

Alone it measures products, memory and what launching costs (``host_costs``); under ``torchrun`` also the links between
the ranks, those of one node apart from those between nodes. What cannot be measured here keeps the number of a machine
that is shipped, and ``sources`` says so. It works on CPUs too, slowly.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from foldpar.arguments import expect_writable
from foldpar.comm import (
    AxisGroup,
    FoldedGroups,
    all_gather_rows,
    all_reduce_,
    all_to_all_rows,
    create_groups,
    reduce_scatter_rows,
)
from foldpar.layout import solve_layout
from foldpar.planning import formulas
from foldpar.planning.host_costs import measure_host
from foldpar.planning.machine import Link, Machine, read_machine

__all__ = ["calibrate", "fit_link", "measure", "measure_links"]

DENSE = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 14336))
"""Rows, inner and outer width of dense products."""
GROUPED = ((128, 64, 2048, 1536), (128, 512, 2048, 1536), (8, 2048, 4096, 14336))
"""Experts, rows of each, inner and outer width of grouped products."""
MESSAGES = (1 << 20, 1 << 23, 1 << 25, 1 << 27)
"""Bytes that a rank sends in an exchange."""
ATTENTION = (2, 32, 4096, 128)
"""Sequences, heads, tokens and width of a head."""
NORMED, ROTATED, UPDATED = (16384, 2048), (4, 32, 2048, 128), (8, 1 << 27)
"""Rows and width of a norm; queries that are rotated; tensors and numbers of each in the optimizer."""
QUICK_DENSE, QUICK_GROUPED, QUICK_MESSAGES = ((64, 64, 64),), ((4, 16, 64, 64),), (1 << 12, 1 << 16)
QUICK_ATTENTION, QUICK_NORMED, QUICK_ROTATED, QUICK_UPDATED = (1, 2, 64, 16), (64, 64), (1, 2, 64, 16), (2, 1 << 12)


def calibrate(file: str | PathLike[str], *, name: str | None = None, quick: bool = False) -> str:
    """Measure and write ``file``, on rank 0; returns what to say about it.

    Args:
        file: where to write.
        name: what to call the machine; by default the name of the file.
        quick: small sizes: seconds, and rough.

    Raises:
        OSError: the file cannot be written.
    """
    expect_writable(file)  # on every rank, and before a minute is spent
    distributed = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    layout = solve_layout(int(os.environ["WORLD_SIZE"])) if distributed else None
    if distributed and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with create_groups(layout) if layout is not None else nullcontext() as groups:
        machine = measure(name or Path(file).stem, groups, quick=quick)
        first = groups is None or groups.rank == 0
    if first:
        Path(file).write_text(json.dumps(machine.to_dict(), indent=1) + "\n", encoding="utf-8")
    taken = [key for key, source in machine.sources.items() if not source.startswith("measured")]
    return f"{file}: {machine.gpu}, {machine.product_flops / 1e12:.2f} TFLOP/s. Not measured here: {', '.join(taken)}."


def measure(name: str, groups: FoldedGroups | None = None, *, quick: bool = False) -> Machine:
    """A machine as it is measured on this rank, and over the ranks of ``groups``."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    base = read_machine("h200" if "H200" in gpu else "h100")
    dense = [(shape, _dense(shape, device)) for shape in (QUICK_DENSE if quick else DENSE)]
    grouped = [(shape, _grouped(shape, device)) for shape in (QUICK_GROUPED if quick else GROUPED)]
    bandwidth = _memory_bandwidth(1 << 16 if quick else 1 << 28, device)
    world = 1 if groups is None else groups.layout.world
    host, host_source = measure_host(base.host, world, device, quick=quick)
    here = f"measured here, {gpu}, torch {torch.__version__}"
    sources = dict.fromkeys(
        ("node", "ring", "scatter", "network", "overlap", "peak_flops"), f"not measured: as for {base.name}"
    )
    rates = ("product_flops", "grouped_flops", "attention_flops", "memory_bandwidth", "elementwise_bandwidth")
    sources |= dict.fromkeys((*rates, "update_bandwidth", "memory"), here)
    sources["host"] = f"{here}, {host_source.removeprefix('measured: ')}"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() or 1))
    machine = replace(
        base,
        name=name,
        gpu=gpu,
        device=device.type,
        gpus_per_node=max(1, per_node) if groups is not None else base.gpus_per_node,
        memory=float(torch.cuda.get_device_properties(device).total_memory)
        if device.type == "cuda"
        else _host_memory(),
        product_flops=max(rate for _, rate in dense),
        grouped_flops=max(rate for _, rate in grouped),
        attention_flops=_attention(QUICK_ATTENTION if quick else ATTENTION, device),
        memory_bandwidth=bandwidth,
        elementwise_bandwidth=_elementwise(
            QUICK_NORMED if quick else NORMED, QUICK_ROTATED if quick else ROTATED, device
        ),
        update_bandwidth=_update(*(QUICK_UPDATED if quick else UPDATED), device),
        host=host,
        measured={"dense": [[*shape, rate] for shape, rate in dense], "grouped": [[*s, rate] for s, rate in grouped]},
    )
    machine = replace(machine, sources=sources)
    return machine if groups is None else measure_links(machine, groups, device, here, quick=quick)


def measure_links(
    machine: Machine, groups: FoldedGroups, device: torch.device, here: str, *, quick: bool = False
) -> Machine:
    """The machine with the link between the ranks of ``groups`` as it is measured; ``here`` is its source."""
    world = groups.layout.world
    if world == 1:
        return machine
    sizes, group = QUICK_MESSAGES if quick else MESSAGES, groups.dp
    points = {"node" if world <= machine.gpus_per_node else "network": _links(group, sizes, device)}
    told = dict.fromkeys(points, f"{here}: all-to-all over {world} ranks")
    if "node" in points:
        points["ring"], points["scatter"] = _rings(group, sizes, device), _scatters(group, sizes, device)
        told["ring"] = f"{here}: all-gather and all-reduce over {world} ranks"
        told["scatter"] = f"{here}: reduce-scatter over {world} ranks"
    links: dict[str, Any] = {name: fit_link(found) for name, found in points.items()}
    return replace(machine, **links, measured={**machine.measured, **points}, sources={**machine.sources, **told})


def fit_link(points: list[tuple[float, float]]) -> Link:
    """The latency and bandwidth of the straight line through bytes and seconds, by relative least squares.

    Example:
        >>> link = fit_link([(1e6, 6e-5), (1e8, 1.05e-3)])
        >>> f"{link.latency:.1e} {link.bandwidth:.1e}"
        '5.0e-05 1.0e+11'
    """
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_x = sum(weight * x for weight, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(weight * (x - mean_x) ** 2 for weight, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
    if slope <= 0:  # noise is larger than what the bytes cost
        return Link(min(seconds for _, seconds in points), max(x / seconds for x, seconds in points))
    return Link(max(mean_y - slope * mean_x, 1e-9), 1 / slope)


def _seconds(run: Callable[[], object], device: torch.device, least: float = 0.05) -> float:
    """The median of several runs, each long enough to be measured."""
    run()
    _wait(device)
    began, times = time.perf_counter(), list[float]()
    while len(times) < 3 or (time.perf_counter() - began < least and len(times) < 50):
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dense(shape: tuple[int, int, int], device: torch.device) -> float:
    rows, inner, outer = shape
    left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
    return 2.0 * rows * inner * outer / _seconds(lambda: left @ right.T, device)


def _grouped(shape: tuple[int, int, int, int], device: torch.device) -> float:
    experts, rows, inner, outer = shape
    left = torch.randn(experts * rows, inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(experts, outer, inner, device=device, dtype=torch.bfloat16)
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * rows
    seconds = _seconds(lambda: F.grouped_mm(left, right.transpose(-2, -1), offs=ends), device)
    return 2.0 * experts * rows * inner * outer / seconds


def _memory_bandwidth(size: int, device: torch.device) -> float:
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * size / _seconds(lambda: target.copy_(source), device)


def _attention(shape: tuple[int, int, int, int], device: torch.device) -> float:
    """Causal, forward and backward."""
    batch, heads, tokens, width = shape
    query, key, value = (_leaf(shape, device) for _ in range(3))

    def run() -> None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), query.detach())  # which adds to no earlier gradient

    forward = formulas.attention_flops(batch * tokens, tokens, heads * width, heads * width)
    return forward * formulas.ATTENTION_PASSES / _seconds(run, device)


def _elementwise(normed: tuple[int, int], rotated: tuple[int, int, int, int], device: torch.device) -> float:
    """A norm and a rotation as transformers writes them, forward and backward, by the bytes that a plan counts."""
    x, weight, heads = _leaf(normed, device), _leaf(normed[1:], device), _leaf(rotated, device)
    angles = torch.rand(rotated[2], rotated[3], device=device, dtype=torch.bfloat16)

    def norm() -> None:
        wide = x.float()
        (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)).backward(x.detach())

    def rotate() -> None:
        first, second = heads.chunk(2, dim=-1)
        (heads * angles + torch.cat((-second, first), dim=-1) * angles).backward(heads.detach())

    moved = formulas.NORM_MOVES * x.numel() + formulas.ROTATION_MOVES * 2 * heads.numel()
    return moved / (_seconds(norm, device) + _seconds(rotate, device))


def _update(count: int, numel: int, device: torch.device) -> float:
    weights = [_leaf((numel,), device) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(weights)
    return formulas.ADAM_PASSES * 2.0 * count * numel / _seconds(lambda: optimizer.step(), device)


def _leaf(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.rand(shape, device=device, dtype=torch.bfloat16).requires_grad_()


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _links(group: AxisGroup, sizes: tuple[int, ...], device: torch.device) -> list[tuple[float, float]]:
    """Bytes out of a rank, and the seconds of an all-to-all that moves them."""
    points = []
    for size in sizes:
        rows = [max(1, size // 1024 // (group.size - 1))] * group.size
        payload = torch.zeros(sum(rows), 512, device=device, dtype=torch.bfloat16)
        seconds = _seconds_together(lambda p=payload, r=rows: all_to_all_rows(p, r, r, group), device)  # type: ignore[misc]
        points.append((float(rows[0] * 1024 * (group.size - 1)), seconds))
    return points


def _rings(group: AxisGroup, sizes: tuple[int, ...], device: torch.device) -> list[tuple[float, float]]:
    """Bytes out of a rank, and the seconds of a gather or a sum that moves them."""
    points = []
    for size in sizes:
        whole = torch.zeros(size // 2, device=device, dtype=torch.bfloat16)
        part, counts = whole[: len(whole) // group.size], [len(whole) // group.size] * group.size
        for kind, run in (
            ("all_reduce", lambda w=whole: all_reduce_(w, group)),
            ("all_gather", lambda p=part, c=counts: all_gather_rows(p, group, row_counts=c, backward="slice")),
        ):
            sent = formulas.collective_bytes(kind, group.size, float(size))
            points.append((sent, _seconds_together(run, device)))
    return points


def _scatters(group: AxisGroup, sizes: tuple[int, ...], device: torch.device) -> list[tuple[float, float]]:
    """Bytes out of a rank, and the seconds of a sum into shards that moves them."""
    points = []
    for size in sizes:
        whole = torch.zeros(size // 1024 // group.size * group.size, 512, device=device, dtype=torch.bfloat16)
        counts = [len(whole) // group.size] * group.size
        seconds = _seconds_together(lambda w=whole, c=counts: reduce_scatter_rows(w, group, row_counts=c), device)  # type: ignore[misc]
        points.append((formulas.collective_bytes("reduce_scatter", group.size, 2.0 * whole.numel()), seconds))
    return points


def _seconds_together(run: Callable[[], object], device: torch.device) -> float:
    """As many runs on every rank: what a rank decides by its own clock, others would wait for."""
    run()
    times = []
    for _ in range(7):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[3]
