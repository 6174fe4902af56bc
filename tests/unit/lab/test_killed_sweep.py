"""A sweep killed at twenty random points and resumed equals the uninterrupted one: same runs, none twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from hybridlab import backends, experiment
from hybridlab.errors import ConfigError
from hybridlab.store import results

NUM_KILLS = 20
SERVE_S = 0.01
SWEEP = {"scheduler": ["fcfs", "chunked_prefill"], "workload.num_requests": list(range(1, 25))}


def stored_keys(folder: Path) -> set[str]:
    """What the store holds, as the log of the bench writes it; reading it must not warn."""
    with warnings.catch_warnings(action="error"):
        try:
            table = results("question", folder)
        except ConfigError:  # killed before anything was written
            return set()
    return {f"{row['scheduler']} {row['num_requests']}" for row in table.to_dict("records")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends a forked process at a chosen moment; Windows has no fork")
def test_killed_twenty_times_and_resumed_equals_uninterrupted(
    bench: list[str], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, loaded = tmp_path / "served.log", tmp_path / "loaded"
    fake: Any = backends.BACKENDS["engine"]
    labels = {"FCFS": "fcfs", "ChunkedPrefill": "chunked_prefill"}

    class LoggedBench(fake):
        """Writes down what it served at the end of each run, whatever becomes of the process then."""

        def load(self) -> None:
            super().load()
            loaded.touch()

        def serve(self, requests: Any, scheduler: Any, on_event: Any) -> Any:
            time.sleep(SERVE_S)
            served = super().serve(requests, scheduler, on_event)
            with log.open("a") as file:
                file.write(f"{labels[type(scheduler).__name__]} {len(requests)}\n")
            return served

    monkeypatch.setitem(backends.BACKENDS, "engine", LoggedBench)
    config = {**config, "sweep": SWEEP}
    # Uninterrupted, and first: the children inherit a process that has imported everything.
    whole = experiment.run(config, results_dir=tmp_path / "whole", progress=False)
    assert whole.cached == ()
    folder, rng = tmp_path / "killed", random.Random(3)
    before: set[str] = set()
    found_after: list[int] = []
    for kill in range(NUM_KILLS):
        lines = len(log.read_text().splitlines())
        loaded.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                experiment.run(config, results_dir=folder, progress=False)
            finally:
                os._exit(0)
        if kill % 4 == 0:  # anywhere, the planning before the first run included
            time.sleep(rng.uniform(0, 0.05))
        else:  # while it serves and writes
            more = rng.randint(0, 2)  # counted, not timed: a busy machine serves later
            while not loaded.exists() or len(log.read_text().splitlines()) < lines + more:
                assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the sweep ended before the last kill"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 2 * SERVE_S))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the sweep ended before the last kill"
        served = log.read_text().splitlines()[lines:]
        assert before.isdisjoint(served), "a finished run was served again"
        after = stored_keys(folder)
        assert before <= after and len(after - set(served) - before) == 0
        assert len(set(served) - after) <= 1  # the one whose files were being written
        before = after
        found_after.append(len(after))
    assert 0 < found_after[-1] < 48 and len(set(found_after)) > 5  # the kills were spread over the sweep

    lines = len(log.read_text().splitlines())
    resumed = experiment.run(config, results_dir=folder, progress=False)
    assert len(resumed.cached) == len(before)
    last = log.read_text().splitlines()[lines:]
    assert before.isdisjoint(last) and len(last) == len(set(last)) == 48 - len(before)

    assert resumed.summary.equals(whole.summary)
    assert resumed.requests.equals(whole.requests) and resumed.spans.equals(whole.spans)
    assert [path.name for path in resumed.paths] == [path.name for path in whole.paths]
    kept = [path.name for path in (folder / "question").iterdir() if not path.name.startswith(".")]
    assert sorted(kept) == sorted(whole.summary["run_id"])


CONFIG = """\
experiment: killed
model: {preset: tiny, dtype: fp8, seed: 0}
workload: {kind: poisson, num_requests: 4, rate_req_s: 20, prompt_tokens: 12, output_tokens: 6}
engine: {precision: exact, kv_tokens: 512, token_budget: 64}
repeats: 2
sweep:
  scheduler: [fcfs, {name: chunked_prefill, chunk_tokens: 8}]
  zip: {workload.seed: [0, 1, 2], workload.output_tokens: [4, 5, 6]}
"""


@pytest.mark.slow
def test_the_real_engine_killed_in_its_own_process(tmp_path: Path) -> None:
    """`hybridlab sweep` itself, from its first import to its last write; what is compared is what was generated."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    command = [sys.executable, "-m", "hybridlab", "sweep", str(path), "--results-dir"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    folder, rng, kills = tmp_path / "killed", random.Random(0), 0
    before: set[str] = set()
    while len(before) < 10:
        child = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        more = rng.randrange(3)  # 0: while it imports, plans or makes the checkpoint
        while child.poll() is None and len(list((folder / "killed").glob("[!.]*/manifest.json"))) < len(before) + more:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3 if more else 6.0))
        child.kill()
        kills += child.wait() == -signal.SIGKILL
        with warnings.catch_warnings(action="error"):
            after = set(results("killed", folder)["run_id"]) if (folder / "killed").is_dir() else set()
        assert before <= after
        before = after
    assert kills >= 4
    resumed = subprocess.run([*command, str(folder)], check=True, capture_output=True, text=True)
    assert f"cached: {len(before)} of 12 runs" in resumed.stderr
    uninterrupted = experiment.run(path, results_dir=tmp_path / "whole", progress=False)
    again = experiment.run(path, results_dir=folder, progress=False)
    assert len(uninterrupted.cached) == len(again.cached) == 12
    assert again.summary["run_id"].tolist() == uninterrupted.summary["run_id"].tolist()
    told = ["run_id", "request_id", "status", "prompt_tokens", "output_tokens"]
    assert again.requests[told].equals(uninterrupted.requests[told])
    assert again.requests["output_ids"].map(list).tolist() == uninterrupted.requests["output_ids"].map(list).tolist()
