"""What an experiment runs on, by name, and the checkpoint that it runs on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hybridlab import provenance
from hybridlab.config import CHECKPOINTS, ExperimentConfig, ModelConfig
from hybridlab.errors import CheckpointError, ConfigError
from hybridlab.request import Request, RequestRecord
from hybridlab.sections import did_you_mean
from hybridlab.serving import Served

if TYPE_CHECKING:
    from hybridlab.session import Engine

OnEvent = Callable[[RequestRecord, int], None]


class Bench(Protocol):
    """What an experiment needs of a backend: made at no cost, loaded for some runs, closed.

    `exclusive_device` is what it must have alone while it is loaded, so that what it measures is its own; None for a
    backend that measures nothing. Without `needs_checkpoint`, none is made for it. `vocab` is known once it is loaded.
    After `close`, `load` makes it ready again.
    """

    evidence: str
    exclusive_device: str | None
    vocab: int
    needs_checkpoint: bool

    def check(self) -> None:
        """Raise what would stop every run of it (ConfigError, CheckpointError), before any run starts.

        The checkpoint may not be made yet.
        """
        ...

    def load(self) -> None:
        """Take the memory and make ready to serve."""
        ...

    def serve(self, requests: Sequence[Request], scheduler: Any, on_event: OnEvent) -> Served:
        """Serve all requests; `on_event(record, token)` is called for every drawn token."""
        ...

    def close(self) -> None:
        """Give the memory back; idempotent."""
        ...


class EngineBench:
    """Runs on this machine, for real."""

    # On whatever device the rest runs: experts of the host are computed by all cores, from memory that all share.
    exclusive_device: str | None = "cpu"
    needs_checkpoint = True

    def __init__(self, config: ExperimentConfig, checkpoint: Path, placement: Any, overlap: Any, quiet: bool) -> None:
        self._given = config.engine.model_dump(exclude_none=True)
        self._loaded_with = {"placement": placement, "overlap": overlap, "quiet": quiet}
        self._checkpoint = checkpoint
        self._engine: Engine | None = None
        self.evidence = "emulated" if config.engine.device == "emulated" else "measured"
        self.vocab = 0

    def check(self) -> None:
        from hybridlab.checkpoint import open_checkpoint
        from hybridlab.engine.options import check_accelerator_threads, check_device, check_threads
        from hybridlab.engine.ranks import check_ranks, threads_of_rank
        from hybridlab.engine.worker_options import check_workers
        from hybridlab.hardware import detect

        given, ranks, hardware = self._given, self._given.get("ranks", 1), detect()
        names = ("exchange", "interface", "weight_layout", "worker")
        set_names = {name: given[name] for name in names if name in given}
        check_ranks(ranks, placement=self._loaded_with["placement"], **set_names)
        device = check_device(given.get("device", "auto"))
        threads = check_threads(threads_of_rank(given.get("threads"), ranks, device, hardware.num_cores), hardware)
        unused = {
            "ranks": ranks if ranks > 1 else None,
            "worker": None if given.get("worker") == "auto" else given.get("worker"),
            "weight_layout": None if given.get("weight_layout") == "rows" else given.get("weight_layout"),
        }
        check_workers(given.get("workers"), threads, device, unused=unused, in_files=True)
        if device == "emulated":
            check_accelerator_threads(self._given.get("accelerator_threads"), threads)
        if is_made(self._checkpoint):
            open_checkpoint(self._checkpoint)

    def load(self) -> None:
        from hybridlab.loading import load

        self._engine = load(self._checkpoint, **self._loaded_with, **self._given)
        self.vocab = self._engine.spec.vocab

    def serve(self, requests: Sequence[Request], scheduler: Any, on_event: OnEvent) -> Served:
        if self._engine is None:
            raise ConfigError("the bench is not loaded; call load() first")
        return self._engine.serve(requests, scheduler, on_event=on_event)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def _simulator(config: ExperimentConfig, checkpoint: Path, placement: Any, overlap: Any, quiet: bool) -> Bench:
    from hybridlab.bench.simulated_serving import SimulatorBench

    return SimulatorBench(config, checkpoint, placement, overlap, quiet)


BACKENDS: dict[str, Callable[[ExperimentConfig, Path, Any, Any, bool], Bench]] = {
    "engine": EngineBench,
    "simulator": _simulator,
}


def check_backend(name: str) -> None:
    """Raises ConfigError for a backend that there is not."""
    if name not in BACKENDS:
        raise ConfigError(f"backend: unknown {name!r}{did_you_mean(str(name), BACKENDS)}")


def checkpoint_of(model: ModelConfig, results: Path, base: Path) -> Path:
    """The checkpoint folder of a config: its `path` below `base`, or `results`/checkpoints/<recipe>, made or not.

    Raises ConfigError if `path` is no checkpoint, CheckpointError if the preset or the routing is unknown.
    """
    if model.path is not None:
        folder = base / model.path
        if not is_made(folder):
            raise ConfigError(f"model.path: {folder}: expected a checkpoint folder with a config.json")
        return folder
    from hybridlab.checkpoint.presets import preset_spec
    from hybridlab.checkpoint.routing import ROUTINGS
    from hybridlab.simulator.shapes import public_models

    if model.preset not in public_models():  # shapes that the simulator alone knows
        preset_spec(model.preset or "", dtype=model.dtype, layers=model.layers)
    if model.routing not in ROUTINGS:
        raise CheckpointError(f"routing {model.routing!r} is unknown, expected one of {', '.join(ROUTINGS)}")
    recipe = model.model_dump(exclude={"path"})
    depth = f"-{model.layers}layers" if model.layers else ""
    routing = f"-{model.routing}" if model.routing != "uniform" else ""
    preset = (model.preset or "").replace("/", "--")
    name = f"{preset}-{model.dtype}{depth}{routing}-seed{model.seed}-{provenance.digest(recipe, 6)}"
    return results / CHECKPOINTS / name


def is_made(checkpoint: Path) -> bool:
    """Whether the checkpoint folder is there; it appears whole or not at all."""
    return (checkpoint / "config.json").is_file()


def make_missing(model: ModelConfig, checkpoint: Path, *, progress: bool = False) -> None:
    """Carry the recipe of `model` out if `checkpoint` is not there. Raises CheckpointError (full disk, ...)."""
    if is_made(checkpoint):
        return
    from hybridlab.checkpoint.writer import make_checkpoint

    for partial in checkpoint.parent.glob(f".{checkpoint.name}.partial-*"):
        newest_s = max((path.stat().st_mtime for path in (partial, *partial.iterdir())), default=0.0)
        if time.time() - newest_s > 3600:  # left by a kill: nobody is writing there any more
            shutil.rmtree(partial, ignore_errors=True)
    options = model.model_dump(include={"dtype", "seed", "layers", "routing"})
    make_checkpoint(checkpoint, model.preset or "", progress=progress, **options)
