"""A runtime of several worker processes on this machine: some compute prompts, the others decode, beside each other."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hybridlab.batch import Entry, OnRoute
from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.kv_region import create_region, region_bytes
from hybridlab.engine.load_plan import plan_load
from hybridlab.engine.memory import GIB, MemoryPlan
from hybridlab.engine.options import check_accelerator_threads, check_numbers
from hybridlab.engine.program_messages import plain_placement
from hybridlab.engine.remote_worker import RemoteWorker
from hybridlab.engine.worker import StepFailed
from hybridlab.engine.worker_main import PACKAGE
from hybridlab.engine.workers_backend import WorkersBackend
from hybridlab.errors import ConfigError, HybridlabError
from hybridlab.kv_blocks import BlockPool
from hybridlab.model.numerics import make_numerics
from hybridlab.plans import PlacementPlan, Program
from hybridlab.spec import HardwareSpec
from hybridlab.worker_pools import WorkerPools

PREFILL, DECODE = "prefill", "decode"
MOST_WORKERS = 8
_KEYS = {"threads", "kv_tokens"}
WorkerOptions = dict[str, dict[str, Any]]


class Workers:
    """What `engine.runtime.Runtime` is, with a process for each of `workers` (name: threads and kv_tokens).

    The pages of the weights are shared: all map the same files. Raises what `Runtime` raises, and `WorkerLost` if a
    process ends before it is ready.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: HardwareSpec,
        placed: PlacementPlan,
        *,
        workers: Mapping[str, Mapping[str, Any]],
        precision: str,
        accelerator_threads: int | None,
        token_budget: int | None,
        kv_block_tokens: int,
        memory_gb: float | None,
        quiet: bool,
    ) -> None:
        spec, weights = checkpoint.spec, checkpoint.num_bytes
        budget = hardware.host_memory_bytes if memory_gb is None else int(memory_gb * GIB)
        # A share for each worker beside the weights, and one for what is between them.
        share = (budget - weights) // (len(workers) + 1)
        plans: dict[str, MemoryPlan] = {}
        for name, own in workers.items():
            numerics = make_numerics(precision, own["threads"])
            plans[name] = plan_load(
                spec,
                placed,
                hardware,
                numerics,
                weight_bytes=weights,
                threads=own["threads"],
                token_budget=token_budget,
                kv_tokens=own["kv_tokens"],
                kv_block_tokens=kv_block_tokens,
                memory_gb=max(1, weights + share) / GIB,
                precision=precision,
            )
            if not quiet:
                print(f"hybridlab: worker {name}: {plans[name]}", file=sys.stderr)
        self._blocks = {name: plan.kv_tokens // kv_block_tokens for name, plan in plans.items()}
        self.kv_block_tokens, self.num_kv_blocks = kv_block_tokens, min(self._blocks.values())
        self._prefill = frozenset(name for name in workers if is_prefill(name))
        item_bytes = make_numerics(precision, 1).kv_dtype.itemsize
        size = region_bytes(spec, self.num_kv_blocks, kv_block_tokens, item_bytes)
        self.memory = _together(plans, weights, size, budget)
        self._woken = threading.Event()
        self._remotes: dict[str, RemoteWorker] = {}
        self._descriptor = descriptor = create_region(size)
        self._finalizer = weakref.finalize(self, _discard, self._remotes, descriptor)
        self._finalizer.atexit = False  # the children are killed at exit by themselves
        cores = share_cores({name: own["threads"] for name, own in workers.items()})
        try:
            for name, own in workers.items():
                sides = accelerator_threads
                if hardware.device == "emulated":
                    sides = check_accelerator_threads(accelerator_threads, own["threads"])
                setup = {
                    "package": PACKAGE,
                    "checkpoint": str(checkpoint.folder.resolve()),
                    "hardware": dataclasses.asdict(hardware),
                    "placement": plain_placement(placed),
                    "options": {
                        "precision": precision,
                        "weight_layout": "rows",
                        "threads": own["threads"],
                        "accelerator_threads": sides or 0,
                        "token_budget": plans[name].token_budget,
                        "kv_tokens": plans[name].kv_tokens,
                        "kv_block_tokens": kv_block_tokens,
                        "memory_gb": max(1, weights + share) / GIB,
                        "free_bytes": None,
                        "quiet": True,
                    },
                    "shared": None,
                    "beside": {"descriptor": descriptor, "num_blocks": self.num_kv_blocks, "cores": cores[name]},
                }
                remote = self._remotes[name] = RemoteWorker(setup, spec, keep=(descriptor,))
                remote.thread.woken = self._woken
            starting = [remote.thread.call(remote.start) for remote in self._remotes.values()]
            for future in starting:
                future.result()
        except StepFailed as error:
            self.close()
            raise HybridlabError(f"a worker process could not load {checkpoint.folder}: {error}") from error
        except BaseException:  # an interrupt too
            self.close()
            raise

    @property
    def pids(self) -> dict[str, int | None]:
        """Of the processes by worker; None while another one is started."""
        return {name: remote.pid for name, remote in self._remotes.items()}

    def pools(self) -> WorkerPools:
        """Empty KV pools for a run."""
        size = self.kv_block_tokens
        pools = {name: BlockPool(count, size) for name, count in self._blocks.items()}
        return WorkerPools(pools, self._prefill, BlockPool(self.num_kv_blocks, size))

    def backend(self, on_route: OnRoute | None = None) -> WorkersBackend:
        """A backend whose clock starts now."""
        return WorkersBackend(self._remotes, self._woken, on_route)

    def wake(self) -> None:
        """Let an idle loop look at its queue again."""
        self._woken.set()

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]."""
        remote = next(remote for name, remote in self._remotes.items() if name not in self._prefill)
        return remote.thread.call(lambda: remote.logits(program, entry)).result()

    def close(self) -> None:
        """End the processes, after the steps that they may be in; idempotent."""
        if self._finalizer.detach() is None:
            return
        for remote in self._remotes.values():
            remote.close()
        os.close(self._descriptor)


def _together(plans: Mapping[str, MemoryPlan], weights: int, region: int, budget: int) -> MemoryPlan:
    """One plan of all workers: the weights once, the rest of each, and the region."""
    parts = {"weights (mapped)": weights}
    for name, plan in plans.items():
        parts |= {f"{name}: {part}": size for part, size in plan.parts.items() if part != "weights (mapped)"}
    parts["between workers"] = region
    kv_tokens = min(plan.kv_tokens for plan in plans.values())
    return MemoryPlan(parts, budget, kv_tokens, min(plan.token_budget for plan in plans.values()))


def _discard(remotes: Mapping[str, RemoteWorker], descriptor: int) -> None:
    """For an engine that nobody holds any more: as `close`, without waiting."""
    for remote in remotes.values():
        remote.discard()
    os.close(descriptor)
