"""Template of config.pbtxt for a token classifier, as ``deploykit package`` writes it."""

from __future__ import annotations

from string import Template

TOKEN_CLASSIFICATION = Template("""\
# Written by `deploykit package`. You may edit it: packaging again keeps it, and checks that it fits.
backend: "deploykit"
# Maximum rows in one request, and in one dynamic batch.
max_batch_size: $max_batch_size

# A text, whose words are separated by white space.
input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }

# A label for each word, separated by spaces.
output { name: "LABELS" data_type: TYPE_STRING dims: [ 1 ] }
# Empty, or why this row alone has no answer.
output { name: "ERROR" data_type: TYPE_STRING dims: [ 1 ] }

dynamic_batching {
  preferred_batch_size: [$preferred_batch_size]
  max_queue_delay_microseconds: $max_queue_delay_us
  default_queue_policy {
    max_queue_size: $max_queue_size
    default_timeout_microseconds: $queue_timeout_us
    timeout_action: REJECT
  }
}

instance_group [ { kind: $kind count: $instances } ]
version_policy { latest { num_versions: 1 } }

# CPU threads per instance; 0: twice the CPUs, shared among the instances.
parameters { key: "threads" value { string_value: "$threads" } }
# Rows x padded length of one run of the engine; 0: what suits it.
parameters { key: "token_budget" value { string_value: "$token_budget" } }
# For clients, to make sense of the labels.
parameters { key: "task" value { string_value: '$task' } }
""")
