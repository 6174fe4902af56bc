/* Types shared by the kernel tiers, the thread pool and the Cython wrapper.

   Shape legend: N rows (outputs), K columns (inputs), T tokens, E experts, H model width, I expert width. */
#ifndef HYBRIDLAB_KERNELS_H
#define HYBRIDLAB_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define HL_BLOCK 128     /* FP8 scales cover 128 x 128 blocks; every K loop advances by one block */
#define HL_MAX_TOKENS 8  /* tokens that share one decode of the weights */

/* A row-major weight matrix in checkpoint layout; data may have any alignment. */
typedef struct {
    const uint8_t *data;   /* FP8 codes [N, K] or BF16 bits [N, K]; NULL: expert not present */
    const uint8_t *scale;  /* float32 [ceil(N/128), ceil(K/128)], any alignment; NULL for BF16 */
    int64_t n, k;
} hl_matrix;

/* Activations of one token in the order a tier's inner loop reads them; `data` follows the header. */
typedef struct {
    float post[2];  /* powers of two that undo the tier's scaling of x; both multiply every result */
    float pad[14];  /* keeps the data 64-byte aligned */
} hl_token;

/* One instruction-set tier. Every element of a result is computed by one fixed order of operations,
   whatever `m`, the row range or the thread, so results are bit-identical over all three. */
typedef struct {
    const char *name;
    int (*supported)(void);
    /* Bytes of a prepared token (header included), a multiple of 64. */
    size_t (*token_bytes)(int64_t k);
    /* Round x[k] to BF16 (nearest even) and lay it out for dot(); zero-pads to a whole block. */
    void (*prepare)(const float *x, int64_t k, int is_fp8, hl_token *out);
    /* y[j][r] = row r of w . x[j], for r in [r0, r1) and j in [0, m), 1 <= m <= HL_MAX_TOKENS. */
    void (*dot)(const hl_matrix *w, int64_t r0, int64_t r1, const hl_token *const *x, int m, float *const *y);
    /* g[i] = silu(g[i]) * u[i] */
    void (*silu_mul)(float *g, const float *u, int64_t count);
    /* Sum (mod 2^64) of the 64-bit words of p[0, 8*words): plain vector loads, each byte once. */
    uint64_t (*read)(const uint8_t *p, int64_t words);
} hl_tier;

extern const hl_tier hl_avx512;
extern const hl_tier hl_avx2;

/* Tiers in order of preference; NULL past the last one that this build and CPU can run. */
const hl_tier *hl_tier_at(int index);

/* Results of the calls below: 0, or -1 when scratch memory could not be had. */
int hl_linear(const hl_tier *tier, const hl_matrix *w, const float *x, int64_t tokens, float *out, int threads);

typedef struct {
    int64_t experts, h, i;
    const hl_matrix *gate, *up, *down;  /* [E] each */
} hl_moe;

/* ids[T, k] (negative: skip the slot) and weights[T, k]; out[T, H]. ids are already validated. */
int hl_moe_forward(const hl_tier *tier, const hl_moe *moe, const float *x, int64_t tokens, int64_t k,
                   const int32_t *ids, const float *weights, float *out, int threads);

uint64_t hl_read(const hl_tier *tier, const uint8_t *p, int64_t words, int threads);

#endif
