"""Steps outside any queue: their turns, their bound, their hand-offs, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab.bench.steps import (
    TimedStep,
    bound_s,
    decode_steps,
    hand_offs,
    loads_alone,
    prompt_step,
    take_turns,
    timed,
    with_overlap,
)
from hybridlab.plans import Lane, LaneKind, Op, Span
from hybridlab.strategies.overlap.dual_batch import DualBatch

ORACLE = Path(__file__).parents[1] / "data" / "oracles" / "qwen3_bf16"
GPU, HOST = Lane("w", LaneKind.GPU), Lane("w", LaneKind.CPU)


def test_turns_are_taken_forth_and_back() -> None:
    called = []

    def call(name: str) -> Callable[[], TimedStep]:
        def step() -> TimedStep:
            called.append(name)
            return TimedStep(1.0, ())

        return step

    found = [name for name, _ in take_turns({"a": call("a"), "b": call("b")}, 3)]
    assert called == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert found == called[2:]  # the first round is a warm-up


def spans_of(*ops: tuple[int, str, Lane, tuple[int, ...], float, float]) -> list[Span]:
    return [Span(Op(i, kind, lane, needs=needs), start_s, end_s) for i, kind, lane, needs, start_s, end_s in ops]


def test_bound_counts_what_cannot_overlap() -> None:
    """Two microbatches: attention 2 s, experts 3 s, combine 1 s each; hand-offs of 0.5 s."""
    dual = spans_of(
        (0, "attention", GPU, (), 0.0, 2.0),
        (1, "attention", GPU, (), 2.0, 4.0),
        (2, "experts", HOST, (0,), 2.5, 5.5),
        (3, "experts", HOST, (1,), 5.5, 8.5),
        (4, "combine", GPU, (2,), 6.0, 7.0),
        (5, "combine", GPU, (3,), 9.0, 10.0),
    )
    assert bound_s(dual) == pytest.approx(2 + (3 + 3) + 1)
    assert bound_s(dual[::-1]) == pytest.approx(9)
    alone = [span for span in dual if span.op.id in (0, 2, 4)]
    assert bound_s(alone) == pytest.approx(2 + 3 + 1)  # a chain has nothing to overlap
    on_gpu = [replace(span, op=replace(span.op, lane=GPU)) for span in dual]
    assert bound_s(on_gpu) == pytest.approx(2 * (2 + 3 + 1))
    assert bound_s([]) == 0


def test_a_wait_within_a_span_is_not_work() -> None:
    """A sum of 1 s that began to wait on its stream at 2.5 s, and one that did not wait."""
    spans = spans_of(
        (0, "experts", HOST, (), 0.0, 2.5),
        (1, "combine", GPU, (0,), 2.5, 4.0),
        (2, "attention", GPU, (), 4.0, 7.0),
        (3, "experts", HOST, (), 2.5, 5.0),
        (4, "combine", GPU, (3,), 7.0, 8.0),
    )
    step = TimedStep(8.0, spans)
    assert step.busy_s(lambda op: op.kind == "combine") == pytest.approx(2)
    assert step.busy_s(lambda op: op.kind == "attention") == pytest.approx(3)
    assert step.busy_s(lambda op: op.lane == HOST) == pytest.approx(5)
    assert hand_offs(spans).total_s == pytest.approx(0.5)
    assert bound_s(spans) == pytest.approx(2.5 + 2.5 + 1)


def test_hand_offs_are_the_waits_that_nothing_hides() -> None:
    found = hand_offs(
        spans_of(
            (0, "attention", GPU, (), 0.0, 2.0),
            (1, "attention", GPU, (), 2.0, 4.0),
            (2, "experts", HOST, (0,), 2.5, 5.5),
            (3, "experts", HOST, (1,), 5.75, 8.75),  # its own lane was busy: no hand-off
            (4, "combine", GPU, (2,), 5.625, 7.0),
            (5, "combine", GPU, (3,), 9.0, 10.0),
        )
    )
    assert found.to_host_s == pytest.approx(0.5)
    # The first sum has 0.375 s of waiting in its span: the second one shows how long a sum takes.
    assert found.to_gpu_s == pytest.approx((0.5 + 0.25) / 2)
    assert found.total_s == pytest.approx(0.5 + 0.5 + 0.25)
    nothing = hand_offs(spans_of((0, "attention", GPU, (), 0.0, 2.0)))
    assert (nothing.to_host_s, nothing.to_gpu_s, nothing.total_s) == (0, 0, 0)


def test_steps_are_what_they_say() -> None:
    streamed = {"name": "streamed", "stream_from_tokens": 1}
    options: dict[str, Any] = {"placement": streamed, "overlap": "prefetch", "kv_tokens": 128, "quiet": True}
    with hl.load(ORACLE, device="emulated", threads=2, token_budget=64, **options) as engine:
        prompt = prompt_step(engine, 20)
        spec = engine.spec
        assert [len(entry.token_ids) for entry in prompt.batch.entries] == [20]
        links = timed(engine, loads_alone(prompt))
        assert [span.op.kind for span in links.spans] == ["load"] * len(spec.moe_layers)
        assert len(timed(engine, prompt).spans) == len(prompt.program.ops)
        dual = with_overlap(engine.planner, DualBatch(min_requests=2))
        both = [list(decode_steps(engine, one, 2, 60)) for one in (engine.planner, dual)]
        assert [step.batch.entries for step in both[0]] == [step.batch.entries for step in both[1]]
        assert [step.batch.entries[1].start for step in both[0]] == [60, 61, 62, 63]  # until 128 tokens are full
        assert [one[0].program.shape.num_microbatches for one in both] == [1, 2]
