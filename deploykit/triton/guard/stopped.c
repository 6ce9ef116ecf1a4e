// While Triton 2.51 waits for a model's process, it checks every second whether the process has set a flag, which it does every 300 ms. A
// process that is stopped (SIGSTOP), or gets no CPU time on a busy machine, has not. Then Triton answers its requests with an error,
// and frees them in the shared memory, although the process has not read them. When the process continues, it writes there, and Triton soon
// ends with SIGSEGV. So here a wait ends only with an answer, or when the process has ended.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "triton.h"

enum { MAX_CHILDREN = 1024, SLICE_NS = 100000000 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // of the next
static pid_t children[MAX_CHILDREN];                      // the processes that Triton started; 0: none

static int has_ended(pid_t child) {
  siginfo_t info = {0};
  return waitid(P_PID, child, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid != 0;
}

// How Triton starts a model's process.
EXPORTED pid_t fork(void) {
  static pid_t (*next)(void);
  if (next == NULL) next = (pid_t(*)(void))dlsym(RTLD_NEXT, __func__);
  pid_t child = next();
  if (child <= 0) return child;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < MAX_CHILDREN; i++) {
    if (children[i] != 0 && !has_ended(children[i])) continue;
    children[i] = child;
    break;
  }
  pthread_mutex_unlock(&lock);
  return child;
}

// Write the name of the shared memory that an address is in, or nothing.
static void name_memory(const void *address, char name[PATH_MAX]) {
  static const char folder[] = "/dev/shm/";
  char line[PATH_MAX + 100];
  unsigned long begin, end;
  *name = 0;
  FILE *maps = fopen("/proc/self/maps", "re");
  while (maps != NULL && fgets(line, sizeof line, maps) != NULL) {
    if (sscanf(line, "%lx-%lx", &begin, &end) != 2 || (unsigned long)address < begin || (unsigned long)address >= end) continue;
    const char *path = strstr(line, folder);
    if (path != NULL) sscanf(path + strlen(folder), "%s", name);
    break;
  }
  if (maps != NULL) fclose(maps);
}

// Whether one of a process's arguments is `word`.
static int has_argument(pid_t process, const char *word) {
  char path[32], words[4096];
  snprintf(path, sizeof path, "/proc/%d/cmdline", process);
  FILE *file = fopen(path, "re");
  if (file == NULL) return 0;
  size_t size = fread(words, 1, sizeof words - 1, file);
  fclose(file);
  words[size] = 0;
  for (size_t at = 0; at < size; at += strlen(words + at) + 1) {
    if (strcmp(words + at, word) == 0) return 1;
  }
  return 0;
}

// The model's process that uses the shared memory at an address; 0: there is none.
static pid_t process_with(const void *address) {
  char name[PATH_MAX];
  name_memory(address, name);
  pid_t found = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < MAX_CHILDREN && *name != 0 && found == 0; i++) {
    if (children[i] != 0 && has_argument(children[i], name)) found = children[i];
  }
  pthread_mutex_unlock(&lock);
  return found;
}

EXPORTED int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
  static int (*next)(sem_t *, const struct timespec *);
  if (next == NULL) next = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, __func__);
  int result = next(semaphore, until);
  if (result == 0 || errno != ETIMEDOUT) return result;
  pid_t process = process_with(semaphore);
  while (process != 0 && !has_ended(process)) {
    struct timespec soon;
    clock_gettime(CLOCK_REALTIME, &soon);
    soon.tv_nsec += SLICE_NS;
    soon.tv_sec += soon.tv_nsec / 1000000000;
    soon.tv_nsec %= 1000000000;
    result = next(semaphore, &soon);
    if (result == 0 || errno != ETIMEDOUT) return result;
  }
  errno = ETIMEDOUT;
  return -1;
}
