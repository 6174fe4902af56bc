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
INLINE void pack_keys(const uint16_t *const *rows, int64_t d, uint32_t *out) {
    for (int64_t k = 0; k < d; k += 8) {
        __m512i r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#define PART(row) _mm_loadu_si128((const __m128i *)(rows[row] + k))
            r[i] = _mm512_castsi128_si512(PART(i));
            r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00F0, PART(i + 4));
            r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0F00, PART(i + 8));
            r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xF000, PART(i + 12));
#undef PART
        }
        const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
        const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), e = _mm512_unpackhi_epi32(r[2], r[3]);
        uint32_t *to = out + k / 2 * VECTORS * LANES;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi64(a, c));
        _mm512_storeu_si512(to + VECTORS * LANES, _mm512_unpackhi_epi64(a, c));
        _mm512_storeu_si512(to + 2 * VECTORS * LANES, _mm512_unpacklo_epi64(b, e));
        _mm512_storeu_si512(to + 3 * VECTORS * LANES, _mm512_unpackhi_epi64(b, e));
    }
}

/* Two rows interleaved, columns in order. */
INLINE void pack_values(const uint16_t *const *rows, int64_t d, uint32_t *out, int64_t panel) {
    const __m512i low = _mm512_add_epi16(
        _mm512_mullo_epi16(_mm512_set1_epi32(1 << 16), _mm512_set1_epi16(32)),
        _mm512_or_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                        _mm512_slli_epi32(
                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16)));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t k = 0; k < d; k += 32) {
        const __mmask32 mask = d - k >= 32 ? 0xFFFFFFFF : (1u << (d - k)) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[0] + k), b = _mm512_maskz_loadu_epi16(mask, rows[1] + k);
        uint32_t *to = out + k / 64 * panel + k % 64;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
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

TARGET static void softmax(float *scores, int64_t seen, int64_t limit, float scale, float *largest, float *sum) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < seen; i += 16) /* of two operands the second is taken if one is NaN */
        top = _mm512_mask_max_ps(top, first_lanes(seen - i), _mm512_loadu_ps(scores + i), top);
    *largest = _mm512_reduce_max_ps(top);
    const __m512 shift = _mm512_set1_ps(*largest == -INFINITY ? 0.0f : *largest), factor = _mm512_set1_ps(scale);
    const __m512i ones = _mm512_set1_epi16(0x3F80);
    for (int64_t i = 0; i < limit; i += 32) {
        __m512 p[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __mmask16 mask = first_lanes(seen - i - 16 * j);
            const __m512 x = _mm512_maskz_loadu_ps(mask, scores + i + 16 * j);
            p[j] = _mm512_maskz_mov_ps(mask, exp2_ps(_mm512_mul_ps(_mm512_sub_ps(x, shift), factor)));
        }
        const __m512bh words = _mm512_cvtne2ps_pbh(p[1], p[0]);
        total = _mm512_dpbf16_ps(total, words, (__m512bh)ones);
        _mm512_storeu_si512((uint32_t *)scores + i / 2, (__m512i)words);
    }
    *sum = _mm512_reduce_add_ps(total);
}

#include "attention_tiles.h"

const hl_attention_tier hl_attention_bf16 = {query, piece};

#endif
