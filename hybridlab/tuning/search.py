"""`hl.tune`: strategies and their parameters are searched on the simulator, the best are verified on the engine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.axes import override
from hybridlab.backends import checkpoint_of
from hybridlab.config import STRATEGIES, ExperimentConfig, load_config, points
from hybridlab.errors import ConfigError, HybridlabError
from hybridlab.experiment import run
from hybridlab.jobs import identify, make_drafts
from hybridlab.tuning.space import Place, Space, checked_space, default_space, size_of, walk
from hybridlab.tuning.tuned import Tuned, plain

if TYPE_CHECKING:
    import pandas as pd

MOST_RUNS = 10
METRICS = {"goodput_req_s": "request_goodput_req_s", "p99_ttft_s": "p99_ttft_s", "p99_tpot_s": "p99_tpot_s"}
ALIKE = 0.01
"""Goodputs that differ by less, relative to the best, count as equal: then latencies decide."""

Source = str | Path | Mapping[str, Any] | ExperimentConfig


def tune(
    model: str | Path | Mapping[str, Any],
    slo: Any,
    workload: Mapping[str, Any],
    *,
    space: Space | None = None,
    engine: Mapping[str, Any] | None = None,
    simulator: Mapping[str, Any] | None = None,
    most_runs: int = MOST_RUNS,
    most_simulated: int = 400,
    processes: int = 1,
    results_dir: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """The settings of `space` with the most goodput at `slo`; among alike ones, with the most room below its limits.

    `model` is a preset, the path of a checkpoint or the section of a config, `workload`, `engine` and `simulator` are
    such sections; `simulator={"machine": "mine.toml"}` takes what `hybridlab calibrate --profile` found here. `space`
    maps config keys to lists of values (default: the package's strategies). Up to `most_simulated` candidates are
    simulated, and at most `most_runs` (10) run on the engine, half of them the best of strategies not run yet. All runs
    are kept in results/tune: an interrupted call returns what it knows, and the next one goes on from there. Raises
    ConfigError naming the key that is off, and if nothing in the space can be simulated.
    """
    section = dict(model) if isinstance(model, Mapping) else _model(model)
    config = {"experiment": "tune", "model": section, "workload": dict(workload), "slo": slo}
    config |= {"engine": dict(engine)} if engine else {}
    config |= {"simulator": dict(simulator)} if simulator else {}
    return tune_config(
        config, space, most_runs=most_runs, most_simulated=most_simulated, processes=processes,
        results_dir=results_dir, progress=progress,
    )  # fmt: skip


def tune_config(
    source: Source,
    space: Space | None = None,
    *,
    most_runs: int = MOST_RUNS,
    most_simulated: int = 400,
    processes: int = 1,
    results_dir: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """As `tune`, of a config: its `sweep` is the space unless one is given."""
    for name, value, least in (("most_runs", most_runs, 0), ("most_simulated", most_simulated, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is {value!r}, expected a whole number from {least}")
    if most_runs > MOST_RUNS:
        raise ConfigError(f"most_runs is {most_runs}, expected at most {MOST_RUNS}; more is a sweep")
    config = load_config(source)
    base = {kind: getattr(config, kind) for kind in STRATEGIES} | config.to_dict()
    base |= {"sweep": {}, "repeats": 1, "figures": []}
    results = Path(results_dir) if results_dir is not None else config.project_dir / "results"
    chosen = space if space is not None else config.sweep or default_space(gpu=_has_gpu(config, results))
    search = _Search(config, base, checked_space(chosen), results, processes, progress)
    complete = True
    try:
        walk(search.space, most_simulated, search.simulate)
        if not search.predicted:
            raise ConfigError(f"tune: nothing of the space can be simulated; the first: {search.failed}")
        for place in search.to_verify(most_runs):
            search.verify(place)
    except KeyboardInterrupt:
        if not search.predicted:
            raise
        complete = False
    return search.tuned(complete)


@dataclass
class _Search:
    """What is known so far of the places of a space: rows of summaries by the simulator and by the engine."""

    config: ExperimentConfig
    base: dict[str, Any]
    space: dict[str, list[Any]]
    results: Path
    processes: int
    progress: bool
    seen: list[Place] = field(default_factory=list)
    predicted: dict[Place, Mapping[str, Any]] = field(default_factory=dict)
    measured: dict[Place, Mapping[str, Any]] = field(default_factory=dict)
    failed: HybridlabError | None = None

    def simulate(self, places: Sequence[Place]) -> Place | None:
        """Predict `places`; returns the best of all so far, None if none could be simulated."""
        swept = self._config({"list": [self._settings(place) for place in places]})
        ids = [job.run_id for job in identify(make_drafts(swept, self.results), "simulator")]
        how: Any = {"results_dir": self.results, "progress": self.progress}
        with warnings.catch_warnings():  # candidates that do not fit are no candidates
            warnings.filterwarnings("ignore", message=".*runs failed.*")
            try:
                rows = run(swept, backend="simulator", processes=self.processes, **how).summary
            except HybridlabError as error:
                self.failed = self.failed or error
                return self._ranked(self.predicted)[0] if self.predicted else None
        by_id = {row["run_id"]: row for row in rows.to_dict("records")}
        self.predicted |= {place: by_id[run_id] for place, run_id in zip(places, ids, strict=True) if run_id in by_id}
        return self._ranked(self.predicted)[0]

    def to_verify(self, most: int) -> Iterator[Place]:
        """In turns the best by prediction, and the best of strategies that were not run yet."""
        left = self._ranked(self.predicted)
        run_before: set[str] = set()
        for turn in range(min(most, len(left))):
            new = [place for place in left if self._strategies(place) not in run_before]
            place = new[0] if turn % 2 and new else left[0]
            left.remove(place)
            run_before.add(self._strategies(place))
            yield place

    def verify(self, place: Place) -> None:
        """Run one on the engine; one that fails there is no candidate any more."""
        try:
            result = run(self._point(place), results_dir=self.results, progress=self.progress)
        except HybridlabError as error:
            warnings.warn(f"tune: {self._settings(place)} does not run on the engine: {error}", stacklevel=4)
            self.measured[place] = {}
        else:
            self.measured[place] = result.summary.to_dict("records")[0]

    def tuned(self, complete: bool) -> Tuned:
        import pandas as pd

        ran = {place: row for place, row in self.measured.items() if row}
        if self.measured and not ran:
            raise ConfigError("tune: none of the candidates that were simulated runs on the engine")
        best = [*self._ranked(ran), *(p for p in self._ranked(self.predicted) if p not in self.measured)]
        rows = []
        for place in [*best, *(place for place in self.measured if place not in ran)]:
            found = {"predicted": self.predicted[place], "measured": self.measured.get(place, {})}
            shown = {
                f"{kind}_{name}": row.get(column, nan)
                for name, column in METRICS.items()
                for kind, row in found.items()
            }
            settings = {key: _text(value) for key, value in self._settings(place).items()}
            saturated = bool((found["measured"] or found["predicted"]).get("saturated"))
            rows.append({**settings, **shown, "saturated": saturated})
        table: pd.DataFrame = pd.DataFrame(rows)
        return Tuned(self._point(best[0]), table, size_of(self.space), len(self.measured), complete)

    def _ranked(self, rows: Mapping[Place, Mapping[str, Any]]) -> list[Place]:
        """The best first: goodput, then the share of the SLO's limits that p99 latencies take, then the place."""
        most = max((row["request_goodput_req_s"] for row in rows.values()), default=0.0)

        def key(place: Place) -> tuple[float, float, Place]:
            row, slo = rows[place], self.config.slo
            good = row["request_goodput_req_s"]
            steps = round(good / (ALIKE * most)) if most > 0 else 0
            taken = [row["p99_ttft_s"] / slo.ttft_s, row["p99_tpot_s"] / slo.tpot_s]
            late = max((share for share in taken if share == share), default=inf)  # NaN: one token has no TPOT
            return -steps, late, place

        return sorted(rows, key=key)

    def _settings(self, place: Place) -> dict[str, Any]:
        return {key: values[i] for (key, values), i in zip(self.space.items(), place, strict=True)}

    def _strategies(self, place: Place) -> str:
        """Which strategies a candidate has, whatever their parameters."""
        found = [self._settings(place).get(kind) for kind in STRATEGIES]
        return repr([value.get("name", value.get("class")) if isinstance(value, Mapping) else value for value in found])

    def _config(self, sweep: Mapping[str, Any]) -> ExperimentConfig:
        return _named(load_config({**self.base, "sweep": dict(sweep)}), self.config)

    def _point(self, place: Place) -> ExperimentConfig:
        raw = override(self.base, self._settings(place))
        kept = {key: value for key, value in raw.items() if key not in ("sweep", "figures")}
        return _named(load_config(kept), self.config)


def _named(config: ExperimentConfig, source: ExperimentConfig) -> ExperimentConfig:
    config._source = source._source
    return config


def _text(value: Any) -> Any:
    return json.dumps(plain(dict(value))) if isinstance(value, Mapping) else value


def _model(model: str | Path) -> dict[str, Any]:
    there = (Path(model) / "config.json").is_file()
    return {"path": str(model)} if there or isinstance(model, Path) else {"preset": model}


def _has_gpu(config: ExperimentConfig, results: Path) -> bool:
    from hybridlab.bench.simulated_serving import simulated

    first = points(config)[0].config
    with config.named_errors():
        return simulated(first, checkpoint_of(first.model, results, config.project_dir)).gpu
