"""experiments/small_ep/gpu.py on a small checkpoint and without a GPU: rows as they are made, bytes by the formulas."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "data" / "oracles" / "qwen3_bf16"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_ep_gpu", ROOT / "experiments" / "small_ep" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_say_what_crossed_links_and_what_was_exchanged(script, tmp_path):
    script.main([
        *(str(tmp_path), "--checkpoint", str(ORACLE), "--device", "emulated", "--tokens", "40,24", "--steps", "1"),
        *("--exchanges", "small_ep,dispatch_per_rank"),
    ])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "dslp_gpu.jsonl").read_text().splitlines()]
    assert all(set(row) == set(script.COLUMNS) and row["code"] and row["machine"] for row in rows)
    found = [(row["system"], row["exchange"], row["tokens"]) for row in rows]
    pairs = [("DSLP", name, tokens) for tokens in (40, 24) for name in ("small_ep", "dispatch_per_rank")]
    assert found == [("SLP", "", 40), ("SLP", "", 24), *pairs]
    alone, both = rows[:2], rows[2:]
    for row in both:
        slp = next(each for each in alone if each["tokens"] == row["tokens"])
        # Half of the experts cross each link.
        assert sum(row["load_bytes_per_rank"]) == slp["load_bytes_per_rank"][0] > 0
        assert len(set(row["load_bytes_per_rank"])) == 1
        assert row["over_one_rank"] == slp["ttft_s"] / row["ttft_s"] and row["same_token"] is True
        assert row["kv_sent_bytes"] == row["kv_formula_bytes"]
        if row["exchange"] == "small_ep":
            assert row["experts_sent_bytes"] == row["experts_formula_bytes"]
        else:
            assert row["experts_formula_bytes"] is None and sum(row["experts_sent_bytes"]) > 0
        assert (row["transport"], row["evidence"]) == ("sockets", "emulated")
        assert row["tokens_per_s"] == row["tokens"] / row["ttft_s"] and row["link_gb_s_per_rank"] > 0


def test_it_is_said_what_ranks_exchange_through(script, monkeypatch):
    for gpus, ranks, expected in ((2, 1, ""), (2, 2, "NCCL"), (1, 2, "sharing GPUs")):
        monkeypatch.setattr(script, "detect_gpus", lambda gpus=gpus: (None,) * gpus)
        assert expected in script.transport("cuda", ranks)
