"""Stored results as a panel sees them: what can be filtered, what can be drawn, and the rows of a choice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab.columns import EVIDENCE, is_axis
from hybridlab.errors import ConfigError
from hybridlab.figures.tables import settings
from hybridlab.metrics import SLO
from hybridlab.store import default_results_dir, read_run, results
from hybridlab.widgets.summary_rows import apart, at_slo, label, older_code, without_repeats

if TYPE_CHECKING:
    import pandas as pd

PROVENANCE = ("evidence", "machine", "code")
MAX_LINES = 12


@dataclass(frozen=True)
class Choice:
    """All that the controls of a panel say. `slo` None: as stored with each run. `kept`: column -> labels shown."""

    figure: str
    by: str
    x: str
    y: str
    metric: str
    percentile: str
    slo: SLO | None = None
    band: bool = True
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """What a choice draws. `summary` and `requests` are whole; `where` and `evidence` say which rows are shown.

    So colours stay as they are when rows are filtered. `by`: the columns whose values are lines.
    """

    summary: pd.DataFrame
    requests: pd.DataFrame | None
    where: Mapping[str, list[Any]]
    evidence: list[str]
    by: list[str]
    run_ids: list[str]
    remarks: list[str]


@dataclass(frozen=True)
class ResultsTable:
    """One row per run, and where at hand one row per request; both are copies that nobody else changes."""

    name: str
    summary: pd.DataFrame
    requests: pd.DataFrame | None = None
    from_store: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def axes(self) -> list[str]:
        """Columns that say what ran and differ between runs; `scheduler` always."""
        told = [c for c in settings(self.summary) if is_axis(c)]
        return [c for c in told if c == "scheduler" or len(self.values(c)) > 1]

    @property
    def filters(self) -> list[str]:
        """The axes, and what else sets runs apart."""
        apart = [c for c in PROVENANCE if c in self.summary.columns and len(self.values(c)) > 1]
        return [*self.axes, *apart]

    @property
    def lines(self) -> list[str]:
        """Columns that lines may stand for: those with few values."""
        few = [c for c in self.filters if len(self.values(c)) <= MAX_LINES and c != "evidence"]
        return few or self.axes or [str(self.summary.columns[0])]

    @property
    def metrics(self) -> list[str]:
        """Numeric columns, axes last."""
        from pandas.api.types import is_bool_dtype, is_numeric_dtype

        frame = self.summary
        numeric = [c for c in frame.columns if is_numeric_dtype(frame[c]) and not is_bool_dtype(frame[c])]
        return sorted((c for c in numeric if c != "repeat"), key=lambda c: "." in c)

    def values(self, column: str) -> dict[str, Any]:
        """The distinct values of `column` by their labels: numbers by size, else as they come; "none" last."""
        found = {label(value): value for value in self.summary[column].tolist()}
        numbers = all(isinstance(value, int | float) for name, value in found.items() if name != "none")
        if numbers:
            found = dict(sorted(found.items(), key=lambda item: (item[0] == "none", item[0] != "none" and item[1])))
        return found

    def rows(self, choice: Choice, per_request: bool) -> Rows:
        """The rows of `choice`, at its SLO, for a figure of runs or of requests.

        Of runs that differ in nothing but their code the newest count. Raises ConfigError that says which filter
        leaves nothing, or if there are too many lines to read.
        """
        shown = np.ones(len(self.summary), dtype=bool)
        where: dict[str, list[Any]] = {}
        for column, kept in choice.kept.items():
            if not kept:
                raise ConfigError(f"no run selected: choose at least one value of {column}")
            values = self.values(column)
            if column != "evidence":
                where[column] = [values[name] for name in kept]
            shown &= np.array([label(value) in kept for value in self.summary[column].tolist()], dtype=bool)
        if not shown.any():
            raise ConfigError("no run selected: no stored run has this combination of values")
        old = np.zeros(len(shown), dtype=bool)
        old[np.flatnonzero(shown)[older_code(self.summary.loc[shown])]] = True
        summary, requests, remarks = self.summary.loc[~old], self.requests, self._remarks(shown & ~old)
        if old.any():
            if requests is not None:
                requests = requests.loc[requests["run_id"].isin(summary["run_id"])]
            remarks.append(f"{old.sum()} older runs of the same points, by other code, are left out")
        part: Any = self.summary.loc[shown & ~old]
        by = apart(part, choice.by, per_request)
        lines = part[by].map(label).drop_duplicates()
        if len(lines) > MAX_LINES:
            raise ConfigError(f"{len(lines)} lines ({' x '.join(by)}) are too many to read: select fewer runs below")
        if choice.slo is not None:
            summary, more = at_slo(summary, requests, choice.slo)
            remarks += more
        if not choice.band and not per_request:
            summary = without_repeats(summary)
        ids = part["run_id"].tolist() if "run_id" in part.columns else []
        evidence = list(dict.fromkeys(part["evidence"])) if "evidence" in part.columns else []
        return Rows(summary, requests, where, evidence, by, ids, remarks)

    def untold(self, choice: Choice) -> list[str]:
        """The columns, besides `by`, in which requests of one line would differ."""
        return apart(self.summary, choice.by, per_request=True)[1:]

    def _remarks(self, shown: np.ndarray) -> list[str]:
        part: Any = self.summary.loc[shown]
        mixed = [c for c in PROVENANCE if c in part.columns and part[c].nunique() > 1]
        return [*self.remarks, *(f"runs of different {c} are shown together" for c in mixed)]


def open_results(source: Any, results_dir: str | Path | None = None) -> ResultsTable:
    """A table from the name of a question, a result, or rows of its summary; copies, so `source` stays as it is.

    Requests are at hand for a name (read from the store) and for a result. Raises ConfigError for anything else,
    for a name without results and for a table without rows.
    """
    import pandas as pd

    name, requests, remarks = "", None, ()
    if isinstance(source, str):
        name = source
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            summary = results(source, results_dir, evidence=EVIDENCE)
        remarks = tuple(str(w.message) for w in caught if "skipped" in str(w.message) or "left out" in str(w.message))
        root = Path(results_dir) if results_dir is not None else default_results_dir()
        ids = summary["run_id"].tolist() if len(summary) else []
        parts = [read_run(root / source / run_id).requests.assign(run_id=run_id) for run_id in ids]
        requests = pd.concat(parts, ignore_index=True) if parts else None
    else:
        summary = source if isinstance(source, pd.DataFrame) else getattr(source, "summary", None)
        if not isinstance(summary, pd.DataFrame):
            got = type(source).__name__
            raise ConfigError(f"explore: expected the name of an experiment, a result or its summary, got {got}")
        if summary is not source:
            requests = getattr(source, "requests", None)
            name = getattr(getattr(source, "config", None), "experiment", "")
    if not len(summary):
        raise ConfigError(f"explore: no runs to show{f' of {name}' if name else ''}")
    copied = None if requests is None else requests.copy()
    return ResultsTable(name, summary.reset_index(drop=True), copied, isinstance(source, str), remarks)
