"""The runs of an experiment before they start: what each is, and the id under which its result is stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridlab import provenance
from hybridlab.axes import axis_value
from hybridlab.backends import checkpoint_of
from hybridlab.config import STRATEGIES, ExperimentConfig, Point, points
from hybridlab.strategies import registry
from hybridlab.workload import content_hash, load_rows


@dataclass(frozen=True)
class Draft:
    """One run as the config has it: a point of the sweep, a repeat, the strategies, a checkpoint made or not."""

    point: Point
    repeat: int
    strategies: Mapping[str, Any]
    checkpoint: Path

    @property
    def config(self) -> ExperimentConfig:
        return self.point.config

    @cached_property
    def labels(self) -> dict[str, str]:
        """The columns that say what ran, readable."""
        config = self.config
        return {
            "model": config.model.preset or Path(config.model.path or "").name,
            "workload": _workload_label(config),
            **{kind: _strategy_label(getattr(config, kind), self.strategies[kind]) for kind in STRATEGIES},
            "precision": config.engine.precision,
            "device": config.engine.device or "auto",
        }

    def axes(self) -> dict[str, Any]:
        """The swept keys and values; whole strategies are left to their label."""
        return {key: axis_value(value) for key, value in self.point.axes.items() if key not in STRATEGIES}


@dataclass(frozen=True)
class Job:
    """A draft whose checkpoint is there, so that the identity of its result is known."""

    draft: Draft
    identity: Mapping[str, Any]

    @cached_property
    def run_id(self) -> str:
        return provenance.digest(self.identity)

    @cached_property
    def engine_key(self) -> str:
        """Jobs with equal keys share one loaded engine."""
        own = {key: self.identity.get(key) for key in ("backend", "model", "engine", "machine", "routing")}
        return provenance.digest(
            [own, self.identity["strategies"]["placement"], self.identity["strategies"]["overlap"]]
        )

    def resolved(self) -> dict[str, Any]:
        """The config of this run with every default filled in."""
        config = self.draft.config
        names = ("model", "workload", "engine", *(["simulator"] if self.identity["backend"] == "simulator" else []))
        sections = {name: getattr(config, name).model_dump() for name in names}
        strategies = {kind: self.identity["strategies"][kind]["fields"] for kind in STRATEGIES}
        return {
            "experiment": config.experiment,
            **sections,
            **strategies,
            "warmup_requests": config.warmup_requests,
        }


def make_drafts(config: ExperimentConfig, results: Path) -> list[Draft]:
    """Every run; repeats are outermost so that a slow drift of the machine spreads over the points.

    All points are checked as far as that needs no checkpoint. Raises ConfigError, StrategyError or CheckpointError,
    naming the config's file.
    """
    base = config.project_dir
    resolved: dict[tuple[str, str], Any] = {}
    loaded: set[str] = set()
    drafts = []
    with config.named_errors():
        for point in points(config):
            strategies = {kind: _resolve(kind, getattr(point.config, kind), resolved) for kind in STRATEGIES}
            workload = point.config.workload
            if (key := workload.model_dump_json()) not in loaded:  # a trace is read once, not once a point
                load_rows(workload, base)
                loaded.add(key)
            checkpoint = checkpoint_of(point.config.model, results, base)
            drafts.append(Draft(point, 0, strategies, checkpoint))
    return [
        Draft(draft.point, repeat, draft.strategies, draft.checkpoint)
        for repeat in range(config.repeats)
        for draft in drafts
    ]


def identify(drafts: Sequence[Draft], backend: str) -> list[Job]:
    """The jobs of drafts whose checkpoints are there."""
    known: dict[Any, Any] = {}
    provenance.code_version()  # as it is now, not as it will be when the first run has ended

    def once(key: Any, make: Any) -> Any:
        """Files are hashed and sources read once, not once a run."""
        if key not in known:
            known[key] = make()
        return known[key]

    return [Job(draft, _identity(draft, backend, once)) for draft in drafts]


def _resolve(kind: str, value: Any, resolved: dict[tuple[str, str], Any]) -> Any:
    """One strategy object per distinct setting."""
    try:
        key = (kind, json.dumps(value, sort_keys=True))
    except (TypeError, ValueError):  # an object, or a mapping that holds one
        return registry.resolve(kind, value)
    if key not in resolved:
        resolved[key] = registry.resolve(kind, value)
    return resolved[key]


def _identity(draft: Draft, backend: str, once: Any) -> dict[str, Any]:
    """All that determines the result of a run, as plain data; the SLO and the names of things do not."""
    config = draft.config
    workload = config.workload.model_dump()
    if isinstance(path := workload.get("path"), str):
        key = ("trace", workload["kind"], path)
        workload["path"] = once(key, lambda: content_hash(config.workload, config.project_dir))
    versions = once("versions", provenance.versions)
    return {
        **_where(draft, backend, once),
        "backend": backend,
        "workload": workload,
        "warmup_requests": config.warmup_requests,
        "engine": config.engine.model_dump(),
        "strategies": {
            kind: once((kind, id(strategy)), lambda strategy=strategy: _described(strategy))
            for kind, strategy in draft.strategies.items()
        },
        "code": provenance.code_hash(),
        "libraries": {name: versions.get(name) for name in ("python", "numpy", "torch")},
        # The first of several is the run without repeats, so that raising `repeats` keeps it.
        "repeat": draft.repeat,
    }


def _where(draft: Draft, backend: str, once: Any) -> dict[str, Any]:
    """The model and the machine, which backend "simulator" makes up: there, this one counts for nothing."""
    config = draft.config
    gpu, loaded = config.engine.device == "cuda", config.engine.model_dump_json()
    if backend == "simulator":
        from hybridlab.bench.simulated_serving import simulated

        key = ("simulated", draft.checkpoint, loaded, config.simulator.model_dump_json())
        return once(key, lambda: simulated(config, draft.checkpoint).identity())
    thresholds = once(("thresholds", draft.checkpoint, loaded), lambda: _thresholds(draft))
    return {
        **({"thresholds": thresholds} if thresholds else {}),
        "model": once(("model", draft.checkpoint), lambda: provenance.checkpoint_hash(draft.checkpoint)),
        "machine": once(("machine", gpu), lambda: provenance.machine(gpu=gpu)),
    }


def _thresholds(draft: Draft) -> dict[str, Any]:
    """What `hl.load` will find calibrated for the engine of a run: it decides paths, and so the result."""
    engine = draft.config.engine
    if engine.device not in ("emulated", "cuda"):
        return {}
    from hybridlab.calibration.files import find_calibration, subject_of
    from hybridlab.checkpoint import open_checkpoint
    from hybridlab.errors import CheckpointError

    names = ("device", "threads", "accelerator_threads", "link_gb_s", "precision")
    how: dict[str, Any] = {name: getattr(engine, name) for name in names}
    how["weight_layout"] = engine.weight_layout or "rows"
    try:
        spec = open_checkpoint(draft.checkpoint).spec
    except CheckpointError:
        return {}  # told by the engine, which cannot open it either
    found = find_calibration(subject_of(spec, **how))
    return {} if found is None else asdict(found.crossovers)


def _described(strategy: Any) -> dict[str, Any]:
    return {**_finite(registry.describe(strategy)), "files": provenance.strategy_files_hash(strategy)}


def _finite(description: dict[str, Any]) -> dict[str, Any]:
    # A field may well be infinite ("no limit"); JSON has no word for it.
    fields = description["fields"].items()
    texts = {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields}
    return {**description, "fields": texts}


def _strategy_label(value: Any, strategy: Any) -> str:
    """The strategy's name and the fields that were given or differ from their defaults."""
    defaults = {name: f.default for name, f in getattr(type(strategy), "__dataclass_fields__", {}).items()}
    given = set(value) if isinstance(value, Mapping) else set()
    fields = registry.fields(strategy)
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
