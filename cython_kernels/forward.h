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

/* Prepares x [tokens, k]; words and post as in hl_inputs. */
void hl_prepare_tokens(const hl_tier *tier, const float *x, int64_t k, int is_fp8, int64_t tokens, hl_word *words,
                       float *post, int threads);

static inline int64_t hl_least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
