/* Activations: how prepared tokens are found, and the rounding that all tiers share. */
#ifndef HYBRIDLAB_TOKENS_H
#define HYBRIDLAB_TOKENS_H

#include <string.h>

#include "kernels.h"

/* Two BF16 values or a float32, as a tier's prepare() wrote them. */
typedef uint32_t __attribute__((may_alias)) hl_word;

static inline const hl_token *hl_token_of(const hl_inputs *x, int64_t j) {
    return (const hl_token *)((const uint8_t *)x->tokens + x->stride * (size_t)(x->index ? x->index[j] : j));
}

static inline const hl_word *hl_words_of(const hl_inputs *x, int64_t j) {
    return (const hl_word *)(hl_token_of(x, j) + 1);
}

static inline int64_t hl_padded(int64_t k) { return (k + HL_BLOCK - 1) / HL_BLOCK * HL_BLOCK; }

/* To nearest, ties to even; NaN stays NaN and infinity stays infinite. */
static inline uint16_t hl_bf16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

static inline float hl_round_bf16(float x) {
    const uint32_t bits = (uint32_t)hl_bf16_bits(x) << 16;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint64_t hl_sum_words(const uint8_t *p, int64_t first, int64_t words) {
    uint64_t total = 0, word;
    for (int64_t i = first; i < words; i++) {
        memcpy(&word, p + 8 * i, 8);
        total += word;
    }
    return total;
}

/* Tokens for tiers that multiply float32: BF16 values, for FP8 weights times the power of two that puts the largest
   near 2^119. The weights decode 2^-120 too small, down to float32 subnormals; so products are normal numbers. */
void hl_prepare_float32(const float *x, int64_t k, int is_fp8, hl_token *out);

static inline size_t hl_float32_token_bytes(int64_t k) { return sizeof(hl_token) + 4 * (size_t)hl_padded(k); }

static inline size_t hl_bf16_token_bytes(int64_t k) { return sizeof(hl_token) + 2 * (size_t)hl_padded(k); }

void hl_silu_mul_avx2(float *g, const float *u, int64_t count);

#endif
