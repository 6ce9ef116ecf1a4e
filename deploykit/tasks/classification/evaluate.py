"""Measure a classifier on labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.texts import read_texts, unanswered
from deploykit.errors import DataError
from deploykit.tasks.answer_each import answer_each
from deploykit.tasks.classification.clean import join_label_rows
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.pairs import check_columns, read_pairs
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.classification.resampling import measure_of, metrics_with_intervals
from deploykit.tasks.classification.rows import Columns, Example, as_example, check_labels, check_numbers, load_examples
from deploykit.tasks.protocol import Evaluation, Grade

_CHUNK = 1024
_GRADED = 256


@dataclass(frozen=True)
class LabelledRows:
    """Rows to measure on: as they are, duplicates included. ``problems`` and ``notes`` as in ``Evaluation``."""

    examples: list[Example]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def labelled_rows(
    source: str,
    task: Classification,
    *,
    text_columns: Sequence[str] = (),
    label_columns: Sequence[str] = (),
    reading: Reading = AS_FOUND,
    split: str = "test",
) -> LabelledRows:
    """Read rows whose labels the model knows.

    Columns not given are those that the model was trained on where the source has them, and
    otherwise detected. Raises DataError for a label never seen in training, or no usable row.
    """
    check_columns(task, text_columns)
    raw, _ = load_examples(
        source,
        text_columns=text_columns,
        label_columns=label_columns,
        prefer=Columns(task.text_columns, task.label_columns),
        separator=task.text_separator,
        pair=task.pair,
        multi_label=task.multi_label,
        labels=task.labels,
        known=None if task.regression else task.labels,
        label_separator=task.label_separator,
        reading=reading,
        split=split,
    )
    examples, problems = [], []
    for row in raw:
        if row.text is None:
            problems.append(f"{row.origin}: {row.problem or 'the text is missing'}")
        elif row.label is None or not (row.label or task.multi_label):
            problems.append(f"{row.origin}: the label is missing")
        else:
            examples.append(as_example(row, row.label))
    if not examples:
        raise DataError(f"{source}: no row has both a text and a label", "give a file of labelled rows")
    if task.regression:
        check_numbers(examples, source)
    else:
        check_labels(examples, task.labels, source, multi_label=task.multi_label)
    notes: tuple[str, ...] = ()
    if task.multi_label and len(joined := join_label_rows(examples)) < len(examples):
        notes = (f"{len(examples):,} rows with a label each are {len(joined):,} texts with all their labels",)
        examples = joined
    return LabelledRows(examples, tuple(problems), notes)


@dataclass(frozen=True)
class AnsweredRows:
    """Rows that the model answered, with their ``truth`` (``Classification.targets``) and ``scores``, float32
    [rows, labels]; and a line for each row that it ``refused``."""

    examples: list[Example]
    truth: NDArray[Any]
    scores: NDArray[np.float32]
    refused: tuple[str, ...]


def evaluate(
    predictor: TextClassifier, rows: LabelledRows, *, progress: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Answer every row and compare. ``progress`` is called with (rows done, rows in all).

    Raises DataError when the model refuses every text.
    """
    return evaluation(predictor.task, rows, answer_rows(predictor, rows, progress))


def evaluation(task: Classification, rows: LabelledRows, answered: AnsweredRows) -> Evaluation:
    """Return the metrics of answered rows."""
    metrics = metrics_with_intervals(task, answered.truth, answered.scores)
    measure = measure_of(task, answered.truth, answered.scores)
    return Evaluation(metrics, len(answered.examples), (*rows.problems, *answered.refused), rows.notes, measure)


def answer_rows(
    predictor: TextClassifier, rows: LabelledRows, progress: Callable[[int, int], None] = lambda done, of: None
) -> AnsweredRows:
    """Answer every row. Raises DataError when the model refuses every text."""
    answered, scores, refused = [], [], []
    for start in range(0, len(rows.examples), _CHUNK):
        part = rows.examples[start : start + _CHUNK]
        for example, found in zip(part, answer_each(predictor.scores, [e.asked for e in part])):
            if isinstance(found, np.ndarray):
                answered.append(example)
                scores.append(found)
            else:
                refused.append(f"{example.origin}: {found.message}")
        progress(min(start + _CHUNK, len(rows.examples)), len(rows.examples))
    if not answered:
        raise DataError(refused[0], "give other texts")
    truth = predictor.task.targets([e.label for e in answered])
    return AnsweredRows(answered, truth, np.array(scores, np.float32), tuple(refused))


def grade(predictor: TextClassifier, texts: Sequence[str], labels: Sequence[str]) -> Grade:
    """Classify every text and compare. Raises DataError for a label that the model does not have."""
    task = predictor.task
    try:
        truth = task.targets(labels)
    except ValueError as error:
        raise DataError(
            f"a label is not a number, but the model predicts numbers: {error}", "correct the data"
        ) from None
    except KeyError as error:
        raise DataError(
            f"the data have the label {error}, which the model does not",
            f"correct the data; the model has: {', '.join(task.labels)}",
        ) from None
    scores: NDArray[np.float32] = np.concatenate(
        [predictor.scores(texts[i : i + _GRADED]) for i in range(0, len(texts), _GRADED)]
    )
    measure = measure_of(task, truth, scores)
    return Grade(task.labels, tuple(task.decide(scores)), classification_metrics(task, truth, scores), measure)


def texts_and_labels(
    source: str, task: Classification, text_columns: Sequence[str], label_columns: Sequence[str], reading: Reading
) -> list[tuple[str, str | None]]:
    """Read texts, and their labels where the source has them."""
    try:
        rows = labelled_rows(source, task, text_columns=text_columns, label_columns=label_columns, reading=reading)
        return [(e.asked, e.label) for e in rows.examples]
    except DataError as no_labels:
        if label_columns:
            raise
        if task.pair:
            texts = read_pairs(source, text_columns, reading)
        else:
            texts = read_texts(source, text_columns or None, task.text_separator, reading=reading)
        return unanswered([row.text for row in texts], no_labels)
