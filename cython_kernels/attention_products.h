/* The products of attention: included once per tier, by attention_tiles.h, which says what is defined before.

   A product is c[row, column] = sum over steps of a[row, step] * b[step, column], in the order of steps: lanes are
   cached tokens for the scores, and elements of D for the mixture of values. `add` continues a sum. */

enum { WIDTH = VECTORS * LANES, ROWS = 6, LINES = 2 /* prefetched in each step */ };

/* Bytes that lie together and will be needed soon. */
typedef struct {
    const char *at, *end;
} span;

INLINE void dot(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t steps, float *c, int64_t c_stride,
                int add, span soon, const int rows, const int vectors) {
    VEC acc[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) acc[r][v] = add ? LOAD(c + r * c_stride + v * LANES) : ZERO();
    for (int64_t s = 0; s < steps; s++) {
        VEC right[VECTORS];
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) { /* at the pace of the multiplications: DRAM is busy all the time */
            _mm_prefetch(soon.at, _MM_HINT_T1);
            soon.at += soon.at < soon.end ? 64 : 0;
        }
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
#define DOT_CASE(r, v)                                                                                \
    case (r) * 4 + (v):                                                                               \
        if ((v) <= VECTORS) dot(a, a_stride, b, steps, c, c_stride, add, soon, r, (v) <= VECTORS ? (v) : 1); \
        break;
#define DOT_CASES(r) DOT_CASE(r, 1) DOT_CASE(r, 2) DOT_CASE(r, 3) DOT_CASE(r, 4)

TARGET static void dot_any(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t steps, float *c,
                           int64_t c_stride, int add, span soon, int rows, int vectors) {
    switch (rows * 4 + vectors) {
        DOT_CASES(1) DOT_CASES(2) DOT_CASES(3) DOT_CASES(4) DOT_CASES(5) DOT_CASES(6)
    }
}

/* The same for values as they lie in the cache, widened on the way: pays for few rows, which would not use what is laid
   out often enough. */
INLINE void dot_cached(const uint32_t *a, int64_t a_stride, const uint16_t *const *tiles, const int64_t *strides,
                       int64_t steps, float *c, int64_t c_stride, int add, span soon, const int rows) {
    VEC acc[CACHED_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) acc[r][v] = add ? LOAD(c + r * c_stride + v * LANES) : ZERO();
    for (int64_t t = 0; t < steps; t += HL_CACHE_TILE / PAIR) {
        const uint16_t *at = *tiles++;
        const int64_t stride = *strides++, end = t + HL_CACHE_TILE / PAIR < steps ? t + HL_CACHE_TILE / PAIR : steps;
        for (int64_t s = t; s < end; s++, at += PAIR * stride) {
            VEC right[2];
            WIDEN(at, stride, right);
            for (int i = 0; i < LINES; i++) {
                _mm_prefetch(soon.at, _MM_HINT_T1);
                soon.at += soon.at < soon.end ? 64 : 0;
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < 2; v++) acc[r][v] = MULTIPLY(acc[r][v], a[r * a_stride + s], right[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) STORE(c + r * c_stride + v * LANES, acc[r][v]);
}

#define CACHED_CASE(r)                                                                                            \
    case r:                                                                                                       \
        if ((r) <= CACHED_ROWS)                                                                                   \
            dot_cached(a, a_stride, tiles, strides, steps, c, c_stride, add, soon, (r) <= CACHED_ROWS ? (r) : 1); \
        break;

TARGET static void dot_cached_any(const uint32_t *a, int64_t a_stride, const uint16_t *const *tiles,
                                  const int64_t *strides, int64_t steps, float *c, int64_t c_stride, int add, span soon,
                                  int rows) {
    switch (rows) {
        CACHED_CASE(1) CACHED_CASE(2) CACHED_CASE(3) CACHED_CASE(4) CACHED_CASE(5) CACHED_CASE(6)
        CACHED_CASE(7) CACHED_CASE(8) CACHED_CASE(9) CACHED_CASE(10) CACHED_CASE(11) CACHED_CASE(12)
    }
}
