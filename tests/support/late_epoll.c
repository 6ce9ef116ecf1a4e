// Delays a thread that waits on epoll for one event without a timeout, as the guard of Triton does, by LATE_MS after each event, as if
// the machine were busy. Triton's epoll_wait is this system call.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/syscall.h>
#include <time.h>

enum { LATE_MS = 20 };

long syscall(long number, long a, long b, long c, long d, long e, long f) {
  long (*next)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  long result = next(number, a, b, c, d, e, f);
  const struct timespec late = {.tv_nsec = LATE_MS * 1000000};
  if (number == SYS_epoll_wait && c == 1 && (int)d == -1) nanosleep(&late, NULL);
  return result;
}
