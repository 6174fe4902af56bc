/* Linear layers: cutting rows into tasks, shared by all tiers. */
#include "forward.h"

#include <stdlib.h>

#include "pool.h"

const hl_tier *hl_tier_at(int index) {
    static const hl_tier *const all[] = {
#if defined(__x86_64__)
        &hl_avx512_vbmi, &hl_avx512_bf16, &hl_avx512_bw, &hl_avx2,
#endif
        &hl_portable};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]->supported() && index-- == 0) return all[i];
    return NULL;
}

void *hl_scratch(size_t bytes) { return aligned_alloc(64, bytes ? (bytes + 63) / 64 * 64 : 64); }

static int element_of(const hl_matrix *w) { return w->scale ? 1 : 2; }

int64_t hl_chunk_rows(const hl_matrix *w, int64_t matrices, int threads) {
    /* A quarter of a thread's share, to even out the threads; up to 256 KiB, so that a task's weights stay in L2. */
    const int64_t row = w->k * element_of(w) + 1, share = matrices * w->n * row / (4 * (int64_t)threads);
    const int64_t rows = hl_least(share, 262144) / row / HL_PANEL * HL_PANEL;
    return rows < HL_PANEL ? HL_PANEL : hl_least(rows, HL_MAX_CHUNK);
}

int64_t hl_packed_bytes(int64_t n, int64_t k, int element) {
    return (n + HL_TILE - 1) / HL_TILE * HL_TILE * hl_padded(k) * element;
}

const uint8_t *hl_rows_at(const hl_matrix *w, int64_t r) {
    return w->data + r * (w->layout == HL_TILES ? hl_padded(w->k) : w->k) * element_of(w);
}

typedef struct {
    const hl_tier *tier;
    const hl_matrix *w;
    uint8_t *out;
} pack_call;

static void pack_task(void *raw, int64_t panel) {
    const pack_call *c = raw;
    c->tier->pack(c->w, panel, c->out + panel * HL_PANEL * hl_padded(c->w->k) * element_of(c->w));
}

void hl_pack(const hl_tier *tier, const hl_matrix *w, uint8_t *out, int threads) {
    pack_call c = {tier, w, out};
    hl_parallel(pack_task, &c, (w->n + HL_PANEL - 1) / HL_PANEL, threads);
}

typedef struct {
    const hl_tier *tier;
    const float *x;
    int64_t k, tokens;
    int is_fp8;
    hl_word *words;
    float *post;
} prepare_call;

static void prepare_task(void *raw, int64_t token) {
    const prepare_call *c = raw;
    hl_prepare_one(c->tier, c->x + token * c->k, c->k, c->is_fp8, token, c->tokens, c->words, c->post);
}

void hl_prepare_tokens(const hl_tier *tier, const float *x, int64_t k, int is_fp8, int64_t tokens, hl_word *words,
                       float *post, int threads) {
    prepare_call c = {tier, x, k, tokens, is_fp8, words, post};
    hl_parallel(prepare_task, &c, tokens, tokens <= 8 ? 1 : threads);
}

enum { MAX_MATRICES = 8 };

typedef struct {
    const hl_tier *tier;
    const hl_matrix *const *w;
    float *const *out;
    hl_inputs x;
    int64_t tokens, chunk, token_words, start[MAX_MATRICES + 1]; /* first task of each matrix */
    int count;
} linear_call;

typedef struct {
    int which;
    int64_t r0, r1;
} slice;

static slice slice_of(const linear_call *c, int64_t index) {
    slice s = {0, 0, 0};
    while (index >= c->start[s.which + 1]) s.which++;
    s.r0 = (index - c->start[s.which]) * c->chunk;
    s.r1 = hl_least(s.r0 + c->chunk, c->w[s.which]->n);
    return s;
}

static void linear_task(void *raw, int64_t index, int64_t next) {
    const linear_call *c = raw;
    const slice s = slice_of(c, index);
    const hl_matrix *w = c->w[s.which];
    const uint8_t *ahead = NULL;
    if (next >= 0) {
        const slice after = slice_of(c, next);
        ahead = hl_rows_at(c->w[after.which], after.r0);
    }
    for (int64_t t = 0; t < c->tokens; t += HL_MAX_TOKENS) {
        const int m = (int)hl_least(c->tokens - t, HL_MAX_TOKENS);
        const hl_inputs x = {c->x.words + t * c->token_words, c->x.post + 2 * t};
        const hl_outputs y = {c->out[s.which] + t * w->n + s.r0, w->n, s.r0};
        c->tier->dot(w, s.r0, s.r1, &x, m, &y, t + m < c->tokens ? hl_rows_at(w, s.r0) : ahead);
    }
}

int hl_linear_many(const hl_tier *tier, const hl_matrix *const *w, int count, const float *x, int64_t tokens,
                   float *const *out, int threads) {
    int alike = count <= MAX_MATRICES, failed = 0;
    for (int i = 1; i < count; i++) alike &= !w[i]->scale == !w[0]->scale;
    if (!alike) { /* x is prepared for one type of weight */
        for (int i = 0; i < count; i++) failed |= hl_linear(tier, w[i], x, tokens, out[i], threads);
        return failed;
    }
    const int64_t k = w[0]->k, token_words = hl_token_words(tier, k);
    hl_word *words = hl_scratch((size_t)(tokens * (token_words + 2)) * sizeof *words);
    if (!words) return -1;
    float *post = (float *)(words + tokens * token_words);
    hl_prepare_tokens(tier, x, k, w[0]->scale != NULL, tokens, words, post, threads);
    linear_call c = {tier, w, out, {words, post}, tokens, HL_MAX_CHUNK, token_words, {0}, count};
    for (int i = 0; i < count; i++) c.chunk = hl_least(c.chunk, hl_chunk_rows(w[i], 1, threads));
    for (int i = 0; i < count; i++) c.start[i + 1] = c.start[i] + (w[i]->n + c.chunk - 1) / c.chunk;
    hl_parallel_chained(linear_task, &c, c.start[count], threads);
    free(words);
    return 0;
}

int hl_linear(const hl_tier *tier, const hl_matrix *w, const float *x, int64_t tokens, float *out, int threads) {
    return hl_linear_many(tier, &w, 1, x, tokens, &out, threads);
}
