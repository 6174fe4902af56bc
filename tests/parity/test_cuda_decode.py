"""Decode steps of device="cuda" that are captured and replayed, against the oracles' greedy tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hybridlab.batch import Entry, StepBatch
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import captured_steps, stream_words
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.stream_words import StreamWords
from hybridlab.errors import HybridlabError
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.plans import LaneKind, StepPlan, Tier
from hybridlab.request import Sampling
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import resolve

HAS_GPU = torch.cuda.is_available()
NO_GPU = pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param(CUDA, marks=[NO_GPU, pytest.mark.gpu]))
PLACEMENTS = ("all_host", "all_resident", {"name": "hot_resident", "gpu_gb": 1e-4})
BF16, FP8 = "qwen3_bf16", "qwen3_fp8_128"
ONE_ORACLE = pytest.mark.parametrize("oracle", [BF16, pytest.param(FP8, marks=pytest.mark.slow)], indirect=True)
"""For what does not hang on weights."""
PAIRS = [(placement, overlap) for placement in PLACEMENTS for overlap in ("prefetch", "dual_batch")]
WITH_ORACLES = (
    *((BF16, *pair) for pair in PAIRS),
    *(pytest.param(FP8, *pair, marks=pytest.mark.slow) for pair in PAIRS[:-1]),
    (FP8, *PAIRS[-1]),  # experts on the GPU and on the host, in two microbatches
)
BLOCK, BLOCKS_EACH = 8, 16


class Decoding:
    """The oracle's prompts in the KV cache of a device, each in blocks of its own that are no neighbours."""

    def __init__(self, oracle, placement, overlap: str, where: str) -> None:
        checkpoint = open_checkpoint(oracle.folder)
        hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
        placement = resolve("placement", placement)
        placed = placement.place(checkpoint.spec, hardware, RoutingStats())
        self.planner = Planner(checkpoint.spec, hardware, placement, resolve("overlap", overlap), placed)
        self.device = cuda_device(checkpoint, placed, 2, where=where)
        self.requests, count = oracle.prompts, len(oracle.prompts)
        cache = KVCache(checkpoint.spec, count * BLOCKS_EACH, BLOCK, torch.bfloat16, self.device.torch_device)
        self.executor = Executor(self.device, cache)
        self.tables = [tuple(range(i, count * BLOCKS_EACH, count)) for i in range(count)]

    def prefill(self) -> None:
        for i, request in enumerate(self.requests):
            ids = tuple(request["prompt"])
            step = StepPlan("prefill", {"r": len(ids)})
            program = self.planner.program(self.planner.shape("main", step))
            entry = Entry("r", ids, 0, self.tables[i], Sampling(), wants_token=True)
            self.executor.run(program, StepBatch("main", step, (entry,)), 0.0)

    def decode(self, numbers: list[int], steps: int) -> tuple[list[list[int]], list]:
        """Tokens drawn and spans, fed with the expected ones."""
        drawn = []
        step = StepPlan("decode", {str(i): 1 for i in numbers})
        program = self.planner.program(self.planner.shape("main", step))
        spans = ()
        for at in range(steps):
            entries = tuple(
                Entry(str(i), (self.requests[i]["greedy"][at],), len(self.requests[i]["prompt"]) + at, self.tables[i],
                      Sampling(), wants_token=True)
                for i in numbers
            )  # fmt: skip
            tokens, spans = self.executor.run(program, StepBatch("main", step, entries), 0.0)
            drawn.append([tokens[str(i)] for i in numbers])
        return drawn, list(spans)


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """The number of microbatches of each replayed step."""
    found: list[int] = []
    run = captured_steps.CapturedSteps.run

    def counted(self, *given):
        result = run(self, *given)
        if result is not None:
            found.append(len(result[0]))
        return result

    monkeypatch.setattr(captured_steps.CapturedSteps, "run", counted)
    return found


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("oracle", "placement", "overlap"), WITH_ORACLES, indirect=["oracle"], ids=str)
def test_replayed_steps_draw_what_the_oracle_draws(oracle, placement, overlap, where, replays):
    decoding = Decoding(oracle, placement, overlap, where)
    try:
        decoding.prefill()
        steps = 16
        numbers = list(range(len(decoding.requests)))
        drawn, spans = decoding.decode(numbers, steps)
        assert replays == [2 if overlap == "dual_batch" else 1] * (steps - captured_steps.CAPTURE_FROM + 1)
        expected = [[decoding.requests[i]["greedy"][at + 1] for i in numbers] for at in range(steps)]
        agree = sum(a == b for got, want in zip(drawn, expected, strict=True) for a, b in zip(got, want, strict=True))
        assert agree / (steps * len(numbers)) >= oracle.expected["bf16_top1_agree"] - 0.1
        assert all(span.end_s >= span.start_s for span in spans)
        host = [span for span in spans if span.op.lane.kind is LaneKind.CPU]
        assert bool(host) == (placement != "all_resident")
        ends = {span.op.id: span.end_s for span in spans}
        for span in host:  # on one clock: not before the router is done, as far as events resolve it
            assert span.start_s >= max(ends[need] for need in span.op.needs) - 1e-4
    finally:
        decoding.device.close()


@pytest.mark.parametrize("where", WHERE)
def test_another_number_of_requests_is_a_step_of_its_own(oracle, where, replays):
    decoding = Decoding(oracle, "all_host", "prefetch", where)
    try:
        decoding.prefill()
        for numbers in ([0], [1, 2], [2, 1], [0]):
            drawn, _ = decoding.decode(numbers, captured_steps.CAPTURE_FROM)
            wanted = [[decoding.requests[i]["greedy"][at + 1] for i in numbers] for at in range(len(drawn))]
            agree = [a == b for got, want in zip(drawn, wanted, strict=True) for a, b in zip(got, want, strict=True)]
            assert sum(agree) >= 0.7 * len(agree)
        # Two shapes came three times, then each three times more.
        assert len(replays) == 2 * (1 + captured_steps.CAPTURE_FROM)
    finally:
        decoding.device.close()


@ONE_ORACLE
def test_an_error_in_a_replayed_step_leaves_the_next_one_well(oracle, monkeypatch, replays):
    decoding = Decoding(oracle, "all_host", "prefetch", "cpu")
    try:
        decoding.prefill()
        before, _ = decoding.decode([0], captured_steps.CAPTURE_FROM)
        head = decoding.device.model.head
        monkeypatch.setattr(decoding.device.model, "head", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoding.decode([0], 1)
        monkeypatch.setattr(decoding.device.model, "attention", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # before the host has had its first layer
            decoding.decode([0], 1)
        monkeypatch.undo()
        monkeypatch.setattr(decoding.device.model, "head", head)
        after, _ = decoding.decode([0], captured_steps.CAPTURE_FROM)
        assert after == before
    finally:
        decoding.device.close()


@ONE_ORACLE
def test_a_step_that_cannot_be_captured_stays_as_it_was(oracle, monkeypatch, replays):
    decoding = Decoding(oracle, "all_host", "prefetch", "cpu")
    tried: list[int] = []

    def capture(*given: object):
        tried.append(1)
        raise RuntimeError("out of memory")

    try:
        decoding.prefill()
        expected, _ = decoding.decode([0, 1], 2)
        monkeypatch.setattr(decoding.executor._captured, "_device", replace(decoding.device, capture=capture))
        drawn, _ = decoding.decode([0, 1], 8)
        assert drawn[:2] == expected and len(drawn) == 8
        assert tried == [1]
    finally:
        decoding.device.close()


@ONE_ORACLE
def test_one_step_too_many_does_not_drive_out_those_in_use(oracle, monkeypatch):
    decoding = Decoding(oracle, "all_host", "prefetch", "cpu")
    made: list[int] = []
    capture = decoding.device.capture
    assert capture is not None

    def counted(program, tokens, *given):
        made.append(sum(tokens))
        return capture(program, tokens, *given)

    monkeypatch.setattr(captured_steps, "KEPT", 1)
    monkeypatch.setattr(captured_steps, "IDLE_STEPS", 6)
    monkeypatch.setattr(decoding.executor._captured, "_device", replace(decoding.device, capture=counted))
    try:
        decoding.prefill()
        for _ in range(5):
            decoding.decode([0], 1)
            decoding.decode([0, 1], 1)
        assert made == [1]
        decoding.decode([0, 1], 7)  # nobody asks for the other one any more
        assert made == [1, 2]
    finally:
        decoding.device.close()


@ONE_ORACLE
def test_an_error_of_the_driver_is_one_of_the_step(oracle, monkeypatch):
    """And not a mistake of the user's, which would end the run."""
    decoding = Decoding(oracle, "all_host", "prefetch", "cpu")
    try:
        decoding.prefill()
        before, _ = decoding.decode([0], 1)
        words = decoding.device.experts[Tier.HOST].words  # type: ignore[attr-defined]
        monkeypatch.setattr(words, "write", lambda word: StreamWords()._call("cuNoSuchCall", word))
        monkeypatch.setattr(stream_words, "_driver", lambda: SimpleNamespace(cuNoSuchCall=lambda *given: 700))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        with pytest.raises(RuntimeError, match="cuNoSuchCall: CUDA driver error 700") as caught:
            decoding.decode([0], 1)
        assert not isinstance(caught.value, HybridlabError)
        monkeypatch.undo()
        assert decoding.decode([0], 1)[0] == before
    finally:
        decoding.device.close()
