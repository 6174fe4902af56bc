from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import hybridlab as hl
from hybridlab.errors import ConfigError
from hybridlab.figures import save_figure, timeline, ttft_throughput
from hybridlab.figures.style import EVIDENCE, evidence_handle, style


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def summary(**changes: Any) -> pd.DataFrame:
    rows = [
        {
            "scheduler": scheduler,
            "evidence": "measured",
            "offered_req_s": float(load),
            "output_tokens_per_s": 50.0 * load + repeat,
            "median_ttft_s": base * load + 0.01 * repeat,
            "p90_ttft_s": 2 * base * load,
            "median_tpot_s": 0.03 * load,
            "slo": "mine",
            "slo_ttft_s": 1.0,
            "slo_tpot_s": 0.08,
            **changes,
        }
        for scheduler, base in (("fcfs", 0.3), ("chunked", 0.2))
        for load in (2, 1, 4)
        for repeat in (0, 1)
    ]
    return pd.DataFrame(rows)


def lines(ax: Axes, marker: str = "o") -> list[Any]:
    return [line for line in ax.get_lines() if line.get_marker() == marker and line.get_linestyle() != "None"]


def legend_texts(ax: Axes) -> list[str]:
    legends = [*ax.figure.legends, *([ax.get_legend()] if ax.get_legend() else [])]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def spans(**changes: Any) -> pd.DataFrame:
    rows = [
        ("main/gpu", "attention", 0, 0.000, 0.001),
        ("main/gpu", "attention", 1, 0.001, 0.002),
        ("main/cpu", "experts", 0, 0.001, 0.002),
        ("main/cpu", "experts", 1, 0.199, 0.200),
    ]
    return pd.DataFrame(rows, columns=["lane", "kind", "microbatch", "start_s", "end_s"]).assign(**changes)


def test_ttft_throughput_draws_a_line_per_scheduler_in_order_of_load() -> None:
    ax = ttft_throughput(summary())
    first, second = lines(ax)
    assert list(first.get_xdata()) == [50.5, 100.5, 200.5]  # repeats averaged, sorted by load
    assert list(second.get_ydata()) == pytest.approx([0.205, 0.405, 0.805])
    assert ax.get_yscale() == "log"
    assert "(tokens/s)" in ax.get_xlabel() and "(s)" in ax.get_ylabel()
    assert "SLO mine" in ax.get_title(loc="left") and "TPOT ≤ 80 ms" in ax.get_title(loc="left")
    assert legend_texts(ax) == ["fcfs", "chunked", "measured", "median TPOT misses SLO"]


def test_ttft_throughput_draws_on_given_axes() -> None:
    _, axes = plt.subplots(1, 2)
    assert ttft_throughput(summary(), axes[1]) is axes[1]
    assert not axes[0].get_lines() and legend_texts(axes[1])


def test_evidence_is_told_apart() -> None:
    handles = [evidence_handle(kind) for kind in EVIDENCE]
    looks = {(str(h.get_linestyle()), h.get_fillstyle(), h.get_marker()) for h in handles}
    assert len(looks) == len(EVIDENCE) == 5
    ax = ttft_throughput(pd.concat([summary(), summary(evidence="simulated")]))
    assert len(lines(ax)) == 4
    assert {line.get_fillstyle() for line in lines(ax)} == {"full", "none"}
    with pytest.raises(ConfigError, match="evidence: unknown kind 'guessed'"):
        ttft_throughput(summary(evidence="guessed"))


def test_runs_without_a_finished_request_are_left_out() -> None:
    frame = pd.concat([summary(), summary(scheduler="broken", median_ttft_s=float("nan"))])
    assert len(lines(ttft_throughput(frame))) == 2


def test_bad_frames_are_named() -> None:
    with pytest.raises(ConfigError, match="ttft_throughput: no column 'p90_ttft_s'"):
        ttft_throughput(summary().drop(columns="p90_ttft_s"))
    with pytest.raises(ConfigError, match=r"pass a result or result\.summary, got dict"):
        ttft_throughput({})  # pyright: ignore
    with pytest.raises(ConfigError, match="no rows"):
        ttft_throughput(summary().iloc[:0])
    with pytest.raises(ConfigError, match="timeline: no column 'kind'"):
        timeline(spans().drop(columns="kind"))
    with pytest.raises(ConfigError, match="spans of 4 runs"):
        timeline(spans(run_id=list("abcd")))
    with pytest.raises(ConfigError, match=r"0 ops between 0\.05 and 0\.1 s"):
        timeline(spans(), start_s=0.05, end_s=0.1)


def test_results_are_taken_as_they_are() -> None:
    result: Any = SimpleNamespace(summary=summary(), spans=spans())
    assert len(lines(hl.figures.ttft_throughput(result))) == 2
    assert hl.figures.timeline(result).patches


def test_kinds_too_thin_to_see_are_not_in_the_legend() -> None:
    thin = pd.DataFrame([("main/cpu", "combine", 0, 0.1995, 0.1995 + 1e-7)], columns=list(spans().columns))
    assert legend_texts(timeline(pd.concat([spans(), thin]))) == ["experts", "later microbatch"]
    assert legend_texts(timeline(thin, start_s=0.1, end_s=0.2)) == ["combine"]


def test_interactive_mode_that_a_backend_sets_outlives_the_style() -> None:
    plt.ioff()
    with style():
        plt.ion()  # a notebook's backend, as it loads with the first figure
    assert mpl.is_interactive()
    plt.ioff()
    with style():
        pass
    assert not mpl.is_interactive()


def test_timeline_has_a_row_per_lane_and_a_window() -> None:
    ax = timeline(spans(), start_s=0.0, end_s=0.0015)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["main/cpu", "main/gpu"]
    assert legend_texts(ax) == ["attention", "experts", "later microbatch"]
    widths = sorted(round(bar.get_width(), 3) for bar in ax.patches)  # pyright: ignore
    assert widths == [0.5, 0.5, 1.0]  # cut at the window, in ms
    assert ax.get_xlim() == (0, 1.5)
    assert len(timeline(spans()).patches) == 1  # the last 50 ms


def test_saved_figures_say_where_they_come_from(tmp_path: Path) -> None:
    written = save_figure(ttft_throughput(summary()), tmp_path / "new" / "fig.png", run_ids=["abc"], command="make it")
    assert sorted(written) == [".json", ".pdf", ".png", ".svg"]
    assert all(path.parent == tmp_path / "new" and path.stem == "fig" for path in written.values())
    sidecar = json.loads(written[".json"].read_text())
    assert (sidecar["run_ids"], sidecar["command"]) == (["abc"], "make it")
    for suffix in (".png", ".svg"):
        assert b"hybridlab runs abc; command: make it" in written[suffix].read_bytes()
    pdf = written[".pdf"].read_bytes()
    assert b"hybridlab runs abc" in pdf and b"/Type3" not in pdf


def test_figures_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="figure cannot be written"):
        save_figure(timeline(spans()), tmp_path / "file" / "fig", run_ids=[], command="")
