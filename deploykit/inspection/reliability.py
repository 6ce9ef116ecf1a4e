"""Measure how often answers of each confidence are right.

scikit-learn's calibration_curve has no error of calibration and no interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import intervals

BINS = 15


def bins_of(confidence: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of the equal bin, of 15, that each confidence from 0 to 1 falls in."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def calibration_error(confidence: NDArray[Any], correct: NDArray[Any]) -> float:
    """Return the expected calibration error (Naeini et al., AAAI 2015)."""
    bins = bins_of(confidence)
    error = 0.0
    for b in range(BINS):
        inside = bins == b
        if inside.any():
            error += float(inside.mean() * abs(correct[inside].mean() - confidence[inside].mean()))
    return error


def reliability(confidence: NDArray[Any], correct: NDArray[Any]) -> list[dict[str, Any]]:
    """Return for each bin that has rows ``confidence``, ``accuracy`` and ``rows``."""
    bins = bins_of(confidence)
    return [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(correct[bins == b].mean()),
            "rows": int((bins == b).sum()),
        }
        for b in range(BINS)
        if (bins == b).any()
    ]


def calibration(confidence: NDArray[Any], correct: NDArray[Any]) -> dict[str, Any]:
    """Return ``reliability`` and the ``error``, with its bootstrap 95 % ``interval``."""
    bins = bins_of(confidence)
    gaps = correct.astype(float) - confidence
    of_bins = np.stack([np.where(bins == b, gaps, 0.0) for b in np.unique(bins)], axis=1)
    found = intervals(lambda w: {"error": np.abs(w @ of_bins).sum(axis=-1) / w.sum(axis=-1)}, len(gaps))
    return {
        "reliability": reliability(confidence, correct),
        "error": calibration_error(confidence, correct),
        "interval": found["error"],
    }
