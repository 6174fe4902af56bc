/* Activations: how prepared tokens are found, and the rounding that all tiers share. */
#ifndef HYBRIDLAB_TOKENS_H
#define HYBRIDLAB_TOKENS_H

#include <string.h>

#include "kernels.h"

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

/* x for tiers that multiply float32: BF16 values, for FP8 weights times the power of two that puts the largest near
   2^119. The weights decode 2^-120 too small, down to float32 subnormals; so products are normal numbers. */
void hl_prepare_float32(const float *x, int64_t k, int is_fp8, hl_word *out, int64_t stride, float *post);

static inline int64_t hl_blocks(int64_t k) { return (k + HL_BLOCK - 1) / HL_BLOCK; }

/* Words of x of one token, padding included. */
static inline int64_t hl_token_words(const hl_tier *tier, int64_t k) { return hl_blocks(k) * tier->words_per_block; }

/* Prepares x as token j of `tokens`; words and post as in hl_inputs. */
static inline void hl_prepare_one(const hl_tier *tier, const float *x, int64_t k, int is_fp8, int64_t j, int64_t tokens,
                                  hl_word *words, float *post) {
    const int64_t first = j / tier->group * tier->group, left = tokens - first;
    const int64_t size = left < tier->group ? left : tier->group;
    hl_word *group = words + first * hl_token_words(tier, k);
    tier->prepare(x, k, is_fp8, group + (j - first) * tier->words_per_block, size * tier->words_per_block, post + 2 * j);
}

void hl_silu_mul_avx2(float *g, const float *u, int64_t count);

#endif
