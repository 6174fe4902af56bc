# Whole layers' worth of small operations in one call; included by _kernels.pyx.

cdef class AttentionStep:
    """An attention layer for decoding tokens; matrices = parts of q, k, v, o; norms = addresses of input, q, k."""
    cdef hl_attention layer

    def __init__(self, str tier, tuple matrices, tuple norms, float eps, int64_t n, int64_t g, int64_t d):
        cdef uintptr_t input_norm = norms[0], q_norm = norms[1], k_norm = norms[2]
        self.layer.tier = _tier(tier)
        self.layer.q, self.layer.k = _matrix(matrices[0]), _matrix(matrices[1])
        self.layer.v, self.layer.o = _matrix(matrices[2]), _matrix(matrices[3])
        self.layer.input_norm, self.layer.q_norm = <const float *> input_norm, <const float *> q_norm
        self.layer.k_norm, self.layer.eps = <const float *> k_norm, eps
        self.layer.n, self.layer.g, self.layer.d = n, g, d

    def run(self, uintptr_t x, uintptr_t cosines, uintptr_t sines, int64_t tokens, uintptr_t keys, uintptr_t values,
            uintptr_t slots, uintptr_t contexts, uintptr_t out, int threads):
        """out[T, H] = x + attention(x), new entries written to the cache; contexts as for attend(), one a token."""
        global _native_s
        cdef hl_attention_call call
        cdef int status
        cdef double start
        call.x, call.cosines, call.sines = <const float *> x, <const float *> cosines, <const float *> sines
        call.tokens, call.keys, call.values = tokens, <uint16_t *> keys, <uint16_t *> values
        call.slots, call.contexts = <const int64_t *> slots, <const hl_context *> contexts
        call.out, call.threads = <float *> out, threads
        with nogil:
            start = _now()
            status = hl_attention_step(&self.layer, &call)
            start = _now() - start
        _native_s += start
        if status:
            raise MemoryError("no memory for the scratch space of an attention layer")


cdef class RouterStep:
    """Norm, router and choice of k experts; gate = its parts, norm = address of its weight."""
    cdef hl_router router

    def __init__(self, str tier, tuple gate, uintptr_t norm, float eps, int64_t k, bint normalise):
        self.router.tier, self.router.gate, self.router.norm = _tier(tier), _matrix(gate), <const float *> norm
        self.router.eps, self.router.k, self.router.normalise = eps, k, normalise

    def run(self, uintptr_t x, int64_t tokens, uintptr_t normed, uintptr_t ids, uintptr_t weights, int threads):
        """normed[T, H], ids int32 [T, k] and weights [T, k] of x[T, H]."""
        global _native_s
        cdef int status
        cdef double start
        with nogil:
            start = _now()
            status = hl_router_step(&self.router, <const float *> x, tokens, <float *> normed, <int32_t *> ids,
                                    <float *> weights, threads)
            start = _now() - start
        _native_s += start
        if status:
            raise MemoryError("no memory for the scratch space of a router")
