"""One prompt whose experts are streamed: by one rank, and by two with a link each, under every exchange of tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.bench.devices import origin
from hybridlab.bench.exchange import busy_s, with_exchange
from hybridlab.bench.steps import TimedStep, loads_alone, prompt_step, take_turns, timed
from hybridlab.device_lock import alone
from hybridlab.loading import load
from hybridlab.plans import EXCHANGES, Span
from hybridlab.stored_run import spans_frame

if TYPE_CHECKING:
    import pandas as pd

STREAMED = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 2}
ONE = "one rank"


@dataclass(frozen=True)
class Dslp:
    """`rows`: one for one rank and one per exchange on two. `spans`: of the last step of each, with its `system`."""

    rows: pd.DataFrame
    spans: pd.DataFrame


def dslp(checkpoint: str | Path, *, tokens: int = 256, ratio: float = 8.0, threads: int = 2, repeats: int = 5) -> Dslp:
    """Medians in seconds, all in turns, on device "emulated"; each rank has `threads` and an emulated link of its own.

    The link is capped so that loading takes `ratio` times as long as one rank computes with all experts resident: ranks
    share the cores of this machine, and only with a slow link does that not matter. `load_s` are the loads alone,
    `over_one_rank` the gain, `exchange_s` what a rank spends in exchanges (waiting for the other one included),
    `router_s` in routers, for `router_tokens` in a layer over all ranks.
    """
    import pandas as pd

    room: dict[str, Any] = {"token_budget": tokens, "kv_tokens": tokens + 16, "threads": threads, "quiet": True}
    how: dict[str, Any] = {"device": "emulated", "overlap": "prefetch", **room}
    with alone("cpu"):
        with load(checkpoint, placement="all_resident", **how) as engine:
            step, spec = prompt_step(engine, tokens), engine.spec
            turns = take_turns({"step": partial(timed, engine, step)}, repeats)
            compute_s = statistics.median(found.step_s for _, found in turns)
        size = len(spec.moe_layers) * spec.num_experts * spec.expert_bytes
        how |= {"placement": STREAMED, "link_gb_s": size / (ratio * compute_s) / 1e9}
        with load(checkpoint, **how) as one, load(checkpoint, ranks=2, **how) as two:
            step = prompt_step(one, tokens)
            calls = {ONE: partial(timed, one, step), "1": partial(timed, one, loads_alone(step))}
            for exchange in EXCHANGES:
                step = prompt_step(two, tokens, planner=with_exchange(two, exchange))
                calls[exchange] = partial(timed, two, step)
            calls["2"] = partial(timed, two, loads_alone(prompt_step(two, tokens)))
            found: dict[str, list[TimedStep]] = {name: [] for name in calls}
            for name, timed_step in take_turns(calls, repeats):
                found[name].append(timed_step)
    labels = {"tokens": tokens, "link_gb_s": how["link_gb_s"], "compute_s": compute_s, "threads_per_rank": threads}
    rows, spans = [], []
    for name in (ONE, *EXCHANGES):
        ranks = 1 if name == ONE else 2
        system = ONE if name == ONE else f"two ranks, {name}"
        seconds = [each.step_s for each in found[name]]
        rows.append({
            "preset": Path(checkpoint).name,
            "system": system,
            "ranks": ranks,
            "exchange": "" if ranks == 1 else name,
            **labels,
            "load_s": statistics.median(each.step_s for each in found[str(ranks)]),
            "step_s": statistics.median(seconds),
            "step_s_min": min(seconds),
            "step_s_max": max(seconds),
            "over_one_rank": statistics.median(each.step_s for each in found[ONE]) / statistics.median(seconds),
            "exchange_s": busy_s(found[name], "all_gather", "dispatch", "reduce") / ranks,
            "router_s": busy_s(found[name], "router") / ranks,
            "router_tokens": tokens * (2 if name == "small_ep" else 1),
            "evidence": "emulated",
            **origin("cpu"),
        })  # fmt: skip
        spans.append(_frame(found[name][-1].spans, ranks).assign(system=system, evidence="emulated"))
    return Dslp(pd.DataFrame(rows), pd.concat(spans, ignore_index=True))


def _frame(spans: Sequence[Span], ranks: int) -> pd.DataFrame:
    """Spans as `hl.figures.timeline` draws them; lanes of several ranks begin with their number."""
    frame = spans_frame(spans)
    return frame if ranks == 1 else frame.assign(lane=[f"rank {s.op.rank}/{s.op.lane.kind}" for s in spans])
