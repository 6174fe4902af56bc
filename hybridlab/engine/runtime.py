"""One opened checkpoint on one device: weights, memory plan, KV storage, executor and worker."""

from __future__ import annotations

import os
import sys
import threading

import torch

from hybridlab.batch import Entry, OnRoute, StepBatch
from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.executor import Executor
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.lanes import TurnTakingLanes
from hybridlab.engine.memory import GIB, MemoryPlan, plan_memory
from hybridlab.engine.worker import EngineBackend, WorkerThread
from hybridlab.errors import ConfigError, StrategyError
from hybridlab.model import build_model
from hybridlab.model.numerics import make_numerics
from hybridlab.model.weight_layout import WeightLayout
from hybridlab.plans import PlacementPlan, Program, RequestId, Tier
from hybridlab.spec import HardwareSpec


class Runtime:
    """Owns what a run needs on this machine. Close it to end the worker thread and free the KV cache."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: HardwareSpec,
        *,
        precision: str,
        weight_layout: WeightLayout,
        threads: int,
        token_budget: int,
        kv_tokens: int | None,
        kv_block_tokens: int,
        memory_gb: float | None,
        quiet: bool,
    ) -> None:
        numerics = make_numerics(precision, threads, weight_layout)
        budget_bytes = hardware.host_memory_bytes if memory_gb is None else int(memory_gb * GIB)
        self.memory: MemoryPlan = plan_memory(
            checkpoint.spec,
            weight_bytes=checkpoint.num_bytes,
            budget_bytes=budget_bytes,
            token_budget=token_budget,
            kv_tokens=kv_tokens,
            kv_block_tokens=kv_block_tokens,
            kv_element_bytes=numerics.kv_dtype.itemsize,
            precision_bytes=numerics.workspace_bytes(checkpoint.spec, threads),
            weight_layout=weight_layout,
        )
        if not quiet:
            print(f"hybridlab: {self.memory}", file=sys.stderr)
        self.num_kv_blocks = self.memory.kv_tokens // kv_block_tokens
        self.kv_block_tokens = kv_block_tokens
        model = build_model(checkpoint, numerics, threads)
        self._cache = KVCache(checkpoint.spec, self.num_kv_blocks, kv_block_tokens, numerics.kv_dtype)
        self._executor = Executor(model, self._cache, TurnTakingLanes())
        self._worker = WorkerThread()
        # Beside the first prompts: an unmapped page costs a fault in the middle of a kernel.
        self._mapping = threading.Thread(target=checkpoint.populate, name="hybridlab-map", daemon=True)
        self._mapping.start()

    def wait_mapped(self) -> None:
        """Wait until the weights' pages are mapped: benchmarks start from there."""
        self._mapping.join()

    def backend(self, on_route: OnRoute | None = None) -> EngineBackend:
        """A backend whose clock starts now."""
        return EngineBackend(self._executor, self._worker, on_route)

    def wake(self) -> None:
        """Let an idle loop look at its queue again."""
        self._worker.woken.set()

    def step(self, program: Program, batch: StepBatch, on_route: OnRoute | None = None) -> dict[RequestId, int]:
        """Run one step and wait for it, outside any queue; returns the drawn tokens."""
        return self._worker.call(lambda: self._executor.run(program, batch, 0.0, on_route)[0]).result()

    def randomise_cache(self, seed: int) -> None:
        """Fill the KV cache with random values, so that a benchmark at depth need not prefill."""
        self._cache.randomise(seed)

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]."""
        return self._worker.call(lambda: self._executor.logits(program, entry)).result()

    def close(self) -> None:
        self._worker.close()


def check_device(device: str) -> str:
    """The device that "auto" stands for; raises `ConfigError` for one that this version cannot drive."""
    if device in ("auto", "cpu"):
        return "cpu"
    raise ConfigError(f"device {device!r} is not available, expected 'cpu' (or 'auto')")


def check_threads(threads: int | None, hardware: HardwareSpec) -> int:
    """All cores that this process may use by default; raises `ConfigError` for an impossible number."""
    if threads is None:
        return hardware.num_cores
    most = 4 * (os.cpu_count() or 1)
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= most:
        raise ConfigError(f"threads is {threads!r}, expected an int from 1 to {most}")
    return threads


def check_placed(placed: PlacementPlan, placement_name: str) -> None:
    """Refuse tiers that device "cpu" cannot hold; raises `StrategyError` naming the first expert."""
    if not isinstance(placed, PlacementPlan):
        raise StrategyError(
            f"placement {placement_name}: place() returned {type(placed).__name__}, expected PlacementPlan"
        )
    named = [(f"expert {e} of layer {layer}", tier) for (layer, e), tier in placed.tier_of.items()]
    for what, tier in (("default_tier", placed.default_tier), *named):
        if tier is Tier.STREAMED:
            raise StrategyError(
                f"placement {placement_name}: {what} is streamed, device 'cpu' has no link to stream over"
            )
