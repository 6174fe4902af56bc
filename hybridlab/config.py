"""The experiment configuration: one class for YAML files, notebooks and the command line.

Relative paths in a config (checkpoint, trace) and the default `results/` folder start at the project: the
nearest folder with a pyproject.toml or .git above the config file, else above the working directory, else the
working directory itself. They may not leave it by `..`: data from elsewhere is named by an absolute path, so that a
config says by itself what it needs from outside.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from hybridlab.axes import combinations, keys_of, override, without
from hybridlab.errors import ConfigError, HybridlabError
from hybridlab.figures_config import DEFAULT_FIGURES, Figures, check_columns
from hybridlab.metrics import SLO, SLO_PRESETS, find_slo
from hybridlab.sections import PathText, Section, one_line
from hybridlab.strict_yaml import read_yaml, refuse_nonfinite
from hybridlab.workload import WORKLOAD_KINDS, Workload

STRATEGIES = ("scheduler", "placement", "overlap")
CHECKPOINTS, PAPER = "checkpoints", "paper"
"""Folders of `results/` that hold no experiment: checkpoints that were made, and what is published."""
RESERVED = (CHECKPOINTS, PAPER)


class ModelConfig(Section):
    """Either `path` of a checkpoint, or a recipe (`preset`, ...) carried out under results/checkpoints."""

    path: PathText | None = None
    preset: str | None = None
    dtype: Literal["fp8", "bf16"] = "fp8"
    seed: int = Field(default=0, ge=0)
    layers: int | None = Field(default=None, gt=0)
    routing: str = "uniform"

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.preset is None):
            raise ValueError("expected either 'path' of a checkpoint or 'preset' of one to make")
        extra = self.model_fields_set - {"path"}
        if self.path is not None and extra:
            raise ValueError(f"{sorted(extra)[0]!r} belongs to a preset; with 'path' the checkpoint decides it")
        return self


class WorkerConfig(Section):
    """One of several workers; None: an even share of the threads, the KV tokens that the engine has for each."""

    threads: int | None = Field(default=None, gt=0)
    kv_tokens: int | None = Field(default=None, gt=0)
    gpu: int | None = Field(default=None, ge=0)
    """Of device "cuda": the index of its GPU; None: 0."""
    vram_gb: float | None = Field(default=None, gt=0, le=1e6)
    """Of device "cuda": GPU memory, 1e9 bytes; None: an even share of its GPU's."""


class EngineConfig(Section):
    """How the engine runs. None leaves the choice to the engine."""

    precision: Literal["exact", "bf16", "fp8"] = "bf16"
    """fp8: device "cuda" quantises activations too."""
    weight_layout: Literal["rows", "tiles"] | None = None
    """rows: mapped from the checkpoint (the default); tiles: packed into huge pages at load."""
    device: Literal["cpu", "emulated", "cuda"] | None = None
    threads: int | None = Field(default=None, gt=0)
    accelerator_threads: int | None = Field(default=None, gt=0)
    """Of device "emulated": cores in the place of a GPU."""
    link_gb_s: float | None = Field(default=None, gt=0, le=1e6)
    """Of device "emulated": most GB/s (1e9 bytes) of the copies to it; None: as fast as memory."""
    vram_gb: float | None = Field(default=None, gt=0, le=1e6)
    """GPU memory to plan with, 1e9 bytes; of devices "emulated" and "cuda"."""
    token_budget: int | None = Field(default=None, gt=0)
    """Most tokens of one step; None: 2,048 on the CPU, else the most that memory allows."""
    kv_tokens: int | None = Field(default=None, gt=0)
    memory_gb: float | None = Field(default=None, gt=0, le=1e9)
    worker: Literal["auto", "thread", "process"] | None = None
    """process: model and memory in a process of their own, which is started again if it ends."""
    ranks: int | None = Field(default=None, gt=0)
    """Processes that share each prompt and the experts; `threads`, link and `vram_gb` are those of each."""
    exchange: Literal["small_ep", "dispatch_per_route", "dispatch_per_rank"] | None = None
    """How tokens reach the experts of other ranks; None: "small_ep"."""
    interface: str | None = Field(default=None, min_length=1)
    """The network interface over which ranks speak; None: loopback."""
    prefix_cache: bool = True
    """Requests that begin with the same tokens share their KV blocks."""
    workers: dict[str, WorkerConfig] | None = None
    """Processes side by side, with a KV cache each: those named "prefill..." compute prompts for those "decode..."."""


class SimulatorConfig(Section):
    """What backend "simulator" simulates; the engine's section says how (device, sizes, threads)."""

    machine: PathText = "rtx5090_2x_epyc9355"
    """A packaged profile by name, or a .toml file."""
    overrides: dict[str, float] = Field(default_factory=dict)
    """Parameters of `hybridlab.simulator.machine.Machine` in place of the profile's."""
    routing: PathText | None = None
    """Recorded routing statistics (`RoutingStats.save`), which placements know too; None: as `model.routing` says."""
    expert_bits: float | None = Field(default=None, gt=0, le=64)
    dense_bits: float | None = Field(default=None, gt=0, le=64)
    """Bits per weight, each in place of the model's own."""


def _slo(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return find_slo(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("slo: ")) from None
    if not isinstance(value, Mapping | SLO):
        raise ValueError(f"expected one of {', '.join(SLO_PRESETS)} or {{ttft_s, tpot_s}}, got {value!r}")
    return value


class ExperimentConfig(Section):
    """A question put to the system: model, workload, strategies, engine, and what to sweep.

    A strategy is a name, `{name: ..., **fields}`, `{class: "module:Class", **fields}` or, in a notebook, the
    object. `sweep` maps dotted keys to lists of values, and `grid`, `zip`, `list` and `random` to further axes
    (see hybridlab.axes). `warmup_requests` are served before each run and not measured.
    """

    experiment: str
    model: ModelConfig
    workload: Workload
    scheduler: Any = "fcfs"
    placement: Any = "all_host"
    overlap: Any = "sequential"
    engine: EngineConfig = EngineConfig()
    simulator: SimulatorConfig = SimulatorConfig()
    slo: Annotated[SLO, BeforeValidator(_slo)] = SLO_PRESETS["paper"]
    repeats: int = Field(default=1, gt=0, le=1000)
    warmup_requests: int = Field(default=0, ge=0, le=1000)
    sweep: dict[str, Any] = Field(default_factory=dict)
    figures: Figures = DEFAULT_FIGURES
    """What to draw (see hybridlab.figures_config)."""
    _source: Path | None = PrivateAttr(default=None)

    @field_validator("experiment")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        # It becomes a folder under results/: nothing that could leave it.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", value):
            raise ValueError(f"expected a folder name of letters, digits, '-' and '_', got {value!r}")
        if value.lower() in RESERVED:
            raise ValueError(f"expected a folder name other than {' and '.join(RESERVED)}, got {value!r}")
        return value

    @field_validator(*STRATEGIES)
    @classmethod
    def _strategy(cls, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | list | tuple):
            raise ValueError(f"expected a name, a mapping with 'name' or 'class', or an object, got {value!r}")
        if isinstance(value, Mapping) and ("name" in value) == ("class" in value):
            raise ValueError(f"expected a mapping with either 'name' or 'class', got keys {sorted(map(str, value))}")
        return value

    @property
    def source(self) -> str:
        """The file that the config was read from, for messages; "config" if there is none."""
        return str(self._source) if self._source else "config"

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Errors of the block name the config's file, if there is one."""
        try:
            yield
        except HybridlabError as error:
            raise self.named(error) from None

    def named(self, error: HybridlabError) -> HybridlabError:
        """The error with the config's file in front, if there is one and it is not named yet."""
        prefix = f"{self._source}: "
        return type(error)(prefix + str(error)) if self._source and not str(error).startswith(prefix) else error

    @property
    def project_dir(self) -> Path:
        """Where relative paths of this config start."""
        return project_dir(self._source)

    def to_dict(self) -> dict[str, Any]:
        """The keys that were set, as plain data; strategy objects stay objects."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set}

    def replaced(self, strategies: Mapping[str, Any]) -> ExperimentConfig:
        """A copy with other strategies; sweep axes over the replaced ones are dropped."""
        if not strategies:
            return self
        raw = self.to_dict() | dict(strategies)
        raw["sweep"] = without(self.sweep, strategies)
        return _checked(raw, self._source)


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


@dataclass(frozen=True)
class Point:
    """One point of a sweep: its own config (without `sweep`) and its place on the axes."""

    config: ExperimentConfig
    axes: Mapping[str, Any]


def load_config(source: str | Path | Mapping[str, Any] | ExperimentConfig) -> ExperimentConfig:
    """The checked config from a YAML file or a mapping; every point of its sweep is checked as well.

    Raises ConfigError: one line that names file, key path and what was expected.
    """
    if isinstance(source, ExperimentConfig):
        return source
    if isinstance(source, Mapping):
        config = _checked(dict(source), None)
    elif isinstance(source, str | Path):
        path = Path(source)
        config = _checked(read_yaml(path), path)
    else:
        raise ConfigError(f"config: expected a path, a mapping or an ExperimentConfig, got {type(source).__name__}")
    try:  # here only: points of a sweep and runs with another strategy keep figures that they do not draw
        check_columns(config.figures, (key for _, key in keys_of(config.sweep)))
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {error}") from None
    return config


def points(config: ExperimentConfig) -> list[Point]:
    """The points of the sweep, in order; one point without a sweep. Raises ConfigError naming the axis."""
    raw = {kind: getattr(config, kind) for kind in STRATEGIES} | config.to_dict()
    raw.pop("sweep", None)
    result = []
    try:
        for axes in combinations(config.sweep, config.repeats):
            name = ", ".join(f"{key}={value!r}" for key, value in axes.items())
            point = _validate(override(raw, axes), config._source, f"sweep ({name}): " if axes else "")
            result.append(Point(point, axes))
    except ConfigError as error:
        prefix = f"{config.source}: "
        raise ConfigError(str(error) if str(error).startswith(prefix) else prefix + str(error)) from None
    return result


def project_dir(config_file: Path | None = None) -> Path:
    """The nearest folder with pyproject.toml or .git above the file, else above the working directory."""
    starts = [config_file.resolve().parent] if config_file else []
    for start in (*starts, Path.cwd()):
        for folder in (start, *start.parents):
            if (folder / "pyproject.toml").is_file() or (folder / ".git").exists():
                return folder
    return Path.cwd()


def _checked(raw: dict[str, Any], source: Path | None) -> ExperimentConfig:
    try:
        refuse_nonfinite(raw)
    except ConfigError as error:
        raise ConfigError(f"{source or 'config'}: {error}") from None
    config = _validate(raw, source, "")
    points(config)
    return config


def _validate(raw: dict[str, Any], source: Path | None, prefix: str) -> ExperimentConfig:
    try:
        config = ExperimentConfig.model_validate(raw)
    except ValidationError as error:
        text = one_line(error, {"workload": WORKLOAD_KINDS})
        raise ConfigError(f"{source or 'config'}: {prefix}{text}") from None
    config._source = source
    for key, path in (("model.path", config.model.path), ("workload.path", getattr(config.workload, "path", None))):
        if isinstance(path, str) and _leaves_project(path):
            raise ConfigError(
                f"{source or 'config'}: {prefix}{key}: {path!r} leaves the project {config.project_dir}; expected a "
                "path inside it or an absolute one"
            )
    return config


def _leaves_project(path: str) -> bool:
    # By its words alone: links inside the project may point to a disk with room for checkpoints.
    return not os.path.isabs(path) and Path(os.path.normpath(path)).parts[:1] == ("..",)
