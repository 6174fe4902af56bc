"""Microsoft Azure's traces of LLM inference (Azure/AzurePublicDataset): CSV, a row per request."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from hybridlab.errors import ConfigError
from hybridlab.workload.base import Row
from hybridlab.workload.reading import csv_records, shown, token_count
from hybridlab.workload.trace import RowTrace

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
ORIGIN = datetime(2023, 1, 1)


class AzureWorkload(RowTrace):
    """Columns TIMESTAMP (YYYY-MM-DD HH:MM:SS with decimals, UTC), ContextTokens and GeneratedTokens."""

    kind: Literal["azure"]
    time_key: ClassVar[str] = "TIMESTAMP"

    def records(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        return csv_records(path, COLUMNS)

    def parse(self, record: dict[str, Any], where: str) -> Row:
        try:
            # The traces have seven decimals of a second; datetime takes six. Those of 2024 add "+00:00".
            time = datetime.fromisoformat(record["TIMESTAMP"].removesuffix("+00:00")[:26])
            arrival_s = (time - ORIGIN).total_seconds()
        except (ValueError, TypeError):  # TypeError: of another time zone
            text = shown(record["TIMESTAMP"])
            raise ConfigError(f"{where}: TIMESTAMP {text}: expected YYYY-MM-DD HH:MM:SS") from None
        prompt, output = (token_count(record[name], f"{where}: {name}") for name in COLUMNS[1:])
        return Row(arrival_s, prompt, output)
