"""`hl.run`: a config in, a table out. Runs each point of the sweep, or takes it from the store."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab import provenance
from hybridlab.backends import BACKENDS, Bench
from hybridlab.config import ExperimentConfig, load_config
from hybridlab.errors import ConfigError
from hybridlab.jobs import Job, plan_jobs
from hybridlab.metrics import DEFINITIONS, requests_frame
from hybridlab.request import RequestRecord
from hybridlab.sections import did_you_mean
from hybridlab.store import FORMAT, StoredRun, read_run, spans_frame, write_run
from hybridlab.workload import make_requests, warmup_requests

if TYPE_CHECKING:
    import pandas as pd

TABLE_METRICS = ("median_ttft_s", "p99_ttft_s", "median_tpot_s", "output_tokens_per_s", "request_goodput_req_s")


@dataclass(frozen=True, repr=False)
class ExperimentResult:
    """Tables: `summary` has a row per run, `requests` a row per request, `spans` a row per op kept.

    All three carry `run_id`, `evidence`, the scheduler and what else differs between runs; units are in the names.
    `paths` are the folders of the runs, `cached` the ids of those that were in the store before.
    """

    config: ExperimentConfig
    summary: pd.DataFrame
    requests: pd.DataFrame
    spans: pd.DataFrame
    paths: list[Path]
    cached: tuple[str, ...]

    @property
    def table(self) -> pd.DataFrame:
        """What differs between runs, and the metrics that one looks at first; `summary` has them all.

        `completed` and `evidence` are there if some requests did not complete or some runs were not measured.
        """
        whole = self.summary["completed"].tolist() == self.summary["num_requests"].tolist()
        measured = set(self.summary["evidence"].tolist()) <= {"measured"}
        extra = [*([] if whole else ["completed"]), *([] if measured else ["evidence"])]
        return self.summary.loc[:, [*_axes(self.summary), *TABLE_METRICS, *extra]]

    def __repr__(self) -> str:
        return f"ExperimentResult({self.config.experiment!r}, {len(self.paths)} runs, {len(self.cached)} cached)"

    def _repr_html_(self) -> str:
        title = html.escape(f"{self.config.experiment}: {len(self.paths)} runs, SLO {self.config.slo}")
        where = html.escape(_shown(self.paths[0].parent, self.config)) if self.paths else ""
        cached = f", {len(self.cached)} cached (force=True reruns)" if self.cached else ""
        table = self.table.to_html(index=False, float_format=lambda x: f"{x:.4g}", border=0)
        # Long column names may break, so that the table is no wider than a notebook.
        table = re.sub("<th>.*?</th>", lambda head: re.sub("[_.]", r"\g<0><wbr>", head[0]), table)
        return f"<p><b>{title}</b></p>{table}<p>in {where}{cached}</p>"


def run(
    config: str | Path | Mapping[str, Any] | ExperimentConfig,
    *,
    scheduler: Any = None,
    placement: Any = None,
    overlap: Any = None,
    backend: str = "engine",
    force: bool = False,
    results_dir: str | Path | None = None,
    progress: bool = True,
) -> ExperimentResult:
    """Run every point of an experiment that is not in the store yet, one at a time, and return all of them.

    A strategy given here (object, name or mapping) replaces the config's and its sweep axes. Results go to
    `results_dir` (default: `results/` of the project; see hybridlab.config). `force` runs again what is
    stored. Everything is checked before the first run; raises ConfigError, StrategyError or CheckpointError
    in one line.
    """
    overrides = {"scheduler": scheduler, "placement": placement, "overlap": overlap}
    config = load_config(config).replaced({k: v for k, v in overrides.items() if v is not None})
    if backend not in BACKENDS:
        raise ConfigError(f"backend: unknown {backend!r}{did_you_mean(str(backend), BACKENDS)}")
    results = Path(results_dir) if results_dir is not None else config.project_dir / "results"
    jobs = plan_jobs(config, backend, results, progress)
    folder = results / config.experiment
    stored = {} if force else {job.run_id: found for job in jobs if (found := _find(folder / job.run_id))}
    cached = tuple(stored)
    if cached and progress:
        print(
            f"cached: {len(cached)} of {len(jobs)} runs from {_shown(folder, config)} (force=True reruns)", flush=True
        )
    missing = {job.run_id: job for job in jobs if job.run_id not in stored}
    for job, run in _execute(list(missing.values()), backend, folder, progress):
        stored[job.run_id] = run
    return _collect(config, jobs, stored, cached)


def _find(folder: Path) -> StoredRun | None:
    try:
        return read_run(folder) if folder.is_dir() else None
    except ConfigError:
        return None  # a damaged run counts as missing and is written anew


def _execute(jobs: Sequence[Job], backend: str, folder: Path, progress: bool) -> Iterator[tuple[Job, StoredRun]]:
    from tqdm.auto import tqdm

    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.engine_key, []).append(job)
    total = sum(job.point.config.workload.num_requests for job in jobs)
    with tqdm(total=total, unit="req", disable=not progress or not jobs) as bar:
        finished = 0
        for group in groups.values():
            first = group[0]
            placed = first.strategies["placement"], first.strategies["overlap"]
            bench = BACKENDS[backend](first.point.config, first.checkpoint, *placed, not progress)
            try:
                for job in group:
                    finished += 1
                    bar.set_description(f"run {finished}/{len(jobs)} {job.labels()['scheduler']}")
                    yield job, _run_one(job, bench, folder, bar)
            finally:
                bench.close()


def _run_one(job: Job, bench: Bench, folder: Path, bar: Any) -> StoredRun:
    config = job.point.config
    requests = make_requests(config.workload, bench.vocab, base=config.project_dir)
    scheduler = job.strategies["scheduler"]
    if config.warmup_requests:
        warmup = warmup_requests(requests, config.warmup_requests, bench.vocab)
        bench.serve(warmup, scheduler, lambda record, token: None)
    before = bar.n

    def on_event(record: RequestRecord, token: int) -> None:
        if record.is_final:
            bar.update()

    started = datetime.now(UTC)
    served = bench.serve(requests, scheduler, on_event)
    bar.update(before + len(requests) - bar.n)  # rejected requests draw no token
    manifest = {
        "format": FORMAT,
        "run_id": job.run_id,
        "experiment": config.experiment,
        "evidence": bench.evidence,
        "backend": job.identity["backend"],
        "labels": job.labels(),
        "axes": job.axes(),
        "repeat": job.repeat,
        "duration_s": served.duration_s,
        "num_steps": served.num_steps,
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
        "definitions": DEFINITIONS,
    }
    path = folder / job.run_id
    write_run(path, manifest, requests_frame(served.records), spans_frame(served.spans), overwrite=True)
    return read_run(path)  # so that new and cached runs have the same types


def _collect(
    config: ExperimentConfig, jobs: Sequence[Job], stored: Mapping[str, StoredRun], cached: tuple[str, ...]
) -> ExperimentResult:
    import pandas as pd

    rows, runs = [], {}
    for job in jobs:
        run = stored[job.run_id]
        # A cached run may have been stored under other axes; this experiment's axes hold here.
        shown = replace(run, manifest={**run.manifest, "labels": job.labels(), "axes": job.axes()})
        rows.append(shown.row(config.slo))
        runs.setdefault(run.run_id, (run, rows[-1]))
    summary = pd.DataFrame(rows)
    told = [*_axes(summary), "evidence", "run_id"]

    def joined(name: str) -> pd.DataFrame:
        """The table `name` of every run, with what tells the runs apart."""
        parts = [getattr(run, name).assign(**{axis: row[axis] for axis in told}) for run, row in runs.values()]
        return pd.concat(parts, ignore_index=True)

    paths = [run.path for run, _ in runs.values()]
    return ExperimentResult(config, summary, joined("requests"), joined("spans"), paths=paths, cached=cached)


def _axes(summary: pd.DataFrame) -> list[str]:
    """The columns of `summary` that say what ran: the scheduler, and what differs between runs."""
    named = [c for c in summary.columns[: summary.columns.get_loc("num_requests")] if c != "experiment"]
    distinct = {name: len(set(summary[name].tolist())) for name in named}
    # The label of the workload repeats what its swept keys say.
    told = {"workload"} if any(name.startswith("workload.") for name in named) else set()
    return [name for name in named if name == "scheduler" or (distinct[name] > 1 and name not in told)]


def _shown(path: Path, config: ExperimentConfig) -> str:
    """`path` as seen from the project, where it lies inside."""
    inside = path.is_relative_to(config.project_dir)
    return (path.relative_to(config.project_dir) if inside else path).as_posix()
