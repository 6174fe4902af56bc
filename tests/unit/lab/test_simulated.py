"""`hl.run(..., backend="simulator")`: a config in, the same tables out, nothing measured and no checkpoint made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridlab import experiment, provenance
from hybridlab.errors import ConfigError, HybridlabError, MemoryBudgetError
from hybridlab.routing import RoutingStats
from hybridlab.sweep_plan import plan


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    return {
        "experiment": "simulated",
        "model": {"preset": "tiny"},
        "workload": {"kind": "poisson", "num_requests": 6, "rate_req_s": 50.0, "prompt_tokens": 64, "output_tokens": 5},
        "overlap": "prefetch",
    }


def run(config: dict[str, Any], **keys: Any) -> experiment.ExperimentResult:
    return experiment.run(config, backend="simulator", **{"progress": False, **keys})


def test_a_run_has_the_tables_of_an_engine_run(lab, tmp_path):
    result = run(lab)
    (row,) = result.summary.to_dict("records")
    assert (row["completed"], row["evidence"], row["backend"]) == (6, "simulated", "simulator")
    assert row["machine"] == "rtx5090_2x_epyc9355 (simulated), 64 cores"
    assert row["total_output_tokens"] == 30 and row["median_ttft_s"] > 0 and row["median_tpot_s"] > 0
    assert np.isfinite([row["p99_ttft_s"], row["output_tokens_per_s"], row["request_goodput_req_s"]]).all()
    assert set(result.spans["kind"]) >= {"attention", "router", "experts", "combine", "head"}
    assert not (tmp_path / "results" / "checkpoints").exists()
    again = run(lab)
    assert again.cached == (row["run_id"],)
    forced = run(lab, force=True)
    times = [np.concatenate(each.requests["token_times_s"].tolist()).tolist() for each in (result, forced)]
    assert len(times[0]) == 30 and times[0] == times[1]


def test_the_id_of_a_run_does_not_know_the_machine_that_it_ran_on(lab, monkeypatch):
    first = run(lab).summary["run_id"].tolist()[0]
    monkeypatch.setattr(provenance, "machine", lambda gpu=False: {"cpu": "another", "cores": 3})
    assert run(lab).cached == (first,)
    faster = run({**lab, "simulator": {"overrides": {"host_peak_gb_s": 2000.0}}})
    assert faster.summary["run_id"].tolist() != [first]
    assert faster.summary["median_tpot_s"].tolist() <= run(lab).summary["median_tpot_s"].tolist()


def test_machines_and_strategies_are_swept_in_one_table(lab):
    machines = ["rtx5090_2x_epyc9355", "rtx3090_desktop", "desktop"]
    sweep = {"simulator.machine": machines, "scheduler": ["fcfs", {"name": "chunked_prefill", "chunk_tokens": 16}]}
    summary = run({**lab, "model": {"preset": "qwen3-30b-a3b"}, "sweep": sweep}).summary
    assert len(summary) == 6 and summary["run_id"].is_unique
    tpot_s = dict(zip(summary["simulator.machine"].tolist(), summary["median_tpot_s"].tolist(), strict=True))
    assert (
        tpot_s["rtx5090_2x_epyc9355"] < tpot_s["desktop"] and tpot_s["rtx5090_2x_epyc9355"] < tpot_s["rtx3090_desktop"]
    )


def test_a_model_that_nobody_can_load_is_simulated(lab):
    config = {
        **lab,
        "model": {"preset": "deepseek-ai/DeepSeek-V3"},
        "workload": {"kind": "offline", "num_requests": 1, "prompt_tokens": 512, "output_tokens": 9},
    }
    (row,) = run(config).summary.to_dict("records")
    assert 15 < 1 / row["median_tpot_s"] < 40  # the paper's machine measured 21.5 tokens/s
    with pytest.raises(HybridlabError, match="deepseek-ai/DeepSeek-V3"):
        experiment.run(config, progress=False)
    with pytest.raises(MemoryBudgetError, match=r"the simulated machine: 6.* GB of the host's .* 192\.0 GB"):
        run({**config, "simulator": {"machine": "rtx4090_desktop"}})


def test_recorded_routing_and_bits_decide_the_time_of_a_step(lab, tmp_path):
    layers = (1, 2, 3)
    RoutingStats(((900,) * 4 + (1,) * 12,) * 3, "skewed", layers).save(tmp_path / "skewed.safetensors")
    slow = {"host_peak_gb_s": 0.5, "cpu_op_us": 0.0}
    base, skewed, bits = (
        run({**lab, "simulator": {"overrides": slow, **more}}).summary["p99_tpot_s"].tolist()[0]
        for more in ({}, {"routing": "skewed.safetensors"}, {"expert_bits": 4.0})
    )
    assert skewed < 0.95 * base and bits < 0.95 * base


def test_what_a_preset_says_of_its_checkpoint_holds_without_one(lab):
    slow = {"overrides": {"host_peak_gb_s": 0.5, "cpu_op_us": 0.0}}
    model, v3 = {"preset": "tiny"}, {"preset": "deepseek-ai/DeepSeek-V3", "layers": 4}
    flat, skewed, small, wide = (
        run({**lab, "simulator": slow, "model": one}).summary["p99_tpot_s"].tolist()[0]
        for one in (model, {**model, "routing": "olmoe"}, v3, {**v3, "dtype": "bf16"})
    )
    assert skewed < 0.97 * flat and wide > 1.9 * small
    with pytest.raises(ConfigError, match=r"model\.layers is 99, expected at most 61"):
        run({**lab, "model": {**v3, "layers": 99}})


def test_four_bits_fit_where_eight_do_not(lab):
    config = {**lab, "model": {"preset": "deepseek-ai/DeepSeek-V3"}}
    machine = {"overrides": {"host_memory_gb": 500.0}}
    with pytest.raises(MemoryBudgetError, match="the host's memory"):
        run({**config, "simulator": machine})
    assert run({**config, "simulator": {**machine, "expert_bits": 4.8}}).summary["completed"].tolist() == [6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"simulator": {"machine": "cray"}}, "machine 'cray' is unknown"),
        ({"simulator": {"machine": "none.toml"}}, "cannot be read"),
        ({"simulator": {"overrides": {"link_gb_s": 0.0}}}, "link_gb_s is 0.0, a GPU needs a rate above 0"),
        ({"simulator": {"overrides": {"speed": 1.0}}}, "unknown 'speed'"),
        ({"simulator": {"overrides": {"host_peak_gb_s": -1.0}}}, "host_peak_gb_s is -1.0"),
        ({"simulator": {"expert_bits": 0}}, "simulator.expert_bits"),
        ({"simulator": {"machine": "desktop"}, "engine": {"device": "cuda"}}, "the machine has no GPU"),
        ({"engine": {"device": "emulated"}}, "expects 'cpu' or 'cuda'"),
        ({"simulator": {"routing": "none.safetensors"}}, "cannot be read as routing statistics"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(lab, change, message):
    with pytest.raises(ConfigError, match=message):
        run({**lab, **change})


def test_routes_of_another_model_are_refused(lab, tmp_path):
    RoutingStats(((1,) * 8,), "another", (1,)).save(tmp_path / "other.safetensors")
    with pytest.raises(
        ConfigError, match="routing statistics: layers 1 to 1 with 8 experts; the model's 3 layers have 16"
    ):
        run({**lab, "simulator": {"routing": "other.safetensors"}})


def test_a_simulation_is_not_planned(lab):
    with pytest.raises(ConfigError, match="plan: backend 'simulator'"):
        plan(lab, backend="simulator")


def test_the_manifest_says_what_was_simulated(lab):
    manifest = json.loads((run(lab).paths[0] / "manifest.json").read_text())
    assert manifest["evidence"] == "simulated" and manifest["machine"]["link_gb_s"] == 54.5
    assert manifest["config"]["simulator"]["machine"] == "rtx5090_2x_epyc9355"


def test_the_command_line_simulates(lab, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from hybridlab.cli.app import app

    (tmp_path / "config.yaml").write_text(json.dumps({**lab, "workload": {**lab["workload"], "num_requests": 3}}))
    for command in ("run", "sweep"):
        done = CliRunner().invoke(app, [command, "config.yaml", "--backend", "simulator", "--no-figures", "--json"])
        assert done.exit_code == 0, done.output
        assert '"simulated"' in done.stdout


def test_several_processes_store_the_same_bytes(lab, tmp_path):
    sweep = {**lab, "sweep": {"scheduler": ["fcfs", "chunked_prefill"], "workload.rate_req_s": [50.0, 500.0]}}
    alone = run(sweep, results_dir=tmp_path / "alone")
    beside = run(sweep, results_dir=tmp_path / "beside", processes=2)
    told = ["run_id", "code"]  # files may change while the two run
    assert beside.summary.drop(columns=told).equals(alone.summary.drop(columns=told))
    assert len(beside.paths) == 4 and beside.cached == ()
    for one, other in zip(alone.paths, beside.paths, strict=True):
        for name in ("requests.parquet", "spans.parquet"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_runs_that_fail_in_a_process_are_kept_as_failed(lab, tmp_path):
    sweep = {**lab, "sweep": {"engine.kv_tokens": [1024, 10**9]}}
    with pytest.warns(UserWarning, match="1 of 2 runs failed"):
        result = run(sweep, processes=2)
    assert len(result.summary) == 1 and "MemoryBudgetError" in result.failed[0].error


@dataclass(frozen=True)
class Mine:
    def schedule(self, queue):
        return None


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        ({}, {"processes": 0}, "processes is 0, expected a whole number from 1"),
        ({}, {"processes": 2, "backend": "engine"}, "processes is 2, backend 'engine' measures one run at a time"),
        ({"scheduler": Mine()}, {"processes": 2}, "a strategy is given as an object"),
    ],
)
def test_what_processes_cannot_do_is_refused(lab, change, keys, message):
    sweep = {**lab, **change, "sweep": {"workload.rate_req_s": [50.0, 500.0]}}
    with pytest.raises(ConfigError, match=message):
        experiment.run(sweep, **{"backend": "simulator", "progress": False, **keys})


PAIR = {"prefill": {"gpu": 0}, "decode": {"gpu": 1}}
TWO_GPUS = {
    "model": {"preset": "deepseek-ai/DeepSeek-V3"},
    "simulator": {"machine": "2x_rtx5090_2x_epyc9355", "expert_bits": 4.5, "dense_bits": 4.5},
    "engine": {"workers": PAIR, "kv_tokens": 65536, "token_budget": 8192, "prefix_cache": False},
    "workload": {
        "kind": "poisson", "num_requests": 12, "rate_req_s": 0.5, "prompt_tokens": [256, 4096], "output_tokens": 24,
    },
    "scheduler": {"name": "paper", "short_tokens": 512},
}  # fmt: skip


def test_prompts_and_decodes_have_workers_of_their_own(lab):
    result = run({**lab, **TWO_GPUS})
    (row,) = result.summary.to_dict("records")
    assert row["completed"] == 12
    assert {lane.split("/")[0] for lane in result.spans["lane"]} == {"prefill", "decode"}
    alone = run({**lab, **TWO_GPUS, "engine": {**TWO_GPUS["engine"], "workers": None}, "scheduler": "fcfs"})
    # A long prompt on the one worker stands in front of every decode.
    assert row["p99_itl_s"] < 0.5 * alone.summary["p99_itl_s"].tolist()[0]
    forced = run({**lab, **TWO_GPUS}, force=True)
    times = [np.concatenate(each.requests["token_times_s"].tolist()).tolist() for each in (result, forced)]
    assert len(times[0]) == 12 * 24 and times[0] == times[1]


def test_a_hand_off_takes_the_time_of_its_copies(lab):
    one = {**TWO_GPUS["workload"], "num_requests": 1, "prompt_tokens": 600}
    found = []
    for latency_us in (0.0, 1e6):
        machine = {**TWO_GPUS["simulator"], "overrides": {"link_latency_us": latency_us}}
        found += run({**lab, **TWO_GPUS, "workload": one, "simulator": machine}).summary.to_dict("records")
    fast, late = found
    assert late["median_ttft_s"] == pytest.approx(fast["median_ttft_s"] + 1.0, rel=1e-6)  # left with the last step
    assert late["median_e2el_s"] == pytest.approx(fast["median_e2el_s"] + 2.0, rel=1e-6)  # and taken with the next


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"workers": {"prefill": {}, "other": {}}}, "expected names that begin with 'prefill' or 'decode', both"),
        ({"workers": {"prefill": {}, "decode": {}}}, r"workers.decode.gpu is 0, which 'prefill' has"),
        ({"workers": {"prefill": {}, "decode": {"gpu": 2}}}, "workers.decode.gpu is 2, the machine has 2 GPUs"),
        ({"workers": {"prefill": {"threads": 99}, "decode": {"gpu": 1}}}, "threads, expected at most 64: the cores"),
        ({"workers": PAIR, "ranks": 2}, "engine.ranks is 2, which does not go with workers"),
    ],
)
def test_workers_that_a_machine_cannot_have_are_refused(lab, engine, message):
    with pytest.raises(ConfigError, match=message):
        run({**lab, **TWO_GPUS, "engine": engine})
