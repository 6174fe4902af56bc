"""One opened checkpoint on one device: weights, memory plan, KV storage, executor and worker."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import torch

from hybridlab.batch import Entry, OnRoute, StepBatch
from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.devices import Device, cpu_device, emulated_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.gpu_copy import SharedOnGpu
from hybridlab.engine.kv_cache import KVCache, KVStorage
from hybridlab.engine.link import CopyLink
from hybridlab.engine.load_plan import plan_load
from hybridlab.engine.memory import MemoryPlan, Peak
from hybridlab.engine.offloaded_kv import OffloadedKV
from hybridlab.engine.options import host_precision
from hybridlab.engine.shared_tiles import SharedTiles
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.worker import EngineBackend, LocalWorker
from hybridlab.engine.worker_thread import WorkerThread
from hybridlab.hardware.gpu import free_memory_bytes
from hybridlab.hardware.pinning import pinnable_bytes
from hybridlab.model.numerics import make_numerics
from hybridlab.model.weight_layout import WeightLayout, weight_source
from hybridlab.plans import PlacementPlan, Program, RequestId
from hybridlab.spec import HardwareSpec


class Runtime:
    """Owns what a run needs on this machine. Close it to end the worker thread and free the KV cache.

    With `shared`, which stays the caller's, weights in "tiles" (on "cuda": experts) are the one copy of several
    processes. `gpu` is the index of a CUDA device, `on_gpu` what other workers have on it as well.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: HardwareSpec,
        placed: PlacementPlan,
        *,
        precision: str,
        weight_layout: WeightLayout,
        threads: int,
        accelerator_threads: int,
        token_budget: int | None,
        kv_tokens: int | None,
        kv_block_tokens: int,
        memory_gb: float | None,
        free_bytes: int | None,
        quiet: bool,
        shared: SharedWeights | None = None,
        gpu: int = 0,
        on_gpu: SharedOnGpu | None = None,
    ) -> None:
        self._shared = None if shared is None else shared.duplicate()
        packed = None if hardware.device == "cuda" else self._shared
        tiles = None if packed is None else SharedTiles(checkpoint, packed, threads)
        self._source = source = tiles or weight_source(weight_layout, threads)
        numerics = make_numerics(host_precision(precision), threads, source)
        if hardware.device == "cuda":  # others may be at work on it
            paid_bytes = on_gpu.there_bytes if on_gpu is not None and on_gpu.pays else 0  # its own share's already
            free = free_memory_bytes(gpu) + paid_bytes
            hardware = replace(hardware, gpu_memory_bytes=min(hardware.gpu_memory_bytes, free))
        self.memory: MemoryPlan = plan_load(
            checkpoint.spec,
            placed,
            hardware,
            numerics,
            weight_bytes=checkpoint.num_bytes,
            threads=threads,
            token_budget=token_budget,
            kv_tokens=kv_tokens,
            kv_block_tokens=kv_block_tokens,
            memory_gb=memory_gb,
            free_bytes=free_bytes,
            pinnable_bytes=pinnable_bytes() if hardware.device == "cuda" else None,
            shared=hardware.device == "cuda" and self._shared is not None,
            pays=None if on_gpu is None else on_gpu.pays,
            weight_layout=weight_layout,
            precision=precision,
        )
        if not quiet:
            for plan in filter(None, (self.memory, self.memory.gpu)):
                print(f"hybridlab: {plan}", file=sys.stderr)
        if tiles is not None:
            tiles.open(progress=not quiet)
        self.num_kv_blocks = self.memory.kv_tokens // kv_block_tokens
        self.kv_block_tokens = kv_block_tokens
        if hardware.device == "cpu":
            self._device: Device = cpu_device(checkpoint, numerics, threads)
        elif hardware.device == "cuda":
            from hybridlab.engine.cuda_device import cuda_device

            where = {"where": f"cuda:{gpu}", "vram_bytes": hardware.gpu_memory_bytes, "on_gpu": on_gpu}
            self._device = cuda_device(
                checkpoint, placed, threads, precision=precision, shared=self._shared, quiet=quiet, **where
            )
        else:
            accelerator = make_numerics(precision, accelerator_threads, source)
            host = make_numerics(precision, threads - accelerator_threads, source)
            link = CopyLink(hardware.link_gb_s)
            self._device = emulated_device(checkpoint, accelerator, host, placed, accelerator_threads, link)
        storage = OffloadedKV if self.memory.kv_offloaded else KVCache
        sizes = (self.num_kv_blocks, kv_block_tokens, numerics.kv_dtype, self._device.torch_device)
        try:
            self._cache: KVStorage = storage(checkpoint.spec, *sizes)
        except BaseException:
            self._device.close()
            raise
        self._executor = Executor(self._device, self._cache)
        self.local = LocalWorker(self._executor, self._device.torch_device)
        self._worker = WorkerThread()
        # Beside the first prompts: an unmapped page costs a fault in the middle of a kernel. On "cuda", all is copied.
        mapping = (lambda: None) if hardware.device == "cuda" else (tiles or checkpoint).populate
        self._mapping = threading.Thread(target=mapping, name="hybridlab-map", daemon=True)
        self._mapping.start()

    @property
    def num_packed(self) -> int:
        """Weights that this process has packed: none of those that another one shares with it."""
        return self._source.num_packed

    @property
    def cache(self) -> KVStorage:
        """Where requests' KV is, between steps."""
        return self._cache

    def wait_mapped(self) -> None:
        """Wait until the weights' pages are mapped: benchmarks start from there."""
        self._mapping.join()

    def backend(self, on_route: OnRoute | None = None) -> EngineBackend:
        """A backend whose clock starts now."""
        return EngineBackend(self.local, self._worker, on_route)

    def wake(self) -> None:
        """Let an idle loop look at its queue again."""
        self._worker.woken.set()

    def step(self, program: Program, batch: StepBatch, on_route: OnRoute | None = None) -> dict[RequestId, int]:
        """Run one step and wait for it, outside any queue; returns the drawn tokens."""
        return self._worker.call(lambda: self.local.run(program, batch, 0.0, on_route)[0]).result()

    def randomise_cache(self, seed: int) -> None:
        """Fill the KV cache with random values, so that a benchmark at depth need not prefill."""
        self._cache.randomise(seed)

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]."""
        return self._worker.call(lambda: self.local.logits(program, entry)).result()

    def peak(self) -> Peak | None:
        """Of the GPU, since this was made; None without one. Other models of this process count too."""
        if self._device.torch_device == "cpu":
            return None
        where = self._device.torch_device
        return Peak(torch.cuda.max_memory_allocated(where), torch.cuda.max_memory_reserved(where))

    def close(self) -> None:
        """End the worker thread and give all memory up, whoever still holds this object; idempotent."""
        if self._worker.closed:
            return
        self._worker.close()
        self.local.close()
        self._executor.close()
        self._cache.close()
        self._device.close()
        where = self._device.torch_device
        del self._executor, self._cache, self._device
        if self._shared is not None:
            self._shared.close()
        if where != "cpu":
            from hybridlab.engine.cuda_device import release_cached

            release_cached(where)
