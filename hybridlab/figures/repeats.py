"""Runs of a summary as points of a curve: repeats of one setting are one point with a range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridlab.columns import is_axis
from hybridlab.errors import ConfigError
from hybridlab.figures.tables import Series, settings

Row = dict[str, Any]
# Keys of a config that change nothing but how fast requests come: points along a curve.
LOADS = ("workload.rate_scale", "workload.rate_req_s", "workload.num_users", "workload.think_s")
MISSING = ("None", "nan")


@dataclass(frozen=True)
class Curve:
    """The points of one series in order of load; each point holds the rows of its repeats."""

    series: Series
    load: np.ndarray
    points: Sequence[Sequence[Row]]

    @property
    def repeated(self) -> bool:
        return any(len(rows) > 1 for rows in self.points)

    @property
    def saturated(self) -> np.ndarray:
        """bool [points]: in one of the repeats at least, more was offered than completed."""
        return np.array([any(row.get("saturated") is True for row in rows) for rows in self.points], bool)

    def mean(self, column: str) -> np.ndarray:
        """float64 [points]: means over the repeats."""
        return np.array([np.mean([row[column] for row in rows]) for rows in self.points])

    def range(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 [points] twice: the least and the greatest value of the repeats."""
        values = [[row[column] for row in rows] for rows in self.points]
        return np.array([min(v) for v in values]), np.array([max(v) for v in values])


def told_apart(frame: Any, load: str | None, first: Sequence[str] = ("scheduler",)) -> list[str]:
    """`first`, and the columns in which runs differ beside it: one curve for each combination of their values.

    Along a curve the load may change and what sets it: the first swept column of `LOADS`, or whatever changes with
    `load` if that is itself a setting. How much load arrives can be an outcome of everything else (closed loops), so
    runs of different loads are told apart too. Without `load` nothing may change.
    """
    keys = list(first)
    columns = [name for name in settings(frame) if name not in keys and name != load]
    given = [] if load is None else [load]
    sets_load = [name for name in columns if name in LOADS or name == "workload"]
    along = {name: given for name in (columns if load is None or is_axis(load) else sets_load)}
    swept = [name for name in sets_load if name in LOADS and frame[name].nunique(dropna=False) > 1]
    if load is not None and not is_axis(load):
        # Two ways of setting the load are no line: the second one is told apart.
        along |= {name: swept[:1] for name in swept[1:]}
    for column in sorted(columns, key=lambda name: name in sets_load):
        if not _constant(frame, [*keys, *along.get(column, [])], column):
            keys.append(column)
    return keys


def _constant(frame: Any, keys: Sequence[str], column: str) -> bool:
    """Whether rows that agree in `keys` agree in `column`.

    Rows of another kind of evidence may lack the value: published numbers come with few settings.
    """
    kinds = frame["evidence"].tolist() if "evidence" in frame.columns else [""] * len(frame)
    groups = zip(kinds, *(map(_text, frame[key].tolist()) for key in keys), strict=True)
    within: dict[Any, str] = {}
    across: dict[Any, str] = {}
    for group, value in zip(groups, map(_text, frame[column].tolist()), strict=True):
        if within.setdefault(group, value) != value:
            return False
        if value not in MISSING and across.setdefault(group[1:], value) != value:
            return False
    return True


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def curve_of(series: Series, load: str, what: str, by: Sequence[str]) -> Curve:
    """The curve of a series over the column `load`; undefined loads come last.

    Runs are repeats if they agree in every column that says what ran. Raises ConfigError if a repeat is there twice
    (runs of different code, say), or if the runs differ in something that neither `by` nor the load tells.
    """
    if untold := told_apart(series.rows, load, by)[len(by) :]:
        column = untold[0]
        values = list(dict.fromkeys(series.rows[column].tolist()))
        raise ConfigError(
            f"{what}: runs of {series.name!r} differ in {column!r} ({', '.join(map(repr, values[:4]))}); "
            f"choose with where={{{column!r}: {values[0]!r}}} or add {column!r} to by"
        )
    same = settings(series.rows)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in series.rows.to_dict("records"):
        groups.setdefault(tuple(repr(row[name]) for name in same), []).append(row)
    points = [point for rows in groups.values() for point in _points(rows, load, series.name, what)]
    loads = [float(np.mean([row[load] for row in point])) for point in points]
    order = sorted(range(len(points)), key=lambda i: (math.isnan(loads[i]), loads[i]))
    return Curve(series, np.array([loads[i] for i in order]), [points[i] for i in order])


def _points(rows: list[Row], load: str, name: str, what: str) -> list[list[Row]]:
    """Rows with equal settings: one point, or one per load if the same repeat is there at several loads."""
    repeats = [row.get("repeat") for row in rows]
    if None not in repeats and len(set(repeats)) == len(rows):
        return [rows]
    by_load: dict[str, list[Row]] = {}
    for row in rows:
        by_load.setdefault(f"{row[load]:.9g}", []).append(row)
    for same in by_load.values():
        ids = list(dict.fromkeys(str(row.get("run_id")) for row in same))
        counted = [row.get("repeat") for row in same]
        if None not in counted and len(set(counted)) < len(same):
            raise ConfigError(
                f"{what}: {name!r} has the same repeat twice (runs {', '.join(ids[:3])}): their code or "
                "settings that are not in the table differ; pass the runs of one (run_id, code)"
            )
    return list(by_load.values())
