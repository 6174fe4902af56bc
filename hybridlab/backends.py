"""What an experiment runs on, by name, and the checkpoint that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from hybridlab import provenance
from hybridlab.config import ExperimentConfig, ModelConfig
from hybridlab.errors import ConfigError
from hybridlab.request import Request, RequestRecord
from hybridlab.serving import Served

OnEvent = Callable[[RequestRecord, int], None]


class Bench(Protocol):
    """What an experiment needs of a backend that has a model loaded."""

    evidence: str
    vocab: int

    def serve(self, requests: Sequence[Request], scheduler: Any, on_event: OnEvent) -> Served: ...

    def close(self) -> None: ...


class EngineBench:
    """Runs on this machine, for real."""

    def __init__(self, config: ExperimentConfig, checkpoint: Path, placement: Any, overlap: Any, quiet: bool) -> None:
        from hybridlab.session import load

        given = config.engine.model_dump(exclude_none=True)
        self._engine = load(checkpoint, placement=placement, overlap=overlap, quiet=quiet, **given)
        self.evidence = "emulated" if config.engine.device == "emulated" else "measured"
        self.vocab = self._engine.spec.vocab

    def serve(self, requests: Sequence[Request], scheduler: Any, on_event: OnEvent) -> Served:
        return self._engine.serve(requests, scheduler, on_event=on_event)

    def close(self) -> None:
        self._engine.close()


BACKENDS: dict[str, Callable[[ExperimentConfig, Path, Any, Any, bool], Bench]] = {"engine": EngineBench}


def checkpoint_of(model: ModelConfig, results: Path, base: Path, *, progress: bool = False) -> Path:
    """The checkpoint folder of a config: its `path` below `base`, or `results`/checkpoints/<recipe>.

    The recipe is carried out if that folder is missing.

    Raises ConfigError if `path` is no folder, CheckpointError if the preset or the routing is unknown.
    """
    if model.path is not None:
        folder = base / model.path
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path: {folder}: expected a checkpoint folder with a config.json")
        return folder
    recipe = model.model_dump(exclude={"path"})
    depth = f"-{model.layers}layers" if model.layers else ""
    routing = f"-{model.routing}" if model.routing != "uniform" else ""
    name = f"{model.preset}-{model.dtype}{depth}{routing}-seed{model.seed}-{provenance.digest(recipe, 6)}"
    folder = results / "checkpoints" / name
    if not (folder / "config.json").is_file():
        from hybridlab.checkpoint.writer import make_checkpoint

        options = model.model_dump(include={"dtype", "seed", "layers", "routing"})
        make_checkpoint(folder, model.preset or "", progress=progress, **options)
    return folder
