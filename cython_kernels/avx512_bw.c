/* AVX-512 BW tier for CPUs without BF16 products (Skylake-X to Tiger Lake): float32 FMA.

   FP8 decode, per 64 codes: two codes share a 16-bit word. An arithmetic shift by 4 puts sign and eeeemmm where BF16
   has sign and exponent/mantissa, with the exponent 120 too low; masking and unpacking over zeros leave a float32. Exact, subnormal codes
   included, since tasks run with subnormals enabled (pool.c) and x is scaled up (tokens.h). */
#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma")))
#include "avx512.h"
#include "avx512_flags.h"

#define PIECE __m512

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

INLINE void decode_fp8(__m512i v, __m512 *piece) {
    const __m512i keep = _mm512_set1_epi16((short)0x87F0), zero = _mm512_setzero_si512();
    const __m512i even = _mm512_and_si512(keep, _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 4)), odd = _mm512_and_si512(keep, _mm512_srai_epi16(v, 4));
    piece[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, even));
    piece[1] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, odd));
    piece[2] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, even));
    piece[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, odd));
}

INLINE void decode_bf16(__m512i v, __m512 *piece) {
    piece[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    piece[1] = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xFFFF0000)));
}

#define SPREAD(word) _mm512_set1_ps(*(const float *)(word))
#define MUL(acc, piece, spread) _mm512_fmadd_ps(piece, spread, acc)

TARGET static double multiply(int64_t rounds, float *sink) {
    __m512 acc[12], x = _mm512_set1_ps(1.0f);
    for (int i = 0; i < 12; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(x));
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm512_fmadd_ps(x, x, acc[i]);
    }
    for (int i = 1; i < 12; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    *sink = _mm512_reduce_add_ps(acc[0]);
    return (double)rounds * 12 * 32;
}

#define NAME dot_fp8
#define ELEMENT 1
#define PIECES 4
#define DECODE(v, piece) decode_fp8(v, piece)
#define FLAG __m512i
#define FLAG_ZERO() _mm512_setzero_si512()
#define FLAG_SEE(flag, v) flag = see_codes(flag, v)
#define FLAG_LANES(flag, nan) flagged_lanes(flag, nan)
#include "tiles.h"

#define NAME dot_bf16
#define ELEMENT 2
#define PIECES 2
#define DECODE(v, piece) decode_bf16(v, piece)
#define FLAG int
#define FLAG_ZERO() 0
#define FLAG_SEE(flag, v) NO_FLAG_SEE(flag, v)
#define FLAG_LANES(flag, nan) NO_FLAG_LANES(flag, nan)
#include "tiles.h"

#include "entries.h"

const hl_tier hl_avx512_bw = {"avx512_bw", supported, MAX_M, HL_BLOCK, hl_prepare_float32, dot, pack,
                              hl_silu_mul_avx2, read_words, multiply};
#endif
