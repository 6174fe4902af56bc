/* AVX2 + FMA tier, for CPUs without AVX-512: float32 FMA, 8 rows a vector.

   FP8 decode as in avx512_bw.c. F16C conversion (exponent bias 8 off, no scaling of x) was measured 1.3x slower. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "tokens.h"

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

#define LANES 8
#define WVEC __m256i
#define LOADW(p) _mm256_load_si256((const __m256i *)(p))
#define STOREW(p, v) _mm256_store_si256((__m256i *)(p), v)
#define VEC __m256
#define PIECE __m256
#define ZERO() _mm256_setzero_ps()
#define LOADF(p) _mm256_load_ps(p)
#define STOREF(p, v) _mm256_store_ps(p, v)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SET1(f) _mm256_set1_ps(f)
#define LOAD_ONCE(v) __asm__("" : "+x"(v))

/* 16 accumulators less what decoding needs */
#define MAX_M 4
#define TILES(m) ((m) == 1 ? 4 : (m) == 2 ? 2 : 1)
#define SHARE(m) 1
#define FEW 2
#define FEW_ROWS(m) 32

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

INLINE void copy64(uint8_t *to, const uint8_t *from) {
    _mm256_store_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
    _mm256_store_si256((__m256i *)to + 1, _mm256_loadu_si256((const __m256i *)from + 1));
}
#define COPY64(to, from) copy64(to, from)

INLINE __m256i lanes_of(const uint8_t *p, int64_t stride) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128((const __m128i *)p)),
                                   _mm_load_si128((const __m128i *)(p + 4 * stride)), 1);
}

/* 8 rows x 16 bytes: rows i and i + 4 share a vector, transposed 4 x 4 inside its lanes. */
#define QUAD_OF(name, narrow, wide)                                                                  \
    INLINE void name(const uint8_t *p, int64_t stride, __m256i *out) {                               \
        const __m256i a = lanes_of(p, stride), b = lanes_of(p + stride, stride);                     \
        const __m256i c = lanes_of(p + 2 * stride, stride), d = lanes_of(p + 3 * stride, stride);    \
        const __m256i ab0 = _mm256_unpacklo_##narrow(a, b), ab1 = _mm256_unpackhi_##narrow(a, b);    \
        const __m256i cd0 = _mm256_unpacklo_##narrow(c, d), cd1 = _mm256_unpackhi_##narrow(c, d);    \
        out[0] = _mm256_unpacklo_##wide(ab0, cd0);                                                   \
        out[1] = _mm256_unpackhi_##wide(ab0, cd0);                                                   \
        out[2] = _mm256_unpacklo_##wide(ab1, cd1);                                                   \
        out[3] = _mm256_unpackhi_##wide(ab1, cd1);                                                   \
    }
QUAD_OF(quad_fp8, epi16, epi32)  /* pairs of codes */
QUAD_OF(quad_bf16, epi32, epi64) /* pairs of values */
#define QUAD(p, stride, out) (ELEMENT == 1 ? quad_fp8 : quad_bf16)(p, stride, out)

INLINE void decode_fp8(__m256i v, __m256 *piece) {
    const __m256i keep = _mm256_set1_epi16((short)0x87F0), zero = _mm256_setzero_si256();
    const __m256i even = _mm256_and_si256(keep, _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 4)), odd = _mm256_and_si256(keep, _mm256_srai_epi16(v, 4));
    piece[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, even));
    piece[1] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, odd));
    piece[2] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, even));
    piece[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, odd));
}

INLINE void decode_bf16(__m256i v, __m256 *piece) {
    piece[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    piece[1] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xFFFF0000)));
}

#define SPREAD(word) _mm256_broadcast_ss((const float *)(word))
#define MUL(acc, piece, spread) _mm256_fmadd_ps(piece, spread, acc)

TARGET static double multiply(int64_t rounds, float *sink) {
    __m256 acc[12], x = _mm256_set1_ps(1.0f);
    for (int i = 0; i < 12; i++) acc[i] = _mm256_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+x"(x)); /* a new x each round, as far as the compiler knows */
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm256_fmadd_ps(x, x, acc[i]);
    }
    float lanes[8], total = 0;
    for (int i = 1; i < 12; i++) acc[0] = _mm256_add_ps(acc[0], acc[i]);
    _mm256_storeu_ps(lanes, acc[0]);
    for (int i = 0; i < 8; i++) total += lanes[i];
    *sink = total;
    return (double)rounds * 12 * 16;
}

/* The largest 2 * code (mod 256) seen is 0xFE if there was a NaN code, which decodes to +-480. A row's codes
   stand at 2 r, 2 r + 1, 2 r + 8 and 2 r + 9 of its 16-byte lane. */
INLINE int flagged_lanes(__m256i seen, float *nan) {
    const unsigned codes = (unsigned)_mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8((char)0xFE)));
    for (int lane = 0; lane < LANES; lane++)
        if (codes >> (lane / 4 * 16 + lane % 4 * 2) & 0x0303) nan[lane] = __builtin_nanf("");
    return codes != 0;
}

#define NAME dot_fp8
#define ELEMENT 1
#define PIECES 4
#define DECODE(v, piece) decode_fp8(v, piece)
#define FLAG __m256i
#define FLAG_ZERO() _mm256_setzero_si256()
#define FLAG_SEE(flag, v) flag = _mm256_max_epu8(flag, _mm256_add_epi8(v, v))
#define FLAG_LANES(flag, nan) flagged_lanes(flag, nan)
#include "tiles.h"

#define NAME dot_bf16
#define ELEMENT 2
#define PIECES 2
#define DECODE(v, piece) decode_bf16(v, piece)
#define FLAG int
#define FLAG_ZERO() 0
#define FLAG_SEE(flag, v) ((void)0)
#define FLAG_LANES(flag, nan) ((void)(flag), (void)(nan), 0)
#include "tiles.h"

#include "entries.h"

/* exp by the usual split into 2^n * p(r), |r| <= ln(2)/2; about 1 unit in the last place, below the BF16 rounding that
   follows. The clamp keeps 2^n a normal number; NaN passes through (max/min return their second operand). */
INLINE __m256 exp_ps(__m256 v) {
    v = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), v));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(v, _mm256_set1_ps(1.44269504f)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), v);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(bits));
}

INLINE __m256 silu_mul8(__m256 g, __m256 u) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 e = exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), g));
    return _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, e)), u);
}

/* Shared with the AVX-512 tiers: it is a thousandth of a layer's time. */
TARGET void hl_silu_mul_avx2(float *g, const float *u, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(g + i, silu_mul8(_mm256_loadu_ps(g + i), _mm256_loadu_ps(u + i)));
    if (i < count) { /* the same instructions on a padded copy: a value must not depend on its position */
        float a[8] = {0}, b[8] = {0};
        memcpy(a, g + i, 4 * (size_t)(count - i));
        memcpy(b, u + i, 4 * (size_t)(count - i));
        _mm256_storeu_ps(a, silu_mul8(_mm256_loadu_ps(a), _mm256_loadu_ps(b)));
        memcpy(g + i, a, 4 * (size_t)(count - i));
    }
}

INLINE uint64_t read_with(const uint8_t *p, int64_t words, const int sums, const int ahead) {
    __m256i sum[8];
#pragma GCC unroll 8
    for (int j = 0; j < sums; j++) sum[j] = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 4 * sums <= words; i += 4 * sums) {
#pragma GCC unroll 8
        for (int j = 0; j < sums; j++) {
            if (ahead && j % 2 == 0) __builtin_prefetch(p + 8 * i + 32 * j + ahead, 0, 3);
            sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256((const __m256i *)(p + 8 * i + 32 * j)));
        }
    }
    for (int j = 1; j < sums; j++) sum[0] = _mm256_add_epi64(sum[0], sum[j]);
    uint64_t lanes[4], total = 0;
    _mm256_storeu_si256((__m256i *)lanes, sum[0]);
    for (int j = 0; j < 4; j++) total += lanes[j];
    return total + hl_sum_words(p, i, words);
}

TARGET static uint64_t read_words(const uint8_t *p, int64_t words, int loop) {
    if (loop == 1) return read_with(p, words, 8, 0);
    if (loop == 2) return read_with(p, words, 4, 4096);
    return read_with(p, words, 4, 0);
}

const hl_tier hl_avx2 = {"avx2", supported, MAX_M, HL_BLOCK, hl_prepare_float32, dot, pack, hl_silu_mul_avx2,
                         read_words, multiply};
#endif
