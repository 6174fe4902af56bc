"""Ranks that are started again: when one is lost, all of them end, and others take their place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from hybridlab.batch import OnRoute, StepBatch
from hybridlab.engine.ranks_group import RankGroup, Starter
from hybridlab.engine.remote_worker import MOST_STARTS
from hybridlab.engine.worker import StepOutput
from hybridlab.engine.worker_thread import WorkerThread, closed
from hybridlab.errors import StrategyError, WorkerLost
from hybridlab.plans import Move, Program
from hybridlab.spec import ModelSpec

T = TypeVar("T")


class LastingRanks:
    """`engine.worker.Worker` over one `RankGroup` after another, as long as their starter has ranks to give.

    All that a group does happens on `thread`; its loss is noticed by whoever sees it first.
    """

    def __init__(self, starter: Starter, setups: Sequence[Mapping[str, Any]], model: ModelSpec) -> None:
        self._setups, self._model = setups, model
        self.losses = self._starts = 0
        self.gone: WorkerLost | None = None
        self.thread = WorkerThread("hybridlab-ranks")
        self._lock = threading.Lock()  # for `_closing` and `_group`
        self._closing = False
        self._group = self._new(starter)

    @property
    def ready(self) -> bool:
        return self._group.ready

    @property
    def pids(self) -> list[int]:
        """Of the ranks' processes, in their order."""
        return self._group.pids

    def start(self) -> None:
        """As `RankGroup.start`; on `thread`."""
        self._group.start()

    def run(self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None) -> StepOutput:
        result = self._there().run(program, batch, clock_start_s, on_route)
        self._starts = 0
        return result

    def take_routes(self) -> np.ndarray:
        raise StrategyError("experts do not move between ranks or tiers: take a placement that does not update")

    def move(self, moves: Sequence[Move]) -> None:
        raise StrategyError("experts do not move between ranks or tiers: take a placement that does not update")

    def ask(self, what: Callable[[RankGroup], T]) -> Future[T]:
        """Call `what` with the group of then, on `thread`; from any other thread."""
        return self.thread.call(lambda: what(self._there()))

    def close(self) -> None:
        """End all ranks, after the step that they may be in; idempotent. Not on `thread`."""
        with self._lock:
            self._closing, group = True, self._group
        if not group.ready:
            group.kill()
        self.thread.close()
        self._group.close()

    def discard(self) -> None:
        """As `close`, at once and without waiting for it."""
        with self._lock:
            self._closing, group = True, self._group
        group.kill()
        threading.Thread(target=self.close, name="hybridlab-ranks-close", daemon=True).start()

    def _new(self, starter: Starter) -> RankGroup:
        return RankGroup(starter, self._setups, self._model, self._note_loss)

    def _there(self) -> RankGroup:
        if self._closing:
            raise closed()
        if self.gone is not None:
            raise self.gone
        return self._group

    def _note_loss(self) -> None:
        self.losses += 1
        self.thread.call(self._start_again)  # nothing, if the thread is closed
        self.thread.woken.set()

    def _start_again(self) -> None:
        lost, log = self._group, logging.getLogger(__name__)
        why = str(lost.gone)
        try:
            while True:
                lost.close()
                if self._starts == MOST_STARTS:
                    raise WorkerLost(f"{why}; started again {MOST_STARTS} times without a step between them")
                if (starter := lost.starter.again()) is None:
                    raise WorkerLost(why)
                self._starts += 1
                with self._lock:
                    if self._closing:
                        starter.close()
                        raise closed()
                    lost = self._group = self._new(starter)
                log.warning("%s; starting others", why)
                try:
                    lost.start()
                    break
                except WorkerLost as error:
                    why = str(error)
        except WorkerLost as error:
            self.gone = error
        except Exception as error:  # told to whoever asks next, for nobody waits for this call
            self.gone = WorkerLost(f"{why}; they cannot be started again: {type(error).__name__}: {error}")
        self.thread.woken.set()
