"""Reuse of KV blocks by requests whose prompts begin alike (vLLM's automatic prefix caching, by block hash).

A full block is known by a digest of its tokens and of all tokens before it. Of two blocks that were computed for the
same tokens one is known, and takes the place of the other. So every table that has a known block also has those that
it builds on: the blocks of a prefix are entered from its start, and evicted from its end.
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
    """What the queue asks about the KV blocks of earlier tokens. What is found is the same while `version` is."""

    version: int

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int]) -> None:
        """Append the keys of the full blocks of `tokens` that `keys` does not have yet."""
        ...

    def count(self, keys: Sequence[bytes], most: int, guess: int) -> int:
        """How many of the first `most` keys are known, from the start; `guess` is the last answer."""
        ...

    def block(self, key: bytes) -> int:
        """The block of a known key."""
        ...

    def enter(self, keys: Sequence[bytes], table: list[int], num_entered: int) -> int:
        """Make the blocks of `table` known that hold `keys`; `num_entered` of them are. Returns how many are then.

        A block whose content another one is known for is replaced by that one.
        """
        ...


class NoPrefixes:
    """Every prompt is computed from its first token."""

    version = 0

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int]) -> None:
        pass

    def count(self, keys: Sequence[bytes], most: int, guess: int) -> int:
        return 0

    def block(self, key: bytes) -> int:
        raise KeyError(key)

    def enter(self, keys: Sequence[bytes], table: list[int], num_entered: int) -> int:
        return 0


class PrefixCache:
    """Knows the full blocks of one pool by their content, until the pool evicts them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool, self.version = pool, 0
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int]) -> None:
        size = self._pool.block_tokens
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            before = keys[-1] if keys else b""
            content = array("q", tokens[start : start + size]).tobytes()
            keys.append(blake2b(before + content, digest_size=DIGEST_BYTES).digest())

    def count(self, keys: Sequence[bytes], most: int, guess: int) -> int:
        known, most = self._block_of, min(most, len(keys))
        # What is known of a prefix is a beginning of it, so its end is where it was, or can be bisected.
        if guess <= most and (not guess or keys[guess - 1] in known) and (guess == most or keys[guess] not in known):
            return guess
        return bisect_left(range(most), True, key=lambda index: keys[index] not in known)

    def block(self, key: bytes) -> int:
        return self._block_of[key]

    def enter(self, keys: Sequence[bytes], table: list[int], num_entered: int) -> int:
        for index in range(num_entered, min(len(keys), len(table))):
            self.version += 1
            key, block = keys[index], table[index]
            known = self._block_of.setdefault(key, block)
            if known == block:
                self._key_of[block] = key
                self._pool.keep(block)
            else:
                self._pool.replace(table, index, known)
        return min(len(keys), len(table))

    def _forget(self, block: int) -> None:
        self.version += 1
        del self._block_of[self._key_of.pop(block)]
