"""Strict JSON objects: every mistake becomes one CheckpointError that names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlab.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20
"""An index of 100,000 tensors takes about 10 MB; anything near this bound is not a configuration."""

MAX_INT = 2**31 - 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice")
            seen.add(key)
    return out


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, NaN, infinities and anything but an object are refused."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'file not found'}")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, too large for a JSON file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read ({_reason(e)})") from None
    if not text.strip():
        raise CheckpointError(f"{path}: empty, expected a JSON object")
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{path}: invalid JSON (nested too deeply)") from None
    except ValueError as e:
        raise CheckpointError(f"{path}: invalid JSON ({_reason(e)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


def shown(value: Any) -> str:
    """A value as one short line for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Fields:
    """Typed access to a JSON object. A null value counts as a missing key, as transformers writes it."""

    where: str
    data: Mapping[str, Any]
    prefix: str = ""

    def error(self, key: str, expected: str) -> CheckpointError:
        value = self.data.get(key)
        found = "is missing" if key not in self.data else f"is {shown(value)}"
        return CheckpointError(f"{self.where}: key '{self.prefix}{key}' {found}, expected {expected}")

    def first(self, *keys: str) -> str:
        """The first of several names of one setting that is present, else the first name."""
        return next((k for k in keys if self.data.get(k) is not None), keys[0])

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT) -> int:
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        # The bound turns away infinities, NaN and integers that no float can hold.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a number")
        if abs(value) < 1e30 and (value > 0 or not positive):
            return float(value)
        raise self.error(key, "a positive number" if positive else "a finite number")

    def boolean(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.error(key, "a list of strings")
        return tuple(value)

    def integers(self, key: str, *, low: int = 0, high: int = MAX_INT) -> tuple[int, ...]:
        """A list of integers, or one integer standing alone; () when missing."""
        value = self.data.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and low <= v <= high for v in items):
            raise self.error(key, f"a list of integers from {low} to {high}")
        return tuple(items)

    def object(self, key: str) -> Fields | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(self.where, value, f"{self.prefix}{key}.")
