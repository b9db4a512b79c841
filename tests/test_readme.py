"""README.md and CONTRIBUTING.md say what is so: their code runs, their output is what is printed, their names exist."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import indent

import pytest
import torch
from hf_models import BRIEFLY, FAMILIES
from test_public_names import FLOORS

import foldpar
from foldpar import families, testing
from foldpar.families import ParameterFamily
from foldpar.testing import RanksFailed, run_ranks

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))


# Reading a page.


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the last heading above it."""

    language: str
    text: str
    section: str


def blocks_of(page: str) -> list[Block]:
    found, section = [], ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^( *)```(\w+)\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL):
        heading, indent, language, text = match.groups()
        section = heading or section
        if language:
            found.append(Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE), section))
    return found


def blocks(language: str, section: str | None = None, page: str = README) -> list[Block]:
    chosen = [block for block in blocks_of(page) if block.language == language and section in (None, block.section)]
    assert chosen, f"there is no {language} block in {section or 'the page'}"
    return chosen


def section(title: str, page: str = README) -> str:
    """The text below a heading, up to the next one of its level."""
    return re.split(r"^## ", page.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first column is called so, without its heading."""
    lines = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# Code and output.


def test_every_block_is_of_a_language_that_is_tested_here():
    assert {block.language for block in blocks_of(README)} == {"text", "bash", "console", "python", "pycon"}
    assert {block.language for block in blocks_of(CONTRIBUTING)} == {"bash", "python"}


def printed_by(program: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(program, "<README.md>", "exec"), {"__name__": "__main__"})
    return output.getvalue()


def test_the_training_loop_runs_and_prints_what_the_page_says():
    (loop, *_), (shown,) = blocks("python", "A training loop"), blocks("text", "A training loop")
    lines = [line for line in loop.text.splitlines() if line and not re.match(r"(import|from) ", line)]
    assert len(lines) == 25, "the page says that it has 25 lines and imports"
    first, *others = run_ranks(printed_by, 4, loop.text, init=False, groups_left="error")
    assert others == [""] * 3
    number = re.compile(r"\d+\.\d+")
    assert number.sub("#", first) == number.sub("#", shown.text)
    losses = [[float(loss) for loss in number.findall(text)] for text in (first, shown.text)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and losses[0][-1] < 0.1 * losses[0][0]


@pytest.mark.parametrize("use", ["solve_layout", "create_groups", "FoldedMoE", "mark_parameters", "parameter_groups"])
def test_the_training_loop_shows_what_a_user_needs(use):
    assert f"foldpar.{use}(" in blocks("python", "A training loop")[0].text


@pytest.mark.long
def test_the_training_loop_runs_under_torchrun(tmp_path):
    (tmp_path / "train.py").write_text(blocks("python", "A training loop")[0].text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert [line[:5] for line in done.stdout.splitlines()] == ["step "] * 3


AROUND = """\
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import MixtralForCausalLM

import foldpar


def program(
    model: MixtralForCausalLM,
    groups: foldpar.FoldedGroups,
    loader: Iterable[dict[str, Tensor]],
    batch: dict[str, Tensor] | None,
    tokens: Tensor,
    labels: Tensor,
    tokens_of_all_ranks: Tensor,
    micro_batches: int,
) -> None:
"""
"""What stands around a part of a loop on the page: the names that it takes for granted, each of one type."""


def complaints_about(folder: Path, programs: list[str]) -> str:
    """What mypy --strict says about programs, and parts of loops, each in a file of its own."""
    for number, program in enumerate(programs):
        whole = program if "import foldpar" in program else AROUND + indent(program, "    ")
        (folder / f"block_{number}.py").write_text(whole)
    files = [str(path) for path in sorted(folder.glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *files],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert (done.returncode == 0) == (done.stdout + done.stderr == ""), done.stderr
    return done.stdout


def test_the_programs_of_the_page_pass_strict_type_checks(tmp_path):
    programs = [block.text for block in blocks("python")]
    assert len(programs) >= 5
    wrong = "import foldpar\n\nlayout: int = foldpar.solve_layout(world=4)\n"
    said = complaints_about(tmp_path, [*programs, wrong])
    assert said.count("\n") == 1 and f"block_{len(programs)}.py:3: error: Incompatible types" in said, said


HUGGING_FACE = "A Hugging Face model, sharded and saved"


def run_in(folder: Path, program: str) -> list[str]:
    os.chdir(folder)
    printed_by(program)
    return sorted(path.name for path in Path("runs").iterdir())


def test_the_hugging_face_loop_runs(tmp_path):
    (loop,) = blocks("python", HUGGING_FACE)
    assert run_ranks(run_in, 4, tmp_path, loop.text, init=False, timeout=300.0) == [["step-4"]] * 4


def test_the_families_that_the_page_names_are_those_that_are_tested():
    rows = table(section(HUGGING_FACE), "when")
    named = [re.findall(r"`(\w+)`", row[1]) for row in rows]
    assert named == [[family for family in FAMILIES if family not in {*BRIEFLY, "jetmoe"}], list(BRIEFLY)]


def test_interactive_examples():
    text = "\n".join(block.text for block in blocks("pycon"))
    page = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    report = io.StringIO()
    doctest.DocTestRunner().run(page, out=report.write)
    assert not report.getvalue(), report.getvalue()


def test_the_command_line_prints_what_the_page_says():
    for block in blocks("console", "Two orders"):
        for dialogue in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, shown = dialogue.partition("\n")
            words = shlex.split(command)
            assert words[0] == "python"
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
            assert done.stdout + done.stderr == shown


def test_the_demo_starts_with_the_layout_that_the_page_shows():
    (block,) = blocks("console", "Two commands")
    command, _, shown = block.text.partition("\n")
    assert command == "$ make demo"
    assert shown.partition("\n\nloss")[0] == str(foldpar.solve_layout(4, tp=2, ep=4))


@pytest.mark.long
def test_the_demo_prints_what_the_page_says():
    (block,) = blocks("console", "Two commands")
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=500)
    number = re.compile(r"\d+\.\d+(e-\d+)?")
    shown = block.text.partition("\n")[2]
    assert done.stdout.endswith("\n") and number.sub("#", shown) in number.sub("#", done.stdout)


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_shell_commands_name_what_exists(page):
    lines = [line.partition("  #")[0] for block in blocks("bash", page=page) for line in block.text.splitlines()]
    for words in (shlex.split(line) for line in lines if line):
        if words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=True, timeout=60)
        for word in words:
            if re.match(r"(tests|examples|benchmarks|src|\.ci)/", word):
                assert (ROOT / word.partition("::")[0]).exists(), word


def test_make_variables_that_the_page_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"\b([A-Z_]+)=", section("Two commands"))):
        assert f"$({name})" in makefile or f"$(if $({name})" in makefile, name


def fail_on_one_rank() -> str:
    """What rank 1 is told when rank 2 raises before it reaches the layer's first collective."""
    layout = foldpar.solve_layout(4, tp=2, ep=4)
    with foldpar.create_groups(layout, timeout=timedelta(seconds=20)) as groups:
        router, experts = foldpar.TopKRouter(4, 4, 1), foldpar.GroupedExperts(4, 4, 4, groups)
        moe = foldpar.FoldedMoE(router, experts, groups, check=False)
        if groups.rank == 2:
            raise ValueError("no batch")
        try:
            moe(torch.ones(2, 4))
        except foldpar.CollectiveError as error:
            if groups.rank == 1:
                raise AssertionError(f"told: {error}") from None
        return "done"


def test_a_failing_rank_is_reported_as_the_page_says():
    (quoted,) = blocks("text", "When a rank fails")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fail_on_one_rank, 4)
    (told,) = [failure.error for failure in failed.value.failures if "told: " in failure.error]
    assert told.partition("told: ")[2].startswith(quoted.text.strip())


# Facts.


def test_the_picture_shows_the_fold():
    picture = blocks("text")[0].text
    layout = foldpar.solve_layout(4, tp=2, ep=4)
    dp0, dp1 = (re.findall(r"rank (\d)", line) for line in picture.splitlines() if line.lstrip().startswith("dp "))
    assert [int(rank) for rank in dp0] == [*layout.group("tp", 0), *layout.group("ep", 0)]
    assert [int(rank) for rank in dp1] == [*layout.group("tp", 2)]
    assert re.findall(r"e\d", picture) == [f"e{expert}" for expert in range(8)]


def family_constants() -> dict[str, ParameterFamily]:
    return {name: value for name, value in vars(families).items() if isinstance(value, ParameterFamily)}


def test_the_table_of_families_is_what_the_code_does():
    rows = table(section("Which gradient is reduced over what"), "family")
    found = {name.strip("`"): (lanes, data.strip("`")) for name, lanes, data in rows}
    assert list(found) == [name for name in family_constants() if name in found], "in the order of foldpar.families"
    for name, family in family_constants().items():
        lanes, data = found[name]
        assert lanes.startswith(family.reduction.name) and data == family.data_axis, name
        assert (family.lane_axis == "etp") == ("`etp`" in lanes), name


def test_the_table_of_parameters_is_what_the_layer_marks():
    rows = table(section("Which gradient is reduced over what"), "parameter")
    named = {name for row in rows for cell in row[1:] for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(family_constants())
    (experts_row,) = [row for row in rows if row[0].startswith("routed experts")]
    with foldpar.create_groups(foldpar.solve_layout(1)) as groups:
        states = ({}, {"lane_grads": "partial"}, {"lanes": "sharded"}, {"lane_grads": "post-hoc"})
        for column, options in enumerate(states, start=1):
            for partition in ("tokens", "assignments"):
                (row,) = [row for row in rows if f'partition="{partition}"' in row[0]]
                if row[column]:
                    router, experts = foldpar.TopKRouter(4, 4, 1), foldpar.GroupedExperts(4, 4, 4, groups)
                    moe = foldpar.FoldedMoE(router, experts, groups, partition=partition, **options)
                    marked = foldpar.parameter_families(moe, groups)
                    assert marked["router.weight"] == family_constants()[row[column].strip("`")]
                    assert marked["experts.down_proj"] == family_constants()[experts_row[column].strip("`")]


def test_what_the_page_says_of_the_two_orders():
    lane_major = [foldpar.solve_layout(world, tp=tp, ep=ep, etp=etp, cp=cp)
                  for world in (4, 8, 16, 24) for tp in (1, 2, 4) for ep in (1, 2, 3, 4) for etp in (1, 2)
                  for cp in (1, 2) if world % (tp * cp) == world % (ep * etp) == 0]  # fmt: skip
    for layout in lane_major:
        if (layout.dp * layout.cp) % (layout.ep * layout.etp) == 0:
            of_data = [set(group) for group in layout.groups("dp_cp")]
            assert all(any(set(group) <= data for data in of_data) for group in layout.groups("ep_etp"))
            for group in layout.groups("edp"):
                assert all(set(layout.group("tp", rank)) <= set(group) for rank in group)
    consecutive = foldpar.solve_layout(8, tp=2, ep=4, order="consecutive")
    assert all(list(group) == sorted(group) for axis in ("edp", "ep", "etp") for group in consecutive.groups(axis))
    communicators = [len({tuple(sorted(layout.group(axis, 0))) for axis in ("tp", "dp", "ep", "edp")})
                     for layout in (foldpar.solve_layout(8, tp=2, ep=4), consecutive)]  # fmt: skip
    assert communicators == [2, 4], "two per rank instead of four"


# Names.


@pytest.mark.parametrize("name", foldpar.__all__)
def test_every_exported_name_has_its_line(name):
    lines = re.findall(rf"^\| `{name}\b.*", section("API at a glance"), re.MULTILINE)
    assert len(lines) == 1, f"{name} has {len(lines)} lines in README.md, 'API at a glance'"


def test_signatures_are_those_of_the_code():
    for name, arguments in re.findall(r"^\| `(\w+)(?:\(([^)`]*)\))?`", section("API at a glance"), re.MULTILINE):
        thing = getattr(foldpar, name)  # no line for a name that does not exist
        if arguments:
            written = [word for word in re.split(r",\s*", arguments) if word not in ("*", "...")]
            parameters = list(inspect.signature(thing).parameters)
            assert written == (parameters[: len(written)] if "..." in arguments else parameters), name


def test_everything_for_tests_is_mentioned():
    checks = section("Checks")
    assert [name for name in testing.__all__ if f"`{name}`" not in checks] == []


def test_dotted_names_exist():
    for page in (README, CONTRIBUTING):
        for dotted in set(re.findall(r"\bfoldpar(?:\.\w+)+", page)) - {"foldpar.json"}:
            assert pkgutil.resolve_name(dotted) is not None


# CONTRIBUTING.md.


def test_the_floors_are_those_that_the_tests_hold():
    rows = table(section("How the code is laid out", CONTRIBUTING), "floor")
    written = [set(re.findall(r"`(\w+)`", row[1])) for row in rows]
    assert written == [set(names) - {"__init__"} for names in FLOORS]


def test_the_law_tests_that_are_shown_pass():
    for block in blocks("python", page=CONTRIBUTING):
        names: dict[str, object] = {"__name__": "shown"}
        exec(compile(block.text, "<CONTRIBUTING.md>", "exec"), names)
        tests = [thing for name, thing in names.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()  # type: ignore[operator]


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target
