"""The suite ``peft``: gradients of LoRA adapters equal one process, whatever comes first, at several stages."""

from __future__ import annotations

import warnings
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from run import Runner

if TYPE_CHECKING:
    from peft_cases import Case

FOLDS = [(2, 2, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)]


def cases(world: int) -> list[Case]:
    from peft_cases import Case

    return [
        Case(world=world, tp=tp, ep=ep, etp=etp, stage=stage, first=first)
        for tp, ep, etp in FOLDS
        for first in ("fold", "peft")
        for stage in (0, 2, 3)
    ]


def check(case: Case) -> None:
    from peft_cases import differences, one_process

    values, want = one_process(case)
    found = differences(case, values, want)
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1e-9, f"{worst} is off by {found[worst]:.1e}"


def main(runner: Runner) -> None:
    if not runner.has_ranks("peft", 2, 4):
        return
    if find_spec("peft") is None:
        runner.leave_out("peft is not installed")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        before = torch.get_default_device()
        torch.set_default_device(runner.device)
        for case in cases(runner.world):
            runner.check(case, partial(check, case))
        torch.set_default_device(before)
