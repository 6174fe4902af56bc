"""The results store: results/<experiment>/<run_id>/ holds manifest.json, requests.parquet and spans.parquet.

A run is written to a hidden sibling folder, synced to disk and renamed, so that a folder with a run's name is
always whole. `results` gives one tidy row per run.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.config import project_dir
from hybridlab.errors import ConfigError
from hybridlab.metrics import SLO, summarise
from hybridlab.plans import Span

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "hybridlab-run/1"
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
class StoredRun:
    """One run as it lies on disk."""

    path: Path
    manifest: Mapping[str, Any]
    requests: pd.DataFrame
    spans: pd.DataFrame

    @property
    def run_id(self) -> str:
        return self.manifest["run_id"]

    def row(self, slo: str | SLO | None = None) -> dict[str, Any]:
        """Config axes, metrics and provenance as one flat row; goodput at `slo` (default: the config's)."""
        manifest = self.manifest
        slo = SLO.model_validate(manifest["slo"]) if slo is None else slo
        metrics = summarise(self.requests, manifest["duration_s"], slo)
        code = manifest["code"]
        return {
            "experiment": manifest["experiment"],
            **manifest["labels"],
            **manifest["axes"],
            "repeat": manifest["repeat"],
            **metrics,
            "num_steps": manifest["num_steps"],
            "backend": manifest["backend"],
            "evidence": manifest["evidence"],
            "machine": f"{manifest['machine']['cpu']}, {manifest['machine']['cores']} cores",
            "code": code.get("commit", code.get("version", ""))[:12] + ("+dirty" if "dirty" in code else ""),
            "run_id": manifest["run_id"],
        }


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


def default_results_dir() -> Path:
    """`results/` of the project around the working directory (see hybridlab.config)."""
    return project_dir() / "results"


def write_run(
    folder: Path,
    manifest: Mapping[str, Any],
    requests: pd.DataFrame,
    spans: pd.DataFrame,
    *,
    overwrite: bool = False,
) -> None:
    """Write a run so that `folder` appears whole or not at all.

    A whole run that is already there stays unless `overwrite`. Raises ConfigError naming the folder if it
    cannot be written (full disk, no permission) or holds something that is not a run; nothing is left behind
    then.
    """
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise ConfigError(f"{folder}: exists and is not a run; move it away")
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        part = Path(tempfile.mkdtemp(prefix=f".part-{folder.name}-", dir=folder.parent))
        part.chmod(0o755)
        requests.to_parquet(part / "requests.parquet", index=False)
        spans.to_parquet(part / "spans.parquet", index=False)
        text = json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False)
        (part / "manifest.json").write_text(text + "\n", encoding="utf-8")
        for path in (*part.iterdir(), part):
            _sync(path)
        _rename(part, folder, overwrite)
        _sync(folder.parent)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def read_run(folder: Path) -> StoredRun:
    """The run in `folder`. Raises ConfigError naming the file that is missing, corrupt or not ours."""
    import pandas as pd

    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ConfigError(f"{path}: expected a manifest with format {FORMAT!r}")
        if manifest.get("run_id") != folder.name:
            raise ConfigError(f"{path}: is of run {manifest.get('run_id')!r}; expected {folder.name!r}")
        path = folder / "requests.parquet"
        requests = pd.read_parquet(path)
        path = folder / "spans.parquet"
        run = StoredRun(folder, manifest, requests, pd.read_parquet(path))
        path = folder
        run.row()
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: incomplete run ({type(error).__name__}: {error})") from None
    return run


def results(
    experiment: str, results_dir: str | Path | None = None, *, slo: str | SLO | None = None
) -> pd.DataFrame:
    """One row per stored run of `experiment`, oldest first: axes, metrics, evidence, run_id.

    `slo` recomputes goodput at another service level. Folders that are not whole runs are skipped with a
    warning that names them. Raises ConfigError if the experiment has no folder.
    """
    import pandas as pd

    root = Path(results_dir) if results_dir is not None else default_results_dir()
    folder = root / experiment
    if not folder.is_dir():
        known = sorted(p.name for p in root.glob("*") if p.is_dir() and p.name != "checkpoints")
        raise ConfigError(f"{folder}: no such results; experiments there: {', '.join(known) or 'none'}")
    runs = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            runs.append(read_run(path))
        except ConfigError as error:
            warnings.warn(f"skipped {error}", stacklevel=2)
    runs.sort(key=lambda run: run.manifest["started"])
    # A key swept in one run was still set in the others: their config has its value.
    axes = list(dict.fromkeys(key for run in runs for key in run.manifest["axes"]))
    rows = []
    for run in runs:
        filled = {key: run.manifest["axes"].get(key, _setting(run.manifest["config"], key)) for key in axes}
        rows.append(replace(run, manifest={**run.manifest, "axes": filled}).row(slo))
    return pd.DataFrame(rows)


def _setting(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _rename(part: Path, folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        os.rename(part, folder)
    elif overwrite:
        # A folder cannot replace a folder in one step; the old one is renamed so that a kill loses neither.
        old = folder.parent / f".old-{folder.name}-{os.getpid()}"
        os.rename(folder, old)
        os.rename(part, folder)
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(parent: Path) -> None:
    """Parts of runs that were killed; an hour's grace, for another process may be writing now."""
    for path in (*parent.glob(".part-*"), *parent.glob(".old-*")):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
