/* AVX2 + FMA tier, for CPUs without AVX-512 VBMI/BF16.

   FP8 decode, per 32 codes: two codes share a 16-bit word. An arithmetic shift by 4 puts sign and eeeemmm where BF16
   has sign and exponent/mantissa, with the exponent 120 too low; masking leaves a float32. That is exact, subnormal
   codes included, because tasks run with subnormals enabled (pool.c) and each token of x is scaled by a power of two
   to put its largest element near 2^119: products are normal numbers and the two scalings are undone at the end.
   F16C conversion (exponent bias 8 off, no scaling of x) was measured 1.3x slower. 0x7F and 0xFF would decode to
   +-480, so a running maximum of 2*code finds them and makes the row's results NaN. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int64_t padded(int64_t k) { return (k + HL_BLOCK - 1) / HL_BLOCK * HL_BLOCK; }

static size_t token_bytes(int64_t k) { return sizeof(hl_token) + 4 * (size_t)padded(k); }

/* Zero below the subnormals' own rounding; NaN stays NaN and infinity stays infinite. */
static inline float round_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
    bits = (bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : rounded;
    memcpy(&x, &bits, 4);
    return x;
}

/* Exact 2^e for -126 <= e <= 127. */
static float power_of_two(int e) {
    uint32_t bits = (uint32_t)(e + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

TARGET static void prepare(const float *x, int64_t k, int is_fp8, hl_token *out) {
    float *data = (float *)(out + 1), largest = 0;
    memset(out, 0, token_bytes(k));
    int up = 0, down = 0; /* x is multiplied by 2^up, results by 2^down */
    if (is_fp8) {
        for (int64_t i = 0; i < k; i++) {
            float a = fabsf(x[i]);
            largest = a > largest && a <= 3.4028235e38f ? a : largest;
        }
        int exponent = 0; /* largest = f * 2^exponent with f in [0.5, 1) */
        if (largest > 0) frexpf(largest, &exponent);
        up = 119 - exponent;
        down = 120 - up;
    }
    const float up0 = power_of_two(up / 2), up1 = power_of_two(up - up / 2);
    out->post[0] = power_of_two(down / 2);
    out->post[1] = power_of_two(down - down / 2);
    if (is_fp8) {
        static const int slot[4] = {24, 8, 16, 0}; /* the order of decode_odd, decode_even below */
        for (int64_t i = 0; i < k; i++) data[i / 32 * 32 + slot[i % 4] + i % 32 / 4] = round_bf16(x[i]) * up0 * up1;
    } else {
        for (int64_t i = 0; i < k; i++) data[i / 16 * 16 + (i % 2 ? 0 : 8) + i % 16 / 2] = round_bf16(x[i]);
    }
}

INLINE float reduce(__m256 v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

INLINE void add_scaled(__m256 *sum, const __m256 *acc, int m, float scale) {
#pragma GCC unroll 8
    for (int j = 0; j < m; j++) sum[j] = _mm256_fmadd_ps(acc[j], _mm256_set1_ps(scale), sum[j]);
}

/* Bytes at odd offsets of v times the first 16 floats of x, then the same for even bytes and the last 16. */
#define FMA_PAIR(words, acc, offset)                                                                    \
    do {                                                                                                \
        const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(words, keep));                         \
        const __m256 low = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(words, 16), keep));   \
        _Pragma("GCC unroll 8") for (int j = 0; j < m; j++) {                                           \
            const float *xs = (const float *)x[j] + HL_BLOCK * block + (offset);                        \
            acc[j] = _mm256_fmadd_ps(high, _mm256_load_ps(xs), acc[j]);                                 \
            acc[j] = _mm256_fmadd_ps(low, _mm256_load_ps(xs + 8), acc[j]);                              \
        }                                                                                               \
    } while (0)

#define LOAD(offset) _mm256_loadu_si256((const __m256i *)(w + (offset)))

INLINE __m256i odd_codes(__m256i v) { return _mm256_srai_epi16(v, 4); }
INLINE __m256i even_codes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 4); }

/* Two chains per block, odd and even codes. With few tokens they run side by side to hide the FMA latency; with many
   they run one after the other, so that the accumulators fit the 16 registers. The arithmetic is the same. */
INLINE void block_fp8(const uint8_t *w, const uint8_t *const *x, int64_t block, const int m, float scale, __m256 *sum,
                      __m256i *flag) {
    const __m256i keep = _mm256_set1_epi32((int)0x87F00000);
    __m256 odd[HL_MAX_TOKENS], even[HL_MAX_TOKENS];
    __m256i seen = *flag;
#pragma GCC unroll 8
    for (int j = 0; j < m; j++) odd[j] = even[j] = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m256i v = LOAD(32 * c);
        seen = _mm256_max_epu8(seen, _mm256_add_epi8(v, v));
        FMA_PAIR(odd_codes(v), odd, 32 * c);
        if (m <= 4) FMA_PAIR(even_codes(v), even, 32 * c + 16);
    }
    *flag = seen;
    add_scaled(sum, odd, m, scale);
    if (m > 4) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) FMA_PAIR(even_codes(LOAD(32 * c)), even, 32 * c + 16);
    }
    add_scaled(sum, even, m, scale);
}

INLINE void block_bf16(const uint8_t *w, const uint8_t *const *x, int64_t block, const int m, float scale, __m256 *sum,
                       int *flag) {
    const __m256i keep = _mm256_set1_epi32((int)0xFFFF0000);
    __m256 first[HL_MAX_TOKENS], second[HL_MAX_TOKENS];
    (void)flag;
#pragma GCC unroll 8
    for (int j = 0; j < m; j++) first[j] = second[j] = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        FMA_PAIR(LOAD(64 * c), first, 32 * c);
        if (m <= 4) FMA_PAIR(LOAD(64 * c + 32), second, 32 * c + 16);
    }
    add_scaled(sum, first, m, scale);
    if (m > 4) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) FMA_PAIR(LOAD(64 * c + 32), second, 32 * c + 16);
    }
    add_scaled(sum, second, m, scale);
}

INLINE int has_nan_code(__m256i seen) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8((char)0xFE))) != 0;
}

#define VEC __m256
#define ZERO() _mm256_setzero_ps()
#define REDUCE(v) reduce(v)
#define GROUP(m) ((m) == 1 ? 8 : 16)
#define PANEL(m) ((m) <= 2 ? 2048 : (m) <= 4 ? 1024 : 512)

#define NAME dot_fp8
#define ELEMENT 1
#define FLAG __m256i
#define FLAG_ZERO() _mm256_setzero_si256()
#define FLAGGED(f) has_nan_code(f)
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

/* Shared with the AVX-512 tier: it is a thousandth of a layer's time. */
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

TARGET static uint64_t read_words(const uint8_t *p, int64_t words) {
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t i = 0;
    for (; i + 16 <= words; i += 16)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256((const __m256i *)(p + 8 * i + 32 * j)));
    sum[0] = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
    uint64_t lanes[4], total = 0, word;
    _mm256_storeu_si256((__m256i *)lanes, sum[0]);
    for (int j = 0; j < 4; j++) total += lanes[j];
    for (; i < words; i++) {
        memcpy(&word, p + 8 * i, 8);
        total += word;
    }
    return total;
}

const hl_tier hl_avx2 = {"avx2", supported, token_bytes, prepare, dot, hl_silu_mul_avx2, read_words};

#endif
