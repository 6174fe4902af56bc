"""What `bench prefill` and `bench decode` share on a device beside the CPU: options, ceiling, rows and result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hybridlab import kernels
from hybridlab.checkpoint import open_checkpoint
from hybridlab.checkpoint.presets import preset_spec
from hybridlab.engine.options import (
    check_accelerator_threads,
    check_device,
    check_numbers,
    check_threads,
    check_unused,
    is_count,
)
from hybridlab.errors import ConfigError, KernelError
from hybridlab.hardware import detect
from hybridlab.model.weight_layout import WeightLayout, check_weight_layout
from hybridlab.provenance import code_version, machine, versions
from hybridlab.spec import ModelSpec

if TYPE_CHECKING:
    import pandas as pd

DEVICES = ("cuda", "emulated")
PEAK_SIZE = 8192
"""Edge of the matrices whose product is a GPU's ceiling."""


@dataclass(frozen=True)
class DeviceOptions:
    """Options of `hl.load` that hold for all engines of a benchmark. Raises `ConfigError` for what cannot be."""

    device: str
    threads: int | None = None
    accelerator_threads: int | None = None
    link_gb_s: float | None = None
    vram_gb: float | None = None
    weight_layout: WeightLayout = "rows"

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")
        check_weight_layout(self.weight_layout)
        check_numbers({}, {"link_gb_s": self.link_gb_s, "vram_gb": self.vram_gb})
        if self.device == "emulated":
            _ = self.chosen_accelerator_threads
        else:
            check_unused({"accelerator_threads": self.accelerator_threads, "link_gb_s": self.link_gb_s}, self.device)
        check_device(self.device)

    @property
    def evidence(self) -> str:
        return "emulated" if self.device == "emulated" else "measured"

    @property
    def chosen_accelerator_threads(self) -> int:
        """Those given, or half of all, of device "emulated"."""
        return check_accelerator_threads(self.accelerator_threads, check_threads(self.threads, detect()))

    def given(self) -> dict[str, Any]:
        """As keywords of `hl.load`."""
        return dict(vars(self))

    def peak_flop_s(self) -> float | None:
        """FLOP/s that the accelerator reaches right now: a large BF16 product on a GPU, else the multiply loop.

        None where there is no compiled loop.
        """
        if self.device == "cuda":
            return matmul_flop_s("cuda:0")
        try:
            return kernels.multiply_rate(self.chosen_accelerator_threads)
        except KernelError:
            return None


def matmul_flop_s(where: str, size: int = PEAK_SIZE, repeats: int = 20) -> float:
    """FLOP/s of the product of two BF16 matrices [size, size] on a torch device; median, after three untimed ones."""
    import torch

    on_gpu = torch.device(where).type == "cuda"
    a, b = (torch.randn(size, size, device=where).bfloat16() for _ in range(2))
    out, seconds = torch.empty_like(a), []
    for _ in range(3 + repeats):
        start_s = perf_counter()
        torch.matmul(a, b, out=out)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start_s)
    del a, b, out
    if on_gpu:
        torch.cuda.empty_cache()  # an engine is to have the memory
    return 2.0 * size**3 / median(seconds[3:])


def model_of(preset: str, checkpoint: str | Path | None, layers: int | None, dtype: str) -> ModelSpec:
    """What is to be measured, before anything is written."""
    return preset_spec(preset, dtype=dtype, layers=layers) if checkpoint is None else open_checkpoint(checkpoint).spec


def counts(name: str, given: Sequence[int] | int) -> tuple[int, ...]:
    """Sorted, each once; raises `ConfigError` unless there is one at least and all are ints >= 1."""
    values = (given,) if isinstance(given, int) else tuple(given)
    for value in values:
        if not is_count(value):
            raise ConfigError(f"{name}: expected ints >= 1, got {value!r}")
    if not values:
        raise ConfigError(f"{name}: expected at least one number, got none")
    return tuple(sorted(set(values)))


class RowLog:
    """Rows as they are made: kept, and appended to the file `path`, if any, as JSON lines.

    Every row has all `columns`, None where one says nothing, and the `labels`. Raises `ConfigError` if the file cannot
    be written.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], labels: Mapping[str, Any]) -> None:
        self._path, self._columns, self._labels = path, columns, dict(labels)
        self.records: list[dict[str, Any]] = []
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a", encoding="utf-8").close()
            except OSError as error:
                raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None

    def add(self, row: Mapping[str, Any]) -> None:
        record = {**dict.fromkeys(self._columns), **row, **self._labels}
        self.records.append(record)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")


@dataclass(frozen=True)
class DeviceBench:
    """What `what` measured: `records` are the rows, in the order in which they were made.

    `notes` say what is missing and why; `complete` is False if it was interrupted; `failed`: of what was asked for, no
    row is there, the yardstick's alone. `shown` are the columns to print.
    """

    what: str
    records: tuple[Mapping[str, Any], ...]
    shown: tuple[str, ...]
    notes: tuple[str, ...] = ()
    complete: bool = True
    failed: bool = False
    machine: Mapping[str, Any] = field(default_factory=lambda: machine(gpu=True))
    versions: Mapping[str, str] = field(default_factory=versions)
    code: Mapping[str, str] = field(default_factory=code_version)

    @property
    def rows(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(list(self.records))

    def as_dict(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("what", "complete", "failed", "machine", "versions", "code")}
        return {**told, "notes": list(self.notes), "rows": [dict(record) for record in self.records]}

    def __str__(self) -> str:
        text = self._table().to_string(index=False, na_rep="", float_format=_digits)
        return "\n".join((self._title(), text, *(f"  {note}" for note in self.notes)))

    def _repr_html_(self) -> str:
        text = self._table().to_html(index=False, na_rep="", float_format=_digits, border=0)
        return "<br>".join((escape(self._title()), text, *map(escape, self.notes)))

    def _title(self) -> str:
        first = self.records[0]
        return f"{self.what} of {first['preset']} on {first['machine']} ({first['evidence']}, code {first['code']})"

    def _table(self) -> Any:
        return self.rows.reindex(columns=list(self.shown)).dropna(axis="columns", how="all")


def origin(device: str) -> dict[str, str]:
    """The machine and the code in words: columns of every row."""
    host, code = machine(gpu=device == "cuda"), code_version()
    commit = code.get("commit", code.get("version", "unknown"))[:12]
    named = ", ".join([*host["gpus"][:1], host["cpu"], f"{host['cores']} cores"])
    return {"machine": named, "code": f"{commit}+{code['dirty']}" if "dirty" in code else commit}


def _digits(value: float) -> str:
    return f"{value:.4g}"
