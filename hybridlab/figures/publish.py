"""Figures that a fresh clone can rebuild: results/paper/<question>/ holds the tables and what is drawn from them.

| file | what is in it |
|---|---|
| meta.json | question, runs, machine, evidence, code, versions, command and a copy of the config |
| summary.csv | one row per run |
| requests.parquet | of the requests that the figures draw, the columns that they need |
| spans.parquet | of the run that a timeline draws |
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.columns import LABELS
from hybridlab.config import PAPER, load_config, project_dir
from hybridlab.errors import ConfigError
from hybridlab.figures.draw import draw_all
from hybridlab.figures.files import write_whole
from hybridlab.figures.kernel_bench import is_kernel_bench, rebuild_kernel_bench
from hybridlab.figures.tables import Tables, chosen, rows_of
from hybridlab.figures_config import DEFAULT_FIGURES, FigureConfig, read_figures
from hybridlab.sections import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.run_files import StoredRun

FORMAT = "hybridlab-paper/1"
REQUIRED = ("scheduler", "repeat", "evidence", "machine", "code", "run_id")
"""Columns of summary.csv that every figure needs."""
TEXTS = (*LABELS, "experiment", "slo", "backend", "evidence", "machine", "code", "run_id")
"""Columns that are text even where it looks like a number: a commit may be all digits."""
MOST_BYTES = 1_000_000
"""Of one file that is to be committed."""
DECIMALS = 6
"""Microseconds: below what a figure can show, and a third of the bytes."""


def rebuild(questions: Sequence[str] = (), results_dir: Path | None = None) -> list[Path]:
    """Draw the figures of results/paper/<question>/ again from the tables there, by default of every question.

    Needs no runs; the files are the same bytes with the same versions of the libraries. Raises ConfigError
    naming what is missing or damaged.
    """
    paper = _results(results_dir) / PAPER
    known = sorted(path.parent.name for path in paper.glob("*/meta.json") if not path.parent.name.startswith("."))
    for question in questions:
        if question not in known:
            hint = did_you_mean(question, known) if known else "; nothing is published there"
            raise ConfigError(f"{paper}: no published question {question!r}{hint}")
    if not known:
        raise ConfigError(f"{paper}: nothing is published; hybridlab figures --publish QUESTION does it")
    return [path for question in questions or known for path in _rebuild(paper / question)]


def publish(question: str, results_dir: Path | None = None) -> list[Path]:
    """Write tables and figures of experiments/<question>/config.yaml from the stored runs of this machine.

    The folder results/paper/<question>/ is replaced as a whole. Raises ConfigError if there is no such config, if
    runs are missing or failed, and if a file is too large to be committed.
    """
    project = project_dir()
    path = project / "experiments" / question / "config.yaml"
    # A name, never a path: it becomes a folder that is replaced.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", question) or not path.is_file():
        known = sorted(found.parent.name for found in project.glob("experiments/*/config.yaml"))
        raise ConfigError(f"{path}: no such experiment{did_you_mean(question, known) if known else ''}")
    results = _results(results_dir)
    command = f"hybridlab sweep experiments/{question}/config.yaml && hybridlab figures --publish {question}"
    tables, runs = _stored(path, results)
    config = load_config(path)
    folder = results / PAPER / question
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".part-{question}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error})") from None
    try:
        part.chmod(0o755)
        meta = _meta(question, command, path, runs)
        write_whole(_tables(tables, config.figures, meta, part), "table")
        names = [file.name for file in _rebuild(part)]
        for file in part.iterdir():
            if (size := file.stat().st_size) > MOST_BYTES:
                limit = f"expected at most {MOST_BYTES:,} (choose fewer rows with where:)"
                raise ConfigError(f"{folder / file.name}: {size:,} bytes; {limit}")
        _replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [folder / name for name in names]


def _results(results_dir: Path | None) -> Path:
    return project_dir() / "results" if results_dir is None else results_dir


def _stored(path: Path, results: Path) -> tuple[Tables, list[StoredRun]]:
    """The tables of the experiment and its runs; nothing is run or made."""
    from hybridlab.backends import is_made
    from hybridlab.experiment import run
    from hybridlab.jobs import identify, make_drafts
    from hybridlab.run_files import FailedRun, StoredRun, find_runs

    config = load_config(path)
    drafts = make_drafts(config, results)
    shown = path.relative_to(project_dir())
    found = {}
    if all(is_made(draft.checkpoint) for draft in drafts):
        found = find_runs(results / config.experiment, [job.run_id for job in identify(drafts, "engine")])
    runs = [run for run in found.values() if isinstance(run, StoredRun)]
    if failed := [run for run in found.values() if isinstance(run, FailedRun)]:
        again = f"hybridlab sweep {shown} --retry-failed"
        raise ConfigError(f"{shown}: {len(failed)} of {len(drafts)} runs failed ({failed[0].error}); {again}")
    if len(runs) < len(drafts):
        missing = len(drafts) - len(runs)
        raise ConfigError(
            f"{shown}: {missing} of {len(drafts)} runs of this machine, code and config are missing; "
            f"hybridlab sweep {shown} makes them"
        )
    result = run(config, results_dir=results, progress=False)
    return Tables(result.summary, result.requests, result.spans), runs


def _meta(question: str, command: str, config: Path, runs: Sequence[StoredRun]) -> dict[str, Any]:
    """What meta.json holds; lists have an entry per distinct value."""
    import matplotlib

    from hybridlab.strict_yaml import read_yaml

    def distinct(key: str) -> list[Any]:
        values = [run.manifest[key] for run in runs]
        return [value for number, value in enumerate(values) if value not in values[:number]]

    return {
        "format": FORMAT,
        "question": question,
        "command": command,
        "run_ids": [run.run_id for run in runs],
        **{key: distinct(key) for key in ("evidence", "machine", "code", "versions")},
        "matplotlib": matplotlib.__version__,
        "config": read_yaml(config),
    }


def _tables(tables: Tables, figures: Sequence[FigureConfig], meta: dict[str, Any], folder: Path) -> dict[Path, bytes]:
    """The files of `folder` that are not drawn."""
    files = {folder / "meta.json": (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode()}
    files[folder / "summary.csv"] = tables.summary.to_csv(index=False, lineterminator="\n").encode()
    columns = {
        "ttft_prompt_length": ["prompt_tokens", "cached_tokens", "ttft_s"],
        "latency_cdf": [],
    }
    of_requests = [figure for figure in figures if figure.figure in columns]
    needed = dict.fromkeys(["run_id"])
    for figure in of_requests:
        metric = getattr(figure, "metric", None)
        needed |= dict.fromkeys(columns[figure.figure])
        needed |= dict.fromkeys([] if metric is None else ["token_times_s" if metric == "itl_s" else metric])
    if of_requests:
        files[folder / "requests.parquet"] = _parquet(_drawn(tables, "requests", of_requests)[list(needed)])
    if timelines := [figure for figure in figures if figure.figure == "timeline"]:
        spans = _drawn(tables, "spans", timelines)
        own = [name for name in spans.columns if name not in tables.summary.columns or name == "run_id"]
        files[folder / "spans.parquet"] = _parquet(spans[own])
    return files


def _drawn(tables: Tables, table: str, figures: Sequence[FigureConfig]) -> pd.DataFrame:
    """The rows of a table that at least one of the figures draws."""
    frame: Any = rows_of(tables, table, (), table)
    kept: set[int] = set()
    for figure in figures:
        evidence = getattr(figure, "evidence", None)
        kept |= set(chosen(frame, figure.where, evidence, f"figures: {figure.stem}").index)
    return getattr(tables, table).iloc[sorted(kept)]


def _parquet(frame: Any) -> bytes:
    import io

    import numpy as np

    if "token_times_s" in frame.columns:
        rounded = [np.round(np.asarray(times, np.float64), DECIMALS) for times in frame["token_times_s"]]
        frame = frame.assign(token_times_s=rounded)
    buffer = io.BytesIO()
    frame.round(DECIMALS).to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()


def _rebuild(folder: Path) -> list[Path]:
    if is_kernel_bench(folder):
        return rebuild_kernel_bench(folder)
    meta, tables = _read(folder)
    try:
        figures = read_figures(meta["config"]["figures"]) if "figures" in meta["config"] else DEFAULT_FIGURES
        command, version = meta["command"], ", ".join(found["hybridlab"] for found in meta["versions"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / 'meta.json'}: damaged ({type(error).__name__}: {error})") from None
    return draw_all(figures, tables, folder, command, version)


def _read(folder: Path) -> tuple[dict[str, Any], Tables]:
    import pandas as pd

    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ConfigError(f"{path}: expected a file of format {FORMAT!r}")
        path = folder / "summary.csv"
        texts = pd.read_csv(path, dtype=str, keep_default_na=False)
        summary = pd.DataFrame({name: _values(texts[name].tolist(), name in TEXTS) for name in texts.columns})
        _check(summary, REQUIRED, path)
        found = {}
        for name in ("requests", "spans"):
            path = folder / f"{name}.parquet"
            found[name] = pd.read_parquet(path) if path.is_file() else pd.DataFrame({"run_id": []})
            _check(found[name], ("run_id",), path)
    except (OSError, ValueError) as error:  # pandas', pyarrow's and json's errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return meta, Tables(summary, found["requests"], found["spans"])


def _check(table: pd.DataFrame, required: Sequence[str], path: Path) -> None:
    """Raise ConfigError naming a column that is missing, or that holds text where its unit says numbers."""
    from pandas.api.types import is_numeric_dtype

    if missing := [name for name in required if name not in table.columns]:
        raise ConfigError(f"{path}: damaged (no column {missing[0]!r})")
    for name in table.columns:
        measured = name.endswith(("_s", "_tokens")) and "." not in name and name != "token_times_s"
        if measured and not is_numeric_dtype(table[name]):
            raise ConfigError(f"{path}: damaged (column {name!r} holds something else than numbers)")


def _values(texts: list[str], keep: bool) -> list[Any]:
    """A column of a CSV file as whole numbers, numbers or text (always if `keep`), whichever holds for all; "" is NaN.

    pandas would read "None" and "NA" as NaN, and round the last digit of some numbers.
    """
    for kind in () if keep else (int, float):
        try:
            return [kind(text) if text else float("nan") for text in texts]
        except ValueError:
            continue
    return [text or float("nan") for text in texts]


def _replace(part: Path, folder: Path) -> None:
    old = part.with_name(part.name.replace(".part-", ".old-", 1))
    try:
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error})") from None
    shutil.rmtree(old, ignore_errors=True)
