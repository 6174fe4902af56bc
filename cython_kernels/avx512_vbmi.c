/* AVX-512 VBMI + BF16 tier.

   FP8 decode, per 64 codes: two 128-entry byte tables (VPERMI2B ignores bit 7 of the index) give the high and low byte
   of the BF16 magnitude, so subnormal codes and NaN are exact for free; a ternary op ORs in the sign; unpacking makes
   two BF16 vectors for VDPBF16PS.
   VDPBF16PS treats BF16 subnormals (below 2^-126, which no FP8 code is) as zero, in weights and in x, and flushes
   results below 2^-126; it ignores the floating-point control word. */
#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16,fma")))
#include "avx512.h"
#include "avx512_pairs.h"

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

INLINE void decode_fp8(__m512i v, __m512i *piece) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table_low), v, _mm512_load_si512(table_low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table_high), v, _mm512_load_si512(table_high + 64));
    high = _mm512_ternarylogic_epi32(high, v, _mm512_set1_epi8((char)0x80), 0xF8); /* high | (v & sign) */
    piece[0] = _mm512_unpacklo_epi8(low, high);
    piece[1] = _mm512_unpackhi_epi8(low, high);
}

#define NAME dot_fp8
#define ELEMENT 1
#define PIECES 2
#define DECODE(v, piece) decode_fp8(v, piece)
#define FLAG int
#define FLAG_ZERO() 0
#define FLAG_SEE(flag, v) NO_FLAG_SEE(flag, v)
#define FLAG_LANES(flag, nan) NO_FLAG_LANES(flag, nan)
#include "tiles.h"

#include "avx512_pairs_bf16.h"

const hl_tier hl_avx512_vbmi = {"avx512_vbmi_bf16", supported, MAX_M, HL_BLOCK / 2, prepare, dot, pack, hl_silu_mul_avx2,
                                read_words, multiply};
#endif
