"""What recorded traces share: which rows are taken, and how their times are scaled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from hybridlab.errors import ConfigError
from hybridlab.sections import PathText
from hybridlab.workload.base import CountedWorkload, Row
from hybridlab.workload.reading import file_hash


class TraceWorkload(CountedWorkload):
    """Requests from the file `path`; the first one arrives at time 0.

    Times between arrivals are divided by `rate_scale` (10 replays the trace ten times faster) or, with
    `rate_req_s`, by what makes the mean offered load of the n chosen requests that many per second:
    (n - 1) / (last arrival - first arrival) == rate_req_s.
    """

    path: PathText
    rate_scale: float = Field(default=1.0, gt=0)
    rate_req_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_rate(self) -> TraceWorkload:
        if self.rate_req_s is not None and self.rate_scale != 1.0:
            raise ValueError("expected either 'rate_scale' or 'rate_req_s', got both")
        return self

    def timed(self, rows: list[Row]) -> list[Row]:
        """`rows` with arrivals that count from the first one, scaled to the load that was asked for."""
        first_s = rows[0].arrival_s
        faster = self.rate_scale
        if self.rate_req_s is not None and len(rows) > 1:
            span_s = rows[-1].arrival_s - first_s
            if span_s <= 0:
                raise ConfigError(
                    f"workload.rate_req_s: all {len(rows)} requests of {self.path} arrive at the same time; expected"
                    " times that can be scaled"
                )
            faster = self.rate_req_s * span_s / (len(rows) - 1)
        return [row._replace(arrival_s=(row.arrival_s - first_s) / faster) for row in rows]

    def content_hash(self, base: Path) -> str | None:
        return file_hash(base / self.path)


class RowTrace(TraceWorkload):
    """A trace with a row per request: rows `start` to `start + num_requests` are taken.

    Only as much of the file is read as is needed. Plain text and gzip are told apart by their first bytes.
    A format says how a file falls into records and how a record becomes a row.
    """

    start: int = Field(default=0, ge=0)
    time_key: ClassVar[str]
    """What the format calls the arrival."""

    @abstractmethod
    def records(self, path: Path) -> Iterator[tuple[str, Any]]:
        """The records that count as rows, each after "path: line n" for messages."""

    @abstractmethod
    def parse(self, record: Any, where: str) -> Row:
        """The row of a record, its arrival in seconds from any origin. Raises ConfigError that begins with `where`."""

    def chosen(self, base: Path) -> list[Row]:
        """The chosen rows in the order of the file, which must be that of their arrival."""
        path = base / self.path
        last = self.start + self.num_requests
        rows: list[Row] = []
        for where, record in islice(self.records(path), self.start, last):
            row = self.parse(record, where)
            if rows and row.arrival_s < rows[-1].arrival_s:
                raise ConfigError(f"{where}: {self.time_key} goes back; expected arrival order")
            rows.append(row)
        if len(rows) < self.num_requests:
            asked = f"workload.start + num_requests asks for {last}"
            if rows:
                raise ConfigError(f"{path}: {self.start + len(rows)} rows{self._filters()}; {asked}")
            raise ConfigError(f"{path}: no row {self.start}{self._filters()}; {asked} rows")
        return rows

    def rows(self, base: Path) -> list[Row]:
        return self.timed(self.chosen(base))

    def _filters(self) -> str:
        """Which of the file's rows count, for messages: " with ..."."""
        return ""
