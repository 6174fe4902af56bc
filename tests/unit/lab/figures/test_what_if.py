"""What a machine would do: what is drawn; no number here was measured or simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from hybridlab.errors import ConfigError
from hybridlab.figures import prefill_ways, save_figure, upgrades

WAYS: Any = pd.DataFrame(
    [
        {"way": way, "prompt_tokens": n, "ttft_s": s, "evidence": "simulated"}
        for way, times in {"experts on the CPU": (1.0, 8.0), "experts streamed": (4.0, 5.0)}.items()
        for n, s in zip((512, 4096), times, strict=True)
    ]
)
CHANGES: Any = pd.DataFrame(
    [
        {"change": change, "ttft_saved": ttft, "tpot_saved": tpot, "evidence": "simulated"}
        for change, ttft, tpot in (("as it is", 0.0, 0.0), ("twice the link", 0.4, 0.0), ("twice the VRAM", 0.0, 0.1))
    ]
)


def test_a_line_a_way_and_the_goal(legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = prefill_ways(WAYS.iloc[::-1], goal_s=30)
    drawn = {one.get_label(): list(one.get_ydata()) for one in ax.get_lines()}
    assert drawn["experts on the CPU"] == [1.0, 8.0] and drawn["experts streamed"] == [4.0, 5.0]
    assert [30, 30] in drawn.values() and [text.get_text() for text in ax.texts] == ["30 s"]
    assert set(legend_texts(ax)) == {"experts on the CPU", "experts streamed", "simulated"}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("prompt length (tokens)", "TTFT (s)")


def test_two_bars_an_upgrade_the_first_on_top(legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = upgrades(CHANGES)
    ticks = {label.get_text(): place for label, place in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)}
    assert ticks["twice the link"] > ticks["twice the VRAM"] and "as it is" not in ticks
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in ax.patches]
    near = {name: [width for y, width in bars if abs(y - place) < 0.5] for name, place in ticks.items()}
    assert near == {"twice the link": pytest.approx([0, 40]), "twice the VRAM": pytest.approx([10, 0])}
    assert set(legend_texts(ax)) == {"TPOT", "TTFT", "simulated"}


@pytest.mark.parametrize("width_in", [3.33, 7.0])
def test_they_can_be_saved(tmp_path: Any, width_in: float) -> None:
    for number, ax in enumerate((prefill_ways(WAYS, width_in=width_in), upgrades(CHANGES, width_in=width_in))):
        assert save_figure(ax, tmp_path / f"figure{number}", command="test")


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"upgrades: .*ttft_saved"):
        upgrades(CHANGES.drop(columns="ttft_saved"))
    with pytest.raises(ConfigError, match=r"prefill_ways: .*way"):
        prefill_ways(WAYS.drop(columns="way"))
    mixed = WAYS.assign(evidence=["simulated", "measured"] * 2)
    with pytest.raises(ConfigError, match="evidence"):
        prefill_ways(mixed)
