"""One stored run in memory: served to its end, or failed; and its row in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.metrics import SLO, summarise
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
    spans: pd.DataFrame

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
