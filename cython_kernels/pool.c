#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#else
#define RELAX() ((void)0)
#endif

enum { TEAMS = 8, MAX_THREADS = 1024, SPIN_NS = 100000 };

/* `word` packs (generation << 16 | active threads) so that a worker learns in one load both that there is new work
   and whether it takes part; the caller waits for participants only, so other workers must not read the task. */
typedef struct {
    pthread_mutex_t owner; /* held by the caller whose tasks are running */
    pthread_mutex_t lock;  /* guards the sleeps */
    pthread_cond_t wake, finished;
    _Atomic uint64_t word;
    _Atomic int sleepers, remaining, caller_sleeps;
    int started; /* workers created so far; written by the owner only */
    hl_chained_task task;
    void *context;
    int64_t count;
    int64_t reserve; /* tasks at the end that are not claimed ahead */
    _Atomic int64_t next;
} team;

typedef struct {
    team *t;
    int id;
    uint64_t seen;
} worker_args;

static team teams[TEAMS];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void reset_teams(void) {
    /* In a forked child the workers are gone and any lock may be frozen mid-use: start afresh. */
    memset(teams, 0, sizeof teams);
    for (int i = 0; i < TEAMS; i++) {
        pthread_mutex_init(&teams[i].owner, NULL);
        pthread_mutex_init(&teams[i].lock, NULL);
        pthread_cond_init(&teams[i].wake, NULL);
        pthread_cond_init(&teams[i].finished, NULL);
    }
}

static void start_up(void) {
    reset_teams();
    pthread_atfork(NULL, NULL, reset_teams);
}

static int64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static int64_t claim(team *t) {
    const int64_t i = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
    return i < t->count ? i : -1;
}

/* A thread claims one task ahead, so that the present one can prefetch for it, while there are plenty; near the end
   each takes what is left when it is free, so that none waits for another's second task. */
static void work(team *t) {
    int64_t next;
    for (int64_t i = claim(t); i >= 0; i = next) {
        const int64_t left = t->count - atomic_load_explicit(&t->next, memory_order_relaxed);
        if (left > t->reserve) {
            next = claim(t);
            t->task(t->context, i, next);
        } else {
            t->task(t->context, i, -1);
            next = claim(t);
        }
    }
}

/* Spin briefly (dispatch in well under a microsecond between the phases of a layer), then sleep, so that idle
   workers do not fight other libraries for the cores. */
static uint64_t wait_for_word(team *t, uint64_t seen) {
    int64_t deadline = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) {
            uint64_t word = atomic_load_explicit(&t->word, memory_order_acquire);
            if (word != seen) return word;
            RELAX();
        }
    } while (now_ns() < deadline);
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add(&t->sleepers, 1); /* sequentially consistent: the caller bumps word, then reads sleepers */
    uint64_t word;
    while ((word = atomic_load(&t->word)) == seen) pthread_cond_wait(&t->wake, &t->lock);
    atomic_fetch_sub(&t->sleepers, 1);
    pthread_mutex_unlock(&t->lock);
    return word;
}

static unsigned default_float_control(void) {
#if defined(__x86_64__)
    unsigned old = _mm_getcsr();
    _mm_setcsr(0x1F80);
    return old;
#else
    return 0;
#endif
}

static void restore_float_control(unsigned old) {
#if defined(__x86_64__)
    _mm_setcsr(old);
#else
    (void)old;
#endif
}

static void *worker(void *raw) {
    worker_args args = *(worker_args *)raw;
    free(raw);
    default_float_control(); /* new threads inherit their creator's */
    team *t = args.t;
    for (uint64_t seen = args.seen;;) {
        seen = wait_for_word(t, seen);
        if (args.id >= (int)(seen & 0xFFFF)) continue;
        work(t);
        if (atomic_fetch_sub(&t->remaining, 1) == 1 && atomic_load(&t->caller_sleeps)) {
            pthread_mutex_lock(&t->lock);
            pthread_cond_signal(&t->finished);
            pthread_mutex_unlock(&t->lock);
        }
    }
    return NULL;
}

/* Returns how many threads (caller included) the team can field; thread creation may fail, which only costs speed. */
static int grow(team *t, int threads) {
    sigset_t all, old;
    if (t->started >= threads - 1) return threads;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* workers inherit it: signals stay with Python's threads */
    while (t->started < threads - 1) {
        worker_args *args = malloc(sizeof *args);
        if (!args) break;
        *args = (worker_args){t, t->started + 1, atomic_load(&t->word)};
        pthread_t id;
        if (pthread_create(&id, NULL, worker, args) != 0) {
            free(args);
            break;
        }
        pthread_detach(id);
        t->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return t->started + 1 < threads ? t->started + 1 : threads;
}

static void wait_for_workers(team *t) {
    int64_t deadline = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&t->remaining, memory_order_acquire) == 0) return;
            RELAX();
        }
    } while (now_ns() < deadline);
    pthread_mutex_lock(&t->lock);
    atomic_store(&t->caller_sleeps, 1);
    while (atomic_load(&t->remaining) != 0) pthread_cond_wait(&t->finished, &t->lock);
    atomic_store(&t->caller_sleeps, 0);
    pthread_mutex_unlock(&t->lock);
}

static team *claim_team(void) {
    for (int i = 0; i < TEAMS; i++)
        if (pthread_mutex_trylock(&teams[i].owner) == 0) return &teams[i];
    return NULL;
}

static void run(hl_chained_task task, void *context, int64_t count, int threads, int chained) {
    pthread_once(&once, start_up);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > count) threads = (int)count;
    unsigned float_control = default_float_control();
    team *t = threads > 1 ? claim_team() : NULL;
    if (!t) {
        for (int64_t i = 0; i < count; i++) task(context, i, i + 1 < count ? i + 1 : -1);
    } else {
        threads = grow(t, threads);
        t->task = task;
        t->context = context;
        t->count = count;
        t->reserve = chained ? 2 * (int64_t)threads : count;
        atomic_store(&t->next, 0);
        atomic_store(&t->remaining, threads - 1);
        uint64_t generation = (atomic_load(&t->word) >> 16) + 1;
        atomic_store(&t->word, generation << 16 | (uint64_t)threads);
        if (atomic_load(&t->sleepers)) {
            pthread_mutex_lock(&t->lock);
            pthread_cond_broadcast(&t->wake);
            pthread_mutex_unlock(&t->lock);
        }
        work(t);
        wait_for_workers(t);
        pthread_mutex_unlock(&t->owner);
    }
    restore_float_control(float_control);
}

void hl_parallel_chained(hl_chained_task task, void *context, int64_t count, int threads) {
    run(task, context, count, threads, 1);
}

typedef struct {
    hl_task task;
    void *context;
} plain_task;

static void run_plain(void *raw, int64_t index, int64_t next) {
    const plain_task *p = raw;
    (void)next;
    p->task(p->context, index);
}

void hl_parallel(hl_task task, void *context, int64_t count, int threads) {
    plain_task p = {task, context};
    run(run_plain, &p, count, threads, 0);
}
