"""What the tests of the store read with and write with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab.store import read_run, results, write_run


def told(**keys: Any) -> tuple[list[str], pd.DataFrame]:
    """What `results` warns of, and its table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = results("question", **keys)
    assert all("\n" not in str(warning.message) and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught], table


def stored_as(path: Path, run_id: str, **changes: Any) -> None:
    """A copy of the run in `path` under another id, its manifest changed."""
    old = read_run(path)
    manifest = {**old.manifest, "run_id": run_id, **changes}
    write_run(path.parent / run_id, manifest, old.requests, old.spans)
