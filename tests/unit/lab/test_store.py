from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.errors import ConfigError
from hybridlab.experiment import run
from hybridlab.store import read_run, results, spans_frame, write_run


@pytest.fixture
def stored(bench: list[str], config: dict[str, Any]) -> list[Path]:
    """Two runs in the store."""
    return run({**config, "sweep": {"workload.num_requests": [1, 2]}}, progress=False).paths


def _break(path: Path, how: str) -> None:
    manifest = path / "manifest.json"
    if how == "no manifest":
        manifest.unlink()
    elif how == "torn manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif how == "foreign":
        manifest.write_text(json.dumps({"format": "other"}))
    elif how == "renamed":
        manifest.write_text(manifest.read_text().replace(path.name, "0" * 12))
    elif how == "incomplete":
        data = json.loads(manifest.read_text())
        del data["machine"]
        manifest.write_text(json.dumps(data))
    elif how == "torn table":
        table = path / "requests.parquet"
        table.write_bytes(table.read_bytes()[:100])
    elif how == "no spans":
        (path / "spans.parquet").unlink()


BREAKS = ["no manifest", "torn manifest", "foreign", "renamed", "incomplete", "torn table", "no spans"]


@pytest.mark.parametrize("how", BREAKS)
def test_damaged_runs_are_skipped_by_name(stored: list[Path], how: str) -> None:
    _break(stored[0], how)
    with pytest.warns(UserWarning, match=stored[0].name):
        frame = results("question")
    assert frame["run_id"].tolist() == [stored[1].name]


@pytest.mark.parametrize("how", BREAKS)
def test_damaged_runs_run_again(stored: list[Path], config: dict[str, Any], bench: list[str], how: str) -> None:
    _break(stored[0], how)
    bench.clear()
    again = {**config, "sweep": {"workload.num_requests": [1, 2]}}
    if how == "no manifest":
        with pytest.raises(ConfigError, match="exists and is not a run; move it away"):
            run(again, progress=False)
        shutil.rmtree(stored[0])
    result = run(again, progress=False)
    assert result.cached == (stored[1].name,)
    assert len(results("question")) == 2


def test_unknown_experiment(stored: list[Path]) -> None:
    with pytest.raises(ConfigError, match="no such results; experiments there: question"):
        results("answer")


def _hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_full_disk_leaves_nothing(stored: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    old = read_run(stored[0])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    target = stored[0].parent / "new"
    for folder in (target, stored[0]):
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
            write_run(folder, {"run_id": "x"}, old.requests, old.spans, overwrite=True)
    assert not target.exists() and _hidden(target) == []
    assert read_run(stored[0]).manifest == old.manifest


def test_whole_run_stays_unless_replaced(stored: list[Path]) -> None:
    old = read_run(stored[0])
    newer = {**old.manifest, "num_steps": 99}
    write_run(stored[0], newer, old.requests, old.spans)
    assert read_run(stored[0]).manifest["num_steps"] != 99
    write_run(stored[0], newer, old.requests, old.spans, overwrite=True)
    assert read_run(stored[0]).manifest["num_steps"] == 99
    assert _hidden(stored[0]) == []


def test_leftovers_of_killed_writes_go_after_an_hour(stored: list[Path]) -> None:
    old = read_run(stored[0])
    stale, fresh = stored[0].parent / ".part-a-1", stored[0].parent / ".part-b-1"
    for path in (stale, fresh):
        path.mkdir()
    os.utime(stale, (0, 0))
    write_run(stored[0], old.manifest, old.requests, old.spans, overwrite=True)
    assert not stale.exists() and fresh.exists()
    assert len(results("question")) == 2


def test_tables_survive_the_disk(stored: list[Path]) -> None:
    found = read_run(stored[1])
    assert found.requests["token_times_s"].map(len).tolist() == [4, 4]
    assert found.requests["output_ids"].map(list).tolist() == [[7] * 4] * 2
    assert isinstance(found.requests, pd.DataFrame)
    assert spans_frame([]).columns.tolist() == found.spans.columns.tolist()
