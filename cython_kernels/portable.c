/* Tier in plain C for any 64-bit CPU: 4 rows a vector (gcc and clang turn it into what the platform has), FP8 by
   table. Correct everywhere, fast nowhere. */
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "tokens.h"

#define TARGET
typedef float floats __attribute__((vector_size(16), may_alias));
typedef uint32_t words __attribute__((vector_size(16), may_alias));

#define LANES 4
#define WVEC words
#define LOADW(p) (*(const words *)(p))
#define STOREW(p, v) (*(words *)(p) = (v))
#define COPY64(to, from) memcpy(to, from, 64)
#define VEC floats
#define PIECE floats
#define ZERO() ((floats){0, 0, 0, 0})
#define LOADF(p) (*(const floats *)(p))
#define STOREF(p, v) (*(floats *)(p) = (v))
#define FMA(a, b, c) ((a) * (b) + (c))
#define SET1(f) ((floats){f, f, f, f})
#define LOAD_ONCE(v) ((void)0)
#define MAX_M 4
#define TILES(m) 1
#define SHARE(m) 1
#define FEW 2
#define FEW_ROWS(m) 32
#define QUAD(p, stride, out) quad(p, stride, ELEMENT, out)

static float values[256];

__attribute__((constructor)) static void fill_values(void) {
    for (int code = 0; code < 256; code++) {
        const int exponent = code >> 3 & 15, mantissa = code & 7;
        float value = exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
        if ((code & 127) == 127) value = NAN;
        values[code] = code & 128 ? -value : value;
    }
}

static int supported(void) { return 1; }

/* 4 rows x 16 bytes -> 4 steps: FP8 as pairs of k of all rows, then the next pairs; BF16 as one pair of k. */
static void quad(const uint8_t *p, int64_t stride, int element, words *out) {
    uint8_t bytes[64];
    for (int i = 0; i < 4; i++)
        for (int r = 0; r < 4; r++)
            for (int b = 0; b < 4; b++)
                bytes[16 * i + (element == 1 ? b / 2 * 8 + 2 * r + b % 2 : 4 * r + b)] = p[r * stride + 4 * i + b];
    memcpy(out, bytes, 64);
}

static inline void decode_fp8(words v, floats *piece) {
    uint8_t code[16];
    memcpy(code, &v, 16);
    for (int k = 0; k < 4; k++) {
        const uint8_t *c = code + k / 2 * 8 + k % 2;
        piece[k] = (floats){values[c[0]], values[c[2]], values[c[4]], values[c[6]]};
    }
}

static inline void decode_bf16(words v, floats *piece) {
    piece[0] = (floats)(v << 16);
    piece[1] = (floats)(v & 0xFFFF0000u);
}

static inline floats spread_word(const hl_word *word) {
    float x;
    memcpy(&x, word, 4);
    return SET1(x);
}
#define SPREAD(word) spread_word(word)
#define MUL(acc, piece, spread) ((acc) + (piece) * (spread))

static void prepare(const float *x, int64_t k, int is_fp8, hl_word *out, int64_t stride, float *post) {
    (void)is_fp8; /* the table holds true values: no scaling */
    hl_prepare_float32(x, k, 0, out, stride, post);
}

static void silu_mul(float *g, const float *u, int64_t count) {
    for (int64_t i = 0; i < count; i++) g[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
}

static uint64_t read_words(const uint8_t *p, int64_t count, int loop) {
    (void)loop; /* one loop: what matters elsewhere does not here */
    return hl_sum_words(p, 0, count);
}

static double multiply(int64_t rounds, float *sink) {
    floats acc[8], x = SET1(1.0f);
    for (int i = 0; i < 8; i++) acc[i] = SET1((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : : "r"(&x) : "memory"); /* a new x each round, as far as the compiler knows */
        for (int i = 0; i < 8; i++) acc[i] += x * x;
    }
    for (int i = 1; i < 8; i++) acc[0] += acc[i];
    *sink = acc[0][0];
    return (double)rounds * 8 * 8;
}

#define NAME dot_fp8
#define ELEMENT 1
#define PIECES 4
#define DECODE(v, piece) decode_fp8(v, piece)
#define FLAG int
#define FLAG_ZERO() 0
#define FLAG_SEE(flag, v) ((void)0)
#define FLAG_LANES(flag, nan) ((void)(flag), (void)(nan), 0)
#include "tiles.h"

#define NAME dot_bf16
#define ELEMENT 2
#define PIECES 2
#define DECODE(v, piece) decode_bf16(v, piece)
#define FLAG int
#define FLAG_ZERO() 0
#define FLAG_SEE(flag, v) ((void)0)
#define FLAG_LANES(flag, nan) ((void)(flag), (void)(nan), 0)
#include "tiles.h"

#include "entries.h"

const hl_tier hl_portable = {"portable", supported, MAX_M, HL_BLOCK, prepare, dot, pack, silu_mul,
                             read_words, multiply};
