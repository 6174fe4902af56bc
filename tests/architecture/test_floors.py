"""Imports point down the floors (docs: README, "Map"); every check is also shown a planted violation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hybridlab"

# First part of the module name -> floor. A new module is entered here: that is when its floor is decided.
FLOORS = {
    0: {
        "errors", "plans", "request", "routing", "spec", "validation",
    },
    1: {
        "admission", "batch", "kv_blocks", "lowering", "moves", "prefix_cache", "strategies", "worker_pools",
    },
    2: {
        "checkpoint", "engine", "hardware", "kernels", "model", "number_formats", "simulator", "text", "weights_held",
        "weights_holder", "weights_sharing",
    },
    3: {
        "agreement", "arrivals", "axes", "axes_random", "backends", "bench", "calibration", "columns", "config",
        "device_lock", "execution", "experiment", "export", "figures_config", "jobs", "live_requests", "loading",
        "metrics", "prediction", "provenance", "recording", "request_queue", "run_costs", "run_files", "sections",
        "serving", "session", "simulated_workers", "step_log", "store", "stored_run", "strict_yaml", "summary_table",
        "sweep_plan", "sweep_processes", "tuning", "workload",
    },
    4: {
        "__main__", "cli", "figures", "widgets",
    },
}  # fmt: skip
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
EXEMPT = {"__init__"}  # hybridlab/__init__.py re-exports from every floor, lazily
ABOVE_PLANS = {"torch", "jax", "jaxlib"}  # not below floor 2
ENVIRONMENT_READERS = {"calibration/files.py", "engine/ranks_joined.py", "kernels/__init__.py"}
STRANGERS = ("engine", "simulator")  # the two interpreters share plans, not code
EXTENSION_OWNER = "kernels"


def modules(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import: lazy, type-only and import_module("...") too."""
    inside = path.relative_to(package.parent).with_suffix("").parts
    here = inside[:-1]  # also right for __init__.py: its own package
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = list(here[: len(here) - node.level + 1]) if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            # `from hybridlab import kernels` names a module, `from hybridlab.plans import Op` does not
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def part(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def floor_violations(package: Path) -> list[str]:
    found = []
    for path in modules(package):
        name = part(path, package)
        if name in EXEMPT:
            continue
        where = path.relative_to(package.parent)
        if name not in FLOOR_OF:
            found.append(f"{where}: enter {name!r} in FLOORS")
            continue
        for line, target in imports(path, package):
            problem = _problem(name, target.split("."), package)
            if problem:
                found.append(f"{where}:{line}: {problem}")
    return found


def _problem(name: str, target: list[str], package: Path) -> str:
    """What is wrong with module part `name` importing `target`; "" if nothing is."""
    floor, top = FLOOR_OF[name], target[0]
    if top in ABOVE_PLANS and floor < 2:
        return f"floor {floor} imports {top}"
    if top != package.name:
        return ""
    other = target[1] if len(target) > 1 else ""
    if other == "_kernels":
        return "" if name == EXTENSION_OWNER else f"only {EXTENSION_OWNER} imports the compiled kernels"
    if {name, other} == set(STRANGERS):
        return f"{name} imports {other}"
    if other in FLOOR_OF:
        over = FLOOR_OF[other]
        return f"floor {floor} imports {other} of floor {over}" if over > floor else ""
    # `hybridlab.load` would reach every floor through the exempt __init__
    reached = floor < 4 and other != "__version__"
    return "import the module that defines it, not the package" if reached else ""


def environment_violations(package: Path) -> list[str]:
    found = []
    for path in modules(package):
        if str(path.relative_to(package)) in ENVIRONMENT_READERS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if _reads_environment(node):
                line = getattr(node, "lineno", "?")
                found.append(f"{path.relative_to(package.parent)}:{line}: reads the environment")
    return found


def _reads_environment(node: ast.AST) -> bool:
    names: list[str] = []
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os":
        names = [node.attr]
    return not {"environ", "environb", "getenv", "getenvb"}.isdisjoint(names)


def test_imports_point_down() -> None:
    assert len(modules(PACKAGE)) > 20
    assert floor_violations(PACKAGE) == []


def test_environment_is_read_in_listed_files_only() -> None:
    assert environment_violations(PACKAGE) == []
    native = [p for p in (ROOT / "cython_kernels").iterdir() if p.suffix in (".c", ".h", ".pyx")]
    assert native
    assert [p.name for p in native if "getenv" in p.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("plans.py", "from hybridlab.strategies.base import Scheduler", "floor 0 imports"),
        ("strategies/x.py", "def f():\n    import torch", "floor 1 imports torch"),
        ("strategies/x.py", "from jax.numpy import sum", "floor 1 imports jax"),
        ("engine/x.py", "def f():\n    from hybridlab import config", "of floor 3"),
        ("engine/x.py", "from ..serving import serve", "of floor 3"),
        ("engine/x.py", "from hybridlab.simulator import clock", "engine imports simulator"),
        ("simulator/__init__.py", "import hybridlab.engine.lanes", "simulator imports engine"),
        ("model/x.py", "from hybridlab import _kernels", "only kernels imports"),
        ("model/x.py", "import importlib\nimportlib.import_module('hybridlab.cli.app')", "of floor 4"),
        ("store.py", "from hybridlab import load", "not the package"),
        ("store.py", "import hybridlab as hl", "not the package"),
        ("novelty.py", "", "enter 'novelty' in FLOORS"),
    ],
)
def test_planted_import_is_found(tmp_path: Path, file: str, source: str, message: str) -> None:
    _plant(tmp_path, file, source)
    found = floor_violations(tmp_path / "hybridlab")
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "source",
    ["import os\nos.environ['A']", "from os import getenv", "import os\ndef f():\n    return os.getenv('A')"],
)
def test_planted_environment_read_is_found(tmp_path: Path, source: str) -> None:
    _plant(tmp_path, "engine/x.py", source)
    assert len(environment_violations(tmp_path / "hybridlab")) == 1


def test_imports_downwards_are_left_alone(tmp_path: Path) -> None:
    engine = ["import torch", "from hybridlab.plans import Op", "from hybridlab import kernels"]
    _plant(tmp_path, "engine/x.py", "\n".join(engine))
    _plant(tmp_path, "kernels/__init__.py", "import os\nfrom hybridlab import _kernels\nos.environ.get('A')")
    package = tmp_path / "hybridlab"
    assert floor_violations(package) == environment_violations(package) == []


def _plant(root: Path, file: str, source: str) -> None:
    path = root / "hybridlab" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
