// Triton 2.51 reads the header "traceparent" of gRPC up to the first zero byte, but gRPC puts none behind it. Often other bytes follow, and
// then the header is too long, and the request does not join its caller's trace. So here a text that begins with a whole
// traceparent is as long as a traceparent. W3C Trace Context: version 00 ends there.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

#include "triton.h"

static const char FORM[] = "00-hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh-hhhhhhhhhhhhhhhh-hh";  // h: a hexadecimal digit

enum { LENGTH = sizeof FORM - 1 };

static int is_traceparent(const char *text) {
  for (int i = 0; i < LENGTH; i++) {
    int fits = FORM[i] == 'h' ? (text[i] >= '0' && text[i] <= '9') || (text[i] >= 'a' && text[i] <= 'f') : text[i] == FORM[i];
    if (!fits) return 0;
  }
  return 1;
}

EXPORTED size_t strlen(const char *text) {
  static size_t (*next)(const char *);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, __func__);
  size_t length = next(text);
  return length > LENGTH && is_traceparent(text) ? LENGTH : length;
}
