// Requests that Triton 2.51 forgets. If a client cancels a stream on gRPC when its last response is on its way, Triton waits for
// a further response, which does not come. It keeps the request for ever, and with it its model, which then cannot be unloaded.
// Here a request that is cancelled after its last response, and that Triton still has 2 s later, is deleted.

#define _GNU_SOURCE
#include "abandoned.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

enum { BUCKETS = 4096, FORGOTTEN_S = 2, FINAL = 1 };

typedef void (*OnResponse)(void *response, uint32_t flags, void *user);

typedef struct Record {
  struct Record *next;  // in its bucket
  void *request;        // NULL once deleted
  OnResponse tell;      // Triton's own, with its `user`
  void *user;
  int submitted, answered;  // answered: `tell` has returned from the last response
  int64_t cancelled_at;     // after that; 0: it was not
  int deleted;              // here: if Triton deletes it after all, nothing is left to do
} Record;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // of the records
static Record *buckets[BUCKETS];
static int cancelled;  // number of records to delete, and those that were deleted

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
  if (record->cancelled_at != 0) cancelled--;
  if (record->answered || !record->submitted) free(record);
}

static void on_response(void *response, uint32_t flags, void *user) {
  Record *record = user;
  record->tell(response, flags, record->user);
  if ((flags & FINAL) == 0) return;
  pthread_mutex_lock(&lock);
  record->answered = 1;
  if (record->request == NULL) free(record);
  pthread_mutex_unlock(&lock);
}

EXPORTED Error *TRITONSERVER_InferenceRequestSetResponseCallback(void *request, void *allocator, void *of_allocator, OnResponse tell,
                                                        void *user) {
  static Error *(*next)(void *, void *, void *, OnResponse, void *);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  pthread_mutex_lock(&lock);
  Record **place = place_of(request);
  if (*place != NULL && ((*place)->submitted || (*place)->deleted)) drop(place), place = place_of(request);
  if (*place == NULL) *place = calloc(1, sizeof(Record));
  Record *record = *place;
  if (record != NULL) record->request = request, record->tell = tell, record->user = user;
  pthread_mutex_unlock(&lock);
  return record == NULL ? next(request, allocator, of_allocator, tell, user)
                        : next(request, allocator, of_allocator, on_response, record);
}

void note_submitted(void *request, int submitted) {
  pthread_mutex_lock(&lock);
  Record *record = *place_of(request);
  if (record != NULL) record->submitted = submitted;
  pthread_mutex_unlock(&lock);
}

int note_deleted(void *request) {
  pthread_mutex_lock(&lock);
  Record **place = place_of(request);
  int before = *place != NULL && (*place)->deleted;
  if (*place != NULL) drop(place);
  pthread_mutex_unlock(&lock);
  return before;
}

int note_cancelled(void *request, int64_t now) {
  pthread_mutex_lock(&lock);
  Record *record = *place_of(request);
  int late = record != NULL && record->answered && record->cancelled_at == 0;
  if (late) record->cancelled_at = now, cancelled++;
  pthread_mutex_unlock(&lock);
  return late;
}

static void *next_forgotten(int64_t now) {
  void *found = NULL;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < BUCKETS && cancelled > 0 && found == NULL; i++) {
    for (Record *record = buckets[i]; record != NULL && found == NULL; record = record->next) {
      if (record->cancelled_at == 0 || record->deleted || now - record->cancelled_at < FORGOTTEN_S) continue;
      record->deleted = 1;
      found = record->request;
    }
  }
  pthread_mutex_unlock(&lock);
  return found;
}

void delete_forgotten(int64_t now) {
  static Error *(*delete)(void *);
  if (delete == NULL) *(void **)&delete = dlsym(RTLD_NEXT, "TRITONSERVER_InferenceRequestDelete");
  for (void *request; (request = next_forgotten(now)) != NULL;) delete (request);
}
