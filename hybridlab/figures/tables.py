"""Which rows a figure draws: the table it needs, the rows that were asked for, and one series per value of `by`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridlab.columns import EVIDENCE, LABELS, OF_THE_RUN, is_axis
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_where, names_of
from hybridlab.figures.marks import evidence_mark
from hybridlab.sections import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.experiment import ExperimentResult

Where = Mapping[str, Any]
Kinds = str | Sequence[str]


@dataclass(frozen=True)
class Tables:
    """The tables that figures draw from, as `ExperimentResult` has them."""

    summary: pd.DataFrame
    requests: pd.DataFrame
    spans: pd.DataFrame


if TYPE_CHECKING:
    Data = pd.DataFrame | ExperimentResult | Tables
    """What figures take: a result, or rows of one of its tables."""


@dataclass(frozen=True)
class Series:
    """The rows of one value of `by` with one kind of evidence. `number` decides colour and marker."""

    number: int
    name: str
    kind: str
    rows: Any
    """A DataFrame; pandas types the selection of rows too loosely to say so."""


def rows_of(data: Any, table: str, columns: Sequence[str], what: str) -> pd.DataFrame:
    """`data`, or its `table` (of a result), if that has rows and the columns that `what` needs.

    Of a result, rows of requests and spans are joined with what `summary` says of their run. Raises
    ConfigError that says what to pass or names the first column that is missing.
    """
    frame = getattr(data, table, data)
    if not hasattr(frame, "columns"):
        raise ConfigError(f"{what}: pass a result or result.{table}, got {type(data).__name__}")
    if frame is not data and table != "summary" and "run_id" in frame.columns:
        frame = _joined(frame, data.summary)
    missing = [name for name in (*columns, "evidence") if not isinstance(name, str) or name not in frame.columns]
    if missing:
        raise ConfigError(f"{what}: no column {missing[0]!r}; pass a result or result.{table}")
    if not len(frame):
        raise ConfigError(f"{what}: no rows to draw")
    return frame


def _joined(frame: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    told = [name for name in summary.columns if name in OF_THE_RUN or is_axis(name)]
    new = [name for name in told if name not in frame.columns]
    runs: Any = summary[["run_id", *new]]
    return frame.merge(runs.drop_duplicates("run_id"), on="run_id", how="left")


def chosen(frame: Any, where: Where | None, evidence: Kinds | None, what: str) -> Any:
    """The rows of a DataFrame that match `where` and are of one kind of evidence, or of those `evidence` names.

    `where` maps columns to a value or a list of values. Raises ConfigError if nothing matches, for an unknown
    column or kind, and if there are several kinds but `evidence` does not ask for them.
    """
    for key, wanted in check_where(where, what).items():
        if key not in frame.columns:
            known = [name for name in frame.columns if is_axis(name) or name in OF_THE_RUN]
            raise ConfigError(f"{what}: where: no column {key!r}{did_you_mean(str(key), known)}")
        present = list(dict.fromkeys(frame[key].tolist()))
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        found = [value for value in present if any(_same(value, other) for other in values)]
        if not found:
            shown = ", ".join(f"{value!r}" for value in present[:8])
            raise ConfigError(f"{what}: where: no row with {key} = {wanted!r}; there are {shown}")
        frame = frame[frame[key].isin(found)]
    kinds = list(dict.fromkeys(frame["evidence"].tolist()))
    for kind in kinds:
        evidence_mark(kind)
    if evidence is None:
        if len(kinds) > 1:
            named = " and ".join(kinds)
            raise ConfigError(f"{what}: rows are {named}; comparing kinds must be asked for: evidence={kinds}")
        return frame
    asked = names_of(evidence, f"{what}: evidence", "kind")
    for kind in asked:
        evidence_mark(kind)
        if kind not in kinds:
            raise ConfigError(f"{what}: evidence: no row is {kind}; there are {', '.join(kinds)}")
    return frame[frame["evidence"].isin(asked)]


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float) and not isinstance(other, bool):
        return math.isclose(value, other, rel_tol=1e-9)
    return value == other or str(value) == str(other)


def series_of(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    what: str,
    *,
    needs: str,
    zeros: bool = False,
    where: Where | None = None,
    evidence: Kinds | None = None,
) -> list[Series]:
    """One series per value of the column(s) `by` and kind of evidence, in the order of the table.

    Numbers count over the whole table, so that `where` changes no colour. Rows without a positive value in
    `needs` (with `zeros`: without a value) are left out. Raises ConfigError as `chosen` does, and if no row is left.
    """
    keys = names_of(by, f"{what}: by", "column")
    for key in keys:
        if key not in frame.columns:
            raise ConfigError(f"{what}: by: no column {key!r}{did_you_mean(str(key), list(frame.columns))}")
    short = _short_names(keys)
    names = [
        ", ".join(_shown(short[key], value) for key, value in zip(keys, row, strict=True))
        for row in _cells(frame, keys)
    ]
    frame = frame.assign(_series=names)
    kept = chosen(frame, where, evidence, what)
    kept = kept[kept[needs] >= 0] if zeros else kept[kept[needs] > 0]
    if not len(kept):
        raise ConfigError(f"{what}: no rows to draw; none has {needs}")
    parts = {key: rows for key, rows in kept.groupby(["_series", "evidence"], sort=False)}
    found = []
    for number, name in enumerate(dict.fromkeys(names)):
        kinds = [kind for kind in EVIDENCE if (name, kind) in parts]
        found += [Series(number, name, kind, parts[name, kind]) for kind in kinds]
    return found


def _cells(frame: pd.DataFrame, keys: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(zip(*(frame[key].tolist() for key in keys), strict=True))


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """What stands before a value: nothing for a label, which speaks for itself, else the last part of a swept key.

    The whole key if two of them end alike.
    """
    end = {key: key.rpartition(".")[2] for key in keys}
    ends = Counter(end.values())
    spoken = (*LABELS, "machine")
    return {key: "" if key in spoken else key if ends[end[key]] > 1 else end[key] for key in keys}


def _shown(name: str, value: Any) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = "none" if missing else f"{value:g}" if isinstance(value, float) else str(value)
    if name.rpartition(".")[2] == "path":
        text = text.rpartition("/")[2]  # folders would fill the legend
    return f"{name}={text}" if name else text


def settings(frame: pd.DataFrame) -> list[str]:
    """The columns in which runs may differ that are not repeats of each other."""
    swept = any(name.startswith("workload.") for name in frame.columns)
    told = [name for name in frame.columns if is_axis(name) and not (swept and name == "workload")]
    return told + [name for name in ("machine",) if name in frame.columns]


def require_one_setting(series: Sequence[Series], by: str | Sequence[str], what: str) -> None:
    """Raise ConfigError if a series pools requests of runs that differ in more than their repeat."""
    keys = names_of(by, f"{what}: by", "column")
    for one in series:
        for column in settings(one.rows):
            values = list(dict.fromkeys(map(repr, one.rows[column].tolist())))
            if len(values) > 1 and column not in keys:
                raise ConfigError(
                    f"{what}: requests of {one.name!r} come from runs that differ in {column!r} "
                    f"({', '.join(values[:4])}); choose with where={{{column!r}: {values[0]}}} or by={column!r}"
                )
