"""Serve jobs one at a time on a device held alone, and keep what comes of each: a run, or how it failed."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hybridlab import provenance
from hybridlab.backends import BACKENDS, Bench
from hybridlab.device_lock import alone
from hybridlab.errors import StrategyError
from hybridlab.jobs import Job
from hybridlab.metrics import DEFINITIONS, requests_frame
from hybridlab.request import RequestRecord
from hybridlab.run_files import FORMAT, check_writable, find_run, read_run, write_failure, write_run
from hybridlab.serving import Served
from hybridlab.stored_run import FailedRun, StoredRun, spans_frame
from hybridlab.workload import make_requests, warmup_requests

_TRACEBACK_CHARACTERS = 20_000


@dataclass(frozen=True)
class Outcome:
    """What came of a job. `error` is what a failed run raised."""

    job: Job
    run: StoredRun | FailedRun
    error: Exception | None = None


def execute(
    jobs: Sequence[Job], backend: str, folder: Path, *, force: bool, progress: bool
) -> Generator[Outcome, None, None]:
    """Serve `jobs`, those that share an engine together, and store each outcome below `folder` as soon as it is known.

    A run that raises is recorded as failed and the next one starts with an engine of its own. What would stop every
    run of an engine (a device that is not there, a damaged checkpoint) is raised before the first one. Unless
    `force`, a run that another process has finished meanwhile is taken from the store. Raises ConfigError if the
    store cannot be written; closes the engine whatever ends the iteration.
    """
    groups = check_benches(jobs, backend, progress)
    check_writable(folder, [job.run_id for job in jobs])
    with progress_bars(len(jobs), progress) as bars:
        for bench, group in groups:
            with alone(bench.exclusive_device):
                yield from _serve_group(group, bench, folder, force, bars)


def check_benches(jobs: Sequence[Job], backend: str, progress: bool) -> list[tuple[Bench, list[Job]]]:
    """Jobs by the engine that they share, which can serve them as far as is known before it is loaded.

    Raises what would stop every run of an engine.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.engine_key, []).append(job)
    found = []
    for group in groups.values():
        draft = group[0].draft
        placed = _fresh(draft.strategies["placement"]), _fresh(draft.strategies["overlap"])
        bench = BACKENDS[backend](draft.config, draft.checkpoint, *placed, not progress)
        with draft.config.named_errors():
            bench.check()
        found.append((bench, group))
    return found


@dataclass
class _Bars:
    """Progress over runs, and over the requests of one run."""

    runs: Any
    requests: Any

    def start(self, job: Job, num_requests: int, what: str) -> None:
        self.requests.reset(total=num_requests)
        self.requests.set_description(f"{what} {job.draft.labels['scheduler']}")

    def on_event(self, record: RequestRecord, token: int) -> None:
        if record.is_final:
            self.requests.update()


@contextmanager
def progress_bars(num_runs: int, progress: bool) -> Iterator[_Bars]:
    from tqdm.auto import tqdm

    shown = progress and num_runs > 0
    with (
        tqdm(total=num_runs, unit="run", desc="runs", disable=not shown) as runs,
        tqdm(total=0, unit="req", leave=False, disable=not shown) as requests,
    ):
        yield _Bars(runs, requests)


def _serve_group(jobs: Sequence[Job], bench: Bench, folder: Path, force: bool, bars: _Bars) -> Iterator[Outcome]:
    loaded = False
    try:
        for job in jobs:
            path = folder / job.run_id
            if not force and isinstance(found := find_run(path), StoredRun):
                yield Outcome(job, found)
                bars.runs.update()
                continue
            started = datetime.now(UTC)
            try:
                if not loaded:
                    bench.load()
                    loaded = True
                served = _serve(job, bench, bars)
            except Exception as error:
                bench.close()  # a run that broke off may leave an engine in any state
                loaded = False
                manifest = {**_manifest(job, bench, started), **_failure(error)}
                write_failure(path, manifest)
                yield Outcome(job, FailedRun(path, manifest), error)
            else:
                manifest = {
                    **_manifest(job, bench, started),
                    "duration_s": served.duration_s,
                    "num_steps": served.num_steps,
                    "definitions": DEFINITIONS,
                }
                write_run(path, manifest, requests_frame(served.records), spans_frame(served.spans), overwrite=True)
                yield Outcome(job, read_run(path))  # read, so that new and cached runs have the same types
            bars.runs.update()
    finally:
        bench.close()


def _serve(job: Job, bench: Bench, bars: _Bars) -> Served:
    config, scheduler = job.draft.config, job.draft.strategies["scheduler"]
    # A strategy may keep state: each serving starts with one that has seen nothing.
    requests = make_requests(config.workload, bench.vocab, base=config.project_dir)
    if config.warmup_requests:
        warmup = warmup_requests(requests, config.warmup_requests, bench.vocab)
        bars.start(job, len(warmup), "warm-up")
        bench.serve(warmup, _fresh(scheduler), bars.on_event)
    bars.start(job, len(requests), "run")
    return bench.serve(requests, _fresh(scheduler), bars.on_event)


def _fresh(strategy: Any) -> Any:
    """A copy of a strategy as it was given. Raises StrategyError for one that cannot be copied."""
    try:
        return copy.deepcopy(strategy)
    except Exception as error:
        name = type(strategy).__name__
        raise StrategyError(f"{name}: its fields cannot be copied for each run ({one_line(error)})") from None


def _manifest(job: Job, bench: Bench, started: datetime) -> dict[str, Any]:
    config = job.draft.config
    return {
        "format": FORMAT,
        "run_id": job.run_id,
        "experiment": config.experiment,
        "status": "done",
        "evidence": bench.evidence,
        "backend": job.identity["backend"],
        "labels": job.draft.labels,
        "axes": job.draft.axes(),
        "repeat": job.draft.repeat,
        "slo": config.slo.model_dump(),
        "started": started.isoformat(),
        "ended": datetime.now(UTC).isoformat(),
        "config": job.resolved(),
        **{key: job.identity[key] for key in ("strategies", "machine")},
        "identity": {
            **job.identity,
            "strategies": {k: provenance.digest(v) for k, v in job.identity["strategies"].items()},
        },
        "code": provenance.code_version(),
        "versions": provenance.versions(),
    }


def _failure(error: Exception) -> Mapping[str, str]:
    text = "".join(traceback.format_exception(error))
    return {"status": "failed", "error": one_line(error), "traceback": text[-_TRACEBACK_CHARACTERS:]}


def one_line(error: BaseException) -> str:
    """The type and the message of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]
