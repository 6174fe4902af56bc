"""A runtime of several worker processes on this machine: some compute prompts, the others decode, beside each other."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from hybridlab.batch import Entry, OnRoute
from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.gpu_copy import GpuCopy, gpu_copies
from hybridlab.engine.host_needs import PINNED, SHARED, host_needs_beside_gpu
from hybridlab.engine.kv_region import create_region, region_bytes
from hybridlab.engine.load_plan import plan_load
from hybridlab.engine.memory import GIB, MemoryPlan
from hybridlab.engine.options import check_accelerator_threads, host_precision
from hybridlab.engine.program_messages import plain_placement
from hybridlab.engine.remote_worker import RemoteWorker
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.worker import StepFailed
from hybridlab.engine.worker_main import PACKAGE
from hybridlab.engine.worker_options import is_prefill, share_cores
from hybridlab.engine.workers_backend import WorkersBackend
from hybridlab.errors import HybridlabError, MemoryBudgetError
from hybridlab.kv_blocks import BlockPool
from hybridlab.model.numerics import make_numerics
from hybridlab.plans import PlacementPlan, Program
from hybridlab.spec import HardwareSpec
from hybridlab.worker_pools import WorkerPools

PIECE_BYTES = {"cpu": 2**24, "emulated": 2**24, "cuda": 2**27}
"""Of a prompt's KV that comes before a decode step: some milliseconds each, through memory or over a link."""
_SHARED = ("weights", "experts")
"""What of a worker's memory plan all workers have together: its parts begin with these."""


class Workers:
    """What `engine.runtime.Runtime` is, with a process for each of `workers` (name: threads and kv_tokens).

    The pages of the weights are shared: all map the same files. On device "cuda", `workers` also say `gpu` and
    `gpu_bytes` of each, and the experts are those of `shared`, which stays the caller's; without it each has its own.
    What all workers of one GPU only read there is there once, where its driver can (`engine.gpu_copy`), and counts for
    the first of them. `free_bytes` is what of the host's memory nobody uses. Raises what `Runtime` raises, and
    `WorkerLost` if a process ends before it is ready.
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
        shared: SharedWeights | None = None,
        free_bytes: int | None = None,
    ) -> None:
        spec, weights, copies = checkpoint.spec, checkpoint.num_bytes, 1
        budget = hardware.host_memory_bytes if memory_gb is None else int(memory_gb * GIB)
        if hardware.device == "cuda":
            is_one = shared is not None
            needs = host_needs_beside_gpu(spec, placed, budget_bytes=0, kv_token_bytes=0, shared=is_one)
            weights = needs.fixed[PINNED] + needs.fixed[SHARED]
            copies = len(workers) if shared is None else 1
            if memory_gb is None and free_bytes is not None:
                budget = min(budget, free_bytes)
        # A share for each worker beside the weights, and one for what is between them.
        share = (budget - copies * weights) // (len(workers) + 1)
        self._copies = gpu_copies(workers) if hardware.device == "cuda" else {}
        plans: dict[str, MemoryPlan] = {}
        its_hardware: dict[str, HardwareSpec] = {}
        for name, own in workers.items():
            copy = self._copies.get(name)
            its_hardware[name] = dataclasses.replace(
                hardware, gpu_memory_bytes=own.get("gpu_bytes", hardware.gpu_memory_bytes)
            )
            numerics = make_numerics(host_precision(precision), own["threads"])
            try:
                plans[name] = plan_load(
                    spec,
                    placed,
                    its_hardware[name],
                    numerics,
                    weight_bytes=weights,
                    threads=own["threads"],
                    token_budget=token_budget,
                    kv_tokens=own["kv_tokens"],
                    kv_block_tokens=kv_block_tokens,
                    memory_gb=max(1, weights + share) / GIB,
                    shared=hardware.device == "cuda" and shared is not None,
                    pays=None if copy is None else copy.payer == name,
                    precision=precision,
                )
            except MemoryBudgetError as error:
                raise MemoryBudgetError(f"worker {name}: {error}") from None
            if not quiet:
                for plan in filter(None, (plans[name], plans[name].gpu)):
                    print(f"hybridlab: worker {name}: {plan}", file=sys.stderr)
        self._blocks = {name: plan.kv_tokens // kv_block_tokens for name, plan in plans.items()}
        self.kv_block_tokens, self.num_kv_blocks = kv_block_tokens, min(self._blocks.values())
        self._prefill = frozenset(name for name in workers if is_prefill(name))
        item_bytes = make_numerics(host_precision(precision), 1).kv_dtype.itemsize
        size = region_bytes(spec, self.num_kv_blocks, kv_block_tokens, item_bytes)
        block_bytes = kv_block_tokens * spec.kv_elements_per_token * item_bytes
        self._piece_blocks = max(1, PIECE_BYTES[hardware.device] // block_bytes)
        self.memory = _together(plans, copies, size, budget)
        self._woken = threading.Event()
        self._remotes: dict[str, RemoteWorker] = {}
        self._descriptor = descriptor = create_region(size)
        self._finalizer = weakref.finalize(self, _discard, self._remotes, descriptor, self._copies)
        self._finalizer.atexit = False  # the children are killed at exit by themselves
        cores = share_cores({name: own["threads"] for name, own in workers.items()})
        try:
            for name, own in workers.items():
                sides = accelerator_threads
                if hardware.device == "emulated":
                    sides = check_accelerator_threads(accelerator_threads, own["threads"])
                mine = None if shared is None else shared.duplicate()
                setup = {
                    "package": PACKAGE,
                    "checkpoint": str(checkpoint.folder.resolve()),
                    "hardware": dataclasses.asdict(its_hardware[name]),
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
                        "gpu": own.get("gpu", 0),
                    },
                    "shared": None if mine is None else mine.fileno(),
                    "beside": {"descriptor": descriptor, "num_blocks": self.num_kv_blocks, "cores": cores[name]},
                }
                remote = self._remotes[name] = RemoteWorker(
                    setup, spec, mine, keep=(descriptor,), on_gpu=self._copies.get(name), name=name
                )
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

    @property
    def on_gpu(self) -> dict[str, str]:
        """Whether each worker that shares a GPU has "made" or "attached" what all of it only read, or has its "own"."""
        states = {name: self._remotes[name].on_gpu_state for name in self._copies}
        return {name: state for name, state in states.items() if state is not None}

    def pools(self) -> WorkerPools:
        """Empty KV pools for a run."""
        size = self.kv_block_tokens
        pools = {name: BlockPool(count, size) for name, count in self._blocks.items()}
        return WorkerPools(pools, self._prefill, BlockPool(self.num_kv_blocks, size), self._piece_blocks)

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
        for copy in self._copies.values():
            copy.close()
        os.close(self._descriptor)


def _together(plans: Mapping[str, MemoryPlan], copies: int, region: int, budget: int) -> MemoryPlan:
    """One plan of all workers: so many copies of the weights, the rest of each, and the region."""
    one = next(iter(plans.values()))
    parts = {part: copies * size for part, size in one.parts.items() if part.startswith(_SHARED)}
    for name, plan in plans.items():
        parts |= {f"{name}: {part}": size for part, size in plan.parts.items() if not part.startswith(_SHARED)}
    parts["between workers"] = region
    sizes = min(plan.kv_tokens for plan in plans.values()), min(plan.token_budget for plan in plans.values())
    on_gpus = {name: plan.gpu for name, plan in plans.items() if plan.gpu is not None}
    on_them = {f"{name}: {part}": size for name, gpu in on_gpus.items() for part, size in gpu.parts.items()}
    room = sum(gpu.budget_bytes for gpu in on_gpus.values())
    gpu = MemoryPlan(on_them, room, *sizes, "GPU memory") if on_gpus else None
    offloaded = any(plan.kv_offloaded for plan in plans.values())
    return MemoryPlan(parts, budget, *sizes, gpu=gpu, kv_offloaded=offloaded)


def _discard(remotes: Mapping[str, RemoteWorker], descriptor: int, copies: Mapping[str, GpuCopy]) -> None:
    """For an engine that nobody holds any more: as `close`, without waiting."""
    for remote in remotes.values():
        remote.discard()
    for copy in copies.values():
        copy.close()
    os.close(descriptor)
