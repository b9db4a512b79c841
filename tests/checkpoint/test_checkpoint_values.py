"""What is given beside tensors comes back as it was: extra, schedulers for any parameter groups, random numbers."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lr
from transformers import optimization

from foldpar.checkpoint import load_checkpoint, save_checkpoint
from foldpar.checkpoint.values import decode, encode
from foldpar.errors import CheckpointError

# -- extra ------------------------------------------------------------------------------------------------------------

KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.binary(), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(
    st.one_of(KEYS, st.floats(allow_nan=False), st.complex_numbers(allow_nan=False), st.integers(-(10**300), 10**300)),
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner),
        st.dictionaries(st.sampled_from(["$python", "of"]), inner),
        st.dictionaries(KEYS, inner).map(OrderedDict),
        st.sets(KEYS),
        st.frozensets(KEYS),
        st.dictionaries(KEYS, st.integers()).map(Counter),
    ),
    max_leaves=12,
)


def typed(value: Any) -> Any:
    """A value with the types of all that is in it, in order."""
    if isinstance(value, dict):
        return type(value), [(typed(key), typed(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [typed(each) for each in value]
    return type(value), repr(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)


@given(VALUES)
def test_plain_values_come_back_equal_and_of_the_same_types(value):
    assert typed(decode(encode(value, "extra"))) == typed(value)


def test_they_come_back_through_a_checkpoint(tmp_path, groups):
    value = {
        3: (1, 2),
        "nan": float("nan"),
        "inf": -float("inf"),
        "zero": -0.0,
        "sets": [{1}, frozenset("a")],
        None: b"\0",
    }
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "c", model, None, groups, extra=value)
    assert typed(load_checkpoint(tmp_path / "c", model, None, groups).extra) == typed(value)


class Odd(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (torch.zeros(2), "Tensor at extra is"),
        ({"a": [1, {"b": torch.zeros(1)}]}, "Tensor at extra['a'][1]['b'] is"),
        ({"a": (numpy.float64(1),)}, "float64 at extra['a'][0] is"),
        ({1: {2: numpy.zeros(1)}}, "ndarray at extra[1][2] is"),
        ([Odd()], "Odd at extra[0] is"),
        ({(1, object): 2}, "type at extra's key (1, <class 'object'>)[1] is"),
        ({"path": Path("a")}, "PosixPath at extra['path'] is"),
        ({"f": len}, "builtin_function_or_method at extra['f'] is"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_place(tmp_path, groups, value, where):
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "c", nn.Linear(2, 2), None, groups, extra=value)
    assert f"extra cannot be written as JSON: Object of type {where} no plain Python value" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_holds_itself_and_what_is_too_large(tmp_path, groups):
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CheckpointError, match="is nested more than 100 deep, or holds itself"):
        encode(endless, "extra")
    with pytest.raises(CheckpointError, match=r"extra\['n'\] is an integer of more than 4000 digits"):
        encode({"n": 10**5000}, "extra")
    for stranger in ({"$python": "system", "of": []}, {"$python": "tuple"}, {"$python": ["x"], "of": [1]}):
        with pytest.raises(CheckpointError, match=r"foldpar\.json holds a value that no save wrote"):
            decode(stranger)


# -- Schedulers -------------------------------------------------------------------------------------------------------

Make = Callable[[torch.optim.Optimizer], Any]


class Warm:
    """A callable with a state, which LambdaLR saves."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, step: int) -> float:
        self.seen += 1
        return 1 / (1 + step)


MAKE: dict[str, Make] = {
    "LambdaLR": lambda of: lr.LambdaLR(of, lambda step: 0.9**step),
    "LambdaLR of objects": lambda of: lr.LambdaLR(of, [Warm() for _ in of.param_groups]),
    "MultiplicativeLR": lambda of: lr.MultiplicativeLR(of, lambda _: 0.8),
    "StepLR": lambda of: lr.StepLR(of, 2),
    "MultiStepLR": lambda of: lr.MultiStepLR(of, [3, 3, 6]),
    "ConstantLR": lambda of: lr.ConstantLR(of, 0.5, 3),
    "LinearLR": lambda of: lr.LinearLR(of, 0.1, total_iters=6),
    "ExponentialLR": lambda of: lr.ExponentialLR(of, 0.9),
    "PolynomialLR": lambda of: lr.PolynomialLR(of, 9),
    "CosineAnnealingLR": lambda of: lr.CosineAnnealingLR(of, 5),
    "CosineAnnealingWarmRestarts": lambda of: lr.CosineAnnealingWarmRestarts(of, 3),
    "CyclicLR": lambda of: lr.CyclicLR(of, 0.01, [0.1 * (n + 1) for n in range(len(of.param_groups))], 3),
    "OneCycleLR": lambda of: lr.OneCycleLR(of, 0.5, total_steps=20),
    "ReduceLROnPlateau": lambda of: lr.ReduceLROnPlateau(of, patience=1, factor=0.5),
    "ChainedScheduler": lambda of: lr.ChainedScheduler([lr.StepLR(of, 2), lr.ExponentialLR(of, 0.9)]),
    "SequentialLR": lambda of: lr.SequentialLR(
        of, [lr.LinearLR(of, 0.1, total_iters=3), lr.MultiStepLR(of, [2, 4]), lr.LambdaLR(of, Warm())], [3, 6]
    ),
    "swa": lambda of: torch.optim.swa_utils.SWALR(of, swa_lr=0.01),
    **{
        f"transformers {name}": lambda of, name=name: optimization.get_scheduler(name, of, 2, 12)
        for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
    },
    "transformers inverse_sqrt": lambda of: optimization.get_scheduler("inverse_sqrt", of, 2),
    "transformers reduce": lambda of: optimization.get_scheduler("reduce_lr_on_plateau", of),
    "transformers warmup_stable_decay": lambda of: optimization.get_wsd_schedule(of, 2, 4, num_stable_steps=3),
}


def model_and_optimizer(split: Any, rates: tuple[float, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Parameter groups that differ as they do between layouts: ``split`` lists the parameters of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = dict(model.named_parameters())
    options = [
        {"params": [names[name] for name in group], "lr": rate} for group, rate in zip(split, rates, strict=True)
    ]
    return model, torch.optim.SGD(options, lr=0.1, momentum=0.9)


WEIGHTS, BIASES = ["0.weight", "1.weight"], ["0.bias", "1.bias"]
SPLITS: list[tuple[Any, tuple[float, ...]]] = [
    ([WEIGHTS, BIASES], (0.02, 0.04)),
    ([["1.bias"], ["0.weight"], ["1.weight"], ["0.bias"]], (0.04, 0.02, 0.02, 0.04)),
]


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[each]: float(group["lr"]) for group in optimizer.param_groups for each in group["params"]}


def stepped(optimizer: torch.optim.Optimizer, scheduler: Any, model: nn.Module, steps: range) -> list[dict[str, float]]:
    found = []
    for step in steps:
        optimizer.step()
        scheduler.step(*([1.0 + step] if isinstance(scheduler, lr.ReduceLROnPlateau) else []))
        found.append(rates_of(optimizer, model))
    return found


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_every_scheduler_goes_on_with_any_parameter_groups(tmp_path, groups, name):
    first, second = SPLITS
    if name == "CyclicLR":  # its range is given by group
        second = first[0][::-1], first[1][::-1]
    model, optimizer = model_and_optimizer(*first)
    scheduler = MAKE[name](optimizer)
    unbroken = stepped(optimizer, scheduler, model, range(8))
    for number, (saved, loaded) in enumerate([(first, second), (second, first)]):
        if name == "CyclicLR" and number:
            continue
        model, optimizer = model_and_optimizer(*saved)
        scheduler = MAKE[name](optimizer)
        before = stepped(optimizer, scheduler, model, range(4))
        path = tmp_path / str(number)
        save_checkpoint(path, model, optimizer, groups, step=4, schedulers=scheduler)
        model, optimizer = model_and_optimizer(*loaded)
        scheduler = MAKE[name](optimizer)
        load_checkpoint(path, model, optimizer, groups, schedulers=scheduler)
        after = stepped(optimizer, scheduler, model, range(4, 8))
        for got, want in zip([*before, *after], unbroken, strict=True):
            assert got == pytest.approx(want, rel=1e-12), name


def test_schedulers_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path, groups):
    model, optimizer = model_and_optimizer(*SPLITS[0])
    save_checkpoint(tmp_path / "without", model, optimizer, groups)
    save_checkpoint(tmp_path / "with", model, optimizer, groups, schedulers=lr.StepLR(optimizer, 2, gamma=0.5))
    before = model[0].weight.detach().clone()
    for path, schedulers, text in [
        ("without", [lr.StepLR(optimizer, 2)], "the checkpoint holds no schedulers: load it without"),
        (
            "with",
            [lr.ExponentialLR(optimizer, 2)],
            "it was saved with the schedulers StepLR, and these are Exponential",
        ),
        ("with", [lr.StepLR(optimizer, 2)] * 2, "with the schedulers StepLR, and these are StepLR, StepLR"),
        ("with", [7], "schedulers holds a int, which has no state_dict"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            load_checkpoint(tmp_path / path, model, optimizer, groups, schedulers=schedulers)
    with pytest.raises(CheckpointError, match="schedulers are saved and loaded with their optimizer"):
        save_checkpoint(tmp_path / "c", model, None, groups, schedulers=lr.StepLR(optimizer, 2))
    joined, one = model_and_optimizer([[*WEIGHTS, *BIASES]], (0.1,))
    with pytest.raises(
        CheckpointError, match=r"joins 0.weight and 0.bias, for which schedulers\[0\]\['base_lrs'\] was"
    ):
        load_checkpoint(tmp_path / "with", joined, one, groups, schedulers=lr.StepLR(one, 2))
    odd = lr.LambdaLR(optimizer, [Warm(), Warm()])
    odd.lr_lambdas[0].seen = torch.zeros(3)
    with pytest.raises(
        CheckpointError, match=r"Tensor at schedulers\[0\]\.state_dict\(\)\['lr_lambdas'\]\[0\]\['seen'\]"
    ):
        save_checkpoint(tmp_path / "c", model, optimizer, groups, schedulers=odd)
    assert torch.equal(before, model[0].weight)


def test_extra_takes_a_schedulers_state_as_it_is(tmp_path, groups):
    model, optimizer = model_and_optimizer(*SPLITS[0])
    scheduler = lr.MultiStepLR(optimizer, [3, 6])
    stepped(optimizer, scheduler, model, range(2))
    save_checkpoint(tmp_path / "c", model, optimizer, groups, extra=scheduler.state_dict())
    assert typed(load_checkpoint(tmp_path / "c", model, optimizer, groups).extra) == typed(scheduler.state_dict())


# -- Random numbers ---------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.rand()),
        float(numpy.random.randn()),
        float(torch.rand(1)),
    ]


def test_random_states_come_back_or_stay(tmp_path, groups):
    model = nn.Linear(2, 2)
    random.gauss(0, 1), numpy.random.randn()  # each keeps a second number for the next time
    save_checkpoint(tmp_path / "c", model, None, groups)
    numbers = draw()
    assert load_checkpoint(tmp_path / "c", model, None, groups).random_state == "restored"
    assert draw() == numbers
    state = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    average = nn.Linear(2, 2)
    state = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    info = load_checkpoint(tmp_path / "c", average, None, groups, random_state=False)
    assert info.random_state == "left as it was" and torch.equal(average.weight, model.weight)
    assert state[0] == random.getstate() and torch.equal(state[1], torch.get_rng_state())
    assert state[2] == numpy.random.get_state()[1].tolist()
