"""Stream-loading prefill: the floor, the fractions of it, and what is drawn; no number here was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from hybridlab.errors import ConfigError
from hybridlab.figures import ONE_COLUMN_IN, read_slp, save_figure, slp, slp_table
from hybridlab.figures.slp import _apart

LINK_S = 1.0
RESIDENT_S = {512: 0.25, 1024: 0.5, 2048: 2.0}
SLOWER = {"all resident": 0.0, "ring": 0.1, "one buffer": 0.5}


def make_rows(**changes: Any) -> Any:
    """TTFT is the floor and `SLOWER`; the budget of 24 GB has the longest prompt only."""
    rows: list[dict[str, Any]] = []
    for variant, more_s in SLOWER.items():
        for tokens, resident_s in RESIDENT_S.items():
            ttft_s = resident_s if variant == "all resident" else max(LINK_S, resident_s) + more_s
            rows.append(_row(variant, tokens, ttft_s, None))
    rows.append(_row("ring", 2048, 2.5, 24.0))
    alone = [0.9 * LINK_S, LINK_S, 1.2 * LINK_S]
    rows += [{"variant": "link alone", "of": "ring", "seconds": s, "load_bytes": 100, "vram_gb": None} for s in alone]
    rows.append({"variant": "link alone", "of": "another model", "seconds": 50.0, "load_bytes": 5000})
    rows.append({"variant": "CPU experts", "error": "too little memory"})
    return pd.DataFrame([row | changes for row in rows])


def _row(variant: str, tokens: int, ttft_s: float, vram_gb: float | None) -> dict[str, Any]:
    times = {"ttft_s": ttft_s, "ttft_s_min": 0.9 * ttft_s, "ttft_s_max": 1.2 * ttft_s}
    size = 0 if variant == "all resident" else 100
    origin = {"evidence": "measured", "machine": "test GPU", "code": "c0ffee"}
    return (
        {"variant": variant, "preset": "tiny", "vram_gb": vram_gb, "tokens": tokens, "load_bytes": size}
        | times
        | origin
    )


def line(ax: Any, label: str) -> Any:
    """The line whose end carries the name `label`."""
    color = next(text.get_color() for text in ax.texts if text.get_text() == label)
    return next(one for one in ax.get_lines() if one.get_color() == color and one.get_marker() != "None")


def test_floor_is_the_longer_of_link_and_computing() -> None:
    table: Any = slp_table(make_rows())
    assert set(table["link_s"]) == {LINK_S}  # the median; neither failed rows nor the other model's bytes count
    ring = table[(table["variant"] == "ring") & table["vram_gb"].isna()]
    assert list(ring["tokens"]) == [512, 1024, 2048]
    assert list(ring["floor_s"]) == [1.0, 1.0, 2.0]
    assert list(ring["fraction"]) == pytest.approx([1 / 1.1, 1 / 1.1, 2 / 2.1])
    (limited,) = table[table["vram_gb"] == 24]["fraction"]
    assert limited == pytest.approx(2 / 2.5)
    assert "all resident" not in set(table["variant"])


@pytest.mark.parametrize("without", ["all resident", "link alone"])
def test_no_floor_where_a_part_of_it_is_missing(without: str) -> None:
    rows = make_rows()
    rows = rows[rows["variant"] != without]
    assert np.isnan(slp_table(rows)["fraction"].to_numpy()).all()
    assert [one for one in slp(rows).lines if one.get_label() == "_floor"] == []


def test_a_named_line_a_variant_with_whiskers_and_floor(legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = slp(make_rows())
    names = ["all resident", "ring", "one buffer", "ring, planned for 24 GB"]
    assert [text.get_text() for text in ax.texts] == names
    assert list(line(ax, "one buffer").get_xdata()) == [512, 1024, 2048]
    assert list(line(ax, "one buffer").get_ydata()) == [1.5, 1.5, 2.5]
    assert len(line(ax, "ring, planned for 24 GB").get_xdata()) == 1
    (floor,) = [one for one in ax.get_lines() if one.get_label() == "_floor"]
    assert list(floor.get_ydata()) == [1.0, 1.0, 2.0]
    whiskers = np.concatenate([segment for one in ax.collections for segment in one.get_segments()])
    assert whiskers[:, 1].max() == pytest.approx(1.2 * 2.5) and whiskers[:, 1].min() == pytest.approx(0.9 * 0.25)
    assert legend_texts(ax) == ["measured", "floor: max(link alone, all resident)", "range of repeats"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["512", "1K", "2K"]
    assert ax.get_xscale() == ax.get_yscale() == "log"


@pytest.mark.parametrize("width_in", [ONE_COLUMN_IN, 7.0])
def test_names_lie_apart_and_inside_the_figure(width_in: float) -> None:
    ax: Any = slp(make_rows(), width_in=width_in)
    ax.figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(name) for name in ax.texts), key=lambda box: box.y0)
    assert all(upper.y0 >= lower.y1 - 1 for lower, upper in pairwise(boxes))
    assert max(box.x1 for box in boxes) <= ax.figure.bbox.x1


def test_labels_move_no_further_than_they_must() -> None:
    assert list(_apart(np.array([0.0, 100.0, 30.0]), 10)) == [0, 100, 30]
    assert list(_apart(np.array([50.0, 50.0, 0.0]), 10)) == [45, 55, 0]
    assert list(_apart(np.array([4.0, 0.0, 11.0]), 10)) == [5, -5, 15]


def test_kinds_are_compared_only_if_asked_for(legend_texts: Callable[[Any], list[str]]) -> None:
    emulated = make_rows()
    emulated = emulated[emulated["ttft_s"] > 0].assign(evidence="emulated")
    both: Any = pd.concat([make_rows(), emulated], ignore_index=True)
    with pytest.raises(ConfigError, match="evidence="):
        slp(both)
    assert legend_texts(slp(both, evidence=["measured", "emulated"]))[:2] == ["measured", "emulated"]
    assert set(slp_table(both, evidence="emulated")["evidence"]) == {"emulated"}


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, {"where": {"preset": "large"}}, "no row with preset = 'large'"),
        ({}, {"ax": 3}, "ax: expected Axes"),
        ({"ttft_s": 0.0}, {}, "no rows to draw"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        slp(make_rows(**changes), **arguments)


def test_models_are_not_mixed() -> None:
    both: Any = pd.concat([make_rows(), make_rows(preset="large")], ignore_index=True)
    with pytest.raises(ConfigError, match="rows differ in 'preset'"):
        slp(both)
    assert len(slp(both, where={"preset": "large"}).texts) == 4
    with pytest.raises(ConfigError, match="no column 'ttft_s_min'"):
        slp(make_rows().drop(columns="ttft_s_min"))


def test_rows_are_read_with_their_origin(tmp_path: Path) -> None:
    lines = [json.dumps({k: v for k, v in row.items() if v == v}) for row in make_rows().to_dict("records")]
    (tmp_path / "slp.jsonl").write_text("\n".join(lines) + "\n")
    read = read_slp(tmp_path)
    pd.testing.assert_frame_equal(slp_table(read), slp_table(make_rows()))
    files = save_figure(slp(read), tmp_path / "ttft", command="python analysis.py")
    sidecar = json.loads(files[".json"].read_text())
    assert (sidecar["machine"], sidecar["code"], sidecar["evidence"]) == (["test GPU"], ["c0ffee"], ["measured"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ('{"variant": "ring"}', "damaged .no column"),
        (json.dumps(make_rows().drop(columns="code").iloc[0].to_dict()), "damaged .no column 'code'"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "slp.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_slp(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_slp(tmp_path / "none")
