/* Grouped-query attention over the paged cache of keys and values.

   Legend: T tokens of a step, N query heads, G key/value heads, D head size (a multiple of 8), C cached tokens. */
#ifndef HYBRIDLAB_ATTENTION_H
#define HYBRIDLAB_ATTENTION_H

#include <stdint.h>

#include "kernels.h"

/* One request: its queries are rows [row, row + queries) of q and stand at positions `start`, `start` + 1, ...;
   positions 0, 1, ... are cached in slots[0], slots[1], ... or, if `slots` is NULL, in `first`, `first` + 1, ... */
typedef struct {
    const int64_t *slots;
    int64_t first, row, queries, start;
} hl_context;

/* q, out float32 [T, N, D]; keys, values BF16 [slots, G, D]. */
typedef struct {
    const float *q;
    const uint16_t *keys, *values;
    int64_t n, g, d;
    const hl_context *contexts;
    int64_t count;
    float *out;
} hl_attend;

/* Causal attention of all requests. The bits of a row depend on its own context only, not on later tokens (infinite or
   NaN as they may be), nor on how a prompt was cut into steps, threads or the other requests. The tiers with VDPBF16PS round q and the probabilities to BF16 and take
   BF16 subnormals as zero; the others compute in float32. Returns -1 if memory is short, -2 if the tier has no
   attention. */
int hl_attend_all(const hl_tier *tier, const hl_attend *a, int threads);

/* A whole attention layer for tokens that decode, each with a context of its own: norm, q/k/v, norm and rotation of
   the heads, the new cache entries, attention, output projection, residual. */
typedef struct {
    const hl_tier *tier;
    hl_matrix q, k, v, o;
    const float *input_norm, *q_norm, *k_norm;
    float eps;
    int64_t n, g, d;
} hl_attention;

/* Token t is stored at slots[t] and sees contexts[t], itself included. */
typedef struct {
    const float *x, *cosines, *sines;
    int64_t tokens;
    uint16_t *keys, *values;
    const int64_t *slots;
    const hl_context *contexts;
    float *out;
    int threads;
} hl_attention_call;

int hl_attention_step(const hl_attention *a, const hl_attention_call *c);

#endif
