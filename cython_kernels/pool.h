/* A lazily created pool of POSIX threads for loops of independent tasks. */
#ifndef HYBRIDLAB_POOL_H
#define HYBRIDLAB_POOL_H

#include <stdint.h>

typedef void (*hl_task)(void *context, int64_t index);

/* Run task(context, 0 .. count-1) on up to `threads` threads, the caller among them; return when all are done.
   Any thread may call it at any time: each concurrent caller gets a team of its own, or runs inline when all teams
   are taken. After fork() the child starts with an empty pool. Tasks run under the default floating-point control
   word (round to nearest, subnormals kept), whatever the caller's. */
void hl_parallel(hl_task task, void *context, int64_t count, int threads);

/* The same for tasks that are told which task their thread runs after this one (-1: none), to prefetch for it. */
typedef void (*hl_chained_task)(void *context, int64_t index, int64_t next);

void hl_parallel_chained(hl_chained_task task, void *context, int64_t count, int threads);

#endif
