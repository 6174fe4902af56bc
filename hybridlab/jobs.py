"""The runs of an experiment before they start: what each is, and the id under which its result is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridlab import provenance
from hybridlab.backends import checkpoint_of
from hybridlab.config import STRATEGIES, ExperimentConfig, Point, points
from hybridlab.strategies import registry
from hybridlab.workload import load_rows


@dataclass(frozen=True)
class Job:
    """One run to be: a point of the sweep, a repeat, the strategies, and the identity of the result."""

    point: Point
    repeat: int
    strategies: Mapping[str, Any]
    checkpoint: Path
    identity: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        return provenance.digest(self.identity)

    @property
    def engine_key(self) -> str:
        """Jobs with equal keys share one loaded engine."""
        own = {key: self.identity[key] for key in ("backend", "model", "engine")}
        return provenance.digest(
            [own, self.identity["strategies"]["placement"], self.identity["strategies"]["overlap"]]
        )

    def labels(self) -> dict[str, str]:
        """The columns that say what ran, readable."""
        config = self.point.config
        return {
            "model": config.model.preset or Path(config.model.path or "").name,
            "workload": _workload_label(config),
            **{kind: _strategy_label(getattr(config, kind), self.strategies[kind]) for kind in STRATEGIES},
            "precision": config.engine.precision,
            "device": config.engine.device or "auto",
        }

    def axes(self) -> dict[str, Any]:
        """The swept keys and values; whole strategies are left to their label."""
        plain = (str, int, float, bool, type(None))
        return {
            key: value if isinstance(value, plain) else repr(value)
            for key, value in self.point.axes.items()
            if key not in STRATEGIES
        }

    def resolved(self) -> dict[str, Any]:
        """The config of this run with every default filled in."""
        config = self.point.config
        sections = {name: getattr(config, name).model_dump() for name in ("model", "workload", "engine")}
        strategies = {kind: self.identity["strategies"][kind]["fields"] for kind in STRATEGIES}
        return {
            "experiment": config.experiment,
            **sections,
            **strategies,
            "warmup_requests": config.warmup_requests,
        }


def plan_jobs(config: ExperimentConfig, backend: str, results: Path, progress: bool) -> list[Job]:
    """Every run; repeats are outermost so that a slow drift of the machine spreads over the points."""
    base = config.project_dir
    prepared = []
    for point in points(config):
        # The cheap checks of all points come first: nothing has run or been made if one of them fails.
        strategies = {kind: registry.resolve(kind, getattr(point.config, kind)) for kind in STRATEGIES}
        load_rows(point.config.workload, base)
        prepared.append((point, strategies))
    jobs = []
    for point, strategies in prepared:
        checkpoint = checkpoint_of(point.config.model, results, base, progress=progress)
        identity = _identity(point.config, strategies, checkpoint, backend, base)
        jobs.append(Job(point, 0, strategies, checkpoint, identity))
    return [
        replace(job, repeat=repeat, identity={**job.identity, "repeat": repeat})
        for repeat in range(config.repeats)
        for job in jobs
    ]


def _identity(
    config: ExperimentConfig, strategies: Mapping[str, Any], checkpoint: Path, backend: str, base: Path
) -> dict[str, Any]:
    """All that determines the result of a run, as plain data; the SLO and the names of things do not."""
    workload = config.workload.model_dump()
    if "path" in workload:
        workload["path"] = provenance.file_hash(base / workload["path"])
    versions = provenance.versions()
    return {
        "backend": backend,
        "model": provenance.checkpoint_hash(checkpoint),
        "workload": workload,
        "warmup_requests": config.warmup_requests,
        "engine": config.engine.model_dump(),
        "strategies": {
            kind: {**_finite(registry.describe(strategy)), "files": provenance.strategy_files_hash(strategy)}
            for kind, strategy in strategies.items()
        },
        "code": provenance.code_hash(),
        "libraries": {name: versions.get(name) for name in ("python", "numpy", "torch")},
        "machine": provenance.machine(gpu=config.engine.device == "cuda"),
    }


def _finite(description: dict[str, Any]) -> dict[str, Any]:
    # A field may well be infinite ("no limit"); JSON has no word for it.
    fields = description["fields"].items()
    texts = {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields}
    return {**description, "fields": texts}


def _strategy_label(value: Any, strategy: Any) -> str:
    """The strategy's name and the fields that were given or differ from their defaults."""
    defaults = {name: f.default for name, f in getattr(type(strategy), "__dataclass_fields__", {}).items()}
    given = set(value) if isinstance(value, Mapping) else set()
    fields = registry.describe(strategy)["fields"]
    shown = {k: v for k, v in fields.items() if k in given or k not in defaults or defaults[k] != v}
    arguments = ", ".join(f"{k}={v}" for k, v in shown.items())
    return registry.label(strategy) + (f"({arguments})" if arguments else "")


def _workload_label(config: ExperimentConfig) -> str:
    workload = config.workload
    scales = {"rate_scale": getattr(workload, "rate_scale", 1.0), "length_scale": workload.length_scale}
    if workload.output_length_scale is not None:
        scales["output_length_scale"] = workload.output_length_scale
    changed = ", ".join(f"{k}={v:g}" for k, v in scales.items() if v != 1.0 or k == "output_length_scale")
    return workload.kind + (f" ({changed})" if changed else "")
