"""Compare the next token's distribution with that of fp32: the measure without labels for models that write texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEASURE = "KL divergence of the next token from fp32 (times 100)"
"""Its name in messages."""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logarithms of the probabilities, over the last axis; NaN where the highest logit is infinite or NaN."""
    with np.errstate(invalid="ignore"):  # infinity becomes NaN
        shifted = (logits - logits.max(-1, keepdims=True)).astype(np.float64)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
