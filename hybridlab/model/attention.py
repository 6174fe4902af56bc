"""Causal grouped-query attention on the CPU: compiled where the numerics have it, else cut into blocks of queries.

Shape suffixes: T queries, C cached tokens, N query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from hybridlab.model.base import KVStore, MicroBatch
from hybridlab.model.numerics import QUERY_BLOCK, Numerics

PARALLEL_FROM = 2**23
"""Multiply-adds above which a thread hand-off (50 us) is small beside the work."""


class Attention:
    """Attends every request of a microbatch; large work is spread over `threads` threads.

    For what is not compiled: threads of our own, each with single-threaded torch, since OpenMP's would spin into the
    kernels' pool.
    """

    def __init__(self, numerics: Numerics, threads: int) -> None:
        self._numerics = numerics
        self._pool = ThreadPoolExecutor(threads, "hybridlab-attention", torch.set_num_threads, (1,))
        self._threads = threads

    def __call__(self, q_TND: torch.Tensor, cache: KVStore, layer: int, batch: MicroBatch) -> torch.Tensor:
        """q [T, N, D] float32 against this layer's cached keys and values -> [T, N, D] float32."""
        keys, values = cache.entries(layer)
        compiled = self._numerics.attend(q_TND, keys, values, batch)
        if compiled is not None:
            return compiled
        out_TND = torch.empty_like(q_TND)
        work: list[Callable[[], None]] = []
        size = 0
        for context in batch.contexts:
            if context.last - context.first == 1:
                one = self._numerics.attend_one(q_TND[context.first], keys, values, context.cached)
                out_TND[context.first] = one
                continue
            k_GDC = self._numerics.up(keys[context.cached]).permute(1, 2, 0)
            v_GCD = self._numerics.up(values[context.cached]).transpose(0, 1)
            for first in range(context.first, context.last, QUERY_BLOCK):
                rows = slice(first, min(first + QUERY_BLOCK, context.last))
                seen = context.start + rows.stop - context.first
                size += (rows.stop - first) * seen * q_TND.shape[1] * q_TND.shape[2]
                work.append(
                    lambda r=rows, k=k_GDC[:, :, :seen], v=v_GCD[:, :seen]: self._block(q_TND[r], k, v, out_TND[r])
                )
        if self._threads > 1 and len(work) > 1 and size > PARALLEL_FROM:
            # The last blocks of a prompt see the most keys: longest first.
            list(self._pool.map(lambda piece: piece(), reversed(work)))
        else:
            for piece in work:
                piece()
        return out_TND

    def _block(self, q_TND: torch.Tensor, k_GDC: torch.Tensor, v_GCD: torch.Tensor, out_TND: torch.Tensor) -> None:
        """Queries of neighbouring positions, the last of which sees all keys given."""
        num_queries, _, head_dim = q_TND.shape
        groups, _, seen = k_GDC.shape
        with torch.inference_mode():
            # The query heads that share a key/value head are rows of one product.
            q_GRD = self._numerics.up(q_TND).view(num_queries, groups, -1, head_dim).transpose(0, 1)
            q_GRD = q_GRD.reshape(groups, -1, head_dim) * head_dim**-0.5
            scores = torch.bmm(q_GRD, k_GDC)
            hidden = torch.ones(num_queries, seen, dtype=torch.bool).triu_(seen - num_queries + 1)
            scores.view(groups, num_queries, -1, seen).masked_fill_(hidden[None, :, None], float("-inf"))
            out = torch.bmm(scores.softmax(-1), v_GCD)
            out_TND.copy_(out.view(groups, num_queries, -1, head_dim).transpose(0, 1).reshape(out_TND.shape))
