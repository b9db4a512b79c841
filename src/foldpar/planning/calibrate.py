"""``calibrate``: measure this machine into the file that ``plan --machine`` takes.

Alone it measures products, memory and what launching costs; under ``torchrun`` also the links between the ranks, those
of one node apart from those between nodes. What cannot be measured here keeps the number of a machine that is shipped,
and ``sources`` says so. It works on CPUs too, slowly.
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

import torch
from torch.nn import functional as F

from foldpar.comm import AxisGroup, FoldedGroups, all_to_all_rows, create_groups
from foldpar.layout import solve_layout
from foldpar.planning.machine import HostCost, Link, Machine, read_machine

__all__ = ["calibrate", "fit_link", "measure"]

DENSE = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 14336))
"""Rows, inner and outer width of dense products."""
GROUPED = ((128, 64, 2048, 1536), (128, 512, 2048, 1536), (8, 2048, 4096, 14336))
"""Experts, rows of each, inner and outer width of grouped products."""
MESSAGES = (1 << 20, 1 << 23, 1 << 25, 1 << 27)
"""Bytes that a rank sends in an exchange."""
QUICK_DENSE, QUICK_GROUPED, QUICK_MESSAGES = ((64, 64, 64),), ((4, 16, 64, 64),), (1 << 12, 1 << 16)


def calibrate(file: str | PathLike[str], *, name: str | None = None, quick: bool = False) -> str:
    """Measure and write ``file``, on rank 0; returns what to say about it.

    Args:
        file: where to write.
        name: what to call the machine; by default the name of the file.
        quick: small sizes: seconds, and rough.

    Raises:
        OSError: the file cannot be written.
    """
    distributed = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    layout = solve_layout(int(os.environ["WORLD_SIZE"])) if distributed else None
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
    host = _host(base.host, device)
    here = f"measured here, {gpu}, torch {torch.__version__}"
    sources = dict.fromkeys(
        ("attention_flops", "network", "overlap", "peak_flops"), f"not measured: as for {base.name}"
    )
    sources |= dict.fromkeys(("product_flops", "grouped_flops", "memory_bandwidth", "host", "memory"), here)
    sources["node"] = f"not measured: as for {base.name}"
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
        memory_bandwidth=bandwidth,
        host=host,
        measured={"dense": [[*shape, rate] for shape, rate in dense], "grouped": [[*s, rate] for s, rate in grouped]},
    )
    if groups is not None and groups.layout.world > 1:
        points = _links(groups.dp, QUICK_MESSAGES if quick else MESSAGES, device)
        which = "node" if groups.layout.world <= per_node else "network"
        link, measured = fit_link(points), {**machine.measured, which: points}
        if which == "node":
            machine = replace(machine, node=link, measured=measured)
        else:
            machine = replace(machine, network=link, measured=measured)
        sources[which] = f"{here}: all-to-all over {groups.layout.world} ranks"
    return replace(machine, sources=sources)


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


def _host(base: HostCost, device: torch.device) -> HostCost:
    """The machine's costs, scaled by how long this host needs to launch small operations."""
    x = torch.zeros(8, device=device)
    ratio = _seconds(lambda: [x.add_(1) for _ in range(100)], device) / 100 / REFERENCE_LAUNCH
    costs = {name: getattr(base, name) * ratio for name in HostCost.__dataclass_fields__}
    return HostCost(**costs)


REFERENCE_LAUNCH = 5e-6
"""Seconds that one small operation takes on the host whose costs per layer are shipped (assumed)."""


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
