"""The backend over several workers: each computes its own steps, and none waits for another."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from time import perf_counter

import numpy as np

from hybridlab.batch import OnRoute, StepBatch, StepResult
from hybridlab.engine.remote_worker import RemoteWorker
from hybridlab.engine.worker import StepOutput, step_result
from hybridlab.engine.worker_thread import closed
from hybridlab.errors import WorkerLost
from hybridlab.plans import Move, Program


class WorkersBackend:
    """`hybridlab.serving.Backend` over `remotes`, whose threads all set `woken`. Make one per run.

    Before a step, a worker takes what was left for its requests; after it, what leaves it is left for others.
    """

    def __init__(self, remotes: Mapping[str, RemoteWorker], woken: threading.Event, on_route: OnRoute | None) -> None:
        self._remotes, self._woken = remotes, woken
        self._on_route = None if on_route is None else _one_at_a_time(on_route)
        # Kept until their results are taken: an interrupt at any point loses nothing.
        self._in_flight: dict[str, Future[StepResult]] = {}
        self._known_losses = {name: remote.losses for name, remote in remotes.items()}
        self._clock_start_s = perf_counter()

    @property
    def now_s(self) -> float:
        return perf_counter() - self._clock_start_s

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(self._remotes)

    def idle(self) -> tuple[str, ...]:
        return tuple(name for name, remote in self._remotes.items() if name not in self._in_flight and remote.ready)

    def lost_caches(self) -> tuple[str, ...]:
        now = {name: remote.losses for name, remote in self._remotes.items()}
        lost = tuple(name for name, losses in now.items() if losses != self._known_losses[name])
        self._known_losses = now
        return lost

    def submit(self, worker: str, program: Program, batch: StepBatch) -> None:
        self._check_there()
        remote, known = self._remotes[worker], self._known_losses[worker]

        def compute() -> StepOutput:
            if remote.losses != known:  # the step builds on what is no longer there
                raise WorkerLost(f"worker {worker} was lost before the step began")
            for entry in (*batch.brings, *batch.entries):
                if entry.fetch is not None:
                    remote.take(entry.fetch, entry.block_table[entry.fetch.first :])
            computed = remote.run(program, batch, self._clock_start_s, self._on_route)
            for entry in batch.entries:
                if entry.leave is not None:
                    remote.leave(entry.leave, entry.block_table)
            return computed

        future = remote.thread.call(lambda: step_result(batch, self._clock_start_s, compute))
        self._in_flight[worker] = future
        future.add_done_callback(lambda _: self._woken.set())

    def wait(self, until_s: float | None) -> Sequence[StepResult]:
        if not self._done():
            # The end of a step, a cancelled request, a worker that is back or the end of the engine.
            self._woken.wait(None if until_s is None else max(0.0, until_s - self.now_s))
            self._woken.clear()
        done = self._done()
        if not done:
            self._check_there()
        return [self._in_flight.pop(name).result() for name in done]

    def drain(self) -> None:
        wait(self._in_flight.values())
        self._in_flight.clear()

    def take_routes(self) -> np.ndarray:
        counted = [remote.thread.call(remote.take_routes) for remote in self._remotes.values()]
        return np.sum([future.result() for future in counted], axis=0)

    def move(self, moves: Sequence[Move]) -> None:
        asked = [remote.thread.call(lambda remote=remote: remote.move(moves)) for remote in self._remotes.values()]
        for future in asked:
            future.result()

    def _done(self) -> list[str]:
        return [name for name, future in self._in_flight.items() if future.done()]

    def _check_there(self) -> None:
        for remote in self._remotes.values():
            if remote.thread.closed:
                raise closed()
            if remote.gone is not None:
                raise remote.gone


def _one_at_a_time(on_route: OnRoute) -> OnRoute:
    """Workers compute side by side; a user's hook need not know."""
    turn = threading.Lock()

    def call(layer, entries, ids):
        with turn:
            return on_route(layer, entries, ids)

    return call
