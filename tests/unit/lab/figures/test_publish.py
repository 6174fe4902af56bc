"""results/paper: written from stored runs, rebuilt from its own tables."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybridlab import experiment
from hybridlab.cli.app import app
from hybridlab.errors import ConfigError
from hybridlab.figures import publish as module
from hybridlab.figures import save
from hybridlab.figures.publish import publish, rebuild

ONE = {"workload.rate_req_s": 20.0}
FIGURES = [
    "ttft_throughput",
    "load_curves",
    {"figure": "ttft_prompt_length", "where": ONE},
    {"figure": "latency_cdf", "where": ONE, "metric": "itl_s", "name": "gaps"},
    {"figure": "timeline", "where": {**ONE, "scheduler": "fcfs", "repeat": 1}},
]
STEMS = ["ttft_throughput", "load_curves", "ttft_prompt_length", "gaps", "timeline"]


@pytest.fixture
def project(bench: list[str], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment "question" of the fake backend with one figure, not run yet."""
    monkeypatch.setattr(save, "FORMATS", (".svg",))  # the others take longer
    lengths = {"prompt_tokens": [2, 60], "output_tokens": 4}
    asked = {
        **config,
        "workload": {"kind": "poisson", "num_requests": 12, "rate_req_s": 5.0, **lengths},
        "sweep": {
            "scheduler": ["fcfs", {"name": "chunked_prefill", "chunk_tokens": 8}],
            "workload.rate_req_s": [5.0, 20.0],
        },
        "repeats": 2,
        "slo": {"name": "mine", "ttft_s": 0.2, "tpot_s": 0.05},
        "figures": FIGURES[3:4],
    }
    folder = tmp_path / "experiments" / "question"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(asked))  # JSON is YAML
    return tmp_path


def ask_for_all_figures(project: Path) -> None:
    path = project / "experiments" / "question" / "config.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), "figures": FIGURES}))


def run(project: Path) -> Any:
    return experiment.run(project / "experiments/question/config.yaml", progress=False)


def test_published_figures_are_rebuilt_from_their_tables_alone(project: Path, tmp_path: Path) -> None:
    ask_for_all_figures(project)
    result = run(project)
    written = publish("question")
    folder = project / "results" / "paper" / "question"
    named = {f"{stem}{suffix}" for stem in STEMS for suffix in (".svg", ".json")}
    tables = {"meta.json", "summary.csv", "requests.parquet", "spans.parquet"}
    assert {path.name for path in folder.iterdir()} == named | tables
    assert {path.name for path in written} == named and all(path.is_file() for path in written)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["question"]  # no parts left

    # A fresh clone has neither runs nor checkpoint, and the config may have changed since.
    clone = tmp_path / "clone"
    shutil.copytree(folder, clone / "results" / "paper" / "question")
    for path in named:
        (clone / "results" / "paper" / "question" / path).unlink()
    again = rebuild(results_dir=clone / "results")
    assert {path.name: path.read_bytes() for path in again} == {path.name: path.read_bytes() for path in written}

    meta = json.loads((folder / "meta.json").read_text())
    assert meta["run_ids"] == result.summary["run_id"].tolist()
    assert meta["evidence"] == ["measured"] and meta["machine"][0]["cpu"] == "test"
    assert meta["config"]["figures"] == FIGURES and "hybridlab" in meta["versions"][0]
    assert meta["matplotlib"] == matplotlib.__version__
    sidecar = json.loads((folder / "gaps.json").read_text())
    command = "hybridlab sweep experiments/question/config.yaml && hybridlab figures --publish question"
    assert sidecar["command"] == meta["command"] == command
    assert len(sidecar["run_ids"]) == 4 and sidecar["machine"] == ["test, 1 cores"]


def test_published_tables_hold_what_the_figures_need(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for_all_figures(project)
    monkeypatch.setattr(module, "_rebuild", lambda folder: [])  # drawing takes long
    result = run(project)
    publish("question")
    folder = project / "results" / "paper" / "question"
    requests = pd.read_parquet(folder / "requests.parquet")
    assert list(requests.columns) == ["run_id", "prompt_tokens", "cached_tokens", "ttft_s", "token_times_s"]
    wanted = result.summary.query("`workload.rate_req_s` == 20")["run_id"]
    assert set(requests["run_id"]) == set(wanted) and len(requests) == 4 * 12
    spans = pd.read_parquet(folder / "spans.parquet")
    assert len(set(spans["run_id"])) == 1 and {"lane", "kind", "start_s"} <= set(spans.columns)
    _, tables = module._read(folder)
    for column in ("median_ttft_s", "run_id", "repeat", "workload.rate_req_s"):  # to the last digit
        assert tables.summary[column].tolist() == result.summary[column].tolist()


def test_publishing_again_replaces_the_folder(project: Path) -> None:
    run(project)
    first = {path.name: path.read_bytes() for path in publish("question")}
    folder = project / "results" / "paper" / "question"
    (folder / "stale.png").write_bytes(b"")
    assert {path.name: path.read_bytes() for path in publish("question")} == first
    assert not (folder / "stale.png").exists()


def test_missing_and_failed_runs_are_one_line(project: Path, bench: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        publish("question")
    sweep = "hybridlab sweep experiments/question/config.yaml"
    assert f"8 of 8 runs of this machine, code and config are missing; {sweep} makes them" in str(caught.value)
    result = run(project)
    shutil.rmtree(result.paths[3])
    bench.clear()
    with pytest.raises(ConfigError, match="1 of 8 runs"):
        publish("question")
    assert bench == [] and not (project / "results" / "paper").exists()


def test_failed_runs_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridlab import backends

    fake: Any = backends.BACKENDS["engine"]
    whole = fake.serve

    def serve(self: Any, requests: Any, scheduler: Any, on_event: Any) -> Any:
        if type(scheduler).__name__ == "FCFS":
            raise RuntimeError("broken")
        return whole(self, requests, scheduler, on_event)

    monkeypatch.setattr(fake, "serve", serve)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(project)
    with pytest.raises(ConfigError, match=r"4 of 8 runs failed \(.*broken.*\); hybridlab sweep .* --retry-failed"):
        publish("question")


def test_nothing_is_half_published(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(project)
    publish("question")
    folder = project / "results" / "paper" / "question"
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(module, "MOST_BYTES", 2_000)
    with pytest.raises(ConfigError, match=r"question/.*: [\d,]+ bytes; expected at most 2,000 \(choose fewer rows"):
        publish("question")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert [path.name for path in folder.parent.iterdir()] == ["question"]


def test_unknown_questions_are_named(project: Path) -> None:
    with pytest.raises(ConfigError, match="no such experiment; did you mean 'question'"):
        publish("qestion")
    with pytest.raises(ConfigError, match="no such experiment"):
        publish("../experiments/question")
    with pytest.raises(ConfigError, match="nothing is published; hybridlab figures --publish QUESTION does it"):
        rebuild()
    run(project)
    publish("question")
    with pytest.raises(ConfigError, match="no published question 'questoin'; did you mean 'question'"):
        rebuild(["questoin"])


def test_values_of_a_csv_are_read_as_they_were_written() -> None:
    floats = [0.1, 1e-17, 123456789.12345678, 5e300]
    assert module._values([repr(value) for value in floats], False) == floats
    assert module._values(["1", "2"], False) == [1, 2]
    assert module._values(["012", "1e5"], True) == ["012", "1e5"]  # ids of runs and commits
    mixed = module._values(["None", "NA", ""], False)
    assert mixed[:2] == ["None", "NA"] and mixed[2] != mixed[2]


DAMAGE = [
    ("meta.json", "{", r"meta\.json: cannot be read"),
    ("meta.json", "{}", r"meta\.json: expected a file of format 'hybridlab-paper/1'"),
    ("meta.json", '{"format": "hybridlab-paper/1", "config": {}}', r"meta\.json: damaged \(KeyError"),
    ("requests.parquet", "no parquet", r"requests\.parquet: cannot be read"),
    ("summary.csv", None, r"summary\.csv: cannot be read"),
    ("summary.csv", "", r"summary\.csv: cannot be read"),
    ("summary.csv", "x", r"summary\.csv: damaged \(no column 'scheduler'\)$"),
    ("summary.csv", "scheduler,repeat,evidence,machine,code\n", r"summary\.csv: damaged \(no column 'run_id'\)$"),
    (
        "summary.csv",
        "scheduler,repeat,evidence,machine,code,run_id,median_ttft_s\nfcfs,0,measured,m,c,r,fast\n",
        r"summary\.csv: damaged \(column 'median_ttft_s' holds something else than numbers\)$",
    ),
]


def test_damaged_tables_are_named(project: Path) -> None:
    run(project)
    publish("question")
    for file, content, message in DAMAGE:
        path = project / "results" / "paper" / "question" / file
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            rebuild()
        path.write_bytes(whole)
    rebuild()


def test_command_line(project: Path) -> None:
    def invoke(*words: str) -> Any:
        return CliRunner().invoke(app, ["figures", *words])

    run(project)
    assert "name the question" in invoke("--publish").stderr and invoke("--publish").exit_code == 2
    done = invoke("--publish", "question", "--json")
    assert done.exit_code == 0, done.output
    files = json.loads(done.stdout)["files"]
    assert len(files) == 2
    again = invoke()
    assert again.exit_code == 0 and again.stdout.split() == files
    assert invoke("nope").exit_code == 2
