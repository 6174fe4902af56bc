"""Accounting of the paged KV cache: which block belongs to whom. Storage lives with the engine."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import ceil


class BlockPool:
    """Hands out KV blocks of `block_tokens` tokens each; block ids run from 0 to `num_blocks` - 1.

    A block may be in several tables (`share`); it is free once no table has it. A free block that was marked by
    `keep` holds content that may be wanted again: it is handed out last, the one released longest ago first, and
    `on_evict` is told. Prefers to extend a request's run of neighbouring blocks, since a contiguous context needs
    no gather.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.on_evict: Callable[[int], None] = lambda block: None
        self._free = list(range(num_blocks))
        self._is_free = bytearray(b"\x01" * num_blocks)
        self._refs = [0] * num_blocks
        self.num_shared = 0
        """Blocks that are in more than one table."""
        self._is_kept = bytearray(num_blocks)
        self._kept: OrderedDict[int, None] = OrderedDict()  # kept and in no table, least recently released first

    @property
    def free_tokens(self) -> int:
        return (len(self._free) + len(self._kept)) * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return ceil(num_tokens / self.block_tokens)

    def holders(self, block: int) -> int:
        """In how many tables the block is."""
        return self._refs[block]

    def grow(self, table: list[int], num_tokens: int) -> None:
        """Extend `table` in place until it holds `num_tokens`; raises `MemoryError` if blocks run out."""
        if len(table) * self.block_tokens >= num_tokens:
            return
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > len(self._free) + len(self._kept):
            raise MemoryError(f"KV cache: {missing} blocks wanted, {len(self._free) + len(self._kept)} free")
        while missing > len(self._free):
            self._evict()
        for _ in range(missing):
            follower = table[-1] + 1 if table else -1
            if not (0 <= follower < self.num_blocks and self._is_free[follower]):
                follower = self._start_of_run(missing)
            self._free.remove(follower)
            self._is_free[follower] = 0
            self._refs[follower] = 1
            table.append(follower)

    def share(self, table: list[int], blocks: Sequence[int]) -> None:
        """Append kept blocks to `table`; they stay until every table that has them is released."""
        for block in blocks:
            if not self._is_kept[block]:
                raise ValueError(f"KV block {block} holds nothing to share")
            self._kept.pop(block, None)
            self._refs[block] += 1
            self.num_shared += self._refs[block] == 2
            table.append(block)

    def replace(self, table: list[int], index: int, block: int) -> None:
        """Put a kept block in the place of one of the table's own, which returns."""
        own = [table[index]]
        self.share(shared := [], [block])
        table[index] = shared[0]
        self.release(own)

    def keep(self, block: int) -> None:
        """The content of this block, which is in a table, may be wanted again after its release."""
        self._is_kept[block] = 1

    def release(self, table: list[int]) -> None:
        """Return all blocks of `table` and empty it."""
        # From the end, so that of a kept sequence the tail is evicted before what it builds on.
        for block in reversed(table):
            if self._refs[block] == 0:
                raise ValueError(f"KV block {block} is released twice")
            self._refs[block] -= 1
            self.num_shared -= self._refs[block] == 1
            if self._refs[block] > 0:
                continue
            if self._is_kept[block]:
                self._kept[block] = None
            else:
                self._add_free(block)
        table.clear()

    def evict_kept(self) -> None:
        """Forget the content of every kept block that is in no table."""
        while self._kept:
            self._evict()

    def _evict(self) -> None:
        block, _ = self._kept.popitem(last=False)
        self._is_kept[block] = 0
        self._add_free(block)
        self.on_evict(block)

    def _add_free(self, block: int) -> None:
        self._is_free[block] = 1
        insort(self._free, block)

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
