# The CPU's part of a decode step as one call; included by _kernels.pyx.

cdef class HostLane:
    """MoE layers that wait for a word each; op = (ready, done, layer or None, x, ids, weights, out, tokens, slots)."""
    cdef hl_host_op *ops
    cdef int64_t count
    cdef list layers

    def __cinit__(self, list ops):
        cdef uintptr_t ready, done, x, ids, weights, out
        cdef MoeLayer layer
        self.count = len(ops)
        self.layers = []
        self.ops = <hl_host_op *> calloc(max(1, self.count), sizeof(hl_host_op))
        if self.ops == NULL:
            raise MemoryError("no memory for the list of ops")
        for i, (ready, done, held, x, ids, weights, out, tokens, slots) in enumerate(ops):
            self.ops[i].ready, self.ops[i].done = <const uint32_t *> ready, <uint32_t *> done
            self.ops[i].x, self.ops[i].ids = <const float *> x, <const int32_t *> ids
            self.ops[i].weights, self.ops[i].out = <const float *> weights, <float *> out
            self.ops[i].tokens, self.ops[i].slots = tokens, slots
            if held is not None:
                layer = held
                self.ops[i].tier, self.ops[i].moe = layer.tier, &layer.moe
                self.layers.append(layer)

    def __dealloc__(self):
        free(self.ops)

    def run(self, int threads, uintptr_t stop, uintptr_t times):
        """Run all ops; `times` float64 [ops, 2] gets their start and end. True unless stopped."""
        global _native_s
        cdef int status
        cdef double start
        with nogil:
            start = _now()
            status = hl_host_lane(self.ops, self.count, threads, <const uint32_t *> stop, <double *> times)
            start = _now() - start
        _native_s += start
        if status < 0:
            raise MemoryError("no memory for the scratch space of a MoE layer")
        return status == 0
