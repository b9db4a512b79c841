"""Checkpoints that load in any layout: what was trained in one goes on in another as if nothing had happened."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import pytest
import torch
from boxes import Held, assembled, held_by
from checkpoint_cases import CONFIG, Run, fresh, optimizer_of, ready, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import Stage, fold, plain_model

import foldpar
from foldpar import families
from foldpar.checkpoint import dcp as checkpoint_dcp
from foldpar.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from foldpar.checkpoint.state import Entry
from foldpar.comm.dtensors import local_tensor
from foldpar.parameters.boxes import Share
from foldpar.parameters.placements import mark_placement
from foldpar.testing import layouts, run_ranks

EXACT = 1e-11
solve = foldpar.solve_layout


@pytest.fixture(scope="module")
def uninterrupted() -> Any:
    """Six steps of the plain model in one process, for each optimizer and schedule, when they are asked for."""
    return Uninterrupted()


class Uninterrupted(dict[str, tuple[list[float], dict[str, Tensor]]]):
    def __missing__(self, key: str) -> tuple[list[float], dict[str, Tensor]]:
        kind, _, schedule = key.partition(" ")
        self[key] = cases.in_one_process(kind, 6, schedule=schedule)
        return self[key]


# -- Resuming ---------------------------------------------------------------------------------------------------------


def check_resumes(folder: Path, uninterrupted: Any, saved_by: Run, loaded_by: Run, **options: Any) -> None:
    """3 steps, a checkpoint, 3 more in the other layout: losses and weights are those of 6 steps in one process."""
    path = folder / "step-3"
    before = run_ranks(cases.train_and_save, saved_by.layout.world, saved_by, path, 3)
    after = run_ranks(cases.load_and_train, loaded_by.layout.world, loaded_by, path, 3)
    saved, loaded = assembled([shares for _, shares in before]), assembled([shares for _, _, shares, _ in after])
    for name, tensor in saved.items():
        assert torch.equal(tensor, loaded[name]), name
    losses, weights = uninterrupted[f"{saved_by.kind} {saved_by.schedule}".strip()]
    final = assembled([shares for _, _, _, shares in after])
    assert before[0][0] + after[0][1] == pytest.approx(losses, rel=EXACT)
    assert set(final) == set(weights)
    for name, want in weights.items():
        assert (final[name] - want).norm() <= EXACT * want.norm(), name
    info = after[0][0]
    assert (info.step, info.extra, info.layout) == (3, {"note": [1, "two"]}, saved_by.layout)
    same = saved_by.layout == loaded_by.layout
    assert info.random_state == ("restored" if same else "other layout")


def run(
    kind: str, stage: int = 0, consumer: str = "replicated", schedule: str = "", replicas: int = 1, **layout: Any
) -> Run:
    of = solve(layout.pop("world"), **layout)
    return Run(of, kind, stage, consumer=consumer, schedule=schedule, replicas=replicas)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        (
            run("AdamW", schedule="sequence", world=4, tp=2, ep=4),
            run("AdamW", schedule="sequence", world=4, tp=4, ep=2, etp=2),
        ),
        (run("SGD", world=1), run("SGD", world=4, tp=2, ep=2, order="consecutive", consumer="vocabulary")),
        (
            run("AdamW", 3, schedule="lambda", world=4, tp=2, ep=1),
            run("AdamW", schedule="lambda", world=1),
        ),  # edp (0 2 1 3)
        (run("SGD", world=2, ep=2), run("SGD", stage=2, world=4, tp=2, ep=2)),
        (run("SGD", stage=3, world=4, replicas=2), run("SGD", world=2, ep=2)),
    ],
    ids=["tp2-ep4", "grows", "from-stage-3", "to-stage-2", "from-replicas"],
)
def test_training_goes_on_in_another_layout(tmp_path, uninterrupted, saved_by, loaded_by):
    check_resumes(tmp_path, uninterrupted, saved_by, loaded_by)


def test_experts_that_are_cut_along_another_dimension_come_and_go(tmp_path):
    few = replace(cases.CONFIG, experts=3)  # over 4 and over 2 data ranks, with etp behind
    first, second = (Run(solve(4, tp=2, etp=etp), "AdamW", stage, config=few) for etp, stage in ((1, 3), (2, 2)))
    alone = {"AdamW": cases.in_one_process("AdamW", 6, few)}
    check_resumes(tmp_path, alone, first, second)
    (tmp_path / "back").mkdir()
    check_resumes(tmp_path / "back", alone, second, first)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        ({"world": 4, "replicas": 2}, {"world": 4, "tp": 2, "ep": 4}),
        ({"world": 4, "tp": 2, "ep": 2, "etp": 2}, {"world": 4, "ep": 2, "replicas": 2}),
        ({"world": 8, "ep": 2, "replicas": 4}, {"world": 8, "tp": 2, "ep": 2, "replicas": 2}),
    ],
)
def test_replicas_of_shards_come_and_go(tmp_path, uninterrupted, saved_by, loaded_by, stage):
    first = run("AdamW", stage, **saved_by)
    check_resumes(tmp_path, uninterrupted, first, run("AdamW", stage if "replicas" in loaded_by else 0, **loaded_by))


FITTING = layouts(8, pp=1, tp=(1, 8), ep=(1, 8), etp=(1, 8)).filter(
    lambda of: 8 % of.tp == 8 % of.ep == 8 % of.etp == 24 % (of.dp * of.cp) == 0
)


@pytest.mark.long
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    layouts=st.tuples(FITTING, FITTING),
    stages=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    kind=st.sampled_from(["AdamW", "SGD"]),
    schedule=st.sampled_from(["", "lambda", "steps", "sequence"]),
)
def test_training_goes_on_in_any_other_layout(tmp_path_factory, uninterrupted, layouts, stages, kind, schedule):
    first, second = (Run(layout, kind, stage, schedule=schedule) for layout, stage in zip(layouts, stages, strict=True))
    check_resumes(tmp_path_factory.mktemp("any"), uninterrupted, first, second)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "layout",
    [
        solve(8, tp=4, ep=4),  # EP (0 4 1 5) (2 6 3 7)
        solve(4, tp=2, ep=4),  # EP (0 2 1 3)
        solve(6, tp=2, etp=2),  # edp (0 4 3) (2 1 5)
        solve(8, tp=2, ep=2, etp=2),
        solve(8),  # some ranks hold nothing of small tensors
    ],
    ids=repr,
)
def test_shards_of_every_stage_come_and_go(tmp_path, uninterrupted, layout, stage):
    check_resumes(tmp_path, uninterrupted, Run(layout, "AdamW", stage), Run(solve(4, tp=2, ep=2), "AdamW"))
    (tmp_path / "back").mkdir()
    check_resumes(tmp_path / "back", uninterrupted, Run(solve(3), "SGD"), Run(layout, "SGD", stage))


# -- Pipeline stages --------------------------------------------------------------------------------------------------


def marked(model: nn.Module) -> nn.Module:
    for block in model.blocks.values() if isinstance(model.blocks, nn.ModuleDict) else model.blocks:
        mark_placement(block.dense.up, 0)
        mark_placement(block.dense.down, 1)
    return model


def stage_of(groups: foldpar.FoldedGroups, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = marked(fold(plain_model(seed), groups))
    if groups.pp.size > 1:
        model = foldpar.mark_parameters(Stage(model, groups.pp.index), families.REPLICATED)
    return model, optimizer_of(model, "SGD")


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """No training: it gives every parameter a momentum of a value of its own."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach().sin()
    foldpar.declare_reduced(model)
    optimizer.step()


def save_stages(layout: foldpar.FoldedLayout, path: Path) -> None:
    with foldpar.create_groups(layout) as groups:
        model, optimizer = stage_of(groups, seed=0)
        one_step(model, optimizer)
        save_checkpoint(path, model, optimizer, groups, step=1)


def load_stages(layout: foldpar.FoldedLayout, path: Path) -> Held:
    with foldpar.create_groups(layout) as groups:
        model, optimizer = stage_of(groups, seed=1)
        load_checkpoint(path, model, optimizer, groups)
        one_step(model, optimizer)
        return held_by(model, groups)


def test_pipeline_stages_meet_by_the_names_of_parameters(tmp_path):
    model = plain_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    one_step(model, optimizer)
    one_step(model, optimizer)
    two, one = solve(4, pp=2, tp=2, ep=2), solve(2, tp=2)
    for number, (first, second) in enumerate([(two, one), (one, two)]):
        run_ranks(save_stages, first.world, first, tmp_path / str(number))
        loaded = assembled(run_ranks(load_stages, second.world, second, tmp_path / str(number)))
        for name, want in model.named_parameters():
            assert (loaded[name] - want).norm() <= 1e-14 * want.norm(), name


# -- Other torch tools, the manifest, memory --------------------------------------------------------------------------


def test_it_is_an_ordinary_checkpoint_of_torch_with_a_page_to_read(tmp_path):
    path, run = tmp_path / "step-2", Run(solve(4, tp=2, ep=2, etp=2))
    of_ranks = run_ranks(cases.train_and_save, 4, run, path, 2)
    saved = assembled([shares for _, shares in of_ranks])
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert set(whole["model"]) == set(saved)
    for name, tensor in saved.items():
        assert torch.equal(whole["model"][name], tensor), name
    assert whole["optimizer"]["state"]["head.weight.exp_avg"].shape == (CONFIG.vocab, CONFIG.dim)
    assert whole["optimizer"]["state"]["head.weight.step"] == 2

    page = json.loads((path / "foldpar.json").read_text())
    assert page["step"] == 2 and page["extra"] == {"note": [1, "two"]} and page["format"] == 1
    assert page["layout"] == {"world": 4, "tp": 2, "ep": 2, "etp": 2, "pp": 1, "cp": 1, "order": "tp-lane-major"}
    experts = page["parameters"]["blocks.0.moe.experts.gate_up_proj"]
    assert experts == {"shape": [8, 16, 16], "dtype": "float64", "family": "routed_expert", "aliases": []}
    assert page["optimizer"]["kind"] == "AdamW"
    files = {file.name: file.stat().st_size for file in path.iterdir() if file.name != "foldpar.json"}
    assert {name: record["size"] for name, record in page["files"].items()} == files
    assert len(files) == 5  # one of each rank, and the metadata
    # The copies of what several ranks hold take turns in writing, so no rank writes much more than another.
    sizes = sorted(size for name, size in files.items() if name.endswith(".distcp"))
    assert sizes[-1] < 1.5 * sizes[0]
    assert latest_checkpoint(tmp_path) == path


@given(rows=st.integers(1, 9), replicas=st.integers(1, 5), piece=st.integers(1, 40))
def test_copies_take_turns_in_writing_pieces(rows, replicas, piece):
    tensor = torch.arange(rows * 4.0).view(rows, 4)
    of_copies = [
        list(Entry("model.x", Share.whole((rows, 4)), tensor, replica, replicas).blocks(piece))
        for replica in range(replicas)
    ]
    found = [block for blocks in of_copies for block in blocks]
    assert sorted(value for block in found for value in block.tensor.flatten().tolist()) == tensor.flatten().tolist()
    assert all(block.tensor.nbytes <= max(piece, 4) for block in found)
    counts = [len(blocks) for blocks in of_copies]
    assert max(counts) - min(counts) <= 1


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made in here had at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {local_tensor(leaf).untyped_storage().data_ptr() for leaf in leaves}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                storage = local_tensor(leaf).untyped_storage()
                if storage.data_ptr() not in given:
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.most = max(self.most, sum(self.live.values()))


def bytes_read(run: Run, path: Path) -> dict[str, int]:
    """What loading makes on this rank: the largest piece in memory, all that was read, the share, states included."""
    pieces: list[int] = []
    load = torch.load

    def counted(*args: Any, **options: Any) -> Any:
        value = load(*args, **options)
        if isinstance(value, Tensor):
            pieces.append(value.untyped_storage().nbytes())
        return value

    with ready(run, seed=1) as (groups, model, optimizer), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", counted)
        with Allocated() as made:
            load_checkpoint(path, model, optimizer, groups)
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        share = sum(tensor.nbytes for _, tensor in held_by(model, groups).values())
        return {
            "largest": max(pieces),
            "read": sum(pieces),
            "share": share,
            "states": sum(local_tensor(tensor).nbytes for tensor in states),
            "made": made.most,
        }


def test_loading_holds_a_piece_at_a_time_beside_the_ranks_own_share(tmp_path):
    """Saved by one rank, with experts of 2 KiB each: the pieces that it was written in bound what a reader buffers."""
    piece = 1024
    run_ranks(cases.train_and_save_in_pieces, 1, Run(solve(1)), tmp_path / "one", piece)
    whole = sum(tensor.nbytes for tensor in cases.in_one_process("SGD", 0)[1].values())
    for counts in run_ranks(bytes_read, 4, Run(solve(4, ep=4)), tmp_path / "one"):
        assert counts["largest"] <= piece
        assert counts["share"] < 0.6 * whole  # a quarter of the experts, and the dense part
        assert counts["states"] < 2.1 * counts["share"]
        assert counts["read"] <= 1.2 * (counts["share"] + counts["states"])  # nothing of other ranks' experts
        # New tensors are the states, one piece, and the random state of 5 KiB.
        assert counts["states"] <= counts["made"] <= counts["states"] + 2 * piece + 2**13


# -- What else is kept ------------------------------------------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.router = foldpar.TopKRouter(4, 8, 2, correction_bias=True)


def save_extras(path: Path) -> list[Any]:
    with foldpar.create_groups(solve(2)) as groups:
        model = WithBuffers()
        model.seen += torch.tensor([1, 2, 3])
        model.cache += 5
        model.router.correction_bias += 0.25
        optimizer = torch.optim.Adam(
            [
                {"params": [model.embedding.weight], "lr": torch.tensor(0.5), "betas": (0.8, 0.9)},
                {"params": [model.scale, model.router.weight], "lr": 0.125},
            ],
            amsgrad=True,
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        one_step(model, optimizer)
        scheduler.step()
        random.seed(groups.rank)
        torch.manual_seed(10 + groups.rank)
        torch.rand(3)
        extra = {"scheduler": {"last_epoch": scheduler.last_epoch}, "none": None, "list": [1.5, True]}
        save_checkpoint(path, model, optimizer, groups, step=7, extra=extra)
        return [random.random(), torch.rand(2).tolist()]


def load_extras(path: Path, world: int) -> list[Any]:
    with foldpar.create_groups(solve(world)) as groups:
        model = WithBuffers()
        optimizer = torch.optim.Adam(
            [
                {"params": [model.router.weight, model.scale], "lr": 3.0, "foreach": False},
                {"params": [model.head.weight], "lr": torch.tensor(3.0), "betas": (0.1, 0.2)},
            ],
            amsgrad=True,
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        kept = optimizer.param_groups[1]["lr"]
        info = load_checkpoint(path, model, optimizer, groups)
        scheduler.load_state_dict(info.extra["scheduler"])
        first, second = optimizer.param_groups
        assert (first["lr"], first["initial_lr"], first["foreach"]) == (0.0625, 0.125, False)
        assert second["lr"] is kept and float(kept) == 0.25 and second["betas"] == (0.8, 0.9)
        assert second["amsgrad"] is True
        assert scheduler.last_epoch == 1 and info.extra["list"] == [1.5, True]
        assert model.seen.tolist() == [1, 2, 3] and model.seen.dtype == torch.int64
        assert model.cache.tolist() == [0, 0, 0]
        assert model.router.correction_bias.tolist() == [0.25] * 8
        assert model.head.weight is model.embedding.weight
        state = optimizer.state[model.scale]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert state["step"] == 1 and state["step"].device.type == "cpu" and state["exp_avg"].shape == ()
        assert info.random_state == ("restored" if world == 2 else "other layout")
        return [random.random(), torch.rand(2).tolist()]


def test_buffers_tied_weights_options_and_random_states_come_back(tmp_path):
    next_numbers = run_ranks(save_extras, 2, tmp_path / "c")
    assert run_ranks(load_extras, 2, tmp_path / "c", 2) == next_numbers
    run_ranks(load_extras, 1, tmp_path / "c", 1)
    names = json.loads((tmp_path / "c" / "foldpar.json").read_text())
    assert names["parameters"]["embedding.weight"]["aliases"] == ["head.weight"]
    assert set(names["buffers"]) == {"seen", "router.correction_bias"}
    assert len(names["optimizer"]["options"]) == 2


def save_untied(path: Path) -> None:
    with foldpar.create_groups(solve(1)) as groups:
        model = WithBuffers()
        model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
        save_checkpoint(path / "untied", model, None, groups)
        tied = WithBuffers()
        save_checkpoint(path / "tied", tied, None, groups)
        load_checkpoint(path / "untied", tied, None, groups)
        assert torch.equal(tied.head.weight, model.head.weight)
        load_checkpoint(path / "tied", model, None, groups)
        assert model.head.weight is not model.embedding.weight


def test_weights_that_are_tied_on_one_side_only(tmp_path):
    """As by pipelining, where embedding and head are in different stages."""
    save_untied(tmp_path)


def cast_and_weights_alone(folder: Path) -> None:
    run = Run(solve(2, ep=2), dtype=torch.float32)
    with ready(run) as (groups, model, optimizer):
        train(model, optimizer, groups, run, range(1))
        save_checkpoint(folder / "f32", model, optimizer, groups)
        half = Run(run.layout, dtype=torch.bfloat16)
        other, adam = fresh(half, groups, seed=1)
        load_checkpoint(folder / "f32", other, adam, groups, cast=True)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert two.dtype == torch.bfloat16 and torch.equal(one.bfloat16(), two)
            assert adam.state[two]["exp_avg"].dtype == torch.bfloat16
            assert torch.equal(optimizer.state[one]["exp_avg"].bfloat16(), adam.state[two]["exp_avg"])
            assert adam.state[two]["step"].dtype == torch.float32
        alone, sgd = fresh(Run(run.layout, "SGD", dtype=torch.float32), groups, seed=2)
        info = load_checkpoint(folder / "f32", alone, None, groups)
        assert info.optimizer == "AdamW" and info.step is None and not sgd.state
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), alone.parameters(), strict=True))
        # An optimizer that has stepped keeps its tensors: what refers to them stays right.
        kept = {key: id(tensor) for key, tensor in optimizer.state[next(model.parameters())].items()}
        load_checkpoint(folder / "f32", model, optimizer, groups)
        assert {key: id(tensor) for key, tensor in optimizer.state[next(model.parameters())].items()} == kept


def test_casting_and_loading_the_model_alone(tmp_path):
    run_ranks(cast_and_weights_alone, 2, tmp_path)


# -- In the background ------------------------------------------------------------------------------------------------


def save_while_training(folder: Path) -> Held:
    run = Run(solve(4, tp=2, ep=4))
    with ready(run) as (groups, model, optimizer):
        train(model, optimizer, groups, run, range(2))
        now = held_by(model, groups)
        trained, write = threading.Event(), checkpoint_dcp.Writing.write
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_dcp.Writing, "write", lambda *given: (trained.wait(30), write(*given))[1])
            pending = save_checkpoint(folder / "a", model, optimizer, groups, step=2, asynchronous=True)
            assert pending is not None
            train(model, optimizer, groups, run, range(2, 4))  # over the same groups, while files are to be written
            assert not pending.done and not (folder / "a").exists()
            trained.set()
            pending.wait()
        assert pending.done
        pending.wait()
        second = save_checkpoint(folder / "b", model, optimizer, groups, step=4, asynchronous=True)
        third = save_checkpoint(
            folder / "c", model, optimizer, groups, step=4, asynchronous=True
        )  # waits for the second
        assert second is not None and second.done and third is not None
        third.wait()
        return now


def test_what_training_changes_meanwhile_does_not_change_what_is_saved(tmp_path, uninterrupted):
    saved = assembled(run_ranks(save_while_training, 4, tmp_path))
    run = Run(solve(2, tp=2, ep=2))
    after = run_ranks(cases.load_and_train, 2, run, tmp_path / "a", 4)
    loaded = assembled([shares for _, _, shares, _ in after])
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())
    assert after[0][1] == pytest.approx(uninterrupted["AdamW"][0][2:], rel=EXACT)
    assert latest_checkpoint(tmp_path) == tmp_path / "c"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


def errors_in_the_background(folder: Path) -> tuple[str, str]:
    run, texts = Run(solve(2, ep=2)), []
    with ready(run) as (groups, model, optimizer):
        for path in (folder / "a", folder / "b"):
            pending = save_checkpoint(path, model, optimizer, groups, asynchronous=True)
            assert pending is not None
        # The second is still being written, or done; the third cannot be, since a directory is in its way.
        if groups.rank == 0:
            (folder / "taken").mkdir()
            (folder / "taken" / "thing").write_text("mine")
        pending.wait()
        with pytest.raises(foldpar.errors.CheckpointError) as caught:
            save_checkpoint(folder / "taken", model, optimizer, groups, asynchronous=True)
        texts.append(str(caught.value))
        with cases.broken_writes(groups.rank == 1):
            failing = save_checkpoint(folder / "broken", model, optimizer, groups, asynchronous=True)
            assert failing is not None
            failing._thread.join()
        with pytest.raises(foldpar.errors.CheckpointError) as caught:
            save_checkpoint(folder / "c", model, optimizer, groups)
        texts.append(str(caught.value))
        save_checkpoint(folder / "c", model, optimizer, groups)  # told once
        return texts[0], texts[1]


def test_errors_in_the_background_come_out_at_the_next_save(tmp_path):
    for taken, broken in run_ranks(errors_in_the_background, 2, tmp_path):
        assert "taken exists and is no checkpoint. Save under a name that is free" in taken
        assert "The save before this one, in the background, failed." in broken
        assert "No space left on device" in broken
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "taken"}
    assert (tmp_path / "taken" / "thing").read_text() == "mine"


# -- On GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_from_a_gpu_to_a_gpu_and_to_the_host(tmp_path, asynchronous):
    """One rank: states of a fused optimizer live on the device, the random state of the device comes back."""
    with foldpar.create_groups(solve(1)) as groups:
        models = {device: fold(plain_model(seed), groups).to(device) for seed, device in enumerate(("cuda", "cpu"))}
        fused = torch.optim.AdamW(foldpar.parameter_groups(models["cuda"]), lr=0.1, fused=True)
        one_step(models["cuda"], fused)
        pending = save_checkpoint(tmp_path / "c", models["cuda"], fused, groups, step=1, asynchronous=asynchronous)
        saved = {name: parameter.detach().cpu() for name, parameter in models["cuda"].named_parameters()}
        one_step(models["cuda"], fused)  # on the way to the files, or already there
        numbers = torch.rand(3, device="cuda")
        if pending is not None:
            pending.wait()
        for device, options in (("cpu", {}), ("cuda", {"fused": True}), ("cuda", {"capturable": True})):
            model = fold(plain_model(5), groups).to(device)
            optimizer = torch.optim.AdamW(foldpar.parameter_groups(model), lr=1.0, **options)
            info = load_checkpoint(tmp_path / "c", model, optimizer, groups, verify=True)
            assert info.random_state == "restored"
            assert torch.equal(torch.rand(3, device="cuda"), numbers)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter.detach().cpu(), saved[name]), name
                state = optimizer.state[parameter]
                assert state["step"].device.type == (device if options else "cpu") and state["step"] == 1
                assert state["exp_avg"].device.type == device
            one_step(model, optimizer)
