"""One measured run at a time per device, over processes; no lock outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hybridlab import backends, device_lock, experiment
from hybridlab.device_lock import alone, alone_if_free

# Holds the lock, says so, and releases it when its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from hybridlab import device_lock
device_lock.lock_folder = lambda: Path(sys.argv[1])
with device_lock.alone("cpu"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(device_lock, "lock_folder", lambda: tmp_path)
    monkeypatch.setattr(device_lock, "_POLL_S", 0.01)
    return tmp_path


@pytest.fixture
def other(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the cpu."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_waited_for(other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def wait() -> None:
        with alone("cpu"):
            order.append("got it")

    thread = threading.Thread(target=wait)
    thread.start()
    said = ""
    while not said:
        time.sleep(0.01)
        said = capsys.readouterr().err
    assert said.startswith(f"hybridlab: waiting for the cpu: process {other.pid} measures on it since ")
    with alone_if_free("cpu") as free, alone("other device"), alone(None):
        assert not free
    order.append("released")
    other.communicate("")
    thread.join()
    assert order == ["released", "got it"]


def test_kill_9_releases_it(other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    with alone_if_free("cpu") as free:
        assert free
    with alone("cpu"):
        pass
    assert capsys.readouterr().err == ""


def test_an_exception_releases_it(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), alone("cpu"):
        raise KeyboardInterrupt
    with alone_if_free("cpu") as free:
        assert free


def test_another_thread_waits_as_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside, most, seen = [0], [0], []

    def measure() -> None:
        with alone("cpu"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1
            seen.append(1)

    threads = [threading.Thread(target=measure) for _ in range(4)]
    told, deadline_s = "", time.monotonic() + 60
    with alone("cpu"):  # its note is written before any of them looks for it
        for thread in threads:
            thread.start()
        while told.count("\n") < 4 and time.monotonic() < deadline_s:
            told += capsys.readouterr().err
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert (most, len(seen)) == ([1], 4)
    assert "another run of this process measures on it" in told


def test_the_files_are_everybodys(folder: Path) -> None:
    with alone("cpu"):
        pass
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes["hybridlab-cpu.holder"] == 0o666
    assert modes["hybridlab-cpu.lock"] & 0o600 == 0o600
    (folder / "hybridlab-cpu.holder").write_text("{torn")
    with alone("cpu"):  # a note that cannot be read is no obstacle
        assert f'"pid": {os.getpid()}' in (folder / "hybridlab-cpu.holder").read_text()


def test_without_a_place_for_locks_it_warns_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lock, "lock_folder", lambda: folder / "nowhere" / "file")
    (folder / "nowhere").write_text("")
    with pytest.warns(UserWarning, match=r"hybridlab-cpu\.lock: no lock .*others may measure beside"), alone("cpu"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the two sweeps are forked processes; Windows has no fork")
def test_runs_of_two_processes_never_overlap(
    bench: list[str], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sweeps of the same runs at once, loading included: one works at a time, and each run is made once."""
    log = tmp_path / "log"
    fake: Any = backends.BACKENDS["engine"]

    class Exclusive(fake):
        exclusive_device = "cpu"

        def note(self, what: str) -> None:
            with log.open("a") as file:
                file.write(f"{os.getpid()} {what}\n")

        def load(self) -> None:
            super().load()
            self.note("load")

        def serve(self, *arguments: Any) -> Any:
            time.sleep(0.02)
            served = super().serve(*arguments)
            self.note("serve")
            return served

        def close(self) -> None:
            if self.loaded:
                self.note("close")
            super().close()

    monkeypatch.setitem(backends.BACKENDS, "engine", Exclusive)
    sweep = {**config, "sweep": {"workload.num_requests": [1, 2, 3, 4]}}
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                experiment.run(sweep, progress=False)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    events = [line.split() for line in log.read_text().splitlines()]
    assert sum(what == "serve" for _, what in events) == 4  # the second one took them from the store
    holder = None
    for pid, what in events:
        assert holder in (None, pid)
        holder = None if what == "close" else pid
