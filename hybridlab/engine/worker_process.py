"""A runtime in a process of its own: what ends the process costs the requests of one step, and it is started again.

The parent keeps strategies, plans and the queue; the process has weights, KV cache and device.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from hybridlab.batch import Entry, OnRoute, StepBatch
from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.channel import Kind
from hybridlab.engine.memory import MemoryPlan, Peak
from hybridlab.engine.program_messages import plain_placement
from hybridlab.engine.remote_worker import RemoteWorker
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.worker import EngineBackend, StepFailed
from hybridlab.engine.worker_main import PACKAGE, SEED
from hybridlab.errors import HybridlabError, WorkerLost
from hybridlab.plans import PlacementPlan, Program, RequestId
from hybridlab.spec import HardwareSpec


class WorkerProcess:
    """What `engine.runtime.Runtime` is, in a process of its own; `options` are those of `Runtime`, as plain data.

    With `shared`, which stays the caller's, all such processes have one copy of the weights: the first one fills it.

    Raises what `Runtime` raises, and `WorkerLost` if the process ends before it is ready.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: HardwareSpec,
        placed: PlacementPlan,
        *,
        shared: SharedWeights | None = None,
        **options: Any,
    ) -> None:
        shared = None if shared is None else shared.duplicate()
        setup = {
            "package": PACKAGE,
            "checkpoint": str(checkpoint.folder.resolve()),
            "hardware": dataclasses.asdict(hardware),
            "placement": plain_placement(placed),
            "options": options,
            "shared": None if shared is None else shared.fileno(),
        }
        self._remote = remote = RemoteWorker(setup, checkpoint.spec, shared)
        try:
            ready = remote.thread.call(remote.start).result()
        except StepFailed as error:
            remote.close()
            raise HybridlabError(f"the worker process could not load {checkpoint.folder}: {error}") from error
        except BaseException:  # an interrupt too
            remote.close()
            raise
        # An engine that nobody holds any more takes its process along.
        self._finalizer = weakref.finalize(self, remote.discard)
        self._finalizer.atexit = False
        self.memory = _memory_plan(ready["memory"])
        self.num_kv_blocks: int = ready["num_kv_blocks"]
        self.kv_block_tokens: int = ready["kv_block_tokens"]

    @property
    def pid(self) -> int | None:
        """Of the process; None while another one is started."""
        return self._remote.pid

    @property
    def num_packed(self) -> int:
        """Weights that the process of now has packed: none of those that another one shares with it."""
        return self._remote.num_packed

    def wait_mapped(self) -> None:
        """Wait until the weights' pages are mapped: benchmarks start from there."""
        self._remote.ask(Kind.MAPPED).result()

    def backend(self, on_route: OnRoute | None = None) -> EngineBackend:
        """A backend whose clock starts now."""
        return EngineBackend(self._remote, self._remote.thread, on_route)

    def wake(self) -> None:
        """Let an idle loop look at its queue again."""
        self._remote.thread.woken.set()

    def step(self, program: Program, batch: StepBatch, on_route: OnRoute | None = None) -> dict[RequestId, int]:
        """Run one step and wait for it, outside any queue; returns the drawn tokens."""
        return self._remote.thread.call(lambda: self._remote.run(program, batch, 0.0, on_route)[0]).result()

    def randomise_cache(self, seed: int) -> None:
        """Fill the KV cache with random values, so that a benchmark at depth need not prefill."""
        self._remote.ask(Kind.RANDOMISE, SEED.pack(seed)).result()

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]."""
        return self._remote.thread.call(lambda: self._remote.logits(program, entry)).result()

    def peak(self) -> Peak | None:
        """As `Runtime.peak`, of the process of now; None while another one is started."""
        try:
            found = self._remote.told(Kind.PEAK).result()
        except WorkerLost:
            return None
        return None if found is None else Peak(**found)

    def close(self) -> None:
        """End the process, after the step that it may be in; idempotent."""
        self._finalizer.detach()
        self._remote.close()


def _memory_plan(plain: Mapping[str, Any]) -> MemoryPlan:
    nested = {name: _memory_plan(value) for name, value in plain.items() if name == "gpu" and value is not None}
    return MemoryPlan(**{**plain, **nested})
