"""Commands end to end on a tiny checkpoint: what goes to stdout, what to stderr, and what is left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import hybridlab as hl
from hybridlab import weights_held
from hybridlab.cli.app import app

CONFIG = """\
experiment: cli-test
model: {{path: {checkpoint}}}
workload: {{kind: poisson, num_requests: 3, rate_req_s: 50, prompt_tokens: 6, output_tokens: 4}}
scheduler: fcfs
"""


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints") / "tiny"
    done = invoke("checkpoint", "make", "--preset", "tiny", "--dtype", "fp8", "--seed", 1, out)
    assert done.exit_code == 0, done.output
    return out


def test_checkpoint_info_says_what_is_in_it(tiny: Path) -> None:
    done = invoke("checkpoint", "info", tiny, "--verify", "--json")
    facts = json.loads(done.stdout)
    opened = hl.open_checkpoint(tiny)
    assert facts["num_bytes"] == opened.num_bytes
    assert facts["num_experts"] == opened.spec.num_experts
    assert facts["kv_entries"]["k"] == [opened.spec.num_kv_heads, opened.spec.head_dim]
    assert facts["verified"] is True
    text = invoke("checkpoint", "info", tiny).stdout
    assert f"num_experts         {opened.spec.num_experts}\n" in text


def test_generate_prints_tokens_alone_on_stdout(tiny: Path) -> None:
    """In a process of its own: nothing else, not even the memory plan, reaches stdout."""
    words = ["generate", tiny, "--tokens", "1,2,3", "--max-tokens", "5", "--precision", "exact"]
    command = [sys.executable, "-m", "hybridlab", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout)["tokens"]
    with hl.load(tiny, precision="exact") as engine:
        assert tokens == engine.generate([1, 2, 3], max_tokens=5)
    assert invoke(*words).stdout == ",".join(map(str, tokens)) + "\n"


def test_sampling_options_reach_the_engine(tiny: Path) -> None:
    words = ["generate", tiny, "--tokens", "1,2,3", "--max-tokens", 6, "--temperature", 1.5, "--top-p", 0.9]
    done = invoke(*words, "--seed", 3, "--threads", 1, "--json")
    with hl.load(tiny, threads=1) as engine:
        expected = engine.generate([1, 2, 3], 6, temperature=1.5, top_p=0.9, seed=3)
    assert json.loads(done.stdout)["tokens"] == expected


def test_run_writes_runs_and_figure(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(checkpoint=tiny), encoding="utf-8")
    done = invoke("run", config, "--results-dir", tmp_path / "results", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [row["completed"] for row in answer["summary"]] == [3]
    (picture,) = [path for path in answer["figures"] if path.endswith(".png")]
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert all(Path(path).is_dir() for path in answer["paths"])

    again = invoke("run", config, "--results-dir", tmp_path / "results")
    assert again.exit_code == 0
    assert "median_ttft_s" in again.stdout
    assert "cached" in again.stderr
    assert picture in again.stderr


@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_bench_prefill_reports_json(tiny: Path, layout: str) -> None:
    words = ("--checkpoint", tiny, "--tokens", 33, "--steps", 2, "--threads", 1, "--weight-layout", layout, "--json")
    found = json.loads(invoke("bench", "prefill", *words).stdout)
    assert (found["tokens"], found["weight_layout"], found["evidence"]) == (33, layout, "measured")
    assert found["flop"] > 0 and found["step_s"] > 0
    assert found["gflop_s"] == pytest.approx(found["flop"] / found["step_s"] / 1e9)


def test_bench_decode_reports_json(tiny: Path) -> None:
    done = invoke("bench", "decode", "--checkpoint", tiny, "--steps", 3, "--threads", 1, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["tokens_per_s"] > 0
    assert answer["threads"] == 1


def test_doctor_json_without_probes() -> None:
    answer = json.loads(invoke("doctor", "--no-probe", "--json").stdout)
    assert answer["read_bandwidth"] == []
    assert answer["cores"]["usable"] >= 1
    assert "kernel tier" in invoke("doctor", "--no-probe").stdout


def test_calibrate_prints_what_it_found_and_keeps_it(tiny: Path, tmp_path: Path) -> None:
    words = ["--device", "emulated", "--threads", 2, "--max-tokens", 8, "--repeats", 2, "--requests", 2, "--depth", 4]
    done = invoke("calibrate", tiny, *words, "--json", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["evidence"] == "emulated" and set(found["crossovers"]) >= {"stream_from_tokens", "mixed_share"}
    assert {point["tokens"] for point in found["points"] if point["kind"] == "prefill"} == {1, 4, 8}
    kept = next(line for line in done.stderr.splitlines() if line.startswith("kept in ")).removeprefix("kept in ")
    assert json.loads(Path(kept).read_text())["points"] == found["points"]
    figures = {f"crossover_{kind}{end}" for kind in ("prefill", "decode") for end in (".png", ".svg", ".pdf", ".json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"calibration.json"} | figures
    assert (tmp_path / "out" / "calibration.json").read_bytes() == Path(kept).read_bytes()
    Path(kept).unlink()
    text = invoke("calibrate", tiny, *words, "--no-save")
    assert text.stdout.startswith("tiny on ") and "ms a layer over tokens:" in text.stdout
    assert not Path(kept).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="weights are held on Linux")
def test_weights_are_held_listed_shown_by_doctor_and_released(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Among names of its own: what else is held on this machine is not touched.
    monkeypatch.setattr(weights_held, "_prefix", lambda: f"hybridlab-weights-test-{os.getpid()}-")
    held = json.loads(invoke("weights", "hold", tiny, "--idle", "10m", "--threads", 1, "--json").stdout)
    try:
        assert (held["folder"], held["layout"], held["idle_s"]) == (str(tiny.resolve()), "tiles", 600.0)
        listed = json.loads(invoke("weights", "list", "--json").stdout)
        assert held["pid"] in [one["pid"] for one in listed]
        shown = [one["pid"] for one in json.loads(invoke("doctor", "--no-probe", "--json").stdout)["held"]]
        assert held["pid"] in shown
        assert f"hybridlab weights release {tiny}" in invoke("doctor", "--no-probe").stdout
        again = invoke("weights", "hold", tiny)
        assert again.exit_code == 2 and "are held, or being filled, already" in again.stderr
    finally:
        done = invoke("weights", "release", tiny)
    assert done.exit_code == 0 and f"process {held['pid']}" in done.stdout
    twice = invoke("weights", "release", tiny)
    assert twice.exit_code == 2 and "no weights of it are held" in twice.stderr
    again = json.loads(invoke("weights", "hold", tiny, "--threads", 1, "--json").stdout)
    ended = invoke("doctor", "--no-probe", "--release-weights")
    assert f"process {again['pid']}" in ended.stderr and "weights held" not in ended.stdout
    assert invoke("weights", "list").stdout == "no weights are held\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--idle", "soon"], "idle is 'soon', expected a time such as 90s, 30m or 2h"),
        (
            ["--weight-layout", "rows"],
            "weight_layout is 'rows', expected 'tiles' or 'blocks': rows are mapped from their files",
        ),
    ],
)
def test_what_cannot_be_held_is_one_line(tiny: Path, words: list[str], message: str) -> None:
    done = invoke("weights", "hold", tiny, *words)
    assert done.exit_code == 2 and message in done.stderr and done.stdout == ""
