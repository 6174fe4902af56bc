/* Template of a tier's products: included once per (tier, weight type), after defining

     NAME             name of the generated function, with the signature of hl_tier.dot
     TARGET           function attribute that enables the instruction set
     ELEMENT          bytes of one weight
     LANES            rows that one vector holds: 16, 8 or 4
     WVEC, LOADW(p), STOREW(p, v)       LANES x 4 bytes of weights; 64-byte tiles are 16-aligned
     QUAD(p, stride, v)                 LANES rows x 16 bytes, rows `stride` apart -> WVEC v[4], each LANES x 4 bytes
     COPY64(to, from)                   `to` aligned, `from` not
     VEC, ZERO(), LOADF(p), STOREF(p, v), FMA(a, b, c), SET1(f)
     PIECE, PIECES, DECODE(v, piece)    a WVEC widened: PIECES vectors, each times one 32-bit word of x
     SPREAD(word), MUL(acc, piece, spread)   a word of x in all lanes (a PIECE); acc + piece * spread, elementwise
     FLAG, FLAG_ZERO(), FLAG_SEE(flag, v), FLAG_LANES(flag, nan)   finds NaN codes where they do not decode to NaN:
                                        FLAG_LANES sets nan[0 .. LANES) of rows that had one and returns if any
     MAX_M, TILES(m)                    tokens and tiles of 16 rows whose accumulators fit the registers. Each is a
                                        chain: MUL at its full rate takes latency times rate of them (about 12)
     SHARE(m)                           vectors that use a broadcast word of x one after the other
     FEW, FEW_ROWS(m)                   tokens up to which row-major weights are transposed in registers, and the rows
                                        at a time: 16 or 32 (STAGE)

   The order of operations of an element, the same for both layouts and any number of tokens: for each block of 128 k,
   an accumulator takes the products in order of k and is then added to the sum, times the block's scale. A vector lane
   is a row, so nothing is ever reduced across lanes. Row-major weights are transposed in L1 on the way. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define STRIP (4 * LANES)             /* bytes of a WVEC */
#define TILE_STRIPS (HL_TILE / LANES) /* WVECs of a tile */
#define LINE (HL_BLOCK * ELEMENT)     /* bytes of one row of a block */
#define STEPS (LINE / 4)              /* 64-byte steps of a tile in a block */
#define STAGE 32                      /* rows of a row-major matrix that are transposed together */
#define WORDS (STEPS * PIECES)        /* 32-bit words of x in a block */
#define HL_NEAR 4096                  /* bytes to prefetch ahead in one stream */

/* `share` vectors of weights from vector(i) times m tokens, whose words of the block stand one token after another: one
   pointer serves them all. */
#define STEP(first, share, vector, word)                                                        \
    do {                                                                                        \
        PIECE piece_[4][PIECES];                                                                \
        _Pragma("GCC unroll 4") for (int i_ = 0; i_ < (share); i_++) {                          \
            WVEC w_ = vector(i_);                                                               \
            LOAD_ONCE(w_);                                                                      \
            FLAG_SEE(flag[(first) + i_], w_);                                                   \
            DECODE(w_, piece_[i_]);                                                             \
        }                                                                                       \
        _Pragma("GCC unroll 4") for (int p_ = 0; p_ < PIECES; p_++)                             \
            _Pragma("GCC unroll 8") for (int j = 0; j < m; j++) {                               \
                const PIECE spread_ = SPREAD(x + j * WORDS + (word) + p_);                      \
                _Pragma("GCC unroll 4") for (int i_ = 0; i_ < (share); i_++)                    \
                    acc[(first) + i_][j] = MUL(acc[(first) + i_][j], piece_[i_][p_], spread_);  \
            }                                                                                   \
    } while (0)

#define BEGIN_BLOCK()                                                   \
    VEC acc[HL_PANEL / LANES][MAX_M];                                   \
    FLAG flag[HL_PANEL / LANES];                                        \
    _Pragma("GCC unroll 16") for (int s = 0; s < strips; s++) {         \
        flag[s] = flags[s];                                             \
        _Pragma("GCC unroll 8") for (int j = 0; j < m; j++) acc[s][j] = ZERO(); \
    }

#define END_BLOCK()                                                     \
    _Pragma("GCC unroll 16") for (int s = 0; s < strips; s++) {         \
        flags[s] = flag[s];                                             \
        _Pragma("GCC unroll 8") for (int j = 0; j < m; j++) {           \
            float *to = sum + j * HL_PANEL + s * LANES;                 \
            STOREF(to, FMA(acc[s][j], SET1(scale), LOADF(to)));         \
        }                                                               \
    }

/* Adds one block of packed weights; fetches as many bytes from `ahead` on, one line at a time and in order of address:
   into L1 if they are near, else into L2. */
TARGET __attribute__((always_inline)) static inline void JOIN(NAME, _block)(
    const uint8_t *w, int64_t step_bytes, const int strips, const int m, const hl_word *x, float *sum,
    FLAG *flags, float scale, const uint8_t *ahead, const int near) {
    const int share = strips < SHARE(m) ? strips : SHARE(m);
    BEGIN_BLOCK()
#pragma GCC unroll 1
    for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 16
        for (int s = 0; s < strips; s += share) {
            for (int at = -(s * STRIP) & 63; at < share * STRIP; at += 64) {
                if (near)
                    __builtin_prefetch(ahead + s * STRIP + at, 0, 3);
                else
                    __builtin_prefetch(ahead + s * STRIP + at, 0, 2);
            }
#define PACKED(i) LOADW(w + (s + (i)) * STRIP)
            STEP(s, share, PACKED, step * PIECES);
        }
        w += step_bytes;
        ahead += strips * STRIP;
    }
    END_BLOCK()
}

/* All tiles of a panel's block, for m tokens. Each group of tokens fetches the next block once more, since processors drop
   prefetches; that costs nothing where it is there. */
TARGET __attribute__((always_inline)) static inline void JOIN(NAME, _tiles)(
    const uint8_t *w, int tiles, const int m, const hl_word *x, float *sum, FLAG *flags, float scale, const uint8_t *ahead) {
    int t = 0;
#define RUN(count)                                                                                                   \
    for (; t + count <= tiles; t += count)                                                                           \
        JOIN(NAME, _block)(w + 64 * t, 64 * tiles, count * TILE_STRIPS, m, x, sum + HL_TILE * t, flags + TILE_STRIPS * t, \
                           scale, count == 8 ? w + HL_NEAR : ahead + t * HL_TILE * LINE, count == 8)
    if (TILES(m) >= 8) RUN(8);
    if (TILES(m) >= 4) RUN(4);
    if (TILES(m) >= 2) RUN(2);
    RUN(1);
#undef RUN
}

/* One block of 16 or 32 rows of row-major weights that stand as lines in L1, while the next block's lines are copied
   from `src` (if `copy`) and the rows after these are fetched in order of address, so that DRAM sees a single stream.
   By the time they are copied they are found in L2. */
TARGET __attribute__((always_inline)) static inline void JOIN(NAME, _lines)(
    const uint8_t *lines, uint8_t *next_lines, const uint8_t *src, int64_t row_bytes, const int rows, const int copy, const int m,
    const hl_word *x, float *sum, FLAG *flags, float scale, const uint8_t *ahead) {
    const int strips = rows / LANES;
    BEGIN_BLOCK()
#pragma GCC unroll 1
    for (int q = 0; q < LINE / 16; q++) {
#pragma GCC unroll 16
        for (int s = 0; s < strips; s++) {
            WVEC part[4];
            QUAD(lines + s * LANES * LINE + 16 * q, LINE, part);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int at = (s * 4 + i) * STRIP, line = at / 64;
                if (copy && at % 64 == 0) { /* one at a time: the processor drops prefetches that come in bursts */
                    __builtin_prefetch(ahead + at, 0, 3);
                    COPY64(next_lines + at, src + line / (LINE / 64) * row_bytes + 64 * (line % (LINE / 64)));
                }
#define PART(unused) part[i]
                STEP(s, 1, PART, (4 * q + i) * PIECES);
            }
        }
        next_lines += 16 * rows; /* rows / 4 lines of 64 bytes */
        ahead += 16 * rows;
        src += 16 * rows / LINE * row_bytes;
    }
    END_BLOCK()
}

/* Rows [r, r + count) of block b as lines, zero-padded; never reads past the matrix. */
TARGET static void JOIN(NAME, _copy)(const hl_matrix *w, int64_t r, int count, int64_t b, const uint8_t *ahead,
                                     uint8_t *lines) {
    const int64_t row_bytes = w->k * ELEMENT, rows = w->n - r, bytes = row_bytes - b * LINE;
    const uint8_t *src = w->data + r * row_bytes + b * LINE;
    if (rows >= count && bytes >= LINE) {
        for (int line = 0; line < count * LINE / 64; line++) {
            COPY64(lines + 64 * line, src + line / (LINE / 64) * row_bytes + 64 * (line % (LINE / 64)));
            __builtin_prefetch(ahead + 64 * line, 0, 2);
        }
    } else {
        memset(lines, 0, (size_t)count * LINE);
        for (int i = 0; i < count && i < rows; i++)
            memcpy(lines + i * LINE, src + i * row_bytes, (size_t)(bytes < LINE ? bytes : LINE));
    }
}

/* `keep` tiles of lines: out[step][tile][64 bytes], of `tiles` a step. */
TARGET static void JOIN(NAME, _transpose)(const uint8_t *lines, int tiles, int keep, uint8_t *out) {
    for (int q = 0; q < LINE / 16; q++)
        for (int s = 0; s < keep * TILE_STRIPS; s++) {
            WVEC part[4];
            QUAD(lines + s * LANES * LINE + 16 * q, LINE, part);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) STOREW(out + (4 * q + i) * 64 * tiles + s * STRIP, part[i]);
        }
}

TARGET static void JOIN(NAME, _write)(const float *sum, const FLAG *flags, int rows, const hl_inputs *x, int m,
                                      float *y, int64_t stride) {
    float nan[HL_PANEL] = {0};
    int spoiled = 0;
    for (int s = 0; s * LANES < rows; s++) spoiled |= FLAG_LANES(flags[s], nan + s * LANES);
    for (int j = 0; j < m; j++) {
        const float a = x->post[2 * j], b = x->post[2 * j + 1], *from = sum + j * HL_PANEL;
        float *to = y + j * stride;
        for (int r = 0; r < rows; r++) to[r] = from[r] * a * b;
        if (spoiled)
            for (int r = 0; r < rows; r++) to[r] += nan[r];
    }
}

TARGET __attribute__((noinline)) static void JOIN(NAME, _group)(
    const uint8_t *w, int tiles, int m, const hl_word *x, float *sum, FLAG *flags, float scale,
    const uint8_t *ahead) {
    /* The next block's words: another core may have prepared them. */
    for (int i = 0; i < m * WORDS / 16; i++) __builtin_prefetch(x + m * WORDS + 16 * i, 0, 3);
    switch (m) {
#define CASE(count) \
    case count: if (count <= MAX_M) JOIN(NAME, _tiles)(w, tiles, count <= MAX_M ? count : 1, x, sum, flags, scale, ahead); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

static inline float JOIN(NAME, _scale)(const hl_matrix *w, int64_t r, int64_t b) {
    float scale = 1.0f;
    if (ELEMENT == 1) memcpy(&scale, w->scale + 4 * (r / HL_BLOCK * ((w->k + HL_BLOCK - 1) / HL_BLOCK) + b), 4);
    return scale;
}

/* A few tokens times row-major weights: transposed in registers, in step with the copy of the next block. */
TARGET __attribute__((always_inline)) static inline void JOIN(NAME, _few)(
    const hl_matrix *w, int64_t r0, int64_t r1, const hl_inputs *x, const int m, const hl_outputs *out,
    const uint8_t *next) {
    const int rows = FEW_ROWS(m);
    const int64_t blocks = (w->k + HL_BLOCK - 1) / HL_BLOCK, row_bytes = w->k * ELEMENT;
    uint8_t lines[2][STAGE * LINE] __attribute__((aligned(64)));
    int now = 0;
    JOIN(NAME, _copy)(w, r0, rows, 0, w->data, lines[0]);
    for (int64_t r = r0; r < r1; r += rows) {
        float sum[FEW * HL_PANEL] __attribute__((aligned(64))) = {0};
        FLAG flags[STAGE / LANES];
        for (int s = 0; s < rows / LANES; s++) flags[s] = FLAG_ZERO();
        const uint8_t *ahead = r + rows < r1 ? w->data + (r + rows) * row_bytes : next ? next : w->data + r * row_bytes;
        for (int64_t b = 0; b < blocks; b++, now = !now, ahead += rows * LINE) {
            const hl_word *words = x->words + b * m * WORDS;
            const int64_t r_next = b + 1 < blocks ? r : r + rows, b_next = b + 1 < blocks ? b + 1 : 0;
            const uint8_t *src = w->data + r_next * row_bytes + b_next * LINE;
            const float scale = JOIN(NAME, _scale)(w, r, b);
            if (r_next + rows <= w->n && (b_next + 1) * HL_BLOCK <= w->k && r_next < r1) {
                JOIN(NAME, _lines)(lines[now], lines[!now], src, row_bytes, rows, 1, m, words, sum, flags, scale, ahead);
            } else {
                JOIN(NAME, _lines)(lines[now], lines[!now], src, row_bytes, rows, 0, m, words, sum, flags, scale, ahead);
                if (r_next < r1) JOIN(NAME, _copy)(w, r_next, rows, b_next, w->data, lines[!now]);
            }
        }
        JOIN(NAME, _write)(sum, flags, (int)(r1 - r < rows ? r1 - r : rows), x, m, out->y + r - out->first, out->stride);
    }
}

TARGET static void NAME(const hl_matrix *w, int64_t r0, int64_t r1, const hl_inputs *x, int m, const hl_outputs *out,
                        const uint8_t *next) {
    const int packed = w->layout == HL_TILES;
    if (!packed && m <= FEW) {
        switch (m) {
#define CASE(count) \
    case count: if (count <= FEW) JOIN(NAME, _few)(w, r0, r1, x, count <= FEW ? count : 1, out, next); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
        return;
    }
    const int64_t blocks = (w->k + HL_BLOCK - 1) / HL_BLOCK, panel = packed ? HL_PANEL : STAGE;
    uint8_t lines[STAGE * LINE] __attribute__((aligned(64))), tile_buffer[STAGE * LINE] __attribute__((aligned(64)));
    float sum[HL_MAX_TOKENS * HL_PANEL] __attribute__((aligned(64)));
    for (int64_t r = r0; r < r1; r += panel) {
        const int rows = (int)(r1 - r < panel ? r1 - r : panel), tiles = (rows + HL_TILE - 1) / HL_TILE;
        FLAG flags[HL_PANEL / LANES];
        for (int s = 0; s < HL_PANEL / LANES; s++) flags[s] = FLAG_ZERO();
        memset(sum, 0, sizeof(float) * HL_PANEL * (size_t)m);
        const uint8_t *data = hl_rows_at(w, r), *ahead = data + STAGE * w->k * ELEMENT;
        if (r + panel >= r1) ahead = next ? next : data;
        for (int64_t b = 0; b < blocks; b++, ahead += STAGE * LINE) {
            const float scale = JOIN(NAME, _scale)(w, r, b);
            const uint8_t *block = tile_buffer;
            if (packed) {
                block = data + b * tiles * HL_TILE * LINE;
            } else {
                JOIN(NAME, _copy)(w, r, STAGE, b, ahead, lines);
                JOIN(NAME, _transpose)(lines, tiles, tiles, tile_buffer);
            }
            for (int first = 0; first < m; first += MAX_M) {
                const int size = m - first < MAX_M ? m - first : MAX_M;
                const hl_word *words = x->words + (first * blocks + b * size) * WORDS;
                JOIN(NAME, _group)(block, tiles, size, words, sum + first * HL_PANEL, flags, scale,
                                   packed ? block + tiles * HL_TILE * LINE : block);
            }
        }
        JOIN(NAME, _write)(sum, flags, rows, x, m, out->y + r - out->first, out->stride);
    }
    if (packed && next)
        for (int i = 0; i < 64; i++) __builtin_prefetch(next + 64 * i, 0, 3);
}

TARGET static void JOIN(NAME, _pack)(const hl_matrix *w, int64_t panel, uint8_t *out) {
    const int64_t blocks = (w->k + HL_BLOCK - 1) / HL_BLOCK, r = panel * HL_PANEL;
    const int rows = (int)(w->n - r < HL_PANEL ? w->n - r : HL_PANEL), tiles = (rows + HL_TILE - 1) / HL_TILE;
    uint8_t lines[STAGE * LINE] __attribute__((aligned(64)));
    for (int64_t b = 0; b < blocks; b++)
        for (int t = 0; t < tiles; t += STAGE / HL_TILE) {
            const int keep = tiles - t < STAGE / HL_TILE ? tiles - t : STAGE / HL_TILE;
            JOIN(NAME, _copy)(w, r + t * HL_TILE, STAGE, b, w->data, lines);
            JOIN(NAME, _transpose)(lines, tiles, keep, out + b * tiles * HL_TILE * LINE + 64 * t);
        }
}

#undef WORDS
#undef HL_NEAR
#undef STAGE
#undef STEPS
#undef LINE
#undef TILE_STRIPS
#undef STRIP
#undef STEP
#undef BEGIN_BLOCK
#undef END_BLOCK
#undef JOIN
#undef JOIN_
#undef NAME
#undef ELEMENT
#undef PIECES
#undef DECODE
#undef PACKED
#undef PART
#undef FLAG
#undef FLAG_ZERO
#undef FLAG_SEE
#undef FLAG_LANES
