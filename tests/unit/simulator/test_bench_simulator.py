"""`hybridlab bench simulator`: what it measures is there, and is counted right; how fast is for the bench to say."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hybridlab.bench.simulator import MOST_RUNNING, TOPOLOGIES, AtMost, measure
from hybridlab.cli.app import app
from hybridlab.plans import QueueView, RunningRequest, WaitingRequest

pytest.importorskip("jax", reason="step maps need jax")


def test_a_small_bench_has_a_row_for_each_topology_and_for_serving():
    speed = measure(configurations=3, requests=2, repeats=1, runs=3)
    assert [row.what for row in speed.rows] == [
        *(f"step map, {name}" for name in TOPOLOGIES),
        *(f"event clock, {name}" for name in TOPOLOGIES),
        "serving",
        "study",
    ]
    assert all(0 < row.slowest_per_s <= row.per_s <= row.fastest_per_s for row in speed.rows)
    assert all(row.num_ops > 200 for row in speed.rows[:-2])
    assert speed.rows[-1].about.startswith("3 runs of 2 requests in ")
    assert "DRAM shared" in speed.rows[3].about and "scanned" in speed.rows[0].about
    for row in speed.rows:
        assert f"{row.what}: " in str(speed) and row.about in str(speed)


def test_the_command_prints_one_json_value():
    few = ["--configurations", "2", "--requests", "1", "--repeats", "1", "--runs", "1"]
    done = CliRunner().invoke(app, ["bench", "simulator", *few, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["rows"]) == 2 * len(TOPOLOGIES) + 2 and found["machine"]["cores"] >= 1


def test_the_scheduler_of_the_bench_fills_up_to_its_limit():
    waiting = tuple(WaitingRequest(f"w{i}", 0.0, 8) for i in range(100))
    running = tuple(RunningRequest(f"r{i}", 9) for i in range(MOST_RUNNING - 1))
    one = AtMost().schedule(QueueView(0.0, "main", waiting, running, 64, 10**6, 16))
    assert one is not None and (one.role, dict(one.tokens)) == ("prefill", {"w0": 8})
    full = AtMost().schedule(QueueView(0.0, "main", waiting, (*running, RunningRequest("r", 9)), 64, 10**6, 16))
    assert full is not None and (full.role, len(full.tokens)) == ("decode", MOST_RUNNING)
    assert AtMost().schedule(QueueView(0.0, "main", (), (), 64, 10**6, 16)) is None
