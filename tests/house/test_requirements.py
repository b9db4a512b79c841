"""What a base installation lacks is named, on every rank, before anything is communicated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import foldpar
from foldpar import requirements
from foldpar.testing import run_ranks


def save(path: Path) -> str:
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        model = foldpar.mark_parameters(nn.Linear(2, 2), foldpar.families.REPLICATED)
        with pytest.raises(ImportError) as refused:
            foldpar.save_checkpoint(path, model, None, groups)
        return str(refused.value)


def test_checkpoints_of_several_ranks_without_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    for text in run_ranks(save, 2, tmp_path / "c", backend="threads"):
        assert "numpy is not installed" in text and "pip install 'foldpar[checkpoint]'" in text
        assert "lost touch" not in text


def test_one_rank_needs_no_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        model: Any = nn.Linear(2, 2)
        foldpar.save_checkpoint(tmp_path / "c", model, None, groups)
        foldpar.load_checkpoint(tmp_path / "c", model, None, groups)


def test_the_metadata_says_where_the_project_lives() -> None:
    tomllib = pytest.importorskip("tomllib")
    urls = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["urls"]
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://") for url in urls.values())


def test_what_is_required_is_used() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    required = re.findall(r'"([\w-]+)', re.search(r"^dependencies = \[(.*)\]", project, re.M)[1])
    assert required == ["torch", "einops", "typing-extensions"]
    code = "".join(path.read_text() for path in Path(foldpar.__file__).parent.rglob("*.py"))
    for name in required:
        assert re.search(rf"^\s*(from|import) {name.replace('-', '_')}\b", code, re.M), name
