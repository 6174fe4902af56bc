"""TTFT over prompt length, and CDFs of latencies: the figures of single requests."""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlab.errors import ConfigError
from hybridlab.figures import Tables, latency_cdf, ttft_prompt_length
from hybridlab.figures.latency_cdf import band, quantiles
from hybridlab.figures.ttft_prompt_length import bins

# `hybridlab.figures.latency_cdf` is the function.
latency_module = sys.modules["hybridlab.figures.latency_cdf"]
ONE_LOAD = {"workload.rate_scale": 1}


def drawn(ax: Any, **wanted: Any) -> list[Any]:
    return [line for line in ax.get_lines() if all(getattr(line, f"get_{k}")() == v for k, v in wanted.items())]


def many(tables: Any, num_requests: int, repeats: int = 1) -> Tables:
    """One scheduler at one load whose TTFT is prompt / 1000, and 1 s later in the second repeat."""
    base = tables(loads=[1], schedulers=["fcfs"], repeats=repeats)
    rows = [
        {"prompt_tokens": 10 * (i + 1), "ttft_s": 0.01 * (i + 1) + repeat, "run_id": f"fcfs-1-{repeat}"}
        for repeat in range(repeats)
        for i in range(num_requests)
    ]
    frame = pd.DataFrame(rows).assign(evidence="measured")
    return Tables(base.summary, frame, base.spans)


def test_prompt_length_draws_every_request(tables: Any, legend_texts: Any) -> None:
    ax = ttft_prompt_length(tables(repeats=1), where=ONE_LOAD)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    first, second = drawn(ax, alpha=0.3)
    assert list(first.get_xdata()) == [10, 20, 40, 80, 160, 320]
    assert list(second.get_ydata()) == pytest.approx([0.01 * n * 0.2 for n in (10, 20, 40, 80, 160, 320)])
    assert legend_texts(ax) == ["fcfs", "chunked", "measured", "median of bin", "p90 of bin"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("prompt length (tokens)", "TTFT (s)")


def test_length_without_what_was_reused(tables: Any) -> None:
    ax = ttft_prompt_length(tables(repeats=1), where=ONE_LOAD, length="computed_tokens")
    assert list(drawn(ax, alpha=0.3)[0].get_xdata()) == [5, 10, 20, 40, 80, 160]
    assert ax.get_xlabel() == "prompt computed, not reused (tokens)"
    old = tables(repeats=1)
    requests = old.requests.drop(columns="cached_tokens")
    with pytest.raises(ConfigError, match="no column 'cached_tokens'"):
        ttft_prompt_length(requests, where=ONE_LOAD, length="computed_tokens")


def test_prompt_length_bins_hold_equally_many(tables: Any, legend_texts: Any) -> None:
    ax = ttft_prompt_length(many(tables, 40))
    (median,) = drawn(ax, linewidth=2.0)
    (p90,) = drawn(ax, linewidth=0.9)
    expected = np.arange(1, 41).reshape(4, 10) * 0.01
    assert list(median.get_xdata()) == [55, 155, 255, 355]
    assert list(median.get_ydata()) == pytest.approx(list(np.median(expected, axis=1)))
    assert list(p90.get_ydata()) == pytest.approx(list(np.percentile(expected, 90, axis=1)))
    assert "range of repeats" not in legend_texts(ax) and not ax.collections


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_bins_are_ordered_and_never_split_a_length(lengths: list[int]) -> None:
    bin_of, count = bins(np.array(lengths, float))
    assert sorted(set(bin_of.tolist())) == list(range(count)) and 1 <= count <= 8
    by_length = dict(sorted(zip(lengths, bin_of.tolist(), strict=True)))
    assert all(by_length[length] == b for length, b in zip(lengths, bin_of.tolist(), strict=True))
    assert list(by_length.values()) == sorted(by_length.values())


def test_prompt_length_band_spans_the_medians_of_the_runs(tables: Any, legend_texts: Any) -> None:
    ax = ttft_prompt_length(many(tables, 40, repeats=2))
    (band,) = ax.collections
    heights: Any = band.get_paths()[0].vertices
    (median,) = drawn(ax, linewidth=2.0)
    assert len(median.get_xdata()) == 8
    assert heights[:, 1].max() - heights[:, 1].min() == pytest.approx(1.35)  # 1 s apart; medians 0.03 to 0.38 s
    assert "range of repeats" in legend_texts(ax)


def test_prompt_length_shows_the_slo_where_it_is_near(tables: Any) -> None:
    ax = ttft_prompt_length(tables(), where=ONE_LOAD)  # TTFT 0.02 to 0.96 s, SLO 1 s
    assert [list(line.get_ydata()) for line in drawn(ax, linewidth=0.8)] == [[1.0, 1.0]]
    assert ax.get_title(loc="left") == "SLO mine: TTFT ≤ 1 s (dashed)"
    far = ttft_prompt_length(tables(), where=ONE_LOAD, slo="paper")
    assert drawn(far, linewidth=0.8) == []
    assert far.get_title(loc="left") == "SLO paper: TTFT ≤ 30 s (out of view)"


def test_many_points_are_one_picture(tables: Any) -> None:
    assert [line.get_rasterized() for line in drawn(ttft_prompt_length(many(tables, 2001)), alpha=0.3)] == [True]
    assert [line.get_rasterized() for line in drawn(ttft_prompt_length(many(tables, 20)), alpha=0.3)] == [False]


@pytest.mark.parametrize("figure", [ttft_prompt_length, latency_cdf])
def test_requests_of_different_settings_are_not_pooled(tables: Any, figure: Any, legend_texts: Any) -> None:
    with pytest.raises(ConfigError, match=r"'fcfs' come from runs that differ in 'workload\.rate_scale' \(2\.0, 1\.0"):
        figure(tables())
    ax = figure(tables(), by="workload.rate_scale", where={"scheduler": "fcfs"})
    assert [text.split(":")[0] for text in legend_texts(ax)[:3]] == ["rate_scale=2", "rate_scale=1", "rate_scale=4"]


@pytest.mark.parametrize("figure", [ttft_prompt_length, latency_cdf])
def test_requests_alone_need_their_evidence(tables: Any, figure: Any) -> None:
    requests = tables(loads=[1]).requests
    assert figure(requests).get_title(loc="left") == ""  # no SLO without the summary
    assert "SLO paper" in figure(requests, slo="paper").get_title(loc="left")
    with pytest.raises(ConfigError, match="no column 'evidence'; pass a result"):
        figure(requests.drop(columns="evidence"))
    with pytest.raises(ConfigError, match="rows are measured and simulated"):
        figure(pd.concat([requests, requests.assign(evidence="simulated")]))
    both = pd.concat([requests, requests.assign(evidence="simulated")])
    fills = {line.get_fillstyle() for line in figure(both, evidence=["measured", "simulated"]).get_lines()}
    assert {"full", "none"} <= fills


def test_cdf_is_the_fraction_at_most_this_slow(tables: Any, legend_texts: Any) -> None:
    ax = latency_cdf(tables(loads=[1], repeats=1, schedulers=["fcfs"]))
    (curve,) = drawn(ax, drawstyle="steps-post")
    values = [0.003 * n for n in (10, 20, 40, 80, 160, 320)]
    assert list(curve.get_xdata()) == pytest.approx([values[0], *values])
    assert list(curve.get_ydata()) == pytest.approx([0, *(np.arange(1, 7) / 6)])
    lines: list[Any] = [*ax.get_lines()]
    (marks,) = [line for line in lines if line.get_marker() == "o"]
    assert list(marks.get_xdata()) == pytest.approx([values[2], values[5], values[5]])  # on the curve
    assert list(marks.get_ydata()) == [0.5, 0.9, 0.99]
    shown = "fcfs: p50 0.12, p90 0.96, p99 0.96 s"
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in legend_texts(ax)] == [shown, "measured"]
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "fraction of requests"
    assert {"0.5", "0.9", "0.99"} <= {label.get_text() for label in ax.get_yticklabels()}


def test_cdf_of_other_latencies(tables: Any) -> None:
    data = tables(loads=[1], repeats=1, schedulers=["fcfs"])
    gaps = latency_cdf(data, metric="itl_s")
    (curve,) = drawn(gaps, drawstyle="steps-post")
    assert len(curve.get_xdata()) == 1 + 6 * 3 and gaps.get_ylabel() == "fraction of token gaps"
    assert curve.get_xdata()[-1] == pytest.approx(0.32)
    assert gaps.get_title(loc="left") == ""  # an SLO limits TTFT and TPOT only
    tpot = latency_cdf(data, metric="tpot_s")
    assert tpot.get_title(loc="left") == "SLO mine: TPOT ≤ 0.08 s (dashed)"
    assert [list(line.get_xdata()) for line in drawn(tpot, linewidth=0.8)] == [[0.08, 0.08]]
    assert latency_cdf(data, metric="e2el_s").get_xlabel() == "E2EL (s)"
    with pytest.raises(ConfigError, match="metric: unknown 'tft_s'; did you mean 'ttft_s'"):
        latency_cdf(data, metric="tft_s")


def test_cdf_leaves_out_what_has_no_value(tables: Any) -> None:
    data = tables(loads=[1], repeats=1, schedulers=["fcfs"])
    data.requests.loc[0, "tpot_s"] = float("nan")  # one output token
    (curve,) = drawn(latency_cdf(data, metric="tpot_s"), drawstyle="steps-post")
    assert len(curve.get_xdata()) == 1 + 5
    data.requests["token_times_s"] = [[0.5]] * 6
    with pytest.raises(ConfigError, match="no rows to draw; none has itl_s"):
        latency_cdf(data, metric="itl_s")


def test_cdf_band_spans_the_runs(tables: Any, legend_texts: Any) -> None:
    ax = latency_cdf(many(tables, 40, repeats=2))
    (band,) = ax.collections
    vertices: Any = band.get_paths()[0].vertices
    x = vertices[:, 0]
    assert x.min() == pytest.approx(0.01) and x.max() == pytest.approx(1.4)
    assert "range of repeats" in legend_texts(ax)


def test_zeros_count_and_lie_left_of_the_axis(tables: Any, legend_texts: Any) -> None:
    data = tables(loads=[1], repeats=1)
    fcfs = data.requests["scheduler"] == "fcfs"
    data.requests["token_times_s"] = [[0.0, 0.0, 0.0, 1.0]] * len(data.requests)
    data.requests.loc[fcfs, "queue_s"] = 0.0
    ax = latency_cdf(data, metric="itl_s", where={"scheduler": "fcfs"})
    (curve,) = drawn(ax, drawstyle="steps-post")
    assert len(curve.get_xdata()) == 1 + 6 * 3
    assert legend_texts(ax)[0].replace("\N{NO-BREAK SPACE}", " ") == "fcfs: p50 0, p90 1, p99 1 s"
    left, right = ax.get_xlim()
    assert dict(zip(curve.get_xdata(), curve.get_ydata(), strict=True))[0.1] == pytest.approx(2 / 3)
    assert 0.1 < left < 1 < right
    lines: list[Any] = [*ax.get_lines()]
    assert [list(line.get_xdata()) for line in lines if line.get_marker() == "o"] == [[1, 1]]

    ax = latency_cdf(data, metric="queue_s")  # all of fcfs is zero: at one from the left edge to the right
    zero, other = drawn(ax, drawstyle="steps-post")
    assert (zero.get_xdata()[-1], zero.get_ydata()[-1]) == (other.get_xdata()[-1], 1) and len(zero.get_xdata()) == 8
    ax.figure.canvas.draw()
    assert ax.get_position().height > 0.3  # nothing outside the axes takes its room
    with pytest.raises(ConfigError, match="every queue_s is zero, which a log axis cannot show"):
        latency_cdf(data, metric="queue_s", where={"scheduler": "fcfs"})


RUNS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=2, max_size=3)


@given(RUNS, st.sampled_from([5, 400]))
def test_the_curve_lies_in_its_band_and_its_marks_on_the_curve(runs: list[list[int]], most_levels: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_module, "MOST_LEVELS", most_levels)
        levels, low, high = band([np.sort(np.array(run, float)) for run in runs])
    values = np.sort(np.concatenate(runs).astype(float))
    assert levels[0] == 0 and levels[-1] == 1
    for number, value in enumerate(values):
        share = (number + 0.5) / len(values)  # the curve is at `value` here
        step = np.searchsorted(levels, share)
        assert low[step] <= value <= high[step]
    for share in (0.5, 0.9, 0.99):
        (mark,) = quantiles(values, np.array([share]))
        assert np.mean(values < mark) < share <= np.mean(values <= mark) + 1e-9


def test_band_of_a_figure_holds_its_curve(tables: Any) -> None:
    ax = latency_cdf(many(tables, 3, repeats=2))  # TTFT 0.01, 0.02, 0.03, and 1 s later
    (patch,) = ax.collections
    vertices: Any = patch.get_paths()[0].vertices
    at_half = {x for x, y in vertices.tolist() if 1 / 3 <= y <= 2 / 3}
    assert {0.02, 1.02} <= {round(x, 9) for x in at_half}


def test_single_requests_and_given_axes(tables: Any) -> None:
    _, axes = plt.subplots(1, 2)
    for figure, ax in zip((ttft_prompt_length, latency_cdf), axes, strict=True):
        assert figure(many(tables, 1), ax) is ax
        assert ax.get_legend() is not None


def test_the_percentiles_of_a_saturated_run_are_told_as_such(tables: Any, legend_texts: Any) -> None:
    given = tables(repeats=1, schedulers=("fcfs",), loads=(1,))
    requests = pd.concat([given.requests] * 10, ignore_index=True)
    requests["request_id"], requests["arrival_s"] = [f"r{i}" for i in range(60)], [float(i) for i in range(60)]
    for slower, told in ((1.0, False), (2.0, True)):
        finished = requests.assign(finished_s=slower * requests["arrival_s"] + 1.0)
        (text, *_) = legend_texts(latency_cdf(finished))
        assert ("saturated" in text) is told and "p99" in text
