"""Measure the calibration of a classifier's probabilities, and fit the temperature that corrects it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.inspection.reliability import reliability
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import classification_metrics, decided

_LOG_RANGE = 3.0  # temperatures from 1/20 to 20
_STEPS = 60


def fit_temperature(task: Classification, truth: NDArray[Any], scores: NDArray[np.float32]) -> float:
    """Return the temperature that gives the right labels the highest likelihood (Guo et al., ICML 2017).

    ``scores`` are probabilities at the temperature of ``task``; the result replaces this temperature.
    """
    logs = _logits(task, scores)

    def loss(log_temperature: float) -> float:
        logits = logs / np.exp(log_temperature)
        if task.multi_label:
            return float(np.logaddexp(0, np.where(truth, -logits, logits)).mean())
        return float((np.logaddexp.reduce(logits, axis=1) - logits[truth]).mean())

    # Golden-section search: the loss has one minimum in the inverse temperature.
    low, high, golden = -_LOG_RANGE, _LOG_RANGE, (5**0.5 - 1) / 2
    for _ in range(_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return round(task.temperature * float(np.exp((low + high) / 2)), 4)


def _logits(task: Classification, scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return logits, float64 [rows, labels], that give the probabilities ``scores``."""
    exact = scores.astype(np.float64)
    logs: NDArray[np.float64] = np.log(np.clip(exact, 1e-12, 1.0))
    return logs - np.log(np.clip(1.0 - exact, 1e-12, 1.0)) if task.multi_label else logs


def rescaled(task: Classification, scores: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Return the probabilities for a temperature that is multiplied by ``factor``."""
    logs = _logits(task, scores) / factor
    if task.multi_label:
        return np.asarray(1 / (1 + np.exp(-logs)), np.float32)
    return np.asarray(np.exp(logs - np.logaddexp.reduce(logs, axis=1)[:, None]), np.float32)


def calibration(task: Classification, truth: NDArray[Any], scores: NDArray[np.float32]) -> dict[str, Any]:
    """Return the reliability, the calibration error, and the error with a fitted temperature.

    The temperature is fitted on each half of the rows for the other, so that ``error_after`` is not too low.
    """
    halves = np.arange(len(truth)) % 2
    after = np.empty_like(scores)
    if len(truth) > 1:
        for half in (0, 1):
            factor = fit_temperature(task, truth[halves == half], scores[halves == half]) / task.temperature
            after[halves != half] = rescaled(task, scores[halves != half], factor)
    else:
        after[:] = scores
    name = "expected_calibration_error"
    _, confidence, correct = decided(task, truth, scores)
    return {
        "reliability": reliability(confidence, correct),
        "error": classification_metrics(task, truth, scores)[name],
        "error_after": classification_metrics(task, truth, after)[name],
        "temperature": task.temperature,
        "fitted_temperature": fit_temperature(task, truth, scores),
    }
