"""Runs that measure nothing, in several processes: `python -m hybridlab.sweep_processes`, started by `execute_beside`.

A process is given the config, then one id of a run after the other, each once the last one is in the store. A run is
the same to the last byte whichever process computes it.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hybridlab.config import ExperimentConfig, load_config
from hybridlab.errors import ConfigError, HybridlabError
from hybridlab.execution import Outcome, check_benches, execute, progress_bars
from hybridlab.jobs import Job, identify, make_drafts
from hybridlab.run_files import check_writable, find_run
from hybridlab.stored_run import FailedRun

_PR_SET_PDEATHSIG = 1
_COMMAND = (sys.executable, "-P", "-m", "hybridlab.sweep_processes")


def check_processes(processes: Any, backend: str) -> None:
    """Raises ConfigError for a number of processes that cannot be."""
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ConfigError(f"processes is {processes!r}, expected a whole number from 1")
    if processes > 1 and backend != "simulator":
        raise ConfigError(f"processes is {processes}, backend {backend!r} measures one run at a time: expected 1")


def execute_beside(
    config: ExperimentConfig,
    results: Path,
    jobs: Sequence[Job],
    backend: str,
    folder: Path,
    *,
    processes: int,
    force: bool,
    progress: bool,
) -> Generator[Outcome, None, None]:
    """As `execution.execute`, by `processes` children; outcomes come in the order in which they end.

    Raises ConfigError for strategies given as objects, which no other process can have.
    """
    check_benches(jobs, backend, progress)
    check_writable(folder, [job.run_id for job in jobs])
    setup = _setup(config, results, backend, force)
    by_id, waiting, ended = {job.run_id: job for job in jobs}, queue.SimpleQueue(), queue.SimpleQueue()
    for run_id in by_id:
        waiting.put(run_id)
    with progress_bars(len(jobs), progress) as bars, _children(min(processes, len(jobs))) as children:
        for child in children:
            threading.Thread(target=_feed, args=(child, setup, waiting, ended), daemon=True).start()
        for _ in by_id:
            run_id, problem = ended.get()
            if problem:
                raise HybridlabError(f"a process of the sweep {problem}")
            if (run := find_run(folder / run_id)) is None:
                raise HybridlabError(f"{folder / run_id}: the process of the sweep left no run there")
            error = HybridlabError(run.error) if isinstance(run, FailedRun) else None
            yield Outcome(by_id[run_id], run, error)
            bars.runs.update()


def _setup(config: ExperimentConfig, results: Path, backend: str, force: bool) -> str:
    source = None if config.source == "config" else str(Path(config.source).absolute())
    given = {"config": config.to_dict(), "source": source, "results": str(results.absolute()), "path": sys.path}
    try:
        return json.dumps({**given, "backend": backend, "force": force, "parent": os.getpid()})
    except TypeError:
        raise ConfigError(
            "processes: a strategy is given as an object, which other processes do not have; expected names or "
            "{class: 'module:Class'}, or processes=1"
        ) from None


@contextmanager
def _children(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """They do not get the terminal's Ctrl-C, and end with the block."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    children: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            children.append(subprocess.Popen(_COMMAND, text=True, process_group=0, **pipes))
        yield children
    finally:
        for child in children:
            child.kill()  # whatever it writes appears whole or not at all
        for child in children:
            child.wait()


def _feed(child: subprocess.Popen[str], setup: str, waiting: queue.SimpleQueue, ended: queue.SimpleQueue) -> None:
    """Give a child one run after the other, on a thread of its own; puts (run id, what went wrong or "")."""
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    try:
        child.stdin.write(setup + "\n")
        while True:
            try:
                run_id = waiting.get_nowait()
            except queue.Empty:
                return
            child.stdin.write(run_id + "\n")
            child.stdin.flush()
            if child.stdout.readline().strip() != run_id:
                break
            ended.put((run_id, ""))
    except (OSError, ValueError):
        pass  # it has ended
    said = child.stderr.read().strip().splitlines()
    ended.put(("", f"ended with status {child.wait()}: {said[-1] if said else 'no message'}"))


def serve(lines: IO[str], answers: IO[str]) -> None:
    """The child: compute the runs that are named until there are no more lines."""
    given = json.loads(lines.readline())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != given["parent"]:
        return
    sys.path[:] = given["path"]
    config = load_config(given["config"])
    config._source = given["source"] and Path(given["source"])
    results = Path(given["results"])
    jobs = {job.run_id: job for job in identify(make_drafts(config, results), given["backend"])}
    for line in lines:
        run_id = line.strip()
        if run_id not in jobs:
            raise HybridlabError(f"run {run_id} is unknown: the code has changed since the sweep began")
        folder = results / config.experiment
        for _ in execute([jobs[run_id]], given["backend"], folder, force=given["force"], progress=False):
            pass
        print(run_id, file=answers, flush=True)


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed is no answer
    serve(sys.stdin, answers)
