/* Attention with AVX2 + FMA, in float32 throughout. */
#include "attention_piece.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

#define VEC __m256
#define LANES 8
#define VECTORS 2
#define PAIR 1
#define CACHED_ROWS 6
#define ZERO() _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define MULTIPLY(acc, word, v) _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_set1_epi32((int)(word))), v, acc)

static int64_t query(const float *q, int64_t d, uint32_t *out) {
    memcpy(out, q, (size_t)d * sizeof *q);
    return d;
}

INLINE __m256 widen(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

#define WIDEN(at, stride, out) ((void)(stride), (out)[0] = widen(at), (out)[1] = widen((at) + 8))

/* A transposition of 8 x 8 floats at a time. */
INLINE void pack_keys(const uint16_t *rows, int64_t stride, int64_t d, uint32_t *out) {
    for (int64_t k = 0; k < d; k += 8) {
        __m256 r[8], t[8];
        float *to = (float *)out + k * VECTORS * LANES;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) r[i] = widen(rows + i * stride + k);
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
                r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xEE);
            }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            STORE(to + i * VECTORS * LANES, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
            STORE(to + (i + 4) * VECTORS * LANES, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
        }
    }
}

INLINE void pack_values(const uint16_t *rows, int64_t stride, int64_t d, uint32_t *out, int64_t panel) {
    for (int i = 0; i < HL_CACHE_TILE; i++, rows += stride, out += VECTORS * LANES)
        for (int64_t k = 0; k < d; k += 8) STORE((float *)out + k / 16 * panel + k % 16, widen(rows + k));
}

/* 2^x for x <= 0 (NaN passes), 0 below the normal numbers; as in attention_bf16.c. */
INLINE __m256 exp2_ps(__m256 x) {
    const __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    const __m256 n = _mm256_round_ps(x, 8), r = _mm256_sub_ps(x, n);
    __m256 p = _mm256_set1_ps(1.3264727e-3f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(9.6715127e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.5507337e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(2.4022242e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(6.9314698e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(normal, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

INLINE __m256 first_lanes(int64_t count) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count > 8 ? 8 : (int)count), lane));
}

TARGET static void softmax(float *scores, int64_t seen, int64_t limit, float scale, float *largest, float *sum) {
    const __m256 factor = _mm256_set1_ps(scale);
    __m256 total = ZERO();
    *largest = -INFINITY;
    for (int64_t i = 0; i < seen; i++) *largest = scores[i] > *largest ? scores[i] : *largest;
    const __m256 shift = _mm256_set1_ps(*largest == -INFINITY ? 0.0f : *largest);
    for (int64_t i = 0; i < limit; i += 8) {
        const __m256 mask = first_lanes(seen - i), x = _mm256_and_ps(mask, LOAD(scores + i));
        const __m256 p = _mm256_and_ps(mask, exp2_ps(_mm256_mul_ps(_mm256_sub_ps(x, shift), factor)));
        total = _mm256_add_ps(total, p);
        STORE(scores + i, p);
    }
    float lanes[8];
    STORE(lanes, total);
    *sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

#include "attention_tiles.h"

const hl_attention_tier hl_attention_avx2 = {query, piece};

#endif
