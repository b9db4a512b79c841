"""What a traced step of training did, in words: the device's share, its gaps and what the host did in them.

    python benchmarks/step_trace.py trace.json

Takes a trace that ``torch.profiler`` wrote (``export_chrome_trace``); ``benchmarks/finetune.py --trace`` makes one. The
window is the trace's last ``ProfilerStep``, or all of it.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Span = tuple[float, float]
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
KINDS = [
    ("NCCL", r"nccl"),
    ("attention", r"flash|fmha|attention|mem_eff"),
    ("optimizer, foreach", r"multi_tensor|foreach"),
    ("foldpar's kernels", r"^_[a-z]\w*$|triton_(?!poi|red|per)"),
    ("grouped products", r"grouped|Group|GroupProblemShape"),
    ("products", r"gemm|cutlass|nvjet|cublas|sm90_xmma"),
    ("copies and casts", r"copy|Memcpy|memcpy|cat|Cat|split_with|chunk"),
    ("reductions", r"reduce|softmax|norm|Norm|loss"),
    ("elementwise", r"elementwise|vectorized|unrolled"),
    ("sort, scan, index", r"sort|scan|index|gather|scatter|radix|topk"),
    ("fill", r"[mM]emset|fill"),
]


def union(spans: Iterable[Span]) -> list[Span]:
    merged: list[list[float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [(start, end) for start, end in merged]


def total(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def common(one: list[Span], other: list[Span]) -> float:
    """How long both last; each a union."""
    return total(one) + total(other) - total(union([*one, *other]))


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def plain(name: str) -> str:
    """Without what differs from layer to layer."""
    name = re.sub(r"autograd::engine::evaluate_function: ", "backward of ", name)
    return re.sub(r" (for|\().*", "", name)[:60]


class Host:
    """The ranges of one thread, nested: who encloses a moment."""

    def __init__(self, ranges: list[dict[str, Any]]) -> None:
        self.ranges = sorted(ranges, key=lambda each: (each["ts"], -each["dur"]))
        self.starts = [each["ts"] for each in self.ranges]

    def at(self, moment: float) -> list[str]:
        """The names of what encloses it, from outside."""
        last = bisect.bisect_right(self.starts, moment)
        around = [each for each in self.ranges[max(0, last - 4000) : last] if each["ts"] + each["dur"] >= moment]
        return [each["name"] for each in around if not each["name"].startswith("ProfilerStep")]


def label(stack: list[str]) -> str:
    """The widest range with a meaning, and the widest operator in it."""
    if not stack:
        return "between ranges"
    named = [name for name in stack if not name.startswith(("aten::", "cuda", "c10d"))]
    outer, inner = (named or stack)[0], (named or stack)[-1]
    return plain(outer) if outer == inner else f"{plain(outer)} > {plain(inner)}"


def table(title: str, rows: dict[str, list[float]], most: int) -> None:
    print(f"-- {title}: ms, count")
    for name, found in sorted(rows.items(), key=lambda each: -sum(each[1]))[:most]:
        print(f"   {sum(found) / 1e3:9.2f} {len(found):6d}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--most", type=int, default=22, help="rows of a table")
    options = parser.parse_args()
    tell_file(options.trace, options.most)


def tell_file(file: Path, most: int = 22) -> None:
    tell(json.loads(file.read_text())["traceEvents"], most)


def tell(events: list[dict[str, Any]], most: int) -> None:
    events = [each for each in events if each.get("ph") == "X" and "dur" in each]
    steps = [e for e in events if e["name"].startswith("ProfilerStep") and e.get("cat") == "user_annotation"]
    begin = steps[-1]["ts"] if steps else min(each["ts"] for each in events)
    end = begin + steps[-1]["dur"] if steps else max(each["ts"] + each["dur"] for each in events)
    inside = [each for each in events if begin <= each["ts"] < end]
    device = sorted((each for each in inside if each.get("cat") in ON_DEVICE), key=lambda each: each["ts"])
    host = [each for each in inside if each.get("cat") in ("cpu_op", "user_annotation")]
    calls = [each for each in inside if each.get("cat") in ("cuda_runtime", "cuda_driver")]
    threads = {
        thread: Host([each for each in host if each["tid"] == thread])
        for thread in {each["tid"] for each in host}
    }  # fmt: skip
    window = end - begin
    spans_of: dict[bool, list[Span]] = {False: [], True: []}
    by_kind: dict[str, list[float]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(list)
    for each in device:
        is_nccl = "nccl" in each["name"]
        spans_of[is_nccl].append((each["ts"], min(end, each["ts"] + each["dur"])))
        by_kind[kind_of(each["name"])].append(each["dur"])
        by_name[each["name"][:100]].append(each["dur"])
    computing, talking = union(spans_of[False]), union(spans_of[True])
    busy = union([*computing, *talking])
    print(
        f"step {window / 1e3:.1f} ms; device busy {total(busy) / window:.1%}, computing {total(computing) / window:.1%}"
    )
    print(
        f"NCCL {total(talking) / 1e3:.1f} ms, {common(computing, talking) / 1e3:.1f} of it behind computing; "
        f"{len(device)} launches on the device, {len(calls)} calls, {len(host)} ranges on the host"
    )
    table("device, by kind", by_kind, most)
    table("device, by name", by_name, most)

    # A gap ends with a launch. If that came after the gap began, the device waited for the host.
    call_of = {each["args"].get("correlation"): each for each in calls if "args" in each}
    gaps: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, list[float]] = defaultdict(list)
    reached = begin
    for each in device:
        if each["ts"] > reached:
            gap = each["ts"] - reached
            size = next(
                name for name, limit in (("< 5 us", 5), ("< 20", 20), ("< 100", 100), ("more", 1e12)) if gap < limit
            )
            sizes[size].append(gap)
            call = call_of.get(each.get("args", {}).get("correlation"))
            if call is None:
                gaps["unknown"].append(gap)
            elif call["ts"] + call["dur"] < reached:
                gaps[f"launched before: waits for a stream; then {kind_of(each['name'])}"].append(gap)
            else:
                thread = threads.get(call["tid"])
                gaps[label(thread.at(call["ts"])) if thread else "a thread without ranges"].append(gap)
        reached = max(reached, each["ts"] + each["dur"])
    table("gaps of the device, by size", sizes, most)
    table("gaps of the device, by what the host did at their end", gaps, most)

    waits: dict[str, list[float]] = defaultdict(list)
    for each in calls:
        if each["dur"] > 50:
            thread = threads.get(each["tid"])
            waits[f"{each['name']} in {label(thread.at(each['ts'])) if thread else '?'}"].append(each["dur"])
    table("host waits (calls over 50 us)", waits, most)

    for tid, thread in sorted(threads.items(), key=lambda each: -len(each[1].ranges))[:3]:
        outer: dict[str, list[float]] = defaultdict(list)
        every: dict[str, list[float]] = defaultdict(list)
        reached = begin
        for each in thread.ranges:
            if each["name"].startswith("ProfilerStep"):
                continue
            if each["ts"] >= reached:
                outer[plain(each["name"])].append(each["dur"])
                reached = each["ts"] + each["dur"]
            if each["cat"] == "user_annotation":
                every[plain(each["name"])].append(each["dur"])
        share = sum(map(sum, outer.values())) / window
        print(f"== thread {tid}: {len(thread.ranges)} ranges, {share:.1%} of the step in them")
        table("outermost ranges", outer, most)
        table("named ranges, nested ones too", every, most)


if __name__ == "__main__":
    main()
