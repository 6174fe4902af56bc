"""`hl.tune`: the search on the simulator, and what stands in the engine's place: the simulator of another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hybridlab import backends, device_lock, provenance
from hybridlab.bench.simulated_serving import SimulatorBench
from hybridlab.cli.app import app
from hybridlab.config import load_config
from hybridlab.errors import ConfigError
from hybridlab.experiment import run
from hybridlab.tuning.search import tune
from hybridlab.tuning.space import default_space, walk

SLO = {"ttft_s": 4.0, "tpot_s": 0.35}
WORKLOAD = {
    "kind": "poisson", "num_requests": 40, "rate_req_s": 0.5, "prompt_tokens": [64, 1024], "output_tokens": [4, 32],
}  # fmt: skip
MACHINE = {"machine": "rtx3090_desktop"}
ENGINE = {"device": "cuda", "kv_tokens": 32768, "token_budget": 4096}
SPACE = {
    "scheduler": ["fcfs", *({"name": "chunked_prefill", "chunk_tokens": n} for n in (64, 256, 1024))],
    "placement": ["all_host", *({"name": "streamed", "ring_slots": 4, "stream_from_tokens": n} for n in (64, 512))],
    "overlap": ["prefetch", "dual_batch"],
}
MODEL = {"preset": "qwen3-30b-a3b", "layers": 8}


class Standing(SimulatorBench):
    """An engine on a machine that the simulator knows badly: another link, slower memory, dearer ops."""

    evidence = "measured"
    served = 0

    def __init__(self, config: Any, *rest: Any) -> None:
        off = {"link_gb_s": 9.0, "host_read_efficiency": 0.6, "gpu_op_us": 40.0}
        off |= config.simulator.overrides
        simulator = config.simulator.model_copy(update={"overrides": off})
        super().__init__(config.model_copy(update={"simulator": simulator}), *rest)

    def serve(self, *given: Any, **keys: Any) -> Any:
        type(self).served += 1
        return super().serve(*given, **keys)


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Standing]:
    monkeypatch.setitem(backends.BACKENDS, "engine", Standing)
    monkeypatch.setattr(Standing, "served", 0)
    monkeypatch.setattr(provenance, "machine", lambda gpu=False: {"cpu": "test", "cores": 1})
    monkeypatch.setattr(provenance, "checkpoint_hash", lambda folder: "test")
    monkeypatch.setattr(device_lock, "lock_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    return Standing


def tuned(**keys: Any) -> Any:
    given = {"space": SPACE, "engine": ENGINE, "simulator": MACHINE, "progress": False}
    return tune(MODEL, SLO, WORKLOAD, **{**given, **keys})


def test_within_five_percent_of_every_run_of_a_small_space(standing: type[Standing]) -> None:
    found = tuned()
    assert 1 <= standing.served == found.runs <= 10 and found.complete
    assert (len(found.table), found.size) == (24, 24)
    base = {"experiment": "every", "model": MODEL, "workload": WORKLOAD, "slo": SLO, "engine": ENGINE}
    every = run({**base, "simulator": MACHINE, "sweep": SPACE}, progress=False).summary
    goodputs = every["request_goodput_req_s"].tolist()
    most = max(goodputs)
    assert most > 1.5 * sorted(goodputs)[4] and len(set(goodputs)) > 4  # the choice matters
    assert found.table["measured_goodput_req_s"].tolist()[0] >= 0.95 * most
    again = run(found.config, progress=False).summary
    assert again["request_goodput_req_s"].tolist() == found.table["measured_goodput_req_s"].tolist()[:1]


def test_the_same_call_finds_the_same_and_runs_nothing_twice(standing: type[Standing]) -> None:
    first = tuned(most_runs=3)
    assert standing.served == 3
    assert tuned(most_runs=3).table.equals(first.table) and standing.served == 3
    assert tuned(most_runs=4).runs == 4 and standing.served == 4


def test_what_it_returns_is_saved_runs_and_is_shown(standing: type[Standing], tmp_path: Path) -> None:
    found = tuned(most_runs=2)
    loaded = load_config(found.save(tmp_path / "best.yaml"))
    assert loaded.to_dict() == found.config.to_dict() and not loaded.sweep
    assert run(loaded, progress=False).cached
    text = found._repr_html_()
    assert "24 of 24 candidates simulated, 2 run on the engine" in text and "measured_goodput_req_s" in text
    assert len(found.shown) == 10 and found.table["measured_goodput_req_s"].notna().sum() == 2
    predicted = tuned(most_runs=0)
    assert predicted.runs == 0 and predicted.table["measured_goodput_req_s"].isna().all()


def test_an_interrupt_returns_what_is_known(standing: type[Standing], monkeypatch: pytest.MonkeyPatch) -> None:
    serve = standing.serve

    def interrupted(self: Standing, *given: Any, **keys: Any) -> Any:
        if standing.served == 2:
            raise KeyboardInterrupt
        return serve(self, *given, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(standing, "serve", interrupted)
        found = tuned(most_runs=5)
    assert not found.complete and "interrupted, calling again goes on" in str(found)
    assert found.table["measured_goodput_req_s"].notna().sum() == 2
    assert tuned(most_runs=5).complete and standing.served == 5


def test_candidates_that_fail_are_none(standing: type[Standing], monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuned(space={"scheduler": ["fcfs", "chunked_prefill"], "engine.kv_tokens": [4096, 10**9]}, most_runs=1)
    assert (len(found.table), found.size) == (2, 4)
    with pytest.raises(ConfigError, match=r"nothing of the space can be simulated; the first: .*MemoryBudgetError"):
        tuned(space={"engine.kv_tokens": [10**9]})

    first = {"engine.kv_tokens": [10**9, 4096], "scheduler": ["fcfs", "chunked_prefill"]}
    found = tuned(space=first, most_simulated=3, most_runs=0)  # the walk starts at one of them
    assert found.config.engine.kv_tokens == 4096 and len(found.table) == 2

    def broken(self: Standing) -> None:
        raise ConfigError("no such device")

    monkeypatch.setattr(standing, "check", broken)
    with (
        pytest.warns(UserWarning, match="does not run on the engine"),
        pytest.raises(ConfigError, match="none of the candidates that were simulated runs on the engine"),
    ):
        tuned(most_runs=2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"most_runs": 11}, "most_runs is 11, expected at most 10"),
        ({"most_simulated": 0}, "most_simulated is 0, expected a whole number from 1"),
        ({"space": {}}, "space: expected a mapping of config keys to lists"),
        ({"space": {"scheduler": "fcfs"}}, "space: scheduler: expected a list of values"),
        ({"space": {"workload.seed": [1]}}, "space: 'workload.seed' is nothing to choose from"),
        ({"space": {"slo": [1]}}, "space: 'slo' is nothing to choose from"),
    ],
)
def test_what_cannot_be_tuned_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned(**keys)


def test_a_large_space_is_walked_along_its_axes() -> None:
    looked = []

    def best_of(places: Any) -> Any:
        looked.extend(places)
        return max(looked, key=lambda place: -sum((i - 7) ** 2 for i in place))

    space = {f"engine.{name}": list(range(10)) for name in "abcd"}
    walk(space, 400, best_of)
    assert (7, 7, 7, 7) in looked and len(looked) == len(set(looked)) < 100
    looked.clear()
    walk(space, 15, best_of)
    assert len(looked) == 15


def test_the_default_space_is_the_packages_strategies() -> None:
    assert set(default_space(gpu=False)) == {"scheduler"}
    assert {"scheduler", "placement", "overlap"} == set(default_space(gpu=True))
    for gpu in (False, True):
        assert load_config({"experiment": "x", "model": MODEL, "workload": WORKLOAD, "sweep": default_space(gpu=gpu)})


def test_the_command_tunes_a_config_and_writes_the_best(standing: type[Standing], tmp_path: Path) -> None:
    given = {"experiment": "tune", "model": MODEL, "workload": WORKLOAD, "slo": SLO, "engine": ENGINE}
    given |= {"simulator": MACHINE, "sweep": {"scheduler": SPACE["scheduler"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    words = ["tune", "config.yaml", "--output", "best.yaml", "--most-runs", "2", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["size"], found["runs"], found["complete"], len(found["candidates"])) == (4, 2, True, 4)
    assert yaml.safe_load((tmp_path / "best.yaml").read_text()) == found["config"]
    assert load_config(tmp_path / "best.yaml").scheduler == found["config"]["scheduler"]
