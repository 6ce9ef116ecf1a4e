"""Compute the metrics of labels from probabilities with numpy only, so that a serving machine can check its accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.inspection.reliability import calibration_error
from deploykit.tasks.classification.facts import Classification


def classification_metrics(task: Classification, truth: NDArray[Any], scores: NDArray[np.float32]) -> dict[str, Any]:
    """Return metrics with stable keys, as fractions of 1; of a regression, those of ``regression_metrics``.

    Args:
        truth: [rows, labels]; one true a row unless the task is multi-label. Of a regression, numbers.
        scores: probabilities [rows, labels], or numbers.

    Keys: accuracy (multi-label: rows answered exactly), macro_precision, macro_recall, macro_f1,
    micro_f1, per_class (label -> precision, recall, f1, support), confusion_matrix (rows truth,
    columns answer; multi-label: label -> [[tn, fp], [fn, tp]]), expected_calibration_error (15 equal
    bins; Naeini et al., AAAI 2015). A ratio with nothing in its denominator is 0, as in
    scikit-learn. The macro averages run over the labels that occur in truth or answers.
    """
    if task.regression:
        return regression_metrics(truth[:, 0].astype(np.float64), scores[:, 0].astype(np.float64))
    answers, confidence, correct = decided(task, truth, scores)
    hits, answered, actual = (answers & truth).sum(axis=0), answers.sum(axis=0), truth.sum(axis=0)
    precision, recall = ratio(hits, answered), ratio(hits, actual)
    f1 = ratio(2 * hits, answered + actual)
    seen = (answered + actual) > 0
    return {
        "accuracy": float((answers == truth).all(axis=1).mean()),
        "macro_precision": float(precision[seen].mean()),
        "macro_recall": float(recall[seen].mean()),
        "macro_f1": float(f1[seen].mean()),
        "micro_f1": float(ratio(2 * hits.sum(), answered.sum() + actual.sum())),
        "expected_calibration_error": calibration_error(confidence, correct),
        "per_class": {
            label: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(actual[i]),
            }
            for i, label in enumerate(task.labels)
        },
        "confusion_matrix": _confusion(task, truth, answers),
    }


def decided(
    task: Classification, truth: NDArray[np.bool_], scores: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.bool_]]:
    """Return the answers [rows, labels], and the confidence and correctness of each: [rows], multi-label [rows x labels]."""
    if task.multi_label:
        answers = scores >= task.threshold
        return answers, np.maximum(scores, 1 - scores).ravel(), (answers == truth).ravel()
    answers = np.zeros_like(truth)
    answers[np.arange(len(scores)), scores.argmax(axis=1)] = True
    return answers, scores.max(axis=1), (answers & truth).any(axis=1)


def regression_metrics(truth: NDArray[np.float64], answers: NDArray[np.float64]) -> dict[str, Any]:
    """Return mae and rmse in the unit of the numbers, and pearson and spearman, from -1 to 1, of float64 [rows] each.

    Equal numbers share their ranks' mean. A correlation with a constant is 0.
    """
    errors = answers - truth
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "pearson": _correlation(truth, answers),
        "spearman": _correlation(ranks(truth), ranks(answers)),
    }


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / size) if size else 0.0


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks of values from 1; equal ones share their ranks' mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: NDArray[np.float64] = ends - (counts - 1) / 2.0
    return middle[group]


def _confusion(task: Classification, truth: NDArray[np.bool_], answers: NDArray[np.bool_]) -> Any:
    if not task.multi_label:
        return (truth.astype(int).T @ answers.astype(int)).tolist()
    return {
        label: [
            [int((~t & ~a).sum()), int((~t & a).sum())],
            [int((t & ~a).sum()), int((t & a).sum())],
        ]
        for label, t, a in zip(task.labels, truth.T, answers.T)
    }


def ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    """Divide; a quotient with denominator 0 is 0."""
    return np.divide(
        numerator, denominator, out=np.zeros(np.shape(numerator), np.float64), where=np.asarray(denominator) > 0
    )
