"""``shard_model``: FSDP2 at stages 1 to 3 trains what one process trains, and what it cannot shard it says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from parity import CONFIG, Case
from sharded_parity import History, Run, assert_equal, train_alone, train_sharded

from foldpar.testing import run_ranks

PLAIN = {"tp": 1, "ep": 1, "etp": 1, "cp": 1, "order": "tp-lane-major", "consumer": "replicated"}


@cache
def _alone(run: Run) -> History:
    history = train_alone(run)
    assert run.steps < 3 or history.losses[-1] < 0.97 * history.losses[0], f"the loss must fall: {history.losses}"
    assert max(history.norms) > run.max_norm, "clipping must bite"
    return history


def alone(run: Run) -> History:
    """One process knows only how many data ranks there are."""
    return _alone(replace(run, case=replace(run.case, world=run.case.data_ranks, **PLAIN)))


def assert_equal_to_one_process(run: Run, stages: list[int], tolerance: float = 1e-11, **options: object) -> None:
    results = run_ranks(_train, run.case.world, run, stages, alone(run), options, timeout=120.0)
    assert_equal(results, alone(run), tolerance)


def _train(run: Run, stages: list[int], history: History, options: dict[str, object]) -> object:
    return train_sharded(run, stages, history, **options)


FLOAT32 = {"dtype": torch.float32}
FEW = [
    # tp, ep, etp, cp and the stages; edp is 1, 2 and 4, and (0 2 1 3) in the third, whose three experts are cut along
    # another dimension, as in the last, which etp has cut too
    (Case(4, 2, 4), [3]),
    (Case(4, 2, 2), [1, 2]),
    (Case(4, 2, 1, config=replace(CONFIG, experts=3)), [3]),
    (Case(4, 2, 1, 2, order="consecutive"), [2]),
    (Case(4, 2, 2, 1, 2, consumer="vocabulary"), [1]),
    (Case(4, 2, 1, 2, config=replace(CONFIG, experts=3)), [2, 3]),
]


@pytest.mark.parametrize(("case", "stages"), FEW, ids=str)
def test_some_steps_equal_one_process(case: Case, stages: list[int]) -> None:
    assert_equal_to_one_process(Run(case, steps=3), stages)


@pytest.mark.long
def test_eight_ranks_equal_one_process() -> None:
    assert_equal_to_one_process(Run(Case(8, 2, 2, 2), steps=2), [3])


MORE_HYBRID = [
    (Case(8, *shape, order=order), replicas)
    for shape in ((1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 4, 2), (4, 1, 1), (1, 2, 2))
    for order in (("tp-lane-major", "consecutive") if shape[0] > 1 else ("tp-lane-major",))
    for replicas in (2, 4)
    if max(8 // shape[0], 8 // shape[1] // shape[2]) > replicas
]


def test_replicas_of_shards_equal_one_process() -> None:
    """Without momentum: on four dimensions of a mesh torch thinks long about each operation that is new to it."""
    assert_equal_to_one_process(Run(Case(4, 1, 1), steps=3, momentum=0.0), [3], replicas=2)


@pytest.mark.long
@pytest.mark.parametrize(("case", "replicas"), MORE_HYBRID, ids=str)
def test_replicas_of_shards_equal_one_process_in_every_layout(case: Case, replicas: int) -> None:
    assert_equal_to_one_process(Run(case, steps=3), [1, 2, 3], replicas=replicas)


@pytest.mark.long
def test_float32_equals_one_process() -> None:
    assert_equal_to_one_process(Run(Case(4, 2, 2, **FLOAT32), steps=3), [3], tolerance=1e-5)


ORDERS = ("tp-lane-major", "consecutive")
SHAPES = [
    *((4, shape) for shape in ((2, 4, 1), (4, 4, 1), (2, 2, 1), (2, 1, 1), (2, 2, 2), (2, 1, 2), (4, 1, 1), (1, 2, 1))),
    *((8, shape) for shape in ((2, 2, 2), (4, 4, 1), (2, 4, 1))),
]
MANY = [
    Case(world, *shape, order=order) for world, shape in SHAPES for order in (ORDERS if shape[0] > 1 else ORDERS[:1])
]


TEN_STEPS = [*MANY, Case(4, 2, 2, 1, 2)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "optimizer"),
    [(case, "sgd") for case in TEN_STEPS]
    + [(case, optimizer) for case in TEN_STEPS[::3] for optimizer in ("adamw", "adamw-foreach")],
    ids=str,
)
def test_ten_steps_equal_one_process(case: Case, optimizer: str) -> None:
    assert_equal_to_one_process(Run(case, optimizer), [0, 1, 2, 3])


@pytest.mark.long
@pytest.mark.parametrize("case", [replace(case, **FLOAT32) for case in MANY[::2]], ids=str)
def test_ten_steps_in_float32(case: Case) -> None:
    assert_equal_to_one_process(Run(case), [0, 1, 2, 3], tolerance=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("blocks", ["none", "no prefetch"])
def test_other_units_train_the_same(blocks: str) -> None:
    options = {"blocks": []} if blocks == "none" else {"prefetch": False}
    assert_equal_to_one_process(Run(Case(4, 2, 1), steps=3), [1, 2, 3], **options)


@pytest.mark.long
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="DTensor before torch 2.13 cannot view a batch of no tokens")
def test_a_data_rank_without_tokens_still_steps() -> None:
    assert_equal_to_one_process(Run(Case(4, 2, 2, empty=(1,)), steps=3), [1, 2, 3])


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_on_gpus(world: int) -> None:
    if world > torch.cuda.device_count():
        pytest.skip(f"needs {world} CUDA devices, and this machine has {torch.cuda.device_count()}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    root = Path(__file__).parents[2]
    subprocess.run([*command, "tests/gpu/run.py", "sharding"], cwd=root, check=True, timeout=500)
