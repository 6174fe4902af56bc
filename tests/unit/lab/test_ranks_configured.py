"""`engine.ranks`, `engine.exchange` and `engine.interface` in a config: run, planned, simulated, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab import backends, experiment, run_costs
from hybridlab.errors import ConfigError, StrategyError
from hybridlab.sweep_plan import plan

TWO_GPUS = {"machine": "2x_rtx5090_2x_epyc9355"}
ENGINE = {"precision": "exact", "threads": 1, "kv_tokens": 512, "token_budget": 64}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_costs, "measured_read_gb_s", lambda threads: 10.0)
    (tmp_path / "pyproject.toml").write_text("")
    return {
        "experiment": "ranks",
        "model": {"preset": "tiny", "layers": 2},
        "workload": {"kind": "offline", "num_requests": 3, "prompt_tokens": 40, "output_tokens": 3},
        "engine": ENGINE,
    }


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"ranks": 0}, "engine.ranks: expected a number greater than 0, got 0"),
        ({"ranks": "two"}, "engine.ranks: expected a valid integer"),
        ({"rank": 2}, "engine: unknown key 'rank'; did you mean 'ranks'"),
        ({"exchange": "ring"}, "engine.exchange: expected 'small_ep', 'dispatch_per_route' or 'dispatch_per_rank'"),
        ({"interface": ""}, "engine.interface: "),
    ],
)
def test_bad_keys_are_named(lab, engine, words):
    with pytest.raises(ConfigError) as caught:
        plan({**lab, "engine": engine})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "error", "words"),
    [
        ({"ranks": 9}, ConfigError, "ranks is 9, expected an int from 1 to 8"),
        ({"ranks": 2, "interface": "nowhere0"}, ConfigError, "interface 'nowhere0' has no address"),
        ({"ranks": 2, "worker": "thread"}, ConfigError, "ranks is 2, expected 1 with worker 'thread'"),
        ({"ranks": 2, "weight_layout": "tiles"}, ConfigError, "expected 1 with weight_layout 'tiles'"),
        ({"workers": {"prefil": {}, "decode": {}}}, ConfigError, "workers has .*names that begin with 'prefill' or"),
        ({"workers": {"prefill": {}, "decode": {}}, "ranks": 2}, ConfigError, "ranks is 2, which does not go with"),
        ({"ranks": 2, "device": "emulated"}, StrategyError, "LruCache moves experts between steps"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(lab, monkeypatch, engine, error, words):
    monkeypatch.setattr(backends, "make_missing", lambda *_, **__: pytest.fail("a checkpoint before checks"))
    placement = {"name": "lru_cache", "gpu_gb": 1} if engine.get("device") == "emulated" else "all_host"
    for start in (plan, lambda config: experiment.run(config, progress=False)):
        with pytest.raises(error, match=words):
            start({**lab, "engine": engine, "placement": placement})


def test_ranks_and_exchanges_are_swept(lab):
    sweep = {"list": [{"engine.ranks": 1}, {"engine.ranks": 2, "engine.exchange": "dispatch_per_rank"}]}
    paper = {"name": "paper", "short_tokens": 40}
    result = experiment.run({**lab, "scheduler": paper, "sweep": sweep}, progress=False)
    assert result.summary["completed"].tolist() == [3, 3]
    found = result.spans.groupby("engine.ranks")["rank"].unique().map(sorted).to_dict()
    assert found == {1: [0], 2: [0, 1]}
    kinds = result.spans.groupby("engine.ranks")["kind"].unique().map(set).to_dict()
    assert "dispatch" in kinds[2] and not kinds[1] & {"dispatch", "reduce"}
    # The long prompt that came first ran on both; what was decoded, on the first.
    ranks = result.spans.loc[result.spans["engine.ranks"] == 2, "rank"].tolist()
    assert ranks.count(0) > 2 * ranks.count(1) > 0


def test_a_plan_has_the_memory_of_a_rank(lab, tmp_path):
    engine = {**ENGINE, "ranks": 2, "device": "emulated", "threads": 2, "vram_gb": 1.0}
    placement = {"name": "streamed", "ring_slots": 3}
    config = {**lab, "engine": engine, "placement": placement}
    hl.make_checkpoint(tmp_path / "made", "tiny", layers=2, progress=False)
    with hl.load(tmp_path / "made", quiet=True, placement=placement, **engine) as loaded:
        assert plan(config).memory_bytes == loaded.memory.total_bytes
    assert plan({**config, "engine": {**engine, "ranks": 1}}).memory_bytes > loaded.memory.total_bytes


def test_simulated_ranks_have_a_gpu_each(lab):
    workload = {**lab["workload"], "num_requests": 1, "prompt_tokens": 4000, "output_tokens": 1}
    model = {"preset": "moonshotai/Kimi-K2-Instruct", "layers": 4}
    config = {"experiment": "simulated", "model": model, "workload": workload, "simulator": TWO_GPUS}
    config |= {"placement": {"name": "streamed", "stream_from_tokens": 64, "parts_per_layer": 8}, "overlap": "prefetch"}
    config |= {"sweep": {"engine.ranks": [1, 2]}}
    result = experiment.run(config, backend="simulator", progress=False)
    assert result.spans.groupby("engine.ranks")["rank"].unique().map(sorted).to_dict() == {1: [0], 2: [0, 1]}
    one, two = result.summary.sort_values("engine.ranks")["median_ttft_s"]
    assert two < 0.7 * one  # each streams half of the experts over its own link


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": {"ranks": 3}, "simulator": TWO_GPUS}, "engine.ranks is 3, the simulator of 2x_rtx5090.* at most 2"),
        ({"engine": {"ranks": 2}}, "engine.ranks is 2, the simulator of rtx5090_2x_epyc9355 expects at most 1"),
        ({"engine": {"ranks": 2, "device": "cpu"}, "simulator": TWO_GPUS}, "engine.ranks is 2, .* at most 1"),
        ({"engine": {"interface": "lo"}}, "engine.interface is given, the simulator expects none"),
    ],
)
def test_what_the_simulator_does_not_have_is_refused(lab, change, words):
    with pytest.raises(ConfigError, match=words):
        experiment.run({**lab, **change}, backend="simulator", progress=False)
