from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hybridlab.errors import ConfigError
from hybridlab.figures import load_curves


def curves(ax: Any) -> list[Any]:
    return [line for line in ax.get_lines() if line.get_linewidth() > 1]


def test_throughput_above_and_tpot_below_over_load(summary: Any, legend_texts: Any) -> None:
    upper, lower = load_curves(summary())
    assert [list(line.get_xdata()) for line in curves(upper)] == [[1, 2, 4]] * 2
    assert list(curves(upper)[0].get_ydata()) == [50.5, 100.5, 200.5]
    assert list(curves(lower)[1].get_ydata()) == pytest.approx([0.03, 0.06, 0.12])
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("output tokens/s", "median TPOT (s)")
    assert lower.get_xlabel() == "offered load (req/s)"
    assert upper.get_ylim()[0] == lower.get_ylim()[0] == 0
    assert legend_texts(lower) == ["fcfs", "chunked", "measured", "offered tokens/s", "range of repeats"]


def test_saturation_is_seen_against_what_is_offered(summary: Any) -> None:
    upper: Any = load_curves(summary(repeats=1))[0]
    (offered,) = [line for line in upper.get_lines() if line.get_label() == "_offered"]
    # 60 tokens per request: offered 60 per unit of load, delivered 50
    assert list(offered.get_xdata()) == [0, 1, 1, 2, 2, 4, 4]
    assert list(offered.get_ydata()) == [0, 60, 60, 120, 120, 240, 240]
    assert upper.get_ylim()[1] == pytest.approx(1.15 * 200)
    upper, _ = load_curves(summary().drop(columns="completed"))
    assert not [line for line in upper.get_lines() if line.get_label() == "_offered"]
    upper, _ = load_curves(summary(), load="workload.rate_scale")
    assert not [line for line in upper.get_lines() if line.get_label() == "_offered"]


def test_saturated_runs_are_crossed(summary: Any, legend_texts: Any) -> None:
    table = summary()
    saturated = [load == 4 and name == "fcfs" for load, name in table[["offered_req_s", "scheduler"]].to_numpy()]
    upper, lower = load_curves(table.assign(saturated=saturated))
    for ax, y in ((upper, 200.5), (lower, 0.12)):
        (crosses,) = [line for line in ax.get_lines() if line.get_label() == "_saturated"]
        assert np.asarray(crosses.get_xdata()).tolist() == [4] and np.asarray(crosses.get_ydata()) == pytest.approx([y])
    assert "saturated: grows with the run" in legend_texts(lower)
    upper, lower = load_curves(table.assign(saturated=False))
    assert not any("saturated" in text for text in legend_texts(lower))


def test_bands_span_the_repeats(summary: Any) -> None:
    upper, lower = load_curves(summary())
    band: Any = upper.collections[0].get_paths()[0].vertices
    assert {(1, 50), (1, 51), (4, 200), (4, 201)} <= {(x, y) for x, y in band.tolist()}
    upper, lower = load_curves(summary(repeats=1))
    assert not upper.collections and not lower.collections


def test_slo_limits_tpot(summary: Any) -> None:
    lower: Any = load_curves(summary(), tpot="p90")[1]
    assert list(curves(lower)[0].get_ydata()) == pytest.approx([0.04, 0.08, 0.16])
    assert lower.get_title(loc="left") == "SLO mine: TPOT ≤ 80 ms (dashed)"
    assert [0.08, 0.08] in [list(line.get_ydata()) for line in lower.get_lines()]
    _, lower = load_curves(summary().drop(columns="slo"))
    assert lower.get_title(loc="left") == ""


def test_a_pair_of_axes_is_taken_and_given_back(summary: Any) -> None:
    _, (left, right) = plt.subplots(1, 2)
    assert load_curves(summary(), (left, right)) == (left, right)
    with pytest.raises(ConfigError, match=r"load_curves: ax: expected two Axes \(throughput, TPOT\), got one Axes"):
        load_curves(summary(), left)


def test_what_cannot_be_drawn_is_said(summary: Any) -> None:
    with pytest.raises(ConfigError, match="offered_req_s is undefined in some rows"):
        load_curves(summary(offered_req_s=float("nan")))
    with pytest.raises(ConfigError, match="tpot: expected one of median, p90, p99, got 'mean'"):
        load_curves(summary(), tpot="mean")
    with pytest.raises(ConfigError, match="no column 'p99_tpot_s'"):
        load_curves(summary().drop(columns="p99_tpot_s"), tpot="p99")


def test_closed_loop_repeats_offer_slightly_different_loads(summary: Any) -> None:
    frame = summary()
    frame["offered_req_s"] += 0.001 * frame["repeat"]
    upper, _ = load_curves(frame)
    assert list(curves(upper)[0].get_xdata()) == pytest.approx([1.0005, 2.0005, 4.0005])
