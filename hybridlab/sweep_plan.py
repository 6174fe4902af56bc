"""`hl.plan`: what an experiment will take, before anything starts.

It makes no checkpoint, loads no model and writes nothing.
"""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.backends import BACKENDS, check_backend, is_made
from hybridlab.config import ExperimentConfig
from hybridlab.errors import ConfigError
from hybridlab.experiment import RETRY, Source, chosen
from hybridlab.jobs import Draft, identify, make_drafts
from hybridlab.prediction import EVIDENCE
from hybridlab.run_costs import Costs
from hybridlab.run_files import find_runs
from hybridlab.stored_run import StoredRun

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30


@dataclass(frozen=True, repr=False)
class SweepPlan:
    """What a call of `hl.sweep` would do. `frame` has one row per run, units in the column names.

    Sizes are in bytes, `predicted_s` counts the runs to do. All times are extrapolated; `predicted_from` says from
    what. `checkpoints` are those to make, with their sizes.
    """

    config: ExperimentConfig
    frame: pd.DataFrame
    memory_budget_bytes: int
    checkpoints: Mapping[Path, int]
    free_disk_bytes: int

    def count(self, status: str) -> int:
        """How many runs are "stored", "failed" (earlier, and left out) or "to do"."""
        return self.frame["status"].tolist().count(status)

    @property
    def predicted_s(self) -> float:
        return self._to_do("predicted_s")

    @property
    def memory_bytes(self) -> int:
        return round(float(self.frame["memory_gib"].to_numpy().max()) * GIB)

    @property
    def disk_bytes(self) -> int:
        return sum(self.checkpoints.values()) + round(self._to_do("disk_gib") * GIB)

    def _to_do(self, column: str) -> float:
        return float(self.frame[column].to_numpy()[self.frame["status"].to_numpy() == "to do"].sum())

    def as_dict(self) -> dict[str, Any]:
        """The totals and the rows as plain data."""
        return {
            "experiment": self.config.experiment,
            "runs": len(self.frame),
            **{status.replace(" ", "_"): self.count(status) for status in ("stored", "failed", "to do")},
            "predicted_s": self.predicted_s,
            "evidence": EVIDENCE,
            "memory_bytes": self.memory_bytes,
            "memory_budget_bytes": self.memory_budget_bytes,
            "disk_bytes": self.disk_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "checkpoints": {str(path): size for path, size in self.checkpoints.items()},
            "frame": json.loads(self.frame.to_json(orient="records") or "[]"),
        }

    def lines(self) -> list[tuple[str, str]]:
        """What the plan says, as (name, text)."""
        failed = f", {self.count('failed')} failed earlier ({RETRY})" if self.count("failed") else ""
        sources = list(dict.fromkeys(self.frame.loc[self.frame["status"] == "to do", "predicted_from"]))
        too_little = ", too little" if self.disk_bytes > self.free_disk_bytes else ""
        found = [
            ("runs", f"{len(self.frame)}: {self.count('stored')} stored{failed}, {self.count('to do')} to do"),
            ("predicted", f"{_duration(self.predicted_s)} ({', '.join([EVIDENCE, *sources])})"),
            ("peak memory", f"{_size(self.memory_bytes)} of {_size(self.memory_budget_bytes)}"),
            ("disk", f"{_size(self.disk_bytes)}; {_size(self.free_disk_bytes)} free{too_little}"),
        ]
        for path, size in self.checkpoints.items():
            found.append(
                ("to make", f"checkpoint {path.name}, {_size(size)}; ids of its runs are known once it is made")
            )
        problems = self.frame.loc[self.frame["problem"] != "", "problem"]
        if len(problems):
            found.append(("will fail", f"{len(problems)} runs; the first: {problems.iloc[0]}"))
        return found

    def __str__(self) -> str:
        body = "\n".join(f"  {name:<12} {text}" for name, text in self.lines())
        return f"{self.config.experiment}\n{body}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{name}</td><td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self.lines()
        )
        return f"<p><b>{html.escape(self.config.experiment)}</b></p><table>{cells}</table>"


def plan(
    config: Source,
    *,
    scheduler: Any = None,
    placement: Any = None,
    overlap: Any = None,
    backend: str = "engine",
    force: bool = False,
    retry_failed: bool = False,
    results_dir: str | Path | None = None,
) -> SweepPlan:
    """What `hl.sweep` with the same arguments would do: runs, predicted seconds, memory and disk.

    Predictions come from stored runs of the same model, engine settings and machine, else from an estimate by the
    host's read bandwidth. Raises what `hl.sweep` would raise before its first run; a run that does not fit the memory
    budget is told in the plan.
    """
    import pandas as pd

    config, results = chosen(config, {"scheduler": scheduler, "placement": placement, "overlap": overlap}, results_dir)
    check_backend(backend)
    if backend == "simulator":
        raise ConfigError("plan: backend 'simulator' takes no machine's time or memory worth planning; run it")
    drafts = make_drafts(config, results)
    jobs = {id(job.draft): job for job in identify([d for d in drafts if is_made(d.checkpoint)], backend)}
    stored = {} if force else find_runs(results / config.experiment, [job.run_id for job in jobs.values()])
    statuses = {}
    for draft in drafts:
        run = stored.get(jobs[id(draft)].run_id) if id(draft) in jobs else None
        status = "to do" if run is None else "stored" if isinstance(run, StoredRun) else "failed"
        statuses[id(draft)] = "to do" if retry_failed and status == "failed" else status
    _check_benches([draft for draft in drafts if statuses[id(draft)] == "to do"], backend)
    costs = Costs(results, list(jobs.values()))
    rows = []
    with config.named_errors():
        for draft in drafts:
            job = jobs.get(id(draft))
            rows.append(
                {
                    **draft.labels,
                    **draft.axes(),
                    "repeat": draft.repeat,
                    **costs.row(draft, job),
                    "status": statuses[id(draft)],
                    "run_id": None if job is None else job.run_id,
                }
            )
        missing = {d.checkpoint: costs.weight_bytes(d) for d in drafts if not is_made(d.checkpoint)}
    return SweepPlan(config, pd.DataFrame(rows), costs.budget_bytes, missing, _free_bytes(results))


def _check_benches(drafts: Sequence[Draft], backend: str) -> None:
    """Raise what would stop every run of an engine: free of cost, and predictions probe with all threads asked for."""
    engines = {(draft.checkpoint, draft.config.engine.model_dump_json()): draft for draft in drafts}
    for draft in engines.values():
        placed = draft.strategies["placement"], draft.strategies["overlap"]
        with draft.config.named_errors():
            BACKENDS[backend](draft.config, draft.checkpoint, *placed, True).check()


def _free_bytes(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
