"""experiments/disaggregation: the scripts run, and their rows and tables are what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import hybridlab as hl
from hybridlab import step_log
from hybridlab.bench import interference as bench_interference
from hybridlab.bench.interference import interference
from hybridlab.serving import Served

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
    script("mixed").main()
    rows = pd.DataFrame(map(json.loads, (tmp_path / "mixed.jsonl").read_text().splitlines()))
    assert list(rows["system"].value_counts()) == [3, 3, 3]  # the prompt alone, the decodes alone, both
    assert (rows.loc[rows["mode"] == "mixed", "long_ttft_s"] > 0).all()
    monkeypatch.setattr(sys, "argv", ["analysis.py", str(tmp_path), "--figure"])
    capsys.readouterr()
    script("analysis").main()
    shown = capsys.readouterr().out
    for system in bench_interference.SYSTEMS:
        assert shown.partition("\n")[2].count(system) == 1  # the first line says how many repeats each has
    assert "p99 TPOT" in shown and (tmp_path / "interference.png").is_file()


def record(name, arrival_s, times_s, prompt=()):
    request = SimpleNamespace(id=name, prompt=prompt)
    return SimpleNamespace(request=request, arrival_s=arrival_s, token_times_s=times_s, output=[0] * len(times_s))


def test_gaps_count_while_the_prompt_is_computed():
    users: Any = [record("user 0", 0.0, [1.0, 2.0, 5.0, 6.0, 7.0]), record("long", 2.5, [5.5, 5.6], prompt=(1,) * 14)]
    row = bench_interference.latencies(Served(users, [], 7.0, 0))
    assert (row["long_ttft_s"], row["num_itl_s"], row["num_window_itl_s"]) == (3.0, 4, 2)
    assert row["p50_window_itl_s"] == pytest.approx(2.0) and row["p99_tpot_s"] == pytest.approx(1.5)
    assert row["output_tokens_per_s"] == pytest.approx(1.0) and row["total_tokens_per_s"] == pytest.approx(3.0)


def test_timelines_have_every_step_and_token(tmp_path):
    checkpoint = hl.make_checkpoint(tmp_path / "tiny", "tiny", layers=2, progress=False).folder
    sizes = {"prompt_tokens": 96, "output_tokens": 24, "chunk_tokens": 32, "decodes": [2], "repeats": 1}
    timelines: Any = interference(checkpoint, **sizes, progress=False).timelines
    tokens = timelines[timelines["kind"] == step_log.TOKEN]
    assert set(tokens.groupby(["system", "row"]).size()) == {24, 2}
    split = timelines[timelines["system"] == bench_interference.SPLIT]
    assert set(split.loc[split["of"] == "worker", "row"]) == {"prefill", "decode"}
    (prompt,) = split[(split["row"] == "prefill")].to_dict("records")
    assert prompt["kind"] == step_log.PROMPT
    (long,) = split[(split["row"] == "long") & (split["kind"] == step_log.FIRST_TOKEN)].to_dict("records")
    assert long["start_s"] <= prompt["start_s"] < prompt["end_s"] <= long["end_s"]
    chunks = timelines[timelines["system"] == bench_interference.CHUNKS]
    assert (chunks["kind"] == step_log.BOTH).sum() >= 3  # 96 tokens in pieces of at most 32
    whole = timelines[timelines["system"] == bench_interference.WHOLE]
    assert (whole["kind"] == step_log.PROMPT).sum() == 2 and not (whole["kind"] == step_log.BOTH).any()
    assert not (timelines["kind"] == step_log.LOST).any()
