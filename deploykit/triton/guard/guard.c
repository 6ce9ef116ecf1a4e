// A shared library that `deploykit serve` loads into Triton before Triton's own (LD_PRELOAD). It replaces some
// functions, so that it sees each HTTP and gRPC request when Triton reads it, at no cost:
//
// TRITONSERVER_InferenceRequestAddInput: Triton 2.51 allocates the shape that a request declares before it counts the
//   values in the request, so 100 bytes could allocate gigabytes. A shape of more than MAX_TENSOR_BYTES, or an invalid one, is
//   refused here.
// TRITONSERVER_DataTypeByteSize, TRITONSERVER_InferenceResponseOutput, TRITONSERVER_InferenceRequestNew: asked for the classes
//   of an output of texts (the parameter "classification"), Triton divides by the size of a text, 0, and ends. While it
//   writes an answer the size is 1 here; it then says that there are no classes.
// inflate: Triton unpacks a compressed request whole. One that grows past MAX_RATIO times its size is refused here, and so is a
//   damaged one: Triton would answer the part before the damage, and an empty text if there is none.
// TRITONSERVER_ErrorCode: Triton reports some errors of the client as internal, and a model that is being loaded again as
//   internal or not found. Here they get the code that clients understand: 400, or 503, after which clients retry.
// TRITONSERVER_ErrorDelete: Triton asks for the code of an answer's error on /generate after it has deleted the error, so any
//   such answer had status 400. The last error of a thread is kept until the next one is deleted.
// TRITONSERVER_ErrorMessage: an error may quote a whole request, and gRPC loses one of more than 8 KiB. Long ones lose their middle.
//   Some errors get the name of the field at fault: the body, or the inputs that may have a value of the wrong type on /generate.
// "triton_grpc_error": with this header on gRPC, an error in a stream may crash Triton 2.51 (the stream's end and the error
//   release the same state). Triton is made to look for a header that no client can send.
// strncasecmp: Triton copies the body of a form, the content type of `curl -d`, to the stack. A body of 4 MB ended Triton.
//   With this library no body is a form.
// syscall, TRITONSERVER_ServerInferAsync, TRITONSERVER_InferenceRequestDelete: Triton does not look at a connection on HTTP
//   until it answers. This library cancels a request when its client closes the connection, as Triton does on gRPC.
// readv, syscall: Triton waits forever for the rest of a request, for example if the body is shorter than its Content-Length. A
//   connection on HTTP is closed if a part of a request arrived and then nothing for 60 s (DEPLOYKIT_GUARD_READ_S).
// TRITONSERVER_InferenceRequestCancel and others: requests that are cancelled at their end neither stay forever nor end Triton;
//   see cancelled.c.
// strlen: requests on gRPC join their caller's trace; see traceparent.c.
// pthread_cond_clockwait: requests do not wait for a wake-up that Triton missed; see missed.c.
// sem_timedwait, fork: a stopped model process does not count as dead; see stopped.c.
// TRITONSERVER_InferenceRequestAppendInputData, TRITONSERVER_InferenceRequestAddRawInput: requests whose strings are not complete,
//   and requests without a body, are refused; see incomplete.c.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#include "cancelled.h"
#include "incomplete.h"

enum { MAX_TENSOR_BYTES = 8 << 20, MAX_RATIO = 64, ALWAYS_ALLOWED = 1 << 20, MAX_MESSAGE = 2500 };

// The model processes must not load this library: they may unpack any data. Triton passes its environment on, and so
// does a shell that starts it.
__attribute__((constructor)) static void leave_the_environment(void) {
  if (dlsym(RTLD_DEFAULT, "TRITONSERVER_ServerNew") == NULL) return;  // this is not Triton
  const char *preload = getenv("LD_PRELOAD");
  const char *others = preload == NULL ? NULL : strchr(preload, ':');  // this library is the first
  if (others != NULL) {
    setenv("LD_PRELOAD", others + 1, 1);
  } else {
    unsetenv("LD_PRELOAD");
  }
}

#define GRPC_ERROR "triton_grpc_error"

// Make the header that Triton looks for "Triton_grpc_error": HTTP/2 has no capitals in the names of headers.
static int disable_grpc_error(struct dl_phdr_info *program, size_t size, void *data) {
  (void)size, (void)data;
  for (int i = 0; i < program->dlpi_phnum; i++) {
    const ElfW(Phdr) *part = &program->dlpi_phdr[i];
    if (part->p_type != PT_LOAD || part->p_flags != PF_R) continue;
    char *begin = (char *)(program->dlpi_addr + part->p_vaddr);
    // With the zeros around it: messages name it too.
    char *found = memmem(begin, part->p_memsz, "\0" GRPC_ERROR, sizeof GRPC_ERROR + 1);
    if (found == NULL) continue;
    uintptr_t page = (uintptr_t)(found + 1) & ~(uintptr_t)(getauxval(AT_PAGESZ) - 1);
    if (mprotect((void *)page, 1 + (uintptr_t)(found + 1) - page, PROT_READ | PROT_WRITE) != 0) continue;
    found[1] = 'T';
    mprotect((void *)page, 1 + (uintptr_t)(found + 1) - page, PROT_READ);
  }
  return 1;  // Triton is the first of the programs; the others are its libraries
}

__attribute__((constructor)) static void find_grpc_error(void) { dl_iterate_phdr(disable_grpc_error, NULL); }

// Bytes of a tensor with values of `size` bytes, -1 if `shape` has a negative dimension, INT64_MAX if they cannot be counted.
static int64_t tensor_bytes(const int64_t *shape, uint64_t dimensions, int64_t size) {
  int64_t bytes = size;
  for (uint64_t i = 0; i < dimensions; i++) {
    if (shape[i] < 0) return -1;
    if (__builtin_mul_overflow(bytes, shape[i], &bytes)) return INT64_MAX;
  }
  return bytes;
}

EXPORTED Error *TRITONSERVER_InferenceRequestAddInput(void *request, const char *name, int datatype, const int64_t *shape,
                                                      uint64_t dimensions) {
  static Error *(*next)(void *, const char *, int, const int64_t *, uint64_t);
  static uint32_t (*size_of)(int);
  static Error *(*new_error)(int, const char *);
  if (next == NULL) {
    new_error = (Error * (*)(int, const char *)) dlsym(RTLD_NEXT, "TRITONSERVER_ErrorNew");
    size_of = (uint32_t(*)(int))dlsym(RTLD_NEXT, "TRITONSERVER_DataTypeByteSize");
    next = (Error * (*)(void *, const char *, int, const int64_t *, uint64_t)) dlsym(RTLD_NEXT, __func__);
  }
  // Texts have size 0 here: Triton allocates memory for the texts in the request. Their number must still be valid.
  int64_t size = size_of(datatype);
  int64_t bytes = tensor_bytes(shape, dimensions, size == 0 ? 1 : size);
  if (bytes < 0) {
    return new_error(INVALID_ARGUMENT, "an input's shape has a negative dimension");
  }
  if (bytes == INT64_MAX || (size > 0 && bytes > MAX_TENSOR_BYTES)) {
    return new_error(INVALID_ARGUMENT, "an input's shape is too large: its numbers may take 8 MiB");
  }
  if (size == 0) expect_strings(name, bytes);
  return next(request, name, datatype, shape, dimensions);
}

static __thread int answering;  // this thread writes the outputs of an answer

EXPORTED Error *TRITONSERVER_InferenceRequestNew(void **request, void *server, const char *model, int64_t version) {
  static Error *(*next)(void **, void *, const char *, int64_t);
  if (next == NULL) next = (Error * (*)(void **, void *, const char *, int64_t)) dlsym(RTLD_NEXT, __func__);
  answering = 0;
  begin_strings();
  Error *error = next(request, server, model, version);
  if (error != NULL) return error;
  if (deleted_here(*request)) {  // one that Triton may still delete
    void *unusable = *request;
    error = TRITONSERVER_InferenceRequestNew(request, server, model, version);
    delete_request(unusable);
    return error;
  }
  note_deleted(*request);  // an older one at its address
  return error;
}

EXPORTED Error *TRITONSERVER_InferenceResponseOutput(void *response, uint32_t index, const char **name, int *datatype,
                                                     const int64_t **shape, uint64_t *dimensions, const void **base,
                                                     size_t *bytes, int *memory, int64_t *memory_id, void **user) {
  static Error *(*next)(void *, uint32_t, const char **, int *, const int64_t **, uint64_t *, const void **, size_t *, int *,
                        int64_t *, void **);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  answering = 1;
  return next(response, index, name, datatype, shape, dimensions, base, bytes, memory, memory_id, user);
}

EXPORTED uint32_t TRITONSERVER_DataTypeByteSize(int datatype) {
  static uint32_t (*next)(int);
  if (next == NULL) next = (uint32_t(*)(int))dlsym(RTLD_NEXT, __func__);
  uint32_t size = next(datatype);
  return size == 0 && answering ? 1 : size;
}

// Triton ignores all errors of inflate except STREAM_ERROR, and reads what was unpacked before them. BUF_ERROR only means that the
// input of one call is used up.
EXPORTED int inflate(ZStream *stream, int flush) {
  static int (*next)(ZStream *, int);
  if (next == NULL) next = (int (*)(ZStream *, int))dlsym(RTLD_NEXT, __func__);
  int result = next(stream, flush);
  if (stream->total_out > ALWAYS_ALLOWED && stream->total_out / MAX_RATIO > stream->total_in) return STREAM_ERROR;
  if (result == NEED_DICT || (result < 0 && result != BUF_ERROR)) return STREAM_ERROR;
  return result;
}

static int has(const char *message, const char *part) { return strstr(message, part) != NULL; }

EXPORTED int TRITONSERVER_ErrorCode(Error *error) {
  static int (*next)(Error *);
  static const char *(*message_of)(Error *);
  if (next == NULL) {
    message_of = (const char *(*)(Error *))dlsym(RTLD_NEXT, "TRITONSERVER_ErrorMessage");
    next = (int (*)(Error *))dlsym(RTLD_NEXT, __func__);
  }
  int code = next(error);
  if (code != INTERNAL && code != NOT_FOUND) return code;
  const char *message = message_of(error);
  if (code == NOT_FOUND) return has(message, "has no available versions") ? UNAVAILABLE : code;
  static const char *const of_client[] = {"failed to parse the request JSON", "Unable to parse '", "attempt to access JSON non-",
                                          "attempt to get members for non-object", "was not found in the JSON",
                                          "inconsistent stream state during decompression"};
  for (size_t i = 0; i < sizeof of_client / sizeof *of_client; i++) {
    if (has(message, of_client[i])) return INVALID_ARGUMENT;
  }
  return has(message, "Stub process '") && has(message, "is not healthy") ? UNAVAILABLE : code;
}

EXPORTED void TRITONSERVER_ErrorDelete(Error *error) {
  static void (*next)(Error *);
  static __thread Error *last;
  if (next == NULL) next = (void (*)(Error *))dlsym(RTLD_NEXT, __func__);
  note_error_deleted();
  if (last != NULL) next(last);
  last = error;
}

#define ELLIPSIS " … "

static const char *const clearer[][2] = {
    {"attempt to get members for non-object", "the body is not a JSON object"},
    {"encountered inconsistent stream state during decompression",
     "decompression failed: the compressed body is damaged, or unpacks to more than 64 times its size"},
    {"Unable to parse JSON bytes array: attempt to access JSON non-string as string",
     "an input that takes a text ('text_input', 'messages' or 'sampling_parameters' of a language model) has another value: "
     "give a string"},
    {"Unable to parse 'data': attempt to access JSON non-boolean as boolean",
     "an input that is a flag ('stream', 'exclude_input_in_output' or 'return_…' of a language model) has another value: give "
     "true or false"},
    {"Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer",
     "an input of integers ('input_ids' of a language model) has another value: give whole numbers"},
};

EXPORTED const char *TRITONSERVER_ErrorMessage(Error *error) {
  static const char *(*next)(Error *);
  static __thread char shown[MAX_MESSAGE + sizeof ELLIPSIS];
  if (next == NULL) next = (const char *(*)(Error *))dlsym(RTLD_NEXT, __func__);
  const char *message = next(error);
  for (size_t i = 0; i < sizeof clearer / sizeof *clearer; i++) {
    if (strcmp(message, clearer[i][0]) == 0) return clearer[i][1];
  }
  size_t length = strlen(message), head = MAX_MESSAGE / 2, tail = length - MAX_MESSAGE / 2;
  if (length <= MAX_MESSAGE) return message;
  while (head > 0 && (message[head] & 0xC0) == 0x80) head--;  // no cut within a character
  while ((message[tail] & 0xC0) == 0x80) tail++;
  memcpy(shown, message, head);
  strcpy(stpcpy(shown + head, ELLIPSIS), message + tail);
  return shown;
}

EXPORTED int strncasecmp(const char *a, const char *b, size_t length) {
  static int (*next)(const char *, const char *, size_t);
  if (next == NULL) next = (int (*)(const char *, const char *, size_t))dlsym(RTLD_NEXT, __func__);
  return strcmp(b, "application/x-www-form-urlencoded") == 0 ? 1 : next(a, b, length);
}

enum { MAX_CONNECTIONS = 1 << 16 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // of the next two
static void *request_of[MAX_CONNECTIONS];                 // the request on a connection, until its client has gone
static int connections;                                   // the highest connection so far, and 1
static int closings = -1;                                 // an epoll of these connections
static __thread int paused = -1;  // Triton's HTTP thread stops reading a connection before it submits the request

static _Atomic int64_t read_at[MAX_CONNECTIONS];  // when a part of a request arrived on a connection, in s; 0: no part is pending

static int64_t seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return now.tv_sec;
}

static void *tidy(void *unused) {
  const char *given = getenv("DEPLOYKIT_GUARD_READ_S");
  int64_t most = given == NULL ? 60 : atoi(given);
  for (const struct timespec pause = {.tv_sec = 1};; nanosleep(&pause, NULL)) {
    int64_t latest = seconds() - most;
    for (int connection = 0; connection < MAX_CONNECTIONS; connection++) {
      int64_t at = read_at[connection];
      if (at != 0 && at <= latest && atomic_compare_exchange_strong(&read_at[connection], &at, 0)) {
        shutdown(connection, SHUT_RDWR);
      }
    }
    delete_forgotten();
  }
  return unused;
}

static pthread_once_t tidying = PTHREAD_ONCE_INIT;

static void begin_tidying(void) {
  pthread_t thread;
  pthread_create(&thread, NULL, tidy, NULL);
}

static __thread int on_http;  // this thread reads requests on HTTP

// How Triton's libevent reads.
EXPORTED ssize_t readv(int connection, const struct iovec *parts, int count) {
  static ssize_t (*next)(int, const struct iovec *, int);
  if (next == NULL) next = (ssize_t(*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, __func__);
  on_http = 1;
  ssize_t result = next(connection, parts, count);
  if (result > 0 && connection < MAX_CONNECTIONS) {
    pthread_once(&tidying, begin_tidying);
    read_at[connection] = seconds();
  }
  return result;
}

// How Triton's libevent calls epoll_ctl. It does so before it answers a request, before it submits one, and at the end of a
// connection.
EXPORTED long syscall(long number, long a, long b, long c, long d, long e, long f) {
  static long (*next)(long, ...);
  if (next == NULL) next = (long (*)(long, ...))dlsym(RTLD_NEXT, __func__);
  if (number == SYS_epoll_ctl && a != closings) {
    const struct epoll_event *event = (const struct epoll_event *)d;
    paused = b == EPOLL_CTL_DEL || !(event->events & EPOLLIN) ? (int)c : -1;
    if (c >= 0 && c < MAX_CONNECTIONS) read_at[c] = 0;
  }
  return next(number, a, b, c, d, e, f);
}

static void *cancel_requests_without_client(void *unused) {
  Error *(*cancel)(void *) = (Error * (*)(void *)) dlsym(RTLD_NEXT, "TRITONSERVER_InferenceRequestCancel");
  void (*delete_error)(Error *) = (void (*)(Error *))dlsym(RTLD_DEFAULT, "TRITONSERVER_ErrorDelete");
  for (;;) {
    struct epoll_event event;
    if (epoll_wait(closings, &event, 1, -1) != 1) continue;
    struct pollfd client = {.fd = event.data.fd, .events = POLLRDHUP};
    pthread_mutex_lock(&lock);
    // On a busy machine the request may have ended since, and another client have the connection's number.
    if (poll(&client, 1, 0) == 1) {
      void **request = &request_of[client.fd];
      Error *error = *request == NULL ? NULL : cancel(*request);
      if (error != NULL) delete_error(error);
      *request = NULL;
    }
    pthread_mutex_unlock(&lock);
  }
  return unused;
}

static void begin_watching(void) {
  pthread_t thread;
  closings = epoll_create1(EPOLL_CLOEXEC);
  if (closings >= 0 && pthread_create(&thread, NULL, cancel_requests_without_client, NULL) != 0) closings = -1;
}

EXPORTED Error *TRITONSERVER_InferenceRequestCancel(void *request) {
  static Error *(*next)(void *);
  if (next == NULL) next = (Error * (*)(void *)) dlsym(RTLD_NEXT, __func__);
  if (deleted_here(request)) return NULL;
  Error *error = next(request);
  note_cancelled(request);
  return error;
}

static Error *submit(void *server, void *request, void *trace) {
  static Error *(*next)(void *, void *, void *);
  if (next == NULL) next = (Error * (*)(void *, void *, void *)) dlsym(RTLD_NEXT, "TRITONSERVER_ServerInferAsync");
  const char *incomplete = incomplete_strings();
  if (incomplete != NULL) {
    Error *(*new_error)(int, const char *) = (Error * (*)(int, const char *)) dlsym(RTLD_NEXT, "TRITONSERVER_ErrorNew");
    return new_error(INVALID_ARGUMENT, incomplete);
  }
  if (!on_http) pthread_once(&tidying, begin_tidying);
  note_submitted(request, 1, on_http);
  Error *error = next(server, request, trace);
  if (error != NULL) note_submitted(request, 0, on_http);
  return error;
}

EXPORTED Error *TRITONSERVER_ServerInferAsync(void *server, void *request, void *trace) {
  static pthread_once_t begun = PTHREAD_ONCE_INIT;
  int connection = paused;
  paused = -1;
  if (connection < 0 || connection >= MAX_CONNECTIONS) return submit(server, request, trace);  // not on HTTP
  pthread_once(&begun, begin_watching);
  pthread_mutex_lock(&lock);
  request_of[connection] = request;
  if (connection >= connections) connections = connection + 1;
  pthread_mutex_unlock(&lock);
  Error *error = submit(server, request, trace);  // undoes a cancellation that came before
  pthread_mutex_lock(&lock);
  if (error == NULL && request_of[connection] == request) {
    struct epoll_event event = {.events = EPOLLRDHUP | EPOLLONESHOT, .data.fd = connection};
    epoll_ctl(closings, EPOLL_CTL_ADD, connection, &event);
  }
  pthread_mutex_unlock(&lock);
  return error;
}

EXPORTED Error *TRITONSERVER_InferenceRequestDelete(void *request) {
  pthread_mutex_lock(&lock);
  for (int connection = 0; connection < connections; connection++) {
    if (request_of[connection] != request) continue;
    request_of[connection] = NULL;
    epoll_ctl(closings, EPOLL_CTL_DEL, connection, NULL);
  }
  pthread_mutex_unlock(&lock);
  return note_deleted(request) ? NULL : delete_request(request);
}
