#include "host_lane.h"

#include <sched.h>
#include <time.h>

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#else
#define RELAX() ((void)0)
#endif

enum { SPINS = 16 };        /* looks at a word between two looks at the clock */
static const double WARM_S = 40e-6; /* well below the time after which idle threads of the pool go to sleep */
static const double SLACK_S = 2e-3; /* a wait that lasts longer leaves the cores to others */

static double now(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static int is_set(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE) != 0; }

static void nothing(void *context, int64_t index) {
    (void)context;
    (void)index;
}

/* Between two layers a GPU works for longer than the pool's threads spin: kept awake (`warm`), they start the next one at
   once. */
static int wait_for(const uint32_t *ready, const uint32_t *stop, int warm, int threads) {
    const double start = now();
    double last = start;
    for (;;) {
        for (int i = 0; i < SPINS; i++) {
            if (is_set(ready)) return 0;
            RELAX();
        }
        if (is_set(stop)) return 1;
        const double time = now();
        if (time - start > SLACK_S) {
            sched_yield();
        } else if (warm && time - last > WARM_S) {
            hl_parallel(nothing, NULL, threads, threads);
            last = time;
        }
    }
}

static int compute(const hl_host_op *op, int threads) {
    if (!op->moe) return 0;
    return hl_moe_forward(op->tier, op->moe, op->x, op->tokens, op->slots, op->ids, op->weights, op->out, threads);
}

int hl_host_lane(const hl_host_op *ops, int64_t count, int threads, const uint32_t *stop, double *times) {
    int status = 0;
    for (int64_t i = 0; i < count; i++) {
        /* Before the first one the cores belong to the thread that launches the step. */
        if (status == 0) status = wait_for(ops[i].ready, stop, i > 0, threads);
        times[2 * i] = now();
        if (status == 0) status = compute(&ops[i], threads);
        times[2 * i + 1] = now();
        __atomic_store_n(ops[i].done, 1, __ATOMIC_RELEASE);
    }
    return status;
}
