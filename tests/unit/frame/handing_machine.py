"""The state machine of `serving_machine`, with a KV cache for each worker."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from serving_machine import BLOCK, WORKERS, Serving

from hybridlab.kv_blocks import BlockPool
from hybridlab.worker_pools import KVPools, WorkerPools


class HandingOver(Serving):
    """Worker "one" computes prompts in a cache of its own, and leaves them for worker "two"; each may be lost alone."""

    replays = 1

    def make_pools(self, num_blocks: int) -> KVPools:
        pools = {worker: BlockPool(num_blocks, BLOCK) for worker in WORKERS}
        return WorkerPools(pools, frozenset({"one"}), BlockPool(num_blocks, BLOCK))

    @precondition(lambda self: bool(getattr(self, "drawn", None)))
    @rule(worker=st.sampled_from((*WORKERS, "")))
    def lose(self, worker: str) -> None:
        """Now and then one worker is lost."""
        if worker:
            self._lose(worker)
            self.queue.lose_cache(worker)

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def prompts_alone_are_computed_on_one(self) -> None:
        batch = self.flying.get("one")
        assert batch is None or all(entry.fetch is None for entry in batch.entries)
        assert all(entry.leave is None for entry in getattr(self.flying.get("two"), "entries", ()))
