"""The request queue and KV block accounting under any schedule."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab.batch import StepResult
from hybridlab.errors import RequestError, StrategyError
from hybridlab.kv_blocks import BlockPool
from hybridlab.plans import StepPlan
from hybridlab.request import Request, Sampling, Status
from hybridlab.request_queue import RequestQueue
from hybridlab.strategies.checks import TOY_MODEL
from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill
from hybridlab.strategies.scheduler.fcfs import FCFS

MODEL = dataclasses.replace(TOY_MODEL, eos_token_ids=(7,))


def drain(queue, scheduler, draw=lambda entry: 1):
    """A backend without a model: token drawn by `draw`, 1 s a step."""
    now_s, events = 0.0, []
    while queue.live:
        queue.sweep(now_s)
        view = queue.view("main", now_s)
        step = scheduler.schedule(view)
        now_s += 1.0
        if step is None:
            continue
        assert step.num_tokens <= view.token_budget
        batch = queue.start(view, step, "test")
        tokens = {entry.id: draw(entry) for entry in batch.entries if entry.wants_token}
        events += queue.apply([StepResult(batch, now_s - 1, now_s, tokens)])
    return events


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=8),
    scheduler=st.sampled_from([FCFS(), FCFS(5), ChunkedPrefill(1), ChunkedPrefill(16)]),
    num_blocks=st.integers(5, 30),
    budget=st.integers(1, 64),
)
def test_every_request_ends_once_and_all_blocks_return(sizes, scheduler, num_blocks, budget):
    pool = BlockPool(num_blocks, 16)
    requests = [Request(str(i), (3,) * prompt, output, float(i % 3)) for i, (prompt, output) in enumerate(sizes)]
    queue = RequestQueue(requests, pool, MODEL, budget)
    drain(queue, scheduler)
    for request in requests:
        record = queue.records[request.id]
        if len(request.prompt) + request.max_tokens - 1 > num_blocks * 16:
            assert record.status is Status.REJECTED and "KV tokens" in record.error
        else:
            assert record.status is Status.FINISHED and len(record.output) == request.max_tokens
    assert pool.free_tokens == num_blocks * 16


def test_tokens_are_computed_once_each_and_again_after_preemption():
    """What the model would see is the sequence itself, in order, whatever was preempted."""
    pool = BlockPool(6, 16)
    requests = [Request(str(i), tuple(range(10 * i, 10 * i + 30)), 20) for i in range(3)]
    queue = RequestQueue(requests, pool, MODEL, 64)
    seen: dict[str, list[int]] = {}

    def draw(entry):
        return 50 + entry.context_tokens

    now_s, preempted = 0.0, 0
    while queue.live:
        view = queue.view("main", now_s)
        step = ChunkedPrefill(8).schedule(view)
        assert step is not None
        preempted += len(step.preempt)
        for rid in step.preempt:
            seen[rid] = []
        batch = queue.start(view, step, "test")
        assert batch is not None
        for entry in batch.entries:
            assert len(seen.setdefault(entry.id, [])) == entry.start
            seen[entry.id] += entry.token_ids
        now_s += 1
        tokens = {e.id: draw(e) for e in batch.entries if e.wants_token}
        queue.apply([StepResult(batch, now_s - 1, now_s, tokens)])
    assert preempted > 0
    for request in requests:
        sequence = [*request.prompt, *queue.records[request.id].output]
        assert seen[request.id] == sequence[:-1]
        assert queue.records[request.id].output == [50 + 30 + i for i in range(20)]


def test_stop_tokens_end_a_request_and_stay_in_its_output():
    queue = RequestQueue(
        [Request("a", (1,), 9), Request("b", (1,), 9, stop_token_ids=(5,))], BlockPool(9, 16), MODEL, 8
    )
    drain(queue, FCFS(), lambda entry: {"a": 7, "b": 5}[entry.id] if entry.context_tokens == 3 else 1)
    assert queue.records["a"].output == [1, 1, 7] and queue.records["a"].finish_reason == "stop"
    assert queue.records["b"].output == [1, 1, 5]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("x", (), 1), "prompt is empty"),
        (Request("x", (128,), 1), "prompt token 128 is out of range, expected 0 to 127"),
        (Request("x", (-1,), 1), "prompt token -1 is out of range"),
        (Request("x", (1,), 0), "max_tokens is 0"),
        (Request("x", (1,) * 100, 200), "need 299 KV tokens, the cache holds 144"),
        (Request("x", (1,), 1, sampling=Sampling(float("nan"))), "temperature is nan"),
        (Request("x", (1,), 1, sampling=Sampling(1.0, 0.0)), "top_p is 0.0"),
        (Request("x", (1,), 1, sampling=Sampling("warm")), "temperature is 'warm'"),  # type: ignore[arg-type]
        (Request("x", (1,), 1, sampling=Sampling(seed="x")), "seed is 'x'"),  # type: ignore[arg-type]
        (Request("x", (1.5, 2), 1), "prompt token 1.5 is not an int"),  # type: ignore[arg-type]
        (Request("x", ("one",), 1), "prompt token 'one' is not an int"),  # type: ignore[arg-type]
        (Request("x", "text", 1), "expected a sequence of token ids"),  # type: ignore[arg-type]
        (Request("x", (1,), 1.5), "max_tokens is 1.5, expected an int"),  # type: ignore[arg-type]
        (Request("x", (1,), 1, arrival_s=float("nan")), "arrival_s is nan"),
        (Request("x", (1,), 1, arrival_s=float("inf")), "arrival_s is inf"),
        (Request("x", (1,), 1, stop_token_ids=(200,)), "stop_token_ids token 200 is out of range"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_request_that_can_never_be_served_is_refused_and_stops_no_other(request_, words):
    queue = RequestQueue([request_, Request("good", (1, 2), 3)], BlockPool(9, 16), MODEL, 8)
    assert queue.records["x"].status is Status.REJECTED and words in queue.records["x"].error
    drain(queue, FCFS())
    assert queue.records["good"].status is Status.FINISHED


def test_a_prompt_beyond_the_models_positions_is_refused():
    queue = RequestQueue([Request("x", (1,) * 1020, 10)], BlockPool(99, 16), MODEL, 8)
    assert "reach position 1029, the model has 1024" in queue.records["x"].error


def test_cancelling_is_idempotent_and_frees_everything():
    pool = BlockPool(9, 16)
    requests = [Request("a", (1,) * 40, 30), Request("b", (1, 2), 3), Request("late", (1,), 1, arrival_s=300.0)]
    queue = RequestQueue(requests, pool, MODEL, 16)

    def draw(entry):
        if entry.context_tokens > 45:
            assert queue.cancel("a") and queue.cancel("a") and queue.cancel("late")
        return 1

    drain(queue, ChunkedPrefill(8), draw)
    assert queue.records["a"].status is Status.CANCELLED and 0 < len(queue.records["a"].output) < 30
    assert queue.records["late"].status is Status.CANCELLED
    assert queue.records["b"].status is Status.FINISHED
    assert not queue.cancel("a") and not queue.cancel("nobody")
    assert pool.free_tokens == 9 * 16


def test_a_failed_step_fails_its_requests_and_no_other():
    pool = BlockPool(9, 16)
    queue = RequestQueue([Request("a", (1,), 2), Request("b", (1,), 2)], pool, MODEL, 16)
    view = queue.view("main", 0.0)
    batch = queue.start(view, StepPlan("prefill", {"a": 1}), "test")
    assert batch is not None
    queue.apply([StepResult(batch, 0.0, 1.0, error="RuntimeError: boom")])
    assert queue.records["a"].status is Status.FAILED and "boom" in str(queue.records["a"].error)
    drain(queue, FCFS())
    assert queue.records["b"].status is Status.FINISHED and pool.free_tokens == 9 * 16


def test_a_request_in_flight_is_hidden_from_other_workers():
    queue = RequestQueue([Request("a", (1,) * 9, 2), Request("b", (1,), 2)], BlockPool(9, 16), MODEL, 16)
    queue.start(queue.view("one", 0.0), StepPlan("prefill", {"a": 4}), "test")
    assert [r.id for r in queue.view("two", 0.0).waiting] == ["b"]


def test_waiting_requests_are_in_arrival_order_even_if_an_arrival_is_known_late():
    requests = [Request("a", (1,), 1), Request("x", (1,), 1, 5.0), Request("f", (1,), 1, after="a")]
    queue = RequestQueue(requests, BlockPool(9, 16), MODEL, 16)
    batch = queue.start(queue.view("one", 0.0), StepPlan("prefill", {"a": 1}), "test")
    assert batch is not None
    assert [r.id for r in queue.view("two", 5.1).waiting] == ["x"]
    queue.apply([StepResult(batch, 0.0, 4.9, {"a": 3})])  # it ended before x arrived
    assert [r.id for r in queue.view("one", 5.1).waiting] == ["f", "x"]


def test_a_step_that_breaks_the_contract_names_the_scheduler():
    queue = RequestQueue([Request("a", (1,), 2)], BlockPool(9, 16), MODEL, 16)
    with pytest.raises(StrategyError, match=r"scheduler Mine: request 'a' gets 5 tokens, 1 remain"):
        queue.start(queue.view("main", 0.0), StepPlan("prefill", {"a": 5}), "Mine")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ranks": ()}, r"ranks is \(\), expected \(0,\), or None for all"),
        ({"ranks": [0]}, r"ranks is \[0\]"),
        ({"ranks": (0, 1)}, r"ranks is \(0, 1\)"),
        ({"preempt": None}, "preempt is None"),
    ],
)
def test_malformed_fields_of_a_step_are_named(fields, words):
    queue = RequestQueue([Request("a", (1,), 2)], BlockPool(9, 16), MODEL, 16)
    with pytest.raises(StrategyError, match=words):
        queue.start(queue.view("main", 0.0), StepPlan("prefill", {"a": 1}, **fields), "Mine")


def test_duplicate_request_ids_are_refused():
    with pytest.raises(RequestError, match="'a' occurs more than once"):
        RequestQueue([Request("a", (1,), 1)] * 2, BlockPool(1, 16), MODEL, 1)


def test_blocks_are_neighbours_where_possible_and_never_shared():
    pool = BlockPool(8, 16)
    a, b = [], []
    pool.grow(a, 32)
    pool.grow(b, 17)
    assert a == [0, 1] and b == [2, 3]
    pool.release(a)
    c: list[int] = []
    pool.grow(c, 60)  # four neighbours exist behind b
    assert c == [4, 5, 6, 7]
    pool.grow(b, 60)
    assert sorted(b + c) == list(range(8))
    with pytest.raises(MemoryError, match="1 blocks wanted, 0 free"):
        pool.grow([], 1)
    pool.release([2])
    with pytest.raises(ValueError, match="released twice"):
        pool.release([2])
