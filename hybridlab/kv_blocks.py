"""Accounting of the paged KV cache: which block belongs to whom. Storage lives with the engine."""

from __future__ import annotations

from bisect import insort
from math import ceil


class BlockPool:
    """Hands out KV blocks of `block_tokens` tokens each; block ids run from 0 to `num_blocks` - 1.

    Prefers to extend a request's run of neighbouring blocks, since a contiguous context needs no gather.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._free = list(range(num_blocks))
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def free_tokens(self) -> int:
        return len(self._free) * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return ceil(num_tokens / self.block_tokens)

    def grow(self, table: list[int], num_tokens: int) -> None:
        """Extend `table` in place until it holds `num_tokens`; raises `MemoryError` if blocks run out."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            raise MemoryError(f"KV cache: {missing} blocks wanted, {len(self._free)} free")
        for _ in range(missing):
            follower = table[-1] + 1 if table else -1
            if not (0 <= follower < self.num_blocks and self._is_free[follower]):
                follower = self._start_of_run(missing)
            self._free.remove(follower)
            self._is_free[follower] = 0
            table.append(follower)

    def release(self, table: list[int]) -> None:
        """Return all blocks of `table` and empty it."""
        for block in table:
            if self._is_free[block]:
                raise ValueError(f"KV block {block} is released twice")
            self._is_free[block] = 1
            insort(self._free, block)
        table.clear()

    def _start_of_run(self, length: int) -> int:
        """First block of the first free run of `length` blocks, or of the longest run."""
        best, best_length = self._free[0], 0
        start, previous = self._free[0], self._free[0] - 1
        for block in self._free:
            if block != previous + 1:
                start = block
            previous = block
            if block - start + 1 > best_length:
                best, best_length = start, block - start + 1
                if best_length >= length:
                    break
        return best
