"""Steps and what came of them as bytes; numbers are little-endian, and all are checked before they are used.

A step is a head, an `_ENTRY` per request, all their token ids and all their block tables. Its result is a head, a token
per entry (-1: none was drawn) and the spans: which op, start and end. Requests go by their place in the step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from hybridlab.batch import Entry, StepBatch
from hybridlab.engine.channel import ProtocolError
from hybridlab.plans import Op, Program, RequestId, Span, StepPlan
from hybridlab.request import Sampling
from hybridlab.spec import ModelSpec

_HEAD = struct.Struct("<IIIIBd")  # program, entries, tokens, blocks, whether routers ask, start of the clock
_ENTRY = struct.Struct("<qIIddQB")  # start, tokens, blocks, temperature, top_p, seed, whether a token is drawn
_RESULT = struct.Struct("<II")  # entries, spans
_CHOICE = struct.Struct("<IIIII")  # layer, first entry, entries, tokens, experts of a token


@dataclass(frozen=True)
class Step:
    """A step as a worker receives it. `asks`: its routers' choices go to the parent first."""

    number: int
    """What its program is called."""
    program: Program
    batch: StepBatch
    clock_start_s: float
    asks: bool


def pack_step(number: int, entries: Sequence[Entry], clock_start_s: float, asks: bool) -> bytes:
    """`entries` for the program that is called `number`."""
    rows = [
        _ENTRY.pack(
            entry.start, len(entry.token_ids), len(entry.block_table), entry.sampling.temperature,
            entry.sampling.top_p, entry.sampling.seed % 2**64, entry.wants_token,
        )
        for entry in entries
    ]  # fmt: skip
    tokens = np.array([token for entry in entries for token in entry.token_ids], "<i4")
    blocks = np.array([block for entry in entries for block in entry.block_table], "<i4")
    head = _HEAD.pack(number, len(rows), len(tokens), len(blocks), asks, clock_start_s)
    return b"".join((head, *rows, tokens.tobytes(), blocks.tobytes()))


def unpack_step(
    body: memoryview, programs: Mapping[int, Program], model: ModelSpec, num_blocks: int, block_tokens: int
) -> Step:
    """Raises `ProtocolError` for a step that is not whole, or names what this worker does not have."""
    if len(body) < _HEAD.size:
        raise ProtocolError(f"a step of {len(body)} bytes")
    number, num_entries, num_tokens, num_table, asks, clock_start_s = _HEAD.unpack_from(body)
    start = _HEAD.size + num_entries * _ENTRY.size
    if len(body) != start + 4 * (num_tokens + num_table):
        raise ProtocolError(f"a step of {len(body)} bytes for {num_entries} requests")
    if number not in programs:
        raise ProtocolError(f"a step of program {number}, which was never sent")
    program = programs[number]
    # Lists, not arrays: a decode step has few of each.
    rows = list(_ENTRY.iter_unpack(body[_HEAD.size : start]))
    numbers = np.frombuffer(body, "<i4", offset=start).tolist()
    tokens, blocks = numbers[:num_tokens], numbers[num_tokens:]
    if sum(row[1] for row in rows) != num_tokens or sum(row[2] for row in rows) != num_table:
        raise ProtocolError(f"{num_tokens} tokens and {num_table} blocks, which is not what the requests count")
    if num_entries < program.shape.num_microbatches or not all(row[1] for row in rows):
        raise ProtocolError(f"{num_entries} requests of a step with {program.shape.num_microbatches} microbatches")
    if not 0 <= min(tokens) <= max(tokens) < model.vocab:
        raise ProtocolError(f"tokens {min(tokens)} to {max(tokens)} of {model.vocab}")
    if blocks and not 0 <= min(blocks) <= max(blocks) < num_blocks:
        raise ProtocolError(f"KV blocks {min(blocks)} to {max(blocks)} of {num_blocks}")
    if any(row[0] < 0 or row[0] + row[1] > row[2] * block_tokens for row in rows):
        raise ProtocolError("a request beyond the end of its KV blocks")
    entries = tuple(_entries(rows, tokens, blocks))
    plan = StepPlan(program.shape.role, {entry.id: len(entry.token_ids) for entry in entries})
    return Step(number, program, StepBatch(program.shape.worker, plan, entries), clock_start_s, bool(asks))


def _entries(rows: Iterable[tuple], tokens: list[int], blocks: list[int]) -> Iterator[Entry]:
    token, block = 0, 0
    for index, (start, num_tokens, num_blocks, temperature, top_p, seed, wants) in enumerate(rows):
        yield Entry(
            str(index),
            tokens[token : token + num_tokens],
            start,
            tuple(blocks[block : block + num_blocks]),
            Sampling(temperature, top_p, seed),
            bool(wants),
        )
        token, block = token + num_tokens, block + num_blocks


def pack_result(step: Step, drawn: Mapping[RequestId, int], spans: Sequence[Span], place: Mapping[int, int]) -> bytes:
    """`place` are the places of the program's ops, by their ids."""
    tokens = np.array([drawn.get(entry.id, -1) for entry in step.batch.entries], "<i4")
    ops = np.array([place[span.op.id] for span in spans], "<u4")
    times = np.array([time_s for span in spans for time_s in (span.start_s, span.end_s)], "<f8")
    return b"".join((_RESULT.pack(len(tokens), len(ops)), tokens.tobytes(), ops.tobytes(), times.tobytes()))


def unpack_result(
    body: memoryview, entries: Sequence[Entry], program: Program
) -> tuple[dict[RequestId, int], Sequence[Span]]:
    """Tokens by request and spans; raises `ProtocolError` for a result of another step."""
    if len(body) < _RESULT.size:
        raise ProtocolError(f"a result of {len(body)} bytes")
    num_entries, num_spans = _RESULT.unpack_from(body)
    if num_entries != len(entries) or len(body) != _RESULT.size + 4 * num_entries + 20 * num_spans:
        raise ProtocolError(f"a result of {len(body)} bytes for {num_entries} requests")
    tokens = np.frombuffer(body, "<i4", num_entries, _RESULT.size).tolist()
    ops = np.frombuffer(body, "<u4", num_spans, _RESULT.size + 4 * num_entries)
    times = np.frombuffer(body, "<f8", offset=_RESULT.size + 4 * (num_entries + num_spans)).reshape(-1, 2)
    if num_spans and ops.max() >= len(program.ops):
        raise ProtocolError(f"a span of op {ops.max()} of {len(program.ops)}")
    drawn = {entry.id: token for entry, token in zip(entries, tokens, strict=True) if entry.wants_token}
    if any(token < 0 for token in drawn.values()):
        raise ProtocolError("a token that was to be drawn is missing")
    return drawn, Spans(program.ops, ops, times)


def pack_blocks(blocks: Sequence[int]) -> bytes:
    return np.array(blocks, "<i4").tobytes()


def unpack_blocks(body: memoryview, num_blocks: int) -> list[int]:
    """Raises `ProtocolError` for KV blocks that there are not."""
    if len(body) % 4 or not len(body):
        raise ProtocolError(f"KV blocks in {len(body)} bytes")
    blocks = np.frombuffer(body, "<i4").tolist()
    if not 0 <= min(blocks) <= max(blocks) < num_blocks:
        raise ProtocolError(f"KV blocks {min(blocks)} to {max(blocks)} of {num_blocks}")
    return blocks


@dataclass(frozen=True, eq=False)
class Spans(Sequence[Span]):
    """Spans that are made when they are looked at: a run keeps those of its last steps alone."""

    ops: tuple[Op, ...]
    places: np.ndarray
    """uint32 [spans], into `ops`."""
    times_s: np.ndarray
    """float64 [spans, 2]: start and end."""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | Sequence[Span]:
        if isinstance(index, slice):
            return Spans(self.ops, self.places[index], self.times_s[index])
        return Span(self.ops[self.places[index]], *self.times_s[index].tolist())

    def __iter__(self) -> Iterator[Span]:
        for place, (start_s, end_s) in zip(self.places.tolist(), self.times_s.tolist(), strict=True):
            yield Span(self.ops[place], start_s, end_s)


def pack_choice(layer: int, entries: Sequence[Entry], ids: np.ndarray) -> bytes:
    """What the router of `layer` chose for neighbouring entries of a step: int32 [T, K]."""
    return _CHOICE.pack(layer, int(entries[0].id), len(entries), *ids.shape) + np.ascontiguousarray(ids, "<i4").data


def unpack_choice(body: memoryview, entries: Sequence[Entry]) -> tuple[int, Sequence[Entry], np.ndarray]:
    """The layer, those of the step's `entries` that it is for, and int32 [T, K]; raises `ProtocolError`."""
    if len(body) < _CHOICE.size:
        raise ProtocolError(f"a choice of {len(body)} bytes")
    layer, first, count, num_tokens, num_chosen = _CHOICE.unpack_from(body)
    asked = entries[first : first + count]
    whole = len(body) == _CHOICE.size + 4 * num_tokens * num_chosen
    if not whole or len(asked) != count or sum(len(entry.token_ids) for entry in asked) != num_tokens:
        raise ProtocolError(f"a choice of {len(body)} bytes for {count} requests")
    return layer, asked, np.frombuffer(body, "<i4", offset=_CHOICE.size).reshape(num_tokens, num_chosen)
