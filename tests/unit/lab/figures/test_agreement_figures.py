"""Predicted beside measured, and the map of configurations: what is drawn; no number here was measured or simulated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from hybridlab.errors import ConfigError
from hybridlab.figures import configuration_map, predicted_measured, prefill_ways, upgrades

NAMES = ("step_s", "ttft_s", "tpot_s")
BOTH = pd.DataFrame(
    [{f"measured_{name}": s for name in NAMES} | {f"predicted_{name}": 1.1 * s for name in NAMES} for s in (0.1, 0.4)]
)
MAP = pd.DataFrame(
    {
        "machine": [0, 0, 1, 1],
        "strategy": ["a", "b"] * 2,
        "ttft_s": [1.0, 2.0, 4.0, 3.0],
        "output_tokens_per_s": [5.0, 6.0, 7.0, 8.0],
    }
)


def test_points_lie_at_both_numbers_and_the_legend_has_the_median_error() -> None:
    ax: Any = predicted_measured(BOTH)
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}
    assert drawn["TTFT: 10.0%"] == ([0.1, 0.4], pytest.approx([0.11, 0.44]))
    assert {"decode step: 10.0%", "TPOT: 10.0%"} <= set(drawn)


def test_a_machine_is_a_point_of_its_fastest_strategy() -> None:
    ax: Any = configuration_map(MAP)
    (points,) = ax.collections
    assert sorted(map(tuple, points.get_offsets().tolist())) == [(5.0, 1.0), (8.0, 3.0)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a: 50%", "b: 50%"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_what_is_no_number_never_reaches_a_figure(value: float) -> None:
    with pytest.raises(ConfigError, match=r"predicted_measured: predicted_ttft_s is (nan|inf|0\.0) in a row"):
        predicted_measured(BOTH.assign(predicted_ttft_s=[0.1, value]))
    with pytest.raises(ConfigError, match="configuration_map: ttft_s is"):
        configuration_map(MAP.assign(ttft_s=[1.0, 2.0, 3.0, value]))


def test_simulated_rows_without_a_number_are_refused_or_left_out() -> None:
    saved = pd.DataFrame({"change": ["as it is", "more"], "ttft_saved": [0.0, np.nan], "tpot_saved": 0.0})
    with pytest.raises(ConfigError, match="upgrades: expected finite numbers in tpot_saved and ttft_saved"):
        upgrades(saved.assign(evidence="simulated"))
    ways = pd.DataFrame({"way": "a", "prompt_tokens": [1, 2], "ttft_s": [1.0, np.nan], "evidence": "simulated"})
    assert [np.asarray(line.get_ydata()).tolist() for line in prefill_ways(ways).get_lines()] == [[1.0]]


def test_missing_columns_and_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="no column 'measured_step_s'"):
        predicted_measured(BOTH.drop(columns="measured_step_s"))
    with pytest.raises(ConfigError, match="no column 'machine'"):
        configuration_map(MAP.drop(columns="machine"))
    with pytest.raises(ConfigError, match="no rows to draw"):
        predicted_measured(BOTH.iloc[:0])
