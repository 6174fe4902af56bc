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

/* What stands before the experts of a MoE layer, in one call: norm, router logits, choice. */
typedef struct {
    const hl_tier *tier;
    hl_matrix gate;     /* [E, H] */
    const float *norm;  /* [H] */
    float eps;
    int64_t k;
    int normalise;
} hl_router;

/* normed[T, H] and, as hl_route, ids and weights [T, k]. Returns 0, or -1 when scratch memory could not be had. */
int hl_router_step(const hl_router *r, const float *x, int64_t tokens, float *normed, int32_t *ids, float *weights,
                   int threads);

#endif
