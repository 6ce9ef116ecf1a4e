// Moves the wall clock of the programs that load it by the seconds that stand, as eight bytes, in the file MOVED_CLOCK.
// Monotonic clocks stay. A wait until a time of the wall clock ends when the moved clock reaches it, as in the kernel.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *shift;
static int (*timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*timedlock)(pthread_mutex_t *, const struct timespec *);
static int (*semwait)(sem_t *, const struct timespec *);

__attribute__((constructor)) static void begin(void) {
  timedwait = (int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))dlvsym(RTLD_NEXT, "pthread_cond_timedwait",
                                                                                            "GLIBC_2.3.2");
  timedlock = (int (*)(pthread_mutex_t *, const struct timespec *))dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
  semwait = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
  const char *path = getenv("MOVED_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, 8, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (mapped != MAP_FAILED) shift = mapped;
}

static int64_t moved(void) { return shift ? *shift : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = (int)syscall(SYS_clock_gettime, clock, now);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += moved();
  return failed;
}

time_t time(time_t *into) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (into) *into = now.tv_sec;
  return now.tv_sec;
}

int gettimeofday(struct timeval *restrict into, void *restrict zone) {
  (void)zone;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  into->tv_sec = now.tv_sec;
  into->tv_usec = now.tv_nsec / 1000;
  return 0;
}

// Cuts a wait until a time of the moved clock into pieces of 0.1 s, so that it sees the clock jump. Returns whether it is over.
static int next_wait(const struct timespec *until, struct timespec *piece) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  int64_t left = (until->tv_sec - now.tv_sec) * 1000000000LL + until->tv_nsec - now.tv_nsec;
  if (left <= 0) return 1;
  if (left > 100000000) left = 100000000;
  syscall(SYS_clock_gettime, CLOCK_REALTIME, piece);
  piece->tv_nsec += left;
  if (piece->tv_nsec >= 1000000000) piece->tv_sec++, piece->tv_nsec -= 1000000000;
  return 0;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until) {
  if (until->tv_sec < 1000000000) return timedwait(cond, mutex, until);  // of a monotonic clock
  struct timespec piece;
  if (next_wait(until, &piece)) return ETIMEDOUT;
  int result = timedwait(cond, mutex, &piece);
  return result == ETIMEDOUT ? 0 : result;  // a caller has to expect to wake for nothing, and looks at the clock again
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
  int result = pthread_mutex_trylock(mutex);
  struct timespec piece;
  while (result == EBUSY && !next_wait(until, &piece)) {
    result = timedlock(mutex, &piece);
    if (result == ETIMEDOUT) result = EBUSY;
  }
  return result == EBUSY ? ETIMEDOUT : result;
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
  struct timespec piece;
  for (;;) {
    if (!sem_trywait(semaphore)) return 0;
    if (next_wait(until, &piece)) return errno = ETIMEDOUT, -1;
    if (!semwait(semaphore, &piece)) return 0;
    if (errno != ETIMEDOUT) return -1;
  }
}
