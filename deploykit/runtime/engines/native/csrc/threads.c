/* The worker threads of a context, and their barrier. */
#include <sched.h>
#include <stdlib.h>

#include "kernels.h"

#define SPINS 3000 /* about 50 us, then yield: the other thread may need this CPU */

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

void barrier(Context *c) {
    if (c->threads == 1) return;
    int phase = atomic_load_explicit(&c->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&c->arrived, 1, memory_order_acq_rel) == c->threads - 1) {
        atomic_store_explicit(&c->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&c->phase, phase + 1, memory_order_release);
        return;
    }
    for (int n = 0; atomic_load_explicit(&c->phase, memory_order_acquire) == phase; n++) {
        if (n < SPINS) PAUSE();
        else sched_yield();
    }
}

static void work_on(Context *c, Work work, int number) {
    work(c, number);
    if (c->kernels->release) c->kernels->release();
}

void *serve(void *argument) {
    Thread *t = argument;
    Context *c = t->context;
    int number = t->number, seen = 0;
    free(t);
    for (;;) {
        for (int n = 0; n < 4000 && atomic_load_explicit(&c->generation, memory_order_acquire) == seen; n++) PAUSE();
        if (atomic_load_explicit(&c->generation, memory_order_acquire) == seen) {
            pthread_mutex_lock(&c->mutex);
            while (atomic_load(&c->generation) == seen) pthread_cond_wait(&c->wake, &c->mutex);
            pthread_mutex_unlock(&c->mutex);
        }
        seen++;
        if (c->stop) return NULL;
        work_on(c, c->work, number);
        atomic_fetch_sub_explicit(&c->working, 1, memory_order_release);
    }
}

void run(Context *c, Work work) {
    if (c->threads > 1) {
        c->work = work;
        atomic_store(&c->working, c->threads - 1);
        pthread_mutex_lock(&c->mutex);
        atomic_fetch_add(&c->generation, 1);
        pthread_cond_broadcast(&c->wake);
        pthread_mutex_unlock(&c->mutex);
    }
    if (work) work_on(c, work, 0);
    for (int n = 0; c->threads > 1 && !c->stop && atomic_load_explicit(&c->working, memory_order_acquire); n++) {
        if (n < SPINS) PAUSE();
        else sched_yield();
    }
}

