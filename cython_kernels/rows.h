/* Template of a tier's row loop: included once per (tier, weight type), after defining

     NAME            name of the generated function, with the signature of hl_tier.dot
     TARGET          function attribute that enables the instruction set
     VEC, ZERO(), REDUCE(v)   float vector, its zero, its horizontal sum
     ELEMENT         bytes of one weight
     FLAG, FLAG_ZERO(), FLAGGED(f)   NaN-code detector; always-false where NaN arrives by arithmetic
     BLOCK(w, x, stride, m, scale, sum, flag)   add one block of 128 weights times m tokens to sum[m]
     GROUP(m), PANEL(m)       rows and columns visited before moving on, so that x stays in L1

   With GROUP 1 the rows stream one after another. Otherwise panels of a group of rows are visited in turn, while the
   next group is prefetched into L2 in address order: DRAM still sees a single sequential stream. */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

TARGET __attribute__((always_inline)) static inline void JOIN(NAME, _tile)(
    const hl_matrix *w, int64_t r0, int64_t r1, const hl_token *const *x, const int m, float *const *y) {
    enum { MAX_GROUP = 16 };
    const int64_t k = w->k, blocks = (k + HL_BLOCK - 1) / HL_BLOCK, whole = k / HL_BLOCK;
    const int64_t row_bytes = k * ELEMENT, panel = PANEL(m) / HL_BLOCK;
    const int group = GROUP(m);
    uint8_t tail[HL_BLOCK * ELEMENT];
    const uint8_t *data[HL_MAX_TOKENS];
    for (int j = 0; j < m; j++) data[j] = (const uint8_t *)(x[j] + 1);
    memset(tail, 0, sizeof tail);

    for (int64_t r = r0; r < r1; r += group) {
        const int rows = (int)(r1 - r < group ? r1 - r : group);
        VEC sum[MAX_GROUP][HL_MAX_TOKENS];
        FLAG flag[MAX_GROUP];
#pragma GCC unroll 1
        for (int i = 0; i < rows; i++) {
            flag[i] = FLAG_ZERO();
            for (int j = 0; j < m; j++) sum[i][j] = ZERO();
        }
        const uint8_t *ahead = w->data + r * row_bytes + (group == 1 ? 4096 : group * row_bytes);
        for (int64_t b0 = 0; b0 < blocks; b0 += panel) {
            const int64_t b1 = b0 + panel < blocks ? b0 + panel : blocks;
            for (int i = 0; i < rows; i++) {
                const uint8_t *row = w->data + (r + i) * row_bytes;
                const uint8_t *scales = w->scale ? w->scale + 4 * ((r + i) / HL_BLOCK) * blocks : NULL;
                VEC row_sum[HL_MAX_TOKENS];
                FLAG row_flag = flag[i];
#pragma GCC unroll 8
                for (int j = 0; j < m; j++) row_sum[j] = sum[i][j];
                for (int64_t b = b0; b < b1; b++) {
                    const uint8_t *p = row + b * HL_BLOCK * ELEMENT;
                    float scale = 1.0f;
                    if (ELEMENT == 1) memcpy(&scale, scales + 4 * b, 4);
                    if (b == whole) { /* ragged edge: never read past the array */
                        memcpy(tail, p, (size_t)(k - whole * HL_BLOCK) * ELEMENT);
                        p = tail;
                    }
#pragma GCC unroll 4
                    for (int line = 0; line < 2 * ELEMENT; line++) {
                        if (group == 1)
                            __builtin_prefetch(ahead + 64 * line, 0, 3);
                        else
                            __builtin_prefetch(ahead + 64 * line, 0, 2);
                    }
                    ahead += HL_BLOCK * ELEMENT;
                    BLOCK(p, data, b, m, scale, row_sum, &row_flag);
                }
#pragma GCC unroll 8
                for (int j = 0; j < m; j++) sum[i][j] = row_sum[j];
                flag[i] = row_flag;
            }
        }
        for (int i = 0; i < rows; i++) {
            const int is_nan = FLAGGED(flag[i]);
            for (int j = 0; j < m; j++)
                y[j][r + i] = is_nan ? __builtin_nanf("") : REDUCE(sum[i][j]) * x[j]->post[0] * x[j]->post[1];
        }
    }
}

/* One specialisation per token count, so that the accumulators are registers. */
#define TILE_CASE(count) \
    case count: JOIN(NAME, _tile)(w, r0, r1, x, count, y); break;

TARGET static void NAME(const hl_matrix *w, int64_t r0, int64_t r1, const hl_token *const *x, int m, float *const *y) {
    switch (m) {
        TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4)
        TILE_CASE(5) TILE_CASE(6) TILE_CASE(7) TILE_CASE(8)
    }
}

#undef TILE_CASE
#undef JOIN
#undef JOIN_
#undef NAME
#undef ELEMENT
#undef FLAG
#undef FLAG_ZERO
#undef FLAGGED
#undef BLOCK
