from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from hybridlab.checkpoint.presets import preset_spec
from hybridlab.checkpoint.schema import expected_tensors
from hybridlab.config import load_config
from hybridlab.prediction import (
    Load,
    ModelCost,
    Rates,
    busy_of,
    calibrated,
    estimated_rates,
    load_of,
    predict,
)
from hybridlab.workload.base import Row

SPEC = preset_spec("tiny")
MODEL = ModelCost(SPEC, sum(tensor.num_bytes for tensor in expected_tensors(SPEC)))
RATES = Rates(read_gb_s=10.0, prefill_gflop_s=100.0)


def load_rows_as(rows: list[Row], *, prefix_cache: bool = True, **keys: Any) -> Load:
    workload = {"kind": "offline", "num_requests": len(rows), "prompt_tokens": 1, "output_tokens": 1, **keys}
    config = load_config({"experiment": "q", "model": {"preset": "tiny"}, "workload": workload})
    return load_of(config.workload, rows, prefix_cache=prefix_cache)


def test_lengths_are_those_that_are_served() -> None:
    load = load_rows_as([Row(0.0, 100, 50), Row(4.0, 10, 7)], length_scale=10.0, max_output_tokens=3)
    assert (load.prompt_tokens, load.output_tokens, load.concurrency) == (11, 4, 2)
    assert (load.earliest_s, load.last_prompt_tokens, load.last_output_tokens) == (4.0, 1, 1)
    assert not load.is_closed


def test_turns_and_shared_blocks_are_computed_once_with_a_prefix_cache() -> None:
    turns = [Row(1.0, 10, 5), Row(2.0, 20, 5, after=0, continues=True)]
    assert load_rows_as(turns).prompt_tokens == 30
    assert load_rows_as(turns, prefix_cache=False).prompt_tokens == 10 + (10 + 5 + 20)
    assert load_rows_as(turns).earliest_s == 3.0 and load_rows_as(turns).is_closed
    shared = [
        Row(0.0, 40, 5, blocks=(1, 2), block_tokens=16),
        Row(0.0, 40, 5, blocks=(1, 2), block_tokens=16),
        Row(0.0, 40, 5, blocks=(1, 3), block_tokens=16),
        Row(0.0, 32, 5, blocks=(1, 2), block_tokens=16),
    ]
    assert load_rows_as(shared).prompt_tokens == 40 + 8 + 24 + 1  # the last token is always computed
    assert load_rows_as(shared, prefix_cache=False).prompt_tokens == 152


def test_a_decode_step_reads_every_expert_at_most_once() -> None:
    one, many = MODEL.step_bytes(1, 0), MODEL.step_bytes(10**6, 0)
    experts = len(SPEC.moe_layers) * SPEC.expert_bytes
    assert many - one == pytest.approx(experts * (SPEC.num_experts - SPEC.top_k))
    embedding = 2 * SPEC.vocab * SPEC.hidden
    assert many == pytest.approx(MODEL.weight_bytes - embedding)
    assert MODEL.step_bytes(1, 100) - one == pytest.approx(100 * SPEC.kv_elements_per_token * 2)


def test_the_larger_of_arrivals_and_work() -> None:
    burst = load_rows_as([Row(0.0, 1000, 100)] * 8)
    spread = load_rows_as([Row(100.0 * i, 1000, 100) for i in range(8)])
    busy = predict(burst, MODEL, RATES, kv_tokens=10**6)
    assert busy.arrival_span_s == 0.0 and busy.predicted_s == busy.work_s > 0
    idle = predict(spread, MODEL, RATES, kv_tokens=10**6)
    assert idle.work_s == busy.work_s and 700 < idle.predicted_s < 701
    # A cache that holds one request at a time decodes them one after the other.
    narrow = predict(burst, MODEL, RATES, kv_tokens=1100)
    assert narrow.work_s > 2 * busy.work_s


def table(*requests: tuple[float, float, float, int, int, int]) -> pd.DataFrame:
    names = ["first_scheduled_s", "first_token_s", "finished_s", "prompt_tokens", "cached_tokens", "output_tokens"]
    return pd.DataFrame([dict(zip(names, request, strict=True)) for request in requests])


def test_busy_time_leaves_idle_time_out() -> None:
    nan = math.nan
    found = busy_of(
        table(
            (0.0, 1.0, 3.0, 10, 4, 5),
            (2.0, 2.5, 4.0, 20, 0, 5),
            (10.0, 10.5, 11.0, 30, 0, 10),
            (nan, nan, nan, 99, 0, 0),  # rejected
        )
    )
    assert found is not None
    assert (found.busy_s, found.prompt_tokens, found.output_tokens) == (5.0, 56, 20)
    assert found.batch == pytest.approx((2.0 + 1.5 + 0.5) / (3.0 + 0.5))
    assert busy_of(table((nan, nan, nan, 9, 0, 0))) is None


def test_stored_runs_scale_the_estimate() -> None:
    runs = [table((0.0, 1.0, 3.0, 100, 0, 5)), table((math.nan, math.nan, math.nan, 1, 0, 0))]
    rates = calibrated(RATES, MODEL, runs)
    assert rates.source == "from 1 stored run"
    context = 100 + 5 / 2
    assert rates.work_s(MODEL, 100, 5, 1, context) == pytest.approx(3.0)
    assert calibrated(RATES, MODEL, runs[1:]) == RATES and RATES.source == "estimated"


def test_estimates_know_tier_cores_and_precision() -> None:
    base = estimated_rates(10.0, "avx2", 4, "bf16")
    assert estimated_rates(10.0, "avx2", 8, "bf16").prefill_gflop_s == 2 * base.prefill_gflop_s
    assert estimated_rates(10.0, "numpy", 4, "bf16").prefill_gflop_s < base.prefill_gflop_s
    assert estimated_rates(10.0, "a new one", 4, "bf16").prefill_gflop_s < base.prefill_gflop_s
    exact = estimated_rates(10.0, "avx2", 4, "exact")
    assert exact.work_s(MODEL, 100, 100, 1, 50) > 5 * base.work_s(MODEL, 100, 100, 1, 50)
