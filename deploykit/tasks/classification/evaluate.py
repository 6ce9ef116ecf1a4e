"""Measure a classifier on labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.data.texts import read_texts, unanswered
from deploykit.errors import DataError
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.pairs import read_pairs
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.classification.rows import Columns, Example, check_labels, check_numbers, load_examples, usable
from deploykit.tasks.protocol import Evaluation, Grade

_CHUNK = 1024
_GRADED = 256


@dataclass(frozen=True)
class LabelledRows:
    """Rows to measure on: as they are, duplicates included. ``skipped`` rows had no text or no label."""

    examples: list[Example]
    skipped: int


def labelled_rows(
    source: str,
    task: Classification,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    encoding: str | None = None,
    split: str = "test",
) -> LabelledRows:
    """Read rows whose labels the model knows.

    Columns not given are those that the model was trained on where the source has them, and
    otherwise detected. Raises DataError for a label never seen in training, or no usable row.
    """
    raw, _ = load_examples(
        source,
        text_columns=text_columns,
        label_column=label_column,
        prefer=Columns(task.text_columns, task.label_column),
        separator=task.text_separator,
        pair=task.pair,
        multi_label=task.multi_label,
        labels=task.labels,
        label_separator=task.label_separator,
        encoding=encoding,
        split=split,
    )
    examples = [
        example
        for row in raw
        if row.text is not None
        and row.label is not None
        and (row.label or task.multi_label)
        and (example := usable(row, row.label)) is not None
    ]
    if not examples:
        raise DataError(f"{source}: no row has both a text and a label", "give a file of labelled rows")
    if task.regression:
        check_numbers(examples, source)
    else:
        check_labels(examples, task.labels, source, multi_label=task.multi_label)
    return LabelledRows(examples, len(raw) - len(examples))


def evaluate(
    predictor: TextClassifier, rows: LabelledRows, *, progress: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Answer every row and compare. ``progress`` is called with (rows done, rows in all)."""
    examples = rows.examples
    scores = []
    for start in range(0, len(examples), _CHUNK):
        scores.append(predictor.scores([e.asked for e in examples[start : start + _CHUNK]]))
        progress(min(start + _CHUNK, len(examples)), len(examples))
    truth = predictor.task.targets([e.label for e in examples])
    metrics = classification_metrics(predictor.task, truth, np.concatenate(scores))
    return Evaluation(metrics, len(examples), rows.skipped)


def grade(predictor: TextClassifier, texts: Sequence[str], labels: Sequence[str]) -> Grade:
    """Classify every text and compare. Raises DataError for a label that the model does not have."""
    task = predictor.task
    try:
        truth = task.targets(labels)
    except ValueError as error:
        raise DataError(f"a label is no number, and the model gives numbers: {error}", "correct the data") from None
    except KeyError as error:
        raise DataError(
            f"the data have the label {error}, which the model does not",
            f"correct the data; the model has: {', '.join(task.labels)}",
        ) from None
    scores: NDArray[np.float32] = np.concatenate(
        [predictor.scores(texts[i : i + _GRADED]) for i in range(0, len(texts), _GRADED)]
    )
    return Grade(task.labels, tuple(task.decide(scores)), classification_metrics(task, truth, scores))


def texts_and_labels(
    source: str, task: Classification, text_columns: Sequence[str], label_column: str | None, encoding: str | None
) -> list[tuple[str, str | None]]:
    """Read texts, and their labels where the source has them."""
    try:
        rows = labelled_rows(source, task, text_columns=text_columns, label_column=label_column, encoding=encoding)
        return [(e.asked, e.label) for e in rows.examples]
    except DataError as no_labels:
        if label_column is not None:
            raise
        if task.pair:
            texts = read_pairs(source, text_columns, encoding)
        else:
            texts = read_texts(source, text_columns or None, task.text_separator, encoding=encoding)
        return unanswered([row.text for row in texts], no_labels)
