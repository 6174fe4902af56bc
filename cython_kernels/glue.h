/* The small operations between matrix products; see glue.c. All arrays are contiguous float32 unless said. */
#ifndef HYBRIDLAB_GLUE_H
#define HYBRIDLAB_GLUE_H

#include <stdint.h>

#include "kernels.h"

/* out[T, H] = x / sqrt(mean(x^2) + eps) * w */
void hl_rms_norm(const float *x, const float *w, float eps, int64_t tokens, int64_t h, float *out);

/* x[T, N, D]: RMS norm of each head, then rotation of (first half, second half) pairs; cosines, sines [T, D/2]. */
void hl_norm_rope(const float *x, const float *w, float eps, const float *cosines, const float *sines,
                  int64_t tokens, int64_t heads, int64_t d, float *out);

/* Softmax over E, the k largest (descending, the lower id first among equals) as ids and weights [T, k]. */
void hl_route(const float *logits, int64_t tokens, int64_t experts, int64_t k, int normalise, int32_t *ids,
              float *weights);

/* One query [N, D] over `count` cached tokens; keys, values: BF16 [slots, G, D]; D a multiple of 8. The cached
   tokens stand in slots[0 .. count) or, if slots is NULL, in `first`, `first` + 1, ... */
typedef struct {
    const float *q;
    const uint16_t *keys, *values;
    const int64_t *slots;
    int64_t first, count, n, g, d;
    float *out, *scratch;
} hl_attend;

int hl_attend_one(hl_attend *a, int threads);

/* A whole attention layer for tokens that decode, each with a context of its own: norm, q/k/v, norm and rotation of
   the heads, the new cache entries, attention, output projection, residual. */
typedef struct {
    const hl_tier *tier;
    hl_matrix q, k, v, o;
    const float *input_norm, *q_norm, *k_norm;
    float eps;
    int64_t n, g, d;
} hl_attention;

/* Token t is stored at slots[t]; its context is tables[t][0 .. count[t]) or, if that is 0, a run from first[t]. */
typedef struct {
    const float *x, *cosines, *sines;
    int64_t tokens;
    uint16_t *keys, *values;
    const int64_t *slots, *tables, *first, *count;
    float *out;
    int threads;
} hl_attention_call;

int hl_attention_step(const hl_attention *a, const hl_attention_call *c);

#endif
