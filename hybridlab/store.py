"""The results store as one tidy table: a row per stored run, and a word on what must not be compared unaware.

How a run lies on disk: hybridlab.run_files.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.axes import axis_value
from hybridlab.columns import EVIDENCE
from hybridlab.config import RESERVED, STRATEGIES, ExperimentConfig, load_config, project_dir
from hybridlab.errors import ConfigError
from hybridlab.metrics import SLO, find_slo, requests_frame, summarise
from hybridlab.provenance import digest
from hybridlab.run_files import read_any, read_run, restore_replaced, write_run
from hybridlab.sections import did_you_mean
from hybridlab.stored_run import LABELS, ORIGIN, FailedRun, StoredRun, spans_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["default_results_dir", "read_run", "results", "settings", "spans_frame", "write_run"]

AnyRun = StoredRun | FailedRun


def default_results_dir() -> Path:
    """`results/` of the project around the working directory (see hybridlab.config)."""
    return project_dir() / "results"


def results(
    experiment: str | Path | Mapping[str, Any] | ExperimentConfig,
    results_dir: str | Path | None = None,
    *,
    slo: str | SLO | Mapping[str, Any] | None = None,
    failed: bool = False,
    evidence: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per stored run of `experiment`, oldest first: axes, metrics, machine, code, evidence, run_id.

    `experiment` is its name, with results in the project around the working directory, or its config (a path, a
    mapping or the object), with results in the config's project. What was swept is an axis, and so is every other
    setting in which the runs differ: the config may have been edited between them.

    `slo` recomputes goodput at another service level (of a config, its own by default). `failed` adds the runs that
    failed, without metrics, and the columns `status` ("done" or "failed") and `error`. `evidence` names the kinds to
    take ("measured", or several); by default the most direct kind that is there, since kinds are compared only by
    those who ask for it.

    What was left out, folders that are not whole runs, and a table that mixes code versions, library versions or
    machines are each said in a warning of one line. Without any run left the table has its columns and no rows. Raises
    ConfigError if the experiment has no folder, or `evidence` or `slo` is unknown.
    """
    import pandas as pd

    wanted, at_slo = _evidence(evidence), None if slo is None else find_slo(slo)
    name, root, own_slo = _named(experiment, results_dir)
    at_slo = at_slo or own_slo
    runs, failures, said = _read(_folder(name, root))
    if wanted is None:
        wanted, left_out = _most_direct(runs)
        said += [left_out] if left_out else []
    there = Counter(run.manifest["evidence"] for run in runs)
    runs = [run for run in runs if run.manifest["evidence"] in wanted]
    if there and not runs:
        counts = ", ".join(_count(number, f"{kind} run") for kind, number in there.items())
        said.append(f"no {' or '.join(wanted)} run; there are {counts}")
    if failures and not failed:
        said.append(f"{_count(len(failures), 'failed run')} left out; failed=True shows them")
    if mixture := _mixture(runs):
        said.append(f"the table mixes {mixture}; compare with care")
    for message in said:
        warnings.warn(f"{name}: {message}", stacklevel=2)
    shown: list[AnyRun] = [*runs, *(failures if failed else ())]
    shown.sort(key=lambda run: run.manifest["started"])
    # A key swept in one run was still set in the others: their config has its value.
    axes = list(dict.fromkeys(key for run in shown for key in run.manifest["axes"]))
    axes += [key for key in _edited(shown) if key not in axes]
    rows = []
    for run in shown:
        filled = replace(run, manifest={**run.manifest, "axes": settings(run.manifest, axes)})
        if isinstance(filled, StoredRun):
            rows.append({**filled.row(at_slo), **({"status": "done", "error": ""} if failed else {})})
        else:
            rows.append(filled.row())
    return pd.DataFrame(rows, columns=None if rows else _columns(failed))


def _columns(failed: bool) -> list[str]:
    """Those of every table, without axes."""
    metrics = summarise(requests_frame([]), 0.0)
    names = ["experiment", *LABELS, "repeat", *metrics, "num_steps", *ORIGIN]
    return [*names, "status", "error"] if failed else names


_TOLD_BY_LABEL = {
    "model.preset": "model",
    "model.path": "model",
    "engine.precision": "precision",
    "engine.device": "device",
}


def _edited(runs: Sequence[AnyRun]) -> list[str]:
    """The settings, fields of strategies apart, that have several values in the configs of `runs` and no label.

    A run without a setting (of another kind of workload, of an older version) does not differ by that.
    """
    found: dict[str, set[tuple[Any, Any]]] = {}
    for run in runs:
        config = {key: value for key, value in run.manifest["config"].items() if key not in STRATEGIES}
        for key, value in _leaves(config):
            label = run.manifest["labels"].get(_TOLD_BY_LABEL.get(key))
            found.setdefault(key, set()).add((label, axis_value(value)))
    return [key for key, pairs in found.items() if len(pairs) > len({label for label, _ in pairs})]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(manifest: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The values of dotted config keys in a run: of its axes, else of its config (None if it has none)."""
    axes = manifest["axes"]
    return {key: axes[key] if key in axes else axis_value(_setting(manifest["config"], key)) for key in keys}


def _setting(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _named(
    experiment: str | Path | Mapping[str, Any] | ExperimentConfig, results_dir: str | Path | None
) -> tuple[Any, Path, SLO | None]:
    """The name of an experiment, where results are, and the SLO of its config if that was given."""
    config = None
    if isinstance(experiment, Path | Mapping | ExperimentConfig) or str(experiment).endswith((".yaml", ".yml")):
        config = load_config(experiment)
    default = default_results_dir() if config is None else config.project_dir / "results"
    root = default if results_dir is None else Path(results_dir)
    return (experiment, root, None) if config is None else (config.experiment, root, config.slo)


def _folder(experiment: Any, root: Path) -> Path:
    # A name, never a path: reading may not leave the store either.
    named = isinstance(experiment, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", experiment)
    if not named or experiment.lower() in RESERVED or not (root / experiment).is_dir():
        known = sorted(p.name for p in root.glob("*") if p.is_dir() and p.name not in RESERVED)
        shown = root / experiment if named else f"{root}: {experiment!r}"
        raise ConfigError(f"{shown}: no such results; experiments there: {', '.join(known) or 'none'}")
    return root / experiment


def _read(folder: Path) -> tuple[list[StoredRun], list[FailedRun], list[str]]:
    """The runs, those that failed, and what was wrong with other folders."""
    restore_replaced(folder)
    runs, failures, skipped = [], [], []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            run = read_any(path)
        except ConfigError as error:
            skipped.append(f"skipped {error}")
            continue
        (runs if isinstance(run, StoredRun) else failures).append(run)
    return runs, failures, skipped


def _evidence(wanted: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if wanted is None:
        return None
    if not isinstance(wanted, Iterable) or not wanted:
        raise ConfigError(f"evidence: expected one or several of {', '.join(EVIDENCE)}, got {wanted!r:.60}")
    kinds = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for kind in kinds:
        if kind not in EVIDENCE:
            raise ConfigError(f"evidence: unknown kind {kind!r}{did_you_mean(str(kind), EVIDENCE)}")
    return kinds


def _most_direct(runs: Sequence[StoredRun]) -> tuple[tuple[str, ...], str]:
    """The most direct kind of evidence there is, and what is left out by taking it."""
    counts = Counter(run.manifest["evidence"] for run in runs)
    kinds = sorted(counts, key=lambda kind: EVIDENCE.index(kind) if kind in EVIDENCE else len(EVIDENCE))
    others = ", ".join(f"{_count(counts[kind], f'{kind} run')}" for kind in kinds[1:])
    return tuple(kinds[:1]), f"{others} left out, only {kinds[0]} ones taken; evidence= asks for them" if others else ""


def _mixture(runs: Sequence[StoredRun]) -> str:
    """What differs between runs beside their settings, in words; "" if nothing does."""
    code, machines, sources = [], [], {}
    for run in runs:
        manifest, row = run.manifest, run.origin()
        identity, config = manifest["identity"], manifest["config"]
        code.append((digest([identity.get("code"), identity.get("libraries")]), row["code"]))
        machines.append((digest(manifest["machine"]), row["machine"]))
        for kind in STRATEGIES:
            used = manifest["strategies"][kind]
            told = [used.get(name) for name in ("source", "globals", "files")]
            sources.setdefault(f"{kind} {used['class'].rpartition(':')[2]}", []).append((digest(told), row["code"]))
        for what, section in (("checkpoint", "model"), ("trace", "workload")):
            path, content = _setting(config, f"{section}.path"), identity.get(section)
            if path is not None:
                read = digest(content.get("path") if isinstance(content, Mapping) else content)
                sources.setdefault(f"{what} {path}", []).append((read, read))
    several = {"code versions": code, "machines": machines} | {f"versions of {name}": s for name, s in sources.items()}
    return " and ".join(_versions(what, pairs) for what, pairs in several.items() if len({key for key, _ in pairs}) > 1)


def _versions(what: str, pairs: Sequence[tuple[str, str]]) -> str:
    counts, names = Counter(key for key, _ in pairs), dict(pairs)
    listed = ", ".join(f"{names[key]}: {_count(number, 'run')}" for key, number in counts.items())
    return f"{len(counts)} {what} ({listed})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
