"""The pages say what is so: their code runs, their output is what is printed, their names exist."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from hf_models import BRIEFLY, FAMILIES
from pages import CONTRIBUTING, DOCS, README, ROOT, blocks, blocks_of, section, table
from torch import Tensor, nn

import foldpar
from foldpar import families, testing
from foldpar.families import ParameterFamily
from foldpar.testing import RanksFailed, run_ranks

PAGES = {"README": README, "CONTRIBUTING": CONTRIBUTING, **DOCS}
LOOP = "A training loop"
HUGGING_FACE = "A Hugging Face model, sharded and saved"
RUN_HERE = {
    ("README", "Fold, train, save"),
    ("start", LOOP),
    ("huggingface", HUGGING_FACE),
    ("sharding", "Sharding and memory"),
    ("checkpoints", "Checkpoints"),
    ("testing", "Against one process"),
}
"""The Python blocks that a test of this file runs, by page and heading."""
RUN_ELSEWHERE = {("start", "Parts of a loss"): "test_loss_parts.py", ("start", "Lockstep"): "test_lockstep.py"}


def with_blocks(language: str, *, without: tuple[str, ...] = ()) -> list[str]:
    return [name for name, page in PAGES.items() if name not in without
            and any(block.language == language for block in blocks_of(page))]  # fmt: skip


def beside_the_pages(name: str) -> ModuleType:
    """A module of ``docs/``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Code and output.


def test_every_block_is_of_a_language_that_is_tested_here():
    for name, page in PAGES.items():
        assert {block.language for block in blocks_of(page)} <= {"text", "bash", "console", "python", "pycon"}, name
    assert len(README.encode()) <= 8192, "README.md is a face; a manual belongs to docs/"


def test_every_python_block_is_run_by_some_test():
    """Those of CONTRIBUTING.md below; the migration page's, which need other libraries, in test_config.py."""
    pages = set(with_blocks("python")) - {"CONTRIBUTING", "migration"}
    found = {(name, block.section) for name in pages for block in blocks("python", PAGES[name])}
    assert found == RUN_HERE | RUN_ELSEWHERE.keys()


def printed_by(program: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(program, "<page>", "exec"), {"__name__": "__main__"})
    return output.getvalue()


def test_the_training_loop_runs_and_prints_what_the_page_says():
    (loop,), (shown,) = blocks("python", DOCS["start"], LOOP), blocks("text", DOCS["start"], LOOP)
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
    assert f"foldpar.{use}(" in blocks("python", DOCS["start"], LOOP)[0].text


@pytest.mark.long
def test_the_training_loop_runs_under_torchrun(tmp_path):
    (tmp_path / "train.py").write_text(blocks("python", DOCS["start"], LOOP)[0].text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert [line[:5] for line in done.stdout.splitlines()] == ["step "] * 3


AROUND = """\
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
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
    steps: Iterable[Sequence[dict[str, Tensor]]],
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    last_step: int,
    train_one_step: Callable[[], None],
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


def test_the_programs_of_the_pages_pass_strict_type_checks(tmp_path):
    pages = with_blocks("python", without=("CONTRIBUTING", "migration", "testing"))  # tests need no annotations
    programs = [block.text for name in pages for block in blocks("python", PAGES[name])]
    assert len(programs) >= 5
    wrong = "import foldpar\n\nlayout: int = foldpar.solve_layout(world=4)\n"
    said = complaints_about(tmp_path, [*programs, wrong])
    assert said.count("\n") == 1 and f"block_{len(programs)}.py:3: error: Incompatible types" in said, said


class Counting:
    """A scheduler in name: it counts the steps of ``train_one_step``."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def hugging_face_pages(folder: Path) -> list[list[str]]:
    """Run the programs of the pages that need four ranks and transformers; returns the checkpoints of each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def saved_in(name: str) -> list[str]:
        return sorted(path.name for path in (folder / name / "runs").iterdir())

    for name, page, title in (("readme", README, "Fold, train, save"), ("hf", DOCS["huggingface"], HUGGING_FACE)):
        (folder / name).mkdir(exist_ok=True)
        os.chdir(folder / name)
        printed_by(blocks("python", page, title)[0].text)
    (folder / "pages").mkdir(exist_ok=True)
    os.chdir(folder / "pages")
    (loop,), (saving,) = blocks("python", DOCS["sharding"]), blocks("python", DOCS["checkpoints"])
    with foldpar.create_groups(foldpar.solve_layout(4, tp=2, ep=2), backend="gloo") as groups:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))

        def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
            return model(tokens, labels=tokens).loss

        torch.manual_seed(groups.dp.index)
        names = {"torch": torch, "foldpar": foldpar, "model": model, "groups": groups, "loss_of": loss_of}
        names |= {"steps": torch.randint(64, (2, 3, 1, 6)), "scheduler": Counting(), "last_step": 5}
        exec(loop.text, names)
        assert names["optimizer"].state

        def train_one_step() -> None:
            loss_of(model, torch.randint(64, (1, 6))).backward()
            foldpar.reduce_gradients(model, groups)
            names["optimizer"].step()
            names["optimizer"].zero_grad()
            names["scheduler"].steps += 1

        names["train_one_step"] = train_one_step
        for started_at in (0, 4):
            exec(saving.text, names)
            assert names["info"].step == started_at and names["scheduler"].steps == 5
    return [saved_in(name) for name in ("readme", "hf", "pages")]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_the_programs_for_hugging_face_models_run(tmp_path):
    found = run_ranks(hugging_face_pages, 4, tmp_path, timeout=300.0)
    assert found == [[["step-4"], ["step-4"], ["step-2", "step-4"]]] * 4


def test_the_families_that_the_page_names_are_those_that_are_tested():
    rows = table(section("What is folded", DOCS["huggingface"]), "when")
    named = [re.findall(r"`(\w+)`", row[1]) for row in rows]
    assert named == [[family for family in FAMILIES if family not in {*BRIEFLY, "jetmoe"}], list(BRIEFLY)]
    assert f"names the {sum(map(len, named))}\nfamilies" in README


def test_the_layer_that_is_checked_against_one_process():
    (program,) = blocks("python", DOCS["testing"], "Against one process")
    names: dict[str, object] = {"__name__": "shown"}
    exec(compile(program.text, "<testing.md>", "exec"), names)
    names["test_my_layer"]()  # type: ignore[operator]


@pytest.mark.parametrize("name", with_blocks("pycon", without=("migration",)))
def test_interactive_examples(name):
    text = "\n".join(block.text for block in blocks("pycon", PAGES[name]))
    page = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, name, 0)
    report = io.StringIO()
    doctest.DocTestRunner().run(page, out=report.write)
    assert not report.getvalue(), report.getvalue()


def test_the_command_line_prints_what_the_page_says():
    for block in blocks("console", DOCS["layouts"], "Two orders"):
        for dialogue in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, shown = dialogue.partition("\n")
            words = shlex.split(command)
            assert words[0] == "python"
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
            assert done.stdout + done.stderr == shown


def test_the_demo_starts_with_the_layout_that_the_page_shows():
    (block,) = blocks("console", DOCS["start"], "Two commands")
    command, _, shown = block.text.partition("\n")
    assert command == "$ make demo"
    assert shown.partition("\n\nloss")[0] == str(foldpar.solve_layout(4, tp=2, ep=4))
    assert shown.endswith(blocks("console", README, "See it")[0].text), "README.md shows the last lines"


@pytest.mark.long
def test_the_demo_prints_what_the_page_says():
    (block,) = blocks("console", DOCS["start"], "Two commands")
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=500)
    number = re.compile(r"\d+\.\d+(e-\d+)?")
    shown = block.text.partition("\n")[2]
    assert done.stdout.endswith("\n") and number.sub("#", shown) in number.sub("#", done.stdout)


@pytest.mark.parametrize("name", with_blocks("bash"))
def test_shell_commands_name_what_exists(name):
    lines = [line.partition("  #")[0] for block in blocks("bash", PAGES[name]) for line in block.text.splitlines()]
    for words in (shlex.split(line) for line in lines if line):
        if words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=True, timeout=60)
        for word in words:
            if re.match(r"(tests|examples|benchmarks|src|\.ci)/", word):
                assert (ROOT / word.partition("::")[0]).exists(), word


def test_make_variables_that_the_page_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"\b([A-Z_]+)=", section("Two commands", DOCS["start"]))):
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
    (quoted,) = blocks("text", DOCS["failures"], "When a rank fails")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fail_on_one_rank, 4)
    (told,) = [failure.error for failure in failed.value.failures if "told: " in failure.error]
    assert told.partition("told: ")[2].startswith(quoted.text.strip())


# Facts.


def words_of(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_pictures_are_those_that_the_library_draws():
    drawn = beside_the_pages("pictures").drawn()
    assert {path.name: path.read_text() for path in (ROOT / "docs/pictures").iterdir()} == drawn


def test_the_picture_of_the_fold_shows_both_views():
    layout = foldpar.solve_layout(4, tp=2, ep=4)
    words = words_of((ROOT / "docs/pictures/fold.svg").read_text())
    dense, expert = words[: words.index("fold")], words[words.index("fold") :]
    assert re.findall(r"rank (\d)", " ".join(dense)) == [str(rank) for dp in (0, 2) for rank in layout.group("tp", dp)]
    experts = {int(name[5:]): words for name, words in pairwise(expert) if name.startswith("rank ")}
    assert experts == {rank: f"e{2 * place} e{2 * place + 1}" for place, rank in enumerate(layout.group("ep", 0))}


def test_the_picture_of_gradients_shows_what_reduction_sums():
    words = words_of((ROOT / "docs/pictures/gradients.svg").read_text())
    layout = foldpar.solve_layout(4, tp=2, ep=2)
    for family in (families.DENSE_SHARDED, families.REPLICATED, families.ROUTER_OWN_TOKENS, families.ROUTED_EXPERT):
        ranks = " and ".join("+".join(map(str, group)) for group in layout.groups(family.data_axis))
        lanes = {"SKIP": "nothing", "SUM": "sum", "AVERAGE": "average"}[family.reduction.name]
        assert f"lanes: {lanes}, then sum over {family.data_axis}: ranks {ranks}" in words


def family_constants() -> dict[str, ParameterFamily]:
    return {name: value for name, value in vars(families).items() if isinstance(value, ParameterFamily)}


def test_the_table_of_families_is_what_the_code_does():
    rows = table(beside_the_pages("tables").table_of_families(), "family")
    assert [row[0].strip("`") for row in rows] == list(family_constants())
    for (_, shards, copies, lanes, data), family in zip(rows, family_constants().values(), strict=True):
        assert re.findall(r"`(\w+)`", shards) == list(family.shard_axes)
        assert re.findall(r"`(\w+)`", copies) == list(family.replica_axes)
        assert lanes.startswith(f"{family.reduction.name}: ") and data.strip("`") == family.data_axis
        assert family.lane_axis is None or lanes.endswith(f"`{family.lane_axis}`")


def test_the_table_of_parameters_is_what_the_layer_marks():
    rows = table(beside_the_pages("tables").table_of_parameters(), "parameter")
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
                    assert marked["router.weight"] == family_constants()[re.findall(r"`(\w+)`", row[column])[0]]
                    assert (
                        marked["experts.down_proj"]
                        == family_constants()[re.findall(r"`(\w+)`", experts_row[column])[0]]
                    )


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
    lines = re.findall(rf"^\| `{name}\b.*", section("At a glance", DOCS["api"]), re.MULTILINE)
    assert len(lines) == 1, f"{name} has {len(lines)} lines in docs/api.md, 'At a glance'"


def test_signatures_are_those_of_the_code():
    for name, arguments in re.findall(
        r"^\| `(\w+)(?:\(([^)`]*)\))?`", section("At a glance", DOCS["api"]), re.MULTILINE
    ):
        thing = getattr(foldpar, name)  # no line for a name that does not exist
        if arguments:
            written = [word for word in re.split(r",\s*", arguments) if word not in ("*", "...")]
            parameters = list(inspect.signature(thing).parameters)
            assert written == (parameters[: len(written)] if "..." in arguments else parameters), name


def test_everything_for_tests_is_mentioned():
    assert [name for name in testing.__all__ if f"`{name}`" not in DOCS["testing"]] == []


def test_dotted_names_exist():
    for page in PAGES.values():
        for dotted in set(re.findall(r"\bfoldpar(?:\.\w+)+", page)) - {"foldpar.json"}:
            assert pkgutil.resolve_name(dotted) is not None


# CONTRIBUTING.md.


def test_the_law_tests_that_are_shown_pass():
    for block in blocks("python", CONTRIBUTING):
        names: dict[str, object] = {"__name__": "shown"}
        exec(compile(block.text, "<CONTRIBUTING.md>", "exec"), names)
        tests = [thing for name, thing in names.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()  # type: ignore[operator]


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        target, _, heading = link.partition("#")
        found = page.parent / target if target else page
        assert found.exists(), link
        headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if heading else []
        slugs = {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in headings}
        assert not heading or heading in slugs, link


def test_files_that_pages_and_tests_name_exist():
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*/*.py"), ROOT / "Makefile"]
    named = {
        (path.name, name)
        for path in sources
        if path.name != "CHANGELOG.md"
        for name in re.findall(r"\b((?:tests|examples|benchmarks|docs)/[\w/]+\.\w+)", path.read_text())
    }
    assert len(named) > 20
    assert not [(page, name) for page, name in sorted(named) if not (ROOT / name).exists()]


def test_no_test_imports_a_test():
    tests = sorted((ROOT / "tests").glob("*/test_*.py"))
    assert len(tests) > 60
    stems = {path.stem for path in tests}
    for path in tests:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not modules & stems, path


def test_matrices_that_are_thinned_out_exist():
    (every,) = re.findall(
        r"^EVERY = (\{.*?^\})", (ROOT / "tests" / "conftest.py").read_text(), re.DOTALL | re.MULTILINE
    )
    every = ast.literal_eval(every)
    assert len(every) > 20
    for name in every:
        file, _, function = name.partition("::")
        (path,) = (ROOT / "tests").glob(f"*/{file}")
        assert f"def {function}(" in path.read_text(), name
