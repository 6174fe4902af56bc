/* What the three AVX-512 tiers share: 16 rows a vector. Include after defining TARGET. */
#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "tokens.h"

#define INLINE TARGET __attribute__((always_inline)) static inline

#define LANES 16
#define WVEC __m512i
#define LOADW(p) _mm512_load_si512(p)
#define STOREW(p, v) _mm512_store_si512(p, v)
#define COPY64(to, from) _mm512_store_si512(to, _mm512_loadu_si512(from))
#define VEC __m512
#define ZERO() _mm512_setzero_ps()
#define LOADF(p) _mm512_load_ps(p)
#define STOREF(p, v) _mm512_store_ps(p, v)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SET1(f) _mm512_set1_ps(f)
/* gcc would load a vector once for each use; three loads of every weight cost more than the decode. */
#define LOAD_ONCE(v) __asm__("" : "+v"(v))

/* 32 accumulators less what decoding needs */
#define MAX_M 8
#define TILES(m) ((m) <= 2 ? 8 : (m) <= 6 ? 4 : 2)
#define SHARE(m) ((m) == 3 || (m) == 4 ? 4 : 2)
#define FEW 8
#define FEW_ROWS(m) ((m) <= 5 ? 32 : 16)

#define NO_FLAG_SEE(flag, v) ((void)0)
#define NO_FLAG_LANES(flag, nan) ((void)(flag), (void)(nan), 0)

INLINE __m512i lanes_of(const uint8_t *p, int64_t stride) {
    __m512i v = _mm512_castsi128_si512(_mm_load_si128((const __m128i *)p));
    v = _mm512_mask_broadcast_i32x4(v, 0x00F0, _mm_load_si128((const __m128i *)(p + stride)));
    v = _mm512_mask_broadcast_i32x4(v, 0x0F00, _mm_load_si128((const __m128i *)(p + 2 * stride)));
    return _mm512_mask_broadcast_i32x4(v, 0xF000, _mm_load_si128((const __m128i *)(p + 3 * stride)));
}

/* 16 rows x 16 bytes: loads put rows i, i + 4, i + 8, i + 12 into the lanes of one vector, which costs no shuffle; a
   4 x 4 transposition inside the lanes does the rest. */
#define QUAD_OF(name, narrow, wide)                                                                  \
    INLINE void name(const uint8_t *p, int64_t stride, __m512i *out) {                               \
        const __m512i a = lanes_of(p, 4 * stride), b = lanes_of(p + stride, 4 * stride);             \
        const __m512i c = lanes_of(p + 2 * stride, 4 * stride), d = lanes_of(p + 3 * stride, 4 * stride); \
        const __m512i ab0 = _mm512_unpacklo_##narrow(a, b), ab1 = _mm512_unpackhi_##narrow(a, b);    \
        const __m512i cd0 = _mm512_unpacklo_##narrow(c, d), cd1 = _mm512_unpackhi_##narrow(c, d);    \
        out[0] = _mm512_unpacklo_##wide(ab0, cd0);                                                   \
        out[1] = _mm512_unpackhi_##wide(ab0, cd0);                                                   \
        out[2] = _mm512_unpacklo_##wide(ab1, cd1);                                                   \
        out[3] = _mm512_unpackhi_##wide(ab1, cd1);                                                   \
    }
QUAD_OF(quad_fp8, epi16, epi32)  /* pairs of codes */
QUAD_OF(quad_bf16, epi32, epi64) /* pairs of values */
#define QUAD(p, stride, out) (ELEMENT == 1 ? quad_fp8 : quad_bf16)(p, stride, out)

/* Four or eight independent sums, or four with a prefetch 4 KiB ahead: which is fastest depends on the machine. */
INLINE uint64_t read_with(const uint8_t *p, int64_t words, const int sums, const int ahead) {
    __m512i sum[8];
#pragma GCC unroll 8
    for (int j = 0; j < sums; j++) sum[j] = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 8 * sums <= words; i += 8 * sums) {
#pragma GCC unroll 8
        for (int j = 0; j < sums; j++) {
            if (ahead) __builtin_prefetch(p + 8 * i + 64 * j + ahead, 0, 3);
            sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(p + 8 * i + 64 * j));
        }
    }
    for (int j = 1; j < sums; j++) sum[0] = _mm512_add_epi64(sum[0], sum[j]);
    return (uint64_t)_mm512_reduce_add_epi64(sum[0]) + hl_sum_words(p, i, words);
}

TARGET static uint64_t read_words(const uint8_t *p, int64_t words, int loop) {
    if (loop == 1) return read_with(p, words, 8, 0);
    if (loop == 2) return read_with(p, words, 4, 4096);
    return read_with(p, words, 4, 0);
}
