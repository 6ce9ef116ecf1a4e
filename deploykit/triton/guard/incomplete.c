// Check inputs of texts when they are added to a request: the Python backend of Triton 2.51 answers a whole batch with the error
// of one request whose strings are not complete. And Triton takes a request without a body for a text without characters.

#define _GNU_SOURCE
#include "incomplete.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum { MAX_INPUTS = 16, MAX_NAME = 64, LENGTH_BYTES = 4 };

typedef struct {
  char name[MAX_NAME];
  int64_t wanted, complete;  // strings
  uint64_t left;             // bytes that the string which has begun still needs
  uint32_t length;           // the bytes of its length so far
  int length_bytes;          // their number
  int too_much;
  int unseen;  // the bytes are in memory that cannot be read here
} Strings;

// A request is made and submitted in one thread.
static __thread Strings inputs[MAX_INPUTS];
static __thread int count;
static __thread int raw;             // the body of the request is its only input
static __thread uint64_t raw_bytes;  // with the length that Triton puts before a text

void begin_strings(void) { count = 0, raw = 0, raw_bytes = 0; }

void expect_strings(const char *name, int64_t wanted) {
  if (count == MAX_INPUTS || strlen(name) >= MAX_NAME) return;
  inputs[count] = (Strings){.wanted = wanted};
  strcpy(inputs[count++].name, name);
}

static void read_strings(Strings *input, const uint8_t *bytes, uint64_t size) {
  while (size > 0) {
    if (input->complete == input->wanted) {
      input->too_much = 1;
      return;
    }
    if (input->length_bytes < LENGTH_BYTES) {
      input->length |= (uint32_t)*bytes++ << 8 * input->length_bytes++;
      size--;
      input->left = input->length;
    } else {
      uint64_t part = input->left < size ? input->left : size;
      bytes += part, size -= part, input->left -= part;
    }
    if (input->length_bytes == LENGTH_BYTES && input->left == 0) {
      input->complete++;
      input->length = 0, input->length_bytes = 0;
    }
  }
}

static Strings *find(const char *name) {
  for (int i = 0; i < count; i++) {
    if (strcmp(inputs[i].name, name) == 0) return &inputs[i];
  }
  return NULL;
}

enum { GPU = 2 };

static void note_data(const char *name, const void *base, size_t size, int memory) {
  raw_bytes += size;
  Strings *input = find(name);
  if (input == NULL) return;
  if (memory == GPU) {
    input->unseen = 1;
  } else {
    read_strings(input, base, size);
  }
}

EXPORTED Error *TRITONSERVER_InferenceRequestAddRawInput(void *request, const char *name) {
  static Error *(*next)(void *, const char *);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  raw = 1;
  return next(request, name);
}

EXPORTED Error *TRITONSERVER_InferenceRequestAppendInputData(void *request, const char *name, const void *base, size_t size,
                                                             int memory, int64_t memory_id) {
  static Error *(*next)(void *, const char *, const void *, size_t, int, int64_t);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  note_data(name, base, size, memory);
  return next(request, name, base, size, memory, memory_id);
}

// How gRPC adds them.
EXPORTED Error *TRITONSERVER_InferenceRequestAppendInputDataWithBufferAttributes(void *request, const char *name,
                                                                                 const void *base, void *attributes) {
  static Error *(*next)(void *, const char *, const void *, void *);
  static Error *(*size_of)(void *, size_t *);
  static Error *(*memory_of)(void *, int *);
  if (next == NULL) {
    *(void **)&size_of = dlsym(RTLD_NEXT, "TRITONSERVER_BufferAttributesByteSize");
    *(void **)&memory_of = dlsym(RTLD_NEXT, "TRITONSERVER_BufferAttributesMemoryType");
    *(void **)&next = dlsym(RTLD_NEXT, __func__);
  }
  size_t size = 0;
  int memory = GPU;
  if (size_of(attributes, &size) == NULL && memory_of(attributes, &memory) == NULL) note_data(name, base, size, memory);
  return next(request, name, base, attributes);
}

const char *incomplete_strings(void) {
  static __thread char message[200];
  if (raw && raw_bytes <= LENGTH_BYTES) return "the request has no body: send JSON";
  const char *found = NULL;
  for (int i = 0; i < count && found == NULL; i++) {
    const Strings *input = &inputs[i];
    if (input->unseen || (input->complete == input->wanted && !input->too_much)) continue;
    const char *what = input->too_much ? "more bytes than its strings" : "fewer bytes than the lengths of its strings say";
    snprintf(message, sizeof message, "the input '%s' of shape for %lld strings has %s", input->name, (long long)input->wanted,
             what);
    found = message;
  }
  count = 0;
  return found;
}
