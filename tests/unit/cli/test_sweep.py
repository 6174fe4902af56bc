"""`hybridlab plan`, `sweep` and `results` on a tiny model: streams, exit status, and what is left on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import hybridlab as hl
from hybridlab import run_costs
from hybridlab.cli.app import app
from hybridlab.errors import ConfigError

CONFIG = """\
experiment: cli-sweep
model: {preset: tiny, dtype: fp8, seed: 0}
workload: {kind: poisson, num_requests: 3, rate_req_s: 50, prompt_tokens: 6, output_tokens: 4}
engine: {token_budget: 64, kv_tokens: 512}
sweep:
  zip: {workload.seed: [0, 1], engine.memory_gb: [8, SECOND]}
"""


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_costs, "measured_read_gb_s", lambda threads: 10.0)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("SECOND", "4"))
    return path


def test_plan_sweep_results_and_export(config: Path, tmp_path: Path) -> None:
    where = ("--results-dir", tmp_path / "results")
    planned = invoke("plan", config, *where)
    assert planned.exit_code == 0, planned.output
    assert "2: 0 stored, 2 to do" in planned.stdout and "predicted_s" in planned.stdout
    assert not (tmp_path / "results").exists()
    assert json.loads(invoke("plan", config, *where, "--json").stdout)["to_do"] == 2

    done = invoke("sweep", config, *where, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [row["completed"] for row in answer["summary"]] == [3, 3] and answer["failed"] == {}
    assert all(Path(path).is_dir() for path in answer["paths"])
    assert done.stderr.startswith("cli-sweep\n  runs         2: 0 stored, 2 to do\n")  # the plan comes first

    again = invoke("sweep", config, *where)
    assert again.exit_code == 0 and "median_ttft_s" in again.stdout and len(again.stdout.splitlines()) == 3
    assert "2: 2 stored, 0 to do" in again.stderr and "cached: 2 of 2 runs" in again.stderr

    table = invoke("results", "cli-sweep", *where, "--export", tmp_path / "table.tex")
    assert table.exit_code == 0 and len(table.stdout.splitlines()) == 3
    assert r"\toprule" in (tmp_path / "table.tex").read_text() and "table.tex" in table.stderr
    rows = json.loads(invoke("results", "cli-sweep", *where, "--slo", "mlperf-r1-interactive", "--json").stdout)
    assert [row["slo"] for row in rows] == ["mlperf-r1-interactive"] * 2
    assert invoke("results", config, *where).stdout == table.stdout  # a config names its experiment

    none = invoke("results", "cli-sweep", *where, "--evidence", "simulated")
    assert (none.exit_code, none.stdout) == (0, "") and none.stderr.splitlines() == [
        "hybridlab: warning: cli-sweep: no simulated run; there are 2 measured runs",
        "cli-sweep: no runs to show",
    ]
    assert json.loads(invoke("results", "cli-sweep", *where, "--evidence", "simulated", "--json").stdout) == []


def test_failed_runs_make_exit_status_one(config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG.replace("SECOND", "0.001"))
    where = ("--results-dir", tmp_path / "results")
    first = invoke("sweep", config, *where, "--json")
    assert first.exit_code == 1
    (error,) = json.loads(first.stdout)["failed"].values()
    assert error.startswith("MemoryBudgetError: ") and len(json.loads(first.stdout)["summary"]) == 1
    assert "hybridlab: warning: cli-sweep: 1 of 2 runs failed (retry_failed=True or --retry-failed" in first.stderr
    assert "will fail    1 runs; the first:" in first.stderr

    again = invoke("run", config, *where, "--no-figures")
    assert again.exit_code == 1 and "failed earlier: 1 of 2 runs left out" in again.stderr
    retried = invoke("sweep", config, *where, "--retry-failed")
    assert retried.exit_code == 1 and "2: 1 stored, 1 to do" in retried.stderr
    table = invoke("results", "cli-sweep", *where)
    assert table.exit_code == 0 and "1 failed run left out" in table.stderr and len(table.stdout.splitlines()) == 2
    assert "MemoryBudgetError" in invoke("results", "cli-sweep", *where, "--failed").stdout


def test_if_all_runs_failed_the_first_error_is_the_line(config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG.replace("[8, SECOND]", "[0.002, 0.001]"))
    for shown in ("MiB in the budget", "all 2 runs failed earlier (retry_failed=True or --retry-failed"):
        done = invoke("run", config, "--results-dir", tmp_path / "results")
        assert done.exit_code == 2 and done.stdout == ""
        line = done.stderr.splitlines()[-1]
        assert line.startswith(f"hybridlab: error: {config}: ") and shown in line
    table = invoke("results", "cli-sweep", "--results-dir", tmp_path / "results")
    assert (table.exit_code, table.stdout) == (0, "") and "2 failed runs left out" in table.stderr
    assert table.stderr.splitlines()[-1] == "cli-sweep: no runs to show"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("plan", "{}/none.yaml"), "none.yaml: cannot be read"),
        (("sweep", "{}/none.yaml"), "none.yaml: cannot be read"),
        (("results", "nothing", "--results-dir", "{}"), "no such results; experiments there: none"),
        (("results", "../x", "--results-dir", "{}"), "'../x': no such results"),
        (("results",), "argument"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: tuple[str, ...], shown: str) -> None:
    done = invoke(*(word.format(tmp_path) for word in words))
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hybridlab: error: ") and shown in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["threads: 1000", "device: cuda"])
def test_what_shows_only_when_a_run_starts_names_the_file(config: Path, tmp_path: Path, change: str) -> None:
    config.write_text(CONFIG.replace("SECOND", "4").replace("token_budget: 64", f"token_budget: 64, {change}"))
    done = invoke("run", config, "--results-dir", tmp_path / "results")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"hybridlab: error: {config}: {change.split(':')[0]} ")
    assert not (tmp_path / "results").exists()  # nothing ran, nothing is recorded, no checkpoint was made for it


def test_a_damaged_checkpoint_names_the_file(config: Path, tmp_path: Path) -> None:
    made = hl.make_checkpoint(tmp_path / "made", "tiny", progress=False)
    weights = next(made.folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    config.write_text(CONFIG.replace("{preset: tiny, dtype: fp8, seed: 0}", "{path: made}").replace("SECOND", "4"))
    (tmp_path / "pyproject.toml").write_text("")
    done = invoke("run", config, "--results-dir", tmp_path / "results")
    assert (done.exit_code, done.stdout) == (2, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"hybridlab: error: {config}: ") and weights.name in line


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    """The real script: Ctrl-C in the second of two runs, whose requests are long in coming."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("workload.seed: [0, 1]", "workload.rate_req_s: [50, 0.001]").replace("SECOND", "4"))
    words = [sys.executable, "-m", "hybridlab", "sweep", str(path), "--results-dir", str(tmp_path / "results")]
    pipe, heard = subprocess.PIPE, partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background it is not
    child = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard)
    try:
        folder = tmp_path / "results" / "cli-sweep"
        while child.poll() is None and not list(folder.glob("[!.]*/manifest.json")):
            time.sleep(0.02)
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out) == (130, ""), err
    assert "hybridlab: interrupted; 1 of 2 runs are done and stored; calling again resumes" in err
    assert err.splitlines()[-1] == "hybridlab: interrupted" and "Traceback" not in err
    assert len(hl.results("cli-sweep", tmp_path / "results")) == 1
    assert hl.plan(path, results_dir=tmp_path / "results").frame["status"].tolist() == ["stored", "to do"]


def test_a_figure_that_cannot_be_drawn_makes_exit_status_one(config: Path, tmp_path: Path) -> None:
    where = ("--results-dir", tmp_path / "results")
    asked = "figures: [{figure: timeline, name: all}, {figure: timeline, name: one, where: {repeat: 0}}, load_curves]\n"
    config.write_text(CONFIG.replace("SECOND", "4") + asked)
    for command in ("sweep", "run"):
        done = invoke(command, config, *where, "--json")
        assert done.exit_code == 1, done.output
        answer = json.loads(done.stdout)
        assert {Path(path).stem for path in answer["figures"]} == {"load_curves"}  # one stops no other
        assert [line.split(":")[1] for line in answer["figures_failed"]] == [" all", " one"]
        assert "failed  figures: all: timeline: spans of 2 runs" in done.stderr and len(answer["summary"]) == 2
    assert invoke("sweep", config, *where, "--no-figures").exit_code == 0


def test_a_figure_that_nobody_asked_for_is_a_note(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridlab.figures import draw

    def broken(*_: object, **__: object) -> None:
        raise ConfigError("nothing to draw")

    monkeypatch.setattr(draw, "FUNCTIONS", {"ttft_throughput": broken})
    done = invoke("run", config, "--results-dir", tmp_path / "results", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["figures_failed"] == []
    assert "hybridlab: figures: ttft_throughput: nothing to draw" in done.stderr
