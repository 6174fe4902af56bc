from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hybridlab import axes
from hybridlab.axes import combinations, without
from hybridlab.config import load_config, points
from hybridlab.errors import ConfigError

CONFIG: dict[str, Any] = {
    "experiment": "q",
    "model": {"preset": "tiny"},
    "workload": {"kind": "poisson", "num_requests": 4, "rate_req_s": 1.0, "prompt_tokens": 3, "output_tokens": 4},
}


def random_block(num_points: int = 5, seed: int = 0, **axes: Any) -> dict[str, Any]:
    return {"random": {"num_points": num_points, "seed": seed, "axes": axes or {"a": {"integer": [1, 100]}}}}


def test_points_are_the_product_of_the_blocks() -> None:
    sweep = {
        "a": [1, 2],
        "zip": {"b": ["x", "y"], "c": [10, 20]},
        "grid": {"d": [True], "e": [None, 0.5]},
        "list": [{"f": 1}, {"f": 2, "g": 3}],
    }
    found = combinations(sweep)
    assert len(found) == 2 * 2 * 1 * 2 * 2
    assert found[0] == {"a": 1, "b": "x", "c": 10, "d": True, "e": None, "f": 1}
    assert found[1] == {"a": 1, "b": "x", "c": 10, "d": True, "e": None, "f": 2, "g": 3}  # the last block is fastest
    assert {(p["b"], p["c"]) for p in found} == {("x", 10), ("y", 20)}
    assert combinations({}) == [{}]


def test_every_kind_of_block_reaches_the_config() -> None:
    sweep = {
        "scheduler": ["fcfs"],
        "zip": {"workload.num_requests": [2, 3], "workload.output_tokens": [5, 6]},
        "list": [{"engine.threads": 1}, {"engine.threads": 2, "scheduler.token_budget": 64}],
        **random_block(2, 7, **{"workload.rate_req_s": {"log_uniform": [0.1, 10]}}),
    }
    found = points(load_config({**CONFIG, "sweep": sweep}))
    assert len(found) == 8
    workloads = {(p.config.workload.num_requests, p.config.workload.output_tokens[0]) for p in found}  # type: ignore[union-attr]
    assert workloads == {(2, 5), (3, 6)}
    assert found[-1].config.scheduler == {"name": "fcfs", "token_budget": 64}
    rates = {p.config.workload.rate_req_s for p in found}  # type: ignore[union-attr]
    assert rates == {p.axes["workload.rate_req_s"] for p in found} and len(rates) == 2
    assert all(0.1 <= p.axes["workload.rate_req_s"] <= 10 for p in found)


def test_the_example_of_the_readme_is_right(tmp_path: Path) -> None:
    readme = Path(__file__).parents[3] / "experiments" / "README.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
    assert len(points(load_config(tmp_path / "config.yaml"))) == 2 * 2 * 2 * 2 * 8


def test_random_points_are_the_same_everywhere() -> None:
    kinds = {
        "u": {"uniform": [-1, 1]},
        "l": {"log_uniform": [1e-3, 10.0]},
        "i": {"integer": [1, 6]},
        "c": {"choice": ["fcfs", {"name": "chunked_prefill"}]},
    }
    found = combinations(random_block(3, 42, **kinds))
    # Written down from one machine; NumPy keeps the stream of default_rng().random() across machines.
    assert found == [
        {"u": -0.362226, "l": 3.33511, "i": 6, "c": {"name": "chunked_prefill"}},
        {"u": -0.724554, "l": 0.105311, "i": 2, "c": "fcfs"},
        {"u": 0.128642, "l": 0.0365048, "i": 6, "c": {"name": "chunked_prefill"}},
    ]


def test_random_axes_have_streams_of_their_own() -> None:
    alone = combinations(random_block(20, 1, a={"uniform": [0, 1]}))
    beside = combinations(random_block(20, 1, a={"uniform": [0, 1]}, b={"integer": [0, 9]}))
    assert [p["a"] for p in alone] == [p["a"] for p in beside]
    assert combinations(random_block(20, 2, a={"uniform": [0, 1]})) != alone


def test_random_points_follow_their_distributions() -> None:
    drawn = combinations(
        random_block(4000, 0, u={"uniform": [2, 4]}, l={"log_uniform": [0.01, 100]}, i={"integer": [0, 3]})
    )
    below = Counter(p["i"] for p in drawn)
    assert set(below) == {0, 1, 2, 3} and min(below.values()) > 850
    assert abs(sum(p["u"] for p in drawn) / 4000 - 3) < 0.05
    assert abs(sum(math.log10(p["l"]) for p in drawn) / 4000) < 0.1
    assert all(float(f"{p['l']:.6g}") == p["l"] for p in drawn)  # what a table shows is what was run


def test_random_points_differ_and_may_exhaust_the_axes() -> None:
    drawn = combinations(random_block(6, 0, a={"integer": [1, 3]}, b={"choice": ["x", "y"]}))
    assert len({tuple(p.values()) for p in drawn}) == 6


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"grid": {}}, "sweep.grid: expected a mapping with at least one key, got {}"),
        ({"grid": {"a": []}}, "sweep.grid: a: expected a list with at least one value, got []"),
        ({"grid": {"a": [1, 1]}}, "sweep.grid: a: 1 is listed twice"),
        ({"grid": {"a": {"b": 1}}}, "sweep.grid: a: expected a list"),
        ({"grid": {"repeats": [1]}}, "sweep.grid: 'repeats' cannot be swept"),
        ({"zip": None}, "sweep.zip: expected a mapping with at least one key, got None"),
        ({"zip": {"a": [1, 2], "b": [1]}}, "sweep.zip: expected lists of equal length; a has 2, b has 1"),
        ({"zip": {"a": [1, 1], "b": [2, 2]}}, "sweep.zip: a=1, b=2 is listed twice"),
        ({"zip": {"a": "xy"}}, "sweep.zip: a: expected a list"),
        ({"list": []}, "sweep.list: expected a list with at least one point, got []"),
        ({"list": {"a": 1}}, "sweep.list: expected a list with at least one point"),
        ({"list": [{}]}, "sweep.list.0: expected a mapping of keys to values, got {}"),
        ({"list": [{"a": 1}, 3]}, "sweep.list.1: expected a mapping of keys to values, got 3"),
        ({"list": [{"a": 1}, {"a": 1}]}, "sweep.list: a=1 is listed twice"),
        ({"list": [{"slo": "paper"}]}, "sweep.list.0: 'slo' cannot be swept"),
        ({"list": [{3: 1}]}, "sweep.list.0: expected a dotted config key, got 3"),
        ({"a": [1], "zip": {"a": [2]}}, "sweep: a is in sweep and sweep.zip; expected one place"),
        ({"grid": {"a": [1]}, "list": [{"b": 1, "a": 2}]}, "sweep: a is in sweep.grid and sweep.list"),
        ({"grid": {"b": [1]}} | random_block(b={"integer": [1, 2]}), "sweep: b is in sweep.grid and sweep.random"),
        ({"random": {}}, "sweep.random: expected a mapping with at least one key"),
        ({"random": {"num_points": 1, "seed": 0}}, "sweep.random.axes: expected a mapping"),
        ({"random": {"num_points": 1, "seed": 0, "axes": {}}}, "sweep.random.axes: expected a mapping"),
        ({"random": {"seed": 0, "axes": {"a": {}}}}, "sweep.random.num_points: expected a whole number from 1; it is"),
        ({"random": {"num_points": 2, "axes": {"a": {}}}}, "sweep.random.seed: expected a whole number from 0; it is"),
        ({"random": {"num_point": 2}}, "sweep.random: unknown key 'num_point'; did you mean 'num_points'?"),
        (random_block(0), "sweep.random.num_points: expected a whole number from 1; got 0"),
        (random_block(seed=-1), "sweep.random.seed: expected a whole number from 0; got -1"),
        (random_block(True), "sweep.random.num_points: expected a whole number from 1; got True"),
        (random_block(a={"unifrom": [0, 1]}), "axes: a: unknown distribution 'unifrom'; did you mean 'uniform'?"),
        (random_block(a={"gauss": [0, 1]}), "axes: a: unknown distribution 'gauss'; expected one of choice"),
        (random_block(a=[1, 2]), "axes: a: expected one of uniform, log_uniform, integer, choice"),
        (random_block(a={"uniform": [0, 1], "choice": [1]}), "axes: a: expected one of uniform"),
        (random_block(a={"uniform": [1, 1]}), "axes: a: uniform: expected low < high, got [1, 1]"),
        (random_block(a={"uniform": [2, 1]}), "axes: a: uniform: expected low < high, got [2, 1]"),
        (random_block(a={"uniform": [0, math.nan]}), "axes: a: uniform: expected two numbers [low, high]"),
        (random_block(a={"uniform": ["0", 1]}), "axes: a: uniform: expected two numbers [low, high]"),
        (random_block(a={"log_uniform": [0, 1]}), "axes: a: log_uniform: expected low > 0, got 0"),
        (random_block(a={"integer": [0.5, 2]}), "axes: a: integer: expected two whole numbers [low, high]"),
        (random_block(a={"integer": [0, 2**60]}), "axes: a: integer: expected numbers up to"),
        (random_block(a={"choice": []}), "axes: a: choice: expected a list with at least one value"),
        (random_block(a={"choice": ["x", "x"]}), "axes: a: choice: 'x' is listed twice"),
        (random_block(5, a={"integer": [1, 4]}), "num_points: expected at most 4, all that the axes have; got 5"),
        (random_block(99, a={"uniform": [1, 1 + 1e-12]}), "too few different values for 99 points; widen them"),
        (random_block(axes.MAX_POINTS + 1), "a grid of 10,001 points; expected at most 10,000"),
        ({"grid": {"a": list(range(10**4))}, "zip": {"b": list(range(10**3))}}, "a grid of 10,000,000 points"),
        ({"list": [{"a": n} for n in range(10**6)]}, "a grid of 1,000,000 points"),
        (random_block(10**9), "a grid of 1,000,000,000 points"),
    ],
)
def test_bad_blocks_get_one_line(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        combinations(sweep)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_repeats_count_as_runs() -> None:
    sweep = {"a": list(range(101))}
    assert len(combinations(sweep, repeats=99)) == 101
    with pytest.raises(ConfigError, match="101 points and 100 repeats; expected at most 10,000 runs"):
        combinations(sweep, repeats=100)
    with pytest.raises(ConfigError, match="config: sweep: 101 points"):
        load_config({**CONFIG, "repeats": 100, "sweep": {"workload.num_requests": list(range(1, 102))}})


def test_one_and_true_are_two_values() -> None:
    assert len(combinations({"a": [1, 1.0, True, "1"]})) == 4
    same = object()
    with pytest.raises(ConfigError, match="listed twice"):
        combinations({"a": [same, 1, same]})


def test_replaced_strategies_leave_every_block() -> None:
    sweep = {
        "scheduler": ["fcfs", "chunked_prefill"],
        "grid": {"placement": ["all_host"], "workload.num_requests": [1, 2]},
        "zip": {"scheduler.chunk_tokens": [1, 2, 3], "engine.threads": [1, 1, 2]},
        "list": [{"scheduler.x": 1, "seed": 1}, {"scheduler.x": 2, "seed": 1}, {"scheduler.x": 3}],
        **random_block(3, 0, **{"scheduler.y": {"integer": [1, 9]}}),
    }
    assert without(sweep, {"scheduler"}) == {
        "grid": {"placement": ["all_host"], "workload.num_requests": [1, 2]},
        "zip": {"engine.threads": [1, 2]},
        "list": [{"seed": 1}],
    }
    assert without(sweep, {"scheduler", "placement"})["grid"] == {"workload.num_requests": [1, 2]}
    kept = random_block(3, 0, **{"scheduler.y": {"integer": [1, 9]}, "engine.threads": {"integer": [1, 9]}})
    assert list(without(kept, {"scheduler"})["random"]["axes"]) == ["engine.threads"]
