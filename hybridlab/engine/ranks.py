"""A runtime of several ranks on this machine: each prefills its stripes of a prompt and computes its own experts."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hybridlab.batch import Entry, OnRoute, StepBatch
from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.channel import Kind
from hybridlab.engine.collectives import LOOPBACK, Traffic
from hybridlab.engine.load_plan import plan_load
from hybridlab.engine.memory import GIB, MemoryPlan
from hybridlab.engine.options import host_precision
from hybridlab.engine.program_messages import plain_placement
from hybridlab.engine.ranks_group import Spawned, Starter
from hybridlab.engine.ranks_joined import address_of
from hybridlab.engine.ranks_lasting import LastingRanks
from hybridlab.engine.ranks_runtime import own_placement
from hybridlab.engine.ring import slots_bytes
from hybridlab.engine.worker import EngineBackend, StepFailed
from hybridlab.engine.worker_main import PACKAGE, SEED
from hybridlab.errors import ConfigError, HybridlabError, StrategyError
from hybridlab.hardware.gpu import Gpu
from hybridlab.hardware.host_memory import detect_host_memory
from hybridlab.model.numerics import make_numerics
from hybridlab.plans import EXCHANGES, PlacementPlan, Program, RequestId
from hybridlab.spec import HardwareSpec, ModelSpec

COMMAND = (sys.executable, "-P", "-m", "hybridlab.engine.rank_main")
MOST_RANKS = 8
TIMEOUT_S = 300.0
"""More than a layer of the longest prompt takes any rank."""


class Ranks:
    """What `engine.runtime.Runtime` is, on `num_ranks` ranks; `threads` and `accelerator_threads` are of each.

    They are processes of this one, unless `starter` has others. When one is lost all are started again, if they can be.

    Every expert of `placed` has its rank. A rank that does not answer another within `timeout_s` is taken for lost.
    Sockets between ranks listen on the network interface `interface` alone. Raises what `Runtime` raises, and
    `WorkerLost` if a rank ends before all are ready.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: HardwareSpec,
        placed: PlacementPlan,
        *,
        num_ranks: int,
        precision: str,
        threads: int,
        accelerator_threads: int,
        token_budget: int | None,
        kv_tokens: int | None,
        kv_block_tokens: int,
        memory_gb: float | None,
        quiet: bool,
        timeout_s: float | None = None,
        interface: str = LOOPBACK,
        starter: Starter | None = None,
    ) -> None:
        spec = checkpoint.spec
        self.memory: MemoryPlan = plan_ranks(
            spec,
            placed,
            hardware,
            num_ranks,
            weight_bytes=checkpoint.num_bytes,
            threads=threads,
            token_budget=token_budget,
            kv_tokens=kv_tokens,
            kv_block_tokens=kv_block_tokens,
            memory_gb=memory_gb,
            precision=precision,
        )
        if not quiet:
            for plan in filter(None, (self.memory, self.memory.gpu)):
                print(f"hybridlab: each of {num_ranks} ranks: {plan}", file=sys.stderr)
        self.num_kv_blocks = self.memory.kv_tokens // kv_block_tokens
        self.kv_block_tokens = kv_block_tokens
        options = {
            "num_ranks": num_ranks,
            "precision": precision,
            "threads": threads,
            "accelerator_threads": accelerator_threads,
            "num_kv_blocks": self.num_kv_blocks,
            "kv_block_tokens": kv_block_tokens,
            "timeout_s": TIMEOUT_S if timeout_s is None else timeout_s,
            "interface": interface,
            "kv_offloaded": self.memory.kv_offloaded,
        }
        setup = {
            "package": PACKAGE,
            "checkpoint": str(checkpoint.folder.resolve()),
            "hardware": dataclasses.asdict(hardware),
            "placement": plain_placement(placed),
        }
        setups = [{**setup, "options": {**options, "rank": rank}} for rank in range(num_ranks)]
        self._ranks = ranks = LastingRanks(starter or Spawned(COMMAND), setups, spec)
        try:
            ranks.thread.call(ranks.start).result()
        except StepFailed as error:
            ranks.close()
            raise HybridlabError(f"a rank could not load {checkpoint.folder}: {error}") from error
        except BaseException:  # an interrupt too
            ranks.close()
            raise
        # An engine that nobody holds any more takes its ranks along.
        self._finalizer = weakref.finalize(self, ranks.discard)
        self._finalizer.atexit = False

    @property
    def pids(self) -> list[int]:
        """Of the ranks' processes, in their order."""
        return self._ranks.pids

    def traffic(self) -> list[dict[str, Traffic]]:
        """What each rank has sent to and received from others: keys and values ("attention"), tokens ("experts")."""
        return self._ranks.ask(lambda group: group.traffic()).result()

    def wait_mapped(self) -> None:
        """Wait until the weights' pages are mapped: benchmarks start from there."""
        self._ranks.ask(lambda group: group.tell(Kind.MAPPED)).result()

    def backend(self, on_route: OnRoute | None = None) -> EngineBackend:
        """A backend whose clock starts now."""
        return EngineBackend(self._ranks, self._ranks.thread, on_route)

    def wake(self) -> None:
        """Let an idle loop look at its queue again."""
        self._ranks.thread.woken.set()

    def step(self, program: Program, batch: StepBatch, on_route: OnRoute | None = None) -> dict[RequestId, int]:
        """Run one step and wait for it, outside any queue; returns the drawn tokens."""
        return self._ranks.ask(lambda group: group.run(program, batch, 0.0, on_route)[0]).result()

    def randomise_cache(self, seed: int) -> None:
        """Fill the KV cache with random values, so that a benchmark at depth need not prefill."""
        self._ranks.ask(lambda group: group.tell(Kind.RANDOMISE, SEED.pack(seed))).result()

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]."""
        return self._ranks.ask(lambda group: group.logits(program, entry)).result()

    def close(self) -> None:
        """End the ranks, after the step that they may be in; idempotent."""
        self._finalizer.detach()
        self._ranks.close()


def plan_ranks(
    model: ModelSpec,
    placed: PlacementPlan,
    hardware: HardwareSpec,
    num_ranks: int,
    *,
    weight_bytes: int,
    threads: int,
    memory_gb: float | None,
    precision: str,
    **sizes: Any,
) -> MemoryPlan:
    """What each rank has of a host of `memory_gb` (GiB; None: all): enough for the one that needs most. `sizes` and
    what is raised are those of `plan_load`."""
    owns = [own_placement(placed, model, rank) for rank in range(num_ranks)]
    largest = max(owns, key=lambda own: slots_bytes(own, model))
    total = hardware.host_memory_bytes if memory_gb is None else int(memory_gb * GIB)
    if hardware.device == "cuda":  # each pins its own experts
        each_gb = min(total, detect_host_memory().available_bytes) / num_ranks / GIB
    else:  # all map the same weights; each has the rest for itself
        each_gb = (weight_bytes + max(0, total - weight_bytes) / num_ranks) / GIB
    numerics = make_numerics(host_precision(precision), threads)
    how = {"weight_bytes": weight_bytes, "threads": threads, "memory_gb": each_gb, "precision": precision}
    return plan_load(model, largest, hardware, numerics, **how, **sizes)


def check_ranks(
    ranks: Any,
    exchange: Any = "small_ep",
    interface: Any = LOOPBACK,
    *,
    weight_layout: str = "rows",
    worker: str = "auto",
    in_files: bool = True,
    placement: Any = None,
) -> None:
    """Raises `ConfigError` or `StrategyError` for ranks, an exchange or an interface that cannot be, or what does not
    go with ranks.

    `in_files`: whether the checkpoint is given as a folder, that each rank can open.
    """
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= MOST_RANKS:
        raise ConfigError(f"ranks is {ranks!r}, expected an int from 1 to {MOST_RANKS}")
    if exchange not in EXCHANGES:
        raise ConfigError(f"exchange is {exchange!r}, expected one of {', '.join(EXCHANGES)}")
    if ranks == 1:
        return
    if weight_layout == "tiles":
        raise ConfigError(f"ranks is {ranks}, expected 1 with weight_layout 'tiles': all ranks map the same 'rows'")
    if worker == "thread":
        raise ConfigError(f"ranks is {ranks}, expected 1 with worker 'thread': each rank is a process")
    if not in_files:
        raise ConfigError(f"ranks is {ranks}, which needs the folder of a checkpoint to open, not an opened one")
    if getattr(placement, "update_every_steps", 0):
        name = type(placement).__name__
        raise StrategyError(f"placement {name} moves experts between steps, which several ranks ({ranks}) cannot")
    if not isinstance(interface, str):
        raise ConfigError(f"interface is {interface!r:.60}, expected the name of a network interface")
    if interface != LOOPBACK:
        address_of(interface)


def threads_of_rank(threads: int | None, ranks: int, device: str, num_cores: int) -> int | None:
    """The threads of each rank, unless given: its share of the cores, and one for each side of an emulated device."""
    if threads is not None or ranks == 1:
        return threads
    return max(num_cores // ranks, 2 if device == "emulated" else 1)


def rank_hardware(hardware: HardwareSpec, ranks: int, gpus: Sequence[Gpu], *, quiet: bool) -> HardwareSpec:
    """`hardware` as each of `ranks` has it, that share `gpus` out; stderr says so where there are more ranks."""
    most = -(-ranks // max(1, len(gpus)))
    if most == 1:
        return hardware
    if not quiet:
        print(
            f"hybridlab: {ranks} ranks share {len(gpus)} GPU, each with a part of its memory; what they exchange goes "
            "by way of the host",
            file=sys.stderr,
        )
    whole = min((gpu.memory_bytes for gpu in gpus), default=hardware.gpu_memory_bytes)
    return replace(hardware, gpu_memory_bytes=min(hardware.gpu_memory_bytes, whole // most))


def spread(placed: PlacementPlan, model: ModelSpec, ranks: int, exchange: str, placement_name: str) -> PlacementPlan:
    """`placed` with the experts of each layer on `ranks` ranks, neighbours together, as many on each as can be.

    With fewer experts than ranks, some ranks compute attention alone. A plan that has ranks already keeps them.
    Raises `StrategyError` for a rank that there is not.
    """
    rank_of = dict(placed.rank_of) or {
        (layer, e): e * ranks // model.num_experts for layer in model.moe_layers for e in range(model.num_experts)
    }
    if strange := [rank for rank in rank_of.values() if not 0 <= rank < ranks]:
        raise StrategyError(f"placement {placement_name}: rank_of names rank {strange[0]}, there are {ranks}")
    return replace(placed, rank_of=rank_of, exchange=exchange)
