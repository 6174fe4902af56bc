/* The two ceilings that kernels are measured against: reading memory and multiplying registers. */
#include <stdatomic.h>
#include <time.h>

#include "kernels.h"
#include "pool.h"

typedef struct {
    const hl_tier *tier;
    const uint8_t *p;
    int64_t words, chunk;
    int loop;
    _Atomic uint64_t total;
} read_call;

static void read_task(void *raw, int64_t index) {
    read_call *c = raw;
    const int64_t w0 = index * c->chunk, w1 = w0 + c->chunk < c->words ? w0 + c->chunk : c->words;
    if (w0 < w1) atomic_fetch_add(&c->total, c->tier->read(c->p + 8 * w0, w1 - w0, c->loop));
}

uint64_t hl_read(const hl_tier *tier, const uint8_t *p, int64_t words, int loop, int threads) {
    /* A few contiguous slices per thread: one slow core must not hold back the total. */
    const int64_t slices = threads == 1 ? 1 : 8 * (int64_t)threads;
    read_call c = {tier, p, words, ((words + slices - 1) / slices + 63) / 64 * 64, loop, 0};
    hl_parallel(read_task, &c, slices, threads);
    return c.total;
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    const hl_tier *tier;
    int64_t rounds;
    _Atomic int64_t operations;
} multiply_call;

static void multiply_task(void *raw, int64_t index) {
    multiply_call *c = raw;
    float sink;
    (void)index;
    atomic_fetch_add(&c->operations, (int64_t)c->tier->multiply(c->rounds, &sink));
}

double hl_multiply_rate(const hl_tier *tier, double seconds, int threads) {
    enum { PIECES = 8 }; /* per thread, so that a thread that starts late does less */
    multiply_call c = {tier, 1000, 0};
    double start, spent;
    do {
        c.rounds *= 2;
        start = now_s();
        multiply_task(&c, 0);
    } while ((spent = now_s() - start) < seconds / 20);
    c.rounds = (int64_t)((double)c.rounds * seconds / PIECES / spent) + 1;
    c.operations = 0;
    start = now_s();
    hl_parallel(multiply_task, &c, PIECES * (int64_t)threads, threads);
    return (double)c.operations / (now_s() - start);
}
