"""Bytes of the exchanges and two links against one: tables and what is drawn; no number here was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.errors import ConfigError
from hybridlab.figures import ONE_COLUMN_IN, dslp, exchange_bytes, exchange_table, read_exchange, save_figure
from hybridlab.plans import EXCHANGES

SENT = {
    "small_ep": {2: 1000, 4: 3000},
    "dispatch_per_route": {2: 2000, 4: 3000},
    "dispatch_per_rank": {2: 900, 4: 2100},
}
STEP_S = {"one rank": 4.0, "two ranks, small_ep": 2.0, "two ranks, dispatch_per_rank": 2.5}
ORIGIN = {"evidence": "measured", "machine": "test", "code": "c0ffee"}


def make_bytes(**changes: Any) -> Any:
    rows = []
    for exchange, sent in SENT.items():
        for ranks, count in sent.items():
            row: dict[str, Any] = {
                "preset": "tiny",
                "exchange": exchange,
                "ranks": ranks,
                "tokens": 10,
                "moe_layers": 2,
            }
            row |= {"top_k": 4, "sent_bytes": count, "formula_bytes": count, "uniform_bytes": 0.9 * count}
            rows.append(row | {"router_tokens": 10 * (ranks if exchange == "small_ep" else 1)} | ORIGIN | changes)
    return pd.DataFrame(rows)


def make_dslp(**changes: Any) -> Any:
    rows = []
    for system, step_s in STEP_S.items():
        ranks = 1 if system == "one rank" else 2
        row: dict[str, Any] = {"system": system, "ranks": ranks, "step_s": step_s, "step_s_min": 0.9 * step_s}
        row |= {"step_s_max": 1.1 * step_s, "load_s": 3.8 / ranks, "over_one_rank": 4.0 / step_s}
        rows.append(row | ORIGIN | {"evidence": "emulated"} | changes)
    return pd.DataFrame(rows)


def test_names_are_those_of_the_plans() -> None:
    assert tuple(SENT) == EXCHANGES


def test_table_compares_counted_with_formula() -> None:
    rows = make_bytes()
    rows.loc[rows["exchange"] == "dispatch_per_rank", "formula_bytes"] += 1
    table: Any = exchange_table(rows).set_index(["exchange", "ranks"])
    assert list(table["equal"]) == [True, True, True, True, False, False]
    assert table.loc[("dispatch_per_rank", 4), "over_small_ep"] == pytest.approx(0.7)
    assert table.loc[("small_ep", 4), "router_work"] == 4 and table.loc[("dispatch_per_route", 4), "router_work"] == 1
    assert table.loc[("dispatch_per_route", 2), "counted_mb"] == pytest.approx(0.002)
    assert "router_work" not in exchange_table(rows.drop(columns="router_tokens")).columns


@pytest.mark.parametrize("width_in", [ONE_COLUMN_IN, 7.0])
def test_markers_are_counted_and_lines_the_formulas(width_in: float, legend_texts: Callable[[Any], list[str]]) -> None:
    rows = make_bytes()
    rows["formula_bytes"] *= 2
    ax: Any = exchange_bytes(rows, width_in=width_in)
    lines: dict[str, list[Any]] = {}
    for line in ax.get_lines():
        lines.setdefault(line.get_label(), []).append(line)
    (counted,) = lines["dispatch_per_rank"]
    assert list(counted.get_ydata()) == pytest.approx([0.045, 0.105]) and counted.get_linestyle() == "None"
    assert list(lines["_formula"][2].get_ydata()) == pytest.approx([0.09, 0.21])
    assert list(lines["random routes"][0].get_ydata()) == pytest.approx([0.045, 0.135])
    assert [line.get_xdata()[0] for line in lines["_top_k"]] == [4]
    assert legend_texts(ax) == [*SENT, "counted", "formula", "random routes", "measured"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["2", "4"]


@pytest.mark.parametrize("width_in", [ONE_COLUMN_IN, 7.0])
def test_a_bar_a_system_and_the_loads_alone(width_in: float, legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = dslp(make_dslp(), width_in=width_in)
    assert [bar.get_width() for bar in ax.patches] == [4.0, 2.0, 2.5]
    loads = [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() == "_loads"]
    assert loads == pytest.approx([3.8, 1.9, 1.9])
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() == "_half"] == [2.0]
    assert [text.get_text() for text in ax.texts] == ["2.00x", "1.60x"]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(STEP_S)
    assert legend_texts(ax) == ["loads alone", "half of one rank", "emulated"]
    ax.figure.draw_without_rendering()
    assert min(label.get_window_extent().x0 for label in ax.get_yticklabels()) >= 0


def test_prompts_of_several_lengths_are_groups_of_bars() -> None:
    ax: Any = dslp(pd.concat([make_dslp(tokens=2000, step_s=8.0), make_dslp(tokens=1000)]))
    assert [bar.get_width() for bar in ax.patches] == [4.0, 2.0, 2.5, 8.0, 8.0, 8.0]
    halves = [line for line in ax.get_lines() if line.get_label() == "_half"]
    assert [line.get_xdata()[0] for line in halves] == [2.0, 4.0]
    assert max(halves[0].get_ydata()) < min(halves[1].get_ydata())
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names[0] == "1,000 tokens: one rank" and names[3] == "2,000 tokens: one rank"


@pytest.mark.parametrize(
    ("draw", "rows", "words"),
    [
        (exchange_bytes, pd.concat([make_bytes(), make_bytes(preset="large")]), "rows differ in 'preset'"),
        (exchange_bytes, make_bytes().drop(columns="top_k"), "no column 'top_k'"),
        (dslp, make_dslp().drop(columns="load_s"), "no column 'load_s'"),
        (dslp, pd.concat([make_dslp(), make_dslp()]), "'one rank' is there twice"),
        (dslp, pd.concat([make_dslp(), make_dslp(evidence="measured")]), "evidence="),
    ],
)
def test_mistakes_are_one_line(draw: Any, rows: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        draw(rows)


def test_rows_are_read_with_their_origin(tmp_path: Path) -> None:
    for name, rows in (("bytes", make_bytes()), ("dslp", make_dslp())):
        lines = [json.dumps(row) for row in rows.to_dict("records")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    pd.testing.assert_frame_equal(exchange_table(read_exchange(folder=tmp_path)), exchange_table(make_bytes()))
    drawn = dslp(read_exchange("dslp", tmp_path))
    sidecar = json.loads(save_figure(drawn, tmp_path / "dslp", command="c")[".json"].read_text())
    assert (sidecar["machine"], sidecar["code"], sidecar["evidence"]) == (["test"], ["c0ffee"], ["emulated"])
    with pytest.raises(ConfigError, match="table: expected one of bytes, dslp"):
        read_exchange("none", tmp_path)
    (tmp_path / "bytes.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_exchange("bytes", tmp_path)
    (tmp_path / "dslp.jsonl").write_text('{"system": "x"}')
    with pytest.raises(ConfigError, match=r"damaged \(no column 'ranks'"):
        read_exchange("dslp", tmp_path)
