"""The state machine of `serving_machine`, with a KV cache for each worker."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from serving_machine import BLOCK, WORKERS, Serving

from hybridlab.kv_blocks import BlockPool
from hybridlab.strategies.scheduler.paper import Paper
from hybridlab.worker_pools import KVPools, WorkerPools


class HandingOver(Serving):
    """Worker "prefill" computes prompts in a cache of its own, and leaves them for "decode"; each may be lost alone."""

    replays = 1
    piece_blocks = 2
    drains = Paper(9, chunk_tokens=3)

    def make_pools(self, num_blocks: int) -> KVPools:
        pools = {worker: BlockPool(num_blocks, BLOCK) for worker in WORKERS}
        return WorkerPools(pools, frozenset({"prefill"}), BlockPool(num_blocks, BLOCK), self.piece_blocks)

    @precondition(lambda self: bool(getattr(self, "drawn", None)))
    @rule(worker=st.sampled_from((*WORKERS, "")))
    def lose(self, worker: str) -> None:
        """Now and then one worker is lost."""
        if worker:
            self._lose(worker)
            self.queue.lose_cache(worker)

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def prompts_alone_are_computed_on_prefill(self) -> None:
        batch = self.flying.get("prefill")
        assert batch is None or all(entry.fetch is None for entry in batch.entries)
        assert all(entry.leave is None for entry in getattr(self.flying.get("decode"), "entries", ()))

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def others_wait_for_one_piece_at_most(self) -> None:
        batch = self.flying.get("decode")
        if batch is None:
            return
        sizes = [len(entry.fetch.blocks) if entry.fetch is not None else 0 for entry in batch.entries]
        pieces = [len(entry.fetch.blocks) if entry.fetch is not None else 0 for entry in batch.brings]
        assert pieces in ([], [self.piece_blocks])
        assert min(sizes) > self.piece_blocks or max(sizes) <= self.piece_blocks
        assert batch.step.tokens.keys() == {entry.id for entry in batch.entries}
