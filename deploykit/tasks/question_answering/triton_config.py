"""Hold config.pbtxt of an answerer, as ``deploykit package`` writes it: the comments are for whoever edits it."""

from __future__ import annotations

from string import Template

from deploykit.runtime.triton_batching import batched

QUESTION_ANSWERING = Template(
    """\
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

"""
    + batched("questions", "Windows")
    + """\
parameters { key: "task" value { string_value: '$task' } }
"""
)
