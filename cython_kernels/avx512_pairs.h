/* VDPBF16PS, for the two tiers that have it: a word of x is two neighbouring BF16 values. */
#define PIECE __m512i

INLINE __m512 multiply_pairs(__m512 acc, __m512i pairs, const hl_word *word) {
    return _mm512_dpbf16_ps(acc, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32((int)*word));
}

TARGET static void prepare(const float *x, int64_t k, int is_fp8, hl_token *out) {
    uint16_t *data = (uint16_t *)(out + 1);
    (void)is_fp8;
    memset(out, 0, sizeof *out);
    out->post[0] = out->post[1] = 1.0f;
    for (int64_t i = 0; i < k; i++) data[i] = hl_bf16_bits(x[i]);
    memset(data + k, 0, 2 * (size_t)(hl_padded(k) - k));
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
