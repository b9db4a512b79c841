"""The suites that need GPUs, over NCCL: every rank is a process of torchrun.

    torchrun --nproc-per-node 2 tests/gpu/run.py                            # every suite
    torchrun --nproc-per-node 4 tests/gpu/run.py parity sharding            # some of them
    torchrun --nproc-per-node 2 tests/gpu/run.py onesided --shapes 200
    torchrun --nproc-per-node 4 tests/gpu/run.py parity checkpoint --cpu    # a rehearsal over Gloo

Prints a line per case and a count per suite; exits with 1 if a case fails. With fewer GPUs than ranks, ranks share a
GPU and messages go over Gloo: one-sided rows alone have a meaning then. With one rank, ``kernels``, ``small``
and a part of ``onesided`` run; the others say what they need. ``tests/gpu/test_gpu.py`` runs it on a machine with GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

SUITES = ("parity", "sharding", "checkpoint", "onesided", "kernels", "small", "peft")


class Runner:
    """Runs cases on all ranks and counts them. A suite is a module ``gpu_NAME`` with ``main(runner)``.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal.
        world: ranks of the job.
        shapes: how many random shapes the suite draws, if it draws any.
    """

    def __init__(self, device: str, shapes: int) -> None:
        self.device, self.shapes = device, shapes
        self.world, self.gpus = int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
        self.passed = self.failed = 0
        if device == "cpu":
            dist.init_process_group("gloo")
        elif self.gpus >= self.world:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl")
        else:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % self.gpus)
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
            dist.init_process_group("gloo")

    def say(self, passed: bool, *words: object) -> None:
        """Count a case on which all ranks agree."""
        self.passed, self.failed = self.passed + passed, self.failed + (not passed)
        if dist.get_rank() == 0:
            print("ok    " if passed else "FAILED", *words, flush=True)

    def check(self, name: object, case: Callable[[], None]) -> None:
        """A case passes if it raises nothing on any rank."""
        error = ""
        try:
            case()
        except Exception:
            error = traceback.format_exc()
        errors = [""] * self.world
        dist.all_gather_object(errors, error)
        self.say(not any(errors), name, *filter(None, errors))

    def has_ranks(self, suite: str, *numbers: int) -> bool:
        """Whether the suite runs with so many ranks; else it is left out, and told what it needs."""
        if self.world not in numbers:
            self.leave_out(f"{suite} needs {' or '.join(map(str, numbers))} ranks, and is run with {self.world}")
        return self.world in numbers

    def leave_out(self, why: str) -> None:
        """A suite that cannot run here; none of its cases counts as passed."""
        if dist.get_rank() == 0:
            print("left out:", why, flush=True)

    def count(self, suite: str, seconds: float) -> None:
        if dist.get_rank() == 0:
            where = "CPU" if self.device == "cpu" else f"{min(self.gpus, self.world)} x {torch.cuda.get_device_name()}"
            print(
                f"{suite}: {self.passed} passed, {self.failed} failed on {self.world} ranks, {where}, "
                f"torch {torch.__version__}, {seconds:.0f} s",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all of them if none")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal over Gloo")
    parser.add_argument("--shapes", type=int, default=20, help="how many random shapes on top of the fixed ones")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    runner, failed = Runner("cpu" if options.cpu else "cuda", options.shapes), 0
    for suite in options.suites or SUITES:
        start, runner.passed, runner.failed = time.monotonic(), 0, 0
        import_module(f"gpu_{suite}").main(runner)
        runner.count(suite, time.monotonic() - start)
        failed += runner.failed
    dist.destroy_process_group()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
