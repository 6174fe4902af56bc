"""A run is in the store whole or not at all, whatever fails or kills the process at whichever system call."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hybridlab import experiment
from hybridlab.errors import ConfigError
from hybridlab.run_files import FailedRun, find_runs, read_any, read_run, write_failure, write_run
from hybridlab.store import results

CALLS = ("mkdir", "open", "write", "fsync", "rename", "close", "unlink", "rmdir")
GROWING = ("mkdir", "open", "write", "fsync", "rename")  # what a full disk refuses
Write = Callable[[Path], None]


def run(config: Any, **keys: Any) -> experiment.ExperimentResult:
    return experiment.run(config, **{"progress": False, **keys})


@contextmanager
def at_call(number: int, act: Callable[[str, Any], Any], calls: tuple[str, ...] = CALLS) -> Iterator[list[str]]:
    """Call `act(name, first argument)` in place of the system call of that number (from 0); yields what was called.

    os.write gets through half of its data before.
    """
    made: list[str] = []
    patch = pytest.MonkeyPatch()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keys: Any) -> Any:
            if calls is GROWING and name == "open" and not arguments[1] & os.O_CREAT:
                return original(*arguments, **keys)  # reading needs no room
            made.append(name)
            if len(made) - 1 == number:
                if name == "write":
                    original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                return act(name, arguments[0])
            return original(*arguments, **keys)

        return call

    try:
        for name in calls:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield made
    finally:
        patch.undo()


def num_calls(write: Write, folder: Path, calls: tuple[str, ...] = CALLS) -> int:
    with at_call(-1, lambda *_: None, calls) as made:
        write(folder)
    return len(made)


@pytest.fixture
def stored(bench: list[str], config: dict[str, Any]) -> Path:
    """The folder of a run."""
    return run(config).paths[0]


def writer(stored: Path, **changes: Any) -> Write:
    """Writes the run of `stored` again, with another manifest."""
    old = read_run(stored)
    assert len(old.spans)  # read now: the folder changes

    def write(folder: Path) -> None:
        manifest = {**old.manifest, **changes, "run_id": folder.name}
        write_run(folder, manifest, old.requests, old.spans, overwrite=True)

    return write


def full_disk(name: str, what: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", ["nothing", "a run"])
def test_a_disk_that_fills_at_any_call_leaves_the_store_as_it_was(stored: Path, before: str) -> None:
    write, parent = writer(stored, num_steps=99), stored.parent
    like = parent / "ffffffffffff"
    folder = stored if before == "a run" else parent / "0123456789ab"
    if before == "a run":
        write(like)
    calls, old = num_calls(write, like, GROWING), read_run(stored).manifest
    assert calls >= 10
    for number in range(1, calls):  # 0 makes the experiment's folder, which is there
        with at_call(number, full_disk, GROWING), pytest.raises(ConfigError) as caught:
            write(folder)
        assert str(caught.value) == f"{folder}: cannot be written (No space left on device)"
        assert [p.name for p in parent.iterdir() if p.name.startswith(".")] == []
        if number == calls - 1:  # making the rename last: the run is whole by then
            assert read_run(folder).manifest["num_steps"] == 99
        elif before == "nothing":
            assert not folder.exists()
        else:
            assert read_run(folder).manifest == old


def test_a_disk_that_is_full_stops_the_sweep_in_one_line(stored: Path, config: dict[str, Any]) -> None:
    sweep = {**config, "sweep": {"workload.num_requests": [1, 2, 3]}}
    with (
        at_call(4, full_disk, ("write", "fsync")),
        pytest.raises(ConfigError, match=r"cannot be written \(No space left"),
    ):
        run(sweep)
    with warnings.catch_warnings(action="error"):
        assert len(results("question")) >= 1
    assert len(run(sweep).summary) == 3 and not find_failed(stored.parent)


def find_failed(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if isinstance(read_any(path), FailedRun)]


def killed(write: Write, folder: Path, number: int) -> bool:
    """Whether a child process that kills itself at call `number` of `write` was killed there."""
    pid = os.fork()
    if pid == 0:
        try:
            with at_call(number, lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
                write(folder)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends a forked process at a chosen moment; Windows has no fork")
@pytest.mark.parametrize("before", ["nothing", "a run", "a failed run"])
def test_kill_9_at_any_call_leaves_a_clean_store(stored: Path, config: dict[str, Any], before: str) -> None:
    parent, folder = stored.parent, stored
    old = read_run(stored)
    assert len(old.spans)  # read now: the folder changes
    write = writer(stored, num_steps=99)

    def reset() -> None:
        for path in parent.iterdir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        if before == "a run":
            write_run(folder, old.manifest, old.requests, old.spans)
        elif before == "a failed run":
            write_failure(folder, {**old.manifest, "status": "failed", "error": "X: y"})

    outcomes = []
    for number in range(1000):
        reset()
        if not killed(write, folder, number):
            break
        with warnings.catch_warnings(action="error"):
            found = find_runs(parent, [folder.name]).get(folder.name)
            table = results("question", failed=True)
        if found is None:
            assert before == "nothing" and len(table) == 0
            outcomes.append("none")
            assert len(run(config).cached) == 0  # resumes
        else:
            assert len(table) == 1
            outcomes.append("failed" if isinstance(found, FailedRun) else str(found.manifest["num_steps"]))
        assert find_runs(parent, [folder.name])
    assert number >= 15
    # First what was there, from the rename on what was written, and nothing ever in between.
    first = {"nothing": "none", "a run": str(old.manifest["num_steps"]), "a failed run": "failed"}[before]
    change = outcomes.index("99")
    assert outcomes == [first] * change + ["99"] * (len(outcomes) - change) and change > 5


def test_an_interrupt_between_the_two_renames_keeps_the_old_run(stored: Path) -> None:
    write = writer(stored, num_steps=99)
    renames = 0

    def interrupt(name: str, what: Any) -> None:
        raise KeyboardInterrupt

    for number in range(3):
        with at_call(number, interrupt, ("rename",)) as made, pytest.raises(KeyboardInterrupt):
            write(stored)
        renames = max(renames, len(made))
        assert read_run(stored).manifest["num_steps"] != 99
        assert [p.name for p in stored.parent.iterdir()] == [stored.name]
    assert renames >= 3
    write(stored)
    assert read_run(stored).manifest["num_steps"] == 99


def test_another_process_that_restores_the_old_run_meanwhile_is_no_problem(stored: Path) -> None:
    write, original = writer(stored, num_steps=99), os.rename
    restored = []

    def rename(source: Any, target: Any) -> None:
        original(source, target)
        if Path(target).name.startswith(".old-") and not restored:
            original(target, source)  # what `restore_replaced` of a reader does
            restored.append(source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", rename)
        write(stored)
    assert restored and read_run(stored).manifest["num_steps"] == 99
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]
