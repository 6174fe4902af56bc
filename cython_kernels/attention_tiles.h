/* The products of attention and the walk over a piece: included once per tier, after defining

     TARGET, INLINE    function attributes that enable the instruction set
     VEC, LANES        float vector and its lanes
     VECTORS           vectors of a panel: the columns that a row is multiplied with at a time
     PAIR              elements of a 32-bit word: two BF16 or one float
     ZERO(), LOAD(p), STORE(p, v)
     MULTIPLY(acc, word, v)   acc + (word, broadcast) times v, where v holds LANES words
     pack_keys(rows, d, out)      LANES rows of BF16 -> out[step * VECTORS * LANES + lane], step = word of d
     pack_values(rows, d, out, panel)   PAIR rows -> one word of each column, panels `panel` words apart
     softmax(scores, seen, limit, scale, largest, sum)   scores to probabilities, in place, as words

   A product is c[row, column] = sum over steps of a[row, step] * b[step, column], in the order of steps: lanes are
   cached tokens for the scores, and elements of D for the mixture of values. */

enum { WIDTH = VECTORS * LANES, ROWS = 6 };

INLINE void dot(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t steps, float *c, int64_t c_stride,
                int add, const int rows, const int vectors) {
    VEC acc[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) acc[r][v] = add ? LOAD(c + r * c_stride + v * LANES) : ZERO();
    for (int64_t s = 0; s < steps; s++) {
        VEC right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) right[v] = LOAD((const float *)b + s * WIDTH + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[r][v] = MULTIPLY(acc[r][v], a[r * a_stride + s], right[v]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) STORE(c + r * c_stride + v * LANES, acc[r][v]);
}

/* One specialisation for each shape, so that the accumulators are registers. */
#define DOT_CASE(r, v) \
    case (r) * 4 + (v): if ((v) <= VECTORS) dot(a, a_stride, b, steps, c, c_stride, add, r, (v) <= VECTORS ? (v) : 1); break;
#define DOT_CASES(r) DOT_CASE(r, 1) DOT_CASE(r, 2) DOT_CASE(r, 3) DOT_CASE(r, 4)

TARGET static void dot_any(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t steps, float *c,
                           int64_t c_stride, int add, int rows, int vectors) {
    switch (rows * 4 + vectors) {
        DOT_CASES(1) DOT_CASES(2) DOT_CASES(3) DOT_CASES(4) DOT_CASES(5) DOT_CASES(6)
    }
}

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* Tokens that row r sees. */
static inline int64_t seen(const hl_piece *p, int64_t r) {
    const int64_t n = at_most(p->visible + r / p->per, p->cached.count);
    return n > 0 ? n : 0;
}

/* Rows multiplied together: evenly many, since few rows leave the multipliers waiting for each other. */
static inline int64_t row_step(int64_t rows) {
    const int64_t steps = (rows + ROWS - 1) / ROWS;
    return (rows + steps - 1) / steps;
}

static inline const uint16_t *entry(const hl_piece *p, const hl_cached *c, const uint16_t *base, int64_t token) {
    return base + (c->slots ? c->slots[token] : c->first + token) * p->stride;
}

/* Walks ahead of the packing, in the order of addresses: DRAM sees one sequential stream, though heads are packed one
   after another. `stage`: keys, values, keys of what comes next. */
typedef struct {
    const hl_piece *p;
    int64_t token, head;
    int stage;
} ahead;

INLINE void prefetch_rows(ahead *w, int count) {
    const hl_piece *p = w->p;
    for (int i = 0; i < count && w->stage < 3; i++) {
        const hl_cached *c = w->stage == 2 ? &p->next : &p->cached;
        if (w->token >= c->count) {
            w->token = w->head = 0;
            w->stage++;
            continue;
        }
        const uint16_t *at = entry(p, c, w->stage == 1 ? c->values : c->keys, w->token) + w->head * p->d;
        for (int64_t k = 0; k < p->d; k += 32) _mm_prefetch((const char *)(at + k), _MM_HINT_T1);
        if (++w->head == p->groups) {
            w->head = 0;
            w->token++;
        }
    }
}

/* Scores of the tokens from `first` on, a block at a time. */
TARGET static void score_block(const hl_piece *p, int64_t first, uint32_t *packed, const uint16_t *zeros, ahead *w) {
    const int64_t count = at_most(HL_KEY_BLOCK, p->cached.count - first), words = p->d / PAIR;
    const int64_t step = row_step(p->rows);
    for (int64_t g = 0; g < p->groups; g++) {
        for (int64_t t = 0; t < count; t += LANES) {
            const uint16_t *rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = t + i < count ? entry(p, &p->cached, p->cached.keys, first + t + i) + g * p->d : zeros;
            pack_keys(rows, p->d, packed + t / WIDTH * WIDTH * words + t % WIDTH);
            prefetch_rows(w, LANES);
        }
        const uint32_t *q = p->q + g * p->rows * words;
        float *scores = p->scores + g * p->rows * HL_PIECE + first;
        for (int64_t t = 0; t < count; t += WIDTH)
            for (int64_t r = 0; r < p->rows; r += step) {
                const int64_t rows = at_most(step, p->rows - r);
                const int64_t columns = at_most(seen(p, r + rows - 1) - first - t, WIDTH);
                if (columns > 0)
                    dot_any(q + r * words, words, packed + t * words, words, scores + r * HL_PIECE + t, HL_PIECE, 0,
                            (int)rows, (int)((columns + LANES - 1) / LANES));
            }
    }
}

/* Adds the values of the tokens from `first` on, weighted, to what the tokens before gave. */
TARGET static void mix_block(const hl_piece *p, int64_t first, uint32_t *packed, const uint16_t *zeros, ahead *w) {
    const int64_t count = at_most(p->value_block, p->cached.count - first), stride = hl_mixed_stride(p->d);
    const int64_t panel = p->value_block / PAIR * WIDTH, step = row_step(p->rows);
    for (int64_t g = 0; g < p->groups; g++) {
        for (int64_t t = 0; t < count; t += PAIR) {
            const uint16_t *rows[PAIR];
            for (int i = 0; i < PAIR; i++)
                rows[i] = t + i < count ? entry(p, &p->cached, p->cached.values, first + t + i) + g * p->d : zeros;
            pack_values(rows, p->d, packed + t / PAIR * WIDTH, panel);
            prefetch_rows(w, PAIR);
        }
        const uint32_t *weights = (const uint32_t *)p->scores + g * p->rows * HL_PIECE + first / PAIR;
        float *mixed = p->mixed + g * p->rows * stride;
        for (int64_t c = 0; c < p->d; c += WIDTH)
            for (int64_t r = 0; r < p->rows; r += step) {
                const int64_t rows = at_most(step, p->rows - r), left = seen(p, r + rows - 1) - first;
                const int64_t steps = left > 0 ? (at_most(left, count) + PAIR - 1) / PAIR : 0;
                dot_any(weights + r * HL_PIECE, HL_PIECE, packed + c / WIDTH * panel, steps, mixed + r * stride + c,
                        stride, first > 0, (int)rows, (int)((at_most(WIDTH, p->d - c) + LANES - 1) / LANES));
            }
    }
}

TARGET static void piece(const hl_piece *p) {
    const int64_t wide = (p->d + 63) / 64 * 64;
    uint16_t *zeros = (uint16_t *)p->packed;
    uint32_t *packed = p->packed + wide / 2;
    memset(zeros, 0, (size_t)wide * 2);
    ahead w = {p, at_most(HL_KEY_BLOCK, p->cached.count), 0, 0};
    for (int64_t first = 0; first < p->cached.count; first += HL_KEY_BLOCK) score_block(p, first, packed, zeros, &w);
    for (int64_t r = 0; r < p->groups * p->rows; r++) {
        const int64_t n = seen(p, r % p->rows);
        softmax(p->scores + r * HL_PIECE, n, at_most(n + ROWS, p->cached.count), p->scale, p->largest + r, p->sum + r);
    }
    for (int64_t first = 0; first < p->cached.count; first += p->value_block) mix_block(p, first, packed, zeros, &w);
}
