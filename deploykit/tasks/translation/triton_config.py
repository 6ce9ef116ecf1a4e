"""Templates of config.pbtxt for a translator and its NAME_stream, as ``deploykit package`` writes them."""

from __future__ import annotations

from string import Template

TRANSLATION = Template("""\
# Written by `deploykit package`. You may edit it: packaging again keeps it, and checks that it fits.
backend: "deploykit"
# Maximum texts in one request.
max_batch_size: $max_batch_size

input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }

output { name: "TRANSLATION" data_type: TYPE_STRING dims: [ 1 ] }
# Sum of the tokens' log-probabilities / TARGET_TOKENS ^ length_penalty. Costs time: computed only when requested.
output { name: "SCORE" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "SOURCE_TOKENS" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "TARGET_TOKENS" data_type: TYPE_INT32 dims: [ 1 ] }
# "eos", or "length" if the length limit ended the translation.
output { name: "FINISH" data_type: TYPE_STRING dims: [ 1 ] }
# Empty, or the reason why this row has no answer (its other outputs are empty or 0).
output { name: "ERROR" data_type: TYPE_STRING dims: [ 1 ] }

# No dynamic_batching and no queue policy: each request is forwarded at once, and its texts join the running batch at
# the next step. max_queue below limits the number of waiting sentences.

# Each instance is a process with its own weights and its own running batch (on each GPU, if KIND_GPU): one is best.
instance_group [ { kind: $kind count: $instances } ]
# Triton loads only the newest version folder.
version_policy { latest { num_versions: 1 } }

# CPU threads per instance; 0: twice the CPUs, shared among the instances.
parameters { key: "threads" value { string_value: "$threads" } }
# Maximum rows (texts x beams) of one step, and memory of their keys and values in MiB; other rows wait.
# (TensorRT's profile limits both too, and allocates that memory at the start.)
parameters { key: "max_rows" value { string_value: "$max_rows" } }
parameters { key: "max_cache_mb" value { string_value: "$max_cache_mb" } }
# Maximum number of waiting sentences. Further requests get 503 at once, so that under overload not all answers are late.
parameters { key: "max_queue" value { string_value: "$max_queue_size" } }
# 1: texts join the running batch; 0: they wait until all of it is done (to measure the difference).
parameters { key: "in_flight" value { string_value: "$in_flight" } }
# Texts longer than the model accepts: "split" at sentence ends and join again, or "refuse".
parameters { key: "long_input" value { string_value: "$long_input" } }
# Translate each "sentence", each line ("paragraph"), or the whole text ("none") separately.
parameters { key: "split" value { string_value: "$split" } }
# For clients.
parameters { key: "task" value { string_value: '$task' } }
""")

STREAM = Template("""\
# Written by `deploykit package`. You may edit it: packaging again keeps it, and checks that it fits.
# Splits a document into sentences, sends them to the model below, and streams each translation when it is done.
backend: "deploykit"
# One document per request, many answers: ModelStreamInfer of gRPC, or /generate_stream of HTTP.
max_batch_size: 0
model_transaction_policy { decoupled: true }

input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }

# One sentence with the white space after it. The joined sentences of a document are its translation.
output { name: "TRANSLATION" data_type: TYPE_STRING dims: [ 1 ] }
# Number of the sentence, from 0, and whether it is the last one.
output { name: "INDEX" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "FINAL" data_type: TYPE_BOOL dims: [ 1 ] }
# The sentence's outputs of the model below.
output { name: "SCORE" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "SOURCE_TOKENS" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "TARGET_TOKENS" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "FINISH" data_type: TYPE_STRING dims: [ 1 ] }

# This model has no weights, and mostly waits for the other model.
instance_group [ { kind: KIND_CPU count: 1 } ]
# Triton loads only the newest version folder.
version_policy { latest { num_versions: 1 } }

# The model that translates.
parameters { key: "streams" value { string_value: "$streams" } }
# For clients.
parameters { key: "task" value { string_value: '$task' } }
""")
