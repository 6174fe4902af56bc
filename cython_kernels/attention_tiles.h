/* The walk over a piece of context: included once per tier, after defining

     TARGET, INLINE    function attributes that enable the instruction set
     VEC, LANES        float vector and its lanes
     VECTORS           vectors of a panel: the columns that a row is multiplied with at a time
     PAIR              elements of a 32-bit word: two BF16 or one float
     ZERO(), LOAD(p), STORE(p, v)
     MULTIPLY(acc, word, v)   acc + (word, broadcast) times v, where v holds LANES words
     pack_keys(rows, stride, d, out)   LANES rows of BF16 -> out[step * VECTORS * LANES + lane], step = word of d
     pack_values(rows, stride, d, out, panel)   HL_CACHE_TILE rows -> out[step * VECTORS * LANES + column], step = PAIR
                       rows; panels of columns are `panel` words apart
     WIDEN(at, stride, out)   PAIR rows at `at` -> two vectors of words, as pack_values lays them out
     CACHED_ROWS       rows that are multiplied with values as they lie in the cache
     softmax(scores, seen, limit, scale, largest, sum)   scores to probabilities, in place, as words; zeros from `seen`
                       up to `limit` */
#include "attention_products.h"


static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* Tokens that row r sees. */
static inline int64_t seen(const hl_piece *p, int64_t r) {
    const int64_t n = at_most(p->visible + r / p->per, p->cached.count);
    return n > 0 ? n : 0;
}

/* Rows multiplied together: evenly many, since few rows leave the multipliers waiting for each other. */
static inline int64_t row_step(int64_t rows, int64_t most) {
    const int64_t steps = (rows + most - 1) / most;
    return (rows + steps - 1) / steps;
}

static inline const uint16_t *entry(const hl_piece *p, const hl_cached *c, const uint16_t *base, int64_t token) {
    return base + (c->slots ? c->slots[token] : c->first + token) * p->stride;
}

/* Walks ahead in the order of addresses: DRAM sees one sequential stream, though heads are taken one after another.
   `stage`: keys, values, keys of what comes next. `due`: lines to prefetch before this block of a head is done. */
typedef struct {
    const hl_piece *p;
    span now;
    int64_t token, due;
    int stage;
} ahead;

static int next_span(ahead *w) {
    const hl_piece *p = w->p;
    if (w->stage > 2) return 0;
    const hl_cached *c = w->stage == 2 ? &p->next : &p->cached;
    while (w->token >= c->count) {
        if (++w->stage > 2) return 0;
        c = w->stage == 2 ? &p->next : &p->cached;
        w->token = 0;
    }
    w->now.at = (const char *)entry(p, c, w->stage == 1 ? c->values : c->keys, w->token++);
    w->now.end = w->now.at + p->groups * p->d * 2;
    if (p->stride > p->groups * p->d) return 1;
    const int64_t begin = w->token;
    while (w->token < c->count && (!c->slots || c->slots[w->token] == c->slots[w->token - 1] + 1)) w->token++;
    w->now.end += (w->token - begin) * p->stride * 2;
    return 1;
}

/* Takes up to `lines` of the lines that are due, as far as they lie together. */
INLINE span take(ahead *w, int64_t lines) {
    lines = at_most(lines, w->due);
    if (lines <= 0 || (w->now.at >= w->now.end && !next_span(w))) return (span){(const char *)w->p, (const char *)w->p};
    const int64_t bytes = at_most(64 * lines, w->now.end - w->now.at);
    const span taken = {w->now.at, w->now.at + bytes};
    w->now.at += bytes;
    w->due -= (bytes + 63) / 64;
    return taken;
}

/* Prefetches until no more than `rest` lines are due. */
INLINE void catch_up(ahead *w, int64_t rest) {
    while (w->due > rest) {
        span s = take(w, w->due - rest);
        if (s.at == s.end) return;
        for (; s.at < s.end; s.at += 64) _mm_prefetch(s.at, _MM_HINT_T1);
    }
}

/* Rows of one head of a tile of tokens, `stride` apart: in the cache, or copied and padded with zeros where tokens are
   scattered or missing. */
static const uint16_t *tile(const hl_piece *p, const uint16_t *base, int64_t token, uint16_t *copy, int64_t *stride) {
    const hl_cached *c = &p->cached;
    const int64_t n = at_most(HL_CACHE_TILE, c->count - token);
    int together = n == HL_CACHE_TILE;
    for (int64_t i = 1; c->slots && i < n; i++) together &= c->slots[token + i] == c->slots[token] + i;
    *stride = together ? p->stride : p->d;
    if (together) return entry(p, c, base, token);
    for (int64_t i = 0; i < n; i++) memcpy(copy + i * p->d, entry(p, c, base, token + i), (size_t)p->d * 2);
    memset(copy + n * p->d, 0, (size_t)((HL_CACHE_TILE - n) * p->d * 2));
    return copy;
}

/* Scores of the tokens from `first` on, a block at a time. */
TARGET static void score_block(const hl_piece *p, int64_t first, uint32_t *packed, uint16_t *copy, ahead *w) {
    const int64_t count = at_most(HL_KEY_BLOCK, p->cached.count - first), words = p->d / PAIR;
    const int64_t step = row_step(p->rows, ROWS), lines = count * p->d / 32;
    const int64_t early = lines - LINES * words * ((p->rows + step - 1) / step) * ((count + WIDTH - 1) / WIDTH);
    for (int64_t g = 0; g < p->groups; g++) {
        w->due += lines;
        for (int64_t t = 0; t < count; t += HL_CACHE_TILE) {
            int64_t stride;
            const uint16_t *rows = tile(p, p->cached.keys + g * p->d, first + t, copy, &stride);
            for (int64_t i = t; i < t + HL_CACHE_TILE; i += LANES)
                pack_keys(rows + (i - t) * stride, stride, p->d, packed + i / WIDTH * WIDTH * words + i % WIDTH);
            catch_up(w, lines - early * (t + HL_CACHE_TILE) / count);
        }
        const uint32_t *q = p->q + g * p->rows * words;
        float *scores = p->scores + g * p->rows * HL_PIECE + first;
        for (int64_t t = 0; t < count; t += WIDTH)
            for (int64_t r = 0; r < p->rows; r += step) {
                const int64_t rows = at_most(step, p->rows - r);
                const int64_t columns = at_most(seen(p, r + rows - 1) - first - t, WIDTH);
                if (columns > 0)
                    dot_any(q + r * words, words, packed + t * words, words, scores + r * HL_PIECE + t, HL_PIECE, 0,
                            take(w, LINES * words), (int)rows, (int)((columns + LANES - 1) / LANES));
            }
        catch_up(w, 0);
    }
}

/* Adds the values of the tokens from `first` on, weighted, to what the tokens before gave. */
TARGET static void mix_block(const hl_piece *p, int64_t first, uint32_t *packed, uint16_t *copy, ahead *w) {
    const int64_t count = at_most(p->value_block, p->cached.count - first), stride = hl_mixed_stride(p->d);
    const int64_t panel = p->value_block / PAIR * WIDTH, step = row_step(p->rows, ROWS), lines = count * p->d / 32;
    const int64_t early = lines - LINES * (count / PAIR) * ((p->rows + step - 1) / step) * ((p->d + WIDTH - 1) / WIDTH);
    for (int64_t g = 0; g < p->groups; g++) {
        w->due += lines;
        for (int64_t t = 0; t < count; t += HL_CACHE_TILE) {
            int64_t row_stride;
            const uint16_t *rows = tile(p, p->cached.values + g * p->d, first + t, copy, &row_stride);
            pack_values(rows, row_stride, p->d, packed + t / PAIR * WIDTH, panel);
            catch_up(w, lines - early * (t + HL_CACHE_TILE) / count);
        }
        const uint32_t *weights = (const uint32_t *)p->scores + g * p->rows * HL_PIECE + first / PAIR;
        float *mixed = p->mixed + g * p->rows * stride;
        for (int64_t c = 0; c < p->d; c += WIDTH)
            for (int64_t r = 0; r < p->rows; r += step) {
                const int64_t rows = at_most(step, p->rows - r), left = seen(p, r + rows - 1) - first;
                const int64_t steps = left > 0 ? (at_most(left, count) + PAIR - 1) / PAIR : 0;
                dot_any(weights + r * HL_PIECE, HL_PIECE, packed + c / WIDTH * panel, steps, mixed + r * stride + c,
                        stride, first > 0, take(w, LINES * steps), (int)rows,
                        (int)((at_most(WIDTH, p->d - c) + LANES - 1) / LANES));
            }
        catch_up(w, 0);
    }
}

/* The same for few rows, from the cache as it is. */
TARGET static void mix_cached_block(const hl_piece *p, int64_t first, uint32_t *copies, ahead *w) {
    const int64_t count = at_most(HL_KEY_BLOCK, p->cached.count - first), stride = hl_mixed_stride(p->d);
    const int64_t step = row_step(p->rows, CACHED_ROWS), lines = count * p->d / 32;
    const int64_t in_products = LINES * (count / PAIR) * ((p->rows + step - 1) / step) * (p->d / (2 * LANES));
    for (int64_t g = 0; g < p->groups; g++) {
        const uint16_t *tiles[HL_KEY_BLOCK / HL_CACHE_TILE], *at[HL_KEY_BLOCK / HL_CACHE_TILE];
        int64_t strides[HL_KEY_BLOCK / HL_CACHE_TILE];
        for (int64_t t = 0; t < count; t += HL_CACHE_TILE)
            tiles[t / HL_CACHE_TILE] = tile(p, p->cached.values + g * p->d, first + t, (uint16_t *)copies + t * p->d,
                                            &strides[t / HL_CACHE_TILE]);
        w->due += lines;
        catch_up(w, in_products);
        const uint32_t *weights = (const uint32_t *)p->scores + g * p->rows * HL_PIECE + first / PAIR;
        float *mixed = p->mixed + g * p->rows * stride;
        for (int64_t c = 0; c < p->d; c += 2 * LANES) {
            for (int i = 0; i < HL_KEY_BLOCK / HL_CACHE_TILE; i++) at[i] = tiles[i] + c;
            for (int64_t r = 0; r < p->rows; r += step) {
                const int64_t rows = at_most(step, p->rows - r), left = seen(p, r + rows - 1) - first;
                const int64_t steps = left > 0 ? (at_most(left, count) + PAIR - 1) / PAIR : 0;
                dot_cached_any(weights + r * HL_PIECE, HL_PIECE, at, strides, steps, mixed + r * stride + c, stride,
                               first > 0, take(w, LINES * steps), (int)rows);
            }
        }
        catch_up(w, 0);
    }
}

TARGET static void mix(const hl_piece *p, ahead *w) {
    uint16_t *copy = (uint16_t *)p->packed;
    uint32_t *packed = p->packed + p->d * HL_CACHE_TILE / 2;
    if (p->rows <= 2 * CACHED_ROWS && p->d % (2 * LANES) == 0)
        for (int64_t first = 0; first < p->cached.count; first += HL_KEY_BLOCK)
            mix_cached_block(p, first, p->packed, w);
    else
        for (int64_t first = 0; first < p->cached.count; first += p->value_block)
            mix_block(p, first, packed, copy, w);
}

/* Whether a value that some row does not see is infinite or NaN: times a weight of zero it would be NaN. */
TARGET static int spoilt(const hl_piece *p) {
    uint16_t largest = 0;
    for (int64_t t = seen(p, 0); t < p->cached.count; t++) {
        const uint16_t *v = entry(p, &p->cached, p->cached.values, t);
        for (int64_t i = 0; i < p->groups * p->d; i++) {
            const uint16_t size = v[i] & 0x7FFF;
            largest = size > largest ? size : largest;
        }
    }
    return largest >= 0x7F80;
}

/* The same results, query by query, from no more tokens than it sees. */
TARGET static void mix_each(const hl_piece *p, ahead *w) {
    for (int64_t r = 0; r < p->groups * p->rows; r += p->per) {
        hl_piece one = *p;
        one.groups = 1;
        one.rows = p->per;
        one.visible = one.cached.count = seen(p, r % p->rows);
        one.cached.keys += r / p->rows * p->d;
        one.cached.values += r / p->rows * p->d;
        one.scores += r * HL_PIECE;
        one.mixed += r * hl_mixed_stride(p->d);
        memset(one.mixed, 0, (size_t)(one.rows * hl_mixed_stride(p->d)) * sizeof *one.mixed);
        mix(&one, w);
    }
}

TARGET static void piece(const hl_piece *p) {
    uint16_t *copy = (uint16_t *)p->packed;
    uint32_t *packed = p->packed + p->d * HL_CACHE_TILE / 2;
    ahead w = {p, {NULL, NULL}, at_most(HL_KEY_BLOCK, p->cached.count), 0, 0};
    for (int64_t first = 0; first < p->cached.count; first += HL_KEY_BLOCK) score_block(p, first, packed, copy, &w);
    for (int64_t r = 0; r < p->groups * p->rows; r++) {
        const int64_t n = seen(p, r % p->rows);
        /* Rows that are multiplied together go on to what the last of them sees. */
        const int64_t limit = at_most(n + (CACHED_ROWS > ROWS ? CACHED_ROWS : ROWS), p->cached.count);
        softmax(p->scores + r * HL_PIECE, n, limit, p->scale, p->largest + r, p->sum + r);
    }
    if (spoilt(p))
        mix_each(p, &w);
    else
        mix(p, &w);
}
