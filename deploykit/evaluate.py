"""Measure any predictor on labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.data.classification import Columns, Example, check_labels, load_examples
from deploykit.errors import DataError
from deploykit.metrics import classification_metrics
from deploykit.predictor import Predictor
from deploykit.runtime.text import normalize
from deploykit.tasks import Task

_CHUNK = 1024


@dataclass(frozen=True)
class LabelledRows:
    """Rows to measure on: as they are, duplicates included. ``skipped`` rows had no text or no label."""

    examples: list[Example]
    skipped: int


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` as ``classification_metrics`` gives them, over ``rows`` rows."""

    metrics: dict[str, Any]
    rows: int
    skipped: int


def labelled_rows(
    source: str,
    task: Task,
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
        multi_label=task.multi_label,
        encoding=encoding,
        split=split,
    )
    examples = [
        Example(text, row.label, row.origin)
        for row in raw
        if row.text is not None
        and row.label is not None
        and (row.label or task.multi_label)
        and (text := normalize(row.text))
    ]
    if not examples:
        raise DataError(f"{source}: no row has both a text and a label", "give a file of labelled rows")
    check_labels(examples, task.labels, source, multi_label=task.multi_label)
    return LabelledRows(examples, len(raw) - len(examples))


def evaluate(
    predictor: Predictor, rows: LabelledRows, *, progress: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Answer every row and compare. ``progress`` is called with (rows done, rows in all)."""
    examples = rows.examples
    scores = []
    for start in range(0, len(examples), _CHUNK):
        scores.append(predictor.scores([e.text for e in examples[start : start + _CHUNK]]))
        progress(min(start + _CHUNK, len(examples)), len(examples))
    truth = predictor.task.targets([e.label for e in examples])
    metrics = classification_metrics(predictor.task, truth, np.concatenate(scores))
    return Evaluation(metrics, len(examples), rows.skipped)
