"""Golden cases against the definitions of `vllm bench serve`."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab.errors import ConfigError
from hybridlab.metrics import DEFINITIONS, SLO, SLO_PRESETS, requests_frame, summarise
from hybridlab.request import Request, RequestRecord, Status


def record(
    name: str,
    times: list[float],
    *,
    arrival_s: float = 0.0,
    prompt: int = 10,
    status: Status = Status.FINISHED,
    scheduled_s: float | None = 0.5,
) -> RequestRecord:
    request = Request(name, tuple(range(prompt)), max_tokens=max(1, len(times)), arrival_s=arrival_s)
    return RequestRecord(request, status, [1] * len(times), times, scheduled_s, times[-1] if times else None)


def test_one_request_by_hand() -> None:
    got = summarise([record("a", [2.0, 2.5, 2.5, 4.0], arrival_s=1.0)], duration_s=4.0)
    assert got["median_ttft_s"] == 1.0
    assert got["mean_e2el_s"] == 3.0
    assert got["mean_tpot_s"] == pytest.approx((3.0 - 1.0) / 3)
    assert got["mean_itl_s"] == pytest.approx((0.5 + 0.0 + 1.5) / 3)  # the zero gap counts
    assert got["median_itl_s"] == 0.5
    assert got["median_queue_s"] == -0.5
    assert got["output_tokens_per_s"] == 1.0
    assert got["total_tokens_per_s"] == 14 / 4
    assert got["request_throughput_req_s"] == 0.25
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (10, 4)


def test_one_output_token_has_ttft_but_no_tpot_nor_gap() -> None:
    got = summarise([record("a", [2.0])], duration_s=2.0)
    assert got["median_ttft_s"] == got["median_e2el_s"] == 2.0
    assert math.isnan(got["mean_tpot_s"]) and math.isnan(got["p99_itl_s"])
    # and meets any TPOT, as in vllm bench serve
    assert summarise([record("a", [2.0])], 2.0, SLO(ttft_s=2.0, tpot_s=1e-9))["request_goodput_req_s"] == 0.5


def test_one_token_prompts() -> None:
    got = summarise([record("a", [1.0, 2.0], prompt=1)], duration_s=2.0)
    assert (got["total_input_tokens"], got["total_tokens_per_s"]) == (1, 1.5)


def test_only_finished_requests_count() -> None:
    good = record("a", [1.0, 2.0])
    others = [
        record("b", [9.0, 10.0], status=Status.FAILED),
        record("c", [], status=Status.REJECTED, scheduled_s=None),
        record("d", [7.0], status=Status.CANCELLED),
        record("e", [], status=Status.CANCELLED, scheduled_s=None),
    ]
    alone, together = summarise([good], 10.0), summarise([good, *others], 10.0)
    same = [key for key in alone if key not in ("num_requests", "failed", "rejected", "cancelled")]
    for key in same:
        assert together[key] == alone[key] or (together[key] != together[key] and alone[key] != alone[key]), key
    assert [together[k] for k in ("num_requests", "completed", "failed", "rejected", "cancelled")] == [
        5,
        1,
        1,
        1,
        2,
    ]


def test_percentiles_interpolate_linearly() -> None:
    ttfts = [0.1 * i for i in range(1, 11)]
    got = summarise([record(f"r{i}", [t]) for i, t in enumerate(ttfts)], 1.0)
    assert got["p90_ttft_s"] == pytest.approx(np.percentile(ttfts, 90))
    assert got["p99_ttft_s"] == pytest.approx(0.991)
    assert got["median_ttft_s"] == pytest.approx(0.55)


def test_goodput_needs_both_limits_and_includes_them() -> None:
    records = [
        record("meets", [1.0, 1.5]),
        record("late", [1.1, 1.2]),
        record("slow", [0.5, 1.1]),
        record("failed", [0.1, 0.2], status=Status.FAILED),
    ]
    got = summarise(records, 2.0, SLO(name="mine", ttft_s=1.0, tpot_s=0.5))
    assert got["request_goodput_req_s"] == 0.5
    assert (got["slo"], got["slo_ttft_s"], got["slo_tpot_s"]) == ("mine", 1.0, 0.5)


def test_presets() -> None:
    limits = {name: (slo.ttft_s, slo.tpot_s) for name, slo in SLO_PRESETS.items()}
    assert limits == {
        "paper": (30, 0.05),
        "mlperf-r1-server": (2, 0.08),
        "mlperf-r1-interactive": (1.5, 0.015),
    }
    with pytest.raises(ConfigError, match="slo: unknown preset 'mlperf'"):
        summarise([], 1.0, "mlperf")


def test_nothing_to_count() -> None:
    for records, duration in (([], 0.0), ([record("a", [], status=Status.REJECTED)], 0.0)):
        got = summarise(records, duration)
        assert got["completed"] == 0
        assert math.isnan(got["median_ttft_s"]) and math.isnan(got["output_tokens_per_s"])


def test_offered_rate() -> None:
    records = [record(str(i), [9.0], arrival_s=t) for i, t in enumerate((1.0, 2.0, 5.0))]
    assert summarise(records, 9.0)["offered_req_s"] == 0.5
    assert math.isnan(summarise(records[:1], 9.0)["offered_req_s"])


def served(arrivals, latencies) -> list[RequestRecord]:
    times = zip(map(float, arrivals), latencies, strict=True)
    return [record(f"r{i}", [at + took], arrival_s=at) for i, (at, took) in enumerate(times)]


@pytest.mark.parametrize(
    ("arrivals", "latencies", "saturated"),
    [
        (range(100), [3.0] * 100, False),
        (range(100), [300.0] * 100, False),  # longer than all arrivals take: slow, but as many end as come
        (range(100), [0.5 * i for i in range(100)], True),  # two of three complete in the time in which they arrive
        (range(100), [0.05 * i for i in range(100)], False),  # 5% more than completes: could be chance
        ([0.0] * 100, range(100), False),  # nothing is offered over time
        ([0.0, 1.0, 2.0], [0.0, 0.5, 1.0], False),  # three say nothing
        ([7.0], [1.0], False),
    ],
)
def test_more_offered_than_completed_is_saturation(arrivals, latencies, saturated) -> None:
    assert summarise(served(arrivals, latencies), 200.0)["saturated"] is saturated


def test_requests_that_run_into_their_deadline_do_not_hide_saturation() -> None:
    records = served(range(100), [3.0] * 100)
    for record in records[::2]:
        record.status = Status.CANCELLED
    assert summarise(records, 200.0)["saturated"] is True
    for record in records[::2]:
        record.status = Status.REJECTED  # never let in: no load
    assert summarise(records, 200.0)["saturated"] is False


def test_frame_and_records_summarise_alike() -> None:
    records = [record("a", [1.0, 2.0]), record("b", [], status=Status.REJECTED, scheduled_s=None)]
    frame = requests_frame(records)
    assert frame["request_id"].tolist() == ["a", "b"]
    assert frame["output_tokens"].tolist() == [2, 0]
    assert frame["ttft_s"].isna().tolist() == [False, True]
    assert str(summarise(frame, 2.0)) == str(summarise(records, 2.0))
    assert requests_frame([]).empty


def test_every_unit_is_in_a_name() -> None:
    counts = {"num_requests", "completed", "failed", "rejected", "cancelled", "slo", "prefix_hit_rate", "saturated"}
    for key in summarise([record("a", [1.0, 2.0])], 1.0):
        assert key in counts or key.endswith(("_s", "_tokens")), key
    assert {"ttft_s", "tpot_s", "itl_s", "e2el_s"} <= set(DEFINITIONS)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 5),  # arrival
            st.lists(st.sampled_from([0.0, 0.01, 0.25, 1.0]), max_size=6),  # gaps before each token
            st.integers(1, 30),  # prompt tokens
            st.sampled_from([Status.FINISHED] * 3 + [Status.FAILED, Status.REJECTED, Status.CANCELLED]),
        ),
        max_size=8,
    )
)
def test_a_plain_loop_by_the_definitions_of_vllm_bench_serve_agrees(rows: list) -> None:
    """Its calculate_metrics: successful requests only; no TPOT for one token, which counts as 0 for goodput."""
    records, slo = [], SLO(ttft_s=0.5, tpot_s=0.1)
    ttfts, tpots, itls, e2els, good, inputs, outputs = [], [], [], [], 0, 0, 0
    for index, (arrival_s, gaps, prompt, status) in enumerate(rows):
        gaps = gaps if gaps or status is not Status.FINISHED else [0.25]
        times = [arrival_s + sum(gaps[: i + 1]) for i in range(len(gaps))]
        records.append(record(f"r{index}", times, arrival_s=arrival_s, prompt=prompt, status=status))
        if status is not Status.FINISHED:
            continue
        ttft, latency = times[0] - arrival_s, times[-1] - arrival_s
        tpot = (latency - ttft) / (len(times) - 1) if len(times) > 1 else 0.0
        ttfts.append(ttft)
        e2els.append(latency)
        tpots += [tpot] if len(times) > 1 else []
        itls += [after - before for before, after in pairwise(times)]
        good += ttft <= slo.ttft_s and tpot <= slo.tpot_s
        inputs, outputs = inputs + prompt, outputs + len(times)
    got = summarise(records, 12.5, slo)
    assert got["completed"] == len(ttfts)
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (inputs, outputs)
    assert got["request_throughput_req_s"] == len(ttfts) / 12.5 and got["output_tokens_per_s"] == outputs / 12.5
    assert got["total_tokens_per_s"] == (inputs + outputs) / 12.5 and got["request_goodput_req_s"] == good / 12.5
    for name, values in (("ttft_s", ttfts), ("tpot_s", tpots), ("itl_s", itls), ("e2el_s", e2els)):
        for kind, reduce in (("mean", np.mean), ("median", np.median), ("p99", lambda v: np.percentile(v, 99))):
            expected = reduce(values) if values else math.nan
            assert got[f"{kind}_{name}"] == pytest.approx(expected, nan_ok=True)


def test_prompt_tokens_found_in_the_cache_are_counted_for_finished_requests() -> None:
    found, lost = record("a", [1.0], prompt=30), record("b", [], prompt=30, status=Status.FAILED)
    found.cached_tokens = lost.cached_tokens = 16
    got = summarise([found, lost, record("c", [2.0], prompt=10)], 2.0)
    assert (got["cached_prompt_tokens"], got["prefix_hit_rate"]) == (16, 16 / 40)


def test_a_turn_that_never_came_has_no_arrival() -> None:
    turn = RequestRecord(Request("b", (1,), 1, 3.0, after="a", continues=True), Status.REJECTED)
    frame = requests_frame([record("a", [1.0]), turn])
    assert frame["arrival_s"].isna().tolist() == [False, True]
    assert math.isnan(summarise(frame, 1.0)["offered_req_s"])
