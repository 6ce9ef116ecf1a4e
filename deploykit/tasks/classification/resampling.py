"""Metrics of a classifier as functions of the rows' weights, for bootstrap intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure, intervals
from deploykit.inspection.reliability import bins_of
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import classification_metrics, decided, ranks, ratio


def metrics_with_intervals(task: Classification, truth: NDArray[Any], scores: NDArray[np.float32]) -> dict[str, Any]:
    """Return ``classification_metrics`` with "intervals": metric -> low and high; of labels under "per_class.spam.f1"."""
    metrics = classification_metrics(task, truth, scores)
    return {**metrics, "intervals": intervals(measure_of(task, truth, scores), len(truth))}


def measure_of(task: Classification, truth: NDArray[Any], scores: NDArray[np.float32]) -> Measure:
    """Return the function from rows' weights to metrics; ``truth`` and ``scores`` as ``classification_metrics`` takes
    them."""
    return _numbers(truth[:, 0], scores[:, 0]) if task.regression else _labels(task, truth, scores)


def _labels(task: Classification, truth: NDArray[Any], scores: NDArray[np.float32]) -> Measure:
    answers, confidence, correct = decided(task, truth, scores)
    hits, given, actual = ((matrix).astype(float) for matrix in (answers & truth, answers, truth))
    exact = (answers == truth).all(axis=1).astype(float)
    # Of a multi-label row each label is an answer with a confidence.
    gaps = (correct.astype(float) - confidence).reshape(len(truth), -1)
    bins = bins_of(confidence).reshape(len(truth), -1)
    of_bins = np.stack([np.where(bins == b, gaps, 0.0).sum(axis=1) for b in np.unique(bins)], axis=1)

    def measure(weights: NDArray[np.float64]) -> dict[str, Any]:
        hit, answered, true, total = weights @ hits, weights @ given, weights @ actual, weights.sum(axis=-1)
        precision, recall, f1 = ratio(hit, answered), ratio(hit, true), ratio(2 * hit, answered + true)
        seen = answered + true > 0
        count = np.maximum(seen.sum(axis=-1), 1)
        return {
            "accuracy": weights @ exact / total,
            "macro_precision": precision.sum(axis=-1) / count,
            "macro_recall": recall.sum(axis=-1) / count,
            "macro_f1": f1.sum(axis=-1) / count,
            "micro_f1": ratio(2 * hit.sum(axis=-1), (answered + true).sum(axis=-1)),
            "expected_calibration_error": np.abs(weights @ of_bins).sum(axis=-1) / (total * gaps.shape[1]),
            **{f"per_class.{label}.f1": f1[..., i] for i, label in enumerate(task.labels)},
        }

    return measure


def _numbers(truth: NDArray[Any], answers: NDArray[Any]) -> Measure:
    truth, answers = truth.astype(np.float64), answers.astype(np.float64)
    errors = answers - truth

    def measure(weights: NDArray[np.float64]) -> dict[str, Any]:
        total = weights.sum(axis=-1)
        return {
            "mae": weights @ np.abs(errors) / total,
            "rmse": np.sqrt(weights @ np.square(errors) / total),
            "pearson": _correlation(weights, truth, answers),
            "spearman": _correlation(weights, ranks(truth), ranks(answers)),
        }

    return measure


def _correlation(weights: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> Any:
    total = weights.sum(axis=-1)
    mean_a, mean_b = weights @ a / total, weights @ b / total
    covariance = weights @ (a * b) / total - mean_a * mean_b
    spread = (weights @ (a * a) / total - mean_a**2) * (weights @ (b * b) / total - mean_b**2)
    return ratio(covariance, np.sqrt(np.maximum(spread, 0)))
