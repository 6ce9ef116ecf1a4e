"""Analyse a classifier's errors: slices, calibration, labels, words, flips and drift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.data.reading import Reading
from deploykit.errors import DataError
from deploykit.inspection.drift import drift
from deploykit.inspection.rows import new_texts, read_columns
from deploykit.tasks.answer_each import answer_each
from deploykit.tasks.classification.augment import robustness
from deploykit.tasks.classification.evaluate import answer_rows, evaluation, labelled_rows
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.inspection.confidence import calibration
from deploykit.tasks.classification.inspection.flips import ENGLISH, count_flips, read_swaps
from deploykit.tasks.classification.inspection.groups import group_gaps
from deploykit.tasks.classification.inspection.label_errors import likely_label_errors, tied_words
from deploykit.tasks.classification.inspection.slices import sliced_metrics
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.protocol import Evaluation, Progress
from deploykit.tasks.registry import get_task
from deploykit.tasks.types import ReportOptions

_CHUNK = 1024


def report(
    predictor: TextClassifier,
    source: str,
    *,
    split: str,
    reading: Reading,
    columns: Mapping[str, Any],
    options: ReportOptions,
    progress: Progress,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure, and return the analysis of the metrics.

    Keys: labels, metrics, rows, slices, robustness, and of labels also calibration, label_errors, tied_words, flips, groups; with
    ``options.against`` drift. Raises DataError for a column to slice by that the rows do not have.
    """
    task = predictor.task
    swaps = ENGLISH if options.swaps is None else read_swaps(options.swaps)
    rows = labelled_rows(
        source, task, text_columns=columns.get("text_column") or (), label_columns=columns.get("label_column") or (),
        reading=reading, split=split,
    )  # fmt: skip
    reading.stop_at(rows.problems)
    values_of = read_columns(
        source, options.slices, reading=reading, split=split
    )  # so that errors in the options show before the work
    answered = answer_rows(predictor, rows, progress)
    found = evaluation(task, rows, answered)
    examples, truth, scores = answered.examples, answered.truth, answered.scores
    values = values_of([e.origin for e in examples])
    record: dict[str, Any] = {
        "labels": list(task.labels),
        "metrics": found.metrics,
        "rows": found.rows,
        "slices": sliced_metrics(task, examples, truth, scores, values, options.seen),
        "robustness": robustness(predictor, examples, truth, scores),
    }
    if not task.regression:
        record["calibration"] = calibration(task, truth, scores)
        record["tied_words"] = tied_words(task, examples)
        record["flips"] = count_flips(predictor, examples, task.decide(scores), swaps)
        record["groups"] = group_gaps(task, truth, scores, values)
        if not task.multi_label:
            record["label_errors"] = likely_label_errors(task, examples, truth, scores)
    if options.against is not None:
        texts, new_scores = _new_rows(predictor, options.against, reading, columns)
        record["drift"] = drift([e.asked for e in examples], texts, drift_properties(task, scores, new_scores))
    return found, record


def drift_properties(task: Classification, scores: NDArray[Any], new: NDArray[Any]) -> dict[str, tuple[Any, Any]]:
    """Return the confidence, and the probability of each label or the number, of measured and new rows."""
    found = {} if task.regression else {"confidence": (scores.max(axis=1), new.max(axis=1))}
    for i, label in enumerate(task.labels):
        found[label if task.regression else f"probability of {label}"] = (scores[:, i], new[:, i])
    return found


def _new_rows(
    predictor: TextClassifier, source: str, reading: Reading, columns: Mapping[str, Any]
) -> tuple[list[str], NDArray[np.float32]]:
    texts = new_texts(get_task(predictor.task.name), predictor.task, source, reading=reading, columns=columns)
    kept, scores = [], []
    for start in range(0, len(texts), _CHUNK):
        part = texts[start : start + _CHUNK]
        for text, found in zip(part, answer_each(predictor.scores, part)):
            if isinstance(found, np.ndarray):
                kept.append(text)
                scores.append(found)
    if not kept:
        raise DataError(f"{source}: has no text that the model answers", "give --against new rows with texts")
    return kept, np.array(scores, np.float32)
