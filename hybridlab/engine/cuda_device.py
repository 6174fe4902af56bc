"""device="cuda": attention and arrived experts on the GPU, the others on the host's cores."""

from __future__ import annotations

from collections import defaultdict

import torch

from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.cuda_lanes import CudaLanes
from hybridlab.engine.cuda_memory import CONTEXT_BYTES
from hybridlab.engine.cuda_ring import CudaRing, ResidentExperts
from hybridlab.engine.devices import Device, TierExperts, no_link, nothing_to_bring
from hybridlab.engine.host_store import HostStore
from hybridlab.engine.lane_threads import LaneThreads
from hybridlab.engine.ring import slot_experts
from hybridlab.model import build_model
from hybridlab.model.base import Routed
from hybridlab.model.cuda_experts import Workspace
from hybridlab.model.cuda_numerics import CudaBf16
from hybridlab.model.expert_block import ExpertBlock, experts_of
from hybridlab.model.numerics import ExpertsFn, Numerics
from hybridlab.plans import Op, PlacementPlan, Tier

CUDA = "cuda:0"
"""The one device; on "cpu" the same code runs in torch alone, which is how it is tested without a GPU."""


def cuda_device(
    checkpoint: Checkpoint,
    host: Numerics,
    placed: PlacementPlan,
    threads: int,
    *,
    where: str = CUDA,
    vram_bytes: int | None = None,
    quiet: bool = True,
) -> Device:
    """Experts are pinned in host memory once (`HostStore`); the link and the CPU's kernels read the same bytes.

    The process may take no more than `vram_bytes` of the device, its context included (None: all of it).
    """
    device = torch.device(where)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        least = min(total, total if vram_bytes is None else vram_bytes - CONTEXT_BYTES)
        torch.cuda.set_per_process_memory_fraction(least / total, device)
    model = build_model(checkpoint, CudaBf16(where), threads)
    spec = model.spec
    layers = {layer: experts_of(model.expert_weights(layer)) for layer in spec.moe_layers}
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    store = HostStore(layers, block, pin=device.type == "cuda", threads=threads, progress=not quiet)
    resident: dict[int, list[int]] = defaultdict(list)
    for layer in spec.moe_layers:
        for expert in range(spec.num_experts):
            if placed.tier(layer, expert) is Tier.RESIDENT:
                resident[layer].append(expert)
    size = slot_experts(placed, spec)
    largest = max([size, *map(len, resident.values())])
    lanes = CudaLanes(device) if device.type == "cuda" else LaneThreads()
    experts: dict[Tier, TierExperts] = {Tier.HOST: _HostExperts(store, host, spec.num_experts, lanes)}
    load, move = no_link, nothing_to_bring
    if largest:
        workspace = Workspace(largest, block, device)
        on_device = ResidentExperts(resident, store, workspace, spec.num_experts, device)
        experts[Tier.RESIDENT], move = on_device, on_device.move
        if size:
            ring = CudaRing(placed.ring_slots, size, store, workspace, spec.num_experts, device)
            experts[Tier.STREAMED], load = ring.experts, ring.load

    def close() -> None:
        lanes.close()
        store.close()

    return Device(model, lanes, experts, load, close, where, move)


class _HostExperts:
    """The host's cores on the pinned weights: what they need comes down and what they made goes up on one stream."""

    def __init__(self, store: HostStore, numerics: Numerics, num_experts: int, lanes: CudaLanes | LaneThreads) -> None:
        self._store, self._numerics = store, numerics
        self._num_experts, self._lanes = num_experts, lanes
        self._layers: dict[int, ExpertsFn] = {}

    def __call__(self, op: Op, routed: Routed) -> torch.Tensor:
        if (compute := self._layers.get(op.layer)) is None:
            groups = zip(*self._store.experts(op.layer), strict=True)
            compute = self._layers[op.layer] = self._numerics.experts(*groups)
        here = Routed(routed.x_TH.cpu(), routed.expert_ids.cpu(), routed.weights.cpu())
        out = compute(here.x_TH, here.only(op.experts, self._num_experts), here.weights)
        return self._lanes.bring(out) if isinstance(self._lanes, CudaLanes) else out
