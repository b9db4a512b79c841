"""What does not fit is found before anything is touched, on every rank, and said in one error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import everything, refused, same, sealed
from checkpoint_killer import trained
from torch import nn

import foldpar
from foldpar.checkpoint import dcp as checkpoint_dcp
from foldpar.checkpoint import latest_checkpoint, load_checkpoint, save, save_checkpoint
from foldpar.checkpoint.manifest import Manifest
from foldpar.errors import CheckpointError
from foldpar.families import DENSE_SHARDED, REPLICATED
from foldpar.parameters.boxes import Share
from foldpar.testing import run_ranks

solve = foldpar.solve_layout


@pytest.fixture
def saved(original, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "runs" / "step-9"))


# -- Another model or optimizer ---------------------------------------------------------------------------------------


def more_experts(groups: foldpar.FoldedGroups) -> nn.Module:
    model = trained(groups, 0)[0]
    model.experts = foldpar.GroupedExperts(8, 8, 16, groups)
    return model


def wider(groups: foldpar.FoldedGroups) -> nn.Module:
    model = trained(groups, 0)[0]
    model.dense = nn.Linear(16, 20)
    return model


def renamed(groups: foldpar.FoldedGroups) -> nn.Module:
    model = trained(groups, 0)[0]
    model.projection = model.dense
    del model.dense
    return model


def half(groups: foldpar.FoldedGroups) -> nn.Module:
    return trained(groups, 0)[0].bfloat16()


def with_a_buffer(groups: foldpar.FoldedGroups) -> nn.Module:
    model = trained(groups, 0)[0]
    model.register_buffer("count", torch.zeros(3))
    return model


@pytest.mark.parametrize(
    ("build", "texts"),
    [
        (more_experts, ["experts.gate_up_proj has 4 experts in the checkpoint and 8 in the model"]),
        (wider, ["dense.weight is [16, 16] in the checkpoint and [20, 16] in the model", "dense.bias is [16] in the"]),
        (
            renamed,
            [
                "the model has what the checkpoint does not: projection.weight, projection.bias",
                "the checkpoint has what the model does not: dense.weight, dense.bias",
            ],
        ),
        (half, ["dense.weight is float32 in the checkpoint and bfloat16 in the model: pass cast=True to convert"]),
        (with_a_buffer, ["the model has what the checkpoint does not: count"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_model(original, groups, build, texts):
    text = refused(original, build(groups), None, groups)
    assert text.startswith(f"{original} does not fit. Nothing was loaded.\n    ")
    for part in texts:
        assert f"\n    {part}" in text


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def of_one_parameter(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([model.dense.weight])


def of_another_model(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.zeros(5))])


@pytest.mark.parametrize(
    ("build", "texts"),
    [
        (
            adam,
            ["with the optimizer AdamW, and this is Adam, whose states mean something else", "optimizer=None"],
        ),
        (
            of_one_parameter,
            ["parameters that were optimized are not given to this optimizer: dense.bias, experts.gate_up_proj"],
        ),
        (of_another_model, ["the optimizer's group 0 holds a parameter that the model does not have"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_optimizer(original, groups, build, texts):
    model = trained(groups, 0)[0]
    text = refused(original, model, build(model), groups)
    for part in texts:
        assert part in text


def test_options_that_parameters_of_a_group_do_not_share(groups, tmp_path):
    model = trained(groups, 0)[0]
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": others}], lr=0.25)
    save_checkpoint(tmp_path / "c", model, optimizer, groups)
    text = refused(tmp_path / "c", model, torch.optim.SGD(model.parameters(), lr=1.0), groups)
    assert "group 0 of the optimizer joins parameters that were saved with different options: lr is 0.5 for" in text
    assert "dense.weight and 0.25 for dense.bias. Make the parameter groups as they were" in text
    save_checkpoint(tmp_path / "frozen", model, torch.optim.SGD(others), groups)
    text = refused(tmp_path / "frozen", model, torch.optim.SGD(model.parameters()), groups)
    assert "this optimizer holds parameters that were not optimized: dense.weight" in text


def test_a_checkpoint_without_an_optimizer(groups, tmp_path):
    model, optimizer = trained(groups, 0)
    save_checkpoint(tmp_path / "c", model, None, groups)
    assert "the checkpoint holds no optimizer: load it with optimizer=None" in refused(
        tmp_path / "c", model, optimizer, groups
    )
    info = load_checkpoint(tmp_path / "c", model, None, groups)
    assert (info.optimizer, info.step, info.extra) == (None, None, None)


# -- Files ------------------------------------------------------------------------------------------------------------


def flip(file: Path, at: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


def data_of(file: Path, needle: bytes) -> int:
    return file.read_bytes().index(needle)


def change(page: Path, **values: Any) -> None:
    page.write_text(json.dumps({**json.loads(page.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "texts"),
    [
        (
            lambda path: (path / "__0_0.distcp").unlink(),
            ["is damaged: __0_0.distcp is missing. Nothing was loaded"],
        ),
        (
            lambda path: (path / ".metadata").unlink(),
            [".metadata is missing", "latest_checkpoint(folder) finds"],
        ),
        (
            lambda path: (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-9]),
            ["__0_0.distcp has ", " bytes instead of "],
        ),
        (lambda path: (path / "foldpar.json").unlink(), ["is no complete checkpoint: it has no foldpar.json"]),
        (
            lambda path: (path / "foldpar.json").write_bytes((path / "foldpar.json").read_bytes()[:500]),
            ["foldpar.json is damaged: it is no complete JSON document"],
        ),
        (lambda path: change(path / "foldpar.json", step=10), ["do not have the SHA-256 sum that it names"]),
        (
            lambda path: sealed(path / "foldpar.json", format=2, foldpar="9.1"),
            ["has format 2, written by foldpar 9.1; this foldpar reads formats up to 1", "or a newer one"],
        ),
        (
            lambda path: sealed(path / "foldpar.json", layout={"world": 3, "tp": 2}),
            ["lacks a field or has one"],
        ),
        (
            lambda path: path.rename(path.with_name("step-9.incomplete")),
            ["not completed: only step-9.incomplete is"],
        ),
        (shutil.rmtree, ["step-9 is no complete checkpoint: there is nothing at that path"]),
    ],
    ids=[
        "no-data",
        "no-metadata",
        "truncated",
        "no-page",
        "torn-page",
        "flipped-page",
        "newer",
        "other",
        "moved",
        "gone",
    ],
)
def test_files_that_are_not_whole_are_refused_and_passed_over(saved, groups, spoil, texts):
    older = shutil.copytree(saved, saved.parent / "older")
    sealed(older / "foldpar.json", time=1.0)
    assert latest_checkpoint(saved.parent) == saved
    spoil(saved)
    text = refused(saved, *trained(groups, 0), groups)
    for part in texts:
        assert part in text
    assert latest_checkpoint(saved.parent) == older
    assert latest_checkpoint(saved.parent / "nowhere") is None


def test_a_flipped_byte_is_found_by_verifying_and_only_so(saved, groups):
    model = trained(groups, 1)[0]
    needle = next(model.parameters()).detach().numpy().tobytes()[:32]
    flip(saved / "__0_0.distcp", data_of(saved / "__0_0.distcp", needle) + 2)
    text = refused(saved, *trained(groups, 0), groups, verify=True)
    assert "step-9 is damaged: __0_0.distcp has another SHA-256 sum than when it was written" in text
    other, optimizer = trained(groups, 0)
    load_checkpoint(saved, other, optimizer, groups)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


def broken_archive(path: Path) -> None:
    """A file of the right size with a tensor in it that cannot be unpacked: the last one."""
    file = path / "__0_0.distcp"
    data = file.read_bytes()
    at = data.rindex(b"PK\x03\x04")
    file.write_bytes(data[:at] + b"\0" * (len(data) - at))


def test_an_error_while_reading_says_in_which_state_things_are(saved, groups):
    broken_archive(saved)
    model, optimizer = trained(groups, 0)
    text = refused(saved, model, optimizer, groups, staged=True)
    assert f"Reading {saved} failed on 1 rank(s), rank 0: " in text
    assert text.endswith("The model and the optimizer are as they were.")
    with pytest.raises(CheckpointError, match=r"are in an undefined state, .* staged=True would have left them"):
        load_checkpoint(saved, model, optimizer, groups)


def test_staged_loading_loads_the_same(original, groups):
    want, want_optimizer = trained(groups, 1)
    model, optimizer = trained(groups, 0)
    load_checkpoint(original, model, optimizer, groups, staged=True)
    assert same(everything(model, optimizer), everything(want, want_optimizer))


def test_a_page_says_again_what_it_said(original):
    text = (original / "foldpar.json").read_bytes()
    assert Manifest.from_bytes(text, "here").to_bytes() == text


# -- What cannot be saved ---------------------------------------------------------------------------------------------


def test_what_is_there_is_not_written_over(saved, groups):
    digest = (saved / "foldpar.json").read_bytes()
    with pytest.raises(CheckpointError, match="is a complete checkpoint, and a checkpoint is never written over"):
        save_checkpoint(saved, *trained(groups, 0), groups)
    assert (saved / "foldpar.json").read_bytes() == digest
    taken = saved.parent / "taken"
    taken.write_text("mine")
    with pytest.raises(CheckpointError, match="taken exists and is no checkpoint"):
        save_checkpoint(taken, *trained(groups, 0), groups)
    leftover = saved.parent / "next.incomplete"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_text("old")
    (leftover / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds files that no save of foldpar wrote, which are not removed"):
        save_checkpoint(saved.parent / "next", *trained(groups, 0), groups)
    assert (leftover / "notes.txt").read_text() == "mine"
    (saved.parent / "empty").mkdir()
    save_checkpoint(saved.parent / "empty", *trained(groups, 0), groups, step=10)
    assert latest_checkpoint(saved.parent) == saved.parent / "empty"


def extra_of_rank(groups: foldpar.FoldedGroups, path: Path) -> None:
    save_checkpoint(path, *trained(groups, 0), groups, extra={"rank": groups.rank})


def other_model_on_a_rank(groups: foldpar.FoldedGroups, path: Path) -> None:
    model = trained(groups, 0)[0]
    if groups.rank == 0:
        model.dense = nn.Linear(16, 12)
    save_checkpoint(path, model, None, groups)


def shares_that_overlap(groups: foldpar.FoldedGroups, path: Path) -> None:
    model = trained(groups, 0)[0]
    model.dense = foldpar.mark_parameters(nn.Linear(16, 8, bias=False), DENSE_SHARDED)
    model.dense.parameter_shares = lambda: {"weight": Share.whole((16, 16)).cut(0, 2, 0)}
    save_checkpoint(path, model, None, groups)


def one_rank_fails(groups: foldpar.FoldedGroups, path: Path) -> None:
    model = trained(groups, 0)[0].to("meta") if groups.rank == 1 else trained(groups, 0)[0]
    save_checkpoint(path, model, None, groups)


def loads_another_model_on_one_rank(groups: foldpar.FoldedGroups, path: Path) -> None:
    model = trained(groups, 0)[0]
    save_checkpoint(path, model, None, groups)
    if groups.rank == 1:
        model.dense = nn.Linear(16, 12)
    before = everything(model, None)
    try:
        load_checkpoint(path, model, None, groups)
    finally:
        assert same(before, everything(model, None))


def factored_states(groups: foldpar.FoldedGroups, path: Path) -> None:
    model, optimizer = trained(groups, 0)
    optimizer.state[model.experts.down_proj]["row"] = torch.zeros(2)
    save_checkpoint(path, model, optimizer, groups)


def same_names_in_two_stages(groups: foldpar.FoldedGroups, path: Path) -> None:
    model = foldpar.mark_parameters(nn.Sequential(nn.Linear(2, 2)), REPLICATED)
    save_checkpoint(path, model, None, groups)


def gathered(groups: foldpar.FoldedGroups) -> list[int]:
    ranks = [0] * groups.layout.world
    dist.all_gather_object(ranks, groups.rank)
    return ranks


def error_on_rank(case: Callable[..., None], layout: foldpar.FoldedLayout, path: Path) -> str:
    with foldpar.create_groups(layout) as groups:
        with pytest.raises(CheckpointError) as caught:
            case(groups, path)
        assert dist.get_world_size() == len(gathered(groups))  # still in step
        return str(caught.value)


@pytest.mark.parametrize(
    ("case", "layout", "texts"),
    [
        (
            extra_of_rank,
            solve(2, ep=2),
            [["c: ranks were given different arguments: extra differs between rank 0 and rank 1"]],
        ),
        (
            other_model_on_a_rank,
            solve(2, ep=2),
            [["Rank 0 and rank 1 of one pipeline stage have different parameters", "Build the same model"]],
        ),
        (
            shares_that_overlap,
            solve(2, tp=2),
            [["the ranks' parts do not make up whole tensors", "parameter_shares"]],
        ),
        (
            one_rank_fails,
            solve(2, ep=2),
            [
                ["rank 1 failed: dense.weight is on the meta device"],
                ["dense.weight is on the meta device and has no memory", "model.to_empty(device=...)"],
            ],
        ),
        (
            loads_another_model_on_one_rank,
            solve(2, ep=2),
            [["dense.weight is [16, 16] in the checkpoint and [12, 16] in the model", "Nothing was loaded"]],
        ),
        (factored_states, solve(2, ep=2), [["state 'row' of experts.down_proj has the shape [2]", "optimizer=None"]]),
        (
            same_names_in_two_stages,
            solve(2, pp=2),
            [["0.weight is in pipeline stage 0 and in stage 1. A checkpoint knows tensors by name", "blocks.7"]],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_rank_raises_and_stays_in_step(tmp_path, case, layout, texts):
    found = run_ranks(error_on_rank, layout.world, case, layout, tmp_path / "c")
    for rank, text in enumerate(found):
        for part in texts[min(rank, len(texts) - 1)]:
            assert part in text, rank
    assert case is loads_another_model_on_one_rank or not list(tmp_path.iterdir())


def test_arguments_that_cannot_be(groups, tmp_path):
    model, optimizer = trained(groups, 0)
    for options, text in [
        (
            {"extra": {"a": torch.zeros(2)}},
            r"extra cannot be written as JSON: Object of type Tensor at extra\['a'\] .* It can hold",
        ),
        ({"step": 1.5}, r"step = 1\.5 is not an integer\. Other things to remember go into extra"),
        ({"step": True}, "step = True is not an integer"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            save_checkpoint(tmp_path / "c", model, optimizer, groups, **options)
    with pytest.raises(ValueError, match="piece_bytes = 0 must be positive"):
        save_checkpoint(tmp_path / "c", model, optimizer, groups, piece_bytes=0)
    optimizer.param_groups[0]["schedule"] = object()
    with pytest.raises(CheckpointError, match=r"The optimizer's 'schedule' is a object, which foldpar\.json cannot"):
        save_checkpoint(tmp_path / "c", model, optimizer, groups)
    with pytest.raises(CheckpointError, match=r"parameter of shape \[3, 2\] that the model does not have"):
        save_checkpoint(tmp_path / "c", model, torch.optim.SGD(nn.Linear(2, 3).parameters()), groups)
    assert not list(tmp_path.iterdir())


def one_saves_while_another_loads(groups: foldpar.FoldedGroups, path: Path) -> None:
    model, optimizer = trained(groups, 0)
    if groups.rank == 0:
        save_checkpoint(path, model, optimizer, groups)
    else:
        load_checkpoint(path, model, optimizer, groups)


def one_loads_while_another_saves(groups: foldpar.FoldedGroups, path: Path) -> None:
    model, optimizer = trained(groups, 0)
    if groups.rank == 1:
        save_checkpoint(path, model, optimizer, groups)
    else:
        load_checkpoint(None, model, optimizer, groups)


@pytest.mark.parametrize(
    ("case", "verbs"),
    [(one_saves_while_another_loads, ("saving", "loading")), (one_loads_while_another_saves, ("loading", "saving"))],
)
def test_one_rank_that_saves_while_another_loads(tmp_path, case, verbs):
    first, second = verbs
    for text in run_ranks(error_on_rank, 2, case, solve(2, ep=2), tmp_path / "c"):
        assert f"ranks do different things: rank 0 is {first}, and rank 1 is {second}. Call the same functions" in text
    assert not list(tmp_path.iterdir())


def interrupted_on_a_rank(path: Path, rank: int, where: str) -> str:
    """Ctrl-C on one rank: the others are told at once, nothing is left, and the next save succeeds."""
    with foldpar.create_groups(solve(2, ep=2)) as groups:
        model, optimizer = trained(groups, 0)
        main = groups.rank == rank

        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        def act() -> None:
            if where == "load":
                load_checkpoint(path.with_name("old"), model, optimizer, groups, staged=True)
            else:
                save_checkpoint(path, model, optimizer, groups)

        with pytest.MonkeyPatch.context() as patch:
            if main and where == "load":
                patch.setattr(checkpoint_dcp.StoredTensors, "read", interrupted)
            elif main:
                patch.setattr(save if where == "publish" else checkpoint_dcp.Writing, where, interrupted)
            with pytest.raises(KeyboardInterrupt if main else CheckpointError) as caught:
                act()
        assert len(gathered(groups)) == 2  # still in step
        assert not path.exists()
        save_checkpoint(path, model, optimizer, groups)
        return str(caught.value)


@pytest.mark.parametrize(
    ("where", "rank"), [("write", 1), ("write", 0), ("finish", 0), ("publish", 0), ("load", 1)], ids=str
)
def test_ctrl_c_at_any_moment(tmp_path, where, rank):
    run_ranks(saved_by_two, 2, tmp_path / "old")
    texts = run_ranks(interrupted_on_a_rank, 2, tmp_path / "c", rank, where)
    assert texts[rank] == "" and "KeyboardInterrupt" in texts[1 - rank]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "old"]


def saved_by_two(path: Path) -> None:
    with foldpar.create_groups(solve(2, ep=2)) as groups:
        save_checkpoint(path, *trained(groups, 0), groups)
