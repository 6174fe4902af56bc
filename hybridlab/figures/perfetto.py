"""Spans as a trace that Perfetto and chrome://tracing open (the Trace Event Format, JSON object form)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.figures.files import file_path, write_whole
from hybridlab.figures.tables import Where
from hybridlab.figures.timeline import one_run
from hybridlab.plans import LaneKind

if TYPE_CHECKING:
    from hybridlab.figures.tables import Data

COLUMNS = ("lane", "kind", "layer", "part", "microbatch", "rank", "tier", "start_s", "end_s")


def save_perfetto(spans: Data, path: str | Path, *, where: Where | None = None) -> Path:
    """Write the spans of one run as a trace; returns the path. To look at it: https://ui.perfetto.dev, "Open
    trace file" (the page keeps the file on your machine), or chrome://tracing, "Load".

    A worker is a process, a lane a thread, an op a complete event ("ph": "X") in microseconds since the start
    of the run, with layer, part, microbatch, tier and rank as its arguments. `where` picks the run by column.
    Raises ConfigError for a missing column, several runs, or a file that cannot be written.
    """
    frame = one_run(spans, COLUMNS, where, "save_perfetto")
    lanes = sorted(set(frame["lane"].tolist()), key=_lane_order)
    workers = sorted({_worker(lane) for lane in lanes})
    place = {lane: {"pid": workers.index(_worker(lane)) + 1, "tid": n + 1} for n, lane in enumerate(lanes)}
    events: list[dict[str, Any]] = []
    for number, worker in enumerate(workers, start=1):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": f"worker {worker}"}})
    for lane, where_to in place.items():
        events.append({"ph": "M", "name": "thread_name", **where_to, "args": {"name": lane.rpartition("/")[2]}})
        order = {"sort_index": where_to["tid"]}
        events.append({"ph": "M", "name": "thread_sort_index", **where_to, "args": order})
    rows: Any = frame[list(COLUMNS)]
    for row in rows.to_dict("records"):
        args = {name: row[name] for name in ("layer", "part", "microbatch", "tier", "rank")}
        times = {"ts": _microseconds(row["start_s"]), "dur": _microseconds(row["end_s"] - row["start_s"])}
        events.append({"ph": "X", "name": row["kind"], "cat": "op", **place[row["lane"]], **times, "args": args})
    known = [name for name in ("run_id", "evidence", "machine", "code", "scheduler") if name in frame.columns]
    of_the_run = {name: str(frame[name].iloc[0]) for name in known}
    trace = {"displayTimeUnit": "ms", "otherData": of_the_run, "traceEvents": events}
    path = file_path(path, "save_perfetto")
    write_whole({path: json.dumps(trace, allow_nan=False).encode()}, "trace")
    return path


def _worker(lane: str) -> str:
    return lane.rpartition("/")[0]


def _lane_order(lane: str) -> tuple[str, int, str]:
    worker, _, kind = lane.rpartition("/")
    kinds = [str(known) for known in LaneKind]
    return worker, kinds.index(kind) if kind in kinds else len(kinds), kind


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)  # to the nanosecond: what the clock resolves
