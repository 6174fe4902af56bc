"""Clocks for many configurations of one program at once, in jax. Same rules as `clock` and `programs`, other loops.

Legend: N ops, M needs of an op, C classes, L lanes, W ops that may still be looked at, B configurations. Ops are
scanned, not unrolled, and only the last W ends are kept: neither compile time nor memory grows with layers. Tables are
padded to round sizes and passed as arguments, so that programs of about the same size share compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from hybridlab.errors import PlanError
from hybridlab.plans import LaneKind
from hybridlab.simulator.clock import TIE
from hybridlab.simulator.jax_setup import import_jax
from hybridlab.simulator.programs import Table

Arrays = Mapping[str, np.ndarray]


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step


def scanned(table: Table) -> tuple[Arrays, int]:
    """(the ops in their order, number of classes with the padding's): ends lie in a ring of W rows and one of zeros."""
    n, lanes, classes = len(table.ops), len(table.lanes), len(table.classes)
    back = max((i - need for i in range(n) for need, _ in table.needs[i]), default=1)
    window, most = _padded(back + 1, 16), max(1, max(map(len, table.needs)))
    size, width = _padded(n, 32), _padded(most, 2)
    rows = np.arange(size)
    needs, hands = np.full((size, width), window), np.zeros((size, width), int)
    for i, each in enumerate(table.needs):
        for j, (need, handoff) in enumerate(each):
            needs[i, j], hands[i, j] = need % window, handoff
    cls, lane = np.full(size, classes), np.full(size, _padded(lanes + 1, 4) - 1)
    cls[:n], lane[:n] = table.cls, table.lane
    free = np.zeros(_padded(lanes + 1, 4))
    done = np.zeros(window + 1)
    arrays = {"cls": cls, "lane": lane, "at": rows % window, "needs": needs, "hands": hands, "free": free, "done": done}
    return arrays, _padded(classes + 1, 8)


@cache
def scan_clock() -> Any:
    """(arrays of `scanned`, seconds [C, B], hand-offs [4, B]) -> seconds of the step [B]; a start is a maximum."""
    jax = import_jax()
    jnp = jax.numpy

    def run(arrays: Arrays, alone_CB: Any, hand_4B: Any) -> Any:
        width = alone_CB.shape[1]
        free_LB = jnp.broadcast_to(arrays["free"][:, None], (len(arrays["free"]), width))
        done_WB = jnp.broadcast_to(arrays["done"][:, None], (len(arrays["done"]), width))

        def op(state: Any, row: Any) -> Any:
            free_LB, done_WB = state
            ready_MB = done_WB[row["needs"]] + hand_4B[row["hands"]]
            end_B = jnp.maximum(free_LB[row["lane"]], ready_MB.max(0)) + alone_CB[row["cls"]]
            return (free_LB.at[row["lane"]].set(end_B), done_WB.at[row["at"]].set(end_B)), None

        rows = {key: arrays[key] for key in ("cls", "lane", "at", "needs", "hands")}
        (free_LB, _), _ = jax.lax.scan(op, (free_LB, done_WB), rows)
        return free_LB.max(0)

    return run


def queued(table: Table) -> tuple[Arrays, int]:
    """(the ops of each lane in their order, number of classes with the padding's), for `event_clock`.

    Raises `PlanError` if more than one CPU lane and one link share DRAM: these loops know two that do.
    """
    kinds = [lane.kind for lane in table.lanes]
    if kinds.count(LaneKind.CPU) > 1 or kinds.count(LaneKind.H2D) > 1:
        raise PlanError(
            "step maps share DRAM between one CPU lane and one link; simulate this program on the event clock"
        )
    n, lanes = len(table.ops), _padded(len(table.lanes), 4)
    size, width = _padded(n, 32), _padded(max(1, max(map(len, table.needs))), 2)
    by_lane = [[i for i in range(n) if table.lane[i] == lane] for lane in range(lanes)]
    queue = np.full((lanes, _padded(max(map(len, by_lane)) + 1, 32)), size)  # `size`: no op is left
    for lane, ops in enumerate(by_lane):
        queue[lane, : len(ops)] = ops
    # Row `size` is never done; row `size` + 1 was done before the step began.
    needs, hands = np.full((size + 1, width), size + 1), np.zeros((size + 1, width), int)
    for i, each in enumerate(table.needs):
        for j, (need, handoff) in enumerate(each):
            needs[i, j], hands[i, j] = need, handoff
    needs[size] = size
    cls = np.full(size + 1, len(table.classes))
    cls[:n] = table.cls
    lane_of = {kind: kinds.index(kind) for kind in (LaneKind.CPU, LaneKind.H2D)}
    arrays = {
        "queue": queue, "needs": needs, "hands": hands, "cls": cls, "done": np.array([np.inf] * (size + 1) + [0.0]),
        "cpu": np.array(lane_of[LaneKind.CPU]), "link": np.array(lane_of[LaneKind.H2D]),
    }  # fmt: skip
    return arrays, _padded(len(table.classes) + 1, 8)


@cache
def event_clock() -> Any:
    """(arrays of `queued`, seconds [C, B], hand-offs [4, B], bytes [C, B], DRAM bytes/s [B]) -> seconds [B].

    From event to event, each configuration at its own time, until all are done.
    """
    jax = import_jax()
    jnp = jax.numpy
    inf = float("inf")

    def run(arrays: Arrays, alone_CB: Any, hand_4B: Any, dram_CB: Any, total_B: Any) -> Any:
        queue_LQ, cpu, link = arrays["queue"], arrays["cpu"], arrays["link"]
        num_lanes, width = len(queue_LQ), alone_CB.shape[1]
        columns = jnp.arange(width)
        none = len(arrays["cls"]) - 1

        def head(place_LB: Any) -> Any:
            return jnp.take_along_axis(queue_LQ, place_LB, axis=1)

        def event(state: Any) -> Any:
            now_B, place_LB, left_LB, busy_LB, done_NB = state
            op_LB = head(place_LB)
            needs_LBM, hands_LBM = arrays["needs"][op_LB], arrays["hands"][op_LB]
            waited_LBM = done_NB[needs_LBM, columns[:, None]] + hand_4B[hands_LBM, columns[:, None]]
            ready_LB = jnp.where(busy_LB, inf, waited_LBM.max(-1))
            cls_LB = arrays["cls"][op_LB]
            own_LB = alone_CB[cls_LB, columns]
            starts_LB = ready_LB <= now_B
            left_LB = jnp.where(starts_LB, own_LB, left_LB)
            busy_LB = busy_LB | starts_LB
            ready_LB = jnp.where(starts_LB, inf, ready_LB)
            rate_LB = jnp.where(busy_LB & (own_LB > 0), dram_CB[cls_LB, columns] / jnp.maximum(own_LB, 1e-300), 0.0)

            # The two that share DRAM: the one with more left goes first, alike they slow down alike.
            ours, theirs, left_c, left_p = rate_LB[cpu], rate_LB[link], left_LB[cpu], left_LB[link]
            both = (ours > 0) & (theirs > 0)
            alike = jnp.minimum(left_c, left_p) >= jnp.maximum(left_c, left_p) * (1 - TIE)
            first_is_c = left_c > left_p
            first, second = jnp.where(first_is_c, ours, theirs), jnp.where(first_is_c, theirs, ours)
            tiny = 1e-300
            first_scale = jnp.minimum(1.0, total_B / jnp.maximum(first, tiny))
            rest = jnp.maximum(0.0, total_B - first_scale * first)
            second_scale = jnp.minimum(1.0, rest / jnp.maximum(second, tiny))
            same = jnp.minimum(1.0, total_B / jnp.maximum(ours + theirs, tiny))
            scale_c = jnp.where(alike, same, jnp.where(first_is_c, first_scale, second_scale))
            scale_p = jnp.where(alike, same, jnp.where(first_is_c, second_scale, first_scale))
            scale_LB = jnp.ones((num_lanes, width)).at[cpu].set(jnp.where(both, scale_c, 1.0))
            scale_LB = scale_LB.at[link].set(jnp.where(both, scale_p, 1.0))

            takes_LB = jnp.where(busy_LB & (scale_LB > 0), left_LB / jnp.maximum(scale_LB, tiny), inf)
            faster = jnp.where(first_is_c, scale_c - scale_p, scale_p - scale_c)
            meets = jnp.where(both & ~alike & (faster > 0), jnp.abs(left_c - left_p) / jnp.maximum(faster, tiny), inf)
            next_B = jnp.minimum(now_B + jnp.minimum(takes_LB.min(0), meets), ready_LB.min(0))
            next_B = jnp.where(jnp.isfinite(next_B), next_B, now_B)  # all done
            left_LB = jnp.where(busy_LB, left_LB - scale_LB * (next_B - now_B), left_LB)
            ends_LB = busy_LB & (left_LB <= TIE * own_LB)
            rows_LB = jnp.where(ends_LB, op_LB, none)
            done_NB = done_NB.at[rows_LB, columns].min(jnp.where(ends_LB, next_B, inf))
            return next_B, place_LB + ends_LB, left_LB, busy_LB & ~ends_LB, done_NB

        def unfinished(state: Any) -> Any:
            return (head(state[1]) != none).any()

        start = (
            jnp.zeros(width),
            jnp.zeros((num_lanes, width), int),
            jnp.zeros((num_lanes, width)),
            jnp.zeros((num_lanes, width), bool),
            jnp.broadcast_to(arrays["done"][:, None], (len(arrays["done"]), width)),
        )
        return jax.lax.while_loop(unfinished, event, start)[0]

    return run
