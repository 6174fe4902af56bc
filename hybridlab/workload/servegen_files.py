"""The files of ServeGen clients: windows of arrivals, and distributions of lengths."""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridlab.errors import ConfigError
from hybridlab.workload.base import MAX_TOKENS
from hybridlab.workload.reading import json_object, number, shown

TRACE, DATASET = "-trace.csv", "-dataset.json"
FAMILIES = ("Gamma", "Weibull")
FIELDS = ("input_tokens", "output_tokens")
MAX_DICT_CHARACTERS = 2**21
_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{0,30})?(?:[eE][+-]?[0-9]{1,3})?"
_PAIR = rf"\s*+{_NUMBER}\s*+:\s*+{_NUMBER}\s*+"
_DICT = re.compile(rf"\s*+\{{(?:{_PAIR}(?:,{_PAIR})*+,?)?\s*+\}}\s*+")


class Window(NamedTuple):
    """A stretch of time in which one client sends `rate_req_s` requests per second."""

    start_s: float
    client: str
    """The name of its files without their endings."""
    end_s: float
    rate_req_s: float
    family: str
    shape: float


Distribution = tuple[np.ndarray, np.ndarray]
"""Lengths in tokens, ascending (int64 [n]), and the cumulated probability of each (float64 [n], ends at 1)."""


def read_windows(path: Path, members: Mapping[str, bytes]) -> list[Window]:
    """The windows of all clients in which something happens, by their start."""
    if not members:
        raise ConfigError(f"{path}: no *{TRACE}; expected ServeGen clients (chunk-0{TRACE}, chunk-0{DATASET}, ...)")
    folders = sorted({name.rpartition("/")[0] for name in members})
    if len(folders) > 1:
        raise ConfigError(f"{path}: clients in {folders[0]!r} and in {folders[1]!r}; expected one folder")
    windows = [window for name, content in members.items() for window in _windows(path, name, content)]
    return sorted(windows)


def read_lengths(
    path: Path, members: Mapping[str, bytes], windows: Iterable[Window]
) -> dict[Window, tuple[Distribution, Distribution]]:
    """The distributions of prompt and output tokens that hold in each window: the last ones before its end.

    They are those with the greatest time that is not after the window's start; times without any lengths do not count.
    """
    tables: dict[str, dict[int, Any]] = {}
    result = {}
    for window in windows:
        name = window.client + DATASET
        if name not in members:
            raise ConfigError(f"{path}: no {name} beside {window.client}{TRACE}")
        if name not in tables:
            tables[name] = _by_time(json_object(members[name], f"{path}: {name}"), f"{path}: {name}")
        earlier = (time for time in sorted(tables[name], reverse=True) if time <= window.start_s)
        pairs = (_pair(tables[name][time], f"{path}: {name}: {time}") for time in earlier)
        found = next((pair for pair in pairs if pair is not None), None)
        if found is None:
            raise ConfigError(f"{path}: {name}: no lengths for the window at {window.start_s:g} s or before it")
        result[window] = found
    return result


def _windows(path: Path, name: str, content: bytes) -> list[Window]:
    client = name.removesuffix(TRACE)
    try:
        lines = [line for line in csv.reader(content.decode("utf-8-sig").splitlines()) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: {name}: not a CSV text file ({error})") from None
    parsed = [_window_line(line, f"{path}: {name}: line {index}") for index, line in enumerate(lines, start=1)]
    times = [line[0] for line in parsed]
    for index, (one, two) in enumerate(pairwise(times), start=2):
        if two <= one:
            raise ConfigError(f"{path}: {name}: line {index}: time {two:g} does not follow {one:g}")
    if len(times) < 2:
        raise ConfigError(f"{path}: {name}: {len(times)} windows; expected at least two, which say how long one is")
    # The last window is as long as the one before it.
    ends = [*times[1:], 2 * times[-1] - times[-2]]
    return [
        Window(start, client, end, rate, family, shape)
        for (start, rate, family, shape), end in zip(parsed, ends, strict=True)
        if rate > 0
    ]


def _window_line(line: list[str], where: str) -> tuple[float, float, str, float]:
    """Start (s), rate (requests/s), family and shape."""
    if len(line) != 6:
        raise ConfigError(f"{where}: {len(line)} columns; expected time, rate, cv, family and two parameters")
    names = ("time", "rate", "cv", "", "first parameter", "second parameter")
    time, rate, _, _, shape, _ = (
        number(text, f"{where}: {name}") if name else 0.0 for name, text in zip(names, line, strict=True)
    )
    family = line[3].strip()
    if rate > 0 and family not in FAMILIES:
        raise ConfigError(f"{where}: family {shown(family)}: expected {' or '.join(FAMILIES)}")
    if rate > 0 and not 1e-6 <= shape <= 1e6:
        raise ConfigError(f"{where}: first parameter {shape:g}: expected a shape from 1e-6 to 1e6")
    return time, rate, family, shape


def _by_time(table: dict[str, Any], where: str) -> dict[int, Any]:
    for time, fields in table.items():
        if not (time.isascii() and time.isdigit() and len(time) < 16):
            raise ConfigError(f"{where}: key {shown(time)}: expected the start of a window in seconds")
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: {time}: expected an object, got {shown(fields)}")
    return {int(time): fields for time, fields in table.items()}


def _pair(fields: Mapping[str, Any], where: str) -> tuple[Distribution, Distribution] | None:
    """The distributions of prompt and output tokens; None if one of them is empty, which says that none is known."""
    for field in FIELDS:
        if not isinstance(fields.get(field), str):
            raise ConfigError(f"{where}: {field} {shown(fields.get(field))}: expected the text of a dict")
    prompt, output = (_distribution(fields[field], f"{where}: {field}") for field in FIELDS)
    return (prompt, output) if prompt and output else None


@lru_cache(maxsize=256)
def _distribution(text: str, where: str) -> Distribution | None:
    # Nothing else reaches the parser: no nesting, no long sums.
    if len(text) > MAX_DICT_CHARACTERS or not _DICT.fullmatch(text):
        raise ConfigError(f"{where}: {shown(text)}: expected the text of a dict of numbers")
    table = ast.literal_eval(text.strip())
    if not table:
        return None
    for tokens in table:
        if type(tokens) is not int or tokens > MAX_TOKENS:
            raise ConfigError(f"{where}: {shown(tokens)}: expected a whole number of at most {MAX_TOKENS:,} tokens")
    lengths = np.array(sorted(table), dtype=np.int64)
    probabilities = np.array([table[tokens] for tokens in lengths.tolist()], dtype=np.float64)
    total = probabilities.sum()
    if not abs(total - 1) <= 1e-3:
        raise ConfigError(f"{where}: probabilities sum to {total:g}; expected 1")
    return lengths, np.cumsum(probabilities / total)
