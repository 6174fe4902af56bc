"""Notebooks run from top to bottom, agree with their paired .py, stay thin, and name no place."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 400_000
STRATEGY_LINES = 20
# An absolute path, not a closing tag, an address or a fraction.
PLACE = re.compile(r"(?<![\w.<:/\\-])/[A-Za-z_][\w.-]*/|\b[A-Z]:\\\\?\w|~/")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[list[str]]:
    """The MIME types of a cell's results and figures; text on stdout and stderr is left out."""
    return [sorted(output.data) for output in cell.outputs if "data" in output]


def python(cell: Any) -> ast.Module:
    """The syntax tree of a cell, magics left out."""
    return ast.parse(re.sub(r"^[%!].*$", "", cell.source, flags=re.MULTILINE))


def is_strategy(cell: Any) -> bool:
    """Whether a cell is a short strategy class and nothing else."""
    body = python(cell).body
    lines = [line for line in cell.source.splitlines() if line.strip()]
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    methods = {node.name for c in classes for node in c.body if isinstance(node, ast.FunctionDef)}
    wanted = {"schedule", "place", "arrange"}
    return len(body) == 1 and bool(methods & wanted) and len(lines) < STRATEGY_LINES


def not_thin(notebook: Any) -> list[str]:
    """Loops, functions, classes and plotting code, which belong in the package; one strategy is allowed."""
    found = []
    cells = code_cells(notebook)
    exempt = next((number for number, cell in enumerate(cells) if is_strategy(cell)), None)
    for number, cell in enumerate(cells):
        if number != exempt:
            found += [f"cell {number}: {what}" for node in ast.walk(python(cell)) if (what := _thick(node))]
    return found


def _is_def(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _thick(node: ast.AST) -> str:
    if isinstance(node, ast.For | ast.AsyncFor | ast.While | ast.comprehension):
        return "a loop"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    if _is_def(node):
        return "a function"
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        return next((f"imports {m}" for m in modules if m.split(".")[0] == "matplotlib"), "")
    return ""


def places(notebook: Any) -> list[str]:
    """Absolute paths in sources, outputs and metadata; images are left out."""
    return [match[0] for text in _texts(notebook) for match in PLACE.finditer(text)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith("image/"):
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@every_notebook
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the project, as Jupyter does it: the working directory is the notebook's folder."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments", target_is_directory=True)
    for name in ("notebooks", "tmp", "ipython", "runtime"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = read(path)
    committed = [kinds(cell) for cell in code_cells(notebook)]
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    assert [kinds(cell) for cell in code_cells(notebook)] == committed
    assert (tmp_path / "results").is_dir()
    assert places(notebook) == []


@every_notebook
def test_notebook_agrees_with_its_pair(path: Path) -> None:
    pair = jupytext.read(path.with_suffix(".py"))
    ours, theirs = ([(c.cell_type, c.source) for c in book.cells] for book in (read(path), pair))
    assert ours == theirs


@every_notebook
def test_committed_notebook_was_executed_once_in_order(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < MAX_BYTES


@every_notebook
def test_notebook_is_thin_and_names_no_place(path: Path) -> None:
    assert not_thin(read(path)) == []
    assert places(read(path)) == []


def test_tour_writes_a_scheduler_in_11_lines() -> None:
    (cell,) = [cell for cell in code_cells(read(ROOT / "notebooks/01_tour.ipynb")) if is_strategy(cell)]
    assert len([line for line in cell.source.splitlines() if line.strip()]) == 11


SCHEDULER = "class S:\n    def schedule(self, queue):\n        for r in queue.running: ..."


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        (["%matplotlib inline\nfor x in y:\n    print(x)"], "cell 0: a loop"),
        (["z = [x for x in y]"], "cell 0: a loop"),
        (["x = 1", "def f(): ..."], "cell 1: a function"),
        (["class C: ..."], "cell 0: class C"),
        (["import matplotlib.pyplot as plt"], "cell 0: imports matplotlib.pyplot"),
        ([SCHEDULER, SCHEDULER], "cell 1: class S"),
        ([SCHEDULER + "\ns = S()"], "cell 0: class S"),
        ([SCHEDULER + "\n        # more" * 20], "cell 0: class S"),
    ],
)
def test_planted_code_is_found(sources: list[str], problem: str) -> None:
    assert problem in not_thin(_notebook(sources))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in /home/me/results", ["/home/"]),
        ("'/tmp/x/tiny'", ["/tmp/"]),
        ("C:\\Users\\me", ["C:\\U"]),
        ("see ~/models", ["~/"]),
        ("<td>1</td> results/tour TTFT/TPOT https://example.org/a/b 3 / 4 and /", []),
    ],
)
def test_planted_place_is_found(text: str, found: list[str]) -> None:
    notebook = _notebook(["x"])
    output = {"output_type": "stream", "name": "stdout", "text": text}
    notebook.cells[0].outputs = [nbformat.from_dict(output)]
    assert places(notebook) == found


def test_scheduler_alone_is_allowed() -> None:
    assert not_thin(_notebook(["x = 1", "@dataclass\n" + SCHEDULER])) == []


def _notebook(sources: list[str]) -> Any:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.reads(json.dumps(nbformat.v4.new_notebook(cells=cells)), as_version=4)
