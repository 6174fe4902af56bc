"""Reuse of KV blocks by requests whose prompts begin alike (vLLM's automatic prefix caching, by block hash).

A full block is known by a digest of its tokens and of all tokens before it. A block is entered only if the one
before it in the same table is the entered one, so every table that has a block also has what it builds on: the
blocks of a prefix are entered from its start, and evicted from its end.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from hybridlab.kv_blocks import BlockPool

DIGEST_BYTES = 16


class Prefixes(Protocol):
    """What the queue asks about the KV blocks of earlier tokens."""

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int]) -> None:
        """Append the keys of the full blocks of `tokens` that `keys` does not have yet."""
        ...

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `keys`."""
        ...

    def enter(self, keys: Sequence[bytes], table: Sequence[int], num_entered: int) -> int:
        """Make the blocks of `table` known that hold `keys`; returns how many from the start are known now.

        `num_entered` of them are known already. Stops at a block whose content another block is known for.
        """
        ...


class NoPrefixes:
    """Every prompt is computed from its first token."""

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int]) -> None:
        pass

    def find(self, keys: Sequence[bytes]) -> list[int]:
        return []

    def enter(self, keys: Sequence[bytes], table: Sequence[int], num_entered: int) -> int:
        return 0


class PrefixCache:
    """Knows the full blocks of one pool by their content, until the pool evicts them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int]) -> None:
        size = self._pool.block_tokens
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            before = keys[-1] if keys else b""
            content = array("q", tokens[start : start + size]).tobytes()
            keys.append(blake2b(before + content, digest_size=DIGEST_BYTES).digest())

    def find(self, keys: Sequence[bytes]) -> list[int]:
        if not keys or keys[0] not in self._block_of:
            return []
        # What is known of a prefix is a beginning of it, so its end can be bisected.
        known = bisect_left(keys, True, key=lambda key: key not in self._block_of)
        return [self._block_of[key] for key in keys[:known]]

    def enter(self, keys: Sequence[bytes], table: Sequence[int], num_entered: int) -> int:
        for key, block in zip(keys[num_entered:], table[num_entered:], strict=False):
            if self._block_of.setdefault(key, block) != block:
                break
            self._key_of[block] = key
            self._pool.keep(block)
            num_entered += 1
        return num_entered

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
