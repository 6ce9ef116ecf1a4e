#pragma once

#include "triton.h"

// Note that a request is about to be submitted (1), or could not be (0), and whether this thread serves HTTP.
void note_submitted(void *request, int submitted, int on_http);

// Note that Triton cancels a request.
void note_cancelled(void *request);

// Whether a request was deleted here and not yet by Triton, which may still use its address.
int deleted_here(void *request);

// Note that Triton deletes a request. Returns 1 if it was deleted here before.
int note_deleted(void *request);

// Delete a request as Triton itself does, whatever is noted of it.
Error *delete_request(void *request);

// Delete what Triton has forgotten. To be called now and then.
void delete_forgotten(void);

// Note that this thread deletes an error, which may be NULL.
void note_error_deleted(void);
