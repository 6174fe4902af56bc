"""Tables of results as files: CSV and Parquet with every column, LaTeX as it is printed."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.columns import ACRONYMS, UNITS
from hybridlab.config import ExperimentConfig
from hybridlab.errors import ConfigError
from hybridlab.store import results
from hybridlab.summary_table import TABLE_METRICS, any_saturated, axes_of, without_bounds

if TYPE_CHECKING:
    import pandas as pd

MOST_LATEX_COLUMNS = 12
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "µ": r"$\mu$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_WORDS = {**ACRONYMS, "p90": "P90", "p99": "P99", "slo": "SLO"}


def export_results(
    source: str | Path | ExperimentConfig | pd.DataFrame,
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    caption: str | None = None,
    results_dir: str | Path | None = None,
) -> Path:
    """Write a table to `path`: .csv, .parquet or .tex by its suffix; it appears whole or not at all.

    `source` is a table (one row per run) or the name or config of an experiment, whose `hl.results` is taken. CSV and
    Parquet hold every column as it is; `columns` takes some. LaTeX (booktabs) holds what differs between runs and the
    metrics that one looks at first, unless `columns` says otherwise; measured numbers have three significant digits,
    settings are exact, and the caption names evidence and machine. Raises ConfigError for another suffix, unknown or
    too many columns, an empty table, or a file that cannot be written.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"path: expected the file to write, got {path!r:.60}")
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ConfigError(f"{path}: unknown kind of file {path.suffix!r}; expected {', '.join(_WRITERS)}")
    if isinstance(columns, str):
        raise ConfigError(f"columns: expected a list of names, got {columns!r}; write [{columns!r}]")
    table = results(source, results_dir) if isinstance(source, str | Path | ExperimentConfig) else source
    if not hasattr(table, "columns"):
        got = type(table).__name__
        raise ConfigError(f"{path}: expected a table (result.summary) or the name of an experiment, got {got}")
    if not len(table):
        raise ConfigError(f"{path}: the table has no rows, nothing to write")
    unknown = [name for name in columns or () if name not in table.columns]
    if unknown:
        raise ConfigError(f"{path}: the table has no column {unknown[0]!r}")
    _write(path, _WRITERS[path.suffix](table, columns, caption))
    return path


def latex(table: pd.DataFrame, columns: Sequence[str] | None = None, caption: str | None = None) -> str:
    r"""A LaTeX table for `\usepackage{booktabs}`, the ids of its runs in comments."""
    table = without_bounds(table)
    shown = list(columns) if columns else _printed_columns(table)
    if len(shown) > MOST_LATEX_COLUMNS:
        raise ConfigError(f"a LaTeX table of {len(shown)} columns; expected at most {MOST_LATEX_COLUMNS}, see columns=")
    numeric = [all(_is_number(value) for value in table[name].tolist()) for name in shown]
    exact = ["." in name for name in shown]  # a config key: a setting, never rounded
    rows = [
        " & ".join(_cell(value, as_it_is) for value, as_it_is in zip(row, exact, strict=True)) + r" \\"
        for row in table[shown].itertuples(index=False, name=None)
    ]
    told = [f"% runs: {', '.join(map(str, table['run_id'].tolist()))}"] if "run_id" in table.columns else []
    return "\n".join(
        [
            *told,
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{_escaped(caption if caption is not None else _caption(table))}}}",
            f"  \\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numeric)}}}",
            r"    \toprule",
            "    " + " & ".join(map(_escaped, _headings(shown))) + r" \\",
            r"    \midrule",
            *("    " + row for row in rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def heading(column: str) -> str:
    """A column's name as one reads it: "p99_ttft_s" -> "P99 TTFT (s)", "workload.rate_scale" -> "rate scale"."""
    name = column.split(".")[-1]
    end, unit = next(((end, unit) for end, unit in UNITS.items() if name.endswith(end)), ("", ""))
    text = " ".join(_WORDS.get(word, word) for word in name.removesuffix(end).split("_"))
    return f"{text} ({unit})" if unit else text


def three_digits(value: float) -> str:
    """`value` with three significant digits, without an exponent from 0.001 up to a million."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return rf"${mantissa} \times 10^{{{int(exponent)}}}$"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{round(value, decimals):.{max(decimals, 0)}f}"


def _headings(columns: Sequence[str]) -> list[str]:
    found = [heading(name) for name in columns]
    # Two keys of different sections may end alike.
    return [name if found.count(text) > 1 else text for name, text in zip(columns, found, strict=True)]


def _printed_columns(table: pd.DataFrame) -> list[str]:
    if len(table.columns) <= MOST_LATEX_COLUMNS:
        return list(table.columns)
    told = axes_of(table) if "num_requests" in table.columns else []
    metrics = [name for name in TABLE_METRICS if name in table.columns]
    return [*told, *metrics, *(["saturated"] if any_saturated(table) else [])]


def _cell(value: Any, exact: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "--"
    if isinstance(value, float):
        return _escaped(f"{value:g}") if exact or math.isinf(value) else three_digits(value)
    return _escaped(str(value))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _caption(table: pd.DataFrame) -> str:
    """Whose numbers they are, from columns that every summary has."""

    def values(name: str) -> str:
        there = table[name].dropna().tolist() if name in table.columns else []
        return ", ".join(dict.fromkeys(map(str, there)))

    count = f"{len(table)} run{'' if len(table) == 1 else 's'}"
    told = [f"{values('experiment')}: {count}" if values("experiment") else count]
    told += [
        f"{what} {text}"
        for what, name in (("evidence:", "evidence"), ("machine:", "machine"), ("code:", "code"), ("SLO:", "slo"))
        if (text := values(name))
    ]
    return "; ".join(told) + "."


def _escaped(text: str) -> str:
    plain = " ".join(str(text).split())
    return "".join(_SPECIAL.get(character, character) for character in plain)


def _csv(table: pd.DataFrame, columns: Sequence[str] | None, _caption: str | None) -> bytes:
    return table[list(columns or table.columns)].to_csv(index=False).encode()


def _tex(table: pd.DataFrame, columns: Sequence[str] | None, caption: str | None) -> bytes:
    return latex(table, columns, caption).encode()


def _parquet(table: pd.DataFrame, columns: Sequence[str] | None, _caption: str | None) -> bytes:
    taken = table[list(columns or table.columns)].copy()
    for name in taken.columns:
        values = [value for value in taken[name].tolist() if value is not None]
        # A swept setting may be a number in one run and a word in another; a Parquet column has one type.
        if taken[name].dtype == object and len({type(value) for value in values}) > 1:
            taken[name] = [None if value is None else str(value) for value in taken[name].tolist()]
    buffer = BytesIO()
    taken.to_parquet(buffer, index=False)
    return buffer.getvalue()


_WRITERS: dict[str, Callable[[pd.DataFrame, Sequence[str] | None, str | None], bytes]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".tex": _tex,
}


def _write(path: Path, content: bytes) -> None:
    """To a hidden sibling first, so that a full disk or a kill leaves the old file."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
