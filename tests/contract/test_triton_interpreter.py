"""`test_triton.py` in Triton's interpreter, on any machine that has Triton.

Whether a kernel is interpreted is settled when it is defined, so it is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL_TESTS = Path(__file__).with_name("test_triton.py")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_equal_their_twins_in_the_interpreter(which):
    pytest.importorskip("triton", minversion="3.7", reason="Triton's interpreter since 3.7 knows newer NumPy")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", which, str(KERNEL_TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = KERNEL_TESTS.parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-1000:]
