"""Steps of workers and tokens of requests on one clock: what is drawn; no number here was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from hybridlab.errors import ConfigError
from hybridlab.figures import ONE_COLUMN_IN, worker_timeline
from hybridlab.step_log import BOTH, COLUMNS, DECODES, FIRST_TOKEN, KILLED, LOST, PROMPT, TOKEN

ROWS = [
    ("decode", "worker", DECODES, 0.0, 0.1),
    ("decode", "worker", BOTH, 0.2, 0.4),
    ("prefill", "worker", PROMPT, 0.1, 0.5),
    ("prefill", "worker", LOST, 0.5, 0.6),
    ("prefill", "worker", KILLED, 0.55, 0.55),
    ("user 0", "request", FIRST_TOKEN, 0.0, 0.1),
    ("user 0", "request", TOKEN, 0.1, 0.1),
    ("user 0", "request", TOKEN, 0.4, 0.4),
]


def make_rows(**changes: Any) -> pd.DataFrame:
    return pd.DataFrame(ROWS, columns=list(COLUMNS)).assign(system="split", evidence="measured", **changes)


@pytest.mark.parametrize("width_in", [ONE_COLUMN_IN, 7.0])
def test_a_bar_a_step_and_a_tick_a_token(width_in: float, legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = worker_timeline(make_rows(), width_in=width_in)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["prefill", "decode", "user 0"]
    bars = sorted((round(p.get_y() + p.get_height() / 2), p.get_x(), p.get_width()) for p in ax.patches)
    expected = [(0, 100, 400), (0, 500, 100), (1, 0, 100), (1, 200, 200), (2, 0, 100)]
    assert bars == [pytest.approx(bar) for bar in expected]
    (ticks,) = ax.collections
    assert sorted(segment[0][0] for segment in ticks.get_segments()) == pytest.approx([100, 400])
    assert legend_texts(ax) == [PROMPT, BOTH, DECODES, LOST, FIRST_TOKEN, "a token", KILLED, "measured"]
    (killed,) = [line for line in ax.get_lines() if line.get_label() == KILLED]
    assert (list(killed.get_xdata()), list(killed.get_ydata())) == ([pytest.approx(550)], [0])
    assert ax.get_xlim() == (0, 600) and ax.get_xlabel() == "time (ms)"


def test_a_window_and_its_clock(legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = worker_timeline(make_rows(), start_s=0.45, end_s=0.54)
    assert ax.get_xlabel() == "time after 0.45 s (ms)" and ax.get_xlim() == pytest.approx((0, 90))
    assert legend_texts(ax) == [PROMPT, LOST, "a token", "measured"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["prefill", "decode", "user 0"]


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        (make_rows(), {"start_s": 9.0}, "nothing between 9 and 0.6 s"),
        (make_rows(), {"end_s": "x"}, "end_s: expected seconds"),
        (make_rows(), {"where": {"system": "none"}}, "no row with system = 'none'"),
        (make_rows().drop(columns="of"), {}, "no column 'of'"),
        (pd.concat([make_rows(), make_rows().assign(system="one")]), {}, "rows of 2 systems"),
    ],
)
def test_mistakes_are_one_line(rows: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        worker_timeline(rows, **arguments)
