/* NaN codes of FP8 for tiers whose decoding does not know them: the largest 2 * code (mod 256) seen is 0xFE.
   A row's codes stand at 2 r, 2 r + 1, 2 r + 8 and 2 r + 9 of its 16-byte lane. */
INLINE __m512i see_codes(__m512i seen, __m512i v) { return _mm512_max_epu8(seen, _mm512_add_epi8(v, v)); }

INLINE int flagged_lanes(__m512i seen, float *nan) {
    const __mmask64 codes = _mm512_cmpeq_epi8_mask(seen, _mm512_set1_epi8((char)0xFE));
    for (int lane = 0; lane < LANES; lane++)
        if (codes >> (lane / 4 * 16 + lane % 4 * 2) & 0x0303) nan[lane] = __builtin_nanf("");
    return codes != 0;
}
