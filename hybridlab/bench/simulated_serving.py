"""`backend="simulator"`: an experiment on the machine that its config describes. Needs no checkpoint and no jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridlab import provenance
from hybridlab.config import ExperimentConfig
from hybridlab.errors import ConfigError
from hybridlab.kv_blocks import BlockPool
from hybridlab.lowering import Planner
from hybridlab.plans import PlacementPlan
from hybridlab.prefix_cache import NoPrefixes, PrefixCache
from hybridlab.request import Request, RequestRecord
from hybridlab.request_queue import RequestQueue
from hybridlab.routing import RoutingStats
from hybridlab.serving import Served, serve
from hybridlab.simulated_workers import worker_machines, worker_pools
from hybridlab.simulator.backend import SimulatorBackend
from hybridlab.simulator.machine import Machine, load_profile
from hybridlab.simulator.room import require_room
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape, public_models
from hybridlab.spec import HardwareSpec, ModelSpec

BLOCK_TOKENS = 16
"""Of a KV block, as `hybridlab.load` has it."""


@dataclass(frozen=True)
class Simulated:
    """What a config simulates. `routing` decides which experts tokens choose, `known` of it is what placements see."""

    name: str
    machine: Machine
    spec: ModelSpec
    shape: ModelShape
    routing: RoutingStats
    known: RoutingStats
    gpu: bool
    workers: Mapping[str, Machine] = field(default_factory=dict)
    """What of the machine each worker has; empty: there is one, which has all."""

    @property
    def hardware(self) -> HardwareSpec:
        return self.machine.hardware(self.name, gpu=self.gpu)

    def identity(self) -> dict[str, Any]:
        """What determines a simulated result beside the code, the strategies and the workload; no real machine."""
        model = provenance.digest(repr((self.spec, self.shape)).encode())
        routing = provenance.digest([[stats.layers, stats.counts] for stats in (self.routing, self.known)])
        about = {"cpu": f"{self.name} (simulated)", "cores": int(self.machine.cpu_cores), "gpu": self.gpu}
        return {"model": model, "routing": routing, "machine": {**about, **asdict(self.machine)}}


def simulated(config: ExperimentConfig, checkpoint: Path) -> Simulated:
    """The machine and the model of a config. Raises `ConfigError` or `CheckpointError` naming what is off."""
    given = config.simulator
    profile = load_profile(_machine_path(config))
    try:
        machine = replace(profile.machine, **given.overrides)
    except TypeError:
        known = asdict(profile.machine)
        wrong = next(name for name in given.overrides if name not in known)
        raise ConfigError(f"simulator.overrides: unknown {wrong!r}, expected one of {', '.join(known)}") from None
    machine.check("simulator.overrides")
    own = "emulated" if machine.gpu_dram_bytes else "cuda"
    device = config.engine.device or (own if machine.has_gpu else "cpu")
    if device not in ("cpu", own) or (device == own and not machine.has_gpu):
        there = f"'cpu' or {own!r}" if machine.has_gpu else "'cpu': the machine has no GPU"
        raise ConfigError(f"engine.device is {device!r}, the simulator of {profile.name} expects {there}")
    ranks, most = config.engine.ranks or 1, int(machine.num_gpus) if device == "cuda" else 1
    if ranks > max(1, most):
        raise ConfigError(f"engine.ranks is {ranks}, the simulator of {profile.name} expects at most {most}: its GPUs")
    if config.engine.interface is not None:
        raise ConfigError("engine.interface is given, the simulator expects none: nothing is sent")
    if config.engine.link_gb_s is not None:
        machine = replace(machine, link_gb_s=min(machine.link_gb_s, config.engine.link_gb_s))
    if config.engine.vram_gb is not None:
        machine = replace(machine, gpu_memory_gb=min(machine.gpu_memory_gb, config.engine.vram_gb))
    workers = worker_machines(config.engine, machine, device)
    spec, shape = _model(config, checkpoint)
    shape = shape.with_bits(given.expert_bits or shape.expert_bits, given.dense_bits or shape.dense_bits)
    known = RoutingStats() if given.routing is None else RoutingStats.load(config.project_dir / given.routing)
    routing = known if given.routing is not None else _popularity(config, spec)
    Routes(spec, routing)  # raises for those of another model
    return Simulated(profile.name, machine, spec, shape, routing, known, device != "cpu", workers)


def _popularity(config: ExperimentConfig, spec: ModelSpec) -> RoutingStats:
    """Of the experts of a preset's checkpoint, as it would be made."""
    from hybridlab.checkpoint.routing import expert_inclusion

    if config.model.path is not None or config.model.routing == "uniform":
        return RoutingStats()
    shares = expert_inclusion(spec, config.model.routing, config.model.seed)
    rows = tuple(tuple(round(1e9 * share) for share in row.tolist()) for row in shares.values())
    return RoutingStats(rows, f"preset, {config.model.routing}", tuple(shares))


def _machine_path(config: ExperimentConfig) -> str | Path:
    name = config.simulator.machine
    return config.project_dir / name if name.endswith(".toml") else name


def _model(config: ExperimentConfig, checkpoint: Path) -> tuple[ModelSpec, ModelShape]:
    model = config.model
    if model.path is not None:
        from hybridlab.checkpoint import read_config

        spec = read_config(checkpoint)
        return spec, ModelShape.of(spec)
    if model.preset in public_models():
        spec, shape = public_models()[model.preset]
        if model.layers is not None:
            if model.layers > spec.num_layers:
                raise ConfigError(f"model.layers is {model.layers}, expected at most {spec.num_layers}")
            kept = frozenset(layer for layer in spec.dense_layers if layer < model.layers)
            spec = replace(spec, num_layers=model.layers, dense_layers=kept)
        if model.dtype == "bf16":
            spec, shape = replace(spec, weight_dtype="bf16"), shape.with_bits(16.0)
        return spec, shape
    from hybridlab.checkpoint.presets import preset_spec

    spec = preset_spec(model.preset or "", dtype=model.dtype, layers=model.layers)
    return spec, ModelShape.of(spec)


class SimulatorBench:
    """Runs on a clock: what it costs is this process's time alone, so it holds no device."""

    evidence = "simulated"
    exclusive_device: str | None = None
    needs_checkpoint = False

    def __init__(self, config: ExperimentConfig, checkpoint: Path, placement: Any, overlap: Any, quiet: bool) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._placement, self._overlap = placement, overlap
        self._loaded: tuple[Simulated, Planner, int, int] | None = None
        self.vocab = 0

    def check(self) -> None:
        simulated(self._config, self._checkpoint)

    def load(self) -> None:
        there = simulated(self._config, self._checkpoint)
        placed = self._placement.place(there.spec, there.hardware, there.known)
        if (ranks := self._config.engine.ranks or 1) > 1:
            from hybridlab.engine.ranks import spread

            name = type(self._placement).__name__
            placed = spread(placed, there.spec, ranks, self._config.engine.exchange or "small_ep", name)
        token_budget, kv_tokens = sizes(self._config, there, placed)
        ranked = placed, tuple(range(ranks))
        planner = Planner(there.spec, there.hardware, self._placement, self._overlap, *ranked)
        self._loaded = there, planner, token_budget, kv_tokens
        self.vocab = there.spec.vocab

    def serve(
        self,
        requests: Sequence[Request],
        scheduler: Any,
        on_event: Callable[[RequestRecord, int], None] | None,
        *,
        keep_span_steps: int = 64,
    ) -> Served:
        if self._loaded is None:
            raise ConfigError("the bench is not loaded; call load() first")
        there, planner, token_budget, kv_tokens = self._loaded
        about = there.machine, there.spec, there.shape, Routes(there.spec, there.routing)
        backend = SimulatorBackend(*about, there.workers or ("main",), BLOCK_TOKENS)
        if there.workers:
            device = "cuda" if there.gpu else "cpu"
            pools = worker_pools(self._config.engine, there.spec, there.shape, kv_tokens, BLOCK_TOKENS, device)
            queue = RequestQueue(requests, pools, there.spec, token_budget)
            return serve(backend, queue, scheduler, planner, keep_span_steps=keep_span_steps, on_event=on_event)
        pool = BlockPool(kv_tokens // BLOCK_TOKENS, BLOCK_TOKENS)
        prefixes = PrefixCache(pool) if self._config.engine.prefix_cache else NoPrefixes()
        queue = RequestQueue(requests, pool, there.spec, token_budget, prefixes, rank_sets=planner.rank_sets)
        return serve(backend, queue, scheduler, planner, keep_span_steps=keep_span_steps, on_event=on_event)

    def close(self) -> None:
        self._loaded = None


def sizes(config: ExperimentConfig, there: Simulated, placed: PlacementPlan) -> tuple[int, int]:
    """(tokens of a step, tokens of KV): those that the engine would plan on that machine.

    Raises `MemoryBudgetError` for a model that does not fit it.
    """
    from hybridlab.engine.load_plan import DEFAULT_KV_TOKENS, LEAST_STEP, plan_load
    from hybridlab.engine.options import host_precision
    from hybridlab.model.numerics import make_numerics

    engine, hardware = config.engine, there.hardware
    kv_tokens = engine.kv_tokens or 0
    if there.shape.expert_bits < 8.0:  # a format that the engine does not load, and so does not plan for
        kv_tokens = -(-(kv_tokens or DEFAULT_KV_TOKENS) // BLOCK_TOKENS) * BLOCK_TOKENS
        require_room(there.machine, there.spec, there.shape, placed, gpu=there.gpu, kv_tokens=kv_tokens)
        return engine.token_budget or LEAST_STEP, kv_tokens
    require_room(there.machine, there.spec, there.shape, placed, gpu=there.gpu, kv_tokens=kv_tokens)
    threads = engine.threads or hardware.num_cores
    plan = plan_load(
        there.spec,
        placed,
        hardware,
        make_numerics(host_precision(engine.precision), threads),
        weight_bytes=int(sum(there.shape.weight_bytes(there.spec))),
        threads=threads,
        token_budget=engine.token_budget,
        kv_tokens=engine.kv_tokens,
        kv_block_tokens=BLOCK_TOKENS,
        memory_gb=engine.memory_gb,
        weight_layout=engine.weight_layout or "rows",
        precision=engine.precision,
    )
    return plan.token_budget, plan.kv_tokens
