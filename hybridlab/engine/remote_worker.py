"""A worker in a child process: steps as messages, and another child when one is lost."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch

from hybridlab.batch import Entry, HandOff, OnRoute, StepBatch
from hybridlab.engine.answers import read_array, read_error
from hybridlab.engine.channel import ChannelClosed, Kind, ProtocolError, pack_json, unpack_json
from hybridlab.engine.child import COMMAND, Child
from hybridlab.engine.gpu_copy import GpuCopy
from hybridlab.engine.hand_off_messages import pack_hand_off
from hybridlab.engine.program_messages import pack_moves, pack_program
from hybridlab.engine.route_hook import RouteHook
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.step_messages import pack_step, unpack_result
from hybridlab.engine.worker import HandOffLost, StepFailed, StepOutput
from hybridlab.engine.worker_main import MOST_PROGRAMS
from hybridlab.engine.worker_thread import WorkerThread, closed
from hybridlab.errors import WorkerLost
from hybridlab.plans import Move, Program, Tier
from hybridlab.spec import ModelSpec

T = TypeVar("T")
MOST_STARTS = 3
"""In a row, without a step between them: what ended a worker each time is not worth a fourth."""


class RemoteWorker:
    """`engine.worker.Worker` in a child process, made from the plain data of `setup`.

    Each child has the weights of `shared`, which this object then owns, and, as worker `name`, those of `on_gpu`. All
    messages are exchanged on `thread`, which starts each child too. What ends a child is noticed by its channel while
    it computes and by its process descriptor while it is idle.
    """

    def __init__(
        self,
        setup: Mapping[str, Any],
        model: ModelSpec,
        shared: SharedWeights | None = None,
        keep: Sequence[int] = (),
        on_gpu: GpuCopy | None = None,
        name: str = "",
    ) -> None:
        self._setup, self._model, self._shared = setup, model, shared
        self._keep, self._on_gpu, self._name = keep, on_gpu, name
        self.on_gpu_state: str | None = None
        self.losses = self.num_packed = 0
        self.ready = False
        self.gone: WorkerLost | None = None
        self.thread = WorkerThread("hybridlab-worker-process")
        self._lock = threading.Lock()  # for who is in charge: `_child`, `ready`, `losses`, `_closing`
        self._child: Child | None = None
        self._closing = False
        self._why = ""
        self._starts = 0
        self._numbers: OrderedDict[Program, int] = OrderedDict()
        self._next_number = 0
        self._counting = False
        self._moved: dict[tuple[int, int], Tier] = {}
        _REMOTES.add(self)

    @property
    def pid(self) -> int | None:
        """Of the process that computes; None while there is none."""
        child = self._child
        return child.pid if child is not None and self.ready else None

    def start(self) -> dict[str, Any]:
        """Start a child and wait until it has loaded; returns what it says of itself. On `thread`.

        Raises `WorkerLost` if it ends before that, else what it raised.
        """
        with self._lock:
            if self._closing:
                raise closed()
            own = () if self._shared is None else (self._shared.fileno(),)
            child = self._child = Child(COMMAND, keep=(*own, *self._keep))
        child.on_end(self._note_loss)
        self._numbers.clear()
        try:
            ready = self._set_up(child)
            if self._counting:
                self._exchange(child, Kind.ROUTES, b"")
            if self._moved:
                moves = [Move(*key, tier) for key, tier in self._moved.items()]
                self._exchange(child, Kind.MOVE, pack_moves(moves))
        except BaseException:
            self._drop()
            raise
        with self._lock:
            self.ready = True
        if not child.is_running():  # its end was noted before it was ready
            self._note_loss(child)
        self.num_packed = ready["num_packed"]
        # Another process has the same sizes, whatever it finds free.
        sizes = {name: ready["memory"][name] for name in ("token_budget", "kv_tokens")}
        self._setup = {**self._setup, "options": {**self._setup["options"], **sizes, "quiet": True}}
        return ready

    def _set_up(self, child: Child) -> dict[str, Any]:
        if self._on_gpu is None:
            return self._exchange(child, Kind.SETUP, pack_json(self._setup), unpack_json, answer=Kind.READY)
        on_gpu = self._on_gpu
        with on_gpu.turn():
            body = pack_json({**self._setup, "on_gpu": on_gpu.setup(self._name)})

            def read(content: memoryview) -> dict[str, Any]:
                ready = unpack_json(content)
                self.on_gpu_state = on_gpu.take(ready["on_gpu"], child.channel)
                return ready

            give = on_gpu.give
            return self._exchange(child, Kind.SETUP, body, read, answer=Kind.READY, after=lambda: give(child.channel))

    def run(self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None) -> StepOutput:
        child, entries = self._there(), batch.entries
        body = pack_step(self._number(child, program), entries, clock_start_s, on_route is not None)
        hook = None if on_route is None else RouteHook(on_route, entries, self._model.num_experts)
        result = self._exchange(child, Kind.STEP, body, lambda answer: unpack_result(answer, entries, program), hook)
        self._starts = 0
        return result

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]."""
        child = self._there()
        body = pack_step(self._number(child, program), [entry], 0.0, False)
        shape = len(entry.token_ids), self._model.vocab
        return torch.from_numpy(
            self._exchange(child, Kind.LOGITS, body, lambda answer: read_array(answer, "<f4", shape))
        )

    def leave(self, hand_off: HandOff, blocks: Sequence[int]) -> None:
        """Leave what a request has in `blocks` in the region that the child shares with others."""
        self._exchange(self._there(), Kind.LEAVE, pack_hand_off(hand_off, blocks))

    def take(self, hand_off: HandOff, blocks: Sequence[int]) -> None:
        """Fill `blocks` from there; raises `HandOffLost` if it is not there."""
        try:
            self._exchange(self._there(), Kind.TAKE, pack_hand_off(hand_off, blocks))
        except StepFailed as error:
            raise HandOffLost(str(error)) from None

    def take_routes(self) -> np.ndarray:
        shape, self._counting = (len(self._model.moe_layers), self._model.num_experts), True
        try:
            return self._exchange(self._there(), Kind.ROUTES, b"", lambda answer: read_array(answer, "<i8", shape))
        except WorkerLost:
            if self.gone is not None:
                raise
            return np.zeros(shape, np.int64)

    def move(self, moves: Sequence[Move]) -> None:
        self._moved.update({(move.layer, move.expert): move.tier for move in moves})
        try:
            self._exchange(self._there(), Kind.MOVE, pack_moves(moves))
        except WorkerLost:
            if self.gone is not None:
                raise  # else the next child begins with them

    def ask(self, kind: Kind, body: bytes = b"") -> Future[None]:
        """Send a message whose answer is empty, from any thread."""
        return self.thread.call(lambda: self._exchange(self._there(), kind, body))

    def told(self, kind: Kind) -> Future[Any]:
        """Send a message whose answer is plain data, from any thread."""
        return self.thread.call(lambda: self._exchange(self._there(), kind, b"", unpack_json))

    def kill(self) -> None:
        """End the child and start no other; from any thread."""
        with self._lock:
            self._closing, child = True, self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End the child, after the step that it may be in; idempotent. Not on `thread`."""
        with self._lock:
            self._closing, loading = True, None if self.ready else self._child
        if loading is not None:
            loading.kill()
        self.thread.call(self._drop)
        self.thread.close()
        if self._shared is not None:
            self._shared.close()

    def discard(self) -> None:
        """As `close`, at once and without waiting for it."""
        self.kill()
        threading.Thread(target=self.close, name="hybridlab-worker-close", daemon=True).start()

    def _there(self) -> Child:
        child = self._child
        if self._closing:
            raise closed()
        if self.gone is not None:
            raise self.gone
        if child is None or not self.ready:
            raise WorkerLost(self._why)
        return child

    def _number(self, child: Child, program: Program) -> int:
        """What the child knows `program` as; it is sent if it has not been."""
        if (number := self._numbers.get(program)) is not None:
            return number
        number, self._next_number = self._next_number, self._next_number + 1
        try:
            child.channel.send(Kind.PROGRAM, pack_program(number, program))
        except ChannelClosed:
            raise self._lost(child, child.how_it_ended()) from None
        self._numbers[program] = number
        if len(self._numbers) > MOST_PROGRAMS:  # as the child does
            self._numbers.popitem(last=False)
        return number

    def _exchange(
        self,
        child: Child,
        kind: Kind,
        body: bytes,
        read: Callable[[memoryview], T] = lambda answer: None,
        hook: RouteHook | None = None,
        *,
        answer: Kind = Kind.DONE,
        after: Callable[[], None] = lambda: None,
    ) -> T:
        """Send a message, with what comes `after` it, and read its answer.

        Raises what the child raised, and `WorkerLost` if it is lost over it.
        """
        try:
            child.channel.send(kind, body)
            after()
            got, content = child.channel.receive()
            while got is Kind.CHOICE and hook is not None:
                child.channel.send(*hook.reply(content))
                got, content = child.channel.receive()
            if got is answer:
                return read(content)
            if got not in (Kind.FAILED, Kind.LOST):
                raise ProtocolError(f"{got.name} in answer to {kind.name}")
            error = read_error(unpack_json(content))
        except ChannelClosed:
            raise self._lost(child, child.how_it_ended()) from None
        except ProtocolError as problem:
            child.kill()
            raise self._lost(child, f"worker process {child.pid} sent what it may not: {problem}") from None
        if got is Kind.LOST:
            raise self._lost(child, f"worker process {child.pid}: {error}")
        if hook is not None and hook.error is not None:
            raise hook.error
        raise error

    def _lost(self, child: Child, why: str) -> WorkerLost:
        self._note_loss(child, why)
        return WorkerLost(why)

    def _note_loss(self, child: Child, why: str = "") -> None:
        """From any thread, any number of times: a child that was ready no longer is, and another one is needed."""
        with self._lock:
            if child is not self._child or not self.ready or self._closing:
                return
            self.ready = False
            self.losses += 1
            self._why = why or f"worker process {child.pid} has ended"
            self.thread.call(lambda: self._start_again(child))
        self.thread.woken.set()

    def _start_again(self, lost: Child) -> None:
        log = logging.getLogger(__name__)
        if self._child is not lost:
            return
        self._drop()
        try:
            while True:
                if self._closing:
                    raise closed()
                if self._starts == MOST_STARTS:
                    again = f"started again {MOST_STARTS} times without a step between them"
                    raise WorkerLost(f"{self._why}; {again}")
                self._starts += 1
                log.warning("%s; starting another", self._why)
                try:
                    self.start()
                    break
                except WorkerLost as error:
                    self._why = str(error)
        except WorkerLost as error:
            self.gone = error
        except Exception as error:  # told to whoever asks next, for nobody waits for this call
            self.gone = WorkerLost(f"{self._why}; it cannot be started again: {type(error).__name__}: {error}")
        self.thread.woken.set()

    def _drop(self) -> None:
        with self._lock:
            child, self._child, self.ready = self._child, None, False
        if child is not None:
            child.close()


_REMOTES: WeakSet[RemoteWorker] = WeakSet()


@atexit.register
def _kill_children() -> None:
    # Before worker threads are joined, which may wait for an answer.
    for remote in tuple(_REMOTES):
        remote.kill()
