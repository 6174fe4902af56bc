/* What lies between the matrix products of a decode step: norms, rotary embedding, routing and attention of one
   query. Each replaces a handful of library calls of some 10 us by one of about 1 us.

   Legend: T tokens, H width, N query heads, G key/value heads, D head size, C cached tokens, E experts. */
#include "glue.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "forward.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

INLINE float sum8(__m256 v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

INLINE __m256 load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
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

/* One key/value head: all its query heads against all cached tokens, each byte of the cache read once. */
TARGET static void attend_group(void *raw, int64_t group) {
    const hl_attend *a = raw;
    const int64_t heads = a->n / a->g, d = a->d, stride = a->g * d;
    const uint16_t *keys = a->keys + group * d, *values = a->values + group * d;
    float *scores = a->scratch + group * heads * a->count;
    float *out = a->out + group * heads * d;
    const float *q = a->q + group * heads * d;
    const float scale = 1.0f / sqrtf((float)d);
    for (int64_t c = 0; c < a->count; c++) {
        const uint16_t *key = keys + (a->slots ? a->slots[c] : a->first + c) * stride;
        for (int64_t h = 0; h < heads; h++) {
            __m256 s0 = _mm256_setzero_ps(), s1 = s0;
            int64_t i = 0;
            for (; i + 16 <= d; i += 16) {
                s0 = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * d + i), load_bf16(key + i), s0);
                s1 = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * d + i + 8), load_bf16(key + i + 8), s1);
            }
            if (i < d) s0 = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * d + i), load_bf16(key + i), s0);
            scores[h * a->count + c] = sum8(_mm256_add_ps(s0, s1)) * scale;
        }
    }
    for (int64_t h = 0; h < heads; h++) {
        float *p = scores + h * a->count, largest = p[0], total = 0;
        for (int64_t c = 1; c < a->count; c++) largest = p[c] > largest ? p[c] : largest;
        for (int64_t c = 0; c < a->count; c++) total += p[c] = expf(p[c] - largest);
        for (int64_t c = 0; c < a->count; c++) p[c] /= total;
    }
    memset(out, 0, (size_t)(heads * d) * sizeof *out);
    for (int64_t c = 0; c < a->count; c++) {
        const uint16_t *value = values + (a->slots ? a->slots[c] : a->first + c) * stride;
        for (int64_t i = 0; i < d; i += 8) {
            const __m256 v = load_bf16(value + i);
            for (int64_t h = 0; h < heads; h++) {
                float *o = out + h * d + i;
                const __m256 p = _mm256_set1_ps(scores[h * a->count + c]);
                _mm256_storeu_ps(o, _mm256_fmadd_ps(p, v, _mm256_loadu_ps(o)));
            }
        }
    }
}

int hl_attend_one(hl_attend *a, int threads) {
    a->scratch = malloc((size_t)(a->n * a->count) * sizeof(float));
    if (!a->scratch) return -1;
    /* A wake-up costs as much as some 100 cached tokens. */
    hl_parallel(attend_group, a, a->g, a->count > 256 ? threads : 1);
    free(a->scratch);
    return 0;
}

static uint16_t round_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

int hl_attention_step(const hl_attention *a, const hl_attention_call *c) {
    const int64_t tokens = c->tokens, h = a->q.k, heads = a->n * a->d, groups = a->g * a->d;
    float *normed = hl_scratch((size_t)(tokens * (h + 2 * heads + 2 * groups)) * sizeof(float));
    if (!normed) return -1;
    float *q = normed + tokens * h, *k = q + tokens * heads, *v = k + tokens * groups, *mixed = v + tokens * groups;
    int failed = 0;
    hl_rms_norm(c->x, a->input_norm, a->eps, tokens, h, normed);
    failed |= hl_linear(a->tier, &a->q, normed, tokens, q, c->threads);
    failed |= hl_linear(a->tier, &a->k, normed, tokens, k, c->threads);
    failed |= hl_linear(a->tier, &a->v, normed, tokens, v, c->threads);
    hl_norm_rope(q, a->q_norm, a->eps, c->cosines, c->sines, tokens, a->n, a->d, q);
    hl_norm_rope(k, a->k_norm, a->eps, c->cosines, c->sines, tokens, a->g, a->d, k);
    for (int64_t t = 0; t < tokens; t++) {
        uint16_t *key = c->keys + c->slots[t] * groups, *value = c->values + c->slots[t] * groups;
        for (int64_t i = 0; i < groups; i++) key[i] = round_bf16(k[t * groups + i]);
        for (int64_t i = 0; i < groups; i++) value[i] = round_bf16(v[t * groups + i]);
    }
    for (int64_t t = 0; t < tokens; t++) {
        hl_attend one = {q + t * heads, c->keys, c->values, (const int64_t *)c->tables[t], c->first[t], c->count[t],
                         a->n, a->g, a->d, mixed + t * heads, NULL};
        failed |= hl_attend_one(&one, c->threads);
    }
    failed |= hl_linear(a->tier, &a->o, mixed, tokens, c->out, c->threads);
    for (int64_t i = 0; i < tokens * h; i++) c->out[i] += c->x[i];
    free(normed);
    return failed;
}
#endif
