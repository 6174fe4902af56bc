from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import hybridlab as hl
from hybridlab import backends, experiment, run_costs
from hybridlab.checkpoint.presets import preset_spec
from hybridlab.checkpoint.schema import expected_tensors
from hybridlab.config import load_config
from hybridlab.engine import options
from hybridlab.engine.ring import block_bytes
from hybridlab.errors import ConfigError, MemoryBudgetError, StrategyError
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.sweep_plan import plan
from hybridlab.workload import load_rows

GIB = 2**30


@pytest.fixture
def preset(bench: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config whose checkpoint comes from a preset; nothing is probed."""
    monkeypatch.setattr(run_costs, "measured_read_gb_s", lambda threads: 10.0)
    return {
        "experiment": "question",
        "model": {"preset": "tiny"},
        "workload": {"kind": "poisson", "num_requests": 4, "rate_req_s": 2.0, "prompt_tokens": 30, "output_tokens": 5},
        "repeats": 2,
        "sweep": {"workload.rate_req_s": [0.5, 2.0]},
    }


def pretend_made(config: dict[str, Any]) -> None:
    """Put a folder where the checkpoint of the preset would be."""
    loaded = load_config(config)
    folder = backends.checkpoint_of(loaded.model, Path("results"), Path())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def tree(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*"))


def test_before_anything_is_made(preset: dict[str, Any], bench: list[str], tmp_path: Path) -> None:
    before = tree(tmp_path)
    found = plan(preset)
    assert bench == [] and tree(tmp_path) == before  # nothing loaded, nothing written
    assert (found.count("to do"), found.count("stored"), found.count("failed")) == (4, 0, 0)
    assert found.frame["run_id"].tolist() == [None] * 4
    size = sum(tensor.num_bytes for tensor in expected_tensors(preset_spec("tiny")))
    ((checkpoint, weight_bytes),) = found.checkpoints.items()
    assert checkpoint.name.startswith("tiny-fp8-seed0-") and weight_bytes == size
    assert size < found.disk_bytes < size + 10**6
    text = str(found)
    assert text.startswith("question\n") and "4: 0 stored, 4 to do" in text
    assert "extrapolated, estimated" in text and "ids of its runs are known once it is made" in text
    assert set(found.frame["evidence"]) == {"extrapolated"}
    assert found.frame["workload.rate_req_s"].tolist() == [0.5, 2.0] * 2
    assert "<table>" in found._repr_html_() and repr(found) == text
    assert json.loads(json.dumps(found.as_dict()))["to_do"] == 4
    assert hl.plan is plan


def test_a_run_takes_at_least_until_its_last_request_has_come(preset: dict[str, Any]) -> None:
    found = plan(preset).frame
    for row in found.to_dict("records"):
        config = load_config(
            {**preset, "sweep": {}, "workload": {**preset["workload"], "rate_req_s": row["workload.rate_req_s"]}}
        )
        last_s = load_rows(config.workload, Path())[-1][0]
        assert row["arrival_span_s"] == pytest.approx(last_s)
        assert last_s < row["predicted_s"] < last_s + 1.0
        assert 0 < row["work_s"] < 1.0
    assert plan(preset).predicted_s == pytest.approx(found["predicted_s"].sum())


def test_closed_loops_have_no_arrival_span(preset: dict[str, Any]) -> None:
    loop = {
        "kind": "closed_loop",
        "num_requests": 6,
        "num_users": 2,
        "think_s": 3.0,
        "prompt_tokens": 9,
        "output_tokens": 5,
    }
    (row,) = plan({**preset, "workload": loop, "sweep": {}, "repeats": 1}).frame.to_dict("records")
    assert row["arrival_span_s"] != row["arrival_span_s"]
    assert 6.0 < row["predicted_s"] < 7.0  # each user thinks twice


def test_stored_and_failed_runs_are_counted(preset: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_made(preset)

    def refuse(what: str, bench: Any, number: int | None) -> None:
        if (
            what == "serve"
            and bench.config.workload.rate_req_s == 2.0
            and refused.append(1) is None
            and len(refused) == 1
        ):
            raise StrategyError("no")

    refused: list[int] = []
    monkeypatch.setattr(backends.BACKENDS["engine"], "hook", staticmethod(lambda *a: None))
    experiment.run({**preset, "sweep": {"workload.rate_req_s": [0.5]}}, progress=False)
    monkeypatch.setattr(backends.BACKENDS["engine"], "hook", staticmethod(refuse))
    with pytest.raises(StrategyError):
        experiment.run({**preset, "sweep": {"workload.rate_req_s": [2.0]}, "repeats": 1}, progress=False)
    found = plan(preset)
    assert found.frame["status"].tolist() == ["stored", "failed", "stored", "to do"]
    assert len(set(found.frame["run_id"].tolist())) == 4
    assert "4: 2 stored, 1 failed earlier (retry_failed=True" in str(found)
    assert found.predicted_s == pytest.approx(found.frame["predicted_s"].iloc[3])
    assert plan(preset, retry_failed=True).count("to do") == 2
    assert plan(preset, force=True).count("to do") == 4


def test_predictions_come_from_stored_runs_where_there_are_any(preset: dict[str, Any]) -> None:
    """The fake bench takes 1 ms per prompt token and 10 ms per further token, one request after the other."""
    pretend_made(preset)
    alone = {"kind": "closed_loop", "num_users": 1, "num_requests": 8, "prompt_tokens": 100, "output_tokens": 11}
    before = plan({**preset, "workload": alone, "sweep": {}, "repeats": 1})
    assert set(before.frame["predicted_from"]) == {"estimated"}
    experiment.run({**preset, "workload": {**alone, "num_requests": 4}, "sweep": {}}, progress=False)
    after = plan({**preset, "workload": alone, "sweep": {}, "repeats": 1})
    assert set(after.frame["predicted_from"]) == {"from 2 stored runs"}
    assert "extrapolated, from 2 stored runs" in str(after)
    assert after.predicted_s == pytest.approx(8 * (100 * 0.001 + 10 * 0.010))
    assert after.predicted_s > 5 * before.predicted_s
    other = plan({**preset, "workload": alone, "sweep": {}, "engine": {"token_budget": 77}})
    assert set(other.frame["predicted_from"]) == {"estimated"}


def test_what_does_not_fit_is_told_and_not_raised(preset: dict[str, Any]) -> None:
    found = plan({**preset, "sweep": {"engine.memory_gb": [0.01, 64.0]}, "repeats": 1})
    first, second = found.frame["problem"].tolist()
    assert "10.24 MiB in the budget" in first and second == ""
    assert "will fail    1 runs; the first: " in str(found)
    assert found.frame["memory_gib"].iloc[0] > 0.5
    assert found.memory_bytes <= found.memory_budget_bytes


def test_memory_is_the_engines_own_plan(preset: dict[str, Any], tmp_path: Path) -> None:
    model = {"preset": "tiny", "layers": 2}
    engine = {"kv_tokens": 4096, "token_budget": 256, "precision": "exact", "threads": 1}
    found = plan({**preset, "model": model, "engine": engine, "sweep": {}, "repeats": 1})
    hl.make_checkpoint(tmp_path / "made", "tiny", layers=2, progress=False)
    with hl.load(tmp_path / "made", quiet=True, **engine) as loaded:
        assert found.memory_bytes == loaded.memory.total_bytes
    by_path = plan({**preset, "model": {"path": str(tmp_path / "made")}, "engine": engine, "sweep": {}, "repeats": 1})
    assert by_path.memory_bytes == found.memory_bytes and by_path.checkpoints == {}
    with pytest.raises(MemoryBudgetError):
        hl.load(tmp_path / "made", quiet=True, memory_gb=0.01)


def test_memory_counts_the_ring_of_each_placement_as_the_engine_does(preset: dict[str, Any], tmp_path: Path) -> None:
    engine = {"device": "emulated", "threads": 2, "vram_gb": 1.0, "kv_tokens": 4096}
    placements = [
        "all_host",
        {"name": "streamed", "ring_slots": 2},
        {"name": "streamed", "ring_slots": 3, "parts_per_layer": 4},
        {"name": "hot_resident", "gpu_gb": 0.0006, "ring_slots": 2},
    ]
    config = {**preset, "model": {"preset": "tiny", "layers": 2}, "engine": engine, "repeats": 1}
    found = plan({**config, "sweep": {"placement": placements}}).frame["memory_gib"].tolist()
    hl.make_checkpoint(tmp_path / "made", "tiny", layers=2, progress=False)
    for placement, planned_gib in zip(placements, found, strict=True):
        with hl.load(tmp_path / "made", quiet=True, placement=placement, **engine) as loaded:
            assert planned_gib == loaded.memory.total_bytes / GIB
    assert len(set(found)) == len(placements)


def test_a_gpu_that_is_not_here_is_planned_with_what_is_known(
    preset: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "detect_gpus", lambda: ())
    config = {**preset, "sweep": {}, "repeats": 1, "placement": "streamed"}
    plain = plan({**config, "engine": {"device": "cuda", "kv_tokens": 4096}})
    assert "device 'cuda' is not available" in plain.frame["problem"][0] and "will fail" in str(plain)
    spec = preset_spec("tiny")
    pinned = len(spec.moe_layers) * spec.num_experts * block_bytes(spec)
    assert plain.memory_bytes > pinned
    # KV lives on a GPU that has room for it, else in the host's memory.
    engine = {"device": "cuda", "kv_tokens": 10**6, "token_budget": 64}
    small, large = (plan({**config, "engine": {**engine, "vram_gb": gb}}) for gb in (2.0, 150))
    assert small.memory_bytes - large.memory_bytes == 10**6 * spec.kv_elements_per_token * 2
    assert "device 'cuda' is not available" in small.frame["problem"][0]


class Misplaces(AllHost):
    def place(self, model: Any, hardware: Any, routing: Any) -> Any:
        return {"nothing": 1}[hardware.device]


@pytest.mark.parametrize(
    ("placement", "engine", "words"),
    [
        ({"name": "streamed", "ring_slots": 10**6}, {"device": "emulated", "memory_gb": 8}, "8.00 GiB in the budget"),
        (Misplaces(), {"device": "emulated"}, "KeyError: 'emulated'"),
        (Misplaces(), {}, "KeyError: 'cpu'"),
    ],
    ids=["ring", "raises on emulated", "raises on cpu"],
)
def test_a_placement_that_cannot_be_is_told_and_not_raised(
    preset: dict[str, Any], placement: Any, engine: dict[str, Any], words: str
) -> None:
    found = plan({**preset, "placement": placement, "engine": engine})
    assert all(words in problem for problem in found.frame["problem"]) and "will fail    4 runs" in str(found)


def test_repeated_warm_up_and_other_strategies_are_counted(preset: dict[str, Any]) -> None:
    plain = plan({**preset, "repeats": 1})
    warm = plan({**preset, "repeats": 1, "warmup_requests": 3})
    assert warm.predicted_s > plain.predicted_s
    found = plan({**preset, "sweep": {"scheduler": ["fcfs", "chunked_prefill"]}}, scheduler="chunked_prefill")
    assert found.frame["scheduler"].tolist() == ["chunked_prefill"] * 2


@pytest.mark.parametrize(
    ("change", "keys", "error", "message"),
    [
        ({}, {"backend": "engin"}, ConfigError, "did you mean 'engine'"),
        ({}, {"scheduler": "fcsf"}, StrategyError, "did you mean 'fcfs'"),
        ({"model": {"path": "nowhere"}}, {}, ConfigError, "model.path"),
        ({"sweep": {"workload.rate_req_s": [1.0, -1.0]}}, {}, ConfigError, "greater than 0"),
        ({"sweep": {"grid": {"workload.seed": list(range(10**4)), "workload.num_requests": list(range(1, 1001))}}}, {},
         ConfigError, "10,000,000 points"),
    ],
)  # fmt: skip
def test_bad_input(
    preset: dict[str, Any], change: dict[str, Any], keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        plan({**preset, **change}, **keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_runs_of_any_experiment_stop_no_plan(preset: dict[str, Any]) -> None:
    pretend_made(preset)
    paths = experiment.run({**preset, "experiment": "other"}, progress=False).paths
    table = pd.read_parquet(paths[0] / "requests.parquet")
    table.drop(columns="cached_tokens").to_parquet(paths[0] / "requests.parquet")
    for path, change in ((paths[1], {"started": 5}), (paths[2], {"identity": {}})):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert set(plan(preset).frame["predicted_from"]) == {"from 1 stored run"}


@pytest.mark.parametrize(
    ("change", "made"), [({"threads": 10**9}, False), ({"threads": 10**9}, True), ({"device": "cuda"}, False)]
)
def test_a_plan_refuses_what_no_engine_can_do(
    preset: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], made: bool
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "engine", backends.EngineBench)
    monkeypatch.setattr(run_costs.Costs, "__init__", lambda *_: pytest.fail("costs before checks"))
    if made:
        hl.make_checkpoint(
            backends.checkpoint_of(load_config(preset).model, Path("results"), Path()), "tiny", layers=1, progress=False
        )
    config = {**preset, "engine": change}
    with pytest.raises(ConfigError) as planned:
        plan(config)
    with pytest.raises(ConfigError) as ran:
        experiment.run(config, progress=False)
    assert str(planned.value) == str(ran.value) and next(iter(change)) in str(planned.value)


def test_a_plan_checks_only_engines_that_will_run(preset: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_made(preset)
    experiment.run(preset, progress=False)
    checked: list[str] = []
    monkeypatch.setattr(backends.BACKENDS["engine"], "hook", staticmethod(lambda what, *_: checked.append(what)))
    plan(preset)
    assert checked == []
    plan(preset, force=True)
    assert checked == ["check"]
