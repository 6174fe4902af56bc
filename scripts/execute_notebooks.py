"""Execute notebooks from top to bottom in an empty copy of the project, and write what they show.

    python scripts/execute_notebooks.py [NAME ...]

The source of a notebook is its paired .py file. `make notebooks` runs all of them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1200  # of a cell; on a machine that is busy with other things
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def execute(notebook: Any, project: Path) -> None:
    """Run all cells in a new kernel, with `project`/notebooks as working directory; outputs are kept in `notebook`.

    `project` becomes a project that sees the experiments of this one and what it has published, and has no other
    results. The kernel listens on the loopback interface only. Raises nbclient's CellExecutionError where a cell fails
    that may not.
    """
    (project / "notebooks").mkdir()
    (project / "pyproject.toml").touch()
    (project / "results").mkdir()
    for name in ("experiments", "results/paper"):
        (project / name).symlink_to(ROOT / name, target_is_directory=True)
    kernel = AsyncKernelManager(kernel_name="python3", transport="tcp", ip="127.0.0.1")
    resources = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(notebook, km=kernel, timeout=TIMEOUT_S, resources=resources).execute()
    for model in notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {}).values():
        # What is not set takes its default, in a viewer too; a panel has a thousand of these.
        model["state"] = {name: value for name, value in model["state"].items() if value is not None}


def from_pair(path: Path) -> Any:
    """The notebook that the .py file at `path` describes, without outputs. Ids of cells are their numbers."""
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def main(names: list[str]) -> int:
    paths = sorted((ROOT / "notebooks").glob("*.py"))
    if unknown := set(names) - {path.stem for path in paths}:
        print(
            f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in paths)}", file=sys.stderr
        )
        return 2
    for path in paths:
        if names and path.stem not in names:
            continue
        notebook, start_s = from_pair(path), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        nbformat.write(notebook, path.with_suffix(".ipynb"))
        print(f"{path.stem}: {time.perf_counter() - start_s:.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
