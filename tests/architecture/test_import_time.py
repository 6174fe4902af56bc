"""`import hybridlab` is cheap, so that a notebook's first cell and `hybridlab --help` answer at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT_S = 0.5
HEAVY = ("torch", "jax", "pandas", "matplotlib")
# The best of several: other processes can only slow an import down.
_REPEATS = 5

_MEASURE = """
import sys, time
start = time.perf_counter()
import {module}
took = time.perf_counter() - start
print(took, *[name for name in {heavy} if name in sys.modules])
"""


def measured(module: str) -> tuple[float, list[str]]:
    """Seconds of a fresh interpreter's import, and the heavy packages that it brought in."""
    source = _MEASURE.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    took, *heavy = done.stdout.split()
    return float(took), heavy


@pytest.mark.parametrize("module", ["hybridlab", "hybridlab.cli.app"])
def test_import_is_fast_and_light(module: str) -> None:
    runs = [measured(module) for _ in range(_REPEATS)]
    assert runs[0][1] == []
    assert min(took for took, _ in runs) < LIMIT_S


def test_heavy_import_is_found() -> None:
    took, heavy = measured("pandas")
    assert heavy == ["pandas"]
    assert took > 0
