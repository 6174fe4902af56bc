/* What lies between the matrix products of a decode step: norms, rotary embedding and routing. Each replaces a handful
   of library calls of some 10 us by one of about 1 us.

   Legend: T tokens, H width, N heads, D head size, E experts. */
#include "glue.h"

#include "forward.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

INLINE float sum8(__m256 v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

TARGET static void norm_row(const float *x, const float *w, float eps, int64_t n, float *out) {
    __m256 s = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) s = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i), s);
    float square = sum8(s);
    for (; i < n; i++) square += x[i] * x[i];
    const float scale = 1.0f / sqrtf(square / (float)n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * scale * w[i];
}

void hl_rms_norm(const float *x, const float *w, float eps, int64_t tokens, int64_t h, float *out) {
    for (int64_t t = 0; t < tokens; t++) norm_row(x + t * h, w, eps, h, out + t * h);
}

TARGET void hl_norm_rope(const float *x, const float *w, float eps, const float *cosines, const float *sines,
                         int64_t tokens, int64_t heads, int64_t d, float *out) {
    const int64_t half = d / 2;
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cosines + t * half, *s = sines + t * half;
        for (int64_t n = 0; n < heads; n++) {
            float *row = out + (t * heads + n) * d;
            norm_row(x + (t * heads + n) * d, w, eps, d, row);
            for (int64_t i = 0; i < half; i++) {
                const float a = row[i], b = row[half + i];
                row[i] = a * c[i] - b * s[i];
                row[half + i] = b * c[i] + a * s[i];
            }
        }
    }
}

void hl_route(const float *logits, int64_t tokens, int64_t experts, int64_t k, int normalise, int32_t *ids,
              float *weights) {
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = logits + t * experts;
        int32_t *id = ids + t * k;
        float *weight = weights + t * k;
        float largest = row[0], total = 0, chosen = 0;
        for (int64_t e = 1; e < experts; e++) largest = row[e] > largest ? row[e] : largest;
        for (int64_t e = 0; e < experts; e++) total += expf(row[e] - largest);
        int64_t found = 0;
        for (int64_t e = 0; e < experts; e++) { /* insertion into the k best so far; the lower id wins a tie */
            int64_t at = found < k ? found : k;
            while (at > 0 && row[e] > row[id[at - 1]]) at--;
            if (at >= k) continue;
            const int64_t moved = (found < k ? found : k - 1) - at;
            memmove(id + at + 1, id + at, (size_t)moved * sizeof *id);
            id[at] = (int32_t)e;
            found += found < k;
        }
        for (int64_t i = 0; i < k; i++) chosen += weight[i] = expf(row[id[i]] - largest) / total;
        if (normalise)
            for (int64_t i = 0; i < k; i++) weight[i] /= chosen;
    }
}

int hl_router_step(const hl_router *r, const float *x, int64_t tokens, float *normed, int32_t *ids, float *weights,
                   int threads) {
    const int64_t experts = r->gate.n;
    float *logits = hl_scratch((size_t)(tokens * experts) * sizeof(float));
    if (!logits) return -1;
    hl_rms_norm(x, r->norm, r->eps, tokens, r->gate.k, normed);
    const int failed = hl_linear(r->tier, &r->gate, normed, tokens, logits, threads);
    if (!failed) hl_route(logits, tokens, experts, r->k, r->normalise, ids, weights);
    free(logits);
    return failed;
}
#endif
