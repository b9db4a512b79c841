"""Which fold, order, stage and recomputation a model should have on given GPUs: predicted, before anything is started.

    plan("Mixtral-8x7B-v0.1/", gpus=64, gpu="h100", tokens=4096, batch=512)

    shape        ModelShape: a model as numbers, and the weights that follow from them
    model_files  read_model: the same out of a config.json
    machine      Machine, read_machine: GPUs and links as numbers, each with its source; machines/ has those shipped
    formulas     every formula, in bytes and FLOPs, with its source
    folds        all folds of a world, the ways of rows, and the first rule that a candidate breaks
    memory       the bytes of a rank: what is held, what a step adds, and when the sum is largest
    timing       the seconds of a step, and what they consist of
    planner      plan: the walk over all candidates
    report       Plan, what comes of it, and in words: verdict, table, the lines that set it up; ``page`` draws it
    calibrate    the numbers of this machine, measured

``documents`` reads their files, ``once`` keeps what many candidates share.

Laws: what is proposed is refused neither by ``solve_layout`` nor by ``plan_fold`` nor by ``shard_model``; the weights
of a shape are those of ``plan_fold``, name by name; held bytes fall with the stage, and those of all ranks add up to
the model's; a number that was not measured says so. Planning needs no torch, no weights and no GPU.
"""

from __future__ import annotations

from foldpar.planning.folds import LeftOut, Workload
from foldpar.planning.machine import HostCost, Link, Machine, read_machine
from foldpar.planning.memory import Memory
from foldpar.planning.model_files import read_model
from foldpar.planning.planner import plan
from foldpar.planning.report import Plan, PlanError, PlanRow
from foldpar.planning.shape import LatentAttention, ModelShape, Weight
from foldpar.planning.timing import Seconds

__all__ = [
    "HostCost",
    "LatentAttention",
    "LeftOut",
    "Link",
    "Machine",
    "Memory",
    "ModelShape",
    "Plan",
    "PlanError",
    "PlanRow",
    "Seconds",
    "Weight",
    "Workload",
    "plan",
    "read_machine",
    "read_model",
]
