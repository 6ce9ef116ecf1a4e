"""Template of the part of config.pbtxt for models that use Triton's dynamic batching."""

from __future__ import annotations

_BATCHED = """\
dynamic_batching {
  # Batch this many waiting ROWS, and leave other rows to another instance; none: all up to max_batch_size.
  preferred_batch_size: [$preferred_batch_size]
  # Requests that arrive while a batch runs form the next one; a delay would only slow a single client down.
  max_queue_delay_microseconds: $max_queue_delay_us
  default_queue_policy {
    # Further requests get 503 at once, so that clients can back off.
    max_queue_size: $max_queue_size
    # Requests that wait longer are rejected: their clients have given up. 0: no limit.
    default_timeout_microseconds: $queue_timeout_us
    timeout_action: REJECT
  }
}

# Each instance is a process with its own weights (on each GPU, if KIND_GPU). Use at least two: with one, a queue policy
# makes Triton 2.51 miss wake-ups, and some answers then wait for its 500 ms timer (measured).
instance_group [ { kind: $kind count: $instances } ]
# Triton loads only the newest version folder.
version_policy { latest { num_versions: 1 } }

# CPU threads per instance; 0: twice the CPUs, shared among the instances.
parameters { key: "threads" value { string_value: "$threads" } }
# Maximum RUN x padded length of one run of the engine; 0: the engine's default.
parameters { key: "token_budget" value { string_value: "$token_budget" } }
"""


def batched(rows: str, run: str) -> str:
    """Return the template: queue, instances, versions, threads and token budget.

    ``rows`` and ``run`` name the items of a request and of a run of the engine in comments: "questions", "Windows".
    """
    return _BATCHED.replace("ROWS", rows).replace("RUN", run)
