/* AVX-512 BF16 tier for CPUs without VBMI (Cooper Lake).

   FP8 decode, per 64 codes, from nibbles: the low byte of the BF16 value is the low nibble shifted up, the high byte a
   16-entry table of the high nibble (VPSHUFB), except where the three upper exponent bits are zero: there both bytes
   come from tables of the low nibble, which know the subnormals. 0x7F and 0xFF would decode to +-480: a running maximum
   of 2 * code finds them. */
#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#include "avx512.h"
#include "avx512_flags.h"
#include "avx512_pairs.h"

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

INLINE __m512i table(char a0, char a1, char a2, char a3, char a4, char a5, char a6, char a7, char a8, char a9, char a10,
                     char a11, char a12, char a13, char a14, char a15) {
    return _mm512_broadcast_i32x4(
        _mm_setr_epi8(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15));
}

INLINE void decode_fp8(__m512i v, __m512i *piece) {
    const __m512i nibble = _mm512_set1_epi8(0x0F), sign = _mm512_set1_epi8((char)0x80);
    const __m512i highs = table(60, 61, 62, 63, 64, 65, 66, 67, 60, 61, 62, 63, 64, 65, 66, 67);
    const __m512i small_lows = table(0, 0, (char)0x80, (char)0xC0, 0, 0x20, 0x40, 0x60, (char)0x80, (char)0x90,
                                     (char)0xA0, (char)0xB0, (char)0xC0, (char)0xD0, (char)0xE0, (char)0xF0);
    const __m512i small_highs = table(0, 59, 59, 59, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60);
    const __m512i low_nibble = _mm512_and_si512(v, nibble);
    const __m512i high_nibble = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    const __mmask64 small = _mm512_testn_epi8_mask(v, _mm512_set1_epi8(0x70));
    const __m512i low = _mm512_mask_shuffle_epi8(_mm512_slli_epi16(low_nibble, 4), small, small_lows, low_nibble);
    __m512i high = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(highs, high_nibble), small, small_highs, low_nibble);
    high = _mm512_ternarylogic_epi32(high, v, sign, 0xF8); /* high | (v & sign) */
    piece[0] = _mm512_unpacklo_epi8(low, high);
    piece[1] = _mm512_unpackhi_epi8(low, high);
}

#define NAME dot_fp8
#define ELEMENT 1
#define PIECES 2
#define DECODE(v, piece) decode_fp8(v, piece)
#define FLAG __m512i
#define FLAG_ZERO() _mm512_setzero_si512()
#define FLAG_SEE(flag, v) flag = see_codes(flag, v)
#define FLAG_LANES(flag, nan) flagged_lanes(flag, nan)
#include "tiles.h"

#include "avx512_pairs_bf16.h"

const hl_tier hl_avx512_bf16 = {"avx512_bf16", supported, MAX_M, HL_BLOCK / 2, prepare, dot, pack, hl_silu_mul_avx2,
                                read_words, multiply};
#endif
