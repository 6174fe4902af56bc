/* Types shared by the kernel tiers, the thread pool and the Cython wrapper.

   Shape legend: N rows (outputs), K columns (inputs), T tokens, E experts, H model width, I expert width. */
#ifndef HYBRIDLAB_KERNELS_H
#define HYBRIDLAB_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define HL_BLOCK 128       /* FP8 scales cover 128 x 128 blocks; every K loop advances by one block */
#define HL_TILE 16         /* rows of a tile: 64 bytes hold 16 rows x 4 FP8 codes (or 2 BF16) of neighbouring k */
#define HL_PANEL 128       /* rows that are computed together; tasks begin at multiples of it */
#define HL_MAX_GROUP 8     /* tokens of a tier's group: 8, 4, 2 or 1 */
#define HL_MAX_TOKENS 128  /* tokens of one dot(): bounds its sums on the stack to 64 KiB */

enum hl_layout {
    HL_ROWS,  /* as in the checkpoint: row-major [N, K], any alignment */
    HL_TILES  /* packed by hl_pack: [panel][k block][k step][tile of the panel][64 bytes], 64-byte aligned, zero-padded */
};
/* The 64 bytes: BF16, [16 rows][2 k]; FP8, [4 lanes][2 pairs of k][4 rows][2 k], so that interleaving the low and high
   halves of 16-byte lanes (which is what unpacking bytes does) leaves a pair of k of each row, rows in order. */

/* A weight matrix. */
typedef struct {
    const uint8_t *data;   /* FP8 codes or BF16 bits in `layout`; NULL: expert not present */
    const uint8_t *scale;  /* float32 [ceil(N/128), ceil(K/128)], any alignment; NULL for BF16 */
    int64_t n, k;
    int32_t layout;
} hl_matrix;

/* Two BF16 values or a float32 of x, as a tier's prepare() wrote them: an inner loop broadcasts one word at a time. */
typedef uint32_t __attribute__((may_alias)) hl_word;

/* Prepared tokens, in groups of tier->group (the last one: what is left). A group's words stand in order of
   [k block][token of the group][words of a block], so that one pointer serves all its tokens. */
typedef struct {
    const hl_word *words;
    const float *post; /* [tokens][2]: powers of two that undo the tier's scaling of x; both multiply every result */
} hl_inputs;

/* Results: row r of token j goes to y[j * stride + r - first]. */
typedef struct {
    float *y;
    int64_t stride, first;
} hl_outputs;

/* One instruction-set tier. Every element of a result is computed by one fixed order of operations (tiles.h), whatever
   the tokens beside it, the row range, the layout or the thread: results are bit-identical over all of them. */
typedef struct {
    const char *name;
    int (*supported)(void);
    int group;           /* tokens whose accumulators fit the registers */
    int words_per_block; /* of x */
    /* Round x[k] to BF16 (nearest even) for dot(); block b goes to out[b * stride], the last one zero-padded. */
    void (*prepare)(const float *x, int64_t k, int is_fp8, hl_word *out, int64_t stride, float *post);
    /* Rows [r0, r1) of w, r0 a multiple of HL_PANEL, times m tokens, 1 <= m <= HL_MAX_TOKENS. `next` is where this
       thread will read after that (to prefetch), or NULL. */
    void (*dot)(const hl_matrix *w, int64_t r0, int64_t r1, const hl_inputs *x, int m, const hl_outputs *out,
                const uint8_t *next);
    /* One panel of a row-major matrix into the packed layout. */
    void (*pack)(const hl_matrix *w, int64_t panel, uint8_t *out);
    /* g[i] = silu(g[i]) * u[i] */
    void (*silu_mul)(float *g, const float *u, int64_t count);
    /* Sum (mod 2^64) of the 64-bit words of p[0, 8*words): plain vector loads, each byte once. `loop` is one of
       HL_READ_LOOPS ways to write such a loop. */
    uint64_t (*read)(const uint8_t *p, int64_t words, int loop);
    /* Floating-point operations of `rounds` rounds of the tier's multiply instruction on registers; *sink keeps them. */
    double (*multiply)(int64_t rounds, float *sink);
} hl_tier;

#define HL_READ_LOOPS 3

extern const hl_tier hl_avx512_vbmi, hl_avx512_bf16, hl_avx512_bw, hl_avx2, hl_portable;

/* Tiers in order of preference; NULL past the last one that this build and CPU can run. */
const hl_tier *hl_tier_at(int index);

/* Bytes of the packed layout of an [n, k] matrix of `element` bytes each. */
int64_t hl_packed_bytes(int64_t n, int64_t k, int element);

/* Where the packed or row-major data of row r begins (r a multiple of HL_PANEL). */
const uint8_t *hl_rows_at(const hl_matrix *w, int64_t r);

/* Packs a row-major matrix into `out`, 64-byte aligned. */
void hl_pack(const hl_tier *tier, const hl_matrix *w, uint8_t *out, int threads);

/* Results of the calls below: 0, or -1 when scratch memory could not be had. */
int hl_linear(const hl_tier *tier, const hl_matrix *w, const float *x, int64_t tokens, float *out, int threads);

/* Several matrices times the same x [T, K]; out[i] is [T, N_i]. One parallel loop for all. */
int hl_linear_many(const hl_tier *tier, const hl_matrix *const *w, int count, const float *x, int64_t tokens,
                   float *const *out, int threads);

typedef struct {
    int64_t experts, h, i;
    const hl_matrix *gate, *up, *down;  /* [E] each */
} hl_moe;

/* ids[T, k] (negative: skip the slot) and weights[T, k]; out[T, H]. ids are already validated. */
int hl_moe_forward(const hl_tier *tier, const hl_moe *moe, const float *x, int64_t tokens, int64_t k,
                   const int32_t *ids, const float *weights, float *out, int threads);

uint64_t hl_read(const hl_tier *tier, const uint8_t *p, int64_t words, int loop, int threads);

/* Floating-point operations per second of `threads` threads that only multiply, for about `seconds`. */
double hl_multiply_rate(const hl_tier *tier, double seconds, int threads);

#endif
