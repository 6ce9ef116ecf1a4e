#pragma once

#include "triton.h"

// Record that a request is about to be submitted (1), or could not be (0), and whether this thread serves HTTP.
void note_submitted(void *request, int submitted, int on_http);

// Record that Triton cancels a request.
void note_cancelled(void *request);

// Return whether this library has deleted a request, but Triton has not, so that it may still use the address.
int deleted_here(void *request);

// Record that Triton deletes a request. Returns 1 if this library has already deleted it.
int note_deleted(void *request);

// Delete a request as Triton itself does, regardless of its record.
Error *delete_request(void *request);

// Delete requests that Triton has forgotten. To be called periodically.
void delete_forgotten(void);

// Record that this thread deletes an error, which may be NULL.
void note_error_deleted(void);
