"""``save_weights`` and ``whole_state_dict`` give what one process has, bit for bit, from every layout and stage."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from checkpoint_cases import Run
from parity import Case
from torch import Tensor, nn

import foldpar
from foldpar import requirements
from foldpar.errors import ArgumentError, CheckpointError, ShapeError
from foldpar.testing import run_ranks

safetensors = pytest.importorskip("safetensors.torch")


class Extras(nn.Module):
    """What else a model may hold: several dtypes, a scalar, nothing at all, a buffer at two places, one for no file."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.randn(5, 3).bfloat16(), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("none", torch.empty(0, 4))
        self.register_buffer("count", torch.tensor([1, -(2**40)]))
        self.again = nn.Module()
        self.again.register_buffer("count", self.count)
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def own_model(case: Case) -> nn.Module:
    model = parity.fresh_model(case)
    model.extras = Extras()
    if case.consumer == "replicated":
        model.head.weight = model.embedding.weight
    return model


def folded(run: Run, groups: foldpar.FoldedGroups, seed: int = 7) -> nn.Module:
    model = own_model(replace(run.case, seed=seed))
    if groups.layout.world == 1:
        return model  # as one process has it, without foldpar
    model = parity.fold(model, groups, run.case)
    if run.stage:
        foldpar.shard_model(
            model, groups, stage=run.stage, replicas=run.replicas, blocks=[] if run.stage == 1 else None
        )
    return model


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want) or sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert got[name].device.type == "cpu" and not got[name].requires_grad
        assert got[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def write_and_load(run: Run, folder: Path) -> dict[str, Tensor]:
    with foldpar.create_groups(run.layout) as groups:
        model = folded(run, groups)
        report = foldpar.save_weights(folder / "one.safetensors", model, groups, buffer_bytes=3000)
        assert report.files == ("one.safetensors",)
        several = foldpar.save_weights(folder / "several", model, groups, max_shard_bytes=3000)
        assert len(several.files) > 3 and several.bytes == report.bytes
        assert (foldpar.whole_state_dict(model, groups) == {}) == (groups.rank != 0)
        whole = foldpar.whole_state_dict(model, groups, on="every rank")
        assert list(whole) == list(model.state_dict())
        for way in ("one.safetensors", "several", "load_state_dict"):
            other = folded(run, groups, seed=3)
            if way != "load_state_dict":
                foldpar.load_weights(folder / way, other, groups)
            elif run.stage or groups.layout.tp == 1:  # shard_model and GroupedExperts see to it
                other.load_state_dict(whole)
            else:
                continue
            same(foldpar.whole_state_dict(other, groups, on="every rank"), whole)
            if run.case.consumer == "replicated":
                assert other.head.weight is other.embedding.weight
        return whole


def run_of(
    world: int, tp: int, ep: int, etp: int, stage: int, order: str, consumer: str = "replicated", replicas: int = 1
) -> Run:
    layout = foldpar.solve_layout(world, tp=tp, ep=ep, etp=etp, order=order)
    return Run(layout, stage=stage, consumer=consumer, replicas=replicas)


LANES, CONSECUTIVE = "tp-lane-major", "consecutive"
FEW = [
    (4, 2, 2, 2, 3, CONSECUTIVE, "replicated"),
    (4, 2, 4, 1, 0, LANES, "vocabulary"),
]
MANY = [
    (4, tp, ep, etp, stage, order, consumer)
    for tp, ep, etp, stage, order in product((1, 2), (1, 2, 4), (1, 2), range(4), (LANES, CONSECUTIVE))
    for consumer in ("replicated", "vocabulary")
    if ep * etp <= 4 and (tp > 1 or (order == LANES and consumer == "replicated"))
]

MANY += [
    (4, 1, 2, 1, 3, LANES, "replicated", 2),
    (4, 1, 1, 1, 2, LANES, "replicated", 2),
    (8, 2, 2, 2, 3, CONSECUTIVE, "vocabulary", 2),
    (8, 2, 2, 1, 3, LANES, "vocabulary", 2),
]


def check_law(case: tuple[Any, ...], tmp_path: Path) -> None:
    run = run_of(*case)
    plain = own_model(run.case)
    want = {name: tensor.detach().clone() for name, tensor in plain.state_dict().items()}
    (tmp_path / "alone").mkdir()
    (tmp_path / "folded").mkdir()
    alone = replace(run, layout=foldpar.solve_layout(1), stage=0)
    same(write_and_load(alone, tmp_path / "alone"), want)
    for got in run_ranks(write_and_load, run.layout.world, run, tmp_path / "folded", timeout=120.0):
        same(got, want)
        assert (got["head.weight"] is got["embedding.weight"]) == (run.case.consumer == "replicated")
    for file in (tmp_path / "alone").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "folded" / file.relative_to(tmp_path / "alone")).read_bytes(), file
    read = safetensors.load_file(tmp_path / "folded" / "one.safetensors")
    same(read, want)
    own_model(replace(run.case, seed=3)).load_state_dict(read)  # strictly, by torch alone


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_files_are_those_of_one_process(case: tuple[Any, ...], tmp_path: Path) -> None:
    check_law(case, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", MANY, ids=str)
def test_the_files_are_those_of_one_process_in_every_layout(case: tuple[Any, ...], tmp_path: Path) -> None:
    check_law(case, tmp_path)


def in_the_middle_of_a_step(path: Path) -> None:
    with foldpar.create_groups(foldpar.solve_layout(2, ep=2)) as groups:
        run = run_of(2, 1, 2, 1, 1, LANES)
        model = folded(run, groups)
        before = foldpar.whole_state_dict(model, groups, on="every rank")
        model(torch.zeros(1, 4, dtype=torch.long))  # leaves parameters whole
        same(foldpar.whole_state_dict(model, groups, on="every rank"), before)
        foldpar.save_weights(path, model, groups)
        if groups.rank == 0:
            same(safetensors.load_file(path), before)


def test_after_a_forward(tmp_path: Path) -> None:
    run_ranks(in_the_middle_of_a_step, 2, tmp_path / "w.safetensors")


def stages(path: Path) -> None:
    with foldpar.create_groups(foldpar.solve_layout(2, pp=2)) as groups:
        model = nn.Module()
        model.add_module(f"layer_{groups.pp.index}", nn.Linear(2, 3, bias=groups.pp.index == 0))
        report = foldpar.save_weights(path, model, groups)
        assert report.tensors == 3
        whole = foldpar.whole_state_dict(model, groups, on="every rank")
        assert sorted(whole) == ["layer_0.bias", "layer_0.weight", "layer_1.weight"]
        foldpar.load_weights(path, model, groups)


def test_pipeline_stages_write_one_file(tmp_path: Path) -> None:
    run_ranks(stages, 2, tmp_path / "w.safetensors", backend="threads")


def whole_experts() -> None:
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        moe = foldpar.FoldedMoE(foldpar.TopKRouter(8, 4, 2), foldpar.GroupedExperts(4, 8, 8, groups), groups)
        want = {name: value + 1 for name, value in foldpar.whole_state_dict(moe, groups, on="every rank").items()}
        moe.load_state_dict(want)
        same(foldpar.whole_state_dict(moe, groups, on="every rank"), want)


def test_experts_that_every_rank_has_whole_take_whole_tensors() -> None:
    run_ranks(whole_experts, 2, backend="threads")


# -- What is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def groups() -> Any:
    return foldpar.create_groups(foldpar.solve_layout(1))


class WithState(nn.Linear):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None: ...


def test_wrong_arguments(groups: Any, tmp_path: Path) -> None:
    model: Any = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"path must be a str or a PathLike, and is a Linear"):
        foldpar.save_weights(model, tmp_path, groups)
    with pytest.raises(ArgumentError, match=r"w\.safetensors is one file, and max_shard_bytes = 5 asks for several"):
        foldpar.save_weights(tmp_path / "w.safetensors", model, groups, max_shard_bytes=5)
    with pytest.raises(ShapeError, match=r"max_shard_bytes must be a positive integer"):
        foldpar.save_weights(tmp_path / "w", model, groups, max_shard_bytes=0)
    with pytest.raises(ArgumentError, match=r"on = 'all' is unknown. It can be 'rank 0' or 'every rank'"):
        foldpar.whole_state_dict(model, groups, on="all")
    with pytest.raises(ArgumentError, match=r"groups must be a FoldedGroups, and is a FoldedLayout"):
        foldpar.load_weights(tmp_path, model, groups.layout)
    assert not list(tmp_path.iterdir())


def test_what_no_file_can_hold(groups: Any, tmp_path: Path) -> None:
    for model, text in (
        (WithState(2, 2), r"state_dict\(\) has _extra_state, which is no parameter and no buffer"),
        (nn.Linear(2, 2, device="meta"), r"weight is on the meta device and has no values"),
    ):
        with pytest.raises(CheckpointError, match=text):
            foldpar.save_weights(tmp_path / "w.safetensors", model, groups)
        with pytest.raises(CheckpointError, match=text):
            foldpar.whole_state_dict(model, groups)
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_written_over(groups: Any, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    foldpar.save_weights(tmp_path / "a.safetensors", model, groups)
    foldpar.save_weights(tmp_path / "b.safetensors", model, groups)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is there already, and is not written over"):
        foldpar.save_weights(tmp_path / "a.safetensors", model, groups)


def test_a_file_whose_name_is_a_pattern_is_not_written_over(groups: Any, tmp_path: Path) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "final[1].safetensors"
    foldpar.save_weights(path, model, groups)
    with pytest.raises(CheckpointError, match=r"final\[1\].safetensors is there already, and is not written over"):
        foldpar.save_weights(path, model, groups)
    foldpar.save_weights(tmp_path / "fina?[1].safetensors", model, groups)


def test_files_that_do_not_fit(groups: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match=r"w\.safetensors does not exist"):
        foldpar.load_weights(path, nn.Linear(2, 2), groups)
    foldpar.save_weights(path, nn.Linear(2, 3), groups)
    for other, text in (
        (nn.Linear(3, 3), r"weight is \[3, 3\] in the model and \[3, 2\] in the files"),
        (nn.Linear(2, 3, bias=False), r"bias is in the files and not in the model"),
        (nn.Sequential(nn.Linear(2, 3)), r"0\.weight is missing in the files"),
    ):
        with pytest.raises(CheckpointError, match=text):
            foldpar.load_weights(path, other, groups)
    path.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="is damaged, or no safetensors file"):
        foldpar.load_weights(path, nn.Linear(2, 3), groups)


def test_reading_needs_safetensors_and_writing_does_not(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    foldpar.save_weights(tmp_path / "w.safetensors", nn.Linear(2, 2), groups)
    with pytest.raises(ImportError, match=r"safetensors is not installed, .* pip install 'foldpar\[hf\]'"):
        foldpar.load_weights(tmp_path / "w.safetensors", nn.Linear(2, 2), groups)


def test_a_model_of_no_parameters(groups: Any, tmp_path: Path) -> None:
    assert foldpar.save_weights(tmp_path / "w.safetensors", nn.Identity(), groups).tensors == 0
    assert foldpar.load_weights(tmp_path / "w.safetensors", nn.Identity(), groups).tensors == 0
    assert foldpar.whole_state_dict(nn.Identity(), groups) == {}
