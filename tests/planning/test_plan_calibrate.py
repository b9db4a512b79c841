"""Measuring a machine: what is written is what plan --machine takes, on CPUs too."""

from __future__ import annotations

import json

import foldpar
from foldpar import cli
from foldpar.planning import ModelShape, plan, read_machine
from foldpar.planning.calibrate import fit_link, measure
from foldpar.testing import run_ranks


def test_calibrate_writes_a_machine_that_plan_takes(tmp_path, capsys):
    file = tmp_path / "here.json"
    assert cli.main(["calibrate", str(file), "--quick"]) == 0
    assert "Not measured here: node, ring, network, overlap, peak_flops" in capsys.readouterr().out
    machine = read_machine(file)
    assert (machine.name, machine.device) == ("here", "cpu")
    assert machine.sources["product_flops"].startswith("measured here")
    assert machine.to_dict() == json.loads(file.read_text())
    shape = ModelShape(hidden=64, layers=2, heads=4, vocab=64, experts=4, top_k=2, expert_hidden=32)
    found = plan(shape, gpus=4, gpu=file, tokens=64, batch=8)
    assert found.machine == machine
    assert "measured: product flops" in str(found)


def _measured() -> tuple[str, list[object]]:
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        machine = measure("two", groups, quick=True)
    which = "node" if machine.sources["node"].startswith("measured") else "network"
    assert machine.sources[which].endswith("all-to-all over 2 ranks")
    return which, machine.measured[which]


def test_ranks_measure_the_link_between_them():
    for which, points in run_ranks(_measured, 2, backend="threads"):
        assert which in ("node", "network")
        assert [size for size, _ in points] == [4096, 65536]


def test_a_link_is_the_line_through_its_points_and_noise_is_no_negative_one():
    link = fit_link([(float(size), 2e-5 + size / 3e11) for size in (10**6, 10**7, 10**8)])
    assert abs(link.latency - 2e-5) < 1e-9
    assert abs(link.bandwidth / 3e11 - 1) < 1e-6
    assert fit_link([(1e3, 2e-5), (1e6, 1e-5)]).latency == 1e-5
