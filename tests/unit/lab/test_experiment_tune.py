"""experiments/tune: regret is counted against every candidate that ran, on whatever engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.config import load_config, points
from hybridlab.experiment import run
from hybridlab.tuning.tuned import Tuned

HERE = Path(__file__).parents[3] / "experiments" / "tune"


@pytest.fixture
def compare() -> Any:
    spec = importlib.util.spec_from_file_location("compare_tune", HERE / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_space_is_small_and_whole() -> None:
    config = load_config(HERE / "config.yaml")
    assert len(points(config)) == 12 and config.engine.device == "emulated"


def test_regret_is_against_the_best_that_ran(bench: list[str], config: dict[str, Any], compare: Any) -> None:
    swept = load_config({**config, "sweep": {"workload.num_requests": [2, 3, 4]}})
    every = run(swept, progress=False).summary["request_goodput_req_s"].tolist()
    assert len(set(every)) == 3
    table = pd.DataFrame({"measured_goodput_req_s": [min(every)]})
    found = compare.compared(swept, Tuned(swept, table, 3, 1, True), 60.0)
    assert (found["best_goodput_req_s"], found["worst_goodput_req_s"]) == (max(every), min(every))
    assert found["regret"] == pytest.approx(1 - min(every) / max(every))
    assert found["complete"] and found["candidates_run"] == 3
    partly = compare.compared(swept, Tuned(swept, table, 3, 1, True), -1.0)
    assert (partly["complete"], partly["candidates_run"], partly["candidates"]) == (False, 1, 3)
