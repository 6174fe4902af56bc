"""Calibrations on disk: one JSON file per machine, model and way of loading, in a cache folder.

`HYBRIDLAB_CACHE`/calibrations, else `XDG_CACHE_HOME`/hybridlab/calibrations, else ~/.cache/hybridlab/calibrations. A
file is written under another name, synced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hybridlab import provenance
from hybridlab.calibration.results import Calibration, Subject
from hybridlab.engine.options import check_accelerator_threads, check_threads
from hybridlab.errors import ConfigError
from hybridlab.hardware import detect
from hybridlab.sections import one_line
from hybridlab.spec import HardwareSpec, ModelSpec

FORMAT = "hybridlab-calibration/1"
SIZES = (
    *("family", "num_layers", "hidden", "vocab", "num_heads", "num_kv_heads", "head_dim", "num_experts", "top_k"),
    *("moe_intermediate", "dense_intermediate", "weight_dtype"),
)
"""Of a model: what its speed depends on. Weights of the same sizes share a calibration."""
MOST_BYTES = 16 << 20
_ADAPTER: TypeAdapter[Calibration] = TypeAdapter(Calibration)


def subject_of(
    model: ModelSpec,
    *,
    device: str,
    threads: int | None = None,
    accelerator_threads: int | None = None,
    link_gb_s: float | None = None,
    precision: str = "bf16",
    weight_layout: str = "rows",
) -> Subject:
    """What a calibration of `model`, loaded like this on this machine, is filed under; defaults as in `hl.load`."""
    threads = check_threads(threads, detect())
    if device == "emulated":
        accelerator_threads = check_accelerator_threads(accelerator_threads, threads)
    sizes = {name: getattr(model, name) for name in SIZES} | {"dense_layers": len(model.dense_layers)}
    here = {name: value for name, value in provenance.machine(gpu=device == "cuda").items() if name != "memory_gib"}
    cap = None if link_gb_s is None else float(link_gb_s)
    return Subject(sizes, here, device, threads, accelerator_threads or 0, cap, precision, weight_layout)  # type: ignore[arg-type]


def calibration_path(subject: Subject) -> Path:
    """Where the calibration of `subject` is kept, there or not. Raises ConfigError without any folder to look in."""
    named, cache = os.environ.get("HYBRIDLAB_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else Path(cache or Path.home() / ".cache") / "hybridlab"
    except RuntimeError:
        raise ConfigError("HYBRIDLAB_CACHE is not set and there is no home folder; set it to a folder") from None
    return folder / "calibrations" / f"{subject.key}.json"


def find_calibration(subject: Subject) -> Calibration | None:
    """The one kept of `subject`, None if there is none. Raises ConfigError for a damaged file."""
    path = calibration_path(subject)
    found = read_calibration(path) if os.path.exists(path) else None
    if found is not None and found.subject.key != subject.key:
        raise ConfigError(f"{path}: damaged (it is of another machine or model); {_REMEDY}")
    return found


def calibrated(hardware: HardwareSpec, model: ModelSpec, **loaded: Any) -> HardwareSpec:
    """`hardware` with the thresholds measured for `model`, if they were; `loaded` as in `subject_of`."""
    found = find_calibration(subject_of(model, device=hardware.device, **loaded))
    return hardware if found is None else found.applied(hardware)


_REMEDY = "delete it and run `hybridlab calibrate` again"


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file. Raises ConfigError naming the file and the first thing that is off."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path}: damaged ({path.stat().st_size:,} bytes, a calibration has fewer); {_REMEDY}")
        data: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found != FORMAT:
            raise ConfigError(f"{path}: expected a calibration ({FORMAT!r}), found {found!r:.60}; {_REMEDY}")
        return _ADAPTER.validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(f"{path}: damaged ({one_line(error)}); {_REMEDY}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({str(error).splitlines()[0]:.100}); {_REMEDY}") from None


def write_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Write the file, by default where `hl.load` looks for it, in place of an earlier one. Raises ConfigError."""
    path = calibration_path(calibration.subject) if path is None else path
    data = {"format": FORMAT, **_ADAPTER.dump_python(calibration, mode="json")}
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".part-", delete=False, encoding="utf-8") as file:
            part = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path}: the calibration cannot be written ({error.strerror or error})") from None
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return path


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found
