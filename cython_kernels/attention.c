/* Attention of a step: cutting requests into tasks, and merging their pieces. See attention_piece.h. */
#include "attention.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "attention_piece.h"
#include "forward.h"
#include "pool.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,fma")))
#define LOG2_E 1.44269504f

enum {
    TASK_ROWS = 192, /* rows that a task takes, if one query has not more: their scores stay in L2 */
    FEW_ROWS = 64    /* up to this many rows of a head, pieces of the context are tasks of their own */
};

/* Some queries of one request and some key/value heads, over one piece of the context (then the result is partial) or
   over all of it. */
typedef struct {
    const hl_context *context;
    int64_t query, queries, group, groups;
    int64_t piece;       /* -1: all */
    int64_t partial;     /* where the partial results of the request begin: [pieces] of all its rows */
    int64_t cost, order;
} task;

typedef struct {
    const hl_attend *a;
    const hl_attention_tier *tier;
    task *tasks, *merges;
    int64_t count, merge_count;
    float *partial;
    uint32_t *scratch; /* one for each thread */
    int64_t scratch_words;
    _Atomic int *busy;
    int threads;
} call;

static const hl_attention_tier *tier_of(const hl_tier *tier) {
    if (strstr(tier->name, "bf16")) return &hl_attention_bf16;
    return strncmp(tier->name, "avx", 3) ? NULL : &hl_attention_avx2;
}

static int64_t pieces(const hl_context *c) { return (c->start + c->queries + HL_PIECE - 1) / HL_PIECE; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Results of `rows` rows: their largest scores, their sums, their mixtures. */
static int64_t result_floats(const hl_attend *a, int64_t rows) { return rows * (2 + hl_mixed_stride(a->d)); }

/* Of results of `rows` rows at `at`, those from row `first` on. */
static void point_results(hl_piece *p, float *at, int64_t rows, int64_t first) {
    p->largest = at + first;
    p->sum = at + rows + first;
    p->mixed = at + 2 * rows + first * hl_mixed_stride(p->d);
}

/* Adds a piece to those before it; the first `skipped` rows of a head stand before this piece and see none of it. */
TARGET static void merge(const hl_piece *into, const hl_piece *from, int64_t skipped) {
    const int64_t stride = hl_mixed_stride(into->d);
    for (int64_t r = 0; r < into->groups * into->rows; r++) {
        if (r % into->rows < skipped) continue;
        const float top = fmaxf(into->largest[r], from->largest[r]), shift = top == -INFINITY ? 0.0f : top;
        const float a = exp2f((into->largest[r] - shift) * into->scale);
        const float b = exp2f((from->largest[r] - shift) * into->scale);
        float *x = into->mixed + r * stride;
        const float *y = from->mixed + r * stride;
        into->largest[r] = top;
        into->sum[r] = into->sum[r] * a + from->sum[r] * b;
        for (int64_t i = 0; i < stride; i++) x[i] = x[i] * a + y[i] * b;
    }
}

/* Row r of group g of the task's results to its place in out[T, N, D]. */
TARGET static void finish(const hl_attend *a, const task *t, const hl_piece *p) {
    const int64_t per = a->n / a->g, stride = hl_mixed_stride(a->d);
    for (int64_t g = 0; g < p->groups; g++)
        for (int64_t r = 0; r < p->rows; r++) {
            const int64_t row = g * p->rows + r, query = t->context->row + t->query + r / per;
            float *out = a->out + (query * a->n + (t->group + g) * per + r % per) * a->d;
            const float *mixed = p->mixed + row * stride, by = 1.0f / p->sum[row];
            for (int64_t i = 0; i < a->d; i++) out[i] = mixed[i] * by;
        }
}

static hl_cached cached_run(const hl_attend *a, const task *t, int64_t piece) {
    const hl_context *c = t->context;
    const int64_t begin = piece * HL_PIECE, end = c->start + t->query + t->queries;
    return (hl_cached){a->keys + t->group * a->d, a->values + t->group * a->d, c->slots ? c->slots + begin : NULL,
                       c->first + begin, least(HL_PIECE, end - begin)};
}

static void prepare_queries(const call *c, const task *t, uint32_t *out) {
    const hl_attend *a = c->a;
    const int64_t per = a->n / a->g;
    for (int64_t g = t->group; g < t->group + t->groups; g++)
        for (int64_t i = 0; i < t->queries; i++)
            for (int64_t h = 0; h < per; h++)
                out += c->tier->query(a->q + ((t->context->row + t->query + i) * a->n + g * per + h) * a->d, a->d, out);
}

static uint32_t *claim_scratch(call *c, int *index) {
    for (int i = 0;; i = (i + 1) % c->threads)
        if (!atomic_exchange(&c->busy[i], 1)) {
            *index = i;
            return c->scratch + i * c->scratch_words;
        }
}

static void run_task(void *raw, int64_t index, int64_t next) {
    call *c = raw;
    const hl_attend *a = c->a;
    const task *t = &c->tasks[index];
    const int64_t per = a->n / a->g, rows = t->queries * per, all = rows * t->groups;
    int held;
    uint32_t *at = claim_scratch(c, &held);
    hl_piece p = {.stride = a->g * a->d, .groups = t->groups, .rows = rows, .per = per, .d = a->d};
    p.value_block = rows > FEW_ROWS ? HL_VALUE_BLOCK : HL_KEY_BLOCK;
    p.scale = LOG2_E / sqrtf((float)a->d);
    p.packed = at;
    p.scores = (float *)(at += hl_packed_words(a->d));
    p.q = at += all * HL_PIECE;
    prepare_queries(c, t, at);
    float *results = (float *)(at + all * a->d);

    hl_cached after = {NULL, NULL, NULL, 0, 0};
    if (next >= 0) after = cached_run(a, &c->tasks[next], c->tasks[next].piece < 0 ? 0 : c->tasks[next].piece);
    const int64_t first = t->piece < 0 ? 0 : t->piece, start = t->context->start + t->query;
    const int64_t last = t->piece < 0 ? (start + t->queries + HL_PIECE - 1) / HL_PIECE : t->piece + 1;
    hl_piece total = p;
    for (int64_t i = first; i < last; i++) {
        p.cached = cached_run(a, t, i);
        p.next = i + 1 < last ? cached_run(a, t, i + 1) : after;
        p.visible = start + 1 - i * HL_PIECE;
        if (t->piece < 0)
            point_results(&p, results + (i > first ? result_floats(a, all) : 0), all, 0);
        else
            point_results(&p, c->partial + t->partial + i * result_floats(a, rows * a->g), rows * a->g,
                          t->group * rows);
        c->tier->piece(&p);
        if (i == first)
            total = p;
        else
            merge(&total, &p, p.visible > 0 ? 0 : least(rows, (1 - p.visible) * per));
    }
    if (t->piece < 0) finish(a, t, &total);
    atomic_store(&c->busy[held], 0);
}

static void run_merge(void *raw, int64_t index) {
    const call *c = raw;
    const hl_attend *a = c->a;
    const task *t = &c->merges[index];
    const int64_t per = a->n / a->g, rows = t->queries * per, all = rows * a->g;
    hl_piece total = {.groups = 1, .rows = rows, .d = a->d, .scale = LOG2_E / sqrtf((float)a->d)}, p = total;
    point_results(&total, c->partial + t->partial, all, t->group * rows);
    for (int64_t i = 1; i < pieces(t->context); i++) {
        const int64_t before = i * HL_PIECE - t->context->start;
        point_results(&p, c->partial + t->partial + i * result_floats(a, all), all, t->group * rows);
        merge(&total, &p, before > 0 ? before * per : 0);
    }
    finish(a, t, &total);
}

/* Heads that a task of few queries takes: all, so that the cache is read in the order of addresses, unless that leaves
   threads without work. */
static int64_t heads_together(const hl_attend *a, int threads) {
    int64_t tasks = 0, groups = a->g;
    for (int64_t i = 0; i < a->count; i++) tasks += pieces(&a->contexts[i]);
    while (groups > 1 && tasks * ((a->g + groups - 1) / groups) < 4 * (int64_t)threads) groups = (groups + 1) / 2;
    return groups;
}

/* Counts the tasks and the memory that they need, and lists them if there is a list. */
static void list_tasks(call *c, int64_t together, int64_t *partial, int64_t *rows) {
    const hl_attend *a = c->a;
    const int64_t per = a->n / a->g, block = per < TASK_ROWS ? TASK_ROWS / per : 1;
    c->count = c->merge_count = *partial = *rows = 0;
    for (int64_t i = 0; i < a->count; i++) {
        const hl_context *x = &a->contexts[i];
        const int64_t end = x->start + x->queries, few = x->queries * per <= FEW_ROWS;
        for (int64_t q = 0; q < x->queries && !few; q += block) {
            const int64_t n = least(block, x->queries - q);
            *rows = n * per > *rows ? n * per : *rows;
            for (int64_t g = 0; g < a->g; g++, c->count++)
                if (c->tasks) c->tasks[c->count] = (task){x, q, n, g, 1, -1, 0, n * per * (x->start + q + n), c->count};
        }
        if (!few) continue;
        const int64_t fit = TASK_ROWS / (x->queries * per), groups = least(together, fit > 1 ? fit : 1);
        *rows = x->queries * per * groups > *rows ? x->queries * per * groups : *rows;
        for (int64_t k = 0; k < pieces(x); k++)
            for (int64_t g = 0; g < a->g; g += groups, c->count++) {
                const int64_t n = least(groups, a->g - g), tokens = least(HL_PIECE, end - k * HL_PIECE);
                const int64_t cost = n * x->queries * per * tokens;
                if (c->tasks) c->tasks[c->count] = (task){x, 0, x->queries, g, n, k, *partial, cost, c->count};
            }
        for (int64_t g = 0; g < a->g; g++, c->merge_count++)
            if (c->tasks) c->merges[c->merge_count] = (task){x, 0, x->queries, g, 1, -1, *partial, 0, 0};
        *partial += pieces(x) * result_floats(a, x->queries * per * a->g);
    }
}

static int by_cost(const void *x, const void *y) {
    const task *a = x, *b = y;
    if (a->cost != b->cost) return a->cost > b->cost ? -1 : 1;
    return a->order < b->order ? -1 : 1;
}

int hl_attend_all(const hl_tier *tier, const hl_attend *a, int threads) {
    call c = {.a = a, .tier = tier_of(tier)};
    if (!c.tier) return -2;
    int64_t partial, rows;
    const int64_t together = heads_together(a, threads);
    list_tasks(&c, together, &partial, &rows);
    c.threads = (int)least(threads, c.count ? c.count : 1);
    c.scratch_words = (hl_packed_words(a->d) + rows * (HL_PIECE + a->d) + 2 * result_floats(a, rows) + 15) / 16 * 16;
    const int64_t list = (c.count + c.merge_count) * (int64_t)sizeof(task) + c.threads * (int64_t)sizeof *c.busy;
    const int64_t floats = partial + c.threads * c.scratch_words;
    float *memory = hl_scratch((size_t)(4 * (floats + 2) + list));
    if (!memory) return -1;
    c.scratch = (uint32_t *)memory;
    c.partial = memory + c.threads * c.scratch_words;
    c.tasks = (task *)(void *)(c.partial + partial + partial % 2);
    c.merges = c.tasks + c.count;
    list_tasks(&c, together, &partial, &rows);
    c.busy = (_Atomic int *)(c.merges + c.merge_count);
    for (int i = 0; i < c.threads; i++) c.busy[i] = 0;
    qsort(c.tasks, (size_t)c.count, sizeof(task), by_cost); /* longest first */
    hl_parallel_chained(run_task, &c, c.count, threads);
    hl_parallel(run_merge, &c, c.merge_count, threads);
    free(memory);
    return 0;
}
#endif
