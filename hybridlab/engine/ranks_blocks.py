"""Which KV blocks the first rank has and the others lack, since it computes some steps alone."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlab.batch import Entry


class LoneBlocks:
    """Blocks of `block_tokens` tokens that the first rank wrote alone.

    It takes part in every step, so it has all there is. A step of all ranks is told what of its requests' contexts the
    others lack (`lacking`), whoever wrote it: blocks are shared by requests with the same beginning.
    """

    def __init__(self, block_tokens: int) -> None:
        self._size = block_tokens
        self._alone: set[int] = set()

    def lacking(self, entries: Sequence[Entry]) -> list[int]:
        """What must be given to the other ranks before all of them compute `entries`."""
        if not self._alone:
            return []
        contexts = (entry.block_table[: -(-entry.start // self._size)] for entry in entries)
        return sorted(self._alone.intersection(block for context in contexts for block in context))

    def given(self, blocks: Sequence[int]) -> None:
        self._alone.difference_update(blocks)

    def written(self, entries: Sequence[Entry], *, alone: bool) -> None:
        """The first rank writes, or all have written, the tokens of `entries`."""
        if not alone and not self._alone:
            return
        change = self._alone.update if alone else self._alone.difference_update
        for entry in entries:
            change(entry.block_table[entry.start // self._size : -(-entry.context_tokens // self._size)])
