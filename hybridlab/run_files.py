"""One run on disk: results/<experiment>/<run_id>/ with manifest.json, requests.parquet and spans.parquet.

A run that failed has a manifest alone. Either is written to a hidden sibling folder, synced to disk and renamed, so
that a folder with a run's name is always whole, whatever kills the process and whenever.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.errors import ConfigError
from hybridlab.metrics import REQUEST_COLUMNS
from hybridlab.stored_run import SPAN_COLUMNS, FailedRun, StoredRun, check_manifest, read_table

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "hybridlab-run/1"
_LEFTOVER_AGE_S = 3600  # younger ones may be another process's, which is writing now


def write_run(
    folder: Path,
    manifest: Mapping[str, Any],
    requests: pd.DataFrame,
    spans: pd.DataFrame,
    *,
    overwrite: bool = False,
) -> None:
    """Write a run so that `folder` appears whole or not at all.

    A run that is already there stays unless `overwrite`. Raises ConfigError naming the folder if it cannot be
    written (full disk, no permission) or holds something that is not a run; nothing is left behind then.
    """
    tables = {"requests.parquet": _parquet(requests), "spans.parquet": _parquet(spans)}
    _write(folder, {**tables, "manifest.json": _json(manifest)}, overwrite)


def write_failure(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Record a run that failed (`manifest` has "status": "failed"), like `write_run`.

    Replaces an earlier failure; a run that was served to its end stays.
    """
    known = find_run(folder)
    if not isinstance(known, StoredRun):
        _write(folder, {"manifest.json": _json(manifest)}, overwrite=True)


def check_writable(parent: Path, run_ids: Iterable[str]) -> None:
    """Raise ConfigError if runs with these ids could not be written below `parent`, before they are measured."""
    for run_id in run_ids:
        _refuse_foreign(parent / run_id)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".part-", dir=parent)).rmdir()
    except OSError as error:
        raise ConfigError(f"{parent}: cannot be written ({error.strerror or error})") from None


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise ConfigError(f"{folder}: exists and is not a run; move it away")


def find_run(folder: Path) -> StoredRun | FailedRun | None:
    """The run in `folder`; None if there is none, or a damaged one, which counts as missing and is written anew."""
    try:
        return read_any(folder) if folder.is_dir() else None
    except ConfigError:
        return None


def find_runs(folder: Path, run_ids: Iterable[str]) -> dict[str, StoredRun | FailedRun]:
    """Those of `run_ids` that `folder` holds, in the order given."""
    restore_replaced(folder)
    found = {run_id: find_run(folder / run_id) for run_id in run_ids}
    return {run_id: run for run_id, run in found.items() if run is not None}


def read_run(folder: Path) -> StoredRun:
    """The run in `folder`. Raises ConfigError naming the file that is missing, corrupt or not ours."""
    run = read_any(folder)
    if isinstance(run, FailedRun):
        raise ConfigError(f"{folder}: the run failed ({run.error})")
    return run


def read_any(folder: Path) -> StoredRun | FailedRun:
    """Like `read_run`, for runs that failed too."""
    manifest = read_manifest(folder)
    if manifest.get("status") == "failed":
        return FailedRun(folder, manifest)
    path = folder / "requests.parquet"
    requests = read_table(path)
    _require_columns(path, {name: dtype.kind for name, dtype in requests.dtypes.items()}, REQUEST_COLUMNS)
    _check_spans(folder / "spans.parquet")
    return StoredRun(folder, manifest, requests)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run in `folder`, its keys checked. Raises ConfigError naming the file."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # json's errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"{path}: expected a manifest with format {FORMAT!r}")
    if manifest.get("run_id") != folder.name:
        raise ConfigError(f"{path}: is of run {manifest.get('run_id')!r}; expected {folder.name!r}")
    try:
        check_manifest(manifest)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path}: incomplete run ({error})") from None
    return manifest


def _check_spans(path: Path) -> None:
    """What the end of the file says: spans are the larger table, and seldom asked for."""
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    _require_columns(path, dict.fromkeys(schema.names, "?"), SPAN_COLUMNS)


def _require_columns(path: Path, kinds: Mapping[Any, str], expected: Mapping[str, str]) -> None:
    """`kinds` are NumPy's letters of types, "?" if they are not looked at; numbers may be of any width."""
    for name, dtype in expected.items():
        if name not in kinds:
            raise ConfigError(f"{path}: incomplete run (no column {name!r})")
        if dtype != "object" and kinds[name] not in "?iuf":
            raise ConfigError(f"{path}: incomplete run (column {name!r} holds no numbers)")


def restore_replaced(parent: Path) -> None:
    """Give runs their names back whose replacement was killed between two renames."""
    for old in parent.glob(".old-*"):
        folder = _replaced_by(old)
        if not folder.exists() and (old / "manifest.json").is_file():
            with suppress(OSError):  # another process was faster, or the store cannot be written
                os.rename(old, folder)


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _json(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _write(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    _refuse_foreign(folder)
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        part = Path(tempfile.mkdtemp(prefix=f".part-{folder.name}-", dir=folder.parent))
        part.chmod(0o755)
        for name, content in files.items():
            _write_file(part / name, content)
        _sync_folder(part)
        _rename(part, folder, overwrite)
        _sync_folder(folder.parent)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _write_file(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(part: Path, folder: Path, overwrite: bool) -> None:
    for _ in range(3):
        try:
            os.rename(part, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not overwrite:
            return
        # A folder cannot replace a folder in one step. Whatever ends the process in between, `restore_replaced` gives
        # the old one its name back.
        old = folder.parent / f".old-{folder.name}-{os.getpid()}"
        try:
            os.rename(folder, old)
            os.rename(part, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            continue  # another process restored the old one, or replaced it as well
        finally:
            restore_replaced(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
        return
    raise ConfigError(f"{folder}: another process keeps writing the same run")


def _remove_leftovers(parent: Path) -> None:
    """Runs that have been replaced, and parts of runs that were killed."""
    restore_replaced(parent)
    for old in parent.glob(".old-*"):
        if _replaced_by(old).exists():
            shutil.rmtree(old, ignore_errors=True)
    for part in parent.glob(".part-*"):
        try:
            age_s = time.time() - part.stat().st_mtime
        except OSError:
            continue  # another process was faster
        if age_s > _LEFTOVER_AGE_S:
            shutil.rmtree(part, ignore_errors=True)


def _replaced_by(old: Path) -> Path:
    return old.parent / old.name.removeprefix(".old-").rsplit("-", 1)[0]


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
