"""Runs of a summary as points of a curve: repeats of one setting are one point with a range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridlab.errors import ConfigError
from hybridlab.figures.tables import Series, settings

Row = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """The points of one series in order of load; each point holds the rows of its repeats."""

    series: Series
    load: np.ndarray
    points: Sequence[Sequence[Row]]

    @property
    def repeated(self) -> bool:
        return any(len(rows) > 1 for rows in self.points)

    def mean(self, column: str) -> np.ndarray:
        """float64 [points]: means over the repeats."""
        return np.array([np.mean([row[column] for row in rows]) for rows in self.points])

    def range(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 [points] twice: the least and the greatest value of the repeats."""
        values = [[row[column] for row in rows] for rows in self.points]
        return np.array([min(v) for v in values]), np.array([max(v) for v in values])


def told_apart(frame: Any, load: str) -> list[str]:
    """The scheduler, and the columns in which runs at the same `load` differ beside it: one curve for each."""
    keys = ["scheduler"]
    loads = [f"{value:.9g}" if isinstance(value, float) else str(value) for value in frame[load].tolist()]
    for column in settings(frame):
        if column not in keys and column != load and not _constant(frame, keys, loads, column):
            keys.append(column)
    return keys


def _constant(frame: Any, keys: list[str], loads: list[str], column: str) -> bool:
    """Whether rows that agree in `keys` and load agree in `column`."""
    first: dict[Any, str] = {}
    values = map(repr, frame[column].tolist())
    groups = zip(loads, *(map(repr, frame[key].tolist()) for key in keys), strict=True)
    return all(first.setdefault(group, value) == value for group, value in zip(groups, values, strict=True))


def curve_of(series: Series, load: str, what: str) -> Curve:
    """The curve of a series over the column `load`; undefined loads come last.

    Runs are repeats if they agree in every column that says what ran. Raises ConfigError if a repeat is there
    twice (runs of different code, say), or if points at the same load differ in something that is not drawn.
    """
    same = settings(series.rows)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in series.rows.to_dict("records"):
        groups.setdefault(tuple(repr(row[name]) for name in same), []).append(row)
    points = [point for rows in groups.values() for point in _points(rows, load, series.name, what)]
    loads = [float(np.mean([row[load] for row in point])) for point in points]
    order = sorted(range(len(points)), key=lambda i: (math.isnan(loads[i]), loads[i]))
    for before, after in itertools.pairwise(order):
        if math.isclose(loads[before], loads[after], rel_tol=1e-9):
            _refuse(points[before][0], points[after][0], same, series.name, what)
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


def _refuse(one: Row, other: Row, same: Sequence[str], name: str, what: str) -> None:
    column = next((c for c in same if repr(one[c]) != repr(other[c])), None)
    if column is not None:
        raise ConfigError(
            f"{what}: runs of {name!r} at the same load differ in {column!r}; "
            f"choose with where={{{column!r}: {one[column]!r}}} or add {column!r} to by"
        )
