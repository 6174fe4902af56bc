"""experiments/small_ep on a small checkpoint: it runs, and counts what the formulas say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hybridlab.bench.dslp import ONE, dslp
from hybridlab.bench.exchange import exchange_bytes, rank_steps
from hybridlab.errors import ConfigError
from hybridlab.plans import EXCHANGES

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "data" / "oracles" / "qwen3_bf16"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"small_ep_{name}", ROOT / "experiments" / "small_ep" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def counted() -> Any:
    return exchange_bytes(ORACLE, tokens=40, ranks=[2, 3, 4, 8])


def test_threads_count_what_the_formulas_say(counted: Any) -> None:
    assert list(counted["exchange"]) == list(EXCHANGES) * 4
    assert list(counted["sent_bytes"]) == list(counted["formula_bytes"])
    small = counted[counted["exchange"] == "small_ep"]
    # Two MoE layers, hidden 64, float32 both ways.
    assert list(small["sent_bytes"]) == [(n - 1) * 40 * 64 * 8 * 2 for n in (2, 3, 4, 8)]
    assert list(small["router_tokens"]) == [40 * n for n in (2, 3, 4, 8)]
    assert set(counted[counted["exchange"] != "small_ep"]["router_tokens"]) == {40}


def test_processes_move_what_threads_move(counted: Any) -> None:
    """An engine of three ranks that computes the prompt, against ranks that only exchange."""
    rows = rank_steps(ORACLE, 3, tokens=40, repeats=1)
    three = counted[counted["ranks"] == 3]
    for column in ("exchange", "sent_bytes", "formula_bytes", "uniform_bytes", "router_tokens"):
        assert [row[column] for row in rows] == list(three[column])
    # Three ranks and top-2: a dispatch moves less than SmallEP, and least where tokens go once to a rank.
    assert all(row["uniform_bytes"] == pytest.approx(row["sent_bytes"], rel=0.3) for row in rows)
    assert all(row["step_s"] > row["exchange_s"] > 0 and row["router_s"] > 0 for row in rows)


def test_one_rank_exchanges_nothing() -> None:
    with pytest.raises(ConfigError, match=r"ranks is \[1\], expected ints >= 2"):
        exchange_bytes(ORACLE, ranks=[1])


def test_one_rank_and_two_are_timed_in_turns() -> None:
    found = dslp(ORACLE, tokens=40, ratio=4.0, repeats=1)
    rows = found.rows.to_dict("records")
    assert [row["ranks"] for row in rows] == [1, 2, 2, 2]
    assert all(row["step_s_max"] >= row["step_s"] >= row["step_s_min"] > 0 and row["load_s"] > 0 for row in rows)
    assert rows[0]["exchange_s"] == 0 and all(row["exchange_s"] > 0 for row in rows[1:])
    assert {row["evidence"] for row in rows} == {"emulated"}
    spans: Any = found.spans.groupby("system", sort=False)["lane"].unique()
    assert list(spans.index) == [ONE, *(f"two ranks, {name}" for name in EXCHANGES)]
    assert {f"rank {rank}/{kind}" for rank in (0, 1) for kind in ("gpu", "h2d", "net")} <= set(spans.iloc[1])


def test_scripts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--preset", "tiny", "--layers", "2", "--tokens", "32", "--repeats", "1", "--sizes", "2"]
    monkeypatch.setattr(sys, "argv", ["emulated.py", str(tmp_path), *sizes])
    script("emulated").main()
    assert len((tmp_path / "dslp.jsonl").read_text().splitlines()) == 4
    rows = [json.loads(line) for line in (tmp_path / "bytes.jsonl").read_text().splitlines()]
    assert [row["exchange"] for row in rows] == list(EXCHANGES)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["analysis.py", str(tmp_path), "--figures"])
    script("analysis").main()
    shown = capsys.readouterr().out
    assert "two ranks, dispatch_per_rank" in shown and shown.count("True") == 3
    assert (tmp_path / "bytes.png").is_file() and (tmp_path / "dslp.png").is_file()
