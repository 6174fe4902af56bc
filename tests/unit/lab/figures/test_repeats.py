"""Which runs make one curve, and what the curves are called."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from hybridlab.errors import ConfigError
from hybridlab.figures import load_curves, ttft_throughput
from hybridlab.figures.repeats import told_apart
from hybridlab.widgets.summary_rows import apart

OFFERED = "offered_req_s"


def rows(*runs: dict[str, Any], **same: Any) -> pd.DataFrame:
    base = {"scheduler": "fcfs", "repeat": 0, "evidence": "measured"}
    return pd.DataFrame([{**base, OFFERED: float(number + 1), **same, **run} for number, run in enumerate(runs)])


@pytest.fixture
def closed_loop(summary: Any) -> pd.DataFrame:
    """Users wait for answers, so the load follows from the setting: no two runs have the same."""
    frames = [
        summary(loads=[load], schedulers=["fcfs"], **{"engine.prefix_cache": cached}, run_id=f"{load}{cached}")
        for cached, loads in ((True, (2.2, 4.4)), (False, (1.1, 2.0)))
        for load in loads
    ]
    frame = pd.concat(frames).drop(columns="workload.rate_scale")
    frame["workload.num_users"] = [1, 1, 2, 2] * 2
    frame[OFFERED] += 0.01 * frame["repeat"]
    return frame


def test_settings_at_different_loads_are_different_curves(closed_loop: pd.DataFrame, legend_texts: Any) -> None:
    upper, lower = load_curves(closed_loop)
    lines: list[Any] = [line for line in upper.get_lines() if line.get_linewidth() > 1]
    assert [list(line.get_xdata()) for line in lines] == [pytest.approx([2.205, 4.405]), pytest.approx([1.105, 2.005])]
    named = ["fcfs, prefix_cache=True", "fcfs, prefix_cache=False"]
    assert legend_texts(lower)[:2] == named == legend_texts(ttft_throughput(closed_loop))[:2]
    for figure in (load_curves, ttft_throughput):
        with pytest.raises(ConfigError, match=r"'fcfs' differ in 'engine\.prefix_cache' \(True, False\); choose with"):
            figure(closed_loop, by="scheduler")
    assert apart(closed_loop, "scheduler", per_request=False) == ["scheduler", "engine.prefix_cache"]
    assert apart(closed_loop, "scheduler", per_request=True)[2:] == ["workload.num_users"]


def test_only_what_sets_the_load_changes_along_a_curve() -> None:
    rates = [{"workload.rate_req_s": rate, "machine": machine} for rate, machine in ((1.0, "a"), (2.0, "a"))]
    assert told_apart(rows(*rates), OFFERED) == ["scheduler"]
    assert told_apart(rows(*rates, {**rates[0], "machine": "b"}), OFFERED) == ["scheduler", "machine"]
    for key in ("workload.prompt_tokens", "engine.threads", "model.seed", "overlap", "warmup_requests"):
        assert told_apart(rows({key: "1"}, {key: "2"}), OFFERED) == ["scheduler", key]
    # Two ways of setting the load: one is followed, the other told apart, unless both change together.
    users = [{"workload.num_users": n, "workload.think_s": s} for n, s in ((1, 0.0), (2, 1.0), (1, 1.0))]
    assert told_apart(rows(*users[:2]), OFFERED) == ["scheduler"]
    assert told_apart(rows(*users), OFFERED) == ["scheduler", "workload.think_s"]
    # Everything offline: no load tells runs apart.
    assert told_apart(rows(*rates, **{OFFERED: float("nan")}), OFFERED) == ["scheduler", "workload.rate_req_s"]


def test_a_setting_as_load_takes_along_what_changes_with_it() -> None:
    pairs = [{"engine.threads": n, "engine.token_budget": 64 * n} for n in (1, 2)]
    assert told_apart(rows(*pairs), "engine.threads") == ["scheduler"]
    other = {**pairs[0], "engine.token_budget": 512}
    assert told_apart(rows(*pairs, other), "engine.threads") == ["scheduler", "engine.token_budget"]


def test_what_another_key_tells_is_not_told_twice() -> None:
    runs = [{"scheduler": f"chunked(chunk_tokens={n})", "scheduler.chunk_tokens": n} for n in (64, 256)]
    assert told_apart(rows(*runs), OFFERED) == ["scheduler"]


def test_published_rows_may_lack_settings() -> None:
    measured = [{"engine.threads": 2}, {"engine.threads": 2}]
    published = {"evidence": "published", "engine.threads": None}
    assert told_apart(rows(*measured, published), OFFERED) == ["scheduler"]
    unset = {"engine.threads": None}  # of the same kind: the engine's own choice
    assert told_apart(rows(*measured, unset), OFFERED) == ["scheduler", "engine.threads"]
    other = {"evidence": "published", "engine.threads": 4}
    assert told_apart(rows(*measured, other), OFFERED) == ["scheduler", "engine.threads"]


def test_names_are_short_and_distinct(summary: Any, legend_texts: Any) -> None:
    def named(*settings: dict[str, Any]) -> list[str]:
        frames = [summary(loads=[1], schedulers=["fcfs"], run_id=str(n), **one) for n, one in enumerate(settings)]
        return legend_texts(ttft_throughput(pd.concat(frames)))[: len(settings)]

    seeds = [{"model.seed": 0, "workload.seed": 1}, {"model.seed": 0, "workload.seed": 2}]
    assert named(*seeds) == ["fcfs, seed=1", "fcfs, seed=2"]
    both = [*seeds, {"model.seed": 5, "workload.seed": 1}]
    assert named(*both)[2] == "fcfs, model.seed=5, workload.seed=1"
    paths = [{"workload.path": "experiments/data/a.csv"}, {"workload.path": None}]
    assert named(*paths) == ["fcfs, path=a.csv", "fcfs, path=none"]
