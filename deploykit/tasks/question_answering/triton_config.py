"""Hold config.pbtxt of an answerer, as ``deploykit package`` writes it: the comments are for whoever edits it."""

from __future__ import annotations

from string import Template

QUESTION_ANSWERING = Template("""\
# Written by `deploykit package`. Yours to edit: packaging again keeps it and checks that it fits.
backend: "deploykit"
# Most questions in one request, and in one dynamic batch.
max_batch_size: $max_batch_size

input { name: "QUESTION" data_type: TYPE_STRING dims: [ 1 ] }
# Empty after the first question of a request: the context of the question before.
input { name: "CONTEXT" data_type: TYPE_STRING dims: [ 1 ] }

# Empty where the context holds no answer.
output { name: "ANSWER" data_type: TYPE_STRING dims: [ 1 ] }
# Where the answer begins and ends in CONTEXT, in code points; both 0 where there is none.
output { name: "START" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "END" data_type: TYPE_INT32 dims: [ 1 ] }
# The answer's share of the probability of all that were considered.
output { name: "SCORE" data_type: TYPE_FP32 dims: [ 1 ] }
# Log-odds of no answer against the best one.
output { name: "NONE" data_type: TYPE_FP32 dims: [ 1 ] }
# Empty, or why this question alone could not be asked.
output { name: "ERROR" data_type: TYPE_STRING dims: [ 1 ] }
# Best first; as many as the request parameter top_k asks for, then empty ones.
output { name: "TOP_ANSWERS" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "TOP_STARTS" data_type: TYPE_INT32 dims: [ -1 ] }
output { name: "TOP_ENDS" data_type: TYPE_INT32 dims: [ -1 ] }
output { name: "TOP_SCORES" data_type: TYPE_FP32 dims: [ -1 ] }

dynamic_batching {
  # Of more questions that wait, so many are one batch, and the rest another instance's; none: all up to max_batch_size.
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
# Windows x padded length of one run of the engine; 0: what suits it.
parameters { key: "token_budget" value { string_value: "$token_budget" } }
parameters { key: "task" value { string_value: '$task' } }
""")
