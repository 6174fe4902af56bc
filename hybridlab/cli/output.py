"""What commands print: results on stdout, notes on stderr."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]


def emit(value: Any, as_json: bool) -> None:
    """Print a result: any value as JSON, or text as it stands."""
    print(json.dumps(plain(value), indent=2, allow_nan=False) if as_json else value, flush=True)


def note(text: str) -> None:
    """Say something to a human."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def human_output() -> Iterator[None]:
    """What the library says while it works (memory plan, cached runs, warnings) is not the command's result."""

    def one_line(message: Warning | str, *_: Any, **__: Any) -> None:
        note(f"hybridlab: warning: {' '.join(str(message).split())}")

    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = one_line
        yield


def plain(value: Any) -> Any:
    """Reduce to what JSON has: sets become sorted lists, other objects text, and NaN (not JSON) null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
