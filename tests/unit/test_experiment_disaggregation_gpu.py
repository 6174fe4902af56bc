"""experiments/disaggregation/gpu.py runs, on the CPU and with workers that take it for a GPU."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from hybridlab import weights_held
from hybridlab.engine import gpu_copy, remote_worker
from hybridlab.hardware.gpu import Gpu

TESTS = Path(__file__).parents[1]
SIZES = ["--prompt", "96", "--chunk", "16", "--output", "12", "--decodes", "2", "--repeats", "1", "--threads", "4"]
MODES = ["decodes alone", "prompt alone", "mixed"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = TESTS.parent / "experiments" / "disaggregation" / "gpu.py"
    spec = importlib.util.spec_from_file_location("disaggregation_gpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    with (out / "gpu.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == len(rows) + 1
    return rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_system_is_measured_alone_and_mixed(script, tmp_path, monkeypatch, device):
    if device == "cuda":
        worker = TESTS / "parity" / "cuda_on_cpu_worker.py"
        monkeypatch.setattr(remote_worker, "COMMAND", (sys.executable, "-P", str(worker)))
        gpus = tuple(Gpu(index, "made up", 2**34, (9, 0)) for index in range(2))
        for name in ("engine.options", "loading", "hardware.detect"):
            monkeypatch.setattr(import_module(f"hybridlab.{name}"), "detect_gpus", lambda: gpus)
        monkeypatch.setattr(gpu_copy, "can_share", lambda index: True)
    gpus_of = "0,0" if device == "cuda" else "0,1"
    where = ["--preset", "tiny", "--layers", "2", "--device", device, "--gpus", gpus_of]
    assert script.main([str(tmp_path), *SIZES, *where]) == 0
    rows = rows_of(tmp_path)
    assert [row["mode"] for row in rows if "repeat" in row] == 3 * MODES
    mixed = [row for row in rows if row["mode"] == "mixed"]
    assert len({row["system"] for row in mixed}) == 3
    assert all(row["long_ttft_s"] > 0 and row["long_second_token_s"] > 0 and row["p99_itl_s"] > 0 for row in mixed)
    (_, both) = [row for row in rows if row["mode"] == "memory"]
    assert both["copies"] <= 1.05 and both["weights_gb"] > 0
    (_, on_gpu) = [row for row in rows if row["mode"] == "GPU memory"]
    if device == "cuda":
        assert 0 < on_gpu["gpu_shared_gb"] < on_gpu["gpu_planned_gb"]
        assert sorted(word.split()[1] for word in on_gpu["on_gpu"].split(", ")) == ["attached", "made"]
    about = json.loads((tmp_path / "gpu.json").read_text())
    told = "both workers share GPU 0" if device == "cuda" else "GPUs 0 and 1"
    assert about["gpus_of_workers"] == told and about["code"]
    assert not [held for held in weights_held.list_held() if held.folder.endswith("tiny")]


def test_what_fails_is_a_row_and_a_status(script, tmp_path):
    where = ["--preset", "tiny", "--layers", "2", "--device", "cpu", "--prompt", "40000", "--output", "4"]
    assert script.main([str(tmp_path), *where]) == 1
    errors = [row["error"] for row in rows_of(tmp_path) if "error" in row]
    assert len(errors) == 2 and all("prompt alone: a request failed: prompt and output reach" in e for e in errors)
