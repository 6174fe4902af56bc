"""`hl.load`: a checkpoint opened, planned and made ready to generate and to serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hybridlab.checkpoint import Checkpoint, open_checkpoint
from hybridlab.engine.collectives import LOOPBACK
from hybridlab.engine.host_needs import kept_experts
from hybridlab.engine.options import (
    check_accelerator_threads,
    check_device,
    check_format,
    check_fp8,
    check_numbers,
    check_placed,
    check_threads,
    check_unused,
    check_worker,
    cuda_hardware,
    emulated_hardware,
)
from hybridlab.engine.ranks import Ranks, check_ranks, rank_hardware, spread, threads_of_rank
from hybridlab.engine.runtime import Runtime
from hybridlab.engine.worker_options import check_workers, share_gpus
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.engine.workers import Workers
from hybridlab.errors import ConfigError
from hybridlab.hardware import detect
from hybridlab.hardware.gpu import detect_gpus
from hybridlab.lowering import Planner
from hybridlab.model.weight_layout import WeightLayout
from hybridlab.prefix_cache import NoPrefixes, PrefixCache
from hybridlab.routing import RoutingStats
from hybridlab.session import AnyRuntime, Engine
from hybridlab.strategies.registry import resolve
from hybridlab.weights_sharing import free_beside, sharing


def load(
    path: str | Path | Checkpoint,
    *,
    precision: str = "bf16",
    weight_layout: WeightLayout = "rows",
    device: str = "auto",
    accelerator_threads: int | None = None,
    link_gb_s: float | None = None,
    vram_gb: float | None = None,
    placement: Any = "all_host",
    overlap: Any = "sequential",
    threads: int | None = None,
    token_budget: int | None = None,
    kv_tokens: int | None = None,
    kv_block_tokens: int = 16,
    memory_gb: float | None = None,
    prefix_cache: bool = True,
    routing: RoutingStats | None = None,
    worker: Literal["auto", "thread", "process"] = "auto",
    ranks: int | Literal["torchrun"] = 1,
    exchange: str = "small_ep",
    interface: str = LOOPBACK,
    workers: Mapping[str, Mapping[str, Any]] | None = None,
    quiet: bool = False,
) -> Engine:
    """Open a Hugging Face checkpoint folder and make it ready; the memory plan is printed before allocation.

    Weights stay in the memory map ("rows"), or are packed into huge pages for a faster decode ("tiles": seconds of
    loading, and memory of their own). Processes share packed weights: with `worker="process"`, a worker that is started
    again has them already, and so has every load while `hybridlab weights hold` keeps them. `precision` is "bf16",
    "exact" or, with device "cuda", "fp8", where experts on the GPU quantise their activations as well; `threads`
    defaults to all cores of this process.
    A step computes at most `token_budget` tokens: 2,048 by default on the CPU, else as many as there is memory for, so
    that a prompt is one step. The KV cache holds `kv_tokens` (default: planned), in host memory if the GPU is too small
    for it (`engine.load_plan`).
    With `prefix_cache`, requests of one run that begin with the same tokens share their KV blocks. `routing` is what
    the placement knows of the experts' popularity (see `hl.record_routing`).
    `device="emulated"` gives `accelerator_threads` cores (default: half) the place of a GPU of `vram_gb` (1e9 bytes)
    and copies to it at most at `link_gb_s`; the other cores are the CPU.
    With a link, placement and overlap see the thresholds that `hl.calibrate` measured for this model loaded like this.
    With `worker="process"`, the model and its memory live in a process of their own: if that ends, or its GPU gives up,
    the requests of one step fail and another process is started. "auto": a thread, but a process with device "cuda".
    With several `ranks` (processes; `threads`, link and `vram_gb` are those of each; with device "cuda" they share the
    GPUs out), every rank computes stripes of each prompt and the experts that it has; `exchange` is how tokens reach
    the others ("small_ep", "dispatch_per_route", "dispatch_per_rank"). A scheduler may have the first one alone
    compute a step (`StepPlan.ranks`): its CPU then has the others' experts. A lost rank ends the step with an error
    that names it: all are started again, and its requests are computed once more. `ranks="torchrun"` takes the
    processes that torchrun has started, on one host or several: the first one gets the engine, in the others this call
    computes until that is closed, and ends the process; those are not started again. Ranks listen on the network
    `interface` alone.
    With `workers`, as {"prefill": {"threads": 1}, "decode": {"threads": 1}}, processes with a KV cache each (of
    their own `kv_tokens` or this one's) compute side by side, on cores of their own where there are enough. Those whose
    names begin with "prefill" compute prompts for the others; the scheduler "paper" says which. The requests of a step
    that is lost with a worker are computed once more. Nothing is found in a prefix cache then. With device "cuda" they
    share one copy of the experts in host memory; each has its own `vram_gb` (an even share) of its own `gpu` (0). What
    all workers of a GPU only read there is there once, if its driver can, and counts for the first one.
    Raises `CheckpointError`, `ConfigError`, `StrategyError` or `MemoryBudgetError`, each in one line.
    """
    starter = None
    if ranks == "torchrun":
        from hybridlab.engine.ranks_joined import Joined

        starter = Joined(interface)
        if starter.rank:
            starter.follow()
        ranks = starter.size
    device = check_device(device)
    if not isinstance(path, str | Path | Checkpoint):
        raise ConfigError(f"path is {path!r:.60}, expected the folder of a checkpoint")
    sizes = {"memory_gb": memory_gb, "link_gb_s": link_gb_s, "vram_gb": vram_gb}
    counts = {"token_budget": token_budget, "kv_block_tokens": kv_block_tokens, "kv_tokens": kv_tokens}
    check_format(precision, weight_layout, device)
    check_numbers(counts, sizes)
    if device != "emulated":
        check_unused({"accelerator_threads": accelerator_threads, "link_gb_s": link_gb_s}, device)
    if device == "cpu":
        check_unused({"vram_gb": vram_gb}, device)
    placement, overlap = resolve("placement", placement), resolve("overlap", overlap)
    in_files = not isinstance(path, Checkpoint)
    kind = {"weight_layout": weight_layout, "worker": worker, "in_files": in_files, "placement": placement}
    check_ranks(ranks, exchange, interface, **kind)
    hardware = detect(gpu=device == "cuda")
    num_threads = check_threads(threads_of_rank(threads, ranks, device, hardware.num_cores), hardware)
    given_sides = accelerator_threads
    if device == "emulated":
        accelerator_threads = check_accelerator_threads(accelerator_threads, num_threads)
        hardware = emulated_hardware(hardware, vram_gb, link_gb_s)
    elif device == "cuda":
        hardware = rank_hardware(cuda_hardware(hardware, vram_gb), ranks, detect_gpus(), quiet=quiet)
    split = check_workers(
        workers,
        num_threads,
        device,
        unused={
            "ranks": ranks if ranks > 1 else None,
            "worker": None if worker == "auto" else worker,
            "weight_layout": None if weight_layout == "rows" else weight_layout,
        },
        in_files=in_files,
    )
    shares = share_gpus(split, detect_gpus(), vram_gb) if split is not None and device == "cuda" else {}
    in_process = check_worker(worker, device, in_files=in_files)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if precision == "fp8":
        check_fp8(checkpoint.spec.expert_dtype, detect_gpus())
    if device != "cpu":
        from hybridlab.calibration.files import calibrated

        link = {"accelerator_threads": accelerator_threads, "link_gb_s": link_gb_s}
        how = {"threads": num_threads, "precision": precision, "weight_layout": weight_layout, **link}
        hardware = calibrated(hardware, checkpoint.spec, **how)
        if (resolved := getattr(overlap, "calibrated", None)) is not None:
            overlap = resolved(hardware)
    if shares:  # one placement for all
        hardware = replace(hardware, gpu_memory_bytes=min(shares.values()))
    placed = placement.place(checkpoint.spec, hardware, routing or RoutingStats())
    check_placed(placed, type(placement).__name__, device)
    placed = replace(placed, movable=bool(getattr(placement, "update_every_steps", 0)))
    options: dict[str, Any] = {
        "precision": precision,
        "threads": num_threads,
        "accelerator_threads": accelerator_threads or 0,
        "token_budget": token_budget,
        "kv_tokens": kv_tokens,
        "kv_block_tokens": kv_block_tokens,
        "memory_gb": memory_gb,
        "quiet": quiet,
    }
    if ranks > 1:
        placed = spread(placed, checkpoint.spec, ranks, exchange, type(placement).__name__)
        runtime: AnyRuntime = Ranks(
            checkpoint, hardware, placed, num_ranks=ranks, interface=interface, starter=starter, **options
        )
    elif split is not None:
        each = {name: {**own, "kv_tokens": own["kv_tokens"] or kv_tokens} for name, own in split.items()}
        for name, gpu_bytes in shares.items():
            each[name]["gpu_bytes"] = gpu_bytes
        num_threads = sum(own["threads"] for own in each.values())
        shape = {"token_budget": token_budget, "kv_block_tokens": kv_block_tokens, "accelerator_threads": given_sides}
        how = {"precision": precision, "memory_gb": memory_gb, "quiet": quiet, "workers": each}
        layout = "blocks" if device == "cuda" else weight_layout
        keeps = device == "cuda" and any(kept_experts(placed, checkpoint.spec).values())
        with sharing(checkpoint, layout, create=keeps, quiet=quiet) as shared:
            free_bytes = free_beside(shared) if device == "cuda" else None
            runtime = Workers(checkpoint, hardware, placed, shared=shared, free_bytes=free_bytes, **shape, **how)
    else:
        start = WorkerProcess if in_process else Runtime
        layout = "blocks" if device == "cuda" else weight_layout
        with sharing(checkpoint, layout, create=in_process and device != "cuda", quiet=quiet) as shared:
            free_bytes = free_beside(shared) if device == "cuda" else None
            options |= {"weight_layout": weight_layout, "free_bytes": free_bytes}
            runtime = start(checkpoint, hardware, placed, shared=shared, **options)
    planner = Planner(checkpoint.spec, hardware, placement, overlap, placed, tuple(range(ranks)))
    prefixes = PrefixCache if prefix_cache else lambda pool: NoPrefixes()
    return Engine(checkpoint, runtime, planner, precision, num_threads, runtime.memory.token_budget, prefixes)
