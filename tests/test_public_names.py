"""What the package exports, what it takes to import it, and which module may import which."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import foldpar

SOURCE = Path(foldpar.__file__).parent
MODULES = sorted(path for path in SOURCE.rglob("*.py"))

# From the top to the bottom: a module imports from its own floor and from those below it.
FLOORS = (
    ("__init__", "__main__", "cli", "testing", "checkpoint"),
    (
        "block_proof",
        "folding",
        "hf",
        "hf_experts",
        "hf_export",
        "hf_import",
        "memory",
        "models",
        "planner",
        "refusals",
        "sharding",
        "stand_ins",
        "weights",
    ),
    (
        "checkpoint_dcp",
        "checkpoint_files",
        "checkpoint_manifest",
        "checkpoint_matching",
        "checkpoint_metadata",
        "checkpoint_pending",
        "checkpoint_ranks",
        "checkpoint_replicas",
        "checkpoint_schedulers",
        "checkpoint_state",
        "checkpoint_values",
        "dense_plan",
        "hf_files",
        "hf_names",
        "hf_tensors",
        "tensor_parallel",
        "weight_files",
    ),
    ("moe", "folded_experts"),
    (
        "auxiliary",
        "balanced_router",
        "capacity",
        "checks",
        "first_step",
        "correction_bias",
        "counters",
        "dispatching",
        "experts",
        "gradients",
        "journey",
        "lane_checks",
        "lane_ends",
        "lanes",
        "norms",
        "onesided",
        "placements",
        "randomness",
        "recomputation",
        "reducer",
        "routing",
        "scaling",
        "selection",
        "recognition",
        "whole_states",
    ),
    ("buckets", "meta_copy", "marks", "sharded", "steps", "dtensors", "kept_dtypes"),
    ("grouped", "activations", "storage", "permutation", "kernels", "peer_kernels"),
    ("collectives", "peers", "groups"),
    (
        "layout",
        "config",
        "foreign_configs",
        "show",
        "factors",
        "families",
        "boxes",
        "integers",
        "requirements",
        "arguments",
        "errors",
    ),
)
INTEGERS_ONLY = {*FLOORS[-1], "__init__", "__main__", "cli"}
MAY_COMMUNICATE = {"collectives", "groups", "peers", "testing"}
USE_TORCHS_ENGINES = {
    "checkpoint_dcp",
    "checkpoint_metadata",
    "checkpoint_ranks",
    "dtensors",
    "sharding",
    "tensor_parallel",
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
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    typed = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    lazy = {name: f"foldpar.{module}" for name, module in foldpar._MODULE_OF_NAME.items()}
    assert {name: module for name, module in typed.items() if module.startswith("foldpar.")} == lazy
    assert sorted(lazy) == foldpar.__all__ == sorted(foldpar.__all__)
    assert set(foldpar.__all__) <= set(dir(foldpar))


def test_no_public_name_is_shadowed_by_a_module():
    assert not set(foldpar.__all__) & {floor_name(path) for path in MODULES}


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
        "import foldpar.factors, foldpar.families",
    ],
)
def test_what_needs_no_torch_loads_none(use):
    assert loaded_by(use).isdisjoint({"torch", "numpy", "einops", "hypothesis"})


def test_what_needs_torch_loads_it_on_first_use():
    assert "torch" in loaded_by("import foldpar; foldpar.create_groups")


def loaded_by(use: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running ``use``."""
    program = f"{use}\nimport sys; print('\\nLOADED', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("LOADED ").split())


# The floors.


def floor_name(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def floor_of(name: str) -> int:
    floors = [number for number, names in enumerate(FLOORS) if name in names]
    assert floors, f"{name} has no floor: put it into FLOORS (and into the table of CONTRIBUTING.md)"
    return floors[0]


def imports(path: Path, *, at_run_time: bool) -> set[str]:
    """Dotted names that a module imports, those inside functions included; ``from a import b`` counts as a.b."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        skip = at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        todo += node.orelse if skip else ast.iter_child_nodes(node)
    return names


def imports_of_foldpar(path: Path, *, at_run_time: bool) -> set[str]:
    names = imports(path, at_run_time=at_run_time)
    parts = [name.split(".") for name in names if re.match(r"foldpar\.\w", name)]
    modules = {floor_name(module) for module in MODULES}
    return {part[1] if part[1] in modules else "__init__" for part in parts}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path):
    mine = floor_of(floor_name(path))
    if floor_name(path) != "__init__":
        for name in imports_of_foldpar(path, at_run_time=False):
            assert mine <= floor_of(name), f"{path.name} imports {name} from a floor above"
            assert name != "testing" or floor_name(path) == "testing", "the core does not import foldpar.testing"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_the_communication_floor_imports_torch_distributed(path):
    names = imports(path, at_run_time=True)
    if floor_name(path) in INTEGERS_ONLY:
        assert not [name for name in names if name.partition(".")[0] == "torch"]
    if floor_name(path) not in MAY_COMMUNICATE | USE_TORCHS_ENGINES:
        assert not [name for name in names if name.startswith("torch.distributed")]


def test_no_modules_import_each_other_in_a_circle():
    edges = {floor_name(path): set() for path in MODULES}
    for path in MODULES:
        if floor_name(path) not in ("__init__", "__main__"):
            edges[floor_name(path)] |= imports_of_foldpar(path, at_run_time=True) - {"__init__", floor_name(path)}
    while edges:
        leaves = {name for name, targets in edges.items() if not targets & set(edges)}
        assert leaves, f"these import each other in a circle: {sorted(edges)}"
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
