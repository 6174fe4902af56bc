"""Decode steps that are launched as one: captured once for each program and number of requests, then replayed."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hybridlab.batch import Entry
from hybridlab.engine.devices import Device, Execute, Replay
from hybridlab.engine.kv_cache import KVCache, KVStorage
from hybridlab.engine.local_ids import tables_held
from hybridlab.engine.running import Running
from hybridlab.model.base import DecodeBatch
from hybridlab.plans import Program, Span

CAPTURE_FROM = 3
"""How often a step must have come before it is captured, which takes as long as some ten of them."""
KEPT = 16
"""Captured steps at a time."""
IDLE_STEPS = 256
"""A captured step that was not used for so many others may go for a new one."""
COUNTED = 256
"""Steps whose number is remembered."""
NEVER_AGAIN = 10**9

Groups = Sequence[tuple[Entry, ...]]
ExecuteFor = Callable[[Program, list[Running]], Execute]
"""What runs an op of a program on its microbatches."""


class CapturedSteps:
    """`cache` is where steps keep their KV. What runs them is given with each one: nothing here holds on to it."""

    def __init__(self, device: Device, cache: KVStorage) -> None:
        self._device, self._cache = device, cache
        self._captured: OrderedDict[tuple, _Captured] = OrderedDict()
        self._seen: Counter[tuple] = Counter()
        self._num_steps = 0

    def run(
        self, program: Program, groups: Groups, clock_start_s: float, execute_for: ExecuteFor
    ) -> tuple[list[Running], tuple[Span, ...]] | None:
        """The step, or None if it is not one to replay (yet)."""
        if self._device.capture is None or not self._suits(program, groups):
            return None
        self._num_steps += 1
        key = (program, *map(len, groups))
        captured = self._captured.get(key)
        if captured is None:
            return self._capture(key, program, groups, clock_start_s, execute_for) if self._pays(key) else None
        self._captured.move_to_end(key)
        captured.used_at = self._num_steps
        for micro, inputs, group in zip(captured.micros, captured.inputs, groups, strict=True):
            micro.entries = group
            inputs.fill(group)
        return captured.micros, captured.replay(clock_start_s)

    def forget(self) -> None:
        """What a step does has changed, or nobody will ask for one any more."""
        self._captured.clear()
        self._seen.clear()

    def _suits(self, program: Program, groups: Groups) -> bool:
        """Every request computes one token and draws the next; streamed experts change their slots with each step."""
        entries = (entry for group in groups for entry in group)
        return (
            type(self._cache) is KVCache
            and not program.streamed
            and all(len(entry.token_ids) == 1 and entry.wants_token for entry in entries)
        )

    def _pays(self, key: tuple) -> bool:
        """Whether the step has come often enough, and there is room, or one that nobody has asked for of late."""
        if len(self._seen) >= COUNTED:
            self._seen.clear()
        self._seen[key] += 1
        if self._seen[key] < CAPTURE_FROM:
            return False
        if len(self._captured) < KEPT:
            return True
        oldest, captured = next(iter(self._captured.items()))
        if self._num_steps - captured.used_at < IDLE_STEPS:
            return False
        del self._captured[oldest]
        return True

    def _capture(
        self, key: tuple, program: Program, groups: Groups, clock_start_s: float, execute_for: ExecuteFor
    ) -> tuple[list[Running], tuple[Span, ...]]:
        """Run the step on the tensors of its later replays, then capture it; if that fails, it stays as it was."""
        inputs = [DecodeInputs(len(group), self._cache, self._device) for group in groups]
        tokens = [len(group) for group in groups]
        for one, group in zip(inputs, groups, strict=True):
            one.fill(group)

        def upload() -> None:
            for one in inputs:
                one.upload()

        def start() -> list[Running]:
            return [Running(group, one.batch()) for one, group in zip(inputs, groups, strict=True)]

        # Kernels are compiled and tables made by this run: nothing may be new in the captured one.
        upload()
        if self._device.torch_device != "cpu":
            torch.cuda.synchronize(self._device.torch_device)
        ran = start()
        with self._device.around(program, tokens):
            spans = self._device.lanes.run(program, execute_for(program, ran), clock_start_s)
        micros = start()
        assert self._device.capture is not None
        try:
            with tables_held() as tables:
                replay = self._device.capture(program, tokens, execute_for(program, micros), upload)
            self._captured[key] = _Captured(micros, inputs, replay, tables, self._num_steps)
        except (RuntimeError, MemoryError) as error:  # most likely no memory is left for it
            self._seen[key] = -NEVER_AGAIN
            text = str(error).partition("\n")[0]
            logging.getLogger(__name__).warning("a decode step of %s requests is not captured: %s", tokens, text)
        return ran, spans


@dataclass
class _Captured:
    """`tables` are read by the replays where they lie; `used_at` is the number of the last step that used it."""

    micros: list[Running]
    inputs: list[DecodeInputs]
    replay: Replay
    tables: list[torch.Tensor]
    used_at: int


class DecodeInputs:
    """What `tokens` decoding requests bring to a step, at fixed places: filled on the host, uploaded by the step."""

    def __init__(self, tokens: int, cache: KVStorage, device: Device) -> None:
        blocks = min(cache.num_blocks, -(-device.model.spec.max_positions // cache.block_tokens))
        self._block_tokens = cache.block_tokens
        on_gpu = device.torch_device != "cpu"
        # Token ids, positions and slots; the block tables and how many tokens each request sees.
        self._longs, self._ints = (
            torch.zeros(3, tokens, dtype=torch.int64),
            torch.zeros(tokens * (blocks + 1), dtype=torch.int32),
        )
        if on_gpu:
            self._longs, self._ints = self._longs.pin_memory(), self._ints.pin_memory()
        self._there = tuple(torch.zeros_like(room, device=device.torch_device) for room in (self._longs, self._ints))
        self._tables = self._ints[: tokens * blocks].view(tokens, blocks).numpy()
        self._lengths = self._ints[tokens * blocks :].numpy()

    def fill(self, entries: Sequence[Entry]) -> None:
        longs = self._longs.numpy()
        for row, entry in enumerate(entries):
            block, place = divmod(entry.start, self._block_tokens)
            longs[:, row] = entry.token_ids[0], entry.start, entry.block_table[block] * self._block_tokens + place
            self._tables[row, : block + 1] = entry.block_table[: block + 1]
            self._lengths[row] = entry.start + 1

    def upload(self) -> None:
        for there, here in zip(self._there, (self._longs, self._ints), strict=True):
            there.copy_(here, non_blocking=True)

    def batch(self) -> DecodeBatch:
        """The tokens on the device."""
        longs, ints = self._there
        tables = ints[: self._tables.size].view(self._tables.shape)
        lengths = ints[self._tables.size :]
        return DecodeBatch(longs[0], longs[1], longs[2], (), tables, lengths, self._block_tokens)
