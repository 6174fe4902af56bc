/* Attention with VDPBF16PS: scores and mixtures are sums of products of BF16 pairs, accumulated in float32. */
#include "attention_piece.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

#define VEC __m512
#define LANES 16
#define VECTORS 4
#define PAIR 2
#define CACHED_ROWS 12
#define ZERO() _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define MULTIPLY(acc, word, v) \
    _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int)(word)), (__m512bh)_mm512_castps_si512(v))

TARGET static int64_t query(const float *q, int64_t d, uint32_t *out) {
    for (int64_t i = 0; i < d; i += 8)
        _mm_storeu_si128((__m128i *)(out + i / 2), (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(q + i)));
    return d / 2;
}

/* A transposition of 16 x 4 words at a time: four loads bring rows i, i + 4, i + 8, i + 12 side by side, so that two
   rounds of unpacking finish. */
INLINE void pack_keys(const uint16_t *rows, int64_t stride, int64_t d, uint32_t *out) {
    for (int64_t k = 0; k < d; k += 8, out += 4 * VECTORS * LANES) {
        __m512i r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const uint16_t *at = rows + i * stride + k;
            r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)at));
            r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00F0, _mm_loadu_si128((const __m128i *)(at + 4 * stride)));
            r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0F00, _mm_loadu_si128((const __m128i *)(at + 8 * stride)));
            r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xF000, _mm_loadu_si128((const __m128i *)(at + 12 * stride)));
        }
        const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
        const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), e = _mm512_unpackhi_epi32(r[2], r[3]);
        _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, c));
        _mm512_storeu_si512(out + VECTORS * LANES, _mm512_unpackhi_epi64(a, c));
        _mm512_storeu_si512(out + 2 * VECTORS * LANES, _mm512_unpacklo_epi64(b, e));
        _mm512_storeu_si512(out + 3 * VECTORS * LANES, _mm512_unpackhi_epi64(b, e));
    }
}

static const uint16_t interleave[2][32] __attribute__((aligned(64))) = {
    {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41,
     10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57,
     26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};

/* Two rows of 32 columns interleaved, columns in order. */
INLINE void interleave_rows(const uint16_t *at, int64_t stride, __mmask32 mask, __m512 *out) {
    const __m512i a = _mm512_maskz_loadu_epi16(mask, at), b = _mm512_maskz_loadu_epi16(mask, at + stride);
    out[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(interleave[0]), b));
    out[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(interleave[1]), b));
}

#define WIDEN(at, stride, out) interleave_rows(at, stride, 0xFFFFFFFF, out)

INLINE void pack_values(const uint16_t *rows, int64_t stride, int64_t d, uint32_t *out, int64_t panel) {
    for (int64_t k = 0; k < d; k += 32) {
        const __mmask32 mask = d - k < 32 ? (1u << (d - k)) - 1 : 0xFFFFFFFF;
        float *to = (float *)(out + k / 64 * panel + k % 64);
#pragma GCC unroll 8
        for (int i = 0; i < HL_CACHE_TILE / 2; i++) {
            __m512 pair[2];
            interleave_rows(rows + 2 * i * stride + k, stride, mask, pair);
            STORE(to + i * VECTORS * LANES, pair[0]);
            STORE(to + i * VECTORS * LANES + 16, pair[1]);
        }
    }
}

/* 2^x for x <= 0 (NaN passes): the whole part into the exponent, a polynomial for the rest, to about 1e-7. */
INLINE __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3264727e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6715127e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507337e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022242e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314698e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

static inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1; }

/* exp((scores - shift) / scale) of 32 scores, the first `seen` of them, to BF16. */
INLINE __m512bh weights(const float *scores, int64_t seen, __m512 shift, __m512 factor) {
    __m512 p[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        const __mmask16 mask = first_lanes(seen - 16 * j);
        const __m512 x = _mm512_maskz_loadu_ps(mask, scores + 16 * j);
        p[j] = _mm512_maskz_mov_ps(mask, exp2_ps(_mm512_mul_ps(_mm512_sub_ps(x, shift), factor)));
    }
    return _mm512_cvtne2ps_pbh(p[1], p[0]);
}

TARGET static void softmax(float *scores, int64_t seen, int64_t limit, float scale, float *largest, float *sum) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    int64_t i = 0;
    for (; i + 16 <= seen; i += 16) top = _mm512_max_ps(_mm512_loadu_ps(scores + i), top); /* of NaN and x: x */
    top = _mm512_mask_max_ps(top, first_lanes(seen - i), _mm512_loadu_ps(scores + i), top);
    *largest = _mm512_reduce_max_ps(top);
    const __m512 shift = _mm512_set1_ps(*largest == -INFINITY ? 0.0f : *largest), factor = _mm512_set1_ps(scale);
    for (i = 0; i < limit; i += 32) {
        const __m512bh words = i + 32 <= seen ? weights(scores + i, 32, shift, factor)
                                              : weights(scores + i, seen - i, shift, factor);
        total = _mm512_dpbf16_ps(total, words, ones);
        _mm512_storeu_si512((uint32_t *)scores + i / 2, (__m512i)words);
    }
    *sum = _mm512_reduce_add_ps(total);
}

#include "attention_tiles.h"

const hl_attention_tier hl_attention_bf16 = {query, piece};

#endif
