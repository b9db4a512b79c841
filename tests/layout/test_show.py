"""The picture of a layout, its data, and the command line that prints them."""

import json
import re
import subprocess
import sys
import tracemalloc
from dataclasses import asdict, replace

import pytest
from every_layout import layouts
from hypothesis import given
from hypothesis import strategies as st

import foldpar
from foldpar import LayoutError, cli, solve_layout
from foldpar.layout import picture as show
from foldpar.layout.layout import AXES, ORDERS

FOLD = ["show", "--world", "8", "--tp", "2", "--ep", "4"]


def leaves(group: tuple[int, ...], gpus_per_node: int) -> bool:
    return len({rank // gpus_per_node for rank in group}) > 1


def test_a_layout_prints_both_views_and_all_groups():
    assert str(solve_layout(8, tp=2, ep=4)) == (
        "world 8 = pp 1 x stage 8, order tp-lane-major\n"
        "\n"
        "dense view: stage 8 = dp 4 x cp 1 x tp 2\n"
        "       tp0  tp1\n"
        "  dp0    0    1\n"
        "  dp1    2    3\n"
        "  dp2    4    5\n"
        "  dp3    6    7\n"
        "\n"
        "expert view: stage 8 = edp 2 x ep 4 x etp 1\n"
        "        ep0  ep1  ep2  ep3\n"
        "  edp0    0    2    4    6\n"
        "  edp1    1    3    5    7\n"
        "\n"
        "groups, in coordinate order\n"
        "  dp   2 of 4  (0 2 4 6) (1 3 5 7)\n"
        "  tp   4 of 2  (0 1) (2 3) (4 5) (6 7)\n"
        "  edp  4 of 2  (0 1) (2 3) (4 5) (6 7)\n"
        "  ep   2 of 4  (0 2 4 6) (1 3 5 7)\n"
        "  size 1: pp, cp, etp"
    )


def test_a_rank_is_marked_and_sees_whom_it_talks_to():
    assert show.text(solve_layout(4, tp=2, ep=4), rank=2) == (
        "world 4 = pp 1 x stage 4, order tp-lane-major\n"
        "\n"
        "dense view: stage 4 = dp 2 x cp 1 x tp 2\n"
        "       tp0  tp1\n"
        "  dp0   0    1\n"
        "  dp1  [2]   3\n"
        "\n"
        "expert view: stage 4 = edp 1 x ep 4 x etp 1\n"
        "        ep0  ep1  ep2  ep3\n"
        "  edp0   0   [2]   1    3\n"
        "\n"
        "rank 2 is pp 0, dp 1, cp 0, tp 0, edp 0, ep 1, etp 0; its groups\n"
        "  dp  (0 [2])      other sequences, same dense shards\n"
        "  tp  ([2] 3)      the lanes of one dense layer\n"
        "  ep  (0 [2] 1 3)  one whole set of experts\n"
        "  size 1: pp, cp, edp, etp"
    )


@given(layouts(max_world=16))
def test_small_worlds_are_shown_whole(layout):
    _, dense, expert, groups = str(layout).split("\n\n")
    for view in (dense, expert):
        _, _, *rows = view.splitlines()
        cells = [int(cell) for row in rows for cell in re.split("  +", row.strip())[1:]]
        assert sorted(cells) == list(range(layout.world))
    for line in groups.splitlines()[1:]:
        if "size 1" not in line:
            axis = line.split()[0]
            assert line.endswith(" ".join(f"({' '.join(map(str, group))})" for group in layout.groups(axis)))


@pytest.mark.parametrize("rank", [None, 777_777])
def test_a_million_ranks_make_a_small_picture(rank):
    layout = solve_layout(1_048_576, tp=8, cp=2, ep=64, etp=2, pp=8)
    tracemalloc.start()
    picture = show.text(layout, rank=rank)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(picture) < 16_000
    assert max(map(len, picture.splitlines())) < 200
    assert picture.count("[777777]") == (0 if rank is None else 2 + len(AXES))


def test_stars_mark_the_groups_that_leave_a_node():
    picture = show.text(solve_layout(8, tp=2, ep=4), gpus_per_node=4)
    assert "groups, in coordinate order (* leaves its node)" in picture
    assert "  ep   2 of 4  (0 2 4 6)* (1 3 5 7)*\n" in picture
    assert "  tp   4 of 2  (0 1) (2 3) (4 5) (6 7)\n" in picture


def test_the_order_that_keeps_groups_inside_is_named_with_its_price():
    assert show.text(solve_layout(8, tp=2, ep=4), gpus_per_node=4).endswith(
        "nodes of 4 GPUs\n"
        "  dp: 2 of 2 groups leave their node, in either order\n"
        "  ep: 2 of 2 groups leave their node; order consecutive keeps them inside, but then edp would leave"
    )
    assert show.text(solve_layout(8, tp=2, ep=4, order="consecutive"), gpus_per_node=4).endswith(
        "  edp: 4 of 4 groups leave their node; order tp-lane-major keeps them inside, but then ep would leave"
    )
    assert show.text(solve_layout(16, tp=2, ep=16), gpus_per_node=8).endswith(
        "  ep: 1 of 1 groups leave their node, which is too small for 16 ranks"
    )
    assert show.text(solve_layout(8, tp=2, ep=4), gpus_per_node=8).endswith("  every group stays inside its node")


@given(layouts(), st.integers(1, 20))
def test_nodes_are_told_truly(layout, gpus_per_node):
    data = show.data(layout, gpus_per_node=gpus_per_node)
    for axis in AXES:
        inside = {
            order: not any(leaves(group, gpus_per_node) for group in replace(layout, order=order).groups(axis))
            for order in ORDERS
        }
        assert data["leaving"][axis] == sum(leaves(group, gpus_per_node) for group in layout.groups(axis))
        named = data["order_inside"][axis]
        assert inside[named] if named else not any(inside.values())
        if inside[layout.order]:
            assert named == layout.order


@given(layouts(), st.data())
def test_data_survives_json(layout, drawn):
    data = json.loads(json.dumps(show.data(layout)))
    assert data["sizes"] == {axis: layout.size(axis) for axis in AXES}
    assert all(data["groups"][axis] == [list(group) for group in layout.groups(axis)] for axis in AXES)
    rank = drawn.draw(st.integers(0, layout.world - 1))
    data = json.loads(json.dumps(show.data(layout, rank=rank)))
    assert data["coordinate"] == asdict(layout.coordinate(rank))
    assert all(data["groups"][axis] == list(layout.group(axis, rank)) for axis in AXES)


@pytest.mark.parametrize("function", [show.text, show.data])
@pytest.mark.parametrize("gpus_per_node", [0, -8, True, 8.0])
def test_a_node_has_gpus(function, gpus_per_node):
    with pytest.raises(LayoutError, match=r"^gpus_per_node = .* is not a positive integer\.$"):
        function(solve_layout(8), gpus_per_node=gpus_per_node)


# The command line.


def test_the_command_line_prints_the_picture(capsys):
    assert cli.main(FOLD) == 0
    assert capsys.readouterr().out == str(solve_layout(8, tp=2, ep=4)) + "\n"
    assert (
        cli.main(["show", "--world=16", "--tp=2", "--ep=2", "--etp=2", "--pp=2", "--cp=2", "--order=consecutive"]) == 0
    )
    layout = solve_layout(16, tp=2, ep=2, etp=2, pp=2, cp=2, order="consecutive")
    assert capsys.readouterr().out == str(layout) + "\n"


def test_the_command_line_prints_data(capsys):
    assert cli.main([*FOLD, "--json", "--rank", "5", "--gpus-per-node", "4"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["groups"]["ep"] == [1, 3, 5, 7]
    assert data["leaving"]["ep"] == 2
    assert data["order_inside"]["ep"] == "consecutive"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--world", "8", "--ep", "3"],
            "ep * etp = 3 * 1 = 3 does not divide stage_size = 8, so edp would not be whole. "
            "With etp = 1, ep can be 1, 2, 4 or 8.",
        ),
        (["--world", "8", "--rank", "8"], "rank = 8 is out of range for world = 8: it can be 0 to 7."),
        (["--world", "8", "--order", "x"], "order = 'x' is unknown: it can be 'tp-lane-major' or 'consecutive'."),
        (["--world", "8", "--gpus-per-node", "0"], "gpus_per_node = 0 is not a positive integer."),
        (
            ["--world", f"{10**30}", "--json"],
            f"world = {10**30} has more ranks than are looked at one by one, which is 1,048,576. With a rank, data has "
            "the groups of that one; the picture in text cuts what is long.",
        ),
        (
            ["--world", f"{10**30}", "--rank", "7", "--gpus-per-node", "8"],
            f"world = {10**30} has more ranks than are looked at one by one, which is 1,048,576. Without "
            "gpus_per_node, nothing is looked at group by group.",
        ),
        (["--world", "8", "--svg", "no/x.svg"], "no is not a folder, so no/x.svg cannot be written there."),
        (["--world", "eight"], "argument --world: invalid int value: 'eight'"),
        ([], "the following arguments are required: --world"),
    ],
)
def test_mistakes_are_one_line_on_stderr(arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["show", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"foldpar: error: {text}\n")


def run(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False, **options)


def test_python_m_foldpar_runs():
    fold = f"{sys.executable} -m foldpar"
    assert run(f"{fold} --version").stdout == f"foldpar {foldpar.__version__}\n"
    assert run(f"{fold} show --world 8 --tp 2 --ep 4").stdout == str(solve_layout(8, tp=2, ep=4)) + "\n"
    failed = run(f"{fold} show --world 8 --tp 3")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)


def test_a_reader_that_leaves_early_is_no_error():
    done = run(f"{sys.executable} -m foldpar show --world 65536 --json | head -c 9")
    assert (done.stdout, done.stderr) == ('{"world":', "")
