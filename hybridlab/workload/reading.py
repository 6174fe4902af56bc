"""Reading traces line by line: text or gzip, CSV and JSON, numbers; every mistake is one line that says where."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybridlab.errors import ConfigError
from hybridlab.workload.base import MAX_TOKENS

MAX_LINE_BYTES = 4 * 2**20
GZIP_MAGIC = b"\x1f\x8b"


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, plain or gzip, read as they are asked for."""
    number = 0
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"workload.path: {path}: cannot be read (not a file)")
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            lines = gzip.GzipFile(fileobj=raw) if packed else raw
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}: line {number}: longer than {MAX_LINE_BYTES:,} bytes")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: line {number}: not UTF-8 text ({error.reason})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: line {number + 1}: damaged gzip file ({error})") from None
    except OSError as error:
        raise ConfigError(f"workload.path: {path}: cannot be read ({error.strerror or error})") from None


def csv_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path: line n", record) of a CSV file with a header; `columns` must be there, others may be."""
    reader = csv.DictReader(text_lines(path), restval="")
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path}: no column {missing[0]!r}; expected {', '.join(columns)}")
        for record in reader:
            yield f"{path}: line {reader.line_num}", record
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num + 1}: not CSV ({error})") from None


def json_object(text: str | bytes, where: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object that `text` is; `keys` must be there, others may be. NaN and infinity are refused."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {shown(value)}")
    for key in keys:
        if key not in value:
            raise ConfigError(f"{where}: no key {key!r}; expected {', '.join(keys)}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def number(value: Any, where: str) -> float:
    """A finite number >= 0, given as text or as a number. `where` names the column or key as well."""
    try:
        result = math.nan if isinstance(value, bool | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result) or result < 0:
        raise ConfigError(f"{where} {shown(value)}: expected a number >= 0")
    return result


def token_count(value: Any, where: str, least: int = 1) -> int:
    """A whole number of tokens, `least` to MAX_TOKENS, given as text or as a number."""
    text = value.strip() if isinstance(value, str) else str(value) if type(value) is int else ""
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 100 else -1
    if count > MAX_TOKENS:
        raise ConfigError(f"{where} {shown(value)}: expected at most {MAX_TOKENS:,} tokens")
    if count < least:
        raise ConfigError(f"{where} {shown(value)}: expected a {'positive ' if least else ''}whole number")
    return count


def shown(value: Any) -> str:
    """`value` as a short text for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def file_hash(path: Path) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise ConfigError(f"workload.path: {path}: cannot be read ({error.strerror or error})") from None
