"""The KV cache in host memory, two layers of it on the device at a time: bit for bit what a resident one gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybridlab.batch import Entry, StepBatch
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.kv_cache import KVCache, KVStorage
from hybridlab.engine.offloaded_kv import OffloadedKV
from hybridlab.errors import HybridlabError
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.plans import StepPlan
from hybridlab.request import Sampling
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import resolve

HAS_GPU = torch.cuda.is_available()
WHERE = (
    "cpu",
    pytest.param(CUDA, marks=[pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device"), pytest.mark.gpu]),
)
BLOCK, BLOCKS_EACH, GREEDY = 8, 12, Sampling()


class Steps:
    """The oracle's prompts on one kind of KV cache; blocks of a request are no neighbours, or all are."""

    def __init__(
        self, oracle, storage: type[KVCache] | type[OffloadedKV], overlap: str, where: str, apart: bool
    ) -> None:
        checkpoint = open_checkpoint(oracle.folder)
        hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
        placement = resolve("placement", {"name": "streamed", "stream_from_tokens": 4})
        placed = placement.place(checkpoint.spec, hardware, RoutingStats())
        self.spec = checkpoint.spec
        self.planner = Planner(self.spec, hardware, placement, resolve("overlap", overlap), placed)
        # Captured steps take another kernel for attention; they are not for offloaded caches.
        self.device = replace(cuda_device(checkpoint, placed, 2, where=where), capture=None)
        count = len(oracle.prompts)
        self.cache: KVStorage = storage(self.spec, count * BLOCKS_EACH, BLOCK, torch.bfloat16, self.device.torch_device)
        self.executor = Executor(self.device, self.cache)
        every = range(count * BLOCKS_EACH)
        self.tables = [
            tuple(every[i::count] if apart else every[i * BLOCKS_EACH : (i + 1) * BLOCKS_EACH]) for i in range(count)
        ]

    def prefill(self, number: int, ids: tuple[int, ...], chunk: int) -> np.ndarray:
        """Logits of all tokens, float32 [T, V]."""
        rows = []
        for start in range(0, len(ids), chunk):
            new = ids[start : start + chunk]
            program = self._program(StepPlan("prefill", {"r": len(new)}))
            entry = Entry("r", new, start, self.tables[number], GREEDY, wants_token=True)
            rows.append(self.executor.logits(program, entry).numpy())
            self.spoil()
        return np.concatenate(rows)

    def step(self, role: str, tokens: dict[int, tuple[tuple[int, ...], int]]) -> dict[str, int]:
        """One step of several requests: {number: (new tokens, how many it has cached)} -> drawn tokens."""
        step = StepPlan(role, {str(i): len(ids) for i, (ids, _) in tokens.items()})  # type: ignore[arg-type]
        entries = tuple(
            Entry(str(i), ids, start, self.tables[i], GREEDY, wants_token=True) for i, (ids, start) in tokens.items()
        )
        drawn, _ = self.executor.run(self._program(step), StepBatch("main", step, entries), 0.0)
        self.spoil()
        return drawn

    def spoil(self) -> None:
        """Nothing on the device outlives a step."""
        if isinstance(self.cache, OffloadedKV):
            for buffer in self.cache._buffers:
                for storage in buffer.entries:
                    storage.fill_(float("nan"))

    def kept(self, layer: int) -> tuple[torch.Tensor, ...]:
        where = self.cache._host if isinstance(self.cache, OffloadedKV) else self.cache._layers  # type: ignore[attr-defined]
        return tuple(storage.cpu() for storage in where[layer])

    def close(self) -> None:
        self.cache.close()
        self.device.close()

    def _program(self, step: StepPlan):
        return self.planner.program(self.planner.shape("main", step))


@pytest.fixture(params=WHERE)
def where(request) -> str:
    return request.param


@pytest.fixture(params=[("dual_batch", True), ("prefetch", False)], ids=("dual_batch, apart", "prefetch, neighbours"))
def both(request, oracle, where) -> Iterator[tuple[Steps, Steps]]:
    overlap, apart = request.param
    pair = tuple(Steps(oracle, storage, overlap, where, apart) for storage in (KVCache, OffloadedKV))
    yield pair  # type: ignore[misc]
    for steps in pair:
        steps.close()


@pytest.mark.parametrize("chunk", (5, 100))
def test_prompts_have_the_same_logits(oracle, both, chunk):
    for number, request in enumerate(oracle.prompts):
        resident, offloaded = (steps.prefill(number, tuple(request["prompt"]), chunk) for steps in both)
        np.testing.assert_array_equal(resident, offloaded)


def test_steps_of_many_requests_draw_the_same_tokens_and_keep_the_same_rows(oracle, both):
    prompts = [tuple(request["prompt"]) for request in oracle.prompts]
    used = [len(prompt) for prompt in prompts]
    for steps in both:
        for number, prompt in enumerate(prompts):
            steps.prefill(number, prompt, 7)
    for at in range(6):  # not all of them in every step
        here = [i for i in range(len(prompts)) if (i + at) % 3]
        tokens = {i: ((oracle.prompts[i]["greedy"][used[i] - len(prompts[i])],), used[i]) for i in here}
        for i in tokens:
            used[i] += 1
        resident, offloaded = (steps.step("decode", tokens) for steps in both)
        assert resident == offloaded and len(resident) == len(tokens) > 0
    slots = torch.tensor([
        steps_table[position // BLOCK] * BLOCK + position % BLOCK
        for steps_table, count in zip(both[0].tables, used, strict=True)
        for position in range(count)
    ])  # fmt: skip
    for layer in range(both[0].spec.num_layers):
        for resident, offloaded in zip(*(steps.kept(layer) for steps in both), strict=True):
            assert torch.equal(resident[slots], offloaded[slots])


def test_a_step_may_prefill_and_decode(oracle, both):
    prompts = [tuple(request["prompt"]) for request in oracle.prompts]
    long = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    others = [i for i in range(len(prompts)) if i != long]
    half = len(prompts[long]) // 2
    for steps in both:
        for i in others:
            steps.prefill(i, prompts[i], 100)
        steps.prefill(long, prompts[long][:half], 100)
    tokens = {i: ((oracle.prompts[i]["greedy"][0],), len(prompts[i])) for i in others}
    mixed = {**tokens, long: (prompts[long][half:], half)}
    resident, offloaded = (steps.step("mixed", mixed) for steps in both)
    assert resident == offloaded


def test_layers_may_be_asked_for_in_any_order(oracle, where):
    """As two microbatches do that are not in step: the rows that one wrote are there when its layer comes back."""
    spec = open_checkpoint(oracle.folder).spec
    resident, offloaded = (
        KVCache(spec, 8, BLOCK, torch.bfloat16, where),
        OffloadedKV(spec, 8, BLOCK, torch.bfloat16, where),
    )
    generator = torch.Generator().manual_seed(0)
    draws = np.random.default_rng(0)
    tables, lengths = ((0, 5, 1, 2), (3, 4, 7, 6)), [0, 0]
    for _ in range(6):
        new = [int(draws.integers(1, 6)) for _ in tables]
        batches = []
        for cache in (resident, offloaded):
            cache.begin()
            given = [cache.context(tables[i], 0, new[i], lengths[i]) for i in range(2)]
            batches.append([(context, cache.slots([slots])) for context, slots in given])
        order = [(i, layer) for layer in range(spec.num_layers) for i in range(2)]
        if draws.integers(2):
            order.sort()  # one after the other through all layers
        for i, layer in order:
            shapes = [(new[i], *entry.shape) for entry in spec.kv_entries]
            rows = [torch.randn(shape, generator=generator).to(where) for shape in shapes]
            for cache, batch in zip((resident, offloaded), batches, strict=True):
                cache.write(layer, batch[i][1], *rows)
            cached = batches[0][i][0].cached
            for here, there in zip(resident.entries(layer), offloaded.entries(layer), strict=True):
                assert torch.equal(here[cached], there[cached])
        lengths = [have + more for have, more in zip(lengths, new, strict=True)]
    assert len(offloaded._buffers) == 2
    offloaded.close()


def test_slots_of_another_step_are_refused(oracle):
    spec = open_checkpoint(oracle.folder).spec
    cache = OffloadedKV(spec, 2, BLOCK, torch.bfloat16)
    cache.begin()
    slots = cache.slots([torch.arange(3)])
    cache.begin()
    rows = [torch.zeros(3, *entry.shape) for entry in spec.kv_entries]
    with pytest.raises(HybridlabError, match="slots of its own step"):
        cache.write(0, slots, *rows)


def test_random_values_are_the_hosts(oracle):
    spec = open_checkpoint(oracle.folder).spec
    cache = OffloadedKV(spec, 4, BLOCK, torch.bfloat16)
    cache.randomise(7)
    cache.begin()
    context, _ = cache.context((2, 0, 1), 0, 1, 2 * BLOCK)
    keys, _ = cache.entries(spec.num_layers - 1)
    assert torch.equal(keys[context.cached[: 2 * BLOCK]], cache._host[-1][0][context.cached[: 2 * BLOCK]])  # type: ignore[index]
    assert keys[context.cached[: 2 * BLOCK]].float().std() > 0.5  # type: ignore[index]
