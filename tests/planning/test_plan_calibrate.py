"""Measuring a machine: what is written is what plan --machine takes, on CPUs too."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

import foldpar
from foldpar import cli
from foldpar.planning import HostCost, Machine, ModelShape, host_costs, plan, read_machine
from foldpar.planning.calibrate import fit_link, measure_links
from foldpar.planning.host_costs import measure_host
from foldpar.testing import run_ranks


def test_calibrate_writes_a_machine_that_plan_takes(tmp_path, capsys):
    file = tmp_path / "here.json"
    assert cli.main(["calibrate", str(file), "--quick"]) == 0
    assert "Not measured here: node, ring, scatter, network, overlap, peak_flops" in capsys.readouterr().out
    machine = read_machine(file)
    assert (machine.name, machine.device) == ("here", "cpu")
    assert machine.sources["product_flops"].startswith("measured here")
    assert machine.to_dict() == json.loads(file.read_text())
    shape = ModelShape(hidden=64, layers=2, heads=4, vocab=64, experts=4, top_k=2, expert_hidden=32)
    found = plan(shape, gpus=4, gpu=file, tokens=64, batch=8)
    assert found.machine == machine
    assert "measured: product flops" in str(found)
    assert "not measured: node, ring, scatter, network, overlap, peak flops" in str(found)


def test_calibrate_measures_nothing_for_a_file_that_cannot_be(tmp_path, capsys):
    for file, text in ((tmp_path / "missing" / "here.json", "is not a folder, so"), (tmp_path, "is a folder; name")):
        with pytest.raises(SystemExit):
            cli.main(["calibrate", str(file)])
        assert text in capsys.readouterr().err


def _linked() -> Machine:
    with foldpar.create_groups(foldpar.solve_layout(2)) as groups:
        return measure_links(read_machine("h100"), groups, torch.device("cpu"), "here", quick=True)


def test_ranks_measure_the_link_between_them():
    for machine in run_ranks(_linked, 2, backend="threads"):
        assert machine.sources["node"] == "here: all-to-all over 2 ranks"
        assert machine.sources["ring"] == "here: all-gather and all-reduce over 2 ranks"
        assert machine.sources["scatter"] == "here: reduce-scatter over 2 ranks"
        assert [size for size, _ in machine.measured["node"]] == [4096, 65536]
        assert machine.node == fit_link(machine.measured["node"])
        assert machine.network == read_machine("h100").network


def _host_of_two() -> HostCost:
    return measure_host(read_machine("h100").host, 2, torch.device("cpu"), quick=True)[0]


@pytest.mark.long
def test_two_ranks_measure_what_launching_costs_them():
    """One-sided rows need GPUs, so that cost is the shipped one; all others were measured."""
    shipped = read_machine("h100").host
    for found in run_ranks(_host_of_two, 2):
        assert found.one_sided == shipped.one_sided
        assert found != shipped
        assert all(cost >= 0 for cost in asdict(found).values())


def test_more_layers_that_seem_to_take_less_time_cost_nothing(monkeypatch):
    """On a busy machine noise is larger than what a small layer costs; a machine has no negative numbers."""
    less = {"layer": -1e-4, "reduce": -1e-5, "optimizer": -1e-5}
    monkeypatch.setattr(host_costs._Slope, "of", lambda self, world, degrees, **options: (less, 0.0))
    found, _ = measure_host(read_machine("h100").host, 1, torch.device("cpu"), quick=True)
    assert set(asdict(found).values()) == {0.0, found.dense}


def test_a_link_is_the_line_through_its_points_and_noise_is_no_negative_one():
    link = fit_link([(float(size), 2e-5 + size / 3e11) for size in (10**6, 10**7, 10**8)])
    assert abs(link.latency - 2e-5) < 1e-9
    assert abs(link.bandwidth / 3e11 - 1) < 1e-6
    assert fit_link([(1e3, 2e-5), (1e6, 1e-5)]).latency == 1e-5
