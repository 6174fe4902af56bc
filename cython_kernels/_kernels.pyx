# cython: language_level=3, boundscheck=False, wraparound=False, binding=True
"""Thin wrapper of the C kernels. It trusts its arguments: hybridlab/kernels.py checks them and keeps arrays alive."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec


cdef extern from "kernels.h" nogil:
    ctypedef struct hl_matrix:
        const uint8_t *data
        const uint8_t *scale
        int64_t n, k
    ctypedef struct hl_moe:
        int64_t experts, h, i
        const hl_matrix *gate
        const hl_matrix *up
        const hl_matrix *down
    ctypedef struct hl_tier:
        const char *name
    const hl_tier *hl_tier_at(int index)
    int hl_linear(const hl_tier *, const hl_matrix *, const float *, int64_t, float *, int)
    int hl_moe_forward(const hl_tier *, const hl_moe *, const float *, int64_t, int64_t, const int32_t *,
                       const float *, float *, int)
    uint64_t hl_read(const hl_tier *, const uint8_t *, int64_t, int)


cdef double _native_s = 0.0


cdef double _now() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return ts.tv_sec + 1e-9 * ts.tv_nsec


cdef const hl_tier *_tier(str name) except NULL:
    cdef int i = 0
    cdef const hl_tier *tier = hl_tier_at(0)
    while tier != NULL:
        if tier.name.decode() == name:
            return tier
        i += 1
        tier = hl_tier_at(i)
    raise ValueError(f"tier: {name!r} cannot run on this CPU")


cdef hl_matrix _matrix(object parts) noexcept:
    cdef hl_matrix m
    cdef uintptr_t data = parts[0], scale = parts[1]
    m.data = <const uint8_t *> data
    m.scale = <const uint8_t *> scale
    m.n = parts[2]
    m.k = parts[3]
    return m


def supported():
    """Names of the tiers that this CPU can run, best first."""
    names = []
    while hl_tier_at(len(names)) != NULL:
        names.append(hl_tier_at(len(names)).name.decode())
    return tuple(names)


def native_seconds():
    """Seconds spent inside run() and read_words() so far, by all threads of this process."""
    return _native_s


cdef class Linear:
    """One weight matrix; `parts` = (data address, scale address or 0, N, K)."""
    cdef const hl_tier *tier
    cdef hl_matrix matrix

    def __init__(self, str tier, tuple parts):
        self.tier = _tier(tier)
        self.matrix = _matrix(parts)

    def run(self, uintptr_t x, int64_t tokens, uintptr_t out, int threads):
        """out[T, N] = x[T, K] . w^T, both float32 at the given addresses."""
        global _native_s
        cdef int status
        cdef double start
        with nogil:
            start = _now()
            status = hl_linear(self.tier, &self.matrix, <const float *> x, tokens, <float *> out, threads)
            start = _now() - start
        _native_s += start
        if status:
            raise MemoryError("no memory for the scratch space of a linear layer")


cdef class MoeLayer:
    """All experts of a layer; `experts` = [(gate, up, down) parts or None]."""
    cdef const hl_tier *tier
    cdef hl_moe moe
    cdef hl_matrix *matrices

    def __init__(self, str tier, list experts, int64_t h, int64_t i):
        cdef int64_t count = len(experts), e
        self.tier = _tier(tier)
        self.matrices = <hl_matrix *> calloc(3 * count, sizeof(hl_matrix))
        if self.matrices == NULL:
            raise MemoryError("no memory for the table of experts")
        for e in range(count):
            if experts[e] is not None:
                self.matrices[e] = _matrix(experts[e][0])
                self.matrices[count + e] = _matrix(experts[e][1])
                self.matrices[2 * count + e] = _matrix(experts[e][2])
        self.moe.experts, self.moe.h, self.moe.i = count, h, i
        self.moe.gate = self.matrices
        self.moe.up = self.matrices + count
        self.moe.down = self.matrices + 2 * count

    def __dealloc__(self):
        free(self.matrices)

    def run(self, uintptr_t x, int64_t tokens, int64_t slots, uintptr_t ids, uintptr_t weights, uintptr_t out,
            int threads):
        """x[T, H] float32, ids[T, slots] int32, weights[T, slots] float32 -> out[T, H] float32."""
        global _native_s
        cdef int status
        cdef double start
        with nogil:
            start = _now()
            status = hl_moe_forward(self.tier, &self.moe, <const float *> x, tokens, slots, <const int32_t *> ids,
                                    <const float *> weights, <float *> out, threads)
            start = _now() - start
        _native_s += start
        if status:
            raise MemoryError("no memory for the scratch space of a MoE layer")


def read_words(str tier, uintptr_t address, int64_t words, int threads):
    """Sum (mod 2^64) of the 64-bit words at `address`."""
    global _native_s
    cdef const hl_tier *chosen = _tier(tier)
    cdef uint64_t total
    cdef double start
    with nogil:
        start = _now()
        total = hl_read(chosen, <const uint8_t *> address, words, threads)
        start = _now() - start
    _native_s += start
    return total
