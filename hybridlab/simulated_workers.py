"""Workers for prompts and workers for decodes on a simulated machine: who has what of it, and their KV caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hybridlab.config import EngineConfig, WorkerConfig
from hybridlab.errors import ConfigError
from hybridlab.kv_blocks import BlockPool
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.shapes import ModelShape
from hybridlab.spec import ModelSpec
from hybridlab.worker_pools import WorkerPools


def worker_machines(engine: EngineConfig, machine: Machine, device: str) -> dict[str, Machine]:
    """What of the machine each worker has: a GPU of its own, its threads' share of the cores, all of the DRAM.

    Empty without `engine.workers`. Raises ConfigError naming what cannot be.
    """
    workers = engine.workers
    if workers is None:
        return {}
    kinds = {kind for name in workers for kind in ("prefill", "decode") if name.startswith(kind)}
    if kinds != {"prefill", "decode"} or not all(name.startswith(("prefill", "decode")) for name in workers):
        raise ConfigError(
            f"engine.workers has {list(workers)!r:.80}, expected names that begin with 'prefill' or 'decode', both"
        )
    if (engine.ranks or 1) > 1:
        raise ConfigError(f"engine.ranks is {engine.ranks}, which does not go with workers")
    if device == "emulated":
        raise ConfigError("engine.workers is given, the simulator expects none on device 'emulated'")
    if device == "cuda":
        _check_gpus(workers, machine)
    cores = machine.cpu_cores if engine.threads is None else min(machine.cpu_cores, engine.threads)
    threads = {name: own.threads or cores / len(workers) for name, own in workers.items()}
    if sum(threads.values()) > machine.cpu_cores:
        raise ConfigError(
            f"engine.workers have {sum(threads.values()):g} threads, expected at most {machine.cpu_cores:g}: the cores"
        )
    return {name: _with_cores(machine, count) for name, count in threads.items()}


def _check_gpus(workers: Mapping[str, WorkerConfig], machine: Machine) -> None:
    taken: dict[int, str] = {}
    for name, own in workers.items():
        gpu = own.gpu or 0
        if gpu >= machine.num_gpus:
            raise ConfigError(f"engine.workers.{name}.gpu is {gpu}, the machine has {machine.num_gpus:g} GPUs, from 0")
        if gpu in taken:
            raise ConfigError(
                f"engine.workers.{name}.gpu is {gpu}, which {taken[gpu]!r} has; the simulator expects one worker a GPU"
            )
        taken[gpu] = name


def _with_cores(machine: Machine, count: float) -> Machine:
    return replace(machine, cpu_cores=count, cpu_tflops=machine.cpu_tflops * count / machine.cpu_cores)


def worker_pools(
    engine: EngineConfig, spec: ModelSpec, shape: ModelShape, kv_tokens: int, block_tokens: int, device: str
) -> WorkerPools:
    """Empty caches, as an engine with these workers has them; `kv_tokens` for each that says nothing else."""
    from hybridlab.engine.workers import PIECE_BYTES

    sizes = {name: (own.kv_tokens or kv_tokens) // block_tokens for name, own in (engine.workers or {}).items()}
    pools = {name: BlockPool(count, block_tokens) for name, count in sizes.items()}
    block_bytes = block_tokens * spec.num_layers * shape.kv_bytes
    piece = max(1, int(PIECE_BYTES[device] // block_bytes))
    prefill = frozenset(name for name in pools if name.startswith("prefill"))
    return WorkerPools(pools, prefill, BlockPool(min(sizes.values()), block_tokens), piece)
