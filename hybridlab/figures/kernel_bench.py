"""The files of `hybridlab bench kernels --out`: tables, where they come from, and the figures drawn from them.

| file | what is in it |
|---|---|
| kernels.csv | one row per point |
| targets.csv | one row per target |
| meta.json | machine, code, versions, day, command, notes |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from hybridlab.bench.targets import targets_table
from hybridlab.config import PAPER, project_dir
from hybridlab.errors import ConfigError
from hybridlab.figures.files import file_path, write_whole
from hybridlab.figures.roofline import COLUMNS, roofline, weights_rate
from hybridlab.figures.save import save_figure

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.bench.kernels import KernelBench

FORMAT = "hybridlab-kernels/1"
FIGURES: dict[str, Callable[..., Any]] = {"roofline": roofline, "weights_rate": weights_rate}


def save_kernel_bench(bench: KernelBench, folder: str | Path, command: str) -> list[Path]:
    """Write tables, meta.json and figures (PNG, SVG, PDF) into `folder`; returns the files.

    Raises ConfigError for a file that cannot be written, or a table without a point that figures draw.
    """
    folder = file_path(folder, "save_kernel_bench")
    meta = {"format": FORMAT, "command": command, **bench.meta()}
    files = {
        folder / "kernels.csv": _csv(bench.table),
        folder / "targets.csv": _csv(bench.targets),
        folder / "meta.json": (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode(),
    }
    write_whole(files, "table")
    return [*files, *rebuild_kernel_bench(folder)]


def check_folder(folder: str | Path) -> None:
    """Make `folder` and a file in it, and remove again what was not there: minutes of measuring are to come.

    Raises ConfigError if that fails.
    """
    folder = file_path(folder, "save_kernel_bench")
    missing: list[Path] = []
    try:
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{folder}: expected a folder that can be written to ({reason})") from None
    finally:
        for one in missing:
            with suppress(OSError):
                one.rmdir()


def is_kernel_bench(folder: Path) -> bool:
    """Whether `folder`/meta.json says that `save_kernel_bench` wrote it."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and meta.get("format") == FORMAT


def rebuild_kernel_bench(folder: Path) -> list[Path]:
    """Draw the figures of a folder again from its tables, and targets.csv with them."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        command, version = meta["command"], meta["versions"]["hybridlab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    table = read_kernel_bench(folder)
    write_whole({folder / "targets.csv": _csv(targets_table(table))}, "table")
    return [path for name in FIGURES for path in _draw(name, table, folder, command, version)]


def read_kernel_bench(folder: str | Path | None = None) -> pd.DataFrame:
    """The table of `folder`/kernels.csv, by default of the project's results/paper/kernels.

    Raises ConfigError if it is missing or damaged.
    """
    import pandas as pd

    if folder is None:
        folder = project_dir() / "results" / PAPER / "kernels"
    path = file_path(folder, "read_kernel_bench") / "kernels.csv"
    try:
        table = pd.read_csv(path, dtype={"code": str, "tier": str})
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if missing := [name for name in (*COLUMNS, "evidence", "machine") if name not in table.columns]:
        raise ConfigError(f"{path}: damaged (no column {missing[0]!r})")
    return table


def _draw(name: str, table: pd.DataFrame, folder: Path, command: str, version: str) -> list[Path]:
    import matplotlib.pyplot as plt

    ax = FIGURES[name](table)
    try:
        return list(save_figure(ax, folder / name, command=command, version=version).values())
    finally:
        plt.close(ax.figure)


def _csv(table: pd.DataFrame) -> bytes:
    # Six digits: more than the noise leaves.
    return table.to_csv(index=False, lineterminator="\n", float_format="%.6g").encode()
