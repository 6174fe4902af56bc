from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridlab import backends, experiment, provenance
from hybridlab.errors import ConfigError, StrategyError
from hybridlab.export import latex
from hybridlab.metrics import SLO
from hybridlab.plans import QueueView, StepPlan
from hybridlab.store import results

SWEEP = {
    "scheduler": ["fcfs", {"name": "chunked_prefill", "chunk_tokens": 8}],
    "workload.num_requests": [2, 3],
}


@dataclass(frozen=True)
class Mine:
    limit: float = 3.0

    def schedule(self, queue: QueueView) -> StepPlan | None:
        return None


def run(config: Any, **keys: Any) -> experiment.ExperimentResult:
    return experiment.run(config, **{"progress": False, **keys})


def test_one_run(bench: list[str], config: dict[str, Any], tmp_path: Path) -> None:
    result = run(config)
    assert bench == ["open", "serve FCFS 3", "close"]
    (row,) = result.summary.to_dict("records")
    assert (row["completed"], row["scheduler"], row["evidence"], row["repeat"]) == (3, "fcfs", "measured", 0)
    assert result.paths == [tmp_path / "results" / "question" / row["run_id"]]
    assert set(result.requests["run_id"]) == set(result.spans["run_id"]) == {row["run_id"]}
    assert list(result.spans.columns)[:4] == ["lane", "kind", "layer", "part"]
    assert set(result.requests["scheduler"]) == set(result.spans["scheduler"]) == {"fcfs"}
    assert result.spans["lane"].tolist() == ["main/cpu"] * 3
    html = result._repr_html_()
    assert "question" in html and "in results/question<" in html and str(tmp_path) not in html
    assert repr(result) == "ExperimentResult('question', 1 runs, 0 cached)"


def test_manifest_says_all(bench: list[str], config: dict[str, Any]) -> None:
    result = run({**config, "slo": {"ttft_s": 1.0, "tpot_s": 0.1}})
    manifest = json.loads((result.paths[0] / "manifest.json").read_text())
    for key in (
        "config",
        "strategies",
        "code",
        "machine",
        "versions",
        "definitions",
        "evidence",
        "started",
        "ended",
    ):
        assert manifest[key], key
    assert "def schedule" in manifest["strategies"]["scheduler"]["source"]
    assert manifest["config"]["workload"]["length_scale"] == 1.0  # defaults are filled in
    assert manifest["slo"] == {"name": "custom", "ttft_s": 1.0, "tpot_s": 0.1}
    assert (result.paths[0] / "requests.parquet").is_file() and (result.paths[0] / "spans.parquet").is_file()


def test_sweep_shares_an_engine_and_caches(bench: list[str], config: dict[str, Any], capsys: Any) -> None:
    sweep = {**config, "sweep": SWEEP}
    first = run(sweep)
    assert bench == [
        "open",
        "serve FCFS 2",
        "serve FCFS 3",
        "serve ChunkedPrefill 2",
        "serve ChunkedPrefill 3",
        "close",
    ]
    assert first.summary["scheduler"].tolist() == ["fcfs"] * 2 + ["chunked_prefill(chunk_tokens=8)"] * 2
    assert first.summary["workload.num_requests"].tolist() == [2, 3, 2, 3]
    assert len(set(first.summary["run_id"].tolist())) == 4 and first.cached == ()
    bench.clear()
    again = run(sweep, progress=True)
    assert bench == []
    said = "cached: 4 of 4 runs from results/question (force=True reruns)\n"
    assert len(again.cached) == 4 and said in capsys.readouterr().out
    assert again.summary.equals(first.summary)
    assert again.requests.equals(first.requests)
    assert "4 cached (force=True reruns)" in again._repr_html_()
    run(sweep, force=True)
    assert len(bench) == 6


def test_table_is_short_and_rows_carry_the_axes(bench: list[str], config: dict[str, Any]) -> None:
    result = run({**config, "sweep": SWEEP})
    axes = ["scheduler", "workload.num_requests"]
    assert list(result.table.columns) == [*axes, *experiment.TABLE_METRICS]
    mine = result.requests[(result.requests["scheduler"] == "fcfs") & (result.requests[axes[1]] == 3)]
    assert len(mine) == 3 and mine["run_id"].tolist() == [result.summary["run_id"].tolist()[1]] * 3
    assert set(axes) <= set(result.spans.columns)
    partly = replace(result, summary=result.summary.assign(completed=0, evidence="simulated"))
    assert list(partly.table.columns)[-2:] == ["completed", "evidence"]


def test_a_saturated_run_has_no_p99_in_tables(bench: list[str], config: dict[str, Any]) -> None:
    result = run({**config, "sweep": SWEEP})
    assert result.summary["saturated"].tolist() == [False] * 4
    told = replace(result, summary=result.summary.assign(saturated=[True, False, False, False]))
    assert np.isinf(told.table["p99_ttft_s"]).tolist() == [True, False, False, False]
    assert told.table["saturated"].tolist() == [True, False, False, False]
    assert np.isfinite(told.summary["p99_ttft_s"]).all()  # what was seen stays there
    printed = latex(told.summary)
    assert "saturated" in printed and " inf " in printed
    assert "saturated" not in latex(result.summary)


def test_engines_are_per_engine_setting(bench: list[str], config: dict[str, Any]) -> None:
    result = run({**config, "sweep": {"scheduler": ["fcfs", "chunked_prefill"], "engine.threads": [1, 2]}})
    assert bench.count("open") == bench.count("close") == 2
    assert result.summary["engine.threads"].tolist() == [
        1,
        2,
        1,
        2,
    ]  # the order of the sweep, not of execution


def test_killed_sweep_resumes(bench: list[str], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import hybridlab.execution as module

    whole = module.write_run
    calls = []

    def stops_at_third(*args: Any, **keys: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(*args, **keys)

    monkeypatch.setattr(module, "write_run", stops_at_third)
    with pytest.raises(KeyboardInterrupt):
        run({**config, "sweep": SWEEP})
    assert bench[-1] == "close"
    bench.clear()
    monkeypatch.setattr(module, "write_run", whole)
    result = run({**config, "sweep": SWEEP})
    assert bench == ["open", "serve ChunkedPrefill 2", "serve ChunkedPrefill 3", "close"]
    assert len(result.cached) == 2 and len(result.summary) == 4


def test_repeats_and_warmup(bench: list[str], config: dict[str, Any]) -> None:
    result = run({**config, "repeats": 2, "warmup_requests": 1})
    assert bench == ["open", "serve FCFS 1", "serve FCFS 3", "serve FCFS 1", "serve FCFS 3", "close"]
    assert result.summary["repeat"].tolist() == [0, 1]
    assert len(result.requests) == 6


def test_strategy_object_replaces_config_and_axis(bench: list[str], config: dict[str, Any]) -> None:
    sweep = {**config, "sweep": SWEEP}
    result = run(sweep, scheduler=Mine(limit=float("inf")))
    assert result.summary["scheduler"].tolist() == ["Mine(limit=inf)"] * 2
    other = run(sweep, scheduler=Mine(limit=1.0))
    assert set(other.summary["run_id"]).isdisjoint(result.summary["run_id"])
    assert len(run(sweep, scheduler=Mine(limit=1.0)).cached) == 2


@dataclass
class Counting:
    """Keeps state, which no strategy should, but which must not leak from run to run."""

    served: int = 0

    def schedule(self, queue: QueueView) -> StepPlan | None:
        return None


def test_state_of_a_strategy_does_not_leak_into_the_next_run(
    bench: list[str], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    whole = backends.BACKENDS["engine"].serve  # type: ignore[attr-defined]

    def serve(self: Any, requests: Any, scheduler: Any, on_event: Any) -> Any:
        found.append(scheduler.served)
        scheduler.served += 1
        return whole(self, requests, scheduler, on_event)

    monkeypatch.setattr(backends.BACKENDS["engine"], "serve", serve)
    sweep = {**config, "warmup_requests": 1, "sweep": {"workload.num_requests": [1, 2]}}
    result = run(sweep, scheduler=Counting())
    assert found == [0, 0, 0, 0]
    assert set(result.summary["scheduler"]) == {"Counting"}
    assert len(run(sweep, scheduler=Counting()).cached) == 2


def test_slo_does_not_make_a_new_run(bench: list[str], config: dict[str, Any]) -> None:
    first = run({**config, "slo": "paper"})
    strict = run({**config, "slo": {"name": "strict", "ttft_s": 1e-9, "tpot_s": 1e-9}})
    assert strict.cached == tuple(first.summary["run_id"])
    assert first.summary["request_goodput_req_s"].tolist()[0] > 0
    assert strict.summary["request_goodput_req_s"].tolist() == [0]
    assert results("question")["slo"].tolist() == ["paper"]
    assert results("question", slo=SLO(ttft_s=1e-9, tpot_s=1.0))["request_goodput_req_s"].tolist() == [0]


@pytest.mark.parametrize("change", ["trace", "weights", "code", "machine"])
def test_what_determines_the_result_is_in_the_id(
    bench: list[str], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    header, rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n", "2023-11-16 18:35:01,3,4\n"
    (tmp_path / "trace.csv").write_text(header + rows)
    config = {**config, "workload": {"kind": "azure", "path": "trace.csv", "num_requests": 1}}
    run(config)
    if change == "trace":
        (tmp_path / "trace.csv").write_text(header + rows.replace("3,4", "3,5"))
    elif change == "weights":
        (tmp_path / "model" / "model.safetensors").write_bytes(b"Weights")
    elif change == "code":
        monkeypatch.setattr(provenance, "code_hash", lambda: "other")
    else:
        monkeypatch.setattr(provenance, "machine", lambda gpu=False: {"cpu": "other", "cores": 2})
    assert run(config).cached == ()
    several = {"trace": "versions of trace", "weights": "versions of checkpoint", "code": "code versions"}
    with pytest.warns(UserWarning, match=f"mixes 2 {several.get(change, 'machines')}"):
        assert len(results("question")) == 2


def test_load_results_is_tidy_over_different_sweeps(bench: list[str], config: dict[str, Any]) -> None:
    run(config)
    run({**config, "sweep": {"workload.num_requests": [1]}})
    frame = results("question")
    assert frame["workload.num_requests"].tolist() == [3, 1]
    assert frame["num_requests"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("change", "keys", "error", "message"),
    [
        ({}, {"backend": "simulater"}, ConfigError, "backend: unknown 'simulater'"),
        ({}, {"scheduler": "fcsf"}, StrategyError, "did you mean 'fcfs'?"),
        ({"scheduler": {"name": "chunked_prefill", "chunk": 1}}, {}, StrategyError, "has no field 'chunk'"),
        ({"model": {"path": "nowhere"}}, {}, ConfigError, "model.path: "),
        (
            {"workload": {"kind": "azure", "path": "none.csv", "num_requests": 1}},
            {},
            ConfigError,
            "none.csv: cannot be read",
        ),
        ({"sweep": {"scheduler": ["fcfs", "fcsf"]}}, {}, StrategyError, "unknown scheduler 'fcsf'"),
    ],
)
def test_bad_input_stops_before_anything_is_written(
    bench: list[str],
    config: dict[str, Any],
    tmp_path: Path,
    change: dict[str, Any],
    keys: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        run({**config, **change}, **keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert bench == [] and not (tmp_path / "results").exists()
