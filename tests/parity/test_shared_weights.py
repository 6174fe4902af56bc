"""Workers on one copy of the packed weights compute alike; the copy is made once, and goes with the last process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab import weights_held
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.runtime import Runtime
from hybridlab.engine.shared_tiles import tiles_index
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.weights_sharing import hold

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux'")
TILES: dict[str, Any] = {"weight_layout": "tiles", "threads": 2}
PATIENCE_S = 60.0


@pytest.fixture
def held(oracle) -> Iterator[weights_held.Held]:
    weights_held.release(oracle.folder)
    yield hold(oracle.folder, idle_s=600.0, threads=2, progress=False)
    weights_held.release(oracle.folder)


def outputs(oracle, engine: hl.Engine) -> list[list[int]]:
    return [list(record.output) for record in engine.serve(oracle.requests()).records]


def memories_of(pid: int) -> set[int]:
    """Inodes of the shared weights that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "/memfd:hybridlab-weights" in line}


def holders_of(memories: set[int]) -> set[int]:
    """Processes that have a descriptor or a mapping of `memories`."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if memories & (memories_of(int(folder.name)) | _open_memories(folder / "fd")):
                found.add(int(folder.name))
    return found


def _open_memories(folder: Path) -> set[int]:
    found = set()
    for path in folder.iterdir():
        with suppress(OSError):  # closed meanwhile, as that of this listing
            if "/memfd:hybridlab-weights" in os.readlink(path):
                found.add(path.stat().st_ino)
    return found


def wait_until(done) -> None:
    patience = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < patience
        time.sleep(0.02)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_worker_process_fills_shared_weights_and_computes_what_a_thread_does(oracle, device):
    num_weights = len(tiles_index(open_checkpoint(oracle.folder)).sizes)
    options = {**TILES, "device": device}
    before = memories_of(os.getpid())  # of engines that are closed and not collected yet
    with oracle.load(worker="thread", **options) as thread, oracle.load(worker="process", **options) as process:
        assert isinstance(thread.runtime, Runtime) and isinstance(process.runtime, WorkerProcess)
        assert (thread.runtime.num_packed, process.runtime.num_packed) == (num_weights, num_weights)
        assert outputs(oracle, process) == outputs(oracle, thread)
        assert process.runtime.pid is not None
        assert len(memories_of(process.runtime.pid)) == 1
        assert memories_of(os.getpid()) <= before


def test_a_worker_that_is_started_again_packs_nothing(oracle):
    with oracle.load(worker="process", **TILES) as engine:
        runtime = engine.runtime
        assert isinstance(runtime, WorkerProcess) and runtime.pid is not None
        expected, pid, memories = outputs(oracle, engine), runtime.pid, memories_of(runtime.pid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: runtime.pid not in (None, pid))
        assert runtime.num_packed == 0
        assert memories_of(runtime.pid) == memories
        assert outputs(oracle, engine) == expected
    wait_until(lambda: not holders_of(memories))


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_loads_attach_to_held_weights_and_pack_nothing(oracle, held, worker):
    with oracle.load(worker="thread", weight_layout="rows", threads=2) as engine:
        expected = outputs(oracle, engine)
    with oracle.load(worker=worker, **TILES) as first, oracle.load(worker="process", **TILES) as second:
        for engine in (first, second):
            assert isinstance(engine.runtime, Runtime | WorkerProcess)
            assert engine.runtime.num_packed == 0
            assert outputs(oracle, engine) == expected
        found = weights_held.find(oracle.folder, "tiles")
        assert found is not None and (found.attached, found.idle_left_s) == (2, None)
    wait_until(lambda: (found := weights_held.find(oracle.folder, "tiles")) is not None and found.attached == 0)


def test_an_engine_goes_on_when_its_holder_is_killed_and_the_next_one_packs(oracle, held):
    with oracle.load(worker="thread", **TILES) as engine:
        expected, memories = outputs(oracle, engine), memories_of(os.getpid())
        os.kill(held.pid, signal.SIGKILL)
        wait_until(lambda: holders_of(memories) == {os.getpid()})
        assert outputs(oracle, engine) == expected
        with oracle.load(worker="thread", **TILES) as other:
            assert isinstance(other.runtime, Runtime) and other.runtime.num_packed > 0
            assert outputs(oracle, other) == expected


def test_held_weights_of_another_checkpoint_are_told_of_and_not_used(oracle, tmp_path, capfd):
    folder = hl.make_checkpoint(tmp_path / "tiny", "tiny", dtype="fp8", seed=1).folder
    hold(folder, idle_s=600.0, threads=2, progress=False)
    try:
        config = folder / "config.json"
        config.write_text(config.read_text() + "\n")
        with hl.load(folder, quiet=True, kv_tokens=256, **TILES) as engine:
            assert isinstance(engine.runtime, Runtime) and engine.runtime.num_packed > 0
        assert "are not used: shared weights: file config.json of the checkpoint has changed" in capfd.readouterr().err
    finally:
        weights_held.release(folder)


def test_nothing_is_left_of_a_parent_that_is_killed(oracle):
    before = set(os.listdir("/dev/shm"))
    script = """if True:
        import sys, time
        import hybridlab as hl
        engine = hl.load(sys.argv[1], worker="process", weight_layout="tiles", threads=2, kv_tokens=256, quiet=True)
        print(engine.runtime.pid, flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", script, str(oracle.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        memories = memories_of(pid)
        assert holders_of(memories) == {pid, parent.pid}
        parent.kill()
    wait_until(lambda: not holders_of(memories))
    assert set(os.listdir("/dev/shm")) <= before
