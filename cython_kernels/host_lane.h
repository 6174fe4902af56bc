/* A decode step's expert layers, run by one thread that no interpreter stands in the way of. */
#ifndef HYBRIDLAB_HOST_LANE_H
#define HYBRIDLAB_HOST_LANE_H

#include "kernels.h"

/* One MoE layer of a step. Words are in memory that a GPU reads and writes too. */
typedef struct {
    const uint32_t *ready; /* not 0: x, ids and weights have arrived */
    uint32_t *done;        /* set to 1 when out is written */
    const hl_tier *tier;
    const hl_moe *moe; /* NULL: nothing to compute, to time the hand-off alone */
    const float *x;
    const int32_t *ids;
    const float *weights;
    float *out;
    int64_t tokens, slots;
} hl_host_op;

/* Runs ops one after another, each once it is ready; times[2 i] and times[2 i + 1]: seconds on CLOCK_MONOTONIC when op i
   began and ended. A `stop` that is not 0 ends the wait. Whatever happens, every `done` is set, so that nobody waits
   for ever. Returns 0, 1 when stopped, -1 without memory. */
int hl_host_lane(const hl_host_op *ops, int64_t count, int threads, const uint32_t *stop, double *times);


#endif
