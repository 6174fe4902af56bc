"""What one rank owns: the model, its experts' ring and link, the KV cache, and its ends of two groups of ranks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.collectives import Traffic
from hybridlab.engine.cuda_collectives import make_peers, rank_device
from hybridlab.engine.devices import Device, cpu_device, emulated_device
from hybridlab.engine.ep_exchange import Wire, make_exchanges, owners
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.link import CopyLink
from hybridlab.engine.offloaded_kv import OffloadedKV
from hybridlab.engine.options import host_precision
from hybridlab.engine.ranks_cache import SharedKV
from hybridlab.engine.ranks_executor import RankExecutor
from hybridlab.engine.worker import LocalWorker
from hybridlab.model.numerics import make_numerics
from hybridlab.plans import PlacementPlan
from hybridlab.spec import HardwareSpec, ModelSpec


class RankRuntime:
    """Rank `rank` of `num_ranks`, which all build this at the same time; they find each other through `store`.

    Each maps the checkpoint's own file, so that there is one copy of it in memory; each has a KV cache of all tokens,
    and a link and a ring of its own, for its own experts. With device "cuda", it has a copy of these in host memory,
    and one of its host's GPUs. Sockets listen on `interface` alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: HardwareSpec,
        placed: PlacementPlan,
        store: Store,
        *,
        rank: int,
        num_ranks: int,
        precision: str,
        threads: int,
        accelerator_threads: int,
        num_kv_blocks: int,
        kv_block_tokens: int,
        timeout_s: float,
        interface: str,
        kv_offloaded: bool,
    ) -> None:
        spec = checkpoint.spec
        self.num_kv_blocks, self.kv_block_tokens = num_kv_blocks, kv_block_tokens
        numerics = make_numerics(host_precision(precision), threads)
        own, has_gpu = own_placement(placed, spec, rank), False
        if hardware.device == "cpu":
            self._device: Device = cpu_device(checkpoint, numerics, threads)
        elif hardware.device == "cuda":
            from hybridlab.engine.cuda_device import cuda_device

            where, has_gpu = rank_device(store, rank, num_ranks)
            vram = hardware.gpu_memory_bytes
            self._device = cuda_device(checkpoint, own, threads, precision=precision, where=where, vram_bytes=vram)
        else:
            accelerator = make_numerics(precision, accelerator_threads)
            host, link = make_numerics(precision, threads - accelerator_threads), CopyLink(hardware.link_gb_s)
            self._device = emulated_device(checkpoint, accelerator, host, own, accelerator_threads, link)
        where, names, meet = self._device.torch_device, ("attention", "experts"), (store, rank, num_ranks)
        how: dict[str, Any] = {"timeout_s": timeout_s, "interface": interface}
        self._groups, check = make_peers(names, *meet, device=torch.device(where), alone=has_gpu, **how)
        storage = OffloadedKV if kv_offloaded else KVCache
        cache = storage(spec, num_kv_blocks, kv_block_tokens, numerics.kv_dtype, where)
        self._cache = SharedKV(cache, self._groups["attention"], spec, numerics.kv_dtype)
        ranked = {layer: owner_E.to(where) for layer, owner_E in owners(placed, spec).items()}
        exchanges = make_exchanges(self._groups["experts"], Wire(), ranked)
        executor = RankExecutor(self._device, self._cache, exchanges, rank, num_ranks, check)
        self.local = LocalWorker(executor, where)
        # On "cuda", all is copied.
        mapping = (lambda: None) if hardware.device == "cuda" else checkpoint.populate
        self._mapping = threading.Thread(target=mapping, name="hybridlab-map", daemon=True)
        self._mapping.start()

    def wait_mapped(self) -> None:
        """Wait until the weights' pages are mapped: benchmarks start from there."""
        self._mapping.join()

    def randomise_cache(self, seed: int) -> None:
        """Fill the KV cache with random values, the same on every rank."""
        self._cache.randomise(seed)

    def catch_up(self, blocks: Sequence[int]) -> None:
        """Have the content of KV `blocks` from the first rank; all ranks call this."""
        self._cache.catch_up(blocks)

    def traffic(self) -> dict[str, Traffic]:
        """Bytes since the start: keys and values for "attention", and what goes to and from "experts"."""
        return {name: replace(peers.traffic) for name, peers in self._groups.items()}


def own_placement(placed: PlacementPlan, model: ModelSpec, rank: int) -> PlacementPlan:
    """`placed` as a machine with one rank would have it, if the experts of other ranks were on another machine."""
    ranks = {
        (layer, e): int(placed.rank_of.get((layer, e), 0) != rank)
        for layer in model.moe_layers
        for e in range(model.num_experts)
    }
    return replace(placed, rank_of=ranks)
