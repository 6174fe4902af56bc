/* A whole MoE layer as one call.

   Slots (token, choice) are grouped by expert so that one read of an expert's weights serves all its tokens. Three
   phases, each a loop of independent tasks: gate/up rows with SiLU, down rows, weighted sum per token. A layer's time
   is reading weights; everything else is kept to a few microseconds. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "forward.h"
#include "pool.h"

enum { MAX_SLOTS = 4096 }; /* slots at a time: bounds scratch to MAX_SLOTS * (4 H + 8 I) bytes or so */

typedef struct {
    const hl_tier *tier;
    const hl_moe *moe;
    int is_fp8;
    int64_t tokens, k, active;
    const float *weights;   /* [T, k] */
    float *out;             /* [T, H] */
    int64_t *expert;        /* [active] */
    int64_t *start;         /* [active + 1] into the grouped slots */
    int64_t *token_of;      /* [slots] token of a grouped slot */
    int64_t *place_of;      /* [T * k] grouped slot of a slot, -1 when skipped */
    _Atomic int64_t *left;  /* [active] gate/up tasks not finished */
    void *x, *hidden_x;     /* prepared tokens [T], prepared hidden states [slots] */
    size_t x_stride, hidden_stride;
    float *hidden, *y;      /* [slots, I], [slots, H] */
    int64_t up_chunk, up_chunks, down_chunk, down_chunks;
} moe_call;

/* Rows and tokens of a task's up projection, kept on its stack. */
enum { UP_FLOATS = 16384 };

static const uint8_t *up_weights(const moe_call *c, int64_t index) {
    return hl_rows_at(&c->moe->gate[c->expert[index / c->up_chunks]], index % c->up_chunks * c->up_chunk);
}

static const uint8_t *down_weights(const moe_call *c, int64_t index) {
    return hl_rows_at(&c->moe->down[c->expert[index / c->down_chunks]], index % c->down_chunks * c->down_chunk);
}

static void gate_up_task(void *raw, int64_t index, int64_t next) {
    moe_call *c = raw;
    const int64_t a = index / c->up_chunks, e = c->expert[a], width = c->moe->i, end = c->start[a + 1];
    const int64_t r0 = index % c->up_chunks * c->up_chunk, r1 = hl_least(r0 + c->up_chunk, width);
    const hl_matrix *gate = &c->moe->gate[e], *up = &c->moe->up[e];
    const uint8_t *after = next >= 0 ? up_weights(c, next) : NULL;
    float up_y[UP_FLOATS] __attribute__((aligned(64)));
    for (int64_t s = c->start[a], m; s < end; s += m) {
        m = hl_least(hl_least(end - s, HL_MAX_TOKENS), UP_FLOATS / (r1 - r0));
        const hl_inputs x = {c->x, c->x_stride, c->token_of + s};
        float *hidden = c->hidden + s * width;
        const hl_outputs to_gate = {hidden + r0, width, r0}, to_up = {up_y, r1 - r0, r0};
        c->tier->dot(gate, r0, r1, &x, (int)m, &to_gate, hl_rows_at(up, r0));
        c->tier->dot(up, r0, r1, &x, (int)m, &to_up, s + m < end ? hl_rows_at(gate, r0) : after);
        for (int64_t j = 0; j < m; j++) c->tier->silu_mul(hidden + j * width + r0, up_y + j * (r1 - r0), r1 - r0);
    }
    /* Whoever finishes an expert's last rows rounds its hidden states for phase 2: no extra barrier. */
    if (atomic_fetch_sub(&c->left[a], 1) == 1)
        for (int64_t s = c->start[a]; s < end; s++)
            c->tier->prepare(c->hidden + s * width, width, c->is_fp8, hl_token_at(c->hidden_x, c->hidden_stride, s));
}

static void down_task(void *raw, int64_t index, int64_t next) {
    const moe_call *c = raw;
    const int64_t a = index / c->down_chunks, e = c->expert[a], h = c->moe->h, end = c->start[a + 1];
    const int64_t r0 = index % c->down_chunks * c->down_chunk, r1 = hl_least(r0 + c->down_chunk, h);
    const hl_matrix *down = &c->moe->down[e];
    const uint8_t *after = next >= 0 ? down_weights(c, next) : NULL;
    for (int64_t s = c->start[a]; s < end; s += HL_MAX_TOKENS) {
        const int m = (int)hl_least(end - s, HL_MAX_TOKENS);
        const hl_inputs x = {hl_token_at(c->hidden_x, c->hidden_stride, s), c->hidden_stride, NULL};
        const hl_outputs y = {c->y + s * h + r0, h, r0};
        c->tier->dot(down, r0, r1, &x, m, &y, s + m < end ? hl_rows_at(down, r0) : after);
    }
}

static void combine_task(void *raw, int64_t t) {
    const moe_call *c = raw;
    const int64_t h = c->moe->h;
    float *out = c->out + t * h;
    memset(out, 0, sizeof(float) * (size_t)h);
    for (int64_t j = 0; j < c->k; j++) {
        const int64_t place = c->place_of[t * c->k + j];
        if (place < 0) continue;
        const float weight = c->weights[t * c->k + j], *y = c->y + place * h;
        for (int64_t n = 0; n < h; n++) out[n] += weight * y[n];
    }
}

/* Stable counting sort of the slots by expert. */
static void group_slots(moe_call *c, const int32_t *ids, int64_t *count) {
    const int64_t experts = c->moe->experts, slots = c->tokens * c->k;
    int64_t used = 0;
    memset(count, 0, sizeof(int64_t) * (size_t)experts);
    for (int64_t s = 0; s < slots; s++)
        if (ids[s] >= 0) count[ids[s]]++;
    c->active = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (!count[e]) continue;
        c->expert[c->active] = e;
        c->start[c->active++] = used;
        used += count[e];
        count[e] = used - count[e]; /* from here on: the expert's next free place */
    }
    c->start[c->active] = used;
    for (int64_t s = 0; s < slots; s++) {
        c->place_of[s] = ids[s] < 0 ? -1 : count[ids[s]]++;
        if (ids[s] >= 0) c->token_of[c->place_of[s]] = s / c->k;
    }
}

static void run_phases(moe_call *c, const float *x, int threads) {
    const int64_t e = c->active ? c->expert[0] : 0;
    c->up_chunk = hl_chunk_rows(&c->moe->gate[e], 2 * c->active, threads);
    c->down_chunk = hl_chunk_rows(&c->moe->down[e], c->active, threads);
    c->up_chunks = (c->moe->i + c->up_chunk - 1) / c->up_chunk;
    c->down_chunks = (c->moe->h + c->down_chunk - 1) / c->down_chunk;
    for (int64_t a = 0; a < c->active; a++) c->left[a] = c->up_chunks;
    const hl_prepare p = {c->tier, x, c->moe->h, c->is_fp8, c->x, c->x_stride};
    hl_prepare_tokens(&p, c->tokens, threads);
    hl_parallel_chained(gate_up_task, c, c->active * c->up_chunks, threads);
    hl_parallel_chained(down_task, c, c->active * c->down_chunks, threads);
    hl_parallel(combine_task, c, c->tokens, c->tokens <= 8 ? 1 : threads);
}

static int is_fp8_layer(const hl_moe *moe) {
    for (int64_t e = 0; e < moe->experts; e++)
        if (moe->gate[e].data) return moe->gate[e].scale != NULL;
    return 0;
}

int hl_moe_forward(const hl_tier *tier, const hl_moe *moe, const float *x, int64_t tokens, int64_t k,
                   const int32_t *ids, const float *weights, float *out, int threads) {
    const int64_t step = hl_least(tokens, MAX_SLOTS / k ? MAX_SLOTS / k : 1), slots = step * k;
    const int64_t groups = hl_least(moe->experts, slots);
    const size_t word = sizeof(int64_t);
    moe_call c = {.tier = tier, .moe = moe, .is_fp8 = is_fp8_layer(moe), .k = k};
    c.x_stride = tier->token_bytes(moe->h);
    c.hidden_stride = tier->token_bytes(moe->i);
    int64_t *index = hl_scratch(word * (size_t)(moe->experts + 3 * groups + 1 + 2 * slots));
    c.x = hl_scratch(c.x_stride * (size_t)step);
    c.hidden_x = hl_scratch(c.hidden_stride * (size_t)slots);
    c.hidden = hl_scratch(sizeof(float) * (size_t)(slots * moe->i));
    c.y = hl_scratch(sizeof(float) * (size_t)(slots * moe->h));
    const int failed = !index || !c.x || !c.hidden_x || !c.hidden || !c.y;
    if (!failed) {
        int64_t *count = index;
        c.expert = count + moe->experts;
        c.start = c.expert + groups;
        c.left = (_Atomic int64_t *)(c.start + groups + 1);
        c.token_of = (int64_t *)c.left + groups;
        c.place_of = c.token_of + slots;
        for (int64_t t = 0; t < tokens; t += step) {
            c.tokens = hl_least(step, tokens - t);
            c.weights = weights + t * k;
            c.out = out + t * moe->h;
            group_slots(&c, ids + t * k, count);
            run_phases(&c, x + t * moe->h, threads);
        }
    }
    free(index);
    free(c.x);
    free(c.hidden_x);
    free(c.hidden);
    free(c.y);
    return failed ? -1 : 0;
}
