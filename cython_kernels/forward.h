/* What the linear and the MoE driver share. */
#ifndef HYBRIDLAB_FORWARD_H
#define HYBRIDLAB_FORWARD_H

#include "kernels.h"
#include "tokens.h"

#define HL_MAX_CHUNK 512 /* rows of one task at most */

/* 64-byte aligned scratch memory, released with free(); NULL when there is none. */
void *hl_scratch(size_t bytes);

/* Rows of `w` that one task computes, a multiple of HL_PANEL, when `matrices` like it are shared out to `threads`. */
int64_t hl_chunk_rows(const hl_matrix *w, int64_t matrices, int threads);

typedef struct {
    const hl_tier *tier;
    const float *x; /* [tokens, k] */
    int64_t k;
    int is_fp8;
    void *out;      /* [tokens] prepared tokens, `stride` bytes apart */
    size_t stride;
} hl_prepare;

void hl_prepare_tokens(const hl_prepare *p, int64_t tokens, int threads);

static inline hl_token *hl_token_at(const void *base, size_t stride, int64_t token) {
    return (hl_token *)((uint8_t *)base + stride * (size_t)token);
}

static inline int64_t hl_least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
