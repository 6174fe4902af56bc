"""A long prompt beside decodes: tables, the claim, what is read and what is drawn; no number here was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from hybridlab.bench import interference as bench_interference
from hybridlab.errors import ConfigError
from hybridlab.figures import (
    ONE_COLUMN_IN,
    claim_table,
    interference,
    interference_table,
    read_interference,
    save_figure,
)
from hybridlab.figures.interference import SPLIT, WHOLE

CHUNKS = "one worker, chunks"
GAP_S = {WHOLE: 2.0, CHUNKS: 0.2, SPLIT: 0.03}
"""p99 while the prompt is computed; alone it is 0.02 on each."""
TOKENS_PER_S = {WHOLE: 40.0, CHUNKS: 50.0, SPLIT: 60.0}


def make_rows(**changes: Any) -> Any:
    rows = []
    for system in bench_interference.SYSTEMS:
        for load in (0, 1, 2):
            for mode in ("alone", "mixed") if load else ("alone",):
                row: dict[str, Any] = {"system": system, "num_decodes": load, "mode": mode, "repeat": 0}
                row |= {"output_tokens_per_s": TOKENS_PER_S[system] * max(load, 1), "total_tokens_per_s": 900.0}
                if load:
                    row |= {f"p{p}_itl_s": 0.02 * p / 99 for p in (50, 90, 99)}
                    row |= {"p50_tpot_s": 0.01 if mode == "alone" else 0.011, "p99_tpot_s": 0.02}
                if mode == "mixed":
                    row |= {f"p{p}_window_itl_s": GAP_S[system] * p / 99 for p in (50, 90, 99)}
                if mode == "mixed" or not load:
                    row["long_ttft_s"] = 5.0 if mode == "mixed" else 4.0
                rows.append(
                    row | {"preset": "tiny", "evidence": "measured", "machine": "test", "code": "c0ffee"} | changes
                )
    return pd.DataFrame(rows)


def test_names_are_those_of_the_benchmark() -> None:
    assert (bench_interference.WHOLE, bench_interference.SPLIT) == (WHOLE, SPLIT)


def test_table_has_alone_beside_mixed() -> None:
    found = interference_table(make_rows()).set_index(["system", "num_decodes"])
    assert list(found.index) == [(system, load) for system in GAP_S for load in (1, 2)]
    row = found.loc[(CHUNKS, 2)]
    assert (row["TTFT alone"], row["TTFT mixed"]) == (4.0, 5.0)
    assert row["ITL p99 alone"] == pytest.approx(20) and row["ITL p99 mixed"] == pytest.approx(200)
    assert row["p99 x"] == pytest.approx(10) and row["TPOT x"] == pytest.approx(1.0)
    assert row["tokens/s x"] == pytest.approx(50 / 40)


def test_the_claim_is_of_the_same_runs() -> None:
    claim = claim_table(make_rows())
    assert list(claim["num_decodes"]) == [1, 2]
    row = claim.iloc[0]
    assert row["tokens/s over whole prompts"] == pytest.approx(50)
    assert row["tokens/s over the best of one worker"] == pytest.approx(20)
    assert row["p50 TPOT"] == pytest.approx(10) and row["p99 TPOT"] == pytest.approx(0)
    assert row["p99 ITL beside the prompt"] == pytest.approx(50) and row["TTFT"] == pytest.approx(25)
    rows = make_rows()
    with pytest.raises(ConfigError, match="a worker for each"):
        claim_table(rows[rows["system"] != SPLIT])


def test_medians_over_repeats() -> None:
    slower = make_rows(repeat=1)
    slower["p99_window_itl_s"] *= 3
    both: Any = pd.concat([make_rows(), slower])
    assert interference_table(both)["p99 x"].iloc[0] == pytest.approx(2 * 100)


@pytest.mark.parametrize("width_in", [ONE_COLUMN_IN, 7.0])
def test_a_bar_alone_and_one_beside_the_prompt(width_in: float, legend_texts: Callable[[Any], list[str]]) -> None:
    ax: Any = interference(make_rows(), width_in=width_in)
    bars = [line for line in ax.get_lines() if len(line.get_xdata()) == 2]
    assert len(bars) == 2 * len(GAP_S) * 2
    ends = [line.get_xdata()[1] for line in bars]
    assert ends[0] == pytest.approx(20) and ends[1] == pytest.approx(2000) and ends[-1] == pytest.approx(30)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1 decode", "2 decodes"] * 3
    assert legend_texts(ax) == [*GAP_S, "decodes alone", "p50", "p90", "p99", "measured"]
    colors = {to_rgba(line.get_color()) for line in bars}
    assert len(colors) == 4  # a grey and one of each system
    ax.figure.draw_without_rendering()
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "ITL (ms)"


def test_kinds_settings_and_missing_rows_are_one_line() -> None:
    emulated = make_rows(evidence="emulated")
    both: Any = pd.concat([make_rows(), emulated])
    with pytest.raises(ConfigError, match="evidence="):
        interference(both)
    ax: Any = interference(both, evidence=["measured", "emulated"])
    assert [text.get_text() for text in ax.get_yticklabels()][:2] == ["1 decode, measured", "1 decode, emulated"]
    other: Any = pd.concat([make_rows(), make_rows(preset="large")])
    with pytest.raises(ConfigError, match="rows differ in 'preset'"):
        interference_table(other)
    with pytest.raises(ConfigError, match="no rows of mode 'mixed'"):
        interference(make_rows()[make_rows()["mode"] == "alone"])
    with pytest.raises(ConfigError, match="no column 'p90_itl_s'"):
        interference(make_rows().drop(columns="p90_itl_s"))
    with pytest.raises(ConfigError, match="ax: expected Axes"):
        interference(make_rows(), ax=3)  # type: ignore[arg-type]


def test_rows_are_read_with_their_origin(tmp_path: Path) -> None:
    lines = [json.dumps({k: v for k, v in row.items() if v == v}) for row in make_rows().to_dict("records")]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    read = read_interference(tmp_path)
    pd.testing.assert_frame_equal(interference_table(read), interference_table(make_rows()))
    sidecar = json.loads(save_figure(interference(read), tmp_path / "x", command="c")[".json"].read_text())
    assert (sidecar["machine"], sidecar["code"], sidecar["evidence"]) == (["test"], ["c0ffee"], ["measured"])


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ('{"system": "x"}', "damaged .no column")])
def test_damaged_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mixed.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_interference(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_interference(tmp_path / "none")
