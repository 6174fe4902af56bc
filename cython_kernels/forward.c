/* One linear layer, and the read loop it is measured against: cutting rows into tasks, shared by all tiers. */
#include "forward.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "pool.h"

const hl_tier *hl_tier_at(int index) {
#if defined(__x86_64__)
    static const hl_tier *const all[] = {&hl_avx512, &hl_avx2};
    for (int i = 0; i < 2; i++)
        if (all[i]->supported() && index-- == 0) return all[i];
#endif
    (void)index;
    return NULL;
}

void *hl_scratch(size_t bytes) { return aligned_alloc(64, bytes ? (bytes + 63) / 64 * 64 : 64); }

int64_t hl_chunk_rows(const hl_matrix *w, int64_t matrices, int threads) {
    /* A quarter of a thread's share, to even out the threads; up to 256 KiB, since every new stream starts with cache
       misses (experiments/LOG.md), and small enough to be decoded again from L2. */
    const int64_t row = w->k * (w->scale ? 1 : 2) + 1, share = matrices * w->n * row / (4 * (int64_t)threads);
    const int64_t bytes = share < 32768 ? 32768 : share > 262144 ? 262144 : share;
    const int64_t rows = bytes / row / 16 * 16;
    return rows < 16 ? 16 : rows > HL_MAX_CHUNK ? HL_MAX_CHUNK : rows;
}

static void prepare_task(void *raw, int64_t token) {
    const hl_prepare *p = raw;
    p->tier->prepare(p->x + token * p->k, p->k, p->is_fp8, hl_token_at(p->out, p->stride, token));
}

void hl_prepare_tokens(const hl_prepare *p, int64_t tokens, int threads) {
    hl_parallel(prepare_task, (void *)p, tokens, tokens <= HL_MAX_TOKENS ? 1 : threads);
}

typedef struct {
    const hl_tier *tier;
    const hl_matrix *w;
    const void *prepared;
    size_t stride;
    int64_t tokens, chunk;
    float *out;
} linear_call;

static void linear_task(void *raw, int64_t index) {
    const linear_call *c = raw;
    const int64_t r0 = index * c->chunk, r1 = r0 + c->chunk < c->w->n ? r0 + c->chunk : c->w->n;
    for (int64_t t = 0; t < c->tokens; t += HL_MAX_TOKENS) {
        const hl_token *x[HL_MAX_TOKENS];
        float *y[HL_MAX_TOKENS];
        const int m = (int)(c->tokens - t < HL_MAX_TOKENS ? c->tokens - t : HL_MAX_TOKENS);
        for (int j = 0; j < m; j++) {
            x[j] = hl_token_at(c->prepared, c->stride, t + j);
            y[j] = c->out + (t + j) * c->w->n;
        }
        c->tier->dot(c->w, r0, r1, x, m, y);
    }
}

int hl_linear(const hl_tier *tier, const hl_matrix *w, const float *x, int64_t tokens, float *out, int threads) {
    const size_t stride = tier->token_bytes(w->k);
    void *prepared = hl_scratch(stride * (size_t)tokens);
    if (!prepared) return -1;
    const hl_prepare p = {tier, x, w->k, w->scale != NULL, prepared, stride};
    hl_prepare_tokens(&p, tokens, threads);
    linear_call c = {tier, w, prepared, stride, tokens, hl_chunk_rows(w, 1, threads), out};
    hl_parallel(linear_task, &c, (w->n + c.chunk - 1) / c.chunk, threads);
    free(prepared);
    return 0;
}

typedef struct {
    const hl_tier *tier;
    const uint8_t *p;
    int64_t words, chunk;
    _Atomic uint64_t total;
} read_call;

static void read_task(void *raw, int64_t index) {
    read_call *c = raw;
    const int64_t w0 = index * c->chunk, w1 = w0 + c->chunk < c->words ? w0 + c->chunk : c->words;
    if (w0 < w1) atomic_fetch_add(&c->total, c->tier->read(c->p + 8 * w0, w1 - w0));
}

uint64_t hl_read(const hl_tier *tier, const uint8_t *p, int64_t words, int threads) {
    /* A few contiguous slices per thread: one slow core must not hold back the total. */
    const int64_t slices = threads == 1 ? 1 : 8 * (int64_t)threads;
    read_call c = {tier, p, words, ((words + slices - 1) / slices + 31) / 32 * 32, 0};
    hl_parallel(read_task, &c, slices, threads);
    return c.total;
}
