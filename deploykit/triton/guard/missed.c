// Triton 2.51 sometimes does not notice that requests wait: its batching thread is told that a model's process is free just before it
// begins to wait for that. It then waits for 500 ms, unless another request or process wakes it. So here a wait on a condition ends
// after AT_MOST_MS, as if it had been woken for no reason, which POSIX allows. The thread then sees the requests.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <time.h>

#include "triton.h"

enum { AT_MOST_MS = 5 };

// How libstdc++ waits with a timeout.
EXPORTED int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
  static int (*next)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  struct timespec early;
  clock_gettime(clock, &early);
  early.tv_nsec += AT_MOST_MS * 1000000;
  if (early.tv_nsec >= 1000000000) early.tv_nsec -= 1000000000, early.tv_sec++;
  if (early.tv_sec > until->tv_sec || (early.tv_sec == until->tv_sec && early.tv_nsec >= until->tv_nsec)) {
    return next(condition, mutex, clock, until);
  }
  int result = next(condition, mutex, clock, &early);
  return result == ETIMEDOUT ? 0 : result;
}
