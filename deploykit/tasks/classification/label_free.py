"""Measure without labels what a form of a classifier loses against fp32. Few rows suffice, because a change
counts only as far as fp32 clearly prefers its own answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.tasks.classification.facts import Classification

Scores = NDArray[np.float32]


def measure_name(task: Classification) -> str:
    """Return the name of the measure for messages."""
    if task.regression:
        return "disagreement with fp32's numbers (100 minus 100 times their concordance correlation)"
    kind = "labels" if task.multi_label else "answers"
    return f"{kind} that differ from fp32's, weighed by fp32's margin"


def lost_points(task: Classification, expected: Scores, scores: Scores) -> float:
    """Return the points that ``scores`` lose against fp32's, ``expected``, both [rows, labels]."""
    if task.regression:
        return lost_by_disagreement(expected[:, 0], scores[:, 0])
    if task.multi_label:
        return lost_labels(expected, scores, task.threshold)
    return lost_by_margin(expected, scores)


def lost_by_margin(expected: Scores, scores: Scores) -> float:
    """Return the points of accuracy that ``scores`` are expected to lose if the true label has fp32's probability, ``expected``.

    A changed answer costs as much as fp32 prefers its own: near nothing if both are as likely, one row if it was sure.
    """
    rows = np.arange(len(expected))
    lost = expected.max(axis=1) - expected[rows, scores.argmax(axis=1)]
    lost = np.where(np.isfinite(scores).all(axis=1), lost, expected.max(axis=1))
    return 100 * float(lost.mean())


def lost_labels(expected: Scores, scores: Scores, threshold: float) -> float:
    """Return the points of micro-F1 that a multi-label model is expected to lose against fp32.

    It is 1 - F1 of its labels, with fp32's as the truth: each wrong or missing label counts as much as fp32 prefers its own decision.
    That is the difference of both decisions' probabilities, from odds that are 1 at the ``threshold``. A row without numbers has every
    label wrong. It is not macro-F1, because a rare label has too few rows here too.
    """
    ours, theirs = expected >= threshold, scores >= threshold
    theirs = np.where(np.isfinite(scores).all(axis=1, keepdims=True), theirs, ~ours)
    yes = expected.astype(np.float64) * (1 - threshold)
    no = (1 - expected.astype(np.float64)) * threshold
    margin = np.abs(yes - no) / np.maximum(yes + no, np.finfo(np.float64).tiny)
    given = int(ours.sum() + theirs.sum())
    return 100 * float(margin[ours != theirs].sum()) / max(given, 1)


def lost_by_disagreement(expected: NDArray[Any], numbers: NDArray[Any]) -> float:
    """Return 100 times (1 - the concordance correlation coefficient) of a regression's ``numbers`` and fp32's; NaN if one of
    ``numbers`` is NaN or infinite.

    Noise costs what it takes from the correlation of both. An offset and another scale, which a correlation does not show, cost too
    (Lin, "A concordance correlation coefficient to evaluate reproducibility", 1989).
    """
    a, b = expected.astype(np.float64), numbers.astype(np.float64)
    if not np.isfinite(b).all():
        return float("nan")
    apart = float(np.square(a - b).mean())
    spread = float(a.var() + b.var() + (a.mean() - b.mean()) ** 2)
    return 100 * apart / spread if spread else 0.0
