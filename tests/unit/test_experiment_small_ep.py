"""experiments/small_ep/emulated.py on a small checkpoint: it runs, and counts what the formulas say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "data" / "oracles" / "qwen3_bf16"


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_ep", ROOT / "experiments" / "small_ep" / "emulated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bytes_are_those_of_the_formulas(emulated):
    rows = emulated.bytes_rows(ORACLE, 40, 3)
    sent = {row["exchange"]: row["sent_bytes"] for row in rows}
    assert sent == {row["exchange"]: row["formula_bytes"] for row in rows}
    # Three ranks and top-2: a dispatch moves less than SmallEP, and least where tokens go once to a rank.
    assert sent["small_ep"] == 2 * 40 * 64 * 8 * 2  # two MoE layers
    assert all(row["uniform_bytes"] == pytest.approx(row["sent_bytes"], rel=0.3) for row in rows)


def test_one_rank_and_two_are_timed_in_turns(emulated):
    rows = emulated.dslp_rows(ORACLE, 40, 4.0, 1)
    assert [row["ranks"] for row in rows] == [1, 2, 2, 2]
    assert all(row["step_s"] >= 0.8 * row["load_s"] > 0 for row in rows)
    assert rows[0]["exchange_s"] == 0 and all(row["exchange_s"] > 0 for row in rows[1:])
    assert {row["evidence"] for row in rows} == {"emulated"}
