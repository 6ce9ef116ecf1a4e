// The parts of triton/core/tritonserver.h and zlib.h that the guard needs; their interfaces are stable.

#pragma once

#include <stdint.h>

#define EXPORTED __attribute__((visibility("default")))

typedef struct Error Error;

enum { INTERNAL = 1, NOT_FOUND = 2, INVALID_ARGUMENT = 3, UNAVAILABLE = 4 };  // TRITONSERVER_Error_Code

Error *TRITONSERVER_InferenceRequestAddInput(void *request, const char *name, int datatype, const int64_t *shape,
                                             uint64_t dimensions);
int TRITONSERVER_ErrorCode(Error *error);
const char *TRITONSERVER_ErrorMessage(Error *error);

enum { NEED_DICT = 2, STREAM_ERROR = -2, BUF_ERROR = -5 };  // Z_NEED_DICT and so on

typedef struct {  // the beginning of z_stream
  const unsigned char *next_in;
  unsigned int avail_in;
  unsigned long total_in;
  unsigned char *next_out;
  unsigned int avail_out;
  unsigned long total_out;
} ZStream;

int inflate(ZStream *stream, int flush);
