"""Template of config.pbtxt for a classifier, as ``deploykit package`` writes it; its comments help a user edit it."""

from __future__ import annotations

from string import Template

from deploykit.runtime.triton_batching import batched

PAIR = """\
# The second text of the pair; TEXT is the first.
input { name: "TEXT_PAIR" data_type: TYPE_STRING dims: [ 1 ] }
"""

CLASSIFICATION = Template(
    """\
# Written by `deploykit package`. You may edit it: packaging again keeps it, and checks that it fits.
backend: "deploykit"
# Maximum rows in one request, and in one dynamic batch.
max_batch_size: $max_batch_size

# A text. The backend tokenizes the whole batch: Triton would not merge token tensors of unequal length.
input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }
$pair
output { name: "LABEL" data_type: TYPE_STRING dims: [ 1 ] }
# Probabilities, in the order of the parameter labels below.
output { name: "SCORES" data_type: TYPE_FP32 dims: [ $num_labels ] }
# Empty, or why this row alone has no answer (its LABEL is empty, its SCORES 0: JSON knows no NaN).
output { name: "ERROR" data_type: TYPE_STRING dims: [ 1 ] }
# Best first; as many as the request parameter top_k asks for. Computed only when requested.
output { name: "TOP_LABELS" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "TOP_SCORES" data_type: TYPE_FP32 dims: [ -1 ] }

"""
    + batched("rows", "Rows")
    + """\
# For clients, to interpret the scores.
parameters { key: "labels" value { string_value: '$labels' } }
parameters { key: "task" value { string_value: '$task' } }
"""
)
