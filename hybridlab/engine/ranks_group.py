"""The parent's side of ranks: one process each, given steps together; when one is lost, all are ended."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import numpy as np
import torch

from hybridlab.batch import Entry, OnRoute, StepBatch
from hybridlab.engine.answers import read_array, read_error
from hybridlab.engine.channel import Channel, ChannelClosed, Kind, ProtocolError, pack_json, unpack_json
from hybridlab.engine.child import Child
from hybridlab.engine.collectives import BLAME_S, Traffic
from hybridlab.engine.program_messages import pack_program
from hybridlab.engine.ranks_blocks import LoneBlocks
from hybridlab.engine.ranks_share import drawn_by, rows_of
from hybridlab.engine.step_messages import pack_blocks, pack_step, unpack_result
from hybridlab.engine.worker import StepOutput
from hybridlab.engine.worker_main import MOST_PROGRAMS
from hybridlab.engine.worker_thread import WorkerThread, closed
from hybridlab.errors import StrategyError, WorkerLost
from hybridlab.plans import Program
from hybridlab.spec import ModelSpec

T = TypeVar("T")
GRACE_S = BLAME_S + 1.0
"""How long the other ranks have to answer, or to say whom they lost, once one has failed."""


class Member(Protocol):
    """A rank as the parent sees it: `engine.child.Child`, or one that somebody else has started."""

    channel: Channel
    pid: int

    def on_end(self, function: Callable[[Any], None]) -> None: ...

    def was_killed(self) -> bool: ...

    def how_it_ended(self) -> str: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Starter(Protocol):
    """Where ranks come from. `store` is the descriptor of the file in which they meet, None if they meet elsewhere."""

    @property
    def store(self) -> int | None: ...

    def start(self, rank: int) -> Member: ...

    def again(self) -> Starter | None:
        """Others in the place of ranks that were ended; None if there are none."""
        ...

    def close(self) -> None:
        """All have started, or never will."""
        ...


class Spawned:
    """Ranks that are processes of ours on this machine."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        # Nowhere in the file system: nothing is left of it when all processes have ended, however they do.
        self.store = os.memfd_create("hybridlab-ranks")

    def start(self, rank: int) -> Child:
        return Child(self._command, keep=(self.store,))

    def again(self) -> Spawned:
        return Spawned(self._command)

    def close(self) -> None:
        os.close(self.store)


class RankGroup:
    """Steps and other messages to all ranks, from one thread; `setups` are plain data for each of them.

    Once a rank is lost the group is `gone` for good: what the others hold is of no use without it. `on_loss` is told,
    from any thread, if that happens to a group that was `ready`.
    """

    def __init__(
        self, starter: Starter, setups: Sequence[Mapping[str, Any]], model: ModelSpec, on_loss: Callable[[], None]
    ) -> None:
        self.starter, self._setups, self._model = starter, setups, model
        self._on_loss = on_loss
        self.ready = False
        self.gone: WorkerLost | None = None
        self._blocks = LoneBlocks(setups[0]["options"]["kv_block_tokens"])
        self._threads = [WorkerThread(f"hybridlab-rank-{rank}") for rank in range(len(setups))]
        self._children: list[Member] = []
        self._lock = threading.Lock()  # for `gone`, `ready`, `_closing`, `_busy`
        self._closing = self._busy = False
        self._numbers: dict[Program, int] = {}
        self._next_number = 0
        _GROUPS.add(self)

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def start(self) -> None:
        """Start all ranks, and wait until they have loaded and found each other.

        Raises `WorkerLost` naming a rank that ended before that, else what one of them raised.
        """
        try:
            started = [thread.call(partial(self.starter.start, rank)) for rank, thread in enumerate(self._threads)]
            wait(started)
            with self._lock:
                self._children = [future.result() for future in started if future.exception() is None]
                self._busy = True
                if self._closing:
                    raise closed()
            for future in started:
                future.result()
            for rank, child in enumerate(self._children):
                child.on_end(lambda child, rank=rank: self._note_end(rank, child))
            bodies = [pack_json({**setup, "store": self.starter.store}) for setup in self._setups]
            self._all(Kind.SETUP, bodies, lambda rank, answer: None, answer=Kind.READY)
        finally:
            self.starter.close()
            self._busy = False
        with self._lock:
            self.ready = self.gone is None
        if self.gone is not None:
            raise self.gone

    def run(self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None) -> StepOutput:
        if on_route is not None:
            raise StrategyError("on_route is for an engine without ranks: each rank routes some of a step's tokens")
        entries, count = batch.entries, self._prepare(program, batch.entries)
        body = pack_step(self._number(program), entries, clock_start_s, False)
        drawers = [drawn_by(entries, program.shape.num_microbatches, rank, count) for rank in range(count)]

        def read(rank: int, answer: memoryview) -> StepOutput:
            own = [replace(entry, wants_token=entry.id in drawers[rank]) for entry in entries]
            return unpack_result(answer, own, program)

        found = self._all(Kind.STEP, [body] * count, read)
        self._finish(entries, count)
        tokens = {request: token for drawn, _ in found for request, token in drawn.items()}
        return tokens, sorted((span for _, spans in found for span in spans), key=lambda span: span.start_s)

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]."""
        count, width = self._prepare(program, [entry]), self._model.vocab
        rows = [rows_of(entry, rank, count) for rank in range(count)]
        body = pack_step(self._number(program), [entry], 0.0, False)
        found = self._all(
            Kind.LOGITS, [body] * count, lambda rank, answer: read_array(answer, "<f4", (len(rows[rank]), width))
        )
        self._finish([entry], count)
        logits = np.empty((len(entry.token_ids), width), np.float32)
        for own, part in zip(rows, found, strict=True):
            logits[own] = part
        return torch.from_numpy(logits)

    def traffic(self) -> list[dict[str, Traffic]]:
        """Of each rank, by group ("attention", "experts")."""

        def read(rank: int, answer: memoryview) -> dict[str, Traffic]:
            return {name: Traffic(*counts) for name, counts in unpack_json(answer).items()}

        return self._all(Kind.TRAFFIC, [b""] * len(self._setups), read)

    def tell(self, kind: Kind, body: bytes = b"") -> None:
        """Send all ranks a message whose answer is empty."""
        self._all(kind, [body] * len(self._setups), lambda rank, answer: None)

    def kill(self) -> None:
        """End all ranks; from any thread."""
        with self._lock:
            self._closing, children = True, self._children
        for child in children:
            child.kill()

    def close(self) -> None:
        """Let all ranks end, and wait for it; idempotent. On no thread of a rank."""
        with self._lock:
            self._closing, self.ready = True, False
            children, self._children = self._children, []
        ends = [thread.call(child.close) for thread, child in zip(self._threads, children, strict=False)]
        wait(ends)
        for thread in self._threads:
            thread.close()

    def _prepare(self, program: Program, entries: Sequence[Entry]) -> int:
        """How many ranks, the first ones, compute `entries`; they have what that builds on."""
        count = len(program.shape.ranks)
        if self.gone is not None:
            raise self.gone
        if count < len(self._setups):  # whatever becomes of the step
            self._blocks.written(entries, alone=True)
        elif lacking := self._blocks.lacking(entries):
            self.tell(Kind.CATCH_UP, pack_blocks(lacking))
            self._blocks.given(lacking)
        return count

    def _finish(self, entries: Sequence[Entry], count: int) -> None:
        if count == len(self._setups):
            self._blocks.written(entries, alone=False)

    def _number(self, program: Program) -> int:
        """What the ranks know `program` as; it is sent if it has not been."""
        if (number := self._numbers.get(program)) is not None:
            return number
        number, self._next_number = self._next_number, self._next_number + 1
        body = pack_program(number, program)
        for rank, child in enumerate(self._children):
            try:
                child.channel.send(Kind.PROGRAM, body)
            except ChannelClosed:
                raise self._stop(f"rank {rank}: {child.how_it_ended()}") from None
        self._numbers[program] = number
        if len(self._numbers) > MOST_PROGRAMS:  # as the ranks do
            del self._numbers[next(iter(self._numbers))]
        return number

    def _all(
        self, kind: Kind, bodies: Sequence[bytes], read: Callable[[int, memoryview], T], *, answer: Kind = Kind.DONE
    ) -> list[T]:
        """Send the first ranks a message each; their answers, by rank. Raises what one raised, if all have answered."""
        with self._lock:
            if self.gone is not None:
                raise self.gone
            self._busy = True
        try:
            calls = [
                thread.call(lambda rank=rank: self._exchange(rank, kind, bodies[rank], read, answer))
                for rank, thread in enumerate(self._threads[: len(bodies)])
            ]
            wait(calls, return_when="FIRST_EXCEPTION")
            _, late = wait(calls, GRACE_S)
        finally:
            with self._lock:
                self._busy = False
        errors = [call.exception() for call in calls if call not in late]
        lost = next((error for error in errors if isinstance(error, WorkerLost)), None)
        first = next(filter(None, errors), None)
        if late or lost is not None:
            error = self._stop(str(lost if lost is not None else first))
            wait(calls)
            raise error from first
        if first is not None:
            raise first
        return [call.result() for call in calls]

    def _exchange(self, rank: int, kind: Kind, body: bytes, read: Callable[[int, memoryview], T], expected: Kind) -> T:
        child = self._children[rank]
        try:
            child.channel.send(kind, body)
            got, content = child.channel.receive()
            if got is expected:
                return read(rank, content)
            if got not in (Kind.FAILED, Kind.LOST):
                raise ProtocolError(f"{got.name} in answer to {kind.name}")
            error = read_error(unpack_json(content))
        except ChannelClosed:
            raise WorkerLost(f"rank {rank}: {child.how_it_ended()}") from None
        except ProtocolError as problem:
            raise WorkerLost(f"rank {rank} sent what it may not: {problem}") from None
        raise error

    def _note_end(self, rank: int, child: Member) -> None:
        """A rank that a signal ended is to blame; one that ended by itself said why, unless it had nothing to do."""
        why = f"rank {rank}: {child.how_it_ended()}"
        with self._lock:
            unexplained = child.was_killed() or not self._busy
        if unexplained:
            self._stop(why)

    def _stop(self, why: str) -> WorkerLost:
        """From any thread, any number of times; the first reason counts."""
        with self._lock:
            if self.gone is None:
                self.gone = WorkerLost(f"{why}; all {len(self._setups)} ranks were stopped")
                if not self._closing:
                    logging.getLogger(__name__).error("%s", self.gone)
                if self.ready:  # told before anybody gets to know of it otherwise
                    self._on_loss()
                self.ready = False
            gone, children = self.gone, self._children
        for child in children:
            child.kill()
        return gone


_GROUPS: WeakSet[RankGroup] = WeakSet()


@atexit.register
def _kill_ranks() -> None:
    # Before worker threads are joined, which may wait for an answer.
    for group in tuple(_GROUPS):
        group.kill()
