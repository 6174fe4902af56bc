from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from reading_results import told

from hybridlab.errors import ConfigError
from hybridlab.experiment import run
from hybridlab.run_files import write_failure
from hybridlab.store import read_run, results, spans_frame, write_run


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


def test_failed_runs_have_no_tables(stored: list[Path]) -> None:
    manifest = {**read_run(stored[0]).manifest, "run_id": "aaaaaaaaaaaa", "status": "failed", "error": "X: y"}
    write_failure(stored[0].parent / "aaaaaaaaaaaa", manifest)
    with pytest.raises(ConfigError, match=r"the run failed \(X: y\)"):
        read_run(stored[0].parent / "aaaaaaaaaaaa")
    write_failure(stored[0], {**manifest, "run_id": stored[0].name})  # a run that is there stays
    assert len(read_run(stored[0]).requests)
    (stored[0].parent / "aaaaaaaaaaaa" / "manifest.json").write_text(json.dumps({**manifest, "error": None, "axes": 3}))
    with pytest.warns(UserWarning, match="skipped .*aaaaaaaaaaaa"):
        results("question", failed=True)


@pytest.mark.parametrize("where", ["results", "results/question"])
def test_a_store_that_cannot_be_written_stops_before_anything_is_loaded(
    bench: list[str], config: dict[str, Any], tmp_path: Path, where: str
) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("in the way")
    with pytest.raises(ConfigError, match=r"question: cannot be written \(") as caught:
        run(config, progress=False)
    assert "\n" not in str(caught.value) and bench == []


def test_what_is_in_the_way_of_a_later_run_stops_before_anything_is_loaded(
    stored: list[Path], config: dict[str, Any], bench: list[str]
) -> None:
    (stored[1] / "manifest.json").unlink()
    bench.clear()
    with pytest.raises(ConfigError, match=f"{stored[1].name}: exists and is not a run; move it away"):
        run({**config, "sweep": {"workload.num_requests": [3, 2]}}, progress=False)
    assert bench == []


DAMAGE: list[tuple[str, Any]] = [
    ("started", 5),
    ("started", None),
    ("duration_s", "1"),
    ("duration_s", float("nan")),
    ("num_steps", True),
    ("config", []),
    ("axes", {"workload.seed": [1]}),
    ("labels", 3),
    ("identity", 3),
    ("strategies", {"scheduler": {}}),
    ("machine", {"cpu": 3, "cores": 1}),
    ("code", {"commit": 3}),
    ("slo", {"ttft_s": -1}),
]


@pytest.mark.parametrize(("key", "value"), DAMAGE)
def test_a_manifest_with_a_wrong_value_is_a_damaged_run(
    stored: list[Path], config: dict[str, Any], key: str, value: Any
) -> None:
    path = stored[0] / "manifest.json"
    whole = json.loads(path.read_text())
    for changed in ({**whole, key: value}, {name: old for name, old in whole.items() if name != key}):
        path.write_text(json.dumps(changed))
        said, table = told()
        assert table["run_id"].tolist() == [stored[1].name]
        assert len(said) == 1 and f"{stored[0].name}/manifest.json: incomplete run (" in said[0] and key in said[0]
    again = run({**config, "sweep": {"workload.num_requests": [1, 2]}}, progress=False)
    assert again.cached == (stored[1].name,)


@pytest.mark.parametrize("name", ["requests", "spans"])
def test_a_table_with_other_columns_is_a_damaged_run(stored: list[Path], name: str) -> None:
    path = stored[0] / f"{name}.parquet"
    whole = pd.read_parquet(path)
    last = "cached_tokens" if name == "requests" else "end_s"
    whole.drop(columns=last).to_parquet(path)
    assert f"{name}.parquet: incomplete run (no column '{last}')" in told()[0][0]
    if name == "requests":
        whole.assign(**{last: "x"}).to_parquet(path)
        assert "column 'cached_tokens' holds no numbers" in told()[0][0]


def test_spans_are_read_when_they_are_asked_for(stored: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = pd.read_parquet
    monkeypatch.setattr(pd, "read_parquet", lambda path: opened.append(path.name) or original(path))
    results("question")
    assert opened == ["requests.parquet"] * 2
    found = read_run(stored[0])
    assert len(found.spans) == 1 and found.spans is found.spans
    assert opened[2:] == ["requests.parquet", "spans.parquet"]
    (stored[1] / "spans.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"spans\.parquet: cannot be read"):
        read_run(stored[1])
