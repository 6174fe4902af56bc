"""The three interfaces that a strategy may implement, with their whole contract.

A strategy is a small object, by custom a frozen dataclass whose fields are its configuration. It returns frozen
data (`hybridlab.plans`), never touches a device, a clock or an allocator, and does not know whether the engine
or the simulator runs its plans. Check yours with `hl.check_scheduler`, `hl.check_placement`, `hl.check_overlap`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from hybridlab.plans import ExpertPath, Move, Op, PlacementPlan, QueueView, StepPlan
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec


@runtime_checkable
class Scheduler(Protocol):
    """Which requests compute how many tokens next.

    A scheduler may have a method `calibrated(hardware) -> Scheduler`, as an `Overlap` may: each run calls it once, and
    takes what it returns.
    """

    def schedule(self, queue: QueueView) -> StepPlan | None:
        """The next step of the idle worker `queue.worker`, or None (or an empty step) to wait.

        Returning None while nothing runs and nothing will arrive is an error: the queue would never drain.
        A step holds at most `queue.token_budget` tokens; a running request gets 1 token, a waiting one 1 to
        `remaining_prompt`. A step whose KV blocks exceed `free_kv_tokens` plus what `preempt` frees is cut to
        what fits, last requests first (`strategies.kv_room.fit_step`); better to choose yourself.
        """
        ...


@runtime_checkable
class Placement(Protocol):
    """Where experts live, and which path their weights take in a step."""

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        """Decide once, at load. `routing.counts` is empty when nothing is known."""
        ...

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        """Decide for a step of `num_tokens` tokens. Return equal objects for equal decisions: programs are cached."""
        ...

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        """Moves between steps, from the routes since the last call; usually ().

        Asked every `update_every_steps` steps if the placement has that (a field, or an attribute of the class) and it
        is not 0; without it nothing is counted. A layer never has more RESIDENT experts than `place` planned, and no
        more STREAMED ones than the ring's slots hold; what leaves makes room for what comes. Moves that break this end
        the run with a `StrategyError`. Device "cpu" has one tier and never asks.
        """
        ...


@runtime_checkable
class Overlap(Protocol):
    """How the ops of a step are cut and ordered, so that lanes work at the same time.

    An overlap may have a method `calibrated(hardware) -> Overlap` beside these: `hl.load` calls it once, and takes what
    it returns (the overlap with the thresholds that were measured on this machine for this model, where they were).
    """

    def num_microbatches(self, step: StepPlan) -> int:
        """Into how many microbatches the requests of `step` are split, at least 1; capped at its requests."""
        ...

    def arrange(self, ops: Sequence[Op]) -> Iterable[Op]:
        """The same ops in another order; may add needs (`dataclasses.replace`), never remove an op or a need.

        The order within each lane is the order in which that lane runs them.
        """
        ...
