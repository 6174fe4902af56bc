"""A worker as a process: `python -m hybridlab.engine.worker_main DESCRIPTOR PARENT`, started by `worker_process`.

It builds a `Runtime` from plain data, then answers one message after another on the thread that computes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import socket
import struct
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridlab.batch import Entry
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.channel import Channel, ChannelClosed, Kind, ProtocolError, pack_json, unpack_json
from hybridlab.engine.gpu_copy import SharedOnGpu
from hybridlab.engine.hand_off_messages import unpack_hand_off
from hybridlab.engine.kv_region import KVRegion
from hybridlab.engine.program_messages import placement, unpack_moves, unpack_program
from hybridlab.engine.ranks_runtime import RankRuntime
from hybridlab.engine.runtime import Runtime
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.step_messages import Step, pack_choice, pack_result, unpack_blocks, unpack_step
from hybridlab.errors import WorkerLost
from hybridlab.plans import Program
from hybridlab.spec import HardwareSpec, ModelSpec

MOST_PROGRAMS = 64
"""Kept on both sides: the one that was sent longest ago makes room."""
SETUP_KEYS = {"package", "checkpoint", "hardware", "placement", "options", "shared"}
PACKAGE = str(Path(__file__).parents[1])
SEED = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1


class HookFailed(Exception):
    """The parent's routing hook raised; the parent knows what."""


def main(arguments: Sequence[str]) -> int:
    channel = channel_of(arguments)
    return 1 if channel is None else serve(channel, _setup)


def channel_of(arguments: Sequence[str]) -> Channel | None:
    """The channel to the parent, with which this process ends from now on; None if it has ended already."""
    descriptor, parent = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    return channel if die_with(parent) else None


def serve(channel: Channel, setup: Callable[[Channel], tuple | None]) -> int:
    """Answer until the other end closes `channel`, with what `setup` makes of the first message (None: it could not,
    and has said so); the exit status."""
    try:
        if (ready := setup(channel)) is not None:
            Loop(channel, *ready).run()
    except ChannelClosed:
        pass  # the parent wants nothing more
    except ProtocolError as error:
        send_error(channel, Kind.LOST, error)
        return 1
    return 0


def die_with(parent: int) -> bool:
    """Have this process killed once the thread that started it ends; False if its process has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


def first_message(channel: Channel, who: str, keys: set[str], *optional: str) -> dict[str, Any]:
    """What the parent sends first: all of `keys`, perhaps the `optional` ones; else raises `ProtocolError`."""
    kind, body = channel.receive()
    if kind is not Kind.SETUP:
        raise ProtocolError(f"{kind.name} before SETUP")
    given = unpack_json(body)
    if not isinstance(given, dict) or given.keys() - {*optional} != keys:
        raise ProtocolError(f"a setup of {sorted(given)!r:.200}")
    if given["package"] != PACKAGE:
        raise ProtocolError(f"this {who} is hybridlab of {PACKAGE}, its parent that of {given['package']}")
    return given


def _setup(channel: Channel) -> tuple[Runtime, ModelSpec, KVRegion | None] | None:
    given = first_message(channel, "worker", SETUP_KEYS, "beside", "on_gpu")
    beside, on_gpu = given.get("beside"), given.get("on_gpu")
    if on_gpu is not None:
        on_gpu = SharedOnGpu(channel.receive_descriptor() if on_gpu["there_bytes"] else None, **on_gpu)
    try:
        if beside is not None and beside["cores"]:
            os.sched_setaffinity(0, beside["cores"])
        checkpoint = open_checkpoint(given["checkpoint"])
        hardware, placed = HardwareSpec(**given["hardware"]), placement(given["placement"])
        if hardware.device == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(given["options"].get("gpu", 0))  # Triton's kernels run on the current one
        shared = None if given["shared"] is None else SharedWeights(given["shared"])
        runtime = Runtime(checkpoint, hardware, placed, shared=shared, on_gpu=on_gpu, **given["options"])
        region = None
        if beside is not None:
            stored = runtime.cache.stored(0)[0]
            shape = beside["num_blocks"], runtime.kv_block_tokens
            region = KVRegion(beside["descriptor"], checkpoint.spec, *shape, stored.dtype, pin=stored.is_cuda)
    except Exception as error:
        send_error(channel, Kind.FAILED, error)
        return None
    memory = dataclasses.asdict(runtime.memory)
    sizes = {name: getattr(runtime, name) for name in ("num_kv_blocks", "kv_block_tokens", "num_packed")}
    told = None if on_gpu is None else on_gpu.told()
    channel.send(Kind.READY, pack_json({"memory": memory, "on_gpu": told, **sizes}))
    if on_gpu is not None:
        on_gpu.hand_over(channel)
    return runtime, checkpoint.spec, region


class Loop:
    """Answers messages, in the order in which they come. The KV of requests comes and goes through `region`, if any."""

    def __init__(
        self,
        channel: Channel,
        runtime: Runtime | RankRuntime,
        model: ModelSpec,
        region: KVRegion | None = None,
    ) -> None:
        self._channel, self._runtime, self._model, self._region = channel, runtime, model, region
        self._programs: OrderedDict[int, Program] = OrderedDict()
        self._places: dict[int, dict[int, int]] = {}
        self._step: Step | None = None

    def run(self) -> None:
        """Until the parent closes the channel, which raises `ChannelClosed`, or the device gives up."""
        torch.set_num_threads(1)  # as on a worker's thread (engine/worker_thread.py)
        while True:
            kind, body = self._channel.receive()
            try:
                answer = self._answer(kind, body)
            except WorkerLost as error:
                send_error(self._channel, Kind.LOST, error)
                return
            except (ChannelClosed, ProtocolError):
                raise
            except Exception as error:
                send_error(self._channel, Kind.FAILED, error)
            else:
                if answer is not None:
                    self._channel.send(Kind.DONE, answer)

    def _answer(self, kind: Kind, body: memoryview) -> Any:
        match kind:
            case Kind.STEP:
                return self._run(self._unpack(body))
            case Kind.PROGRAM:
                number, program = unpack_program(body, self._model)
                self._programs[number] = program
                self._places[number] = {op.id: place for place, op in enumerate(program.ops)}
                if len(self._programs) > MOST_PROGRAMS:
                    del self._places[self._programs.popitem(last=False)[0]]
                return None
            case Kind.LOGITS:
                step = self._unpack(body)
                return self._runtime.local.logits(step.program, step.batch.entries[0]).contiguous().numpy().data
            case Kind.ROUTES:
                return np.ascontiguousarray(self._runtime.local.take_routes(), "<i8").data
            case Kind.MOVE:
                self._runtime.local.move(unpack_moves(body, self._model))
            case Kind.RANDOMISE:
                if len(body) != SEED.size:
                    raise ProtocolError(f"a seed of {len(body)} bytes")
                self._runtime.randomise_cache(*SEED.unpack(body))
            case Kind.MAPPED:
                self._runtime.wait_mapped()
            case Kind.LEAVE | Kind.TAKE if self._region is not None and isinstance(self._runtime, Runtime):
                runtime, region = self._runtime, self._region
                sizes = region.num_blocks, runtime.num_kv_blocks, runtime.kv_block_tokens
                hand_off, request, blocks = unpack_hand_off(body, *sizes)
                move = region.leave if kind is Kind.LEAVE else region.take
                move(hand_off, request, runtime.cache, blocks)
            case Kind.CATCH_UP if isinstance(self._runtime, RankRuntime):
                self._runtime.catch_up(unpack_blocks(body, self._runtime.num_kv_blocks))
            case Kind.PEAK if isinstance(self._runtime, Runtime):
                peak = self._runtime.peak()
                return pack_json(None if peak is None else dataclasses.asdict(peak))
            case Kind.TRAFFIC if isinstance(self._runtime, RankRuntime):
                return pack_json({name: dataclasses.astuple(t) for name, t in self._runtime.traffic().items()})
            case _:
                raise ProtocolError(f"{kind.name} out of turn")
        return b""

    def _unpack(self, body: memoryview) -> Step:
        runtime = self._runtime
        return unpack_step(body, self._programs, self._model, runtime.num_kv_blocks, runtime.kv_block_tokens)

    def _run(self, step: Step) -> bytes:
        on_route = self._ask if step.asks else None
        drawn, spans = self._runtime.local.run(step.program, step.batch, step.clock_start_s, on_route)
        return pack_result(step, drawn, spans, self._places[step.number])

    def _ask(self, layer: int, entries: Sequence[Entry], ids: np.ndarray) -> np.ndarray | None:
        """The parent's routing hook; routers take turns, for they are all on one lane."""
        self._channel.send(Kind.CHOICE, pack_choice(layer, entries, ids))
        kind, body = self._channel.receive()
        if kind is Kind.FAILED:
            raise HookFailed
        if kind is not Kind.CHOSEN or len(body) not in (0, 4 * ids.size):
            raise ProtocolError(f"{kind.name} of {len(body)} bytes for a choice of {ids.size}")
        return np.frombuffer(body, "<i4").reshape(ids.shape) if len(body) else None


def send_error(channel: Channel, kind: Kind, error: Exception) -> None:
    text = "".join(traceback.format_exception(error))
    told = {"class": type(error).__name__, "message": str(error), "traceback": text[-20_000:]}
    channel.send(kind, pack_json(told))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of native code may be in the middle of something
