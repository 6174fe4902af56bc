from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba

import hybridlab as hl
from hybridlab.errors import ConfigError
from hybridlab.figures import pareto_front, ttft_throughput
from hybridlab.figures.style import cycle_color


def curves(ax: Any) -> list[Any]:
    """The lines of series, without their markers."""
    return [line for line in ax.get_lines() if line.get_marker() == "none" and line.get_linewidth() > 1]


def points(ax: Any, alpha: float) -> list[tuple[float, float]]:
    """What is marked with this alpha, rings left out."""
    found = [line for line in ax.get_lines() if line.get_alpha() == alpha and line.get_marker() != "none"]
    return [pair for line in found for pair in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def front(ax: Any) -> list[tuple[float, float]]:
    (line,) = [line for line in ax.get_lines() if line.get_label() == "_front"]
    assert line.get_drawstyle() == "steps-pre"
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_a_line_per_scheduler_in_order_of_load(summary: Any, legend_texts: Any) -> None:
    ax = ttft_throughput(summary())
    first, second = curves(ax)
    assert list(first.get_xdata()) == [50.5, 100.5, 200.5]  # repeats averaged, sorted by load
    assert list(second.get_ydata()) == pytest.approx([0.205, 0.405, 0.805])
    assert ax.get_yscale() == "log" and ax.get_xlim()[0] == 0
    assert ax.get_xlabel() == "output throughput (tokens/s)" and ax.get_ylabel() == "TTFT (s), median and p90"
    assert "SLO mine" in ax.get_title(loc="left") and "TPOT ≤ 80 ms" in ax.get_title(loc="left")
    told = ["measured", "Pareto front", "range of repeats", "misses SLO", "median TPOT misses"]
    assert legend_texts(ax) == ["fcfs", "chunked", *told]


def test_percentiles_can_be_chosen(summary: Any, legend_texts: Any) -> None:
    ax = ttft_throughput(summary(), ttft="p90")
    assert list(curves(ax)[0].get_ydata()) == pytest.approx([0.6, 1.2, 2.4])
    assert ax.get_ylabel() == "p90 TTFT (s)" and "p90 TPOT misses" in legend_texts(ax)
    with pytest.raises(ConfigError, match="ttft: expected one of median, p90, p99, got 'p95'"):
        ttft_throughput(summary(), ttft="p95")


def test_points_that_miss_the_slo_are_pale_and_ringed_for_tpot(summary: Any) -> None:
    # TTFT 0.3 * load misses 1 s at load 4, TPOT 0.03 * load misses 80 ms at load 4 for both schedulers
    ax = ttft_throughput(summary(repeats=1))
    assert len(points(ax, 1.0)) == 4
    assert sorted(points(ax, 0.4)) == [(200.0, pytest.approx(0.8)), (200.0, pytest.approx(1.2))]
    lines: list[Any] = [*ax.get_lines()]
    rings = [line for line in lines if line.get_markersize() == 9]
    assert [float(ring.get_xdata()[0]) for ring in rings] == [200.0, 200.0]
    # A limit on TPOT that all meet: only the TTFT of fcfs misses, nothing is ringed.
    ax = ttft_throughput(summary(repeats=1), slo={"name": "loose", "ttft_s": 1.0, "tpot_s": 9.0})
    assert points(ax, 0.4) == [(200.0, pytest.approx(1.2))]
    assert not [line for line in ax.get_lines() if line.get_markersize() == 9]
    assert "SLO loose" in ax.get_title(loc="left")


def test_without_a_slo_nothing_is_judged(summary: Any, legend_texts: Any) -> None:
    frame = summary().drop(columns=["slo", "slo_ttft_s", "slo_tpot_s"])
    ax = ttft_throughput(frame)
    assert ax.get_title(loc="left") == "" and points(ax, 0.4) == []
    assert not {"misses SLO", "median TPOT misses"} & set(legend_texts(ax))
    several = pd.concat([summary(schedulers=["fcfs"]), summary(schedulers=["chunked"], slo="other")])
    assert ttft_throughput(several).get_title(loc="left") == ""


def test_front_is_of_all_points_that_are_drawn(summary: Any, legend_texts: Any) -> None:
    frame = summary(repeats=1)
    frame.loc[(frame["scheduler"] == "fcfs") & (frame["offered_req_s"] == 1), "median_ttft_s"] = 0.1
    ax = ttft_throughput(frame)
    assert front(ax) == [(50.0, 0.1), (100.0, pytest.approx(0.4)), (200.0, pytest.approx(0.8))]
    ax = ttft_throughput(frame, where={"scheduler": "fcfs"})
    assert front(ax) == [(50.0, 0.1), (100.0, pytest.approx(0.6)), (200.0, pytest.approx(1.2))]
    assert "Pareto front" in legend_texts(ax)
    ax = ttft_throughput(frame, front=False)
    assert "Pareto front" not in legend_texts(ax)
    # A front of one point would be a line that nobody sees.
    ax = ttft_throughput(frame, where={"scheduler": "fcfs", "workload.rate_scale": 1})
    assert "Pareto front" not in legend_texts(ax)
    assert not [line for line in ax.get_lines() if line.get_label() == "_front"]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6) | st.just(None)), max_size=12))
def test_front_holds_what_nothing_beats(pairs: list[tuple[int, int | None]]) -> None:
    frame = pd.DataFrame(pairs, columns=["output_tokens_per_s", "median_ttft_s"]).astype("float64")
    x, y = frame["output_tokens_per_s"].tolist(), frame["median_ttft_s"].tolist()

    def beats(i: int, j: int) -> bool:
        return x[i] >= x[j] and y[i] <= y[j] and (x[i] > x[j] or y[i] < y[j])

    expected = [not np.isnan(y[j]) and not any(beats(i, j) for i in range(len(x))) for j in range(len(x))]
    assert pareto_front(frame).tolist() == expected


def test_a_saturated_run_is_crossed_and_not_on_the_front(summary: Any, legend_texts: Any) -> None:
    table = summary(repeats=1, schedulers=("fcfs",))
    assert len(front(ttft_throughput(table))) == 3
    ax = ttft_throughput(table.assign(saturated=table["offered_req_s"] == 4))
    assert len(front(ax)) == 2
    (crosses,) = [line for line in ax.get_lines() if line.get_label() == "_saturated"]
    assert np.asarray(crosses.get_xdata()).tolist() == [200.0]
    assert "saturated: grows with the run" in legend_texts(ax)


def test_front_of_other_columns(summary: Any) -> None:
    frame = summary(repeats=1)
    assert frame[pareto_front(frame, "output_tokens_per_s", "p99_ttft_s")]["scheduler"].unique().tolist() == ["chunked"]
    with pytest.raises(ConfigError, match="pareto_front: no column 'speed'"):
        pareto_front(frame, "speed")


def test_draws_on_given_axes(summary: Any) -> None:
    _, axes = plt.subplots(1, 2)
    assert ttft_throughput(summary(), axes[1]) is axes[1]
    assert not axes[0].get_lines() and axes[1].get_legend() is not None


def test_kinds_of_evidence_are_mixed_only_when_asked(summary: Any, legend_texts: Any) -> None:
    frame = pd.concat([summary(), summary(evidence="simulated", run_id="other", repeat=0).iloc[::2]])
    with pytest.raises(ConfigError, match=r"rows are measured and simulated; .*evidence=\['measured', 'simulated'\]"):
        ttft_throughput(frame)
    ax = ttft_throughput(frame, evidence=["measured", "simulated"])
    assert len(curves(ax)) == 4 and {"measured", "simulated"} <= set(legend_texts(ax))
    marked = [line for line in ax.get_lines() if line.get_marker() in ("o", "s") and line.get_markersize() < 9]
    assert {line.get_fillstyle() for line in marked} == {"full", "none"}
    assert len([line for line in ax.get_lines() if line.get_label() == "_front"]) == 2
    assert len(curves(ttft_throughput(frame, evidence="simulated"))) == 2
    with pytest.raises(ConfigError, match="no row is emulated; there are measured, simulated"):
        ttft_throughput(frame, evidence="emulated")
    with pytest.raises(ConfigError, match="unknown kind 'simulatd'; did you mean 'simulated'"):
        ttft_throughput(frame, evidence=["simulatd"])
    with pytest.raises(ConfigError, match="evidence: unknown kind 'guessed'"):
        ttft_throughput(summary(evidence="guessed"))


def test_where_picks_rows_and_leaves_colours(summary: Any) -> None:
    ax = ttft_throughput(summary(), where={"scheduler": "chunked", "workload.rate_scale": [1, 2.0]})
    (line,) = curves(ax)
    assert list(line.get_xdata()) == [50.5, 100.5]
    assert to_rgba(line.get_color()) == to_rgba(cycle_color(1))
    with pytest.raises(ConfigError, match=r"no row with workload.rate_scale = 3; there are 2\.0, 1\.0, 4\.0"):
        ttft_throughput(summary(), where={"workload.rate_scale": 3})
    with pytest.raises(ConfigError, match=r"where: no column 'rate_scale'; did you mean 'workload\.rate_scale'"):
        ttft_throughput(summary(), where={"rate_scale": 3})


def test_series_by_any_columns(summary: Any, legend_texts: Any) -> None:
    frame = pd.concat([summary(**{"engine.threads": n, "run_id": f"t{n}", "repeat": 0}).iloc[::2] for n in (1, 2)])
    with pytest.raises(ConfigError, match=r"runs of 'fcfs' differ in 'engine\.threads' \(1, 2\)"):
        ttft_throughput(frame, by="scheduler")
    ax = ttft_throughput(frame)  # by default what differs is told apart
    assert legend_texts(ax)[:2] == ["fcfs, threads=1", "chunked, threads=1"]
    ax = ttft_throughput(frame, by=["scheduler", "engine.threads"])
    named = ["fcfs, threads=1", "chunked, threads=1", "fcfs, threads=2", "chunked, threads=2"]
    assert legend_texts(ax)[:4] == named
    with pytest.raises(ConfigError, match="by: no column 'shceduler'; did you mean 'scheduler'"):
        ttft_throughput(frame, by="shceduler")


def test_runs_of_different_code_are_no_repeats(summary: Any) -> None:
    frame = pd.concat([summary(), summary(code="badc0de", run_id="later")])
    with pytest.raises(ConfigError, match="'fcfs' has the same repeat twice"):
        ttft_throughput(frame)


def test_runs_of_different_machines_are_no_repeats(summary: Any) -> None:
    frame = pd.concat([summary(), summary(machine="other CPU, 64 cores")])
    with pytest.raises(ConfigError, match="differ in 'machine'"):
        ttft_throughput(frame, by="scheduler")
    assert len(curves(ttft_throughput(frame))) == 4


def test_runs_without_a_finished_request_are_left_out(summary: Any) -> None:
    broken = summary(schedulers=["broken"], median_ttft_s=float("nan"))
    assert len(curves(ttft_throughput(pd.concat([summary(), broken])))) == 2
    with pytest.raises(ConfigError, match="no rows to draw; none has median_ttft_s"):
        ttft_throughput(broken)


def test_bad_frames_are_named(summary: Any) -> None:
    with pytest.raises(ConfigError, match="ttft_throughput: no column 'p90_ttft_s'"):
        ttft_throughput(summary().drop(columns="p90_ttft_s"))
    with pytest.raises(ConfigError, match=r"pass a result or result\.summary, got dict"):
        ttft_throughput({})  # pyright: ignore
    with pytest.raises(ConfigError, match="no rows"):
        ttft_throughput(summary().iloc[:0])
    with pytest.raises(ConfigError, match="slo: unknown preset 'papper'; did you mean 'paper'"):
        ttft_throughput(summary(), slo="papper")
    with pytest.raises(ConfigError, match=r"slo: expected \{ttft_s, tpot_s\} in seconds"):
        ttft_throughput(summary(), slo={"ttft_s": 1.0})


def test_results_are_taken_as_they_are(tables: Any) -> None:
    assert len(curves(hl.figures.ttft_throughput(tables()))) == 2
