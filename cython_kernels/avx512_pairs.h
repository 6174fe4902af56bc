/* VDPBF16PS, for the two tiers that have it: a word of x is two neighbouring BF16 values. */
#define PIECE __m512i

#define SPREAD(word) _mm512_set1_epi32((int)*(word))
#define MUL(acc, piece, spread) _mm512_dpbf16_ps(acc, (__m512bh)(piece), (__m512bh)(spread))

TARGET static void prepare(const float *x, int64_t k, int is_fp8, hl_word *out, int64_t stride, float *post) {
    (void)is_fp8;
    post[0] = post[1] = 1.0f;
    for (int64_t b = 0; b < hl_blocks(k); b++) {
        float padded[HL_BLOCK];
        const float *block = x + b * HL_BLOCK;
        if (k - b * HL_BLOCK < HL_BLOCK) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, block, sizeof(float) * (size_t)(k - b * HL_BLOCK));
            block = padded;
        }
        for (int i = 0; i < HL_BLOCK; i += 32) { /* rounds to nearest even; what VDPBF16PS would flush is flushed here */
            const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(block + i + 16), _mm512_loadu_ps(block + i));
            _mm512_storeu_si512(out + b * stride + i / 2, (__m512i)pair);
        }
    }
}

TARGET static double multiply(int64_t rounds, float *sink) {
    __m512 acc[12];
    __m512i x = _mm512_set1_epi32(0x3F803F80);
    for (int i = 0; i < 12; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(x)); /* a new x each round, as far as the compiler knows */
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)x, (__m512bh)x);
    }
    for (int i = 1; i < 12; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    *sink = _mm512_reduce_add_ps(acc[0]);
    return (double)rounds * 12 * 64;
}
