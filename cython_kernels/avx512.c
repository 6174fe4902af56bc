/* AVX-512 VBMI + BF16 tier.

   FP8 decode, per 64 codes: two 128-entry byte tables (VPERMI2B ignores bit 7 of the index) give the high and low byte
   of the BF16 magnitude, so subnormal codes and NaN are exact for free; a ternary op ORs in the sign; unpacking makes
   two BF16 vectors for VDPBF16PS. x is permuted once per token into the order the unpack leaves behind.
   VDPBF16PS treats BF16 subnormals (below 2^-126, which no FP8 code is) as zero, in weights and in x, and flushes
   results below 2^-126; it ignores the floating-point control word. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

void hl_silu_mul_avx2(float *g, const float *u, int64_t count);

/* BF16 bits of the codes 0..127, low and high bytes apart. */
static uint8_t table_low[128] __attribute__((aligned(64))), table_high[128] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_tables(void) {
    for (int code = 0; code < 128; code++) {
        const int exponent = code >> 3, mantissa = code & 7;
        unsigned bits;
        if (code == 127) {
            bits = 0x7FC0;
        } else if (exponent) {
            bits = (unsigned)(exponent + 120) << 7 | (unsigned)mantissa << 4;
        } else if (mantissa) { /* mantissa * 2^-9, normalised */
            const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
            bits = (unsigned)(top + 118) << 7 | ((unsigned)mantissa << (7 - top) & 0x7F);
        } else {
            bits = 0;
        }
        table_low[code] = (uint8_t)bits;
        table_high[code] = (uint8_t)(bits >> 8);
    }
}

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int64_t padded(int64_t k) { return (k + HL_BLOCK - 1) / HL_BLOCK * HL_BLOCK; }

static size_t token_bytes(int64_t k) { return sizeof(hl_token) + 2 * (size_t)padded(k); }

static inline uint16_t bf16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static void prepare(const float *x, int64_t k, int is_fp8, hl_token *out) {
    uint16_t *data = (uint16_t *)(out + 1);
    memset(out, 0, token_bytes(k));
    out->post[0] = out->post[1] = 1.0f;
    for (int64_t i = 0; i < k; i++) {
        /* Unpacking works on 16-byte lanes: their first 8 codes form one vector, their last 8 the next. */
        const int64_t to = is_fp8 ? i / 64 * 64 + (i % 16 / 8) * 32 + i % 64 / 16 * 8 + i % 8 : i;
        data[to] = bf16_bits(x[i]);
    }
}

INLINE void add_scaled(__m512 *sum, const __m512 *acc, int m, float scale) {
#pragma GCC unroll 8
    for (int j = 0; j < m; j++) sum[j] = _mm512_fmadd_ps(acc[j], _mm512_set1_ps(scale), sum[j]);
}

#define DOT(acc, weights, offset)                                                                       \
    do {                                                                                                \
        const __m512i bf16 = (weights);                                                                 \
        _Pragma("GCC unroll 8") for (int j = 0; j < m; j++) {                                           \
            const __m512i xs = _mm512_load_si512((const uint16_t *)x[j] + HL_BLOCK * block + (offset)); \
            acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)bf16, (__m512bh)xs);                            \
        }                                                                                               \
    } while (0)

#define LOAD(offset) _mm512_loadu_si512(w + (offset))

/* gcc would load `v` once for each use; three loads of every weight cost more than the decode. */
#define LOAD_ONCE(v) __asm__("" : "+v"(v))

INLINE void block_fp8(const uint8_t *w, const uint8_t *const *x, int64_t block, const int m, float scale, __m512 *sum,
                      int *flag) {
    const __m512i low0 = _mm512_load_si512(table_low), low1 = _mm512_load_si512(table_low + 64);
    const __m512i high0 = _mm512_load_si512(table_high), high1 = _mm512_load_si512(table_high + 64);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512 first[HL_MAX_TOKENS], second[HL_MAX_TOKENS];
    (void)flag;
#pragma GCC unroll 8
    for (int j = 0; j < m; j++) first[j] = second[j] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int c = 0; c < 2; c++) {
        __m512i v = LOAD(64 * c);
        LOAD_ONCE(v);
        const __m512i low = _mm512_permutex2var_epi8(low0, v, low1);
        __m512i high = _mm512_permutex2var_epi8(high0, v, high1);
        high = _mm512_ternarylogic_epi32(high, v, sign, 0xF8); /* high | (v & sign) */
        DOT(first, _mm512_unpacklo_epi8(low, high), 64 * c);
        DOT(second, _mm512_unpackhi_epi8(low, high), 64 * c + 32);
    }
    add_scaled(sum, first, m, scale);
    add_scaled(sum, second, m, scale);
}

INLINE void block_bf16(const uint8_t *w, const uint8_t *const *x, int64_t block, const int m, float scale, __m512 *sum,
                       int *flag) {
    __m512 first[HL_MAX_TOKENS], second[HL_MAX_TOKENS];
    (void)flag;
#pragma GCC unroll 8
    for (int j = 0; j < m; j++) first[j] = second[j] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int c = 0; c < 2; c++) {
        DOT(first, LOAD(128 * c), 64 * c);
        DOT(second, LOAD(128 * c + 64), 64 * c + 32);
    }
    add_scaled(sum, first, m, scale);
    add_scaled(sum, second, m, scale);
}

#define VEC __m512
#define ZERO() _mm512_setzero_ps()
#define REDUCE(v) _mm512_reduce_add_ps(v)
#define GROUP(m) ((m) == 1 ? 1 : (m) <= 4 ? 4 : 16)
#define PANEL(m) ((m) == 1 ? (int64_t)1 << 40 : (m) <= 4 ? 2048 : 1024)

#define NAME dot_fp8
#define ELEMENT 1
#define FLAG int
#define FLAG_ZERO() 0
#define FLAGGED(f) 0
#define BLOCK block_fp8
#include "rows.h"

#define NAME dot_bf16
#define ELEMENT 2
#define FLAG int
#define FLAG_ZERO() 0
#define FLAGGED(f) 0
#define BLOCK block_bf16
#include "rows.h"

static void dot(const hl_matrix *w, int64_t r0, int64_t r1, const hl_token *const *x, int m, float *const *y) {
    (w->scale ? dot_fp8 : dot_bf16)(w, r0, r1, x, m, y);
}

TARGET static uint64_t read_words(const uint8_t *p, int64_t words) {
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 32 <= words; i += 32)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(p + 8 * i + 64 * j));
    sum[0] = _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]));
    uint64_t total = (uint64_t)_mm512_reduce_add_epi64(sum[0]), word;
    for (; i < words; i++) {
        memcpy(&word, p + 8 * i, 8);
        total += word;
    }
    return total;
}

const hl_tier hl_avx512 = {"avx512_vbmi_bf16", supported, token_bytes, prepare, dot, hl_silu_mul_avx2, read_words};

#endif
