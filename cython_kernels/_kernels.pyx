# cython: language_level=3, boundscheck=False, wraparound=False, binding=True
"""Thin wrapper of the C kernels. It trusts its arguments: hybridlab/kernels.py checks them and keeps arrays alive."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec


cdef extern from "kernels.h" nogil:
    ctypedef struct hl_matrix:
        const uint8_t *data
        const uint8_t *scale
        int64_t n, k
        int32_t layout
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
    int64_t hl_packed_bytes(int64_t, int64_t, int)
    void hl_pack(const hl_tier *, const hl_matrix *, uint8_t *, int)
    uint64_t hl_read(const hl_tier *, const uint8_t *, int64_t, int, int)
    double hl_multiply_rate(const hl_tier *, double, int)

cdef extern from "glue.h" nogil:
    void hl_rms_norm(const float *, const float *, float, int64_t, int64_t, float *)
    void hl_norm_rope(const float *, const float *, float, const float *, const float *, int64_t, int64_t, int64_t,
                      float *)
    void hl_route(const float *, int64_t, int64_t, int64_t, int, int32_t *, float *)
    ctypedef struct hl_router:
        const hl_tier *tier
        hl_matrix gate
        const float *norm
        float eps
        int64_t k
        int normalise
    int hl_router_step(const hl_router *, const float *, int64_t, float *, int32_t *, float *, int)

cdef extern from "attention.h" nogil:
    ctypedef struct hl_context:
        pass
    ctypedef struct hl_attend:
        const float *q
        const uint16_t *keys
        const uint16_t *values
        int64_t n, g, d
        const hl_context *contexts
        int64_t count
        float *out
    int hl_attend_all(const hl_tier *, const hl_attend *, int)
    ctypedef struct hl_attention:
        const hl_tier *tier
        hl_matrix q, k, v, o
        const float *input_norm
        const float *q_norm
        const float *k_norm
        float eps
        int64_t n, g, d
    ctypedef struct hl_attention_call:
        const float *x
        const float *cosines
        const float *sines
        int64_t tokens
        uint16_t *keys
        uint16_t *values
        const int64_t *slots
        const hl_context *contexts
        float *out
        int threads
    int hl_attention_step(const hl_attention *, const hl_attention_call *)

cdef extern from "host_lane.h" nogil:
    ctypedef struct hl_host_op:
        const uint32_t *ready
        uint32_t *done
        const hl_tier *tier
        const hl_moe *moe
        const float *x
        const int32_t *ids
        const float *weights
        float *out
        int64_t tokens, slots
    int hl_host_lane(const hl_host_op *, int64_t, int, const uint32_t *, double *)


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


cdef hl_matrix _matrix(object parts) except *:
    cdef hl_matrix m
    cdef uintptr_t data = parts[0], scale = parts[1]
    m.data = <const uint8_t *> data
    m.scale = <const uint8_t *> scale
    m.n = parts[2]
    m.k = parts[3]
    m.layout = parts[4]
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
    """One weight matrix; `parts` = (data address, scale address or 0, N, K, 0 for rows or 1 for tiles)."""
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

    def __cinit__(self, str tier, list experts, int64_t h, int64_t i):
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


include "steps.pxi"
include "host_lane.pxi"


def address(object array):
    """Where the data of a C-contiguous array begins; some 10 times faster than asking NumPy."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_SIMPLE)
    cdef uintptr_t start = <uintptr_t> view.buf
    PyBuffer_Release(&view)
    return start


def packed_bytes(int64_t n, int64_t k, int element):
    """Size of an [n, k] matrix of `element` bytes each in the packed layout."""
    return hl_packed_bytes(n, k, element)


def pack(str tier, tuple parts, uintptr_t out, int threads):
    """Packs a row-major matrix into `out`, which is 64-byte aligned and `packed_bytes` long."""
    cdef const hl_tier *chosen = _tier(tier)
    cdef hl_matrix matrix = _matrix(parts)
    with nogil:
        hl_pack(chosen, &matrix, <uint8_t *> out, threads)


def read_words(str tier, uintptr_t address, int64_t words, int loop, int threads):
    """Sum (mod 2^64) of the 64-bit words at `address`."""
    global _native_s
    cdef const hl_tier *chosen = _tier(tier)
    cdef uint64_t total
    cdef double start
    with nogil:
        start = _now()
        total = hl_read(chosen, <const uint8_t *> address, words, loop, threads)
        start = _now() - start
    _native_s += start
    return total


def multiply_rate(str tier, double seconds, int threads):
    """Floating-point operations per second of the tier's multiply instruction on registers."""
    cdef const hl_tier *chosen = _tier(tier)
    cdef double rate
    with nogil:
        rate = hl_multiply_rate(chosen, seconds, threads)
    return rate


def rms_norm(uintptr_t x, uintptr_t w, float eps, int64_t tokens, int64_t h, uintptr_t out):
    """out[T, H] = w * x / rms(x)."""
    global _native_s
    cdef double start
    with nogil:
        start = _now()
        hl_rms_norm(<const float *> x, <const float *> w, eps, tokens, h, <float *> out)
        start = _now() - start
    _native_s += start


def norm_rope(uintptr_t x, uintptr_t w, float eps, uintptr_t cosines, uintptr_t sines, int64_t tokens, int64_t heads,
              int64_t d, uintptr_t out):
    """out[T, N, D]: the norm of each head of x, rotated."""
    global _native_s
    cdef double start
    with nogil:
        start = _now()
        hl_norm_rope(<const float *> x, <const float *> w, eps, <const float *> cosines, <const float *> sines, tokens,
                     heads, d, <float *> out)
        start = _now() - start
    _native_s += start


def route(uintptr_t logits, int64_t tokens, int64_t experts, int64_t k, bint normalise, uintptr_t ids,
          uintptr_t weights):
    """ids int32 [T, k] and weights [T, k] of the k largest of softmax(logits [T, E])."""
    global _native_s
    cdef double start
    with nogil:
        start = _now()
        hl_route(<const float *> logits, tokens, experts, k, normalise, <int32_t *> ids, <float *> weights)
        start = _now() - start
    _native_s += start


def attend(str tier, uintptr_t q, uintptr_t keys, uintptr_t values, uintptr_t contexts, int64_t count, int64_t n,
           int64_t g, int64_t d, uintptr_t out, int threads):
    """out[T, N, D]; contexts int64 [count, 5]: address of the slots or 0, first slot, row, queries, start."""
    global _native_s
    cdef const hl_tier *chosen = _tier(tier)
    cdef hl_attend call
    cdef int status
    cdef double start
    call.q, call.keys, call.values = <const float *> q, <const uint16_t *> keys, <const uint16_t *> values
    call.n, call.g, call.d = n, g, d
    call.contexts, call.count, call.out = <const hl_context *> contexts, count, <float *> out
    with nogil:
        start = _now()
        status = hl_attend_all(chosen, &call, threads)
        start = _now() - start
    _native_s += start
    if status:
        raise MemoryError("no memory for the scratch space of attention")
