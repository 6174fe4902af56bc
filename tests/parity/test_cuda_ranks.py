"""Ranks on device "cuda": each with its own experts on its own ring, as near to the oracles as one process is.

On torch's CPU tensors; on one GPU, which two ranks share (`-m gpu`); and with a GPU for each, through NCCL.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

import hybridlab as hl
from hybridlab.batch import Entry
from hybridlab.engine import ep_traffic
from hybridlab.engine import ranks as ranks_module
from hybridlab.engine.ep_exchange import Wire
from hybridlab.engine.host_needs import kept_experts
from hybridlab.engine.ranks import Ranks
from hybridlab.engine.ranks_runtime import own_placement
from hybridlab.engine.ranks_share import rows_of
from hybridlab.errors import WorkerLost
from hybridlab.hardware.gpu import Gpu, detect_gpus
from hybridlab.lowering import Planner
from hybridlab.plans import EXCHANGES, QueueView, StepPlan, Tier
from hybridlab.request import Status
from hybridlab.strategies.registry import resolve

GPUS = torch.cuda.device_count()
SHARED = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="torch finds no CUDA device")]
OWN = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason=f"torch finds {GPUS} CUDA devices, two ranks want two")]
WHERE = ("cpu", pytest.param("one_gpu", marks=SHARED), pytest.param("nccl", marks=OWN))
STREAMED = {"name": "streamed", "stream_from_tokens": 4, "ring_slots": 3, "parts_per_layer": 2}
"""Prompts, and decode steps of four requests or five; the last ones are left to the host."""
ONE_ORACLE = pytest.mark.parametrize(
    "oracle", ["qwen3_bf16", pytest.param("qwen3_fp8_128", marks=pytest.mark.slow)], indirect=True
)
"""For what hangs on processes and memory, not on weights."""
BF16, FP8, SOME = "qwen3_bf16", "qwen3_fp8_128", {"name": "hot_resident", "gpu_gb": 1e-4}


@pytest.fixture(scope="module", params=WHERE)
def where(request) -> Iterator[str]:
    """Ranks find as many GPUs as `where` says; on "cpu" this process believes that there is one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "one_gpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "0")  # to the ranks: this process has looked already
        gpus = {"cpu": (Gpu(0, "made up", 2**34, (9, 0)),), "one_gpu": detect_gpus()[:1], "nccl": detect_gpus()}
        for module in ("engine.options", "loading", "hardware.detect"):
            patch.setattr(import_module(f"hybridlab.{module}"), "detect_gpus", lambda: gpus[request.param])
        yield request.param


def load(oracle, **options: Any) -> hl.Engine:
    given = {"device": "cuda", "ranks": 2, "placement": STREAMED, "overlap": "prefetch", "vram_gb": 8.0, "threads": 2}
    return oracle.load(**{**given, **options})


@pytest.fixture(scope="module")
def engine(where, oracle) -> Iterator[hl.Engine]:
    with load(oracle) as engine:
        yield engine


def runtime_of(engine: hl.Engine) -> Ranks:
    assert isinstance(engine.runtime, Ranks)
    return engine.runtime


def with_plan(engine: hl.Engine, exchange: str, overlap: str = "prefetch") -> Planner:
    given = engine.planner
    placed = replace(given.placed, exchange=exchange)
    return Planner(given.model, given.hardware, given.placement, resolve("overlap", overlap), placed, given.ranks)


def check_near(oracle, engine: hl.Engine) -> None:
    """Logits of all prompts are within the tolerances of BF16."""
    errors, agree = [], []
    for request, expected in zip(oracle.prompts, oracle.logits, strict=True):
        got = engine.logits(request["prompt"])
        assert got.dtype == np.float32 and got.shape == expected.shape
        errors.append(np.abs(got - expected).ravel())
        agree.append(got.argmax(-1) == expected.argmax(-1))
    assert np.median(np.concatenate(errors)) <= oracle.expected["tol_bf16_median"]
    assert np.concatenate(agree).mean() >= oracle.expected["bf16_top1_agree"] - 0.1


def first_tokens(oracle, records: list[hl.RequestRecord]) -> float:
    """Of all requests' tokens, how many there are before the first that the oracle would not have drawn."""
    assert {(record.status, record.error) for record in records} == {(Status.FINISHED, "")}
    found = 0
    for record, expected in zip(records, oracle.greedy, strict=True):
        assert len(record.output) == len(expected)
        same = np.array(record.output) == np.array(expected)
        found += len(same) if same.all() else int(same.argmin())
    return found / sum(map(len, oracle.greedy))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_plan_is_as_near_as_one_process_is(oracle, engine, exchange, monkeypatch):
    kinds = set()
    for overlap in ("sequential", "prefetch", "dual_batch"):
        monkeypatch.setattr(engine, "planner", with_plan(engine, exchange, overlap))
        check_near(oracle, engine)
        served = engine.serve(oracle.requests(), "fcfs", keep_span_steps=1000)
        assert first_tokens(oracle, served.records) >= 0.5
        kinds |= {(span.op.kind, span.op.rank, span.op.tier) for span in served.spans}
        assert all(span.end_s >= span.start_s for span in served.spans)
    # Two microbatches exchange and compute side by side: nobody's memory is used again while another lane reads it.
    outputs = [[record.output for record in engine.serve(oracle.requests(), "fcfs").records] for _ in range(3)]
    assert outputs[1:] == outputs[:-1]
    # Each rank loads and computes experts of its own, and takes part in every exchange.
    for rank in range(2):
        assert {("load", rank, Tier.STREAMED), ("experts", rank, Tier.STREAMED), ("reduce", rank, None)} <= kinds


@pytest.mark.parametrize(
    ("oracle", "placement"),
    [
        *((BF16, placement) for placement in ("all_host", "all_resident", SOME)),
        *(pytest.param(FP8, placement, marks=pytest.mark.slow) for placement in ("all_host", "all_resident")),
        (FP8, SOME),
    ],
    indirect=["oracle"],
    ids=str,
)
def test_each_rank_has_its_experts_in_any_tier(where, oracle, placement):
    with load(oracle, placement=placement) as engine:
        for exchange in EXCHANGES:
            engine.planner = with_plan(engine, exchange)
            check_near(oracle, engine)
            assert first_tokens(oracle, engine.serve(oracle.requests(), "fcfs").records) >= 0.5


@ONE_ORACLE
def test_kv_that_finds_no_room_on_the_gpu_is_in_the_hosts_memory(where, oracle):
    with load(oracle, vram_gb=2.0, kv_tokens=190_000) as engine:
        assert engine.memory.kv_offloaded
        check_near(oracle, engine)
        assert first_tokens(oracle, engine.serve(oracle.requests(), InTurn()).records) >= 0.5


@dataclass(frozen=True)
class InTurn:
    """After each step of all ranks comes one of the first alone, whose host computes the experts of the other."""

    def schedule(self, queue: QueueView) -> StepPlan | None:
        step = resolve("scheduler", "fcfs").schedule(queue)
        alone = sum(request.context_tokens for request in (*queue.waiting, *queue.running)) % 2
        return step and replace(step, ranks=queue.rank_sets[alone])


def test_the_first_rank_computes_some_steps_alone(oracle, engine):
    served = engine.serve(oracle.requests(), InTurn(), keep_span_steps=1000)
    assert first_tokens(oracle, served.records) >= 0.5
    theirs = {key for key, rank in engine.planner.placed.rank_of.items() if rank == 1}
    by_host = [span.op for span in served.spans if span.op.kind == "experts" and span.op.tier is Tier.HOST]
    alone = [op for op in by_host if op.rank == 0 and theirs & {(op.layer, expert) for expert in op.experts}]
    assert alone and any(span.op.rank == 1 for span in served.spans)


def test_bytes_are_those_of_the_formulas(oracle, engine):
    spec, prompt = oracle.spec, oracle.prompts[-1]["prompt"]
    before = runtime_of(engine).traffic()
    engine.logits(prompt)
    after = runtime_of(engine).traffic()
    entry = Entry("r", tuple(prompt), 0, (), hl.Sampling(), wants_token=False)
    sizes = [len(rows_of(entry, rank, 2)) for rank in range(2)]
    for rank in range(2):
        moved = {name: after[rank][name] - before[rank][name] for name in after[rank]}
        expected = ep_traffic.small_ep(sizes, rank, spec.hidden, Wire())
        assert moved["experts"].sent_bytes == len(spec.moe_layers) * expected.sent_bytes
        assert moved["experts"].received_bytes == len(spec.moe_layers) * expected.received_bytes
        assert moved["attention"].sent_bytes == sizes[rank] * spec.kv_elements_per_token * 2  # BF16


def test_a_rank_keeps_its_own_experts_and_no_others(oracle, engine):
    spec, placed = oracle.spec, engine.planner.placed
    kept = [kept_experts(own_placement(placed, spec, rank), spec) for rank in range(2)]
    for layer in spec.moe_layers:
        assert kept[0][layer] and kept[1][layer] and kept[0][layer] + kept[1][layer] == list(range(spec.num_experts))
    assert engine.memory.gpu is not None and engine.memory.gpu.total_bytes <= engine.memory.gpu.budget_bytes


@ONE_ORACLE
def test_a_killed_rank_is_named_and_others_take_their_place(oracle, where, caplog):
    with load(oracle) as engine:
        before = runtime_of(engine).pids
        killed: list[int] = []

        def kill(record, token):
            if not killed and len(record.output) > 4:
                killed.append(before[1])
                os.kill(before[1], signal.SIGKILL)

        served = engine.serve(oracle.requests(), "fcfs", on_event=kill)
        assert first_tokens(oracle, served.records) >= 0.5 and killed
        assert not set(before) & set(runtime_of(engine).pids)
    assert re.search(r"rank 1: worker process \d+ was ended by SIGKILL", caplog.text)


@ONE_ORACLE
def test_a_rank_that_hangs_is_named_and_the_others_do_not(oracle, where, monkeypatch):
    monkeypatch.setattr(ranks_module, "TIMEOUT_S", 3.0)
    with load(oracle) as engine:
        first = runtime_of(engine).pids
        engine.generate(oracle.prompts[-1]["prompt"], 1)
        os.kill(first[1], signal.SIGSTOP)
        with pytest.raises(WorkerLost, match=r"rank 1 did not answer rank 0 within 3 s"):
            engine.logits(oracle.prompts[-1]["prompt"])
