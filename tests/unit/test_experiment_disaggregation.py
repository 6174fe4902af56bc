"""experiments/disaggregation: the script runs, and its rows and table are what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hybridlab.config import load_config

FOLDER = Path(__file__).parents[2] / "experiments" / "disaggregation"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"disaggregation_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_has_a_row_for_each_system_and_load(tmp_path, monkeypatch, capsys):
    sizes = ["--preset", "tiny", "--layers", "2", "--prompt", "64", "--output", "12", "--chunk", "16"]
    command = ["mixed.py", str(tmp_path), *sizes, "--decodes", "0,2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", command)
    mixed, analysis = script("mixed"), script("analysis")
    mixed.main()
    capsys.readouterr()
    analysis.main([str(tmp_path)])
    shown = capsys.readouterr().out
    for system in ("one worker, whole prompts", "one worker, chunks", "a worker for each"):
        assert shown.count(system) == 2


def test_gaps_count_while_the_prompt_is_computed():
    from types import SimpleNamespace

    def record(name, arrival_s, times_s):
        request = SimpleNamespace(id=name)
        return SimpleNamespace(request=request, arrival_s=arrival_s, token_times_s=times_s, output=[0] * len(times_s))

    records = [record("d0", 0.0, [1.0, 2.0, 5.0, 6.0, 7.0]), record("long", 2.5, [5.5, 5.6])]
    row = script("mixed").measured(SimpleNamespace(records=records, duration_s=7.0))
    assert (row["long_ttft_s"], row["num_itl_s"], row["num_window_itl_s"]) == (3.0, 4, 2)
    assert row["p50_window_itl_s"] == pytest.approx(2.0) and row["p99_tpot_s"] == pytest.approx(1.5)
    assert row["output_tokens_per_s"] == pytest.approx(1.0)


def test_its_config_has_both_systems():
    config = load_config(FOLDER / "config.yaml")
    assert config.sweep["engine.workers"][0] is None and set(config.sweep["engine.workers"][1]) == {"prefill", "decode"}
