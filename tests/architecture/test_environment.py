"""pyproject.toml, constraints.txt and environment.yml say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"pytorch": "torch"}
# What conda has to bring and pip cannot, or what pip brings along.
CONDA_ONLY = {"python", "pip", "nodejs", "c-compiler", "make", "ninja"}
# The packages that the project is built around.
CHOSEN = {"torch", "jax", "jaxlib", "numpy", "pandas", "matplotlib", "ipywidgets", "cython", "safetensors"}


def project_requirements(root: Path) -> dict[str, str]:
    """Canonical name -> specifier, over run, build and optional requirements."""
    data = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = data["project"]
    lines = [
        *data["build-system"]["requires"],
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed}


def conda_requirements(root: Path) -> dict[str, str]:
    entries = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    found = {}
    for entry in entries:
        match = re.fullmatch(r"([\w.-]+)(.*)", entry)
        assert match, entry
        found[CONDA_NAMES.get(match[1], canonicalize_name(match[1]))] = match[2]
    return found


def disagreements(root: Path) -> list[str]:
    project, conda = project_requirements(root), conda_requirements(root)
    found = [f"environment.yml lacks {name}{spec}" for name, spec in project.items() if name not in conda]
    for name, spec in conda.items():
        if name in CONDA_ONLY:
            continue
        if name not in project:
            found.append(f"pyproject.toml lacks {name}{spec}")
        elif project[name] != spec:
            found.append(f"{name}: {project[name]} in pyproject.toml, {spec} in environment.yml")
    return found


def test_environment_agrees_with_pyproject() -> None:
    assert disagreements(ROOT) == []
    assert set(conda_requirements(ROOT)) >= CHOSEN
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert conda_requirements(ROOT)["python"] == data["project"]["requires-python"]


def test_constraints_meet_the_lower_bounds() -> None:
    wanted = project_requirements(ROOT)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): pin for pin in pins}
    assert len(pinned) == len(pins)
    assert set(wanted) <= set(pinned), "every direct requirement is pinned"
    for name, pin in pinned.items():
        (version,) = [s.version for s in pin.specifier if s.operator == "=="]
        assert name not in wanted or Requirement(f"{name}{wanted[name]}").specifier.contains(version), name


def test_version_is_said_once() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"version: '{version}'" in (ROOT / "meson.build").read_text(encoding="utf-8")
    assert f'__version__ = "{version}"' in (ROOT / "hybridlab/__init__.py").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  - numpy>=2.1\n", "", "environment.yml lacks numpy>=2.1"),
        ("numpy>=2.1", "numpy>=2.0", "numpy: >=2.1 in pyproject.toml, >=2.0"),
        ("  - pip\n", "  - pip\n  - sympy>=1\n", "pyproject.toml lacks sympy>=1"),
    ],
)
def test_planted_disagreement_is_found(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    (tmp_path / "environment.yml").write_text(text.replace(old, new, 1))
    found = disagreements(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(message)
