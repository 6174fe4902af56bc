"""Seconds over tokens on each path: lines, thresholds and what is refused; no number here was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from calibrated import REQUESTS, TOKENS, calibration, cpu_s, points

from hybridlab.calibration.results import CPU, MIXED, STREAMED
from hybridlab.errors import ConfigError
from hybridlab.figures import ONE_COLUMN_IN, crossover, save_figure


def lines(ax: Any) -> dict[tuple[float, ...], Any]:
    """Lines with a point per size, by their values; the ends of whiskers are no lines."""
    drawn = [one for one in ax.get_lines() if one.get_linestyle() != "None"]
    return {tuple(one.get_ydata()): one for one in drawn if len(one.get_xdata()) == len(TOKENS)}


def at(ax: Any, label: str) -> list[float]:
    return [float(one.get_xdata()[0]) for one in ax.get_lines() if one.get_label() == label]


def words(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_a_line_a_path_and_the_thresholds_between_them(legend_texts: Callable[[Any], list[str]]) -> None:
    found = calibration()
    ax: Any = crossover(found)
    drawn = lines(ax)
    assert len(drawn) == 3
    assert tuple(10 * cpu_s(n) for n in TOKENS) in drawn and (0.1,) * len(TOKENS) in drawn
    assert {tuple(one.get_xdata()) for one in drawn.values()} == {TOKENS}
    mixed_from, mixed_to = found.crossovers.mixed_from_tokens, found.crossovers.mixed_to_tokens
    assert at(ax, "_threshold") == [mixed_from, mixed_to]
    assert at(ax, "_passes") == [100]
    assert words(ax) == [f"mixed\nfrom {mixed_from}", f"streamed\nfrom {mixed_to}", "100"]
    assert legend_texts(ax) == ["CPU experts", "streamed", "mixed 25%", "measured", "range of repeats"]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens of the step", "all layers (s)")


def test_whiskers_span_the_repeats() -> None:
    ax: Any = crossover(calibration())
    ends = {float(y) for one in ax.collections for segment in one.get_segments() for y in segment[:, 1]}
    assert any(y == pytest.approx(0.9 * 0.1) for y in ends) and any(y == pytest.approx(1.1 * 0.1) for y in ends)
    still = [replace(one, layer_s_min=one.layer_s, layer_s_max=one.layer_s) for one in points()]
    assert "range of repeats" not in [
        text.get_text() for text in crossover(calibration(still)).figure.legends[-1].texts
    ]


def test_without_a_mixed_path_streaming_takes_over_from_the_cpu() -> None:
    ax: Any = crossover(calibration([one for one in points() if one.path in (CPU, STREAMED)]))
    assert at(ax, "_threshold") == at(ax, "_passes") == [100]
    assert words(ax) == ["streamed\nfrom 100", "100"]


def test_paths_that_are_never_faster_have_no_threshold() -> None:
    slow = [replace(one, step_s=1e3 * one.tokens) for one in points() if one.path in (STREAMED, MIXED)]
    ax: Any = crossover(calibration([one for one in points() if one.path == CPU] + slow))
    assert at(ax, "_threshold") == at(ax, "_passes") == words(ax) == []


def test_decoding_is_a_figure_of_its_own(legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = crossover(calibration(), kind="decode", width_in=ONE_COLUMN_IN)
    assert at(ax, "_threshold") == [2, 4]
    assert words(ax) == ["dual batch\nfrom 2", "plain\nfrom 4"]
    assert legend_texts(ax)[:2] == ["plain", "dual batch"]
    assert {tuple(one.get_xdata()) for one in ax.get_lines() if len(one.get_xdata()) > 2} == {REQUESTS}
    assert ax.get_xlabel() == "decoding requests"


def test_kinds_of_evidence_look_different_and_are_compared_only_when_asked(
    legend_texts: Callable[[Any], list[str]],
) -> None:
    slower = [replace(one, step_s=3 * one.step_s) for one in points()]
    emulated = calibration(slower, "emulated", device="emulated").rows
    both = pd.concat([calibration().rows, emulated])
    with pytest.raises(ConfigError, match="rows are measured and emulated; comparing kinds must be asked for"):
        crossover(both)
    ax: Any = crossover(both, evidence=["measured", "emulated"])
    assert len(lines(ax)) == 6 and len(at(ax, "_threshold")) == 4
    looks = {(one.get_linestyle(), one.get_fillstyle()) for one in lines(ax).values()}
    assert looks == {("-", "full"), ("--", "left")}
    assert legend_texts(ax)[-3:-1] == ["measured", "emulated"]
    assert len(lines(crossover(both, evidence="emulated"))) == 3


def test_other_models_and_machines_are_told_apart() -> None:
    mine = calibration().rows
    for column in ("model", "machine"):
        with pytest.raises(ConfigError, match=f"crossover: rows differ in '{column}'"):
            crossover(pd.concat([mine, mine.assign(**{column: "another"})]))
    both = pd.concat([mine, mine.assign(model="another")])
    assert len(lines(crossover(both, where={"model": "another"}))) == 3


@pytest.mark.parametrize(
    ("data", "keywords", "message"),
    [
        (7, {}, "crossover: pass a result"),
        (calibration().rows.drop(columns="step_s"), {}, "crossover: no column 'step_s'"),
        (calibration().rows.iloc[:0], {}, "crossover: no rows to draw"),
        (calibration([one for one in points() if one.kind == "decode"]), {}, "none is of kind 'prefill'"),
        (calibration(), {"kind": "both"}, "crossover: kind: expected one of prefill, decode"),
        (calibration(), {"ax": 3}, "crossover: ax"),
        (calibration(), {"width_in": 0}, "crossover: width_in"),
        (calibration(), {"where": {"nope": 1}}, "crossover: where: no column 'nope'"),
    ],
)
def test_mistakes_are_one_line(data: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        crossover(data, **keywords)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_say_where_the_numbers_come_from(tmp_path: Path) -> None:
    written = save_figure(crossover(calibration(), width_in=ONE_COLUMN_IN), tmp_path / "crossover", command="test")
    sidecar = written[".json"].read_text()
    assert "c0ffee" in sidecar and "a GPU, a CPU, 16 threads" in sidecar and "measured" in sidecar
