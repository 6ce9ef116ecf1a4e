"""Template of config.pbtxt for a language model, as ``deploykit package`` writes it."""

from __future__ import annotations

from string import Template

TEXT_GENERATION = Template("""\
# Written by `deploykit package`. You may edit it: packaging again keeps it, and checks that it fits.
backend: "deploykit"
# One prompt per request, and one answer or many pieces of it: ModelStreamInfer of gRPC, or /generate and /generate_stream
# of HTTP. Names are those of Triton's vLLM backend.
max_batch_size: 0
model_transaction_policy { decoupled: true }

# A text to continue, its token ids, or the messages of a dialog, as JSON: a list, or an object with messages and tools.
input { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] optional: true }
input { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] optional: true }
input { name: "messages" data_type: TYPE_STRING dims: [ 1 ] optional: true }
# Send the answer piece by piece.
input { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
# A JSON object: max_new_tokens, temperature, ...
input { name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }
# Without it, an answer that is not streamed begins with the text of text_input or input_ids.
input { name: "exclude_input_in_output" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
input { name: "return_finish_reason" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
input { name: "return_cumulative_logprob" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
input { name: "return_logprobs" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
input { name: "return_num_input_tokens" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
input { name: "return_num_output_tokens" data_type: TYPE_BOOL dims: [ 1 ] optional: true }

# One text for each of n answers; while streaming, the new part of each.
output { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] }
# "stop", "length", or empty while the answer continues.
output { name: "finish_reason" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "cumulative_logprob" data_type: TYPE_FP32 dims: [ -1 ] }
# JSON: a list with an object for each new token.
output { name: "logprobs" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "num_input_tokens" data_type: TYPE_UINT32 dims: [ 1 ] }
output { name: "num_output_tokens" data_type: TYPE_UINT32 dims: [ -1 ] }

# No dynamic_batching and no queue policy: each request is forwarded at once, and joins the running batch at the next
# step. max_queue below limits the number of waiting requests.

# Each instance is a process with its own weights and its own running batch: one is best.
instance_group [ { kind: $kind count: $instances } ]
# Triton loads only the newest version folder.
version_policy { latest { num_versions: 1 } }

# CPU threads per instance; 0: the CPUs, shared among the instances.
parameters { key: "threads" value { string_value: "$threads" } }
# Maximum number of answers that are decoded at once, and memory of their keys and values in MiB; others wait.
parameters { key: "max_rows" value { string_value: "$max_rows" } }
parameters { key: "max_cache_mb" value { string_value: "$max_cache_mb" } }
# Maximum number of waiting prompts. Further requests get UNAVAILABLE (503) at once.
parameters { key: "max_queue" value { string_value: "$max_queue_size" } }
# For clients.
parameters { key: "task" value { string_value: '$task' } }
""")
