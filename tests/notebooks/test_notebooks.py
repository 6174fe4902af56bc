"""Notebooks run from top to bottom, agree with their paired .py, stay thin, and name no place.

A cell tagged `raises-exception` shows an error of ours, which is words and no traceback.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

import hybridlab as hl
from hybridlab import errors

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 400_000
STRATEGY_LINES = 20
RAISES = "raises-exception"
OUR_ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
# An absolute path, not a closing tag, an address or a fraction.
PLACE = re.compile(r"(?<![\w.<:/\\-])/[A-Za-z_][\w.-]*/|\b[A-Z]:\\\\?\w|~/")

_spec = importlib.util.spec_from_file_location("execute_notebooks", ROOT / "scripts/execute_notebooks.py")
assert _spec is not None and _spec.loader is not None
execute_notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute_notebooks)

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
    """Loops, functions, classes and plotting code, which belong in the package; one strategy is allowed.

    And a draft of it, of the same name, if the next cell shows by an error what is wrong with it.
    """
    found = []
    cells = code_cells(notebook)
    strategies = [number for number, cell in enumerate(cells) if is_strategy(cell)]
    exempt = set(strategies[:1])
    if len(strategies) > 1 and _is_draft(cells, *strategies[:2]):
        exempt.add(strategies[1])
    for number, cell in enumerate(cells):
        if number not in exempt:
            found += [f"cell {number}: {what}" for node in ast.walk(python(cell)) if (what := _thick(node))]
    return found


def _is_draft(cells: list[Any], draft: int, final: int) -> bool:
    names = [python(cells[number]).body[0].name for number in (draft, final)]  # pyright: ignore
    return names[0] == names[1] and draft + 1 < final and may_raise(cells[draft + 1])


def may_raise(cell: Any) -> bool:
    return RAISES in cell.metadata.get("tags", ())


def errors_of(cell: Any) -> list[Any]:
    return [output for output in cell.outputs if output.output_type == "error"]


def is_in_words(error: Any) -> bool:
    """Whether an error of ours is shown by its message alone: no traceback, no stack frame, no colours."""
    return error.ename in OUR_ERRORS and error.traceback == [f"{error.ename}: {error.evalue}"]


def wrong_errors(notebook: Any) -> list[str]:
    """Cells that raise without the tag, have it for nothing, or show more than the words of our error."""
    found = []
    for number, cell in enumerate(code_cells(notebook)):
        raised = errors_of(cell)
        if bool(raised) != may_raise(cell):
            found.append(f"cell {number}: {'raises' if raised else 'does not raise'}")
        found += [f"cell {number}: {error.ename} with a traceback" for error in raised if not is_in_words(error)]
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
    """Absolute paths in sources, outputs and metadata; images are left out, and the bytes of widgets."""
    return [match[0] for text in _texts(notebook) for match in PLACE.finditer(text)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith("image/") and key != "buffers":
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@every_notebook
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the project, as Jupyter does it: the working directory is the notebook's folder."""
    for name in ("project", "tmp", "ipython", "runtime"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    # That other programs compute here says nothing about a notebook, and a warning shows where the package lies.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:calibrate:UserWarning")
    notebook = read(path)
    committed = [kinds(cell) for cell in code_cells(notebook)]
    execute_notebooks.execute(notebook, tmp_path / "project")
    assert [kinds(cell) for cell in code_cells(notebook)] == committed
    assert wrong_errors(notebook) == []
    assert (tmp_path / "project/results").is_dir()
    assert places(notebook) == []


@every_notebook
def test_notebook_agrees_with_its_pair(path: Path) -> None:
    pair = jupytext.read(path.with_suffix(".py"))
    ours, theirs = ([(c.cell_type, c.source, c.metadata.get("tags")) for c in b.cells] for b in (read(path), pair))
    assert ours == theirs


@every_notebook
def test_committed_notebook_was_executed_once_in_order(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert wrong_errors(read(path)) == []
    assert path.stat().st_size < MAX_BYTES


@every_notebook
def test_notebook_is_thin_and_names_no_place(path: Path) -> None:
    assert not_thin(read(path)) == []
    assert places(read(path)) == []


def test_tour_writes_a_scheduler_in_11_lines() -> None:
    (cell,) = [cell for cell in code_cells(read(ROOT / "notebooks/01_tour.ipynb")) if is_strategy(cell)]
    assert len([line for line in cell.source.splitlines() if line.strip()]) == 11


def test_panel_lies_in_its_notebook() -> None:
    """As a widget with its state, and as a picture for those who cannot show it."""
    notebook = read(ROOT / "notebooks/02_sweep_ttft_throughput.ipynb")
    bundle = code_cells(notebook)[-1].outputs[0].data
    model_id = bundle["application/vnd.jupyter.widget-view+json"]["model_id"]
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert state[model_id]["model_name"] == "VBoxModel"
    assert [m["model_name"] for m in state.values()].count("ImageModel") == 1
    assert bundle["image/png"] and bundle["text/plain"].startswith("Panel(sweep_ttft_throughput")


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


def test_draft_is_allowed_where_its_mistake_is_shown() -> None:
    sources = [SCHEDULER, "hl.check_scheduler(S())", SCHEDULER]
    assert sorted(not_thin(_notebook(sources))) == ["cell 2: a function", "cell 2: a loop", "cell 2: class S"]
    shown = _notebook(sources)
    shown.cells[1].metadata.tags = [RAISES]
    assert not_thin(shown) == []
    shown.cells[2].source = SCHEDULER.replace("class S", "class T")
    assert "cell 2: class T" in not_thin(shown)
    assert "cell 3: class S" in not_thin(_with_tags([*sources, SCHEDULER], {1: [RAISES]}))


def test_planted_errors_are_found() -> None:
    with pytest.raises(hl.HybridlabError) as ours:
        hl.load_config({})
    name, words = type(ours.value).__name__, str(ours.value)
    good = {"output_type": "error", "ename": name, "evalue": words, "traceback": ours.value._render_traceback_()}
    frames = good | {"traceback": ["Traceback (most recent call last)", f"{name}: {words}"]}
    foreign = good | {"ename": "ValueError", "traceback": [f"ValueError: {words}"]}
    for output, problems in (
        (good, []),
        (frames, [f"cell 0: {name} with a traceback"]),
        (foreign, ["cell 0: ValueError with a traceback"]),
    ):
        notebook = _with_tags(["x"], {0: [RAISES]})
        notebook.cells[0].outputs = [nbformat.from_dict(output)]
        assert wrong_errors(notebook) == problems
        notebook.cells[0].metadata.pop("tags")
        assert "cell 0: raises" in wrong_errors(notebook)
    assert wrong_errors(_with_tags(["x"], {0: [RAISES]})) == ["cell 0: does not raise"]


def _with_tags(sources: list[str], tags: dict[int, list[str]]) -> Any:
    notebook = _notebook(sources)
    for number, names in tags.items():
        notebook.cells[number].metadata.tags = names
    return notebook


def _notebook(sources: list[str]) -> Any:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.reads(json.dumps(nbformat.v4.new_notebook(cells=cells)), as_version=4)
