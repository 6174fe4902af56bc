"""Mooncake's traces of Kimi (kvcache-ai/Mooncake, FAST25-release/traces): JSON lines, with hashes of prefixes.

Qin et al., "Mooncake: Trading More Storage for Less Computation - A KVCache-centric Architecture for Serving LLM
Chatbot", FAST '25.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from hybridlab.errors import ConfigError
from hybridlab.workload.base import Count, Row
from hybridlab.workload.reading import json_object, number, shown, text_lines, token_count
from hybridlab.workload.streams import SPREAD, stream
from hybridlab.workload.trace import RowTrace

KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


class MooncakeWorkload(RowTrace):
    """Keys timestamp (ms), input_length, output_length, hash_ids (one per block of `block_tokens`, the last partial).

    Equal hash ids give equal tokens: those of a block depend on (seed, hash id) alone, so two prompts have in common
    what their leading equal ids say. With `length_scale` s, block i covers the tokens ceil(i * block_tokens / s) to
    ceil((i + 1) * block_tokens / s), cut at the end of the prompt: shared prefixes shrink as much as the prompts, which
    have ceil(input_length / s) tokens. A cache of whole KV blocks finds a single shared block only while it is as long
    as one of them: s up to 32 with KV blocks of 16 tokens.

    The published arrivals lie on a grid of three seconds. They are spread (uniformly, seeded) over the `spread_s`
    seconds that follow, never past the next time stamp, so their order stays; 0 keeps them as they are.
    """

    kind: Literal["mooncake"]
    spread_s: float = Field(default=3.0, ge=0)
    block_tokens: Count = 512
    time_key: ClassVar[str] = "timestamp"

    def records(self, path: Path) -> Iterator[tuple[str, str]]:
        for line, text in enumerate(text_lines(path), start=1):
            if text.strip():
                yield f"{path}: line {line}", text

    def parse(self, record: str, where: str) -> Row:
        values = json_object(record, where, KEYS)
        for key in KEYS[:3]:
            if isinstance(values[key], str):
                raise ConfigError(f"{where}: {key} {shown(values[key])}: expected a number, got text")
        prompt, output = (token_count(values[key], f"{where}: {key}") for key in KEYS[1:3])
        return Row(
            arrival_s=number(values["timestamp"], f"{where}: timestamp") / 1000,
            prompt_tokens=prompt,
            output_tokens=output,
            blocks=self._blocks(values["hash_ids"], prompt, where),
            block_tokens=self.block_tokens,
        )

    def rows(self, base: Path) -> list[Row]:
        return self.timed(self._spread(self.chosen(base)))

    def _blocks(self, ids: Any, prompt: int, where: str) -> tuple[int, ...]:
        if not isinstance(ids, list) or not all(type(block) is int and 0 <= block < 2**64 for block in ids):
            raise ConfigError(f"{where}: hash_ids {shown(ids)}: expected a list of whole numbers")
        needed = -(-prompt // self.block_tokens)
        if len(ids) != needed:
            raise ConfigError(
                f"{where}: {len(ids)} hash_ids; input_length {prompt} has {needed} blocks of {self.block_tokens} tokens"
            )
        return tuple(ids)

    def _spread(self, rows: list[Row]) -> list[Row]:
        if not self.spread_s:
            return rows
        rng = stream(self.seed, SPREAD)
        groups = [list(group) for _, group in groupby(rows, key=lambda row: row.arrival_s)]
        starts = [group[0].arrival_s for group in groups]
        ends = [*starts[1:], starts[-1] + self.spread_s]
        result = []
        for group, start, end in zip(groups, starts, ends, strict=True):
            offsets_s = np.sort(rng.random(len(group))) * min(self.spread_s, end - start)
            result += [row._replace(arrival_s=start + s) for row, s in zip(group, offsets_s.tolist(), strict=True)]
        return result
