/* The worker threads of a context, and their barrier. A thread that waits spins for a moment, and then sleeps. It does not
 * yield: another program would get its CPU, in Linux 6.18 for hundreds of milliseconds. */
#define _GNU_SOURCE /* CPU sets */
#include <sched.h>
#include <stdlib.h>

#include "kernels.h"

#define SPINS 2000 /* 30 to 100 us */

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

static int this_cpu(void) {
#ifdef __linux__
    return sched_getcpu();
#else
    return 0;
#endif
}

/* Leave ``cpu``, on which the thread runs that woke this one: in virtual machines the kernel often wakes a thread there while other
 * CPUs are idle, and the two would take turns. */
static void leave(int cpu) {
#ifdef __linux__
    cpu_set_t all, others;
    if (sched_getcpu() != cpu || sched_getaffinity(0, sizeof all, &all)) return;
    others = all;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof all, &all);
#else
    (void)cpu;
#endif
}

/* Wait until ``value`` is no longer ``old``. */
static void wait_while(Context *c, atomic_int *value, int old) {
    for (int n = 0; n < SPINS; n++) {
        if (atomic_load_explicit(value, memory_order_acquire) != old) return;
        PAUSE();
    }
    int slept = 0;
    pthread_mutex_lock(&c->mutex);
    atomic_fetch_add(&c->sleeping, 1);
    for (; atomic_load(value) == old; slept = 1) pthread_cond_wait(&c->wake, &c->mutex);
    atomic_fetch_sub(&c->sleeping, 1);
    int waker = c->waker;
    pthread_mutex_unlock(&c->mutex);
    if (slept) leave(waker);
}

/* Wake the threads that sleep, after a value was changed. */
static void wake(Context *c) {
    if (!atomic_load(&c->sleeping)) return;
    pthread_mutex_lock(&c->mutex);
    c->waker = this_cpu();
    pthread_cond_broadcast(&c->wake);
    pthread_mutex_unlock(&c->mutex);
}

void barrier(Context *c) {
    if (c->threads == 1) return;
    int phase = atomic_load_explicit(&c->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&c->arrived, 1, memory_order_acq_rel) < c->threads - 1) {
        wait_while(c, &c->phase, phase);
        return;
    }
    atomic_store_explicit(&c->arrived, 0, memory_order_relaxed);
    atomic_store(&c->phase, phase + 1);
    wake(c);
}

static void work_on(Context *c, Work work, int number) {
    work(c, number);
    if (c->kernels->release) c->kernels->release();
}

void *serve(void *argument) {
    Thread *t = argument;
    Context *c = t->context;
    int number = t->number;
    free(t);
    for (int seen = 0;; seen++) {
        wait_while(c, &c->generation, seen);
        if (c->stop) return NULL;
        work_on(c, c->work, number);
        atomic_fetch_sub(&c->working, 1);
        wake(c);
    }
}

void run(Context *c, Work work) {
    if (c->threads > 1) {
        c->work = work;
        atomic_store(&c->working, c->threads - 1);
        atomic_fetch_add(&c->generation, 1);
        wake(c);
    }
    if (work) work_on(c, work, 0);
    if (c->stop) return;
    for (int left; c->threads > 1 && (left = atomic_load_explicit(&c->working, memory_order_acquire));) wait_while(c, &c->working, left);
}
