from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridlab.config import ExperimentConfig, load_config, points
from hybridlab.errors import ConfigError
from hybridlab.metrics import SLO_PRESETS

BASE: dict[str, Any] = {
    "experiment": "q",
    "model": {"preset": "tiny"},
    "workload": {"kind": "offline", "num_requests": 4, "prompt_tokens": [3, 9], "output_tokens": 4},
}
WORKLOAD = BASE["workload"]
# Nine levels of nine: a loader that follows aliases makes 10^9 values of half a kilobyte.
BOMB = "a: &a [x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_defaults() -> None:
    config = load_config(BASE)
    assert (config.scheduler, config.placement, config.overlap) == ("fcfs", "all_host", "sequential")
    assert config.slo == SLO_PRESETS["paper"]
    assert config.workload.num_requests == 4
    assert load_config(config) is config


def test_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(BASE).repeats = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedular": "x"}, "config: unknown key 'schedular'; did you mean 'scheduler'?"),
        ({"model": {"presett": "x"}}, "config: model: unknown key 'presett'; did you mean 'preset'?"),
        ({"model": {"preset": "a", "path": "b"}}, "model: expected either 'path'"),
        ({"model": {"path": "b", "seed": 1}}, "model: 'seed' belongs to a preset"),
        ({"workload": {"kind": "azur"}}, "workload: unknown kind 'azur'; did you mean 'azure'?"),
        ({"workload": {}}, "workload: missing key 'kind'"),
        ({"workload": 3}, "workload: expected a mapping, got 3"),
        ({"workload": {**WORKLOAD, "num_requets": 3}}, "'num_requets'; did you mean 'num_requests'?"),
        (
            {"workload": {**WORKLOAD, "num_requests": -3}},
            "num_requests: expected a number greater than 0, got -3",
        ),
        (
            {"workload": {**WORKLOAD, "num_requests": True}},
            "num_requests: expected a valid integer, got True",
        ),
        ({"workload": {**WORKLOAD, "length_scale": "1e3"}}, "got '1e3' (text; write 1000.0)"),
        (
            {"workload": {**WORKLOAD, "length_scale": float("nan")}},
            "workload.length_scale: expected a finite",
        ),
        ({"workload": {**WORKLOAD, "prompt_tokens": [9, 3]}}, "workload.prompt_tokens: expected a positive"),
        ({"workload": {**WORKLOAD, "prompt_tokens": 0}}, "workload.prompt_tokens: expected a positive"),
        ({"slo": "papr"}, "slo: unknown preset 'papr'; did you mean 'paper'?"),
        ({"slo": 3}, "slo: expected one of paper, mlperf-r1-server"),
        ({"slo": {"ttft_s": 1.0}}, "slo.tpot_s: missing"),
        ({"slo": {"ttft_s": -1.0, "tpot_s": 1.0}}, "slo.ttft_s: expected a number greater than 0, got -1.0"),
        ({"engine": {"token_budget": -1}}, "engine.token_budget: expected a number greater than 0, got -1"),
        ({"engine": {"device": "cudaa"}}, "engine.device: expected 'cpu', 'emulated' or 'cuda', got 'cudaa'"),
        ({"engine": None}, "engine: expected a mapping, got None"),
        ({"experiment": "../x"}, "experiment: expected a folder name"),
        ({"experiment": "checkpoints"}, "experiment: expected a folder name other than checkpoints and paper"),
        ({"experiment": "paper"}, "experiment: expected a folder name other than checkpoints and paper"),
        ({"experiment": "Paper"}, "experiment: expected a folder name other than"),
        ({"engine": {"memory_gb": 1e300}}, "engine.memory_gb: expected a number less than or equal to 1000000000"),
        ({"model": {"path": "a\0b"}}, "model.path: expected a path, got 'a\\x00b'"),
        ({"workload": {"kind": "azure", "path": "t\0.csv", "num_requests": 1}}, "workload.path: expected a path, got"),
        ({"workload": {"kind": "servegen", "path": "\ud800", "num_requests": 1}}, "workload.path: expected a path"),
        ({"scheduler": 3}, "scheduler: expected a name, a mapping"),
        ({"scheduler": {"nam": "fcfs"}}, "scheduler: expected a mapping with either 'name' or 'class'"),
        (
            {"scheduler": {"name": "fcfs", "x": float("inf")}},
            "scheduler.x: expected a finite number, got inf",
        ),
        ({"sweep": [1]}, "sweep: expected a mapping, got [1]"),
        ({"sweep": {"workload.num_requests": []}}, "sweep: workload.num_requests: expected a list"),
        ({"sweep": {"workload.num_requests": 4}}, "sweep: workload.num_requests: expected a list"),
        ({"sweep": {"workload.num_requets": [1]}}, "sweep (workload.num_requets=1): workload: unknown key"),
        ({"sweep": {"workload.num_requests": [1, 1]}}, "1 is listed twice"),
        ({"sweep": {"slo": ["paper"]}}, "'slo' cannot be swept"),
        ({"sweep": {"a": list(range(10_000)), "b": list(range(1000))}}, "a grid of 10,000,000 points"),
        ({"sweep": {"experiment.x": [1]}}, "'experiment' cannot be swept"),
        ({"sweep": {"figures": [[]]}}, "'figures' cannot be swept"),
        ({"sweep": {"workload.num_requests": ["4"]}}, "num_requests: expected a valid integer, got '4' (text; write 4"),
        ({"sweep": {"zip": {"workload.length_scale": [1.0, "1e3"]}}}, "got '1e3' (text; write 1000.0)"),
        ({"sweep": {"list": [{"engine.threads": 1.5}]}}, "sweep (engine.threads=1.5): engine.threads: expected"),
        (
            {"sweep": {"grid": {"workload.length_scale": [1.0, float("nan")]}}},
            "length_scale.1: expected a finite number",
        ),
        ({"model": {"path": "../model"}}, "model.path: '../model' leaves the project"),
        ({"model": {"path": "a/../../b"}}, "model.path: 'a/../../b' leaves the project"),
        (
            {"workload": {"kind": "azure", "path": "../t.csv", "num_requests": 1}},
            "workload.path: '../t.csv' leaves the",
        ),
        (
            {"sweep": {"model.path": ["a", "../b"]}, "model": {"path": "a"}},
            "(model.path='../b'): model.path: '../b' leaves",
        ),
        ({"sweep": {"warmup_requests.x": [1]}}, "warmup_requests: expected"),
    ],
)
def test_bad_values_get_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({**BASE, **change})
    text = str(caught.value)
    assert message in text
    assert "\n" not in text and len(text) < 300


def test_missing_key() -> None:
    with pytest.raises(ConfigError, match="config: experiment: missing; this key is required"):
        load_config({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: a\nexperiment: b\n", "line 2: duplicate key 'experiment'"),
        ("model: {seed: 1, seed: 2}\n", "line 1: duplicate key 'seed'"),
        ("a: &x [1]\nb: *x\n", "line 1: anchors and aliases are not allowed"),
        ("a: &x 1\n", "anchors and aliases are not allowed"),
        (BOMB, "line 1: anchors and aliases are not allowed"),
        ("<<: {a: 1}\n", "line 1: expected a text key, got '<<'"),
        ("experiment: .nan\n", "experiment: expected a finite number, got nan"),
        ("workload: {rate: -.inf}\n", "workload.rate: expected a finite number, got -inf"),
        ("- 1\n- 2\n", "expected a mapping of keys at the top level, found list"),
        ("", "expected a mapping of keys at the top level, found NoneType"),
        ("1: 2\n", "line 1: expected a text key, got '1'"),
        ("? [a]\n: 1\n", "expected a text key"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: [1\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("a: 2023-99-99\n", "month must be in 1..12"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "x" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_yaml_traps(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_may_be_absolute_or_go_round_inside_the_project(tmp_path: Path) -> None:
    for path in ("a/../b", "./model", str(tmp_path / "model"), "/data/../models/x"):
        assert load_config({**BASE, "model": {"path": path}}).model.path == path


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="found a folder"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match="expected a path, a mapping"):
        load_config(3)  # pyright: ignore[reportArgumentType]


def test_grid_of_points() -> None:
    scheduler = [{"name": "chunked_prefill"}, "fcfs"]
    sweep = {"scheduler": scheduler, "workload.num_requests": [1, 2], "engine.threads": [2]}
    found = points(load_config({**BASE, "sweep": sweep}))
    assert [(p.config.scheduler, p.config.workload.num_requests) for p in found] == [
        (s, n) for s in scheduler for n in (1, 2)
    ]
    assert all(p.config.engine.threads == 2 and not p.config.sweep for p in found)
    assert found[0].axes == {"scheduler": scheduler[0], "workload.num_requests": 1, "engine.threads": 2}


def test_sweep_over_a_field_of_a_strategy_and_its_name() -> None:
    sweep = {"scheduler.chunk_tokens": [1, 2], "scheduler": ["a", {"name": "b"}]}
    found = [p.config.scheduler for p in points(load_config({**BASE, "sweep": sweep}))]
    assert found == [{"name": name, "chunk_tokens": n} for n in (1, 2) for name in ("a", "b")]


def test_sweep_over_a_field_of_an_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="which has no keys to sweep over"):
        load_config({**BASE, "scheduler": object(), "sweep": {"scheduler.chunk_tokens": [1]}})


def test_replaced_strategy_drops_its_axes() -> None:
    sweep = {"scheduler.chunk_tokens": [1, 2], "workload.num_requests": [1, 2]}
    mine = object()
    config = load_config({**BASE, "sweep": sweep}).replaced({"scheduler": mine})
    assert config.scheduler is mine
    assert list(config.sweep) == ["workload.num_requests"]
    assert isinstance(config, ExperimentConfig)


def test_project_is_found_from_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "experiments" / "q").mkdir(parents=True)
    elsewhere.mkdir()
    (project / "pyproject.toml").write_text("")
    path = project / "experiments" / "q" / "config.yaml"
    workload = "{kind: offline, num_requests: 1, prompt_tokens: 1, output_tokens: 1}"
    path.write_text(f"experiment: q\nmodel: {{preset: tiny}}\nworkload: {workload}\n")
    monkeypatch.chdir(elsewhere)
    assert load_config(path).project_dir == project
    assert load_config(path).source == str(path)
    assert load_config(BASE).project_dir == elsewhere
