// Work around two faults of Triton 2.51 with gRPC requests that a client cancels when they are about to end.
//
// Triton forgets some of them: it waits for a further event, which does not arrive, and keeps the request, and with it its model, forever,
// so that the model cannot be unloaded. This file deletes a released request that Triton still has FORGOTTEN_S after its last response. If it was
// not forgotten (its client may read slowly), Triton uses its address once more. So no other request gets that address, and
// calls with it do nothing.
//
// Triton releases the state of some requests twice, and soon ends with SIGSEGV or a failed assertion. Its gRPC thread learns of
// a cancellation, and then cancels the requests. The last response of a cancelled request puts its state on the queue of that
// thread, which releases it. If the response arrives between the two, or while another one is being written, the thread releases the
// state twice. So this file delays the last response for SETTLED_MS after a cancellation. Whether Triton treats a request as
// cancelled shows only in its handling of the last response: it deletes it, without deleting an error of reading it first. If it
// does so before it has cancelled the request, that call does not return: the stack is unwound, which frees Triton's lock, and
// the response is sent again later.

#define _GNU_SOURCE
#include "cancelled.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <time.h>
#include <unwind.h>

enum { BUCKETS = 4096, FORGOTTEN_S = 3, FINAL = 1, ALL = 1, SETTLED_MS = 100, PAUSE_MS = 10 };

typedef void (*OnResponse)(void *response, uint32_t flags, void *user);
typedef void (*OnRelease)(void *request, uint32_t flags, void *user);

typedef struct Record {
  struct Record *next;  // in its bucket
  void *request;        // NULL once deleted
  OnResponse tell;      // Triton's own, with its `user`
  void *user;
  OnRelease release;  // Triton's own
  int released;       // no backend has it any more
  int of_program;     // `tell` is part of tritonserver itself; a backend that asks other models has its own
  int on_grpc;
  int submitted;
  int64_t answered_at;      // in s: when `tell` returned from the last response; 0: it has not
  int64_t settled_at;       // in ms: when its last response may be told after a cancellation; 0: there was none
  int deleted;              // here, and not by Triton
  void *last;               // response, until it is told
  struct Record *waits;     // for its last response to be told, after this one
} Record;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // of the records
static Record *buckets[BUCKETS];

static Record **place_of(void *request) {
  Record **place = &buckets[(uintptr_t)request / 16 % BUCKETS];
  while (*place != NULL && (*place)->request != request) place = &(*place)->next;
  return place;
}

// Forget a request. Its record goes too, unless a last response may still come.
static void drop(Record **place) {
  Record *record = *place;
  *place = record->next;
  record->request = NULL;
  if (record->answered_at != 0 || !record->submitted) free(record);
}

static int64_t milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

// Data with which a thread can take back a last response that it has passed to Triton.
typedef struct {
  int read;  // Triton has looked at the response
  jmp_buf back;
  char *frame;
  struct _Unwind_Exception unwinding;
} Telling;

static __thread Telling *telling;

static _Unwind_Reason_Code stop_at_the_guard(int version, _Unwind_Action actions, _Unwind_Exception_Class kind,
                                             struct _Unwind_Exception *exception, struct _Unwind_Context *context, void *user) {
  static _Unwind_Word (*frame_of)(struct _Unwind_Context *);  // Triton's own unwinder, which is not linked here
  if (frame_of == NULL) *(void **)&frame_of = dlsym(RTLD_DEFAULT, "_Unwind_GetCFA");
  Telling *self = user;
  (void)version, (void)kind, (void)exception;
  if ((actions & _UA_END_OF_STACK) != 0 || (char *)frame_of(context) > self->frame) longjmp(self->back, 1);
  return _URC_NO_REASON;
}

void note_error_deleted(void) {
  if (telling != NULL) telling->read = 1;
}

EXPORTED Error *TRITONSERVER_InferenceResponseDelete(void *response) {
  static Error *(*next)(void *);
  static _Unwind_Reason_Code (*unwind)(struct _Unwind_Exception *, _Unwind_Stop_Fn, void *);
  if (next == NULL) {
    *(void **)&unwind = dlsym(RTLD_DEFAULT, "_Unwind_ForcedUnwind");
    next = (Error * (*)(void *)) dlsym(RTLD_NEXT, __func__);
  }
  if (telling != NULL && !telling->read && unwind != NULL) unwind(&telling->unwinding, stop_at_the_guard, telling);
  return next(response);
}

// Returns 0 if Triton treats the request as cancelled. Then nothing has happened.
static int tell_unless_cancelled(Record *record) {
  Telling self = {.frame = __builtin_frame_address(0)};
  if (setjmp(self.back) != 0) {
    telling = NULL;
    return 0;
  }
  telling = &self;
  record->tell(record->last, FINAL, record->user);
  telling = NULL;
  return 1;
}

// Returns 0 if it is too early.
static int tell_last(Record *record) {
  pthread_mutex_lock(&lock);
  int64_t settled_at = record->settled_at;
  pthread_mutex_unlock(&lock);
  if (settled_at == 0) {
    if (tell_unless_cancelled(record)) return 1;
    pthread_mutex_lock(&lock);
    record->settled_at = milliseconds() + SETTLED_MS;
    pthread_mutex_unlock(&lock);
    return 0;
  }
  if (settled_at > milliseconds()) return 0;
  record->tell(record->last, FINAL, record->user);
  return 1;
}

static void note_answered(Record *record) {
  pthread_mutex_lock(&lock);
  record->answered_at = milliseconds() / 1000;
  if (record->request == NULL) free(record);
  pthread_mutex_unlock(&lock);
}

static pthread_mutex_t waiting_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t waiting_came = PTHREAD_COND_INITIALIZER;
static Record *waiting;  // to be told their last responses

static void *tell_waiting(void *unused) {
  const struct timespec pause = {.tv_nsec = PAUSE_MS * 1000000};
  for (;; nanosleep(&pause, NULL)) {
    pthread_mutex_lock(&waiting_lock);
    while (waiting == NULL) pthread_cond_wait(&waiting_came, &waiting_lock);
    Record *records = waiting, *early = NULL;
    waiting = NULL;
    pthread_mutex_unlock(&waiting_lock);
    while (records != NULL) {
      Record *record = records;
      records = record->waits;
      if (tell_last(record)) {
        note_answered(record);
      } else {
        record->waits = early, early = record;
      }
    }
    pthread_mutex_lock(&waiting_lock);
    while (early != NULL) {
      Record *record = early;
      early = record->waits, record->waits = waiting, waiting = record;
    }
    pthread_mutex_unlock(&waiting_lock);
  }
  return unused;
}

static pthread_once_t telling_begun = PTHREAD_ONCE_INIT;

static void begin_telling(void) {
  pthread_t thread;
  pthread_create(&thread, NULL, tell_waiting, NULL);
}

static void tell_later(Record *record) {
  pthread_once(&telling_begun, begin_telling);
  pthread_mutex_lock(&waiting_lock);
  record->waits = waiting, waiting = record;
  pthread_cond_signal(&waiting_came);
  pthread_mutex_unlock(&waiting_lock);
}

static void on_response(void *response, uint32_t flags, void *user) {
  Record *record = user;
  int last = (flags & FINAL) != 0;
  if (last && record->on_grpc) {
    record->last = response;
    if (!tell_last(record)) {
      tell_later(record);
      return;
    }
  } else {
    record->tell(response, flags, record->user);
  }
  if (last) note_answered(record);
}

static int is_of_program(OnResponse tell) {
  Dl_info place, program;
  return dladdr((void *)tell, &place) != 0 && dladdr((void *)getauxval(AT_PHDR), &program) != 0 &&
         place.dli_fbase == program.dli_fbase;
}

// Return the record of a request that has not been submitted; NULL if there is no memory. The lock is held.
static Record *record_to_submit(void *request) {
  Record **place = place_of(request);
  if (*place != NULL && (*place)->submitted) drop(place), place = place_of(request);  // of an older one at its address
  if (*place == NULL && (*place = calloc(1, sizeof(Record))) != NULL) (*place)->request = request;
  return *place;
}

static void on_release(void *request, uint32_t flags, void *user) {
  pthread_mutex_lock(&lock);
  Record *record = *place_of(request);
  OnRelease release = record->release;
  if ((flags & ALL) != 0) record->released = 1;
  pthread_mutex_unlock(&lock);
  release(request, flags, user);
}

EXPORTED Error *TRITONSERVER_InferenceRequestSetReleaseCallback(void *request, OnRelease release, void *user) {
  static Error *(*next)(void *, OnRelease, void *);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  pthread_mutex_lock(&lock);
  Record *record = record_to_submit(request);
  if (record != NULL) record->release = release, record->released = 0;
  pthread_mutex_unlock(&lock);
  return next(request, record == NULL ? release : on_release, user);
}

EXPORTED Error *TRITONSERVER_InferenceRequestSetResponseCallback(void *request, void *allocator, void *of_allocator, OnResponse tell,
                                                        void *user) {
  static Error *(*next)(void *, void *, void *, OnResponse, void *);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  int of_program = is_of_program(tell);
  pthread_mutex_lock(&lock);
  Record *record = record_to_submit(request);
  if (record != NULL) record->tell = tell, record->user = user, record->of_program = of_program;
  pthread_mutex_unlock(&lock);
  return record == NULL ? next(request, allocator, of_allocator, tell, user)
                        : next(request, allocator, of_allocator, on_response, record);
}

void note_submitted(void *request, int submitted, int on_http) {
  pthread_mutex_lock(&lock);
  Record *record = *place_of(request);
  if (record != NULL) record->submitted = submitted, record->on_grpc = !on_http && record->of_program;
  pthread_mutex_unlock(&lock);
}

int deleted_here(void *request) {
  pthread_mutex_lock(&lock);
  Record *record = *place_of(request);
  int deleted = record != NULL && record->deleted;
  pthread_mutex_unlock(&lock);
  return deleted;
}

int note_deleted(void *request) {
  pthread_mutex_lock(&lock);
  Record **place = place_of(request);
  int before = *place != NULL && (*place)->deleted;
  if (*place != NULL) drop(place);
  pthread_mutex_unlock(&lock);
  return before;
}

void note_cancelled(void *request) {
  pthread_mutex_lock(&lock);
  Record *record = *place_of(request);
  if (record != NULL && record->settled_at == 0) record->settled_at = milliseconds() + SETTLED_MS;
  pthread_mutex_unlock(&lock);
}

static void *next_forgotten(int64_t now) {
  void *found = NULL;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < BUCKETS && found == NULL; i++) {
    for (Record *record = buckets[i]; record != NULL && found == NULL; record = record->next) {
      if (!record->on_grpc || record->deleted || !record->released || record->answered_at == 0) continue;
      if (now - record->answered_at < FORGOTTEN_S) continue;
      record->deleted = 1;
      found = record->request;
    }
  }
  pthread_mutex_unlock(&lock);
  return found;
}

Error *delete_request(void *request) {
  static Error *(*delete)(void *);
  if (delete == NULL) *(void **)&delete = dlsym(RTLD_NEXT, "TRITONSERVER_InferenceRequestDelete");
  return delete (request);
}

void delete_forgotten(void) {
  int64_t now = milliseconds() / 1000;
  for (void *request; (request = next_forgotten(now)) != NULL;) delete_request(request);
}
