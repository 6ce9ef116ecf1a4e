#pragma once

#include "triton.h"

// Note that a request is about to be submitted (1), or could not be (0).
void note_submitted(void *request, int submitted);

// Note that Triton deletes a request, or makes one at an address. Returns 1 if it was deleted here before.
int note_deleted(void *request);

// Delete what Triton has forgotten; `now` in seconds. Call it now and then once `note_cancelled` has returned 1.
void delete_forgotten(int64_t now);
int note_cancelled(void *request, int64_t now);
