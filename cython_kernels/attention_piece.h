/* What a tier computes of attention: some rows of queries against one piece of their context.

   A context is cut into pieces of HL_PIECE tokens from position 0. A piece yields, for each row, the largest score, the
   sum of exp(score - largest) and the values weighted by that; pieces are merged in order. So a row's arithmetic is the
   same whichever rows are computed beside it, and pieces may be computed anywhere. (The splitting is that of
   Flash-Decoding, Dao et al. 2023.) */
#ifndef HYBRIDLAB_ATTENTION_PIECE_H
#define HYBRIDLAB_ATTENTION_PIECE_H

#include <stdint.h>

enum {
    HL_PIECE = 512,      /* tokens of a piece */
    HL_CACHE_TILE = 16,  /* tokens that are laid out together */
    HL_KEY_BLOCK = 64,   /* tokens whose keys are laid out at a time */
    HL_VALUE_BLOCK = 256 /* the same for values, at most */
};

/* Cached tokens in order: where their keys and values begin, for the first key/value head concerned. */
typedef struct {
    const uint16_t *keys, *values;
    const int64_t *slots; /* NULL: first, first + 1, ... */
    int64_t first, count;
} hl_cached;

typedef struct {
    hl_cached cached, next; /* `next`: what this thread will read after that (prefetched), count 0 if unknown */
    int64_t stride;         /* elements between slots: G * D */
    int64_t groups, rows;   /* neighbouring key/value heads; rows of queries for each */
    int64_t per, visible;   /* row r sees the first visible + r / per tokens, at most cached.count */
    int64_t d, value_block;
    float scale;            /* of scores, times log2(e) */
    const uint32_t *q;      /* [groups][rows][words of a row], made by queries() */
    float *scores;          /* scratch [groups][rows][HL_PIECE] */
    uint32_t *packed;       /* scratch, hl_packed_words(d) */
    float *largest, *sum;   /* out [groups][rows] */
    float *mixed;           /* out [groups][rows][hl_mixed_stride(d)] */
} hl_piece;

static inline int64_t hl_mixed_stride(int64_t d) { return (d + 15) / 16 * 16; }

/* A tile's copy, then the keys or values of a block laid out: up to 4 bytes an element, columns padded to 64. */
static inline int64_t hl_packed_words(int64_t d) {
    return d * HL_CACHE_TILE / 2 + (d + 63) / 64 * 64 * HL_VALUE_BLOCK;
}

typedef struct {
    /* One row of D floats as words: BF16 pairs or floats. Returns their number. */
    int64_t (*query)(const float *q, int64_t d, uint32_t *out);
    void (*piece)(const hl_piece *p);
} hl_attention_tier;

extern const hl_attention_tier hl_attention_bf16, hl_attention_avx2;

#endif
