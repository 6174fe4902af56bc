"""From the rows of a workload to requests with token ids; ids are seeded per request or per shared block.

Two schedulers given the same workload see the same prompts: the ids of request i depend on (seed, i) alone, those of
a shared block on (seed, id of the block) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hybridlab.errors import ConfigError
from hybridlab.request import Request, Sampling
from hybridlab.workload.base import Row, WorkloadBase
from hybridlab.workload.streams import BLOCK, stream

MAX_PROMPT_TOKENS = 1_000_000_000
"""Of all requests together: they lie in memory, 8 bytes a token and more."""
MAX_ARRIVAL_S = 1e9
INTERNED_VOCAB = 2**20


def load_rows(workload: WorkloadBase, base: Path) -> list[Row]:
    """The checked rows of a workload, before lengths are scaled and clipped; relative paths start at `base`.

    Raises ConfigError naming the trace file, the line or the column, and what was expected.
    """
    rows = workload.rows(base)
    largest = Row(0.0, max(row.prompt_tokens for row in rows), max(row.output_tokens for row in rows))
    total = sum(workload.lengths(row)[0] for row in rows) if workload.lengths(largest)[0] * len(rows) > 10**9 else 0
    if total > MAX_PROMPT_TOKENS:
        raise ConfigError(
            f"workload: {total:,} prompt tokens in all; expected at most {MAX_PROMPT_TOKENS:,} (fewer requests, or a"
            " larger length_scale)"
        )
    late = max(row.arrival_s for row in rows)
    if not late <= MAX_ARRIVAL_S:
        raise ConfigError(f"workload: a request arrives at {late:g} s; expected at most {MAX_ARRIVAL_S:g}")
    return rows


def content_hash(workload: WorkloadBase, base: Path) -> str | None:
    """Hash of the file, archive or folder that a workload reads; None for synthetic ones. Raises ConfigError."""
    return workload.content_hash(base)


def make_requests(workload: WorkloadBase, vocab: int, *, base: Path | None = None) -> list[Request]:
    """The requests in the order of the workload, ids "r00000" and up; token ids are uniform over [0, vocab).

    Relative trace paths start at `base` (default: the working directory). Raises ConfigError.
    """
    rows = load_rows(workload, base or Path())
    as_tuple = _interned(vocab)
    requests = []
    for index, row in enumerate(rows):
        prompt_tokens, output_tokens = workload.lengths(row)
        rng = np.random.default_rng([workload.seed, index])
        ids = _prompt(workload, row, prompt_tokens, vocab, rng)
        requests.append(
            Request(
                id=request_id(index),
                prompt=as_tuple(ids),
                max_tokens=output_tokens,
                arrival_s=row.arrival_s,
                sampling=Sampling(seed=int(rng.integers(2**31)), **workload.sampling.model_dump()),
                after=None if row.after is None else request_id(row.after),
                continues=row.continues,
                timeout_s=workload.timeout_s,
            )
        )
    return requests


def request_id(index: int) -> str:
    return f"r{index:05d}"


def warmup_requests(requests: Sequence[Request], count: int, vocab: int) -> list[Request]:
    """`count` requests with the lengths of the first ones, all at time 0, with other token ids.

    Other ids, so that a warm-up can never fill a prefix cache for the measured requests: no measured prompt begins
    with the first token of a warm-up, unless every token of the vocabulary begins one.
    """
    taken = {request.prompt[0] for request in requests}
    result = []
    for index in range(count):
        like = requests[index % len(requests)]
        rng = np.random.default_rng([0x3A3A, index])
        ids = rng.integers(0, vocab, len(like.prompt)).tolist()
        if ids[0] in taken and len(taken) < vocab:
            ids[0] = next(token for step in range(vocab) if (token := (ids[0] + step) % vocab) not in taken)
        result.append(Request(id=f"warmup{index:05d}", prompt=tuple(ids), max_tokens=like.max_tokens))
    return result


def _prompt(workload: WorkloadBase, row: Row, length: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [length]: the shared blocks as far as they reach, then ids from `rng`."""
    parts, end = [], 0
    for number, block in enumerate(row.blocks, start=1):
        start, end = end, min(workload.prompt_end(number * row.block_tokens), length)
        parts.append(stream(workload.seed, BLOCK, block).integers(0, vocab, end - start))
        if end == length:
            break
    return np.concatenate([*parts, rng.integers(0, vocab, length - end)])


def _interned(vocab: int) -> Callable[[np.ndarray], tuple[int, ...]]:
    """Makes tuples of ids; for usual vocabularies equal ids are one object, which saves four fifths of the memory."""
    if vocab > INTERNED_VOCAB:
        return lambda ids: tuple(ids.tolist())
    objects = np.arange(vocab).astype(object)
    return lambda ids: tuple(objects[ids].tolist())
