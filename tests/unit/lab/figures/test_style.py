from __future__ import annotations

import itertools
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex, to_rgb

from hybridlab.columns import EVIDENCE
from hybridlab.errors import ConfigError
from hybridlab.figures import latency_cdf, load_curves, ttft_prompt_length, ttft_throughput
from hybridlab.figures.marks import MARKERS, evidence_handle, line_of
from hybridlab.figures.style import ONE_COLUMN_IN, TWO_COLUMNS_IN, axis_label, cycle_color, log_axis, style

SUMMARY_FIGURES = (ttft_throughput, load_curves)
ONE_LOAD = {"workload.rate_scale": 1}


def test_evidence_is_told_apart_without_colour() -> None:
    looks = {
        (str(handle.get_linestyle()), str(handle._dash_pattern), handle.get_fillstyle(), str(handle.get_marker()))  # pyright: ignore
        for handle in map(evidence_handle, EVIDENCE)
    }
    assert len(looks) == len(EVIDENCE) == 5
    fills = {kind: line_of(0, kind)["fillstyle"] for kind in EVIDENCE if kind != "published"}
    assert len(set(fills.values())) == 4, "points alone tell it too"
    with pytest.raises(ConfigError, match="evidence: unknown kind 'mesured'; did you mean 'measured'"):
        line_of(0, "mesured")


def test_series_are_told_apart_without_colour() -> None:
    for kind in EVIDENCE:
        assert len({str(line_of(number, kind)["marker"]) for number in range(len(MARKERS))}) == len(MARKERS)
    pairs = [(line_of(n, "measured")["color"], line_of(n, "measured")["marker"]) for n in range(90)]
    assert len(set(pairs)) == 90, "colour and marker repeat together late"


def test_neighbouring_colours_differ_in_grey_print() -> None:
    def luminance(color: str) -> float:
        red, green, blue = to_rgb(color)
        return 0.299 * red + 0.587 * green + 0.114 * blue

    first_three = [luminance(cycle_color(number)) for number in range(3)]
    assert min(abs(a - b) for a, b in itertools.combinations(first_three, 2)) > 0.15
    assert len({to_hex(cycle_color(number)) for number in range(10)}) == 10


@pytest.mark.parametrize(
    ("column", "label"),
    [
        ("offered_req_s", "offered load (req/s)"),
        ("output_tokens_per_s", "output throughput (tokens/s)"),
        ("prompt_tokens", "prompt length (tokens)"),
        ("ttft_s", "TTFT (s)"),
        ("p99_tpot_s", "p99 TPOT (s)"),
        ("itl_s", "ITL (s)"),
        ("workload.rate_req_s", "rate (req/s)"),
        ("link_gb_s", "link (GB/s)"),
        ("workload.rate_scale", "rate scale"),
    ],
)
def test_axes_are_named_with_their_unit(column: str, label: str) -> None:
    assert axis_label(column) == label


def test_every_axis_has_a_unit_and_widths_are_those_of_print(tables: Any) -> None:
    drawn: list[Any] = [f(tables()) for f in SUMMARY_FIGURES]
    drawn += [f(tables(), where=ONE_LOAD) for f in (ttft_prompt_length, latency_cdf)]
    for ax in itertools.chain.from_iterable(one if isinstance(one, tuple) else (one,) for one in drawn):
        labels = [ax.get_xlabel(), ax.get_ylabel()]
        assert all("(" in text or "tokens/s" in text or "fraction" in text for text in labels if text), labels
        assert ax.figure.get_figwidth() == ONE_COLUMN_IN
    (upper, lower) = drawn[1]
    assert not upper.get_xlabel() and upper.get_shared_x_axes().joined(upper, lower)
    wide: Any = ttft_throughput(tables(), width_in=TWO_COLUMNS_IN)
    assert wide.figure.get_figwidth() == TWO_COLUMNS_IN


@pytest.mark.parametrize("figure", [ttft_throughput, load_curves, ttft_prompt_length, latency_cdf])
@pytest.mark.parametrize("width_in", [ONE_COLUMN_IN, TWO_COLUMNS_IN])
def test_nothing_is_cut_off_or_on_top_of_each_other(tables: Any, figure: Any, width_in: float) -> None:
    long = "a_scheduler_with_many_fields(reserve_tokens=1024, alpha=0.25, beta=0.75, chunk_tokens=512)"
    data = tables(schedulers=("fcfs", long, "chunked"))
    drawn = figure(data, where=ONE_LOAD, width_in=width_in)
    ax = drawn[-1] if isinstance(drawn, tuple) else drawn
    canvas: Any = ax.figure
    canvas.draw_without_rendering()
    inside = canvas.bbox.expanded(1.001, 1.001)
    legends = [legend.get_window_extent() for legend in canvas.legends]
    assert len(legends) == 2
    for box in [*legends, *(axes.get_tightbbox() for axes in canvas.axes)]:
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    boxes = [box.expanded(0.99, 0.99) for box in (*legends, ax.get_tightbbox())]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_log_labels_have_room() -> None:
    with style():
        _, ax = plt.subplots(figsize=(ONE_COLUMN_IN, 2.0))
        for low, high in ((1, 5), (1, 100), (1, 10_000), (1e-6, 1e6)):
            ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
            log_axis(ax, "x")
            ax.figure.draw_without_rendering()  # pyright: ignore
            boxes = [
                label.get_window_extent() for label in ax.get_xticklabels() if low <= float(label.get_text()) <= high
            ]
            assert len(boxes) >= 3
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes)), (low, high)


def test_a_users_settings_change_no_figure(tables: Any) -> None:
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "font.family": ["serif"], "axes.facecolor": "black"}):
        ax = latency_cdf(tables(), where=ONE_LOAD)
    assert ax.xaxis.label.get_fontsize() == 8 and ax.xaxis.label.get_fontfamily() == ["DejaVu Sans"]
    assert to_hex(ax.get_facecolor()) == "#ffffff"


def test_interactive_mode_that_a_backend_sets_outlives_the_style() -> None:
    plt.ioff()
    with style():
        plt.ion()  # a notebook's backend, as it loads with the first figure
    assert mpl.is_interactive()
    plt.ioff()
    with style():
        pass
    assert not mpl.is_interactive()
