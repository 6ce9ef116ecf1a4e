#pragma once

#include "triton.h"

// A request begins in this thread; it has an input of `wanted` strings.
void begin_strings(void);
void expect_strings(const char *name, int64_t wanted);

// Return the error in the strings of this thread's request, which ends; NULL if there is none.
const char *incomplete_strings(void);
