"""The serving core under any sequence of events; and that the machine finds bugs, each planted here in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from handing_machine import HandingOver
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from serving_machine import Serving

from hybridlab import live_requests, request_queue
from hybridlab.arrivals import Arrivals
from hybridlab.kv_blocks import BlockPool
from hybridlab.live_requests import Live, Lives
from hybridlab.plans import RunningRequest
from hybridlab.prefix_cache import PrefixCache
from hybridlab.request import Status
from hybridlab.request_queue import RequestQueue
from hybridlab.strategies.kv_room import KVRoom
from hybridlab.strategies.scheduler.fcfs import FCFS

QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.mark.parametrize("machine", [Serving, HandingOver])
def test_requests_are_served_whatever_happens(machine) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=QUIET)
    )


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Serving, HandingOver])
def test_requests_are_served_whatever_happens_at_length(machine) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=5000, stateful_step_count=80, deadline=None, suppress_health_check=QUIET),
    )


def _release_forgets_one(plant: Any) -> None:
    whole = BlockPool.release

    def release(self: BlockPool, table: list[int]) -> None:
        kept = table[:-1] if len(table) > 3 else table[:]
        whole(self, kept)
        table.clear()

    plant(BlockPool, "release", release)


def _release_frees_what_others_hold(plant: Any) -> None:
    whole = BlockPool.release

    def release(self: BlockPool, table: list[int]) -> None:
        for block in table:
            self._refs[block] = 1
        whole(self, table)

    plant(BlockPool, "release", release)


def _release_from_the_start(plant: Any) -> None:
    whole = BlockPool.release

    def release(self: BlockPool, table: list[int]) -> None:
        turned = table[::-1]
        whole(self, turned)
        table.clear()

    plant(BlockPool, "release", release)


def _grow_ignores_use(plant: Any) -> None:
    whole = BlockPool.grow

    def grow(self: BlockPool, table: list[int], num_tokens: int) -> None:
        before = len(table)
        whole(self, table, num_tokens)
        if len(table) - before > 1:
            table[-1] = table[-2]

    plant(BlockPool, "grow", grow)


def _evicted_blocks_stay_known(plant: Any) -> None:
    def forget(self: PrefixCache, block: int) -> None:
        pass

    plant(PrefixCache, "_forget", forget)


def _keys_ignore_what_is_before(plant: Any) -> None:
    whole = PrefixCache.extend_keys

    def extend_keys(self: PrefixCache, keys: list[bytes], tokens: list[int]) -> None:
        size = self._pool.block_tokens
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            one: list[bytes] = []
            whole(self, one, tokens[start : start + size])
            keys += one

    plant(PrefixCache, "extend_keys", extend_keys)


def _blocks_are_known_before_they_are_full(plant: Any) -> None:
    def enter(self: Live, prefixes: Any, block_tokens: int) -> None:
        full = min(len(self.table), self.computed // block_tokens + 1)
        prefixes.extend_keys(self.keys, self.tokens)
        self.entered = prefixes.enter(self.keys[:full], self.table, self.entered)

    plant(Live, "enter", enter)


def _whole_prompts_are_found(plant: Any) -> None:
    def find(self: Live, prefixes: Any, block_tokens: int) -> None:
        if not self.table:
            prefixes.extend_keys(self.keys, self.tokens)
            self.found = prefixes.count(self.keys, len(self.keys), 0)

    plant(Live, "find", find)


def _more_is_taken_as_computed_than_was_found(plant: Any) -> None:
    whole = Live.start

    def start(self: Live, pool: BlockPool, prefixes: Any) -> None:
        whole(self, pool, prefixes)
        self.computed = min(self.computed + 1, len(self.tokens) - 1)

    plant(Live, "start", start)


def _preemption_forgets_the_answer_so_far(plant: Any) -> None:
    whole = Live.give_up

    def give_up(self: Live, pool: BlockPool) -> None:
        whole(self, pool)
        del self.tokens[len(self.record.prompt) + 1 :]

    plant(Live, "give_up", give_up)


def _known_blocks_outlive_the_cache(plant: Any) -> None:
    plant(BlockPool, "evict_kept", lambda self: None)


def _what_was_computed_outlives_the_cache(plant: Any) -> None:
    plant(RequestQueue, "lose_cache", lambda self: self._pools.of("").evict_kept())


def _sharing_is_counted_twice(plant: Any) -> None:
    plant(KVRoom, "_held", lambda self, request: request.allocated_kv_tokens + request.shared_kv_tokens)


def _never_fitting_requests_are_let_in(plant: Any) -> None:
    whole = request_queue.why_refused
    plant(
        request_queue,
        "why_refused",
        lambda request, limits, context: whole(request, limits, context - limits.kv_tokens),
    )


def _prompts_that_fit_overtake(plant: Any) -> None:
    whole = FCFS.schedule

    def schedule(self: FCFS, queue: Any) -> Any:
        short_first = sorted(queue.waiting, key=lambda request: request.remaining_prompt)
        return whole(self, type(queue)(**{**vars(queue), "waiting": tuple(short_first)}))

    plant(FCFS, "schedule", schedule)


def _budget_is_exceeded(plant: Any) -> None:
    plant(request_queue, "check_step", lambda view, step: [])
    whole = FCFS.schedule

    def schedule(self: FCFS, queue: Any) -> Any:
        return whole(FCFS(), type(queue)(**{**vars(queue), "token_budget": queue.token_budget + 7}))

    plant(FCFS, "schedule", schedule)


def _one_token_too_many(plant: Any) -> None:
    whole = RequestQueue._draw

    def draw(self: RequestQueue, live: Live, token: int, now_s: float) -> int:
        request = live.record.request
        longer = type(request)(**{**vars(request), "max_tokens": request.max_tokens + 1})
        live.record.request = longer if len(live.record.output) > 5 else request
        return whole(self, live, token, now_s)

    plant(RequestQueue, "_draw", draw)


def _cancelled_requests_keep_their_blocks(plant: Any) -> None:
    whole = RequestQueue._finish

    def finish(self: RequestQueue, live: Live, status: Status, reason: str, now_s: float) -> None:
        if reason == "cancelled":
            live.table = []
        whole(self, live, status, reason, now_s)

    plant(RequestQueue, "_finish", finish)


def _failed_requests_live_on(plant: Any) -> None:
    whole = Arrivals.end

    def end(self: Arrivals, record: Any, status: Status, reason: str, now_s: float) -> None:
        whole(self, record, status, reason, now_s)
        if reason == "failed":
            record.status = Status.DECODE

    plant(Arrivals, "end", end)


def _answers_are_not_waited_for(plant: Any) -> None:
    whole = Arrivals.end

    def end(self: Arrivals, record: Any, status: Status, reason: str, now_s: float) -> None:
        whole(self, record, status, reason, now_s - 1.0)
        record.finished_s = now_s

    plant(Arrivals, "end", end)


def _time_limits_are_forgotten(plant: Any) -> None:
    plant(Live, "deadline_s", property(lambda self: float("inf")))


def _requests_in_flight_are_shown(plant: Any) -> None:
    whole = live_requests.views

    def views(lives: Any, pool: Any, prefixes: Any) -> Any:
        lives = list(lives)
        seen = whole(lives, pool, prefixes)
        flying = [x for x in lives if x.in_flight and x.is_running]
        return [*seen, *(RunningRequest(x.record.request.id, x.computed, len(x.table) * 4) for x in flying)]

    plant(live_requests, "views", views)


def _taken_hand_offs_keep_their_lease(plant: Any) -> None:
    def arrive(self: Lives, live: Live) -> None:
        live.left = None

    plant(Lives, "arrive", arrive)


def _blocks_stay_where_the_prompt_was_computed(plant: Any) -> None:
    def leave(self: Lives, live: Live, hand_off: Any) -> None:
        live.home, live.may_decode, live.left = None, True, hand_off

    plant(Lives, "leave", leave)


def _hand_offs_are_taken_twice(plant: Any) -> None:
    whole = Lives.arrive

    def arrive(self: Lives, live: Live) -> None:
        left = live.left
        whole(self, live)
        live.left = left if live.table else None

    plant(Lives, "arrive", arrive)


def _prompts_end_without_room_to_leave(plant: Any) -> None:
    plant(RequestQueue, "_that_can_leave", lambda self, step: step)


def _lost_steps_count_as_computed(plant: Any) -> None:
    whole = Lives.give_up

    def give_up(self: Lives, live: Live) -> None:
        if live.replays and live.table:
            live.record.output.append(0)
        whole(self, live)

    plant(Lives, "give_up", give_up)


def _pieces_come_again(plant: Any) -> None:
    plant(request_queue, "replace", lambda one, **new: one if "first" in new else replace(one, **new))


HAND_OFFS = (
    _pieces_come_again,
    _taken_hand_offs_keep_their_lease,
    _blocks_stay_where_the_prompt_was_computed,
    _hand_offs_are_taken_twice,
    _prompts_end_without_room_to_leave,
    _lost_steps_count_as_computed,
)
BUGS: list[Any] = [f for name, f in sorted(globals().items()) if name.startswith("_") and callable(f)]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__.strip("_"))
def test_a_planted_bug_is_found(bug: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch.setattr)
    found = settings(
        max_examples=5000,  # most are found within a hundred; none may be missed
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=QUIET,
        print_blob=False,
    )
    with pytest.raises(Exception) as caught:
        run_state_machine_as_test(HandingOver if bug in HAND_OFFS else Serving, settings=found)
    assert not isinstance(caught.value, pytest.fail.Exception)
