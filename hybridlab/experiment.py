"""`hl.run` and `hl.sweep`: a config in, a table out. Runs each point of the sweep, or takes it from the store."""

from __future__ import annotations

import html
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.backends import BACKENDS, check_backend, is_made, make_missing
from hybridlab.config import ExperimentConfig, load_config
from hybridlab.device_lock import alone
from hybridlab.errors import HybridlabError
from hybridlab.execution import Outcome, execute
from hybridlab.jobs import Draft, Job, identify, make_drafts
from hybridlab.run_files import find_runs
from hybridlab.store import settings
from hybridlab.stored_run import FailedRun, StoredRun
from hybridlab.summary_table import TABLE_METRICS, axes_of, short_table
from hybridlab.sweep_processes import check_processes, execute_beside

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TABLE_METRICS", "ExperimentResult", "run", "sweep"]
RETRY = "retry_failed=True or --retry-failed runs them again"

Source = str | Path | Mapping[str, Any] | ExperimentConfig


@dataclass(frozen=True, repr=False)
class ExperimentResult:
    """Tables: `summary` has a row per run, `requests` a row per request, `spans` a row per op kept.

    All three carry `run_id`, `evidence`, the scheduler and what else differs between runs; units are in the names.
    `paths` are the folders of the runs, `cached` the ids of those that were in the store before. Runs that failed are
    in `failed` alone.
    """

    config: ExperimentConfig
    summary: pd.DataFrame
    requests: pd.DataFrame
    spans: pd.DataFrame
    paths: list[Path]
    cached: tuple[str, ...]
    failed: tuple[FailedRun, ...] = ()

    @property
    def table(self) -> pd.DataFrame:
        """What differs between runs, and the metrics that one looks at first; `summary` has them all."""
        return short_table(self.summary)

    def __repr__(self) -> str:
        counts = f"{len(self.paths)} runs, {len(self.cached)} cached"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"ExperimentResult({self.config.experiment!r}, {counts}{failed})"

    def _repr_html_(self) -> str:
        title = html.escape(f"{self.config.experiment}: {len(self.paths)} runs, SLO {self.config.slo}")
        where = html.escape(_shown(self.paths[0].parent, self.config)) if self.paths else ""
        cached = f", {len(self.cached)} cached (force=True reruns)" if self.cached else ""
        failed = f", {len(self.failed)} failed ({RETRY})" if self.failed else ""
        table = self.table.to_html(index=False, float_format=lambda x: f"{x:.4g}", border=0)
        # Long column names may break, so that the table is no wider than a notebook.
        table = re.sub("<th>.*?</th>", lambda head: re.sub("[_.]", r"\g<0><wbr>", head[0]), table)
        return f"<p><b>{title}</b></p>{table}<p>in {where}{cached}{failed}</p>"


def sweep(
    config: Source,
    *,
    scheduler: Any = None,
    placement: Any = None,
    overlap: Any = None,
    backend: str = "engine",
    force: bool = False,
    retry_failed: bool = False,
    results_dir: str | Path | None = None,
    processes: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Like `run`, but returns the summary alone: one tidy row per run, units in the column names."""
    return run(
        config,
        scheduler=scheduler,
        placement=placement,
        overlap=overlap,
        backend=backend,
        force=force,
        retry_failed=retry_failed,
        results_dir=results_dir,
        processes=processes,
        progress=progress,
    ).summary


def run(
    config: Source,
    *,
    scheduler: Any = None,
    placement: Any = None,
    overlap: Any = None,
    backend: str = "engine",
    force: bool = False,
    retry_failed: bool = False,
    results_dir: str | Path | None = None,
    processes: int = 1,
    progress: bool = True,
) -> ExperimentResult:
    """Run every point of an experiment that is not in the store yet, one at a time, and return all of them.

    A strategy given here (object, name or mapping) replaces the config's and its sweep axes. Results go to
    `results_dir` (default: `results/` of the project; see hybridlab.config). `force` runs again what is stored. What
    was killed or interrupted resumes when it is called again.

    A run that fails is recorded and left out from then on, until `retry_failed`; the others go on, and a warning
    counts the failed ones. If every run failed, the first error is raised. Everything that can be is checked before
    the first run; raises ConfigError, StrategyError or CheckpointError in one line. Simulated runs may go to several
    `processes`, with the same results.
    """
    config, results = chosen(config, {"scheduler": scheduler, "placement": placement, "overlap": overlap}, results_dir)
    check_backend(backend)
    check_processes(processes, backend)
    drafts = make_drafts(config, results)
    _make_checkpoints(drafts, backend, progress)
    jobs = identify(drafts, backend)
    folder = results / config.experiment
    found = {} if force else find_runs(folder, [job.run_id for job in jobs])
    kept = {run_id: run for run_id, run in found.items() if isinstance(run, StoredRun) or not retry_failed}
    missing = list({job.run_id: job for job in jobs if job.run_id not in kept}.values())
    if progress:
        _say_skipped(kept, len(jobs), _shown(folder, config))
    outcomes: list[Outcome] = []
    # Closed at once, whatever ends the loop: with it go the engine and the device's lock.
    how: Any = {"force": force, "progress": progress}
    if processes > 1 and len(missing) > 1:
        executing = closing(execute_beside(config, results, missing, backend, folder, processes=processes, **how))
    else:
        executing = closing(execute(missing, backend, folder, **how))
    with _interrupt_counted(len(missing), outcomes), executing as finished:
        for outcome in finished:
            outcomes.append(outcome)
    runs = kept | {outcome.job.run_id: outcome.run for outcome in outcomes}
    _tell_failures(config, list(runs.values()), outcomes)
    cached = tuple(run_id for run_id, run in kept.items() if isinstance(run, StoredRun))
    return _collect(config, jobs, runs, cached)


def chosen(
    config: Source, strategies: Mapping[str, Any], results_dir: str | Path | None
) -> tuple[ExperimentConfig, Path]:
    """The checked config with the strategies that are not None in place of its own, and where its results go."""
    found = load_config(config).replaced({kind: value for kind, value in strategies.items() if value is not None})
    return found, Path(results_dir) if results_dir is not None else found.project_dir / "results"


def _make_checkpoints(drafts: Sequence[Draft], backend: str, progress: bool) -> None:
    missing = {(d.checkpoint, d.config.engine.model_dump_json()): d for d in drafts if not is_made(d.checkpoint)}
    benches = []
    for draft in missing.values():
        placed = draft.strategies["placement"], draft.strategies["overlap"]
        benches.append(BACKENDS[backend](draft.config, draft.checkpoint, *placed, not progress))
        with draft.config.named_errors():
            benches[-1].check()
    for draft, bench in zip(missing.values(), benches, strict=True):
        if not bench.needs_checkpoint:
            continue
        # Writing gigabytes beside another process's measurement would disturb it, too.
        with alone(bench.exclusive_device), draft.config.named_errors():
            make_missing(draft.config.model, draft.checkpoint, progress=progress)


def _say_skipped(kept: Mapping[str, StoredRun | FailedRun], total: int, where: str) -> None:
    failed = sum(isinstance(run, FailedRun) for run in kept.values())
    if cached := len(kept) - failed:
        print(f"cached: {cached} of {total} runs from {where} (force=True reruns)", flush=True)
    if failed:
        print(f"failed earlier: {failed} of {total} runs left out ({RETRY})", flush=True)


@contextmanager
def _interrupt_counted(total: int, outcomes: Sequence[Outcome]) -> Iterator[None]:
    """An interrupt says how far the sweep has come."""
    try:
        yield
    except KeyboardInterrupt:
        done = f"{len(outcomes)} of {total} runs are done and stored; calling again resumes"
        print(f"hybridlab: interrupted; {done}", file=sys.stderr, flush=True)
        raise


def _tell_failures(
    config: ExperimentConfig, runs: Sequence[StoredRun | FailedRun], outcomes: Sequence[Outcome]
) -> None:
    """Warn of failed runs; raise the first error if there are no others."""
    failed = [run for run in runs if isinstance(run, FailedRun)]
    if not failed:
        return
    if len(failed) < len(runs):
        said = f"{config.experiment}: {len(failed)} of {len(runs)} runs failed ({RETRY}); the first: {failed[0].error}"
        warnings.warn(said, stacklevel=3)
        return
    error = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    if error is None:
        every = "the run" if len(failed) == 1 else f"all {len(failed)} runs"
        raise config.named(HybridlabError(f"{every} failed earlier ({RETRY}): {failed[0].error}"))
    raise config.named(error) if isinstance(error, HybridlabError) else error


def _collect(
    config: ExperimentConfig,
    jobs: Sequence[Job],
    runs: Mapping[str, StoredRun | FailedRun],
    cached: tuple[str, ...],
) -> ExperimentResult:
    import pandas as pd

    keys = list(dict.fromkeys(key for job in jobs for key in job.draft.axes()))
    rows, stored = [], {}
    for job in jobs:
        run = runs[job.run_id]
        if isinstance(run, FailedRun):
            continue
        # A cached run may have been stored under other axes; this experiment's axes hold here.
        axes = settings({"axes": job.draft.axes(), "config": job.resolved()}, keys)
        shown = replace(run, manifest={**run.manifest, "labels": job.draft.labels, "axes": axes})
        rows.append(shown.row(config.slo))
        stored.setdefault(run.run_id, (run, rows[-1]))
    summary = pd.DataFrame(rows)
    told = [*axes_of(summary), "evidence", "run_id"]

    def joined(name: str) -> pd.DataFrame:
        """The table `name` of every run, with what tells the runs apart."""
        parts = [getattr(run, name).assign(**{axis: row[axis] for axis in told}) for run, row in stored.values()]
        return pd.concat(parts, ignore_index=True)

    paths = [run.path for run, _ in stored.values()]
    failed = tuple(run for run in runs.values() if isinstance(run, FailedRun))
    return ExperimentResult(config, summary, joined("requests"), joined("spans"), paths, cached, failed)


def _shown(path: Path, config: ExperimentConfig) -> str:
    """`path` as seen from the project, where it lies inside."""
    inside = path.is_relative_to(config.project_dir)
    return (path.relative_to(config.project_dir) if inside else path).as_posix()
