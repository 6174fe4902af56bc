"""device="cuda" under every placement and overlap: all prompts in one step, or in chunks, then decoding together.

On the GPU where there is one (`-m gpu`), and the same code on torch's CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from hybridlab.batch import Entry, StepBatch
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.kv_cache import KVCache
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.plans import Role, Span, StepPlan, Tier
from hybridlab.request import Sampling
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import names, resolve

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param(CUDA, marks=[NO_GPU, pytest.mark.gpu]))
RESIDENT, STREAMED, HOST = Tier.RESIDENT, Tier.STREAMED, Tier.HOST
DECODE_STEPS = 6
BLOCK, BLOCKS_EACH = 8, 16

# name -> (fields, tiers that must have computed); `gpu_gb` as a share of all experts
PLACEMENTS: dict[str, tuple[dict[str, Any], set[Tier]]] = {
    "all_host": ({}, {HOST}),
    "all_resident": ({}, {RESIDENT}),
    "hot_resident": ({"gpu_gb": 0.4}, {RESIDENT, HOST}),
    "hot_resident, streaming": (
        {"gpu_gb": 0.4, "ring_slots": 2, "parts_per_layer": 2, "stream_from_tokens": 9}, {RESIDENT, STREAMED, HOST},
    ),
    "layer_split": ({"gpu_gb": 1.0}, {RESIDENT}),
    "lru_cache": ({"gpu_gb": 0.5, "update_every_steps": 2}, {RESIDENT, HOST}),
    "streamed": ({"stream_from_tokens": 1}, {STREAMED}),
    "streamed, prompts only": ({"stream_from_tokens": 9, "ring_slots": 4, "parts_per_layer": 3}, {STREAMED, HOST}),
}  # fmt: skip
CHUNKS = (4, 10**6)


class Serving:
    """All prompts of the oracle on one device; each decodes the oracle's tokens, whatever it draws itself."""

    def __init__(self, oracle, name: str, overlap: str, where: str) -> None:
        checkpoint = open_checkpoint(oracle.folder)
        spec = checkpoint.spec
        fields = dict(PLACEMENTS[name][0])
        if "gpu_gb" in fields:
            fields["gpu_gb"] *= len(spec.moe_layers) * spec.num_experts * spec.expert_bytes / 1e9
        placement = resolve("placement", {"name": name.partition(",")[0], **fields})
        hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
        placed = placement.place(spec, hardware, RoutingStats())
        placed = replace(placed, movable=name.startswith("lru_cache"))
        self.planner = Planner(spec, hardware, placement, resolve("overlap", overlap), placed)
        self.device = cuda_device(checkpoint, placed, 2, where=where)
        self.requests = oracle.prompts
        count = len(self.requests)
        cache = KVCache(spec, count * BLOCKS_EACH, BLOCK, torch.bfloat16, self.device.torch_device)
        self.executor = Executor(self.device, cache)
        self.computed = [0] * count
        self.spans: list[Span] = []
        self.drawn: list[tuple[int, int]] = []
        """(drawn, expected) of every token."""

    def step(self, role: Role, counts: dict[int, int]) -> None:
        """Compute the next `counts[i]` tokens of request i."""
        entries, expected = [], {}
        for i, count in counts.items():
            known = [*self.requests[i]["prompt"], *self.requests[i]["greedy"]]
            start, end = self.computed[i], self.computed[i] + count
            table = tuple(range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH))
            draws = end >= len(self.requests[i]["prompt"])
            entries.append(Entry(str(i), tuple(known[start:end]), start, table, Sampling(), wants_token=draws))
            if draws:
                expected[str(i)] = known[end]
            self.computed[i] = end
        step = StepPlan(role, {entry.id: len(entry.token_ids) for entry in entries})
        program = self.planner.program(self.planner.shape("main", step))
        tokens, spans = self.executor.run(program, StepBatch("main", step, tuple(entries)), 0.0)
        assert tokens.keys() == expected.keys()
        self.drawn += [(tokens[i], expected[i]) for i in expected]
        self.spans += spans
        self.planner.update(self.executor, 1)

    def prefill(self, chunk: int) -> None:
        while counts := {
            i: min(chunk, left)
            for i, request in enumerate(self.requests)
            if (left := len(request["prompt"]) - self.computed[i]) > 0
        }:
            self.step("prefill", counts)


@pytest.fixture
def serving(oracle, name, overlap, where) -> Iterator[Serving]:
    serving = Serving(oracle, name, overlap, where)
    yield serving
    serving.device.close()


def check(oracle, serving: Serving, name: str, overlap: str, chunk: int) -> None:
    before = serving.planner.placed
    serving.prefill(chunk)
    for _ in range(DECODE_STEPS):
        serving.step("decode", dict.fromkeys(range(len(serving.requests)), 1))
    agree = sum(drawn == expected for drawn, expected in serving.drawn)
    assert agree / len(serving.drawn) >= oracle.expected["bf16_top1_agree"] - 0.1
    experts = [span.op for span in serving.spans if span.op.kind == "experts"]
    fields, tiers = PLACEMENTS[name]
    if chunk * len(serving.requests) < fields.get("stream_from_tokens", 0):
        tiers = tiers - {STREAMED}
    assert {op.tier for op in experts} == tiers
    assert {op.microbatch for op in experts} == ({0, 1} if overlap == "dual_batch" else {0})
    assert (serving.planner.placed != before) == (name == "lru_cache")


def test_no_placement_is_forgotten():
    assert set(names("placement")) == {name.partition(",")[0] for name in PLACEMENTS}


PAIRS = [
    (name, overlap, CHUNKS[(i + j) % len(CHUNKS)])
    for (i, name), (j, overlap) in product(enumerate(PLACEMENTS), enumerate(names("overlap")))
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("name", "overlap", "chunk"), PAIRS)
def test_every_placement_under_every_overlap(oracle, serving, name, overlap, chunk):
    check(oracle, serving, name, overlap, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("chunk", (1, *CHUNKS))
@pytest.mark.parametrize("overlap", names("overlap"))
@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_full_product(oracle, serving, name, overlap, chunk):
    check(oracle, serving, name, overlap, chunk)
