"""A machine measured for the simulator, and engine and simulator side by side, on a small model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hybridlab as hl
from hybridlab import agreement
from hybridlab.agreement import METRICS, Bracket, Load, Twin, compared, compared_trace
from hybridlab.calibration import ops as calibration_ops
from hybridlab.calibration import profile as calibration_profile
from hybridlab.calibration.profile import measure_profile, write_profile
from hybridlab.checkpoint import open_checkpoint
from hybridlab.errors import ConfigError
from hybridlab.hardware.read_bandwidth import read_bandwidth_gb_s
from hybridlab.simulator.fit import Fitted
from hybridlab.simulator.machine import load_profile
from hybridlab.simulator.shapes import ModelShape

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement") / "tiny"
    hl.make_checkpoint(folder, "tiny", dtype="fp8", seed=0)
    return folder


@pytest.fixture
def short(monkeypatch):
    """Few and small steps, and a quick look at the memory."""
    monkeypatch.setattr(calibration_ops, "DECODE", ((1, 16), (2, 64), (4, 16)))
    monkeypatch.setattr(calibration_ops, "PROMPTS", (2, 8, 32, 64))
    monkeypatch.setattr(calibration_profile, "SERVED", (1, 2))
    quick = lambda threads: read_bandwidth_gb_s(threads, repeats=2, buffer_bytes=1 << 24)  # noqa: E731
    monkeypatch.setattr(calibration_profile, "read_bandwidth_gb_s", quick)
    monkeypatch.setattr(agreement, "PROBE_BYTES", 1 << 22)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_measured_machine_is_one_that_the_simulator_takes(tiny, short, tmp_path, device):
    found = measure_profile(tiny, device, threads=2, progress=False)
    again = load_profile(write_profile(found, tmp_path / "here.toml"))
    assert "calibrate" in again.sources["host_read_efficiency"] and "cpu_overlap" in again.intervals
    assert again.machine.has_gpu == (device == "emulated")
    assert again.machine.hardware("here", gpu=again.machine.has_gpu).device == device
    config = {
        "experiment": "here",
        "model": {"path": str(tiny)},
        "workload": {"kind": "poisson", "num_requests": 2, "rate_req_s": 5.0, "prompt_tokens": 20, "output_tokens": 3},
        "engine": {"token_budget": 64, "kv_tokens": 256},
        "simulator": {"machine": str(tmp_path / "here.toml")},
    }
    (row,) = hl.run(config, backend="simulator", results_dir=tmp_path, progress=False).summary.to_dict("records")
    assert np.isfinite(row["mean_ttft_s"]) and row["completed"] == 2


def test_a_fit_that_says_little_is_told(tiny, monkeypatch):
    machine = load_profile("desktop").machine
    monkeypatch.setattr(calibration_profile, "fit", lambda m, *_: Fitted(m, {}, np.array([-0.1, 0.6, -0.5])))
    known = calibration_profile._Known(machine)
    with pytest.warns(UserWarning, match="half of the copies are 50% off or more: other programs"):
        known.fit("copies", ModelShape.of(open_checkpoint(tiny).spec), [], ["link_gb_s"])
    assert "median error 50.0%" in known.sources["link_gb_s"]


def test_engine_and_simulator_serve_the_same_requests(tiny, short):
    machine = load_profile("desktop").machine
    with hl.load(
        tiny, device="cpu", threads=1, token_budget=64, kv_tokens=512, prefix_cache=False, quiet=True
    ) as engine:
        twin, bracket = Twin(engine, machine), Bracket(1)
        bracket._gb_s = lambda: 1.0  # type: ignore[method-assign]
        rows = list(compared(engine, twin, [Load(1, 20, 4), Load(2, 30, 4)], bracket, {"device": "cpu"}))
        asked = {"share": 0.5, "count": 4, "scheduler": "fcfs", "prompt": 16, "answer": 4}
        traced = compared_trace(engine, twin, bracket, {}, **asked)
    assert [row["requests"] for row in rows] == [1, 2]
    for row in rows:
        assert all(row[f"{side}_{name}"] > 0 for side in ("predicted", "measured") for name in METRICS)
    assert rows[1]["predicted_ttft_s"] > rows[0]["predicted_ttft_s"]
    assert traced is not None and traced["measured_p99_ttft_s"] > 0


def test_a_machine_that_changed_is_measured_again_and_then_dropped(monkeypatch):
    monkeypatch.setattr(agreement, "PROBE_BYTES", 1 << 12)
    bracket, rates = Bracket(1), iter([10.0, 8.0, 10.0, 10.5])
    bracket._gb_s = lambda: next(rates)  # type: ignore[method-assign]
    assert bracket(lambda: "found") == "found"
    assert (bracket.repeated, bracket.dropped) == (1, 0)
    rates = iter([10.0, 8.0] * agreement.ATTEMPTS)
    assert bracket(lambda: "found") is None
    assert (bracket.repeated, bracket.dropped) == (agreement.ATTEMPTS, 1)


@pytest.fixture(scope="module")
def analysis():
    path = ROOT / "experiments" / "agreement" / "analysis.py"
    spec = importlib.util.spec_from_file_location("agreement_analysis", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(predicted: list[float], measured: list[float]) -> pd.DataFrame:
    rows = {
        f"{side}_{name}": values
        for side, values in (("predicted", predicted), ("measured", measured))
        for name in METRICS
    }
    about = {"device": "cpu", "requests": 1, "prompt_tokens": 8, "repeated": 0, "dropped": 0, "link_gb_s": np.nan}
    return pd.DataFrame({**about, "strategy": list("abc")[: len(measured)], **rows})


def test_the_score_of_errors_order_and_regret(analysis):
    found = analysis.score(table([1.0, 2.0, 3.0], [1.0, 2.2, 2.9]))
    assert found["all median error"] == pytest.approx(3.0 / 2.9 - 1)
    assert found["in the right order"] == 1.0 and found["pairs that differ"] == 9
    assert found["largest regret on the front"] == 0.0
    found = analysis.score(table([2.0, 1.0, 3.0], [1.0, 1.5, 3.0]))  # the best one is second on the simulator
    assert found["in the right order"] == pytest.approx(2 / 3)
    assert found["largest regret on the front"] == pytest.approx(0.5)
    assert analysis.score(table([1.0, 2.0], [1.0, 1.05]))["pairs that differ"] == 0  # too close to count


def test_one_strategy_over_another_link_is_no_choice(analysis):
    links = table([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).assign(strategy=["a", "b", "b"], link_gb_s=[np.nan, 4.0, 2.0])
    assert analysis.score(links)["pairs that differ"] == 2 * len(METRICS)
    links = table([2.0, 1.0, 3.0], [1.0, 1.5, 3.0]).assign(strategy=["a", "b", "b"], link_gb_s=[np.nan, 4.0, 2.0])
    assert analysis.score(links)["largest regret on the front"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"device": "tpu"}, "expected cpu, emulated or cuda"),
        ({"device": "cpu", "link_gb_s": 3.0}, "device 'cpu' has neither"),
        ({"device": "cpu", "threads": 0}, "threads is 0"),
    ],
)
def test_impossible_options_are_refused(tiny, options, shown):
    with pytest.raises(ConfigError, match=shown):
        measure_profile(tiny, progress=False, **options)


def test_a_profile_is_written_as_toml_only(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.toml"):
        write_profile(load_profile("desktop"), tmp_path / "here.json")
