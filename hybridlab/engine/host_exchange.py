"""Experts of the host in a step of a CUDA device: their inputs come down, their results go up, no one waits in Python.

Legend: T tokens of a microbatch, H hidden, K experts of a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch

from hybridlab import kernels
from hybridlab.engine.host_store import HostStore
from hybridlab.engine.local_ids import LocalIds
from hybridlab.engine.stream_words import PlainWords, StreamWords, Words
from hybridlab.engine.worker_thread import WorkerThread
from hybridlab.kernels.host_lane import HostLane, HostOp
from hybridlab.model.base import Routed
from hybridlab.model.cuda_blocks import triton_module
from hybridlab.model.expert_block import Expert
from hybridlab.plans import LaneKind, Op, Program
from hybridlab.spec import ModelSpec

KEPT_STEPS, KEPT_TOKENS = 8, 8192
"""Programs whose buffers are kept beside the captured ones, and tokens that these are for."""
WORD_BYTES = 64
"""A word has a cache line to itself."""


class HostStep:
    """Buffers and words of the CPU ops of one program, for so many tokens per microbatch."""

    def __init__(
        self, ops: Sequence[Op], tokens: Sequence[int], layers: Mapping[int, kernels.MoeLayer], spec: ModelSpec,
        device: torch.device, bring: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:  # fmt: skip
        self._bring = bring
        self._buffers = {part: _Buffers.of(tokens[part], spec, device) for part in {op.microbatch for op in ops}}
        self.tokens = sum(buffers.tokens for buffers in self._buffers.values())
        self._words = _pinned((2 * len(ops), WORD_BYTES // 4), torch.int32, device)
        self._numbers = {op.id: number for number, op in enumerate(ops)}
        self.stop = np.zeros(1, np.uint32)
        words = self._words.numpy().view(np.uint32)
        host_ops = []
        for number, op in enumerate(ops):
            buffers = self._buffers[op.microbatch]
            x, ids, weights = (part.numpy() for part in buffers.inputs(buffers.host_in))
            ready, done = words[2 * number, :1], words[2 * number + 1, :1]
            host_ops.append(HostOp(ready, done, layers[op.layer], x, ids, weights, buffers.host_out.numpy()))
        self.lane = HostLane(host_ops)

    def reset(self) -> None:
        """Before each use: nothing has arrived."""
        self._words.zero_()
        self.stop[0] = 0

    def send(self, op: Op, routed: Routed, words: Words) -> None:
        buffers = self._buffers[op.microbatch]
        x, ids, weights = routed.x_TH, routed.expert_ids, routed.weights
        if ids.numel() == buffers.num_ids:
            pieces = [x.reshape(-1).view(torch.int32), ids.reshape(-1), weights.reshape(-1).view(torch.int32)]
            torch.cat(pieces, out=buffers.staged)
        else:  # fewer rows, or routes of a row, than there is room for: they come from another rank
            x_TH, ids_TK, weights_TK = buffers.inputs(buffers.staged)
            ids_TK.fill_(-1)
            x_TH[: len(x)] = x
            ids_TK[: len(ids), : ids.shape[1]], weights_TK[: len(ids), : ids.shape[1]] = ids, weights
        buffers.host_in.copy_(buffers.staged, non_blocking=True)
        words.write(self._words[2 * self._numbers[op.id], :1])

    def receive(self, op: Op, words: Words) -> torch.Tensor:
        buffers = self._buffers[op.microbatch]
        words.wait(self._words[2 * self._numbers[op.id] + 1, :1])
        return self._bring(buffers.out, buffers.host_out)

    def times_of(self, op: Op) -> tuple[float, float]:
        """When the host computed `op` the last time, in seconds on `time.perf_counter`."""
        start_s, end_s = self.lane.times[self._numbers[op.id]]
        return float(start_s), float(end_s)


class HostExchange:
    """As `Device.experts` for experts of the host; every step happens inside `around` or `running`.

    What they need comes down on the stream `down`, what they made goes up on `up`: the next layer's inputs do not wait
    behind this one's results. One thread of the host runs the layers in the program's order. `mapped` are all experts
    where the checkpoint has them: those of other ranks, for a step that this one computes alone.
    """

    def __init__(
        self, store: HostStore, spec: ModelSpec, threads: int, device: torch.device,
        mapped: Mapping[int, Sequence[Expert]],
    ) -> None:  # fmt: skip
        self._store, self._spec, self._threads, self._device = store, spec, threads, device
        self._mapped = mapped
        self._layers: dict[tuple[int, bool], kernels.MoeLayer] = {}
        self._local = LocalIds(spec.num_experts, device)
        self._steps: OrderedDict[tuple, HostStep] = OrderedDict()
        self.current: HostStep | None = None
        self._thread = WorkerThread("hybridlab-host-experts")
        self.words: Words = PlainWords()
        self.down = self.up = None
        if device.type == "cuda":
            self.words, self.down, self.up = StreamWords(), torch.cuda.Stream(device), torch.cuda.Stream(device)

    def step(self, program: Program, tokens: Sequence[int]) -> HostStep:
        """New buffers for a program with so many tokens per microbatch."""
        ops = [op for op in program.ops if op.lane.kind is LaneKind.CPU]
        layers = {op.layer: self._layer(op) for op in ops}
        return HostStep(ops, tokens, layers, self._spec, self._device, self._way_up(program))

    def _layer(self, op: Op) -> kernels.MoeLayer:
        """The kernels of a layer, over the experts of the store, and all mapped ones if `op` needs them."""
        key = op.layer, self._store.has(op.layer, op.experts)
        if key not in self._layers:
            here = self._store.experts(op.layer)
            if not key[1]:
                here = {**dict(enumerate(self._mapped[op.layer])), **here}
            experts = [here.get(expert, (None, None, None)) for expert in range(self._spec.num_experts)]
            pairs = [
                ([w and w.weight for w in group], [w and w.scale for w in group])
                for group in zip(*experts, strict=True)
            ]
            (g, gs), (u, us), (d, ds) = pairs
            self._layers[key] = kernels.moe_layer(g, u, d, gs, us, ds)
        return self._layers[key]

    def _way_up(self, program: Program) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """How results come up: past the loads of experts, which would hold up a copy for milliseconds."""
        pinned = triton_module("triton_pinned") if self._device.type == "cuda" and program.streamed else None
        return _copy if pinned is None else pinned.read_pinned

    @property
    def _kept_tokens(self) -> int:
        return sum(step.tokens for step in self._steps.values())

    @contextmanager
    def running(self, step: HostStep) -> Iterator[None]:
        """The host computes along; at the end its thread is free again, also after an error."""
        step.reset()
        future = self._thread.call(lambda: step.lane.run(self._threads, step.stop))
        if future.done():  # closed: nobody would ever set a word
            future.result()
        try:
            with self.holding(step):
                yield
        except BaseException:
            step.stop[0] = 1
            if self._device.type == "cuda":  # what is still queued must not meet the words of the next step
                with suppress(RuntimeError):
                    torch.cuda.synchronize(self._device)
            raise
        finally:
            future.result()

    @contextmanager
    def holding(self, step: HostStep) -> Iterator[None]:
        """What is enqueued uses the buffers of `step`; nothing is computed yet."""
        self.current = step
        try:
            yield
        finally:
            self.current = None

    def around(self, program: Program, tokens: Sequence[int]) -> AbstractContextManager[None]:
        """As `Device.around`; the buffers of the programs used last are kept."""
        key = (program, *tokens)
        if (step := self._steps.get(key)) is None:
            # Before new ones are made: of a long step they are large.
            while self._steps and (len(self._steps) >= KEPT_STEPS or self._kept_tokens + sum(tokens) > KEPT_TOKENS):
                self._steps.popitem(last=False)
            step = self._steps[key] = self.step(program, tokens)
        self._steps.move_to_end(key)
        return self.running(step)

    def __call__(self, op: Op, routed: Routed) -> torch.Tensor:
        """Enqueue one layer; the result, [T, H], is there once the stream `up` is at the place where it is now."""
        assert self.current is not None
        if self.down is None or self.up is None:
            self.current.send(op, self._mine(op, routed), self.words)
            return self.current.receive(op, self.words)[: len(routed.x_TH)]
        with torch.cuda.stream(self.down):  # which alone waits for the router
            self.current.send(op, self._mine(op, routed), self.words)
            sent = torch.cuda.Event()
            sent.record(self.down)
        with torch.cuda.stream(self.up):
            self.up.wait_event(sent)
            return self.current.receive(op, self.words)[: len(routed.x_TH)]

    def _mine(self, op: Op, routed: Routed) -> Routed:
        """Without the routes to experts that other tiers hold."""
        if len(op.experts) == self._spec.num_experts:
            return routed
        here = self._local(routed.expert_ids, op.experts) >= 0
        return Routed(routed.x_TH, torch.where(here, routed.expert_ids, -1), routed.weights)

    def close(self) -> None:
        """End the thread and give buffers and weights up; idempotent."""
        self._thread.close()
        self._steps.clear()
        self._layers.clear()


@dataclass(frozen=True)
class _Buffers:
    """`staged` (device) and `host_in` hold x [T, H], ids [T, K] and weights [T, K] as one run of int32."""

    tokens: int
    hidden: int
    staged: torch.Tensor
    host_in: torch.Tensor
    host_out: torch.Tensor
    out: torch.Tensor

    @classmethod
    def of(cls, tokens: int, spec: ModelSpec, device: torch.device) -> _Buffers:
        size = tokens * (spec.hidden + 2 * spec.top_k)
        shape = (tokens, spec.hidden)
        return cls(
            tokens,
            spec.hidden,
            torch.empty(size, dtype=torch.int32, device=device),
            _pinned((size,), torch.int32, device),
            _pinned(shape, torch.float32, device),
            torch.empty(shape, device=device),
        )

    @property
    def num_ids(self) -> int:
        return (len(self.staged) - self.tokens * self.hidden) // 2

    def inputs(self, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ids and weights as views of `room`, one of the two."""
        x_size = self.tokens * self.hidden
        ids, weights = room[x_size:].view(2, self.tokens, -1)
        return room[:x_size].view(torch.float32).view(self.tokens, -1), ids, weights.view(torch.float32)


def _copy(out: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return out.copy_(source, non_blocking=True)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    room = torch.zeros(shape, dtype=dtype)
    return room.pin_memory() if device.type == "cuda" else room
