"""experiments/long_prompts: its config has all systems and both lengths of prompts, its table what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

import hybridlab as hl
from hybridlab.config import load_config

FOLDER = Path(__file__).parents[2] / "experiments" / "long_prompts"


@pytest.fixture(scope="module")
def analysis() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_prompts_analysis", FOLDER / "analysis.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_has_all_systems_and_long_prompts_among_chats(analysis: ModuleType) -> None:
    config = load_config(FOLDER / "config.yaml")
    points: Any = config.sweep["list"]
    names = [
        point["scheduler"] if isinstance(point["scheduler"], str) else point["scheduler"]["name"] for point in points
    ]
    assert names == ["fcfs", "chunked_prefill", "paper"]
    assert [bool(point["engine.workers"]) for point in points] == [False, False, True]
    assert points[-1]["scheduler"]["short_tokens"] == analysis.LONG_TOKENS
    lengths: Any = hl.workload_table(config.workload)["prompt_tokens"]
    long = int((lengths >= analysis.LONG_TOKENS).sum())
    longest, budget = int(lengths.max()), config.engine.token_budget
    assert 5 <= long < len(lengths) / 3 and budget is not None and longest <= budget


def test_chats_and_long_prompts_are_told_apart(analysis: ModuleType) -> None:
    workers = "{'prefill': {}, 'decode': {}}"
    runs = [("a", "fcfs", None), ("b", "paper", workers)]
    summary = pd.DataFrame(
        [{"run_id": run, "scheduler": s, "engine.workers": w, "output_tokens_per_s": 9.0} for run, s, w in runs]
    )
    chat = {"prompt_tokens": 10, "ttft_s": 0.1, "tpot_s": 0.02, "token_times_s": [1.0, 1.02, 1.04]}
    long = {"prompt_tokens": 600, "ttft_s": 2.0, "tpot_s": 0.5, "token_times_s": [3.0, 3.5]}
    requests = pd.DataFrame([{"run_id": run, **row} for run, _, _ in runs for row in (chat, long)])
    found = analysis.table(summary, requests)
    assert list(found.index) == ["fcfs", "paper, a worker for each"]
    row = found.loc["fcfs"]
    assert (row["chat TTFT p50"], row["long TTFT p99"]) == (0.1, 2.0)
    assert row["chat ITL p99"] == pytest.approx(20) and row["chat TPOT p50"] == pytest.approx(20)
