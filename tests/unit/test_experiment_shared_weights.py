"""The proof of one copy, on a small checkpoint: what it says of memory; how soon a worker is ready is not tested."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

import hybridlab as hl
from hybridlab import weights_held

SCRIPT = Path(__file__).parents[2] / "experiments" / "shared_weights" / "measure.py"


@pytest.mark.skipif(sys.platform != "linux", reason="memfd and smaps are Linux'")
def test_two_workers_have_one_copy_and_what_is_said_of_it_adds_up(tmp_path, monkeypatch):
    loaded = importlib.util.spec_from_file_location("measure_shared_weights", SCRIPT)
    assert loaded is not None and loaded.loader is not None
    script = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(script)
    # Among names of its own: what else is held on this machine is not touched.
    monkeypatch.setattr(weights_held, "_prefix", lambda: f"hybridlab-weights-test-{os.getpid()}-")
    checkpoint = hl.make_checkpoint(tmp_path / "tiny", "tiny", dtype="fp8", seed=1).folder
    try:
        found = script.measure(checkpoint)
        assert found["one_copy"] and found["outputs_equal"]
        assert found["packed_by_workers"] == [0, 0]
        assert found["private_bytes_of_weights"] == [0, 0]
        assert 0 < found["pss_of_weights_summed_bytes"] <= 1.05 * found["weights_bytes"]
        assert all(0 < private <= cap for private, cap in zip(
            found["other_private_bytes"], found["other_private_cap_bytes"], strict=True
        ))  # fmt: skip
    finally:
        weights_held.release(checkpoint)
