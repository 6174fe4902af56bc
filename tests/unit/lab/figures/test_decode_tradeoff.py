"""Tokens/s over TPOT of decode batches: what is read and what is drawn; no number here was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.text import Text

from hybridlab.bench import decode_devices as bench_decode_devices
from hybridlab.errors import ConfigError
from hybridlab.figures import ONE_COLUMN_IN, decode_table, decode_tradeoff, read_decode, save_figure
from hybridlab.figures.decode_tradeoff import CPU, DUAL, PLAIN

TPOT_S = {
    "plain batch": {1: 0.05, 2: 0.08, 4: 0.125},
    "dual batch": {2: 0.0625, 4: 0.1},
    "device cpu": {1: 0.04, 2: 0.0625, 4: 0.1},
}


def make_rows(*variants: str, **changes: Any) -> Any:
    """Rows as `bench decode --device emulated` writes them, by default of the plain and the dual batch."""
    rows = []
    for variant in variants or ("plain batch", "dual batch"):
        for batch, tpot_s in TPOT_S[variant].items():
            emulated = variant != "device cpu"
            row = {"variant": variant, "batch": batch, "tpot_s": tpot_s, "tokens_per_s": batch / tpot_s}
            row |= {"tpot_s_q1": 0.9 * tpot_s, "tpot_s_q3": 1.2 * tpot_s, "preset": "tiny", "depth": 1024}
            row |= {"machine": "test", "code": "c0ffee", "accelerator_threads": 1 if emulated else None}
            row |= {"attention_busy_s": 0.03, "experts_busy_s": 0.04, "bound_s": 0.05, "hand_offs_s": 0.001}
            row |= {"fraction": 0.05 / tpot_s, "times_plain": TPOT_S["plain batch"][batch] / tpot_s}
            rows.append(row | {"evidence": "emulated" if emulated else "measured"} | changes)
    return pd.DataFrame(rows)


def lines(ax: Any, label: str) -> list[Any]:
    return [one for one in ax.get_lines() if one.get_label() == label]


def test_a_line_a_variant_and_a_grey_one_a_batch(legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = decode_tradeoff(make_rows().sample(frac=1.0, random_state=1))
    for variant in ("plain batch", "dual batch"):
        (line,) = lines(ax, variant)
        assert list(line.get_xdata()) == list(TPOT_S[variant].values())
        assert list(line.get_ydata()) == [batch / tpot_s for batch, tpot_s in TPOT_S[variant].items()]
    products = [one.get_xdata() * one.get_ydata() for one in lines(ax, "_batch")]
    assert sorted(round(float(value), 9) for pair in products for value in pair) == [1, 1, 2, 2, 4, 4]
    named = {text.get_text(): text.xy[0] for text in ax.texts}
    assert named == {"batch 1": 0.05, "batch 2": 0.08, "batch 4": 0.125}  # beside the slowest one
    assert set(legend_texts(ax)) == {"plain batch", "dual batch", "emulated", "quartiles of the steps"}
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == "TPOT (s)"


def test_quartiles_lie_on_the_line_of_their_batch() -> None:
    ax: Any = decode_tradeoff(make_rows("dual batch"))
    spans = {tuple(one.get_xdata()): tuple(one.get_ydata()) for one in lines(ax, "_quartiles")}
    assert list(spans) == [(0.9 * tpot_s, 1.2 * tpot_s) for tpot_s in TPOT_S["dual batch"].values()]
    for (low, high), batch in zip(spans, TPOT_S["dual batch"], strict=True):
        assert spans[low, high] == (batch / low, batch / high)


def test_the_cpu_beside_an_emulated_device_is_drawn_if_asked_for() -> None:
    rows = make_rows(*TPOT_S)
    with pytest.raises(ConfigError, match=r"evidence=\['emulated', 'measured'\]"):
        decode_tradeoff(rows)
    ax = decode_tradeoff(rows, evidence=["emulated", "measured"])
    assert len([one for name in TPOT_S for one in lines(ax, name)]) == 3
    only = decode_tradeoff(rows, evidence="measured")
    assert lines(only, "plain batch") == [] and len(lines(only, "device cpu")) == 1
    assert lines(only, "device cpu")[0].get_color() == lines(ax, "device cpu")[0].get_color()


@pytest.mark.parametrize("column", ["preset", "depth", "machine", "code"])
def test_rows_of_two_settings_are_no_line(column: str) -> None:
    rows: Any = pd.concat([make_rows(), make_rows(**{column: 7})], ignore_index=True)
    with pytest.raises(ConfigError, match=rf"decode_tradeoff: rows differ in '{column}'.*where={{'{column}'"):
        decode_tradeoff(rows)
    ax = decode_tradeoff(rows, where={column: 7})
    assert len(lines(ax, "dual batch")[0].get_xdata()) == 2


def test_a_point_that_is_there_twice_is_told() -> None:
    twice: Any = pd.concat([make_rows(), make_rows("dual batch")], ignore_index=True)
    with pytest.raises(ConfigError, match=r"'dual batch' \(emulated\) is there twice at batch 2"):
        decode_tradeoff(twice)


@pytest.mark.parametrize("missing", ["variant", "batch", "tpot_s", "tpot_s_q1", "tokens_per_s", "evidence"])
def test_a_missing_column_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"no column '{missing}'"):
        decode_tradeoff(make_rows().drop(columns=missing))


@pytest.mark.parametrize("width_in", [ONE_COLUMN_IN, 7.0])
def test_names_of_batches_lie_inside_the_figure(width_in: float) -> None:
    ax: Any = decode_tradeoff(make_rows(), width_in=width_in)
    ax.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(name) for name in ax.texts]
    assert max(box.x1 for box in boxes) <= ax.figure.bbox.x1 and min(box.y0 for box in boxes) >= 0


def test_what_was_drawn_goes_into_the_files(tmp_path: Path) -> None:
    paths = save_figure(decode_tradeoff(make_rows()), tmp_path / "tradeoff", command="test")
    assert json.loads(paths[".json"].read_text(encoding="utf-8"))["machine"] == ["test"]


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows.to_json(orient="records", lines=True), encoding="utf-8")


def test_all_files_of_a_folder_are_read(tmp_path: Path) -> None:
    write(tmp_path / "decode.jsonl", make_rows("dual batch"))
    write(tmp_path / "gpu/decode_h100.jsonl", make_rows("plain batch", machine="H100"))
    write(tmp_path / "handoff.jsonl", pd.DataFrame([{"way": "kernels"}]))
    rows = read_decode(tmp_path)
    assert list(rows.groupby("file").size().items()) == [("decode.jsonl", 2), ("gpu/decode_h100.jsonl", 3)]
    assert list(rows.loc[rows["machine"] == "H100", "tpot_s"]) == list(TPOT_S["plain batch"].values())


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    write(tmp_path / "decode.jsonl", make_rows().drop(columns="batch"))
    with pytest.raises(ConfigError, match="no column 'batch'"):
        read_decode(tmp_path)
    (tmp_path / "decode.jsonl").write_text('{"variant": ', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"decode\.jsonl: cannot be read"):
        read_decode(tmp_path)


def test_where_nothing_was_measured_there_are_no_rows(tmp_path: Path) -> None:
    rows = read_decode(tmp_path / "none")
    assert len(rows) == len(decode_table(rows)) == 0
    assert {"machine", "device", "file", "variant"} <= set(rows.columns)
    with pytest.raises(ConfigError, match="no rows to draw"):
        decode_tradeoff(rows)


def test_table_puts_each_dual_batch_beside_what_it_is_held_against() -> None:
    deeper = make_rows("plain batch", "dual batch", depth=4096)
    deeper = deeper[deeper["batch"] > 1].assign(tpot_s=lambda rows: 2 * rows["tpot_s"])
    table: Any = decode_table(pd.concat([make_rows(*TPOT_S), deeper], ignore_index=True))
    assert list(zip(table["depth"], table["batch"], strict=True)) == [(1024, 2), (1024, 4), (4096, 2), (4096, 4)]
    assert list(table["dual_s"]) == [0.0625, 0.1, 0.125, 0.2]
    assert list(table["plain_s"]) == [0.08, 0.125, 0.16, 0.25]
    assert list(table["gain"]) == [0.08 / 0.0625, 0.125 / 0.1] * 2
    assert list(table["alone_s"][:2]) == [0.05, 0.05] and table["alone_s"][2:].isna().all()
    assert list(table["cpu_s"][:2]) == [0.0625, 0.1] and table["cpu_s"][2:].isna().all()
    assert list(table["fraction"][:2]) == [0.05 / 0.0625, 0.05 / 0.1]
    assert set(table["attention_s"]) == {0.03} and set(table["experts_s"]) == {0.04}


def test_variants_are_called_as_the_benchmark_calls_them() -> None:
    named = (bench_decode_devices.PLAIN, bench_decode_devices.DUAL, bench_decode_devices.CPU)
    assert (PLAIN, DUAL, CPU) == named == tuple(TPOT_S)
    assert set(make_rows(*TPOT_S).columns) <= set(bench_decode_devices.COLUMNS)
