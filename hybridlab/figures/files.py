"""Files that appear whole or not at all, and tables of a JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd


def file_path(path: Any, what: str) -> Path:
    """`path` as a Path. Raises ConfigError unless it is one, or text."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ConfigError(f"{what}: path: expected the path of a file, got {path!r:.60}")
    return Path(path)


def write_whole(files: Mapping[Path, bytes], what: str) -> None:
    """Write every file under a hidden name first, then rename all: a full disk leaves none of them.

    Makes missing folders. Raises ConfigError "<path>: `what` cannot be written (reason)".
    """
    parts: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path] = path.with_name(f".part-{os.getpid()}-{path.name}")
            with parts[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be written ({error.strerror or error})") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def read_lines(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """A table of one JSON object a line, with at least `columns`. Raises ConfigError if it is missing or damaged."""
    import pandas as pd

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        table = pd.DataFrame([json.loads(line) for line in lines if line.strip()])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if missing := [name for name in columns if name not in table.columns]:
        raise ConfigError(f"{path}: damaged (no column {missing[0]!r})")
    return table
