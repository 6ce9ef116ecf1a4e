"""Hold the part of config.pbtxt that all models share whose requests Triton puts into batches."""

from __future__ import annotations

_BATCHED = """\
dynamic_batching {
  # Of more ROWS that wait, so many are one batch, and the rest another instance's; none: all up to max_batch_size.
  preferred_batch_size: [$preferred_batch_size]
  # Requests that wait while a batch runs form the next one; a delay would only cost a lone client that time.
  max_queue_delay_microseconds: $max_queue_delay_us
  default_queue_policy {
    # Under overload answer 503 at once, rather than everyone late: clients can back off.
    max_queue_size: $max_queue_size
    # Whoever waited this long has given up; 0 waits for ever.
    default_timeout_microseconds: $queue_timeout_us
    timeout_action: REJECT
  }
}

# Each instance is a process with its own copy of the weights (on each GPU, if KIND_GPU). At least two: with one, a queue policy
# makes Triton 2.51 miss wake-ups, and some answers then wait for its 500 ms timer (measured).
instance_group [ { kind: $kind count: $instances } ]
# The newest version folder alone is loaded.
version_policy { latest { num_versions: 1 } }

# CPU threads per instance; 0: twice the CPUs, shared among the instances.
parameters { key: "threads" value { string_value: "$threads" } }
# RUN x padded length of one run of the engine; 0: what suits it.
parameters { key: "token_budget" value { string_value: "$token_budget" } }
"""


def batched(rows: str, run: str) -> str:
    """Return the part as a template: queue, instances, versions, threads and token budget.

    ``rows`` names what a request holds, and ``run`` what an engine runs at once: "questions", "Windows".
    """
    return _BATCHED.replace("ROWS", rows).replace("RUN", run)
