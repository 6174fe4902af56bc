"""Compiled attention over the paged cache: a step's requests together, and a decoding layer in one call.

Within one tier the bits of a query's result depend on its own context only: not on later tokens, nor on how its prompt
was cut into steps, threads or the other requests. Tiers with VDPBF16PS (AVX-512 BF16) round queries and probabilities
to BF16; sums are float32.

Legend: T tokens, H model width, N query heads, G key/value heads, D head size. BF16 arrays hold bits (uint16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridlab.kernels import Linear, address, native, tier, uses_compiled
from hybridlab.kernels import numpy_twin as kernels_numpy
from hybridlab.kernels.checks import (
    Array,
    check_cached,
    check_entries,
    check_float32,
    check_input,
    check_threads,
    kind_of,
)

PIECE_TOKENS, TASK_ROWS, FEW_ROWS, TASK_BYTES = 512, 192, 64, 72
"""How cython_kernels/attention*.[ch] cut the work: HL_PIECE, TASK_ROWS, FEW_ROWS and sizeof(task) there."""

UNCOMPILED = ("portable", "numpy")
"""Tiers without compiled attention."""


def norm_rope(x: Array, weight: Array, eps: float, cosines: Array, sines: Array) -> NDArray[np.float32]:
    """RMS norm of each head of x float32 [T, N, D] by weight [D], then rotation by cosines and sines [T, D/2].

    Halves of a head are rotated against each other (Llama's layout). Raises ValueError for a wrong argument.
    """
    tokens, heads, size = x.shape if isinstance(x, np.ndarray) and x.ndim == 3 else (0, 0, 0)
    check_float32("x", x, (tokens, heads, size // 2 * 2))
    check_float32("weight", weight, (size,))
    check_float32("cosines", cosines, (tokens, size // 2))
    check_float32("sines", sines, (tokens, size // 2))
    if native is None or not uses_compiled():
        return kernels_numpy.norm_rope(x, weight, eps, cosines, sines)
    out = np.empty_like(x)
    native.norm_rope(address(x), address(weight), eps, address(cosines), address(sines), tokens, heads, size,
                       address(out))  # fmt: skip
    return out


class CachedRuns:
    """Where the requests of a step find their contexts: runs where slots are neighbours, tables elsewhere.

    cached[i] are the slots (a slice or an int64 array) of what the last query of request i sees, from position 0 on;
    its queries are the last queries[i] (default 1) of them, and its rows follow those of the requests before it.
    `slots` int64 [T] is where the tokens of the step are stored.
    """

    def __init__(self, cached: Sequence[slice | Array], slots: Array, queries: Sequence[int] | None = None) -> None:
        self._keep = cached = tuple(cached)  # the arrays: their addresses are in the table
        if not cached:
            raise ValueError("cached: expected at least one request")
        queries = [1] * len(cached) if queries is None else queries
        if len(queries) != len(cached):
            raise ValueError(f"queries: expected {len(cached)} numbers, got {len(queries)}")
        rows, row, highest = [], 0, -1
        for own, number in zip(cached, queries, strict=True):
            count, last = _extent(own)
            if not 1 <= number <= count:
                raise ValueError(f"queries: expected 1 to {count}, the slots of the request, got {number}")
            table, first = (0, own.start) if isinstance(own, slice) else (address(own), 0)
            rows.append((table, first, row, number, count - number))
            row, highest = row + number, max(highest, last)
        if not _are_slots(slots, row) or slots.min() < 0:
            raise ValueError(f"slots: expected {row} contiguous int64 slots >= 0, got {kind_of(slots)}")
        self.table = np.array(rows, np.int64)
        self.tokens, self.last_slot = row, max(highest, int(slots.max()))

    @property
    def decoding(self) -> bool:
        """Whether each request has a single query."""
        return self.tokens == len(self.table)

    def pieces(self) -> Iterator[tuple[int, slice | Array]]:
        """Row of each query and the slots that it sees."""
        for own, (_, first, row, number, start) in zip(self._keep, self.table.tolist(), strict=True):
            for i in range(number):
                seen = start + i + 1
                yield row + i, slice(first, first + seen) if isinstance(own, slice) else own[:seen]


def _are_slots(slots: Any, tokens: int) -> bool:
    good = isinstance(slots, np.ndarray) and slots.dtype == np.int64 and slots.shape == (tokens,)
    return good and slots.flags.c_contiguous


def _extent(cached: slice | Array) -> tuple[int, int]:
    """Number of slots, and the highest."""
    if isinstance(cached, slice):
        if cached.step not in (None, 1) or cached.start is None or not 0 <= cached.start < (cached.stop or 0):
            raise ValueError(f"cached: {cached} is not a run of slots")
        return cached.stop - cached.start, cached.stop - 1
    if not isinstance(cached, np.ndarray) or cached.dtype != np.int64 or cached.ndim != 1 or not cached.size:
        raise ValueError(f"cached: expected a slice or a non-empty int64 array, got {kind_of(cached)}")
    if not cached.flags.c_contiguous or cached.min() < 0:
        raise ValueError("cached: expected contiguous slots >= 0")
    return cached.size, int(cached.max())


def is_compiled(head_dim: int) -> bool:
    """Whether `attend` is compiled for heads of this size; else queries are taken one by one."""
    return uses_compiled() and head_dim % 8 == 0


def workspace_bytes(
    heads: int, groups: int, head_dim: int, threads: int, tokens: int, queries: int | None = None
) -> int:
    """Upper bound of the memory of an `attend` whose requests see `tokens` cached tokens in all.

    A token that two requests share counts twice. `queries` is the most that it computes at once; None: any number.
    """
    per, queries = heads // groups, min(queries or tokens, tokens)
    rows = max(TASK_ROWS, per)  # scores, queries and two results of a task; keys or values laid out
    task = rows * (PIECE_TOKENS + 3 * (head_dim + 16)) + 320 * (head_dim + 64)
    # A request of few queries has a result for each of them and each piece, the last of which may be short.
    results = min(tokens, FEW_ROWS // per * (tokens // PIECE_TOKENS) + queries)
    tasks = groups * (tokens // PIECE_TOKENS + 2 * queries)
    return 4 * (threads * (task + 32) + results * heads * (head_dim + 18)) + TASK_BYTES * tasks + 64


def attend(q: Array, keys: Array, values: Array, runs: CachedRuns, *, threads: int) -> NDArray[np.float32]:
    """Causal attention of the queries q float32 [T, N, D] over their cached keys and values -> [T, N, D].

    keys and values are BF16 bits (uint16) [slots, G, D]; N / G query heads share a key/value head. Compiled if D is a
    multiple of 8. Raises ValueError for a wrong argument.
    """
    if not isinstance(q, np.ndarray) or q.ndim != 3:
        raise ValueError(f"q: expected float32 [T, N, D], got {kind_of(q)}")
    heads = q.shape[1]
    check_entries(keys, values, heads)
    check_float32("q", q, (runs.tokens, heads, keys.shape[2]))
    if runs.last_slot >= len(keys):
        raise ValueError(f"runs: expected slots from 0 to {len(keys) - 1}, got {runs.last_slot}")
    threads, out = check_threads(threads), np.empty_like(q)
    if native is None or not is_compiled(keys.shape[2]):
        for row, seen in runs.pieces():
            out[row] = kernels_numpy.attend_one(q[row], keys[seen], values[seen])
        return out
    native.attend(
        tier(), address(q), address(keys), address(values), address(runs.table), len(runs.table), heads,
        keys.shape[1], keys.shape[2], address(out), threads,
    )  # fmt: skip
    return out


def attend_one(q: Array, keys: Array, values: Array, cached: slice | Array, *, threads: int) -> NDArray[np.float32]:
    """One query's attention: q float32 [N, D] over the slots `cached` (a slice or int64 array) of keys and values."""
    if not isinstance(q, np.ndarray) or q.ndim != 2:
        raise ValueError(f"q: expected float32 [N, D], got {kind_of(q)}")
    check_cached(keys, values, cached, len(q))
    check_float32("q", q, (len(q), keys.shape[2]))
    return attend(q[None], keys, values, CachedRuns([cached], np.zeros(1, np.int64)), threads=threads)[0]


class AttentionStep:
    """A whole attention layer for tokens that decode, in one compiled call; see `attention_step`."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear, norms: Sequence[Array], eps: float) -> None:
        self._keep = (q, k, v, o, *norms)
        self._hidden, self._head_dim = q.shape[1], _head_dim(q, k, v, o, norms)
        self._heads, self._groups = q.shape[0] // self._head_dim, k.shape[0] // self._head_dim
        if native is None or q.tier in UNCOMPILED or self._head_dim % 8:
            raise ValueError(f"q: no compiled attention of heads of {self._head_dim} in tier {q.tier}")
        matrices = (q.native_parts, k.native_parts, v.native_parts, o.native_parts)
        addresses = (address(norms[0]), address(norms[1]), address(norms[2]))
        self._native = native.AttentionStep(q.tier, matrices, addresses, eps, self._heads, self._groups, self._head_dim)

    def __call__(
        self,
        x: Array,
        cosines: Array,
        sines: Array,
        keys: Array,
        values: Array,
        slots: Array,
        runs: CachedRuns,
        *,
        threads: int,
    ) -> NDArray[np.float32]:
        """x float32 [T, H] -> x + attention(x), [T, H]; writes keys and values, BF16 [slots, G, D], at `slots` [T].

        `runs` says what each token sees, itself included; cosines and sines are float32 [T, D/2].
        """
        tokens = check_input("x", x, np.float32, self._hidden)
        check_float32("cosines", cosines, (tokens, self._head_dim // 2))
        check_float32("sines", sines, (tokens, self._head_dim // 2))
        check_entries(keys, values, self._heads)
        if keys.shape[1:] != (self._groups, self._head_dim):
            raise ValueError(f"keys: expected [slots, {self._groups}, {self._head_dim}], got {list(keys.shape)}")
        if not keys.flags.writeable or not values.flags.writeable:
            raise ValueError(f"{'values' if keys.flags.writeable else 'keys'}: expected a writeable array")
        if not _are_slots(slots, tokens):
            raise ValueError(f"slots: expected contiguous int64 [{tokens}], got {kind_of(slots)}")
        if runs.tokens != tokens or not runs.decoding or runs.last_slot >= len(keys):
            raise ValueError(f"runs: expected {tokens} requests of one token and slots below {len(keys)}")
        if slots.view(np.uint64).max() >= len(keys):  # negative ones too: one pass
            raise ValueError(f"slots: expected slots from 0 to {len(keys) - 1}, got {slots.min()} to {slots.max()}")
        out = np.empty_like(x)
        self._native.run(
            address(x), address(cosines), address(sines), tokens, address(keys), address(values), address(slots),
            address(runs.table), address(out), check_threads(threads),
        )  # fmt: skip
        return out


def _head_dim(q: Linear, k: Linear, v: Linear, o: Linear, norms: Sequence[Array]) -> int:
    """D, after checking that the layers and norms of an attention layer fit together."""
    if len(norms) != 3 or not isinstance(norms[1], np.ndarray) or norms[1].ndim != 1 or not norms[1].size:
        raise ValueError("norms: expected arrays for the input [H], q [D] and k [D]")
    (rows, hidden), groups, size = q.shape, k.shape[0], norms[1].size
    for name, norm, length in zip(("input norm", "q norm", "k norm"), norms, (hidden, size, size), strict=True):
        check_float32(name, norm, (length,))
    if groups % size:
        raise ValueError(f"k: expected rows in heads of {size}, got {groups}")
    if rows % groups:
        raise ValueError(f"q: expected rows in a multiple of the {groups} of k, got {rows}")
    for name, layer, shape in (("k", k, (groups, hidden)), ("v", v, (groups, hidden)), ("o", o, (hidden, rows))):
        if layer.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(layer.shape)}")
        if layer.tier != q.tier:
            raise ValueError(f"{name}: expected the tier {q.tier} of q, got {layer.tier}")
    return size


def attention_step(
    q: Linear, k: Linear, v: Linear, o: Linear, norms: Sequence[Array], eps: float
) -> AttentionStep | None:
    """Join the linear layers and norms (input [H], q [D], k [D]) of an attention layer; None without the kernels.

    Then the caller composes the layer of `rms_norm`, `Linear`, `norm_rope` and `attend`, its twin.
    Raises ValueError for a layer or norm that does not fit.
    """
    if _head_dim(q, k, v, o, norms) % 8 or native is None or q.tier in UNCOMPILED:
        return None
    return AttentionStep(q, k, v, o, norms, eps)
