from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from hybridlab.columns import EVIDENCE
from hybridlab.errors import ConfigError
from hybridlab.figures import save_perfetto, timeline


def spans(**changes: Any) -> pd.DataFrame:
    rows = [
        ("main/gpu", "attention", 2, 0, 0, 0, "", 0.000, 0.001),
        ("main/gpu", "attention", 2, 0, 1, 0, "", 0.001, 0.002),
        ("main/cpu", "experts", 2, 1, 0, 0, "host", 0.001, 0.002),
        ("main/cpu", "experts", 2, 0, 1, 0, "host", 0.199, 0.200),
    ]
    columns = ["lane", "kind", "layer", "part", "microbatch", "rank", "tier", "start_s", "end_s"]
    return pd.DataFrame(rows, columns=columns).assign(**{"evidence": "measured", "run_id": "abc", **changes})


def test_a_row_per_lane_and_a_window(legend_texts: Any) -> None:
    ax = timeline(spans(), start_s=0.0, end_s=0.0015)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["main/cpu", "main/gpu"]
    assert legend_texts(ax) == ["attention", "experts", "later microbatch", "measured"]
    bars: Any = ax.patches
    assert sorted(round(bar.get_width(), 3) for bar in bars) == [0.5, 0.5, 1.0]  # cut at the window, in ms
    assert ax.get_xlim() == (0, 1.5) and ax.get_xlabel() == "time after 0.000 s (ms)"
    assert len(timeline(spans()).patches) == 1  # the last 50 ms


def test_kinds_too_thin_to_see_are_not_in_the_legend(legend_texts: Any) -> None:
    thin = spans().iloc[:1].assign(lane="main/cpu", kind="combine", start_s=0.1995, end_s=0.1995 + 1e-7)
    assert legend_texts(timeline(pd.concat([spans(), thin]))) == ["experts", "later microbatch", "measured"]
    assert legend_texts(timeline(thin, start_s=0.1, end_s=0.2)) == ["combine", "measured"]


def test_bars_say_their_evidence(legend_texts: Any) -> None:
    looks = set()
    for kind in EVIDENCE:
        ax = timeline(spans(evidence=kind), start_s=0.0, end_s=0.002)
        bar: Any = ax.patches[0]
        assert bar.get_facecolor() == to_rgba(bar.get_facecolor()[:3], 1.0 if kind == "measured" else 0.4)
        looks.add((bar.get_facecolor()[3], str(bar.get_linestyle()), legend_texts(ax)[-1]))
    assert len(looks) == 5


def test_one_run_at_a_time(tables: Any) -> None:
    with pytest.raises(ConfigError, match=r"timeline: spans of 4 runs \(a, b, c, \.\.\.\); pass those of one"):
        timeline(spans(run_id=list("abcd")))
    data = tables()
    picked = {"scheduler": "fcfs", "workload.rate_scale": 1, "repeat": 1}  # `repeat` is in the summary only
    assert len(timeline(data, where=picked).patches) == 2
    with pytest.raises(ConfigError, match="save_perfetto: spans of 2 runs"):
        save_perfetto(data, "trace.json", where={"scheduler": "fcfs", "workload.rate_scale": 1})


def test_bad_frames_are_named() -> None:
    with pytest.raises(ConfigError, match="timeline: no column 'kind'"):
        timeline(spans().drop(columns="kind"))
    with pytest.raises(ConfigError, match=r"0 ops between 0\.05 and 0\.1 s"):
        timeline(spans(), start_s=0.05, end_s=0.1)
    with pytest.raises(ConfigError, match="save_perfetto: no column 'tier'"):
        save_perfetto(spans().drop(columns="tier"), "trace.json")


def test_perfetto_trace_follows_the_format(tmp_path: Path) -> None:
    frame = pd.concat([spans(), spans(lane="prefill0/h2d").iloc[:1]])
    path = save_perfetto(frame, tmp_path / "new" / "trace.json")
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms" and trace["otherData"] == {"run_id": "abc", "evidence": "measured"}
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert named == {1: "worker main", 2: "worker prefill0"}
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert lanes == {(1, 1): "gpu", (1, 2): "cpu", (2, 3): "h2d"}  # a worker's lanes in the order of LaneKind
    ops = [event for event in events if event["ph"] == "X"]
    assert len(ops) == 5
    assert all({"name", "cat", "pid", "tid", "ts", "dur", "args"} <= event.keys() for event in ops)
    assert ops[2]["args"] == {"layer": 2, "part": 1, "microbatch": 0, "tier": "host", "rank": 0}
    assert (ops[2]["ts"], ops[2]["dur"], ops[2]["name"]) == (1000.0, 1000.0, "experts")
    assert [e["ts"] for e in ops] == pytest.approx(list(1e6 * frame["start_s"].to_numpy(np.float64)))


def test_trace_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trace\.json: trace cannot be written"):
        save_perfetto(spans(), tmp_path / "file" / "trace.json")
