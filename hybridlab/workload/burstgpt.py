"""BurstGPT (HPMLL/BurstGPT): CSV, a row per request to ChatGPT or GPT-4 on a university's Azure service.

Wang et al., "BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems", arXiv:2401.17644.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from hybridlab.workload.base import Row
from hybridlab.workload.reading import csv_records, number, token_count
from hybridlab.workload.trace import RowTrace

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


class BurstGPTWorkload(RowTrace):
    """Columns Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type.

    Files of release 2 also have Session ID and Elapsed time, in between. Columns are found by name; Model and Log
    Type are needed only if `model` ("ChatGPT", "GPT-4") or `log_type` ("Conversation log", "API log") choose rows.

    Requests that failed have no response tokens: such rows, and rows without request tokens, are left out.
    `start` and `num_requests` count the rows that remain.
    """

    kind: Literal["burstgpt"]
    model: str | None = None
    log_type: str | None = None
    time_key: ClassVar[str] = "Timestamp"

    def records(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        wanted = {"Model": self.model, "Log Type": self.log_type}
        wanted = {column: value for column, value in wanted.items() if value is not None}
        for where, record in csv_records(path, [*COLUMNS, *wanted]):
            if any(record[column].strip() != value for column, value in wanted.items()):
                continue
            if all(token_count(record[name], f"{where}: {name}", least=0) for name in COLUMNS[1:]):
                yield where, record

    def parse(self, record: dict[str, Any], where: str) -> Row:
        prompt, output = (token_count(record[name], f"{where}: {name}") for name in COLUMNS[1:])
        return Row(number(record["Timestamp"], f"{where}: Timestamp"), prompt, output)

    def _filters(self) -> str:
        given = {"Model": self.model, "Log Type": self.log_type}
        texts = [f"{column} {value!r}" for column, value in given.items() if value is not None]
        return " that were answered" + "".join(f", {text}" for text in texts)
