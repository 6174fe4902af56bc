"""One stored run in memory: served to its end, or failed; and its row in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.config import STRATEGIES
from hybridlab.errors import ConfigError
from hybridlab.metrics import SLO, find_slo, summarise
from hybridlab.plans import Span
from hybridlab.provenance import digest

if TYPE_CHECKING:
    import pandas as pd

SPAN_COLUMNS = {
    "lane": "object",
    "kind": "object",
    "layer": "int64",
    "part": "int64",
    "microbatch": "int64",
    "rank": "int64",
    "tier": "object",
    "start_s": "float64",
    "end_s": "float64",
}


LABELS = ("model", "workload", *STRATEGIES, "precision", "device")
"""Columns that say what ran, readable."""
ORIGIN = ("backend", "evidence", "machine", "code", "run_id")
"""Columns that say where the numbers of a run come from."""
_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "experiment": str,
    "backend": str,
    "evidence": str,
    "started": str,
    "repeat": int,
    **dict.fromkeys(("labels", "axes", "config", "strategies", "machine", "code", "identity", "slo"), dict),
}
_KEYS_OF_DONE: Mapping[str, type | tuple[type, ...]] = {"duration_s": (int, float), "num_steps": int}


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError (ConfigError of an SLO) that names the first key that is missing or of the wrong kind."""
    own = {"error": str} if manifest.get("status") == "failed" else _KEYS_OF_DONE
    for key, kind in {**_KEYS, **own}.items():
        if key not in manifest:
            raise ValueError(f"no key {key!r}")
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise ValueError(f"{key} is {manifest[key]!r:.40}")
    if not isfinite(manifest.get("duration_s", 0.0)):
        raise ValueError(f"duration_s is {manifest['duration_s']!r}")
    for name in ("labels", "axes"):
        for key, value in manifest[name].items():
            if not isinstance(value, str | int | float | bool | None):
                raise ValueError(f"{name}.{key} is {value!r:.40}")
    find_slo(manifest["slo"])
    for kind in STRATEGIES:
        used = manifest["strategies"].get(kind)
        if not isinstance(used, dict) or not isinstance(used.get("class"), str):
            raise ValueError(f"strategies.{kind} is {used!r:.40}")
    names = [("machine", "cpu"), ("machine", "cores"), *(("code", key) for key in ("commit", "version", "dirty"))]
    for section, key in names:
        value = manifest[section].get(key, None if section == "machine" else "")
        if not isinstance(value, int if key == "cores" else str):
            raise ValueError(f"{section}.{key} is {value!r:.40}")


def read_table(path: Path) -> pd.DataFrame:
    """A Parquet file. Raises ConfigError that names it."""
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})") from None


@dataclass(frozen=True)
class _Run:
    path: Path
    manifest: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        return self.manifest["run_id"]

    def origin(self) -> dict[str, str]:
        """Where the numbers of this run come from, as columns of its row."""
        manifest = self.manifest
        return {
            "backend": manifest["backend"],
            "evidence": manifest["evidence"],
            "machine": f"{manifest['machine']['cpu']}, {manifest['machine']['cores']} cores",
            "code": _code_name(manifest),
            "run_id": manifest["run_id"],
        }

    def _what_ran(self) -> dict[str, Any]:
        manifest = self.manifest
        told = {"experiment": manifest["experiment"], **manifest["labels"], **manifest["axes"]}
        return {**told, "repeat": manifest["repeat"]}


@dataclass(frozen=True)
class StoredRun(_Run):
    """A run that was served to its end."""

    requests: pd.DataFrame

    @cached_property
    def spans(self) -> pd.DataFrame:
        """Read when they are first asked for. Raises ConfigError if that is not possible any more."""
        return read_table(self.path / "spans.parquet")

    def row(self, slo: str | SLO | None = None) -> dict[str, Any]:
        """Config axes, metrics and provenance as one flat row; goodput at `slo` (default: the config's)."""
        slo = SLO.model_validate(self.manifest["slo"]) if slo is None else slo
        metrics = summarise(self.requests, self.manifest["duration_s"], slo)
        return {**self._what_ran(), **metrics, "num_steps": self.manifest["num_steps"], **self.origin()}


@dataclass(frozen=True)
class FailedRun(_Run):
    """A run that ended in an error; it has no tables."""

    @property
    def error(self) -> str:
        """The error in one line, with its type."""
        return self.manifest["error"]

    def row(self) -> dict[str, Any]:
        """Config axes, provenance, status and error as one flat row, without metrics."""
        return {**self._what_ran(), **self.origin(), "status": "failed", "error": self.error}


def _code_name(manifest: Mapping[str, Any]) -> str:
    """The commit (outside git the version), hashes of what the tree had beside it and of strategies from elsewhere."""
    code = manifest["code"]
    parts = [code.get("commit", code.get("version", ""))[:12]]
    if "dirty" in code:
        parts.append(f"dirty.{code['dirty'][:6]}")
    for strategy in manifest["strategies"].values():
        if not strategy.get("files"):  # not one of the package, whose version the commit tells
            told = digest([strategy.get("source"), strategy.get("globals")], 6)
            parts.append(f"{strategy['class'].rpartition(':')[2]}.{told}")
    return "+".join(parts)


def spans_frame(spans: Iterable[Span]) -> pd.DataFrame:
    """One row per span; times in seconds since the start of the run, `tier` empty for ops without experts."""
    import pandas as pd

    rows = [
        (
            str(s.op.lane),
            s.op.kind,
            s.op.layer,
            s.op.part,
            s.op.microbatch,
            s.op.rank,
            str(s.op.tier or ""),
            s.start_s,
            s.end_s,
        )
        for s in spans
    ]
    return pd.DataFrame(rows, columns=list(SPAN_COLUMNS)).astype(SPAN_COLUMNS)
