"""What the package exports, what it takes to import it, and which module may import which."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from pages import CONTRIBUTING, section, table

import foldpar

SOURCE = Path(foldpar.__file__).parent
MODULES = sorted(path for path in SOURCE.rglob("*.py"))

# Wing -> the wings whose faces it may import. What stands outside them (errors, families, arguments, ...) is for all.
ARROWS = {
    "layout": set(),
    "comm": {"layout"},
    "parameters": {"layout", "comm"},
    "gradients": {"layout", "comm", "parameters"},
    "moe": {"layout", "comm", "parameters"},
    "models": {"layout", "comm", "parameters", "moe"},
    "planning": {"layout", "comm", "parameters", "gradients", "moe", "models", "sharding"},
    "sharding": {"layout", "comm", "parameters", "moe", "models"},
    "checkpoint": {"layout", "comm", "parameters"},
    "hf": {"layout", "comm", "parameters", "moe", "models"},
    "testing": {"layout", "comm", "parameters", "gradients", "moe", "models", "sharding", "checkpoint"},
}
OUTSIDE = {"__init__", "__main__", "arguments", "cli", "errors", "factors", "families", "requirements", "wording"}
NO_TORCH = {*OUTSIDE - {"arguments"}, "layout"}
MAY_COMMUNICATE = {
    "comm/c10d.py",
    "comm/collectives.py",
    "comm/dtensors.py",
    "comm/groups.py",
    "comm/host_meeting.py",
    "comm/peers.py",
    "comm/world.py",
    "testing",
}
USE_TORCHS_ENGINES = {
    "checkpoint/dcp.py",
    "checkpoint/metadata.py",
    "models/tensor_parallel.py",
    "sharding/shard.py",
}
"""They hand models to DCP, FSDP2 and DTensor, which live in torch.distributed."""


def test_the_exported_names_are_these():
    assert foldpar.__all__ == [
        "ArgumentError",
        "AxisGroup",
        "BalancedRouter",
        "Capacity",
        "CheckpointError",
        "CheckpointInfo",
        "ClampedSwiGLU",
        "CollectiveError",
        "Coordinate",
        "CounterValues",
        "DispatchPlan",
        "ExpertStorage",
        "ExpertWeights",
        "FamilyError",
        "FoldPlan",
        "FoldPlanRow",
        "FoldedExperts",
        "FoldedGroups",
        "FoldedLayout",
        "FoldedMoE",
        "FoldingConfig",
        "FoldingError",
        "GradScaler",
        "GradientError",
        "GradientReducer",
        "GroupLimit",
        "GroupedExperts",
        "GroupsError",
        "LaneState",
        "LayerCounters",
        "LayoutError",
        "LocalParameter",
        "MoEAdapter",
        "ModelError",
        "OneSided",
        "OwnActivation",
        "ParameterFamily",
        "PendingSave",
        "Placement",
        "RankMemory",
        "Reduction",
        "ReplicaError",
        "Router",
        "Routing",
        "ShapeError",
        "ShardingError",
        "TopKRouter",
        "accumulate",
        "all_gather_rows",
        "all_reduce",
        "all_to_all_rows",
        "assert_same_on_group",
        "check_optimizer",
        "check_replicas",
        "clip_grad_norm_",
        "combine",
        "copy_to_group",
        "create_groups",
        "declare_reduced",
        "dispatch",
        "fold_model",
        "get_total_norm",
        "latest_checkpoint",
        "limit_capacity",
        "load_balancing_loss",
        "load_checkpoint",
        "load_weights",
        "lockstep",
        "mark_parameters",
        "mark_placement",
        "parameter_families",
        "parameter_groups",
        "parameter_placements",
        "plan",
        "plan_dispatch",
        "plan_fold",
        "planned_parameters",
        "predict_memory",
        "random_region",
        "reduce_gradients",
        "reduce_scatter_rows",
        "region_generator",
        "router_z_loss",
        "save_checkpoint",
        "save_weights",
        "scale_gradient",
        "shard_model",
        "solve_layout",
        "split_rows",
        "update_correction_bias",
        "whole_state_dict",
    ]


@pytest.mark.parametrize("name", foldpar.__all__)
def test_a_public_name_loads_from_its_module_and_has_a_docstring(name):
    thing = getattr(foldpar, name)
    assert thing.__module__.startswith("foldpar.")
    assert thing.__name__ == name
    assert_documented(thing)
    if inspect.isclass(thing):
        for member in public_members(thing):
            assert_documented(member)


def public_members(cls: type) -> Iterator[object]:
    """Its own methods and properties; what overrides a method of a base class has its docstring there."""
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        inherited = any(hasattr(base, name) for base in cls.__mro__[1:])
        if inspect.isfunction(function) and not name.startswith("_") and not inherited:
            yield function


def assert_documented(thing: object) -> None:
    text = thing.__doc__ or ""
    assert text.strip(), f"{thing} has no docstring"
    assert not text.startswith(f"{thing.__name__}("), f"{thing} has only the docstring that dataclasses write"


def test_type_checkers_and_the_interpreter_see_the_same_names():
    tree = ast.parse((SOURCE / "__init__.pyi").read_text())
    typed = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "foldpar"
        for alias in node.names
    }
    lazy = {name: f"foldpar.{wing}" for name, wing in foldpar._WING_OF.items()}
    assert typed == lazy
    assert sorted(lazy) == foldpar.__all__
    assert set(foldpar.__all__) <= set(dir(foldpar))


def test_what_texts_name_by_its_wing_is_found_without_an_import_of_its_own():
    names = "foldpar.hf.export, foldpar.hf.import_, foldpar.testing.run_ranks"
    subprocess.run([sys.executable, "-c", f"import foldpar; {names}"], check=True)


def test_no_name_of_a_face_is_shadowed_by_a_module():
    assert not set(foldpar.__all__) & {wing_of(path) for path in MODULES}
    for wing in ARROWS:
        modules = {path.stem for path in (SOURCE / wing).glob("*.py")}
        assert not modules & set(getattr(import_module(f"foldpar.{wing}"), "__all__", ())), wing


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'foldpar' has no attribute 'solve_layouts'$"):
        foldpar.solve_layouts  # noqa: B018


@pytest.mark.parametrize(
    "use",
    [
        "import foldpar",
        "from foldpar import FoldedLayout, Coordinate, LayoutError, ParameterFamily, Reduction",
        "import foldpar; str(foldpar.solve_layout(8, tp=2, ep=4).coordinate(3))",
        "import foldpar; str(foldpar.solve_layout(8, tp=2, ep=4, pp=2))",
        "from foldpar.cli import main; main('show --world 8 --tp 2 --ep 4 --rank 3 --gpus-per-node 4'.split())",
        "from foldpar.cli import main; main('show --world 8 --tp 2 --ep 4 --json'.split())",
        "import foldpar.factors, foldpar.families, foldpar.layout",
        "from foldpar.cli import main; main('plan --gpus 4 --hidden 64 --layers 2 --heads 4 --vocab 64 "
        "--intermediate 64 --tokens 64 --batch 8 --json'.split())",
    ],
)
def test_what_needs_no_torch_loads_none(use):
    assert loaded_by(use).isdisjoint({"torch", "numpy", "einops", "hypothesis"})


def test_what_needs_torch_loads_it_on_first_use():
    assert "torch" in loaded_by("import foldpar; foldpar.create_groups")


def test_a_layout_needs_no_readers_of_configurations():
    assert "json" not in loaded_by("import foldpar; foldpar.solve_layout(8, tp=2, ep=4)")


def loaded_by(use: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running ``use``."""
    program = f"{use}\nimport sys; print('\\nLOADED', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("LOADED ").split())


# The arrows.


def wing_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_run_time: bool) -> set[tuple[str, str]]:
    """Module and name of everything that a module imports, inside functions too."""
    names: set[tuple[str, str]] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the wing"
            names |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            names.add((ast.unparse(node), ""))
        skip = at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        todo += node.orelse if skip else ast.iter_child_nodes(node)
    return names


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def test_every_module_is_in_a_wing_or_for_all():
    assert {wing_of(path) for path in MODULES} == ARROWS.keys() | OUTSIDE


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_arrows_between_wings_are_those_of_the_table_and_meet_faces(path):
    mine = wing_of(path)
    for module, name in imports(path, at_run_time=False):
        parts = [*module.split("."), name] if module == "foldpar" else module.split(".")
        if parts[0] != "foldpar" or parts[1] not in ARROWS or parts[1] == mine or mine in OUTSIDE:
            continue
        assert parts[1] in ARROWS[mine], f"{path} imports {module}: no arrow leads from {mine} to {parts[1]}"
        assert len(parts) == 2 or module == "foldpar", f"{path} imports {module} past the face of {parts[1]}"


def test_the_arrows_make_no_circle():
    left = dict(ARROWS)
    while left:
        leaves = {wing for wing, targets in left.items() if not targets & left.keys()}
        assert leaves, f"these wings import each other in a circle: {sorted(left)}"
        left = {wing: targets for wing, targets in left.items() if wing not in leaves}


def test_no_modules_import_each_other_in_a_circle():
    """Not inside a function either, and not for type checkers only; a face is a module like others."""
    paths = {
        f"foldpar/{named(path)}".removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in MODULES
    }
    edges = {
        module: {
            target
            for each, name in imports(path, at_run_time=False)
            for target in [f"{each}.{name}" if f"{each}.{name}" in paths else each]
            if target in paths
        }
        for module, path in paths.items()
    }
    assert {"foldpar.wording", "foldpar.layout.layout"} <= edges["foldpar.layout.config"]
    graphlib.TopologicalSorter(edges).prepare()


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_only_the_wing_of_communication_imports_torch_distributed(path):
    names = {module for module, _ in imports(path, at_run_time=True)}
    if wing_of(path) in NO_TORCH:
        assert not [name for name in names if name.partition(".")[0] == "torch"]
    if not {named(path), wing_of(path)} & (MAY_COMMUNICATE | USE_TORCHS_ENGINES):
        assert not [name for name in names if name.startswith("torch.distributed")]


def test_the_arrows_are_those_that_the_tests_hold():
    rows = table(section("How the code is laid out", CONTRIBUTING), "wing")
    written = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows}
    assert written == ARROWS
