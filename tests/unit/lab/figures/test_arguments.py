"""Mistakes in the arguments of figures: one line that names the figure, the argument and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from hybridlab import figures
from hybridlab.errors import ConfigError

MISTAKES = [
    ({"where": "x"}, r"where: expected \{column: value or list of values\}, got 'x'"),
    ({"by": 3}, r"by: expected a column or a list of columns, got 3"),
    ({"by": []}, r"by: expected a column or a list of columns, got \[\]"),
    ({"by": [["scheduler"]]}, r"by: expected a column or a list of columns, got \[\['scheduler'\]\]"),
    ({"evidence": 3}, r"evidence: expected a kind or a list of kinds, got 3"),
    ({"evidence": []}, r"evidence: expected a kind or a list of kinds, got \[\]"),
    ({"ax": 3}, r"ax: expected (two )?Axes.*, got 3"),
    ({"ax": (3, 4)}, r"ax: expected (two )?Axes.*, got \(3, 4\)"),
    ({"width_in": "a"}, r"width_in: expected inches above 0, at most 100, got 'a'"),
    ({"width_in": -1}, r"width_in: expected inches above 0, at most 100, got -1"),
    ({"width_in": float("nan")}, r"width_in: expected inches above 0, at most 100, got nan"),
]
OF_ONE = {
    "ttft_throughput": [
        ({"load": "scheduler"}, "load: expected a column of numbers; 'scheduler' holds 'fcfs'"),
        ({"load": ["a"]}, r"no column \['a'\]; pass a result"),
        ({"ttft": []}, r"ttft: expected one of median, p90, p99, got \[\]"),
    ],
    "load_curves": [
        ({"load": "run_id"}, "load: expected a column of numbers; 'run_id' holds 'fcfs-1-0'"),
        ({"tpot": 3}, "tpot: expected one of median, p90, p99, got 3"),
    ],
    "ttft_prompt_length": [({"length": "tokens"}, "length: expected one of prompt_tokens, computed_tokens, got 'tok")],
    "timeline": [
        ({"start_s": "a"}, "start_s: expected seconds, got 'a'"),
        ({"end_s": float("inf")}, "end_s: expected seconds, got inf"),
        ({"end_s": True}, "end_s: expected seconds, got True"),
    ],
}
NAMES = ("ttft_throughput", "load_curves", "ttft_prompt_length", "latency_cdf", "timeline")
CASES = [
    (name, arguments, message)
    for name in NAMES
    for arguments, message in (*MISTAKES, *OF_ONE.get(name, ()))
    if name != "timeline" or not arguments.keys() & {"by", "evidence"}  # which it does not have
]


@pytest.mark.parametrize(("name", "arguments", "message"), CASES)
def test_mistakes_are_named_before_anything_is_drawn(
    tables: Any, name: str, arguments: dict[str, Any], message: str
) -> None:
    where = {"scheduler": "fcfs"} if name == "timeline" else None
    with pytest.raises(ConfigError, match=f"^{name}: {message}") as caught:
        getattr(figures, name)(tables(loads=[1], repeats=1), **{"where": where, **arguments})
    assert "\n" not in str(caught.value) and not plt.get_fignums()


def test_what_is_no_table_or_no_figure_is_named(tables: Any, tmp_path: Path) -> None:
    data = tables(loads=[1], repeats=1, schedulers=["fcfs"])
    wrong: Any = 3
    with pytest.raises(ConfigError, match="pareto_front: expected a table, got int"):
        figures.pareto_front(wrong)
    with pytest.raises(ConfigError, match="pareto_front: expected a column of numbers; 'scheduler' holds 'fcfs'"):
        figures.pareto_front(data.summary, "scheduler")
    with pytest.raises(ConfigError, match="save_figure: nothing drawn"):
        figures.save_figure(wrong, tmp_path / "x", command="")
    for save in (
        figures.save_perfetto,
        lambda data, path: figures.save_figure(figures.timeline(data), path, command=""),
    ):
        with pytest.raises(ConfigError, match="path: expected the path of a file, got 3"):
            save(data, wrong)
