from __future__ import annotations

import errno
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import hybridlab as hl
from hybridlab import experiment
from hybridlab.errors import ConfigError
from hybridlab.export import export_results, heading, latex, three_digits
from hybridlab.store import results
from hybridlab.summary_table import TABLE_METRICS


@pytest.fixture
def table(bench: list[str], config: dict[str, Any]) -> pd.DataFrame:
    """A stored sweep over a scheduler with a name that TeX does not like."""
    sweep = {"scheduler": ["fcfs", {"name": "chunked_prefill", "chunk_tokens": 8}], "workload.length_scale": [1, 1.25]}
    return experiment.sweep({**config, "sweep": sweep}, progress=False)


def body(text: str) -> list[list[str]]:
    """The cells of a LaTeX table, headings first; checks what a compiler would stumble over."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    plain = "\n".join(lines)
    assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
    begun, ended = re.findall(r"\\begin\{(\w+)\}", plain), re.findall(r"\\end\{(\w+)\}", plain)
    assert begun == ended[::-1]
    (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", plain)
    rows = [line.strip().removesuffix(r" \\") for line in lines if line.endswith(r"\\")]
    cells = [re.split(r"(?<!\\) & ", row) for row in rows]
    assert all(len(row) == len(columns) for row in cells)
    for cell in (cell for row in cells for cell in row):
        outside = re.sub(r"\$[^$]*\$", "", cell)
        assert not re.search(r"(?<!\\)[_%&#$^~]", outside), cell
    assert [plain.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    return cells


def test_csv_holds_every_column(table: pd.DataFrame, tmp_path: Path) -> None:
    path = export_results(table, tmp_path / "new" / "table.csv")
    found = pd.read_csv(path)
    assert found.columns.tolist() == table.columns.tolist()
    assert found["median_ttft_s"].tolist() == table["median_ttft_s"].tolist()  # to the last digit
    assert found["run_id"].astype(str).tolist() == table["run_id"].tolist()
    export_results(table, path, columns=["run_id", "machine"])
    assert path.read_text().splitlines()[0] == "run_id,machine"
    assert hl.export_results is export_results


def test_latex_holds_what_is_printed(table: pd.DataFrame, tmp_path: Path) -> None:
    text = export_results("question", tmp_path / "table.tex").read_text()
    head, *rows = body(text)
    assert head == [
        "scheduler", "length scale", "median TTFT (s)", "P99 TTFT (s)", "median TPOT (s)", "output (tokens/s)",
        "request goodput (req/s)",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["fcfs"] * 2 + [r"chunked\_prefill(chunk\_tokens=8)"] * 2
    assert [row[1] for row in rows] == ["1", "1.25"] * 2  # settings are exact
    stored = results("question")
    assert [row[2] for row in rows] == [three_digits(value) for value in stored["median_ttft_s"].tolist()]
    (caption,) = re.findall(r"\\caption\{(.*)\}", text)
    assert caption.startswith("question: 4 runs; evidence: measured; machine: test, 1 cores; code: ")
    assert caption.endswith("SLO: paper.")
    assert text.startswith(f"% runs: {', '.join(stored['run_id'])}\n")


def test_what_tex_does_not_like_is_escaped() -> None:
    odd = pd.DataFrame({"a_b": ["50% & #1", "$x^2$ ~ {y} \\z"], "c.d<e": [1.0, math.nan], "ok": [True, None]})
    text = latex(odd, caption="100% of P&D")
    assert r"\caption{100\% of P\&D}" in text
    _, first, second = body(text)
    assert first == [r"50\% \& \#1", "1", "True"]
    assert second == [r"\$x\textasciicircum{}2\$ \textasciitilde{} \{y\} \textbackslash{}z", "--", "--"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here; the table's form is checked above")
def test_latex_compiles(table: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "main.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}" + latex(table) + r"\end{document}"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "main.tex"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.052391, "0.0524"),
        (0.0999999, "0.100"),
        (9.995, "9.99"),
        (9.996, "10.0"),
        (99.95, "100"),
        (123.456, "123"),
        (1234.56, "1230"),
        (999_499.0, "999000"),
        (-0.5, "-0.500"),
        (1.5e6, r"$1.50 \times 10^{6}$"),
        (2.5e-5, r"$2.50 \times 10^{-5}$"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_headings_have_units() -> None:
    assert heading("p99_itl_s") == "P99 ITL (s)"
    assert heading("request_throughput_req_s") == "request throughput (req/s)"
    assert heading("total_tokens_per_s") == "total (tokens/s)"
    assert heading("workload.rate_scale") == "rate scale"
    both = latex(pd.DataFrame({"engine.seed": [1], "workload.seed": [2]}))
    assert body(both)[0] == ["engine.seed", "workload.seed"]


def test_parquet_takes_settings_of_several_types(table: pd.DataFrame, tmp_path: Path) -> None:
    mixed = table.assign(**{"scheduler.x": [1, "auto", None, 2.5]})
    found = pd.read_parquet(export_results(mixed, tmp_path / "table.parquet"))
    assert found["scheduler.x"].fillna("none").tolist() == ["1", "auto", "none", "2.5"]
    assert found["median_ttft_s"].tolist() == table["median_ttft_s"].tolist()


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("t.xlsx", {}, "unknown kind of file '.xlsx'; expected .csv, .parquet, .tex"),
        ("t", {}, "unknown kind of file ''"),
        ("t.csv", {"columns": ["median_ttft"]}, "the table has no column 'median_ttft'"),
        ("t.csv", {"columns": "repeat"}, "columns: expected a list of names, got 'repeat'; write ['repeat']"),
        ("t.tex", {"columns": list(TABLE_METRICS) * 3}, "a LaTeX table of 15 columns; expected at most 12"),
    ],
)
def test_bad_input_writes_nothing(
    table: pd.DataFrame, tmp_path: Path, name: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        export_results(table, tmp_path / "out" / name, **keys)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_other_bad_input(table: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the table has no rows"):
        export_results(table.iloc[:0], tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="no such results"):
        export_results("answer", tmp_path / "t.csv")
    with pytest.raises(ConfigError, match=r"t\.csv: expected a table .* got int"):
        export_results(3, tmp_path / "t.csv")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="path: expected the file to write, got 3"):
        export_results(table, 3)  # pyright: ignore[reportArgumentType]


def test_a_full_disk_leaves_the_old_file(table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out" / "t.csv"
    export_results(table, path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"t\.csv: cannot be written \(No space"):
            patch.setattr(os, call, full)
            export_results(table.iloc[:1], path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["t.csv"]
