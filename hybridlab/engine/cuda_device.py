"""device="cuda": attention and arrived experts on the GPU, the others on the host's cores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch

from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.cuda_capture import GraphCapture, PlainCapture
from hybridlab.engine.cuda_lanes import CudaLanes
from hybridlab.engine.cuda_memory import captured_bytes, captured_token_bytes, outside_allocator_bytes
from hybridlab.engine.cuda_ring import CudaRing, ResidentExperts
from hybridlab.engine.devices import Capture, Device, TierExperts, no_link, nothing_to_bring
from hybridlab.engine.gpu_copy import SharedOnGpu, device_index, resident_pool
from hybridlab.engine.host_exchange import HostExchange
from hybridlab.engine.host_needs import kept_experts
from hybridlab.engine.lane_threads import LaneThreads
from hybridlab.engine.lanes import Lanes
from hybridlab.engine.own_experts import own_experts
from hybridlab.engine.ring import slot_experts
from hybridlab.engine.shared_blocks import host_store
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.staging import Staging
from hybridlab.model import build_model
from hybridlab.model.cuda_blocks import triton_module
from hybridlab.model.cuda_numerics import CudaBf16
from hybridlab.model.device_weights import DeviceWeights, OwnWeights
from hybridlab.model.expert_block import ExpertBlock, experts_of
from hybridlab.model.fp8_experts import expert_format
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.spec import ModelSpec

CUDA = "cuda:0"
"""The one device; on "cpu" the same code runs in torch alone, which is how it is tested without a GPU."""


def cuda_device(
    checkpoint: Checkpoint,
    placed: PlacementPlan,
    threads: int,
    *,
    precision: str = "bf16",
    where: str = CUDA,
    vram_bytes: int | None = None,
    shared: SharedWeights | None = None,
    on_gpu: SharedOnGpu | None = None,
    quiet: bool = True,
    poison: bool = False,
) -> Device:
    """Experts that `kept_experts` names are pinned in host memory once (`HostStore`): the link and the CPU's kernels
    read the same bytes. The others are copied to the device and kept nowhere else.

    With `shared` they are those that other processes pin as well, if CUDA takes memory that cannot be written.
    With `poison`, ring slots are filled with NaN before each load.
    With `precision` "fp8" experts on the device quantise their activations too.
    The process may take no more than `vram_bytes` of the device, its context included (None: all of it); with
    `on_gpu`, projections and experts that stay there are those of other processes too, and one of them pays for them.
    """
    device, spec = torch.device(where), checkpoint.spec
    resident: dict[int, list[int]] = defaultdict(list)
    for layer, own in own_experts(placed, spec).items():
        for expert in own:
            if placed.tier(layer, expert) is Tier.RESIDENT:
                resident[layer].append(expert)
    weights: DeviceWeights = OwnWeights(device)
    if on_gpu is not None:
        weights = on_gpu.weights(device_index(checkpoint, {} if placed.movable else resident), device)
    if device.type == "cuda":
        paid_bytes = on_gpu.num_bytes if on_gpu is not None and on_gpu.pays else 0
        total = torch.cuda.get_device_properties(device).total_memory
        elsewhere = outside_allocator_bytes(placed) + paid_bytes
        least = min(total, total if vram_bytes is None else vram_bytes - elsewhere)
        torch.cuda.set_per_process_memory_fraction(least / total, device)
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(checkpoint, CudaBf16(where, weights), threads)
    layers = {layer: experts_of(model.expert_weights(layer)) for layer in spec.moe_layers}
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    pin = device.type == "cuda"
    kept = kept_experts(placed, spec)
    with ExitStack() as undo:  # what was made before something fails is given back
        store = host_store(checkpoint, layers, block, shared, kept, pin=pin, threads=threads, progress=not quiet)
        undo.callback(store.close)
        size = slot_experts(placed, spec)
        largest = max([size, *map(len, resident.values())])
        # One core is left to the thread that launches steps: threads that spin on all of them delay it by milliseconds.
        host = HostExchange(store, spec, max(1, threads - 1), device, layers)
        undo.callback(host.close)
        lanes = CudaLanes(device, host) if device.type == "cuda" else LaneThreads()
        undo.callback(lanes.close)
        experts: dict[Tier, TierExperts] = {Tier.HOST: host}
        load, move = no_link, nothing_to_bring
        if largest:
            make_group = expert_format(precision, block, largest, device)
            passing = max((len(own) for layer, own in resident.items() if not set(own) <= set(kept[layer])), default=0)
            # Shared memory has them too, not pinned: CUDA refuses to copy what is pinned in part, as neighbours may be.
            source = {
                layer: store.experts(layer) if store.has(layer, own) else layers[layer]
                for layer, own in resident.items()
            }
            with Staging(source, block, passing, pin=pin, threads=threads) as staging:
                bring = staging.copy if passing else store.copy
                pools = OwnWeights(device) if on_gpu is None or placed.movable else weights

                def pool_of(layer: int, experts: Sequence[int]) -> torch.Tensor:
                    return resident_pool(pools, layer, experts, block, lambda pool: bring(layer, experts, pool))

                on_device = ResidentExperts(resident, pool_of, store, make_group, spec.num_experts, device)
            undo.callback(on_device.close)
            experts[Tier.RESIDENT], move = on_device, on_device.move
            if size:
                ring = CudaRing(placed.ring_slots, size, store, make_group, spec.num_experts, device, poison=poison)
                undo.callback(ring.close)
                experts[Tier.STREAMED], load = ring.experts, ring.load

        if on_gpu is not None:
            on_gpu.filled()
        capture = _capture(lanes, host, spec)
        return Device(model, lanes, experts, load, undo.pop_all().close, where, move, host.around, capture)


def release_cached(where: str) -> None:
    """Give back what torch keeps for later, once a device is closed: memory of the GPU and of the host.

    cuBLAS has a workspace for each stream that it ever ran on. Captured steps of other devices may read theirs.
    """
    internal: Any = torch._C
    with suppress(RuntimeError):  # a GPU that gave up gives nothing back
        torch.cuda.synchronize(where)
        if not CudaLanes.alive:
            internal._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        internal._host_emptyCache()


def _capture(lanes: Lanes, host: HostExchange, spec: ModelSpec) -> Capture | None:
    """None where decode attention has no kernel: without one, the host would have to look at every length."""
    if not isinstance(lanes, CudaLanes):
        return PlainCapture(lanes, host)
    is_power_of_2 = spec.head_dim & (spec.head_dim - 1) == 0
    if not is_power_of_2 or triton_module("triton_attention") is None:
        return None
    return GraphCapture(lanes, host, captured_bytes(spec), captured_token_bytes(spec))
