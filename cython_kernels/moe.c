/* A whole MoE layer as one call.

   Slots (token, choice) are grouped by expert so that one read of an expert's weights serves all its tokens. Three
   phases, each a loop of independent tasks: gate/up rows with SiLU, down rows, weighted sum per token. A layer's time
   is reading weights; everything else is kept to a few microseconds. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "forward.h"
#include "pool.h"

enum { MAX_SLOTS = 8192 }; /* slots at a time: bounds scratch to MAX_SLOTS * (6 H + 6 I) bytes or so */

typedef struct {
    const hl_tier *tier;
    const hl_moe *moe;
    int is_fp8;
    int64_t tokens, k, active;
    const int32_t *ids;     /* [T, k] */
    const float *x;         /* [T, H] */
    const float *weights;   /* [T, k] */
    float *out;             /* [T, H] */
    int64_t *expert;        /* [active] */
    int64_t *start;         /* [active + 1] into the grouped slots */
    int64_t *group_of;      /* [E] place in `expert`, of experts that have slots */
    int64_t *place_of;      /* [T * k] grouped slot of a slot, -1 when skipped */
    _Atomic int64_t *left;  /* [active] gate/up tasks not finished */
    hl_inputs *inputs;      /* [active] prepared x of an expert's slots */
    hl_word *token_x, *slot_x, *hidden_x; /* prepared: x by token (for experts with one slot), by slot, hidden states */
    float *token_post, *slot_post, *hidden_post;
    int64_t x_words, hidden_words; /* of one token */
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

/* x of one token for each of its slots. Experts with a single slot share one copy. */
static void prepare_task(void *raw, int64_t t) {
    const moe_call *c = raw;
    const int64_t h = c->moe->h;
    int shared = 0;
    for (int64_t j = 0; j < c->k; j++) {
        const int64_t place = c->place_of[t * c->k + j];
        if (place < 0) continue;
        const int64_t a = c->group_of[c->ids[t * c->k + j]], first = c->start[a], count = c->start[a + 1] - first;
        if (count > 1) {
            hl_prepare_one(c->tier, c->x + t * h, h, c->is_fp8, place - first, count, c->slot_x + first * c->x_words,
                           c->slot_post + 2 * first);
            c->inputs[a] = (hl_inputs){c->slot_x + first * c->x_words, c->slot_post + 2 * first};
            continue;
        }
        c->inputs[a] = (hl_inputs){c->token_x + t * c->x_words, c->token_post + 2 * t};
        if (!shared) hl_prepare_one(c->tier, c->x + t * h, h, c->is_fp8, 0, 1, c->token_x + t * c->x_words, c->token_post + 2 * t);
        shared = 1;
    }
}

static void gate_up_task(void *raw, int64_t index, int64_t next) {
    moe_call *c = raw;
    const int64_t a = index / c->up_chunks, e = c->expert[a], width = c->moe->i, end = c->start[a + 1];
    const int64_t r0 = index % c->up_chunks * c->up_chunk, r1 = hl_least(r0 + c->up_chunk, width);
    const hl_matrix *gate = &c->moe->gate[e], *up = &c->moe->up[e];
    const uint8_t *after = next >= 0 ? up_weights(c, next) : NULL;
    float up_y[UP_FLOATS] __attribute__((aligned(64)));
    for (int64_t s = c->start[a], m; s < end; s += m) {
        m = hl_least(hl_least(end - s, HL_MAX_TOKENS), UP_FLOATS / (r1 - r0) / HL_MAX_GROUP * HL_MAX_GROUP);
        const int64_t done = s - c->start[a];
        const hl_inputs x = {c->inputs[a].words + done * c->x_words, c->inputs[a].post + 2 * done};
        float *hidden = c->hidden + s * width;
        const hl_outputs to_gate = {hidden + r0, width, r0}, to_up = {up_y, r1 - r0, r0};
        c->tier->dot(gate, r0, r1, &x, (int)m, &to_gate, hl_rows_at(up, r0));
        c->tier->dot(up, r0, r1, &x, (int)m, &to_up, s + m < end ? hl_rows_at(gate, r0) : after);
        for (int64_t j = 0; j < m; j++) c->tier->silu_mul(hidden + j * width + r0, up_y + j * (r1 - r0), r1 - r0);
    }
    /* Whoever finishes an expert's last rows rounds its hidden states for phase 2: no extra barrier. */
    if (atomic_fetch_sub(&c->left[a], 1) == 1)
        for (int64_t s = c->start[a]; s < end; s++)
            hl_prepare_one(c->tier, c->hidden + s * width, width, c->is_fp8, s - c->start[a], end - c->start[a],
                           c->hidden_x + c->start[a] * c->hidden_words, c->hidden_post + 2 * c->start[a]);
}

static void down_task(void *raw, int64_t index, int64_t next) {
    const moe_call *c = raw;
    const int64_t a = index / c->down_chunks, e = c->expert[a], h = c->moe->h, end = c->start[a + 1];
    const int64_t r0 = index % c->down_chunks * c->down_chunk, r1 = hl_least(r0 + c->down_chunk, h);
    const hl_matrix *down = &c->moe->down[e];
    const uint8_t *after = next >= 0 ? down_weights(c, next) : NULL;
    for (int64_t s = c->start[a]; s < end; s += HL_MAX_TOKENS) {
        const int m = (int)hl_least(end - s, HL_MAX_TOKENS);
        const hl_inputs x = {c->hidden_x + s * c->hidden_words, c->hidden_post + 2 * s};
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
static void group_slots(moe_call *c, int64_t *count) {
    const int64_t experts = c->moe->experts, slots = c->tokens * c->k;
    const int32_t *ids = c->ids;
    int64_t used = 0;
    memset(count, 0, sizeof(int64_t) * (size_t)experts);
    for (int64_t s = 0; s < slots; s++)
        if (ids[s] >= 0) count[ids[s]]++;
    c->active = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (!count[e]) continue;
        c->group_of[e] = c->active;
        c->expert[c->active] = e;
        c->start[c->active++] = used;
        used += count[e];
        count[e] = used - count[e]; /* from here on: the expert's next free place */
    }
    c->start[c->active] = used;
    for (int64_t s = 0; s < slots; s++) c->place_of[s] = ids[s] < 0 ? -1 : count[ids[s]]++;
}

static void run_phases(moe_call *c, int threads) {
    const int64_t e = c->active ? c->expert[0] : 0;
    c->up_chunk = hl_chunk_rows(&c->moe->gate[e], 2 * c->active, threads);
    c->down_chunk = hl_chunk_rows(&c->moe->down[e], c->active, threads);
    c->up_chunks = (c->moe->i + c->up_chunk - 1) / c->up_chunk;
    c->down_chunks = (c->moe->h + c->down_chunk - 1) / c->down_chunk;
    for (int64_t a = 0; a < c->active; a++) c->left[a] = c->up_chunks;
    const int small = c->tokens <= 8 ? 1 : threads; /* what a wake-up would not pay for */
    hl_parallel(prepare_task, c, c->tokens, small);
    hl_parallel_chained(gate_up_task, c, c->active * c->up_chunks, threads);
    hl_parallel_chained(down_task, c, c->active * c->down_chunks, threads);
    hl_parallel(combine_task, c, c->tokens, small);
}

static int is_fp8_layer(const hl_moe *moe) {
    for (int64_t e = 0; e < moe->experts; e++)
        if (moe->gate[e].data) return moe->gate[e].scale != NULL;
    return 0;
}

/* Parts of one allocation, each a multiple of 64 bytes. */
static void *part(uint8_t **at, size_t bytes) {
    uint8_t *p = *at;
    *at += (bytes + 63) / 64 * 64;
    return p;
}

static size_t lay_out(moe_call *c, uint8_t *base, int64_t tokens, int64_t slots, int64_t groups, int64_t **count) {
    const size_t word = sizeof(int64_t), x_bytes = 4 * (size_t)c->x_words, hidden_bytes = 4 * (size_t)c->hidden_words;
    uint8_t *at = base;
    *count = part(&at, word * (size_t)c->moe->experts);
    c->group_of = part(&at, word * (size_t)c->moe->experts);
    c->expert = part(&at, word * (size_t)groups);
    c->start = part(&at, word * (size_t)(groups + 1));
    c->left = part(&at, word * (size_t)groups);
    c->place_of = part(&at, word * (size_t)slots);
    c->inputs = part(&at, sizeof(hl_inputs) * (size_t)groups);
    c->token_x = part(&at, x_bytes * (size_t)tokens);
    c->slot_x = part(&at, x_bytes * (size_t)slots);
    c->hidden_x = part(&at, hidden_bytes * (size_t)slots);
    c->token_post = part(&at, 8 * (size_t)tokens);
    c->slot_post = part(&at, 8 * (size_t)slots);
    c->hidden_post = part(&at, 8 * (size_t)slots);
    c->hidden = part(&at, sizeof(float) * (size_t)(slots * c->moe->i));
    c->y = part(&at, sizeof(float) * (size_t)(slots * c->moe->h));
    return (size_t)(at - base);
}

int hl_moe_forward(const hl_tier *tier, const hl_moe *moe, const float *x, int64_t tokens, int64_t k,
                   const int32_t *ids, const float *weights, float *out, int threads) {
    const int64_t step = hl_least(tokens, MAX_SLOTS / k ? MAX_SLOTS / k : 1), slots = step * k;
    const int64_t groups = hl_least(moe->experts, slots);
    int64_t *count;
    moe_call c = {.tier = tier, .moe = moe, .is_fp8 = is_fp8_layer(moe), .k = k};
    c.x_words = hl_token_words(tier, moe->h);
    c.hidden_words = hl_token_words(tier, moe->i);
    uint8_t *scratch = hl_scratch(lay_out(&c, NULL, step, slots, groups, &count));
    if (!scratch) return -1;
    lay_out(&c, scratch, step, slots, groups, &count);
    for (int64_t t = 0; t < tokens; t += step) {
        c.tokens = hl_least(step, tokens - t);
        c.ids = ids + t * k;
        c.x = x + t * moe->h;
        c.weights = weights + t * k;
        c.out = out + t * moe->h;
        group_slots(&c, count);
        run_phases(&c, threads);
    }
    free(scratch);
    return 0;
}
