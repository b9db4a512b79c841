"""The drawing of a layout: every rank in both views, its node, its links; a page of one file without a network."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from foldpar import LayoutError, cli, solve_layout
from foldpar.layout import drawing

SPACE = "{http://www.w3.org/2000/svg}"
LAYOUTS = [
    solve_layout(8, tp=2, ep=4),
    solve_layout(12, tp=2, pp=2, ep=3, order="consecutive"),
    solve_layout(64, tp=4, ep=16, etp=2),
    solve_layout(512, tp=4, pp=4, ep=32),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_is_in_both_views_where_the_layout_says(layout):
    places: dict[str, tuple[float, float]] = {}
    root = ElementTree.fromstring(drawing.svg(layout, gpus_per_node=8))
    cells = [each for each in root.iter(f"{SPACE}g") if each.get("class") == "cell"]
    ranks = [int(cell.get("data-rank")) for cell in cells]
    half = layout.world
    assert sorted(ranks[:half]) == sorted(ranks[half:]) == list(range(layout.world))
    assert ranks[half:] == [layout.rank_at("expert", place) for place in range(layout.world)]
    for cell in cells:
        box = cell.find(f"{SPACE}rect")
        place = (box.get("x"), box.get("y"))
        assert place not in places.values(), "two ranks in one place"
        places[f"{len(places)}"] = place
        assert cell.find(f"{SPACE}title").text.startswith(f"rank {cell.get('data-rank')} on node")
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in places.values())


def test_links_of_a_rank_go_to_its_peers_and_are_dashed_where_they_leave_the_node():
    layout = solve_layout(8, tp=2, ep=4)
    root = ElementTree.fromstring(drawing.svg(layout, rank=0, gpus_per_node=4))
    links = next(each for each in root.iter(f"{SPACE}g") if each.get("id") == "links")
    dashed = {}
    for line in links.findall(f"{SPACE}line"):
        dashed.setdefault(line.get("stroke"), []).append(line.get("stroke-dasharray") is not None)
    ep, tp = drawing._CROSSES["ep"][0], drawing._CROSSES["tp"][0]
    assert sorted(dashed[ep]) == [False, True, True]  # 2 | 4 6
    assert dashed[tp] == [False]


def test_the_page_is_one_file_and_knows_all_groups(tmp_path, capsys):
    file, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    command = f"show --world 8 --tp 2 --ep 4 --gpus-per-node 4 --rank 3 --html {file} --svg {picture}"
    assert cli.main(command.split()) == 0
    assert "rank 3 is" in capsys.readouterr().out
    page = file.read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|@import", page), "the page asks the network"
    data = json.loads(re.search(r"const data = (\{.*\}), links", page).group(1))
    layout = solve_layout(8, tp=2, ep=4)
    assert data["groups"].keys() == {"tp", "dp_cp", "ep", "edp"}
    for axis, groups in data["groups"].items():
        assert tuple(map(tuple, groups)) == layout.groups(axis), "in coordinate order, as everywhere"
    assert data["first"] == 3
    assert ElementTree.parse(picture).getroot().get("width") is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 8}, "rank = 8 is out of range"),
        ({"gpus_per_node": 0}, "gpus_per_node = 0 is not a positive integer"),
        ({"gpus_per_node": "4"}, "gpus_per_node = '4' is not a positive integer"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, text):
    for draw in (drawing.svg, drawing.html):
        with pytest.raises(LayoutError, match=text):
            draw(solve_layout(8, tp=2), **options)
    with pytest.raises(LayoutError, match="more ranks than a drawing can show, which is 4096"):
        drawing.svg(solve_layout(8192))
