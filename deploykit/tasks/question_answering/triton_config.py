"""Template of config.pbtxt for an answerer, as ``deploykit package`` writes it; its comments help a user edit it."""

from __future__ import annotations

from string import Template

from deploykit.runtime.triton_batching import batched

QUESTION_ANSWERING = Template(
    """\
# Written by `deploykit package`. You may edit it: packaging again keeps it, and checks that it fits.
backend: "deploykit"
# Maximum questions in one request, and in one dynamic batch.
max_batch_size: $max_batch_size

input { name: "QUESTION" data_type: TYPE_STRING dims: [ 1 ] }
# Empty (not in a request's first question): the context of the previous question.
input { name: "CONTEXT" data_type: TYPE_STRING dims: [ 1 ] }

# Empty if the context has no answer.
output { name: "ANSWER" data_type: TYPE_STRING dims: [ 1 ] }
# Begin and end of the answer in CONTEXT, in code points; both 0 without an answer.
output { name: "START" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "END" data_type: TYPE_INT32 dims: [ 1 ] }
# The answer's share of the probability of all candidates.
output { name: "SCORE" data_type: TYPE_FP32 dims: [ 1 ] }
# Log-odds of no answer against the best one.
output { name: "NONE" data_type: TYPE_FP32 dims: [ 1 ] }
# Empty, or the reason why this question was refused.
output { name: "ERROR" data_type: TYPE_STRING dims: [ 1 ] }
# Best answers first, as many as the request parameter top_k says, then empty ones.
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
